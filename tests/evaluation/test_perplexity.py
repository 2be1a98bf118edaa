"""Perplexity and KL against figures recorded from transformers; bits per byte by hand; what a run leaves behind."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.errors import (
    CheckpointError,
    ContextLengthError,
    DestinationError,
    InvalidRequestError,
    TokenizerError,
)
from mlx_mixtral.evaluation import perplexity
from mlx_mixtral.evaluation.corpus import TokenProgress, encode_texts
from mlx_mixtral.evaluation.journal import EvaluationJournal
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.evaluation.reference import Reference
from mlx_mixtral.evaluation.texts import Text

from .support import GOLDEN, TEXTS

COUNTS = {name: len(ids) - 1 for name, ids in GOLDEN["ids"].items()}
CASES = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['window']}-{case['stride']}")
PRECISE = {"rel": 1e-4}


@CASES
def test_perplexity_is_the_recorded_one(model: Mixtral, case: dict[str, Any]) -> None:
    found = evaluate(model, TEXTS, window=case["window"], stride=case["stride"])
    total = sum(COUNTS.values())
    assert found.overall.tokens == total
    assert found.overall.perplexity == pytest.approx(math.exp(sum(case["nll"].values()) / total), **PRECISE)
    for name, count in COUNTS.items():
        score = found.domains[name]
        assert score.tokens == count
        assert score.bytes == len(GOLDEN["texts"][name].encode())
        assert score.perplexity == pytest.approx(math.exp(case["nll"][name] / count), **PRECISE)
        assert score.bits_per_byte == pytest.approx(case["nll"][name] / math.log(2) / score.bytes, **PRECISE)
        assert found.files[f"{name}.txt"] == score


@CASES
def test_distance_to_a_whole_reference_is_the_recorded_one(
    model: Mixtral, coarse_model: Mixtral, case: dict[str, Any], tmp_path: Path
) -> None:
    windows = {"window": case["window"], "stride": case["stride"]}
    evaluate(model, TEXTS, **windows, save_reference=tmp_path / "ref", top_k=4096)
    found = evaluate(coarse_model, TEXTS, **windows, reference=tmp_path / "ref")
    compared = found.overall.comparison
    assert compared is not None
    total = sum(COUNTS.values())
    assert compared.kl_mean == pytest.approx(case["kl_mean"], **PRECISE)
    assert compared.kl == pytest.approx(case["kl_percentiles"], **PRECISE)
    assert compared.top1_agreement == pytest.approx(case["top1_agreement"], abs=1e-12)
    assert compared.reference_perplexity == pytest.approx(math.exp(sum(case["nll"].values()) / total), **PRECISE)
    ratio = math.exp((sum(case["coarse_nll"].values()) - sum(case["nll"].values())) / total)
    assert compared.perplexity_ratio == pytest.approx(ratio, **PRECISE)
    by_domain = {name: score.comparison.kl_mean for name, score in found.domains.items() if score.comparison}
    assert by_domain == pytest.approx(case["kl"], **PRECISE)


def test_a_reference_of_the_likeliest_tokens_gives_the_merged_distance(
    model: Mixtral, coarse_model: Mixtral, tmp_path: Path
) -> None:
    case = GOLDEN["cases"][0]
    windows = {"window": case["window"], "stride": case["stride"]}
    evaluate(model, TEXTS, **windows, save_reference=tmp_path / "ref", top_k=GOLDEN["top_k"])
    found = evaluate(coarse_model, TEXTS, **windows, reference=tmp_path / "ref").overall.comparison
    assert found is not None
    assert found.kl_mean == pytest.approx(case["kl_merged"], **PRECISE)
    assert found.kl_mean < case["kl_mean"]
    assert found.top1_agreement == pytest.approx(case["top1_agreement"], abs=1e-12)
    # Six bytes for each token kept, eight more for each token of the text, and a header.
    size = (tmp_path / "ref").stat().st_size
    assert 0 < size - sum(COUNTS.values()) * (6 * GOLDEN["top_k"] + 8) < 2000


def test_bits_per_byte_by_hand(even_model: Mixtral) -> None:
    """Every token has probability 1/4096, 12 bits: "Où ?" has 5 bytes, and so many tokens."""
    tokens = len(even_model.tokenizer.encode("Où ?", bos=False))
    found = evaluate(even_model, [Text("fr", "a", "Où ?")])
    assert (found.overall.tokens, found.overall.bytes) == (tokens, 5)
    assert found.overall.perplexity == pytest.approx(4096, rel=1e-6)
    assert found.overall.bits_per_byte == pytest.approx(12 * tokens / 5, rel=1e-6)
    assert found.overall.perplexity_stderr == pytest.approx(0, abs=1e-3)


def test_a_model_against_itself_is_no_distance_away(model: Mixtral, tmp_path: Path) -> None:
    evaluate(model, TEXTS[:1], window=32, save_reference=tmp_path / "ref", top_k=8)
    found = evaluate(model, TEXTS[:1], window=32, reference=Reference(tmp_path / "ref"))
    compared = found.overall.comparison
    assert compared is not None
    assert compared.kl_mean == pytest.approx(0, abs=1e-9)
    assert (compared.top1_agreement, compared.perplexity_ratio) == (1.0, pytest.approx(1, rel=1e-6))


def test_worst_tokens_are_shown_in_their_place(model: Mixtral, coarse_model: Mixtral, tmp_path: Path) -> None:
    evaluate(model, TEXTS, window=32, save_reference=tmp_path / "ref", top_k=4096)
    found = evaluate(coarse_model, TEXTS, window=32, reference=tmp_path / "ref", worst=3)
    assert [token.kl for token in found.worst] == sorted((token.kl for token in found.worst), reverse=True)
    first = found.worst[0]
    assert first.kl == pytest.approx(GOLDEN["cases"][0]["kl_percentiles"]["100"], **PRECISE)
    text = next(text for text in TEXTS if text.name == first.file)
    assert (first.before + first.token).strip() in text.text
    ids = GOLDEN["ids"][text.domain]
    assert first.token == model.tokenizer.decode([ids[first.place]], continues=True)
    logits = np.array(
        model.logits(ids[: first.place] if first.place <= 64 else ids[first.place // 64 * 64 : first.place])
    )
    likeliest = int(logits[-1].argmax())
    assert first.reference_best == model.tokenizer.decode([likeliest], continues=True)


def test_streamed_experts_and_short_chunks_give_the_same(tiny: Path, model: Mixtral) -> None:
    with load(tiny) as streamed:
        streamed.set_memory(streamed.min_memory_bytes, context=64)
        assert streamed.module.is_streamed
        # Some chunks are context alone, of which nothing is predicted.
        streamed.residency.plan = replace(streamed.residency.plan, chunk_tokens=16)
        found = evaluate(streamed, TEXTS[:2], window=48, stride=8)
        assert streamed.residency.bytes_read > 0
    wanted = evaluate(model, TEXTS[:2], window=48, stride=8)
    assert found.overall.perplexity == pytest.approx(wanted.overall.perplexity, rel=1e-5)
    assert found.window == 48


def test_by_length_is_every_token_once(model: Mixtral) -> None:
    found = evaluate(model, TEXTS, window=40)
    assert [(bucket.low, bucket.high) for bucket in found.by_length] == [(1, 32), (33, 40)]
    total = sum(COUNTS.values())
    assert sum(bucket.tokens for bucket in found.by_length) == total
    loss = sum(bucket.tokens * math.log(bucket.perplexity) for bucket in found.by_length)
    assert loss == pytest.approx(total * math.log(found.overall.perplexity))
    short = [min(32, n - start) for n in COUNTS.values() for start in range(0, n, 40)]
    assert found.by_length[0].tokens == sum(short)


@pytest.mark.parametrize("saving", [False, True])
def test_an_interrupted_run_goes_on_from_its_journal(
    model: Mixtral, tmp_path: Path, saving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = {"save_reference": tmp_path / "ref", "top_k": 8} if saving else {}
    wanted = evaluate(model, TEXTS, window=20, **({**save, "save_reference": tmp_path / "whole"} if saving else {}))
    identity = {"model": "x", "window": 20}
    place = tmp_path / "run.journal"
    stop_at = 50

    def interrupt(at: TokenProgress) -> None:
        if at.done_tokens > stop_at:
            raise KeyboardInterrupt

    # A window at a time, where a chunk would take them all.
    monkeypatch.setattr(model.residency, "plan", replace(model.residency.plan, chunk_tokens=20))
    interrupted = pytest.raises(KeyboardInterrupt)
    with interrupted as caught, EvaluationJournal(place, identity) as journal:
        evaluate(model, TEXTS, window=20, **save, journal=journal, progress=interrupt)
    assert f"kept in {place}" in caught.value.__notes__[0]
    assert not (tmp_path / "ref").exists()
    with place.open("a") as file:
        file.write('{"part": "model", "index": 9, "logp')  # cut off by a power failure
    calls: list[int] = []
    score = perplexity.score

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1].size)
        return score(*arguments, **options)

    monkeypatch.setattr(perplexity, "score", counted)
    with EvaluationJournal(place, identity) as journal:
        found = evaluate(model, TEXTS, window=20, **save, journal=journal)
    assert 0 < sum(calls) < found.overall.tokens - stop_at + 20
    assert found.overall.perplexity == pytest.approx(wanted.overall.perplexity, rel=1e-5)
    assert not place.exists()
    if saving:
        ours, theirs = Reference(tmp_path / "ref"), Reference(tmp_path / "whole")
        np.testing.assert_allclose(ours.target, theirs.target, atol=1e-5)
        np.testing.assert_allclose(ours.kept(0, 49).logprobs, theirs.kept(0, 49).logprobs, atol=1e-4)


def test_windows_are_done_again_when_the_file_they_went_into_is_gone(model: Mixtral, tmp_path: Path) -> None:
    place = tmp_path / "run.journal"

    def interrupt(at: TokenProgress) -> None:
        if at.done_tokens:
            raise KeyboardInterrupt

    save = {"window": 32, "save_reference": tmp_path / "ref", "top_k": 4}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TEXTS[:2], **save, journal=EvaluationJournal(place, {}), progress=interrupt)
    (tmp_path / ".ref.partial").unlink()
    with EvaluationJournal(place, {}) as journal:
        evaluate(model, TEXTS[:2], **save, journal=journal)
    kept = Reference(tmp_path / "ref").kept(0, sum(COUNTS[text.domain] for text in TEXTS[:2]))
    assert (kept.logprobs < 0).all()


def test_what_a_reference_holds_are_distributions(model: Mixtral, tmp_path: Path) -> None:
    evaluate(model, TEXTS[:1], window=32, save_reference=tmp_path / "ref", top_k=50)
    kept = Reference(tmp_path / "ref").kept(0, COUNTS["en"])
    total = np.exp(kept.logprobs, dtype=np.float64).sum(axis=1) + np.exp(kept.rest, dtype=np.float64)
    np.testing.assert_allclose(total, 1, atol=1e-6)  # float32 sums over the vocabulary are off by 1e-5
    assert (np.diff(kept.logprobs, axis=1) <= 0).all()
    assert all(len(set(row)) == 50 for row in kept.ids.tolist())


def test_a_journal_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    place = tmp_path / "j"
    EvaluationJournal(place, {"model": "a", "window": 64}).add("model", [(0, {})])
    before = place.read_bytes()
    with pytest.raises(DestinationError, match=r"window 64, but this one has 32.*--restart"):
        EvaluationJournal(place, {"model": "a", "window": 32})
    assert place.read_bytes() == before
    assert EvaluationJournal(place, {"model": "a", "window": 32}, restart=True).get("model", 0) is None
    place.write_text("my notes\n")
    with pytest.raises(DestinationError, match="is not the journal of an evaluation"):
        EvaluationJournal(place, {})
    assert place.read_text() == "my notes\n"


def test_a_reference_of_something_else_is_refused(model: Mixtral, tmp_path: Path) -> None:
    place = tmp_path / "ref"
    evaluate(model, TEXTS[:1], window=64, save_reference=place, top_k=4)
    for texts, window, message in (
        (TEXTS[1:2], 64, r"made from another text: \d+ tokens, but this one has \d+"),
        ([Text("en", "en.txt", TEXTS[0].text[:-1] + "!")], 64, "another text"),
        (TEXTS[:1], 32, "made with window 64 and stride 64, not 32 and 32; give --window 64 --stride 64"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            evaluate(model, texts, window=window, reference=place)
    corpus = encode_texts(model.tokenizer, TEXTS[:1])
    with pytest.raises(InvalidRequestError, match=r"has another vocabulary: 4096, while the model's has 32000"):
        Reference(place).header.check_text(corpus, 32000, 64, 64, place)
    (tmp_path / "text").write_text("no")
    for path in (tmp_path / "text", tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match=r"is not a reference|cannot be read"):
            evaluate(model, TEXTS[:1], reference=path)
    damaged = bytearray(place.read_bytes())
    damaged[-200:] = b"\xff" * 200  # ids beyond the vocabulary
    place.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluate(model, TEXTS[:1], window=64, reference=place)


def test_a_reference_never_replaces_another_file(model: Mixtral, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(DestinationError, match="is not a reference file"):
        evaluate(model, TEXTS[:1], save_reference=tmp_path / "model.safetensors")
    with pytest.raises(DestinationError, match="there is no folder"):
        evaluate(model, TEXTS[:1], save_reference=tmp_path / "none" / "ref")
    for top_k in (0, 4097):
        with pytest.raises(InvalidRequestError, match=f"top_k is {top_k}; it must be 1 to 4096"):
            evaluate(model, TEXTS[:1], save_reference=tmp_path / "ref", top_k=top_k)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_reference_beyond_its_bound_is_refused_with_what_fits(
    model: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mixtral.evaluation.reference.MAX_FILE_BYTES", COUNTS["en"] * (6 * 20 + 8))
    with pytest.raises(InvalidRequestError, match="give --top-k 20 at most"):
        evaluate(model, TEXTS[:1], save_reference="never", top_k=21)


def test_what_cannot_be_measured_is_refused(model: Mixtral) -> None:
    one = model.tokenizer.decode([model.tokenizer.encode("the", bos=False)[0]])
    for texts, message in (
        ([], "no text was given"),
        ([Text("empty", "a.txt", "")], r"text a\.txt of domain 'empty' has no tokens"),
        ([*TEXTS, Text("short", "b.txt", one)], r"text b\.txt of domain 'short' has 1 token; at least 2"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            evaluate(model, texts)
    with pytest.raises(ContextLengthError, match="window is 1025 tokens; the model's context holds 1024"):
        evaluate(model, TEXTS, window=1025)
    for options, message in (
        ({"window": 0}, "window is 0"),
        ({"stride": -1}, "stride is -1"),
        ({"window": 8, "stride": 9}, "stride is 9 tokens, more than the window's 8"),
        ({"reference": "a", "save_reference": "b"}, "."),
    ):
        with pytest.raises((InvalidRequestError, CheckpointError), match=message):
            evaluate(model, TEXTS, **options)


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "goldens" / "transformers" / "base_8x2"
    with load(folder) as bare, pytest.raises(TokenizerError, match="no tokenizer"):
        evaluate(bare, TEXTS)

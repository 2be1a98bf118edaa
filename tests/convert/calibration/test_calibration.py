"""Calibration: statistics are those of the model's own forward pass, per expert, whatever is in memory at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import (
    CheckpointError,
    ConversionError,
    DestinationError,
    DiskSpaceError,
    InvalidRequestError,
    NonFiniteWeightsError,
)
from mlx_mixtral_convert import Calibration, Recipe, calibrate, convert
from mlx_mixtral_convert.calibration import check_place
from mlx_mixtral_convert.calibration.layer import Expert, Layer, read_matrix
from mlx_mixtral_convert.calibration.sensitivity import Sensitivity
from mlx_mixtral_convert.calibration.statistics import InputSum
from mlx_mixtral_convert.calibration.text import default_texts, sequences
from mlx_mixtral_convert.calibration.walk import Walk
from mlx_mixtral_convert.rounding import PRIOR_TOKENS, Search
from mlx_mixtral_convert.sources import open_source
from tests.convert.support import CONFIG, EXPERT, Tensors, dense_config, hashes, make_checkpoint, read_output

HELD_OUT = Path(__file__).parents[2] / "goldens" / "tiny-mixtral" / "heldout"
LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.block_sparse_moe.switch_mlp"


def tokens(count: int = 6, length: int = 20) -> Any:
    return np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (count, length)).astype(np.int32)


class WholeWalk(Walk):
    """Gathers second moments, too."""

    def new_sum(self, columns: int) -> InputSum:
        return InputSum(columns, full=True)


def walked(folder: Path, ids: Any) -> tuple[Walk, dict[str, Any]]:
    source = open_source(folder)
    walk, sums = WholeWalk(source, ids), {}
    for _, found in walk.layers():
        sums |= found
    return walk, sums | walk.head_sum()


@pytest.fixture(scope="module")
def tiny(short: Path) -> Path:
    """Two layers say of calibrating what six do."""
    return short


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", dtype="F32")


@pytest.fixture(scope="module")
def calibrated(tiny: Path) -> Calibration:
    return calibrate(tiny, tokens=2048)


@pytest.mark.parametrize("dense", [False, True])
def test_states_after_the_walk_give_the_models_logits(tmp_path: Path, dense: bool) -> None:
    folder = make_checkpoint(tmp_path / "source", dtype="F32", **(dense_config() if dense else {}))
    walk, _ = walked(folder, tokens())
    head = read_matrix(walk.source, list(matrices(walk.config))[-1])
    expected = load(folder).module(mx.array(tokens()))
    np.testing.assert_allclose(
        np.array(walk.final_norm(walk.hidden.sequences()) @ head.T), np.array(expected), rtol=1e-4, atol=1e-5
    )


def test_statistics_equal_a_naive_pass_over_single_tokens(small: Path) -> None:
    """The reference recomputes layer 1's experts from the model's hidden states, a token and an expert at a time."""
    ids = tokens()
    _, sums = walked(small, ids)
    module = load(small).module
    chunk = module.make_cache().chunk(len(ids), len(ids[0]))
    x = module.layers[0](module.embed_tokens.rows(mx.array(ids), mx.float32), 0, chunk)
    layer = module.layers[1]
    normed = layer.input_norm(x)
    h = x + layer.attention(normed, 1, chunk)
    inputs = np.array(layer.post_attention_norm(h)).reshape(-1, 128)
    weights = {name: np.array(value) for name, value in read_plain(small).items()}
    gate_logits = inputs @ weights[f"{LAYER}.block_sparse_moe.gate.weight"].T
    squares, moments, shares = np.zeros((4, 256)), np.zeros((4, 128, 128)), np.zeros(4)
    counts = np.zeros(4, int)
    for token, logits in zip(inputs, gate_logits, strict=True):
        chosen = np.argsort(logits)[-2:]
        share = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for expert, weight in zip(chosen, share, strict=True):
            prefix = f"{LAYER}.block_sparse_moe.experts.{expert}"
            gate = token @ weights[f"{prefix}.w1.weight"].T
            inner = gate / (1 + np.exp(-gate)) * (token @ weights[f"{prefix}.w3.weight"].T)
            squares[expert] += weight**2 * inner**2
            moments[expert] += weight**2 * np.outer(token, token)
            shares[expert] += weight**2
            counts[expert] += 1
    for expert in range(4):
        found = sums[f"{EXPERTS}.gate_proj"][expert]
        assert found.tokens == counts[expert] > 0
        np.testing.assert_allclose(found.hessian[0], moments[expert] / shares[expert], rtol=1e-3, atol=1e-4)
        down = sums[f"{EXPERTS}.down_proj"][expert]
        np.testing.assert_allclose(down.mean_squares, squares[expert] / shares[expert], rtol=1e-3, atol=1e-9)
    own = np.square(np.array(normed)).reshape(-1, 128).mean(axis=0)
    np.testing.assert_allclose(sums[f"{LAYER}.self_attn.q_proj"][0].mean_squares, own, rtol=1e-4)


def read_plain(folder: Path) -> dict[str, mx.array]:
    found = mx.load(str(folder / "model.safetensors"))
    assert isinstance(found, dict)
    return found


def test_no_more_than_one_expert_is_read_at_a_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(small)
    read: list[str] = []
    original = source.read
    monkeypatch.setattr(source, "read", lambda m, e, s: (read.append(f"{m.path}:{e}"), original(m, e, s))[1])
    walk = Walk(source, tokens())
    seen = []
    experts = Layer.experts

    def watched(layer: Layer) -> Iterator[Expert]:
        for expert in experts(layer):
            seen.append((expert.index, read[-3:]))
            yield expert

    monkeypatch.setattr(Layer, "experts", watched)
    walk.step()
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert all(path.endswith(f":{index}") for index, last in seen for path in last)


def test_it_is_saved_and_read_back_and_two_runs_are_the_same_bytes(
    calibrated: Calibration, tiny: Path, tmp_path: Path
) -> None:
    calibrated.save(tmp_path / "a")
    calibrate(tiny, tokens=2048).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = Calibration.load(tmp_path / "a")
    assert again.digest == calibrated.digest
    assert np.array_equal(again.tokens, calibrated.tokens)
    assert calibrated.tokens.size <= 2048


def test_nearly_all_experts_meet_the_default_text(calibrated: Calibration) -> None:
    """A fifth of it is measured here; of all of it, two experts of the 48 of all six layers still meet nothing."""
    counts = np.concatenate([found for name, found in calibrated.routed.items() if name.endswith("gate_proj")])
    assert len(counts) == 16
    assert (counts >= 4).mean() > 0.85


def test_the_default_text_shares_nothing_with_the_held_out_text() -> None:
    held = " ".join(" ".join(path.read_text() for path in HELD_OUT.glob("*.txt")).split())
    words = [word for text in default_texts() for word in text.split()]
    runs = [" ".join(words[i : i + 8]) for i in range(len(words) - 8)]
    assert len(runs) > 3000
    assert not [run for run in runs if run in held]


def test_rare_experts_lean_on_the_average(calibrated: Calibration, tiny: Path) -> None:
    config = open_source(tiny).config
    matrix = next(m for m in matrices(config) if m.path.endswith("layers.1.block_sparse_moe.switch_mlp.down_proj"))
    squares, routed = calibrated.mean_squares[matrix.path], calibrated.routed[matrix.path]
    never = Calibration(
        "", calibrated.tokens, {matrix.path: squares}, {matrix.path: np.where(np.arange(8) == 3, 0, routed)}, {}
    )
    average = np.average(squares, axis=0, weights=never.routed[matrix.path])
    found = Search(never).importance(matrix, 3)
    assert found is not None
    np.testing.assert_allclose(np.array(found), average + 0.01 * average.mean(), rtol=1e-4)
    assert PRIOR_TOKENS > 0


def test_a_calibrated_search_differs_and_is_recorded(tiny: Path, calibrated: Calibration, tmp_path: Path) -> None:
    calibrated.save(tmp_path / "file")
    convert(tiny, tmp_path / "a", recipe=Recipe(rounding="search"))
    convert(tiny, tmp_path / "b", recipe=Recipe(rounding="search"), calibration=tmp_path / "file")
    a, b = read_output(tmp_path / "a"), read_output(tmp_path / "b")
    assert {name: value.shape for name, value in a.items()} == {name: value.shape for name, value in b.items()}
    assert not mx.array_equal(a["lm_head.weight"], b["lm_head.weight"])
    assert mx.array_equal(a["model.embed_tokens.weight"], b["model.embed_tokens.weight"])
    recorded = json.loads((tmp_path / "b" / "conversion.json").read_text())["recipe"]
    assert (recorded["rounding"], recorded["calibration"]) == ("search", calibrated.digest)


def test_gptq_differs_from_search_where_an_expert_met_enough(
    tmp_path: Path, tiny: Path, calibrated: Calibration
) -> None:
    """That it repeats, streamed or not: tests/convert/sources/test_streamed_kinds.py."""
    for rounding in ("gptq", "search"):
        recipe = Recipe(3, overrides={"*": None, "*.layers.1.*down_proj": {"bits": 3}}, rounding=rounding)
        convert(tiny, tmp_path / rounding, recipe=recipe, calibration=calibrated)
    path = "model.layers.1.block_sparse_moe.switch_mlp.down_proj.weight"
    gptq, search = (np.array(read_output(tmp_path / name)[path]) for name in ("gptq", "search"))
    same = [np.array_equal(x, y) for x, y in zip(gptq, search, strict=True)]
    few = calibrated.routed[path.removesuffix(".weight")] < 96
    assert same == few.tolist()
    assert not all(same)


def test_losses_rise_as_bits_fall_and_the_reference_is_the_measured_kl(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tuple(QuantizationSpec(bits, 64) for bits in (2, 3, 4, 6))
    monkeypatch.setattr("mlx_mixtral_convert.calibration.sensitivity.CANDIDATES", few)
    source = open_source(small)
    walk, sensitivity = Walk(source, tokens()), Sensitivity(source, tokens(3))
    sensitivity.start()
    for layer, _ in walk.layers():
        sensitivity.step(layer)
    losses, anchors = sensitivity.finish(walk)
    groups = ("qkv", "o", "gate_up", "down")
    assert set(losses) == {f"layers.{n}.{g}" for n in range(2) for g in groups} | {"embed_tokens", "lm_head"}
    for name, found in losses.items():
        assert found["2-bit g64"] > found["3-bit g64"] > found["4-bit g64"] > found["6-bit g64"] > 0, name
    path = "model.layers.1.block_sparse_moe.switch_mlp.down_proj"
    one = Recipe(None, overrides={path: QuantizationSpec(3, 64)}, rounding="search")
    assert losses["layers.1.down"]["3-bit g64"] == pytest.approx(kl_of(small, one).mean(), rel=0.02)
    # Uniform models, against conversions that the runtime loads.
    assert {rounding: len(rows) for rounding, rows in anchors.items()} == {"plain": 4, "search": 4}
    for rounding, rows in anchors.items():
        for bits, (predicted, measured, error) in zip((6, 4, 3, 2), rows, strict=True):
            kl = kl_of(small, Recipe(bits, rounding=rounding))
            assert predicted == pytest.approx(sum(found[f"{bits}-bit g64"] for found in losses.values()), rel=1e-4)
            assert measured == pytest.approx(kl.mean(), rel=0.03)
            assert error == pytest.approx(kl.std(ddof=1) / 3**0.5, rel=0.1)


def kl_of(folder: Path, recipe: Recipe) -> Any:
    """KL ``[3]`` of the whole model as a real conversion packs it, for each sequence."""
    out = folder.parent / f"packed {recipe}"
    convert(folder, out, recipe=recipe, dtype="bfloat16")
    true, other = (load(f, dtype="float32").module(mx.array(tokens(3))) for f in (folder, out))
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (true, other))
    return np.array((mx.exp(p) * (p - q)).sum(axis=-1).mean(axis=-1))


def test_text_that_is_empty_too_short_or_no_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    for content, message in ((b" \n", "is empty"), (b"Too short.", "is too short"), (b"\xff\xfe\x00", "is not UTF-8")):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(InvalidRequestError, match=message):
            calibrate(tiny, [tmp_path / "text"])
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        calibrate(tiny, [tmp_path / "absent"])


def test_another_models_calibration_is_refused(calibrated: Calibration, tmp_path: Path, tiny: Path) -> None:
    small = make_checkpoint(tmp_path / "small")
    with pytest.raises(ConversionError, match="measured on another model"):
        convert(small, tmp_path / "out", recipe=Recipe(rounding="search"), calibration=calibrated)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Calibration.load(tiny / "config.json")
    with pytest.raises(CheckpointError, match="is not a calibration file"):
        Calibration.load(tiny / "model.safetensors")
    with pytest.raises(InvalidRequestError, match="needs a calibration file"):
        convert(tiny, tmp_path / "out", recipe=Recipe(rounding="gptq"))


def test_sequences_begin_with_bos_and_fit_the_context(tiny: Path) -> None:
    found = sequences(load(tiny).tokenizer, ["word " * 3000], None, 64)
    assert found.shape[1] == 64
    assert (found[:, 0] == 1).all()
    assert len(sequences(load(tiny).tokenizer, ["word " * 3000], 300, 64)) == 4


def test_saving_replaces_a_calibration_and_nothing_else(calibrated: Calibration, tiny: Path, tmp_path: Path) -> None:
    calibrated.save(tmp_path / "file")
    once = (tmp_path / "file").read_bytes()
    calibrated.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == once
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((tiny / weights.name).read_bytes())
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(once[:-10])
    for name in ("model.safetensors", "thesis.tex", "empty", "cut"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(DestinationError, match=rf"{name} exists and is not a calibration file; give another name"):
            calibrated.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(DestinationError, match="is a folder; give a file"):
        calibrated.save(tmp_path)
    with pytest.raises(DestinationError, match=r"no folder .*/no; create it first"):
        calibrated.save(tmp_path / "no" / "file")
    with pytest.raises(DestinationError, match="File name too long"):
        calibrated.save(tmp_path / ("n" * 300))
    calibrated.save(tmp_path / ("n" * 255))


def test_a_place_in_the_source_is_refused_through_links_too(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").symlink_to(source / "config.json")
    for place in ("source/file", "source/model.safetensors", "link/file", "file", "source/new/file"):
        with pytest.raises(DestinationError, match=r"lies in the source .*; give a file outside it"):
            check_place(tmp_path / place, source)
    with pytest.raises(DestinationError, match="is the source itself"):
        check_place(tmp_path / "link", source)
    check_place(tmp_path / "new", source)
    check_place(tmp_path / "new", "owner/name")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "source"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_save_that_fails_keeps_the_old_file_and_names_no_temporary_one(
    calibrated: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    calibrated.save(tmp_path / "file")
    before = hashes(tmp_path)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC if call == "replace" else errno.EIO, "no room")

    monkeypatch.setattr(Path if call == "replace" else os, call, full)
    with pytest.raises((DiskSpaceError, DestinationError)) as caught:
        calibrated.save(tmp_path / "file")
    assert "file" in str(caught.value)
    assert "partial" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.weight", np.nan),
        (EXPERT, np.nan),
        (EXPERT, np.inf),
        ("model.layers.1.self_attn.k_proj.weight", np.nan),
        ("model.layers.0.block_sparse_moe.gate.weight", np.inf),
        ("model.layers.1.post_attention_layernorm.weight", np.inf),
        ("model.norm.weight", np.nan),
        ("lm_head.weight", np.inf),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(tiny: Path, tmp_path: Path, name: str, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[-1] = value

    changes = {"vocab_size": 4096, "max_position_embeddings": 256}
    source = make_checkpoint(tmp_path / "source", edit=spoil, **changes)
    shutil.copy(tiny / "tokenizer.model", source)
    with pytest.raises(NonFiniteWeightsError, match=f"tensor '{name}' holds NaN or infinity"):
        calibrate(source, tokens=1024)


@pytest.mark.parametrize("count", [-1, 1023])
def test_too_few_tokens_are_refused_with_the_least_there_may_be(tiny: Path, count: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{count} tokens are too few .* at least 1024, 4 sequences of 256"):
        calibrate(tiny, tokens=count)


def test_an_empty_source_is_not_the_current_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    with pytest.raises(InvalidRequestError, match="empty name"):
        calibrate("", tokens=1024)

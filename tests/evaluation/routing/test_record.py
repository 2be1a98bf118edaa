"""Recording: against the router logits that transformers computed, streamed, in chunks; and the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_mixtral import Mixtral, load
from mlx_mixtral.errors import CheckpointError, ContextLengthError, DestinationError, InvalidRequestError, MixtralError
from mlx_mixtral.evaluation.corpus import TokenProgress
from mlx_mixtral.evaluation.routing import RoutingRecord, record_texts
from mlx_mixtral.evaluation.routing.record import trace_file_bytes
from mlx_mixtral.evaluation.texts import Text
from mlx_mixtral.experts import trace as trace_module
from mlx_mixtral.experts.trace import FORMAT, RoutingTrace, hit_rates
from mlx_mixtral.model.planning import TRACE_FILE
from mlx_mixtral.model.routing import RoutingObserver, ordered_choice

from .support import beginnings


@pytest.fixture(scope="module")
def made(model: Mixtral) -> RoutingRecord:
    return record_texts(model, beginnings(300), max_tokens=80, window=50, name="tiny")


def test_choices_and_entropy_are_those_of_transformers(
    model: Mixtral, recorded: dict[str, np.ndarray[Any, Any]]
) -> None:
    for ids, router_logits in zip(recorded["ids"][:3], recorded["router_logits"][:3], strict=True):
        with RoutingObserver(model.module) as observer:
            mx.eval(model.module.hidden(mx.array(ids[None]), model.make_cache()))
            routed = observer.take()
        logits = router_logits.astype(np.float64).transpose(1, 0, 2)  # [T, L, E]
        wanted = np.argsort(-logits, axis=-1)[..., :2]
        # Where two are nearly alike, rounding decides.
        best = -np.sort(-logits, axis=-1)[..., :3]
        clear = (best[..., :-1] - best[..., 1:] > 1e-3).all(axis=-1)
        assert clear.mean() > 0.99
        assert np.array_equal(routed.experts[clear], wanted[clear])
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        assert routed.entropy == pytest.approx(-(weights * np.log2(weights)).sum(axis=-1), abs=2e-3)


def test_choices_are_ordered_by_logit_and_then_by_number() -> None:
    logits = mx.array([[0.0, 2.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-mx.inf, 0.0, -mx.inf, 50.0]])
    routed = ordered_choice(mx.array([[2, 1], [3, 0], [3, 1]]), logits)
    assert routed.experts.tolist() == [[1, 2], [0, 3], [3, 1]]
    assert routed.entropy[1:] == pytest.approx([2.0, 0.0], abs=1e-6)


def test_every_token_but_bos_is_recorded_once_in_windows_after_bos(model: Mixtral, made: RoutingRecord) -> None:
    assert made.domains == ("code", "de", "en", "es", "fr", "it", "math")
    assert made.trace.experts.shape == (7 * 80, 6, 2)
    assert made.lengths.tolist() == [49, 31] * 7
    assert made.segments.tolist() == [number for number in range(7) for _ in range(2)]
    text = beginnings(300)[2]
    ids = model.tokenizer.encode(text.text)
    assert made.pieces is not None
    assert "".join(made.pieces[160:240]) == model.tokenizer.decode(ids[:81])
    for window, place in ((ids[1:50], 160), (ids[50:81], 209)):
        alone = model.routing_trace([[ids[0], *window]]).experts[1:]
        assert np.array_equal(made.trace.experts[place : place + len(window)], alone)


def test_streamed_experts_and_short_chunks_give_the_same(tiny: Path, model: Mixtral, made: RoutingRecord) -> None:
    with load(tiny, memory=model.min_memory_bytes + 300_000) as small:
        assert small.residency.is_streamed
        assert small.engine.plan.chunk_tokens < 50
        again = record_texts(small, beginnings(300), max_tokens=80, window=50, name="tiny")
    assert np.array_equal(again.trace.experts, made.trace.experts)
    assert again.entropy is not None
    assert made.entropy is not None
    assert again.entropy == pytest.approx(made.entropy, abs=2e-3)


def test_progress_counts_tokens(model: Mixtral) -> None:
    seen: list[TokenProgress] = []
    record_texts(model, beginnings(60)[:2], max_tokens=10, progress=seen.append)
    assert seen == [TokenProgress(10, 20), TokenProgress(20, 20)]


def test_a_record_comes_back_and_is_a_trace_too(made: RoutingRecord, tmp_path: Path) -> None:
    made.save(tmp_path / "a.trace")
    again = RoutingRecord.load(tmp_path / "a.trace")
    again.save(tmp_path / "b.trace")
    assert (tmp_path / "a.trace").read_bytes() == (tmp_path / "b.trace").read_bytes()
    assert (again.domains, again.pieces, again.name) == (made.domains, made.pieces, "tiny")
    assert np.array_equal(again.segments, made.segments)
    assert made.entropy is not None
    assert np.array_equal(again.entropy, made.entropy)
    assert np.array_equal(RoutingTrace.load(tmp_path / "a.trace").experts, made.trace.experts)
    estimate = trace_file_bytes(560, 6, 2, sum(len(piece.encode()) for piece in made.pieces or ()), 14)
    assert (tmp_path / "a.trace").stat().st_size <= estimate


def test_budgets_are_planned_with_a_record_beside_the_weights(checkpoint: Path, made: RoutingRecord) -> None:
    made.save(checkpoint / TRACE_FILE)
    with load(checkpoint) as model:
        assert np.array_equal(model.engine.planner.hit_rates, hit_rates(made.trace, "lru"))


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def test_a_bare_trace_is_of_one_domain(made: RoutingRecord, tmp_path: Path) -> None:
    RoutingTrace(made.trace.experts, 8, (5,)).save(tmp_path / "bare")
    found = RoutingRecord.load(tmp_path / "bare")
    assert (found.domains, found.starts, found.pieces, found.entropy) == (("text",), (0, 5), None, None)


def small(**changes: Any) -> RoutingRecord:
    options: dict[str, Any] = {"domains": ("a", "b"), "segments": np.array([0, 1])} | changes
    return RoutingRecord(RoutingTrace(np.array([[[0, 1]], [[1, 2]]], np.uint16), 4, (0, 1)), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": np.array([0, 0])}, "domain 'b' has no tokens"),
        ({"segments": np.array([0, 2])}, "beyond the 2"),
        ({"segments": np.array([0])}, "each of 2 stretches"),
        ({"segments": np.array([0, 1], np.int32)}, "int64"),
        ({"domains": ()}, "1 to 256"),
        ({"domains": ("a", "a")}, "each name once"),
        ({"entropy": np.zeros((2, 2), np.float16)}, "entropy must be"),
        ({"entropy": np.full((2, 1), np.nan, np.float16)}, "finite"),
        ({"pieces": ("x",)}, "1 pieces of text were given for 2 tokens"),
    ],
)
def test_what_is_no_record_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        small(**changes)


def damage(change: Callable[[dict[str, Any], dict[str, Any]], None], path: Path) -> None:
    small(pieces=("x", "é"), entropy=np.zeros((2, 1), np.float16)).save(path)
    with safe_open(str(path), "numpy") as file:
        header = json.loads(file.metadata()[FORMAT])
        arrays = {
            name: file.get_tensor(name) for name in ("experts", "starts", "segments", "entropy", "text", "text_ends")
        }
    change(header, arrays)
    save_file(arrays, str(path), {FORMAT: json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, arrays: header.pop("domains"),
        lambda header, arrays: header.update(domains=[1, 2]),
        lambda header, arrays: header.update(domains=["a", "b", "c"]),
        lambda header, arrays: header.update(model=3),
        lambda header, arrays: arrays.update(segments=np.array([0, 7])),
        lambda header, arrays: arrays.update(segments=np.array([[0, 1]])),
        lambda header, arrays: arrays.update(entropy=np.zeros((3, 1), np.float16)),
        lambda header, arrays: arrays.update(text_ends=np.array([3, 1])),
        lambda header, arrays: arrays.update(text_ends=np.array([1, 10**9])),
        lambda header, arrays: arrays.update(text_ends=np.array([-1, 1])),
        lambda header, arrays: arrays.update(text=np.zeros(3, np.float32)),
        lambda header, arrays: arrays.pop("text"),
    ],
)
def test_damaged_files_are_one_error(change: Any, tmp_path: Path) -> None:
    damage(change, tmp_path / "damaged")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        RoutingRecord.load(tmp_path / "damaged")
    assert "\n" not in str(caught.value)


def test_files_too_large_to_read_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="take fewer tokens"):
        trace_file_bytes(200_000, 32, 2, 0)
    monkeypatch.setattr("mlx_mixtral.evaluation.routing.record.MAX_FILE_BYTES", 100)
    with pytest.raises(InvalidRequestError, match="take fewer tokens"):
        small().save(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DestinationError, match="no folder"):
        small().save(tmp_path / "no" / "a")
    assert trace_module.MAX_FILE_BYTES == 2**25


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_tokens": 1}, InvalidRequestError, "max_tokens is 1"),
        ({"window": 2}, InvalidRequestError, "at least 3 tokens"),
        ({"window": 5000}, ContextLengthError, "context holds 1024"),
        ({"texts": [Text("x", "x.txt", "")]}, InvalidRequestError, "domain 'x' has no tokens"),
        ({"texts": []}, InvalidRequestError, "no text was given"),
        ({"progress": 3}, InvalidRequestError, "progress is 3"),
    ],
)
def test_arguments_out_of_range(
    model: Mixtral, options: dict[str, Any], kind: type[MixtralError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        record_texts(model, options.pop("texts", beginnings(100)), **options)


def test_a_dense_model_has_no_routers() -> None:
    folder = Path(__file__).parents[2] / "goldens" / "transformers" / "mistral"
    with load(folder) as dense, pytest.raises(InvalidRequestError, match="this model is dense"):
        dense.routing_trace([[1, 2]])


def test_observers_are_gone_afterwards(model: Mixtral) -> None:
    with pytest.raises(ZeroDivisionError), RoutingObserver(model.module):
        raise ZeroDivisionError
    assert not any(layer.moe._observers for layer in model.module.layers)

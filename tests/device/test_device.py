"""What must hold on the device MLX chooses, in its type: the reference's logits, and one answer whatever the way to it.

Few shapes: on GPUs the first call of each kernel compiles for seconds. Results are compared to the bit where the same kernels
run, else as the type allows (``conftest.ALLOWED``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral import DraftModel, Mixtral, PromptLookup, load
from mlx_mixtral.doctor import run_doctor
from mlx_mixtral.machine.bandwidth import disk_bandwidth, memory_bandwidth
from mlx_mixtral_convert import Recipe, convert
from tests.device.conftest import Computing
from tests.experts.support import budget
from tests.shared import SharedFolders, random_checkpoint

Logits = npt.NDArray[np.float32]
PROMPT = [1, *(int(i) for i in np.random.default_rng(5).integers(3, 256, 30))]
MODES: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "3 bits, groups of 32": {"bits": 3, "group_size": 32},
    "4 bits": {"bits": 4},
    "6 bits": {"bits": 6},
    "8 bits": {"bits": 8},
    **{
        mode: {"bits": None, "mode": mode, "overrides": {"*.switch_mlp.*": {"mode": mode}}}
        for mode in ("mxfp4", "mxfp8", "nvfp4")
    },
    "unquantised": {"bits": None},
}  # fmt: skip
CACHES: list[dict[str, Any]] = [{"kv_bits": 8}, {"kv_bits": 4}, {"kv_size": 24, "kv_sinks": 3}]


def numbers(logits: mx.array) -> Logits:
    return np.asarray(logits.astype(mx.float32))


def bits(logits: mx.array) -> bytes:
    return numbers(logits).tobytes()


def assert_close(ours: Logits, theirs: Logits, computing: Computing, times: float = 1) -> None:
    """As close as the type allows: the KL divergence of each token's probabilities."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (theirs, ours))
    apart = (np.exp(p) * (p - q)).sum(axis=-1).reshape(-1)
    print(f"nats: median {np.median(apart):.1e}, 80% {np.quantile(apart, 0.8):.1e}, most {apart.max():.1e}")
    assert np.median(apart) <= times * computing.allowed.kl
    assert (apart <= 10 * times * computing.allowed.kl).mean() >= computing.allowed.share


@contextlib.contextmanager
def on_the_cpu(folder: Path, **options: Any) -> Iterator[Mixtral]:
    """The folder on the CPU in float32: what the rest of the suite holds against other implementations."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with load(folder, dtype="float32", **options) as model:
            yield model
    finally:
        mx.set_default_device(before)


def assert_greedy(model: Mixtral, prompt: Sequence[int], tokens: Sequence[int], computing: Computing) -> None:
    """Each of ``tokens`` has the largest logit after those before it, or one that the type cannot tell from it."""
    assert tokens
    logits = numbers(model.logits([*prompt, *tokens[:-1]])).reshape(-1, model.config.vocab_size)[len(prompt) - 1 :]
    short = logits.max(axis=-1) - logits[np.arange(len(tokens)), list(tokens)]
    print(f"below the largest: {short.max():.1e}")
    assert (short <= computing.allowed.logits).mean() >= computing.allowed.share, short


@pytest.fixture(scope="module")
def floats(shared: SharedFolders) -> Path:
    """Rows that all formats' groups divide."""
    changes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3}
    return shared("device floats", lambda folder: random_checkpoint(folder, **changes))


@pytest.fixture(scope="module")
def four_bit(shared: SharedFolders, floats: Path) -> Path:
    return shared("device 4-bit", lambda folder: convert(floats, folder, recipe=Recipe(4)))


@pytest.fixture(scope="module")
def opened(four_bit: Path, computing: Computing) -> Callable[..., Mixtral]:
    """``opened(folder, **options)`` loads in the type under test."""

    def open_(folder: Path = four_bit, **options: Any) -> Mixtral:
        return load(folder, **{"dtype": computing.name} | options)

    return open_


@pytest.fixture(scope="module")
def whole(opened: Callable[..., Mixtral]) -> Iterator[Mixtral]:
    with opened(prefix_cache=0) as model:
        yield model


def test_the_bundled_checkpoint_has_transformers_logits_and_text(
    computing: Computing, opened: Callable[..., Mixtral], tiny: Path, recorded: dict[str, Any]
) -> None:
    if not computing.multiplies_floats:
        pytest.skip("unquantised experts in 16 bits need a GPU")
    with opened(tiny) as model:
        ours = numbers(model.module(mx.array(recorded["ids"])))
        assert_close(ours, recorded["logits"], computing)
        prompt = recorded["ids"][0].tolist()
        assert_greedy(model, prompt, model.generate(prompt, max_tokens=16).token_ids, computing)


@pytest.mark.parametrize("packing", ["4-bit", "unquantised"])
def test_streamed_experts_are_resident_ones_to_the_bit(
    computing: Computing, opened: Callable[..., Mixtral], four_bit: Path, floats: Path, packing: str
) -> None:
    if packing == "unquantised" and not computing.multiplies_floats:
        pytest.skip("unquantised experts in 16 bits need a GPU")
    folder = four_bit if packing == "4-bit" else floats
    with opened(folder) as model:
        logits, out = bits(model.logits(PROMPT)), model.generate(PROMPT, max_tokens=12).token_ids
        sizes = [budget(model, share) for share in (0.0, 0.4, 0.75)]
    for size in sizes:
        with opened(folder, memory=size) as model:
            assert model.residency.is_streamed
            assert bits(model.logits(PROMPT)) == logits
            assert model.generate(PROMPT, max_tokens=12).token_ids == out
            assert model.residency.misses > 0


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_caches_hold_what_they_hold_on_the_cpu(
    computing: Computing, opened: Callable[..., Mixtral], four_bit: Path, options: dict[str, Any]
) -> None:
    """Quantised and bounded ones, through a prompt in two pieces and steps after it."""

    def fed(model: Mixtral) -> Logits:
        cache, parts = model.make_cache(), []
        for start, stop in ((0, 20), (20, len(PROMPT)), *((at, at + 1) for at in range(len(PROMPT), len(PROMPT) + 8))):
            tokens = mx.array([(PROMPT * 2)[start:stop]], mx.int32)
            parts.append(numbers(model.module(tokens, cache))[0])
        return np.concatenate(parts)

    with on_the_cpu(four_bit, **options) as model:
        theirs = fed(model)
    with opened(**options) as model:
        ours = fed(model)
        # Of 16 steps of a 4-bit number a last bit in 16 bits decides more than of 256.
        assert_close(ours, theirs, computing, times=10 if options.get("kv_bits") == 4 else 1)
        assert_greedy(model, PROMPT[:8], model.generate(PROMPT[:8], max_tokens=8).token_ids, computing)


def test_a_kept_and_a_saved_prompt_go_on_as_one_that_was_computed(
    computing: Computing, opened: Callable[..., Mixtral], whole: Mixtral, tmp_path: Path
) -> None:
    longer = [*PROMPT, 9, 8, 7]
    with opened() as model:
        model.generate(PROMPT, max_tokens=2)
        found = model.generate(longer, max_tokens=12)
        assert found.stats.reused_tokens >= len(PROMPT)
        assert_greedy(whole, longer, found.token_ids, computing)
        model.save_prompt(tmp_path / "prompt.cache", PROMPT)
    with opened() as model:
        model.load_prompt(tmp_path / "prompt.cache")
        found = model.generate(longer, max_tokens=12)
        assert found.stats.reused_tokens == len(PROMPT)
        assert_greedy(whole, longer, found.token_ids, computing)


def test_rows_of_a_batch_are_what_they_are_alone(computing: Computing, whole: Mixtral) -> None:
    prompts = [PROMPT[:length] for length in (3, 30, 11, 5)]
    for prompt, row in zip(prompts, whole.generate_batch(prompts, max_tokens=10, max_rows=3), strict=True):
        assert_greedy(whole, prompt, row.token_ids, computing)
        if computing.dtype == "F32":
            assert row.token_ids == whole.generate(prompt, max_tokens=10).token_ids


@pytest.mark.parametrize("how", ["lookup", "draft"])
def test_speculation_gives_the_greedy_text(
    computing: Computing, opened: Callable[..., Mixtral], whole: Mixtral, how: str
) -> None:
    prompt = PROMPT[:10] * 3
    with opened() as draft:
        speculation = (
            PromptLookup(adaptive=False) if how == "lookup" else DraftModel(draft, max_tokens=3, adaptive=False)
        )
        out = whole.generate(prompt, max_tokens=16, speculation=speculation)
    assert out.stats.speculation is not None
    assert_greedy(whole, prompt, out.token_ids, computing)
    if computing.dtype == "F32":
        assert out.token_ids == whole.generate(prompt, max_tokens=16).token_ids


@pytest.mark.parametrize("mode", MODES)
def test_what_is_converted_here_computes_what_it_computes_on_the_cpu(
    computing: Computing, opened: Callable[..., Mixtral], floats: Path, tmp_path: Path, mode: str
) -> None:
    if mode == "unquantised" and not computing.multiplies_floats:
        pytest.skip("unquantised experts in 16 bits need a GPU")
    convert(floats, tmp_path / "out", recipe=Recipe(**MODES[mode]))
    with on_the_cpu(tmp_path / "out") as model:
        theirs = numbers(model.logits(PROMPT))
    with opened(tmp_path / "out") as model:
        ours = numbers(model.logits(PROMPT))
    assert_close(ours, theirs, computing)


def test_a_quantised_folder_computes_what_mlx_lm_computes_in_the_same_type(
    computing: Computing, opened: Callable[..., Mixtral], four_bit: Path
) -> None:
    from mlx_lm.utils import load_model

    network, _ = load_model(four_bit)
    network.set_dtype({"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[computing.dtype])
    theirs = numbers(network(mx.array([PROMPT])))[0]
    with opened() as model:
        ours = numbers(model.logits(PROMPT)).reshape(theirs.shape)
    assert_close(ours, theirs, computing)


@pytest.mark.device
def test_the_doctor_passes(computing: Computing, monkeypatch: pytest.MonkeyPatch) -> None:
    if not computing.multiplies_floats:
        pytest.skip("products of the CPU backend in 16 bits are at the edge of what a GPU is allowed")
    monkeypatch.setattr("mlx_mixtral.doctor.memory_bandwidth", lambda: memory_bandwidth(2**22, 2))
    monkeypatch.setattr("mlx_mixtral.doctor.disk_bandwidth", lambda: disk_bandwidth(2**23))
    diagnosis = run_doctor()
    assert [(result.name, result.measured) for result in diagnosis.results if not result.passed] == []
    assert diagnosis.device.kind == computing.device

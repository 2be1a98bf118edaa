"""The checks: each runs the model's own code on the device and compares with numpy or with recorded numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.demo import checkpoint_path, reference_path
from mlx_mixtral.layers import expert_bank as bank
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.layers.expert_bank import ExpertBank
from mlx_mixtral.layers.linear import MLX, Linear, StackedLinear, gathers_sorted
from mlx_mixtral.machine.device import current_device
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.moe import route
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.runtime.load import load
from mlx_mixtral.weights import dtypes
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.dtypes import MLX_DTYPES
from mlx_mixtral.weights.fill import fill

__all__ = ["CHECKS", "Check", "CheckFailedError"]

Floats = npt.NDArray[np.float32]

# Relative root-mean-square error a product may have in a compute type: rounding of inputs and outputs, no more.
TOLERANCE = {"F32": 1e-5, "F16": 3e-3, "BF16": 3e-2}
# Mean Kullback-Leibler divergence from the recorded float32 logits, in nats.
DIVERGENCE = {"F32": 1e-7, "F16": 2e-3, "BF16": 2e-2}
# Caches a step has to write into: arguments of ``load``.
KV_KINDS: dict[str, dict[str, Any]] = {
    "plain numbers": {}, "8 bits": {"kv_bits": 8}, "a full ring with sinks": {"kv_size": 16, "kv_sinks": 2},
}  # fmt: skip
STEPS, ROOM_TOKENS = 24, 2**15
# Share of a recorded continuation that is the most likely token of the logits before it, whatever the rounding.
AGREEING = 0.8
FORMATS = (
    QuantizationSpec(2, 64), QuantizationSpec(3, 64), QuantizationSpec(4, 64), QuantizationSpec(5, 64),
    QuantizationSpec(6, 64), QuantizationSpec(8, 64), QuantizationSpec(4, 32), QuantizationSpec(4, 128),
    QuantizationSpec.make(mode="mxfp4"), QuantizationSpec.make(mode="mxfp8"), QuantizationSpec.make(mode="nvfp4"),
)  # fmt: skip


class CheckFailedError(Exception):
    """A property does not hold; the message says what was measured."""


@dataclass(frozen=True)
class Check:
    """``run`` takes the compute type and returns what it measured, or raises CheckFailedError."""

    name: str
    failure_means: str
    run: Callable[[str], str]


def _fill_in_place(dtype: str) -> str:
    array = mx.zeros((64, 4096), mx.uint32)
    mx.eval(array)
    values = np.arange(array.size, dtype=np.uint32)
    dtypes.bytes_of(array)[:] = values.view(np.uint8)
    # Computed by the device, not read back from the host's view.
    seen = int(np.asarray((array * 1).sum()))
    wanted = int(values.sum(dtype=np.uint32))
    if seen != wanted:
        raise CheckFailedError(f"the device computes the sum {seen}; the sum of what was written is {wanted}")
    return f"{array.nbytes >> 20} MiB written by the host, seen by the device"


def _fused_products(dtype: str) -> str:
    worst = 0.0
    for spec in FORMATS:
        generator = np.random.default_rng(spec.bits)
        arrays, dense = _quantised(generator, (96, 256), spec, dtype)
        x = _rounded(generator.standard_normal((5, 256)), dtype)
        y = Linear(arrays, spec)(mx.array(x).astype(MLX_DTYPES[dtype]))
        worst = max(worst, _compare(y, x @ dense.T, dtype, f"quantized_matmul {spec}"))
    return f"{len(FORMATS)} formats, error at most {worst:.1e}"


def _long_products(dtype: str) -> str:
    """By whatever multiplies here: right, and on the CPU no row other for those beside it."""
    products, worst = products_for(current_device()), 0.0
    for spec in FORMATS:
        generator = np.random.default_rng(spec.bits)
        arrays, dense = _quantised(generator, (160, 256), spec, dtype)
        layer = Linear(arrays, spec, products)
        x = _rounded(generator.standard_normal((1, 70, 256)), dtype)
        given = mx.array(x).astype(MLX_DTYPES[dtype])
        y = layer(given)
        worst = max(worst, _compare(y, x @ dense.T, dtype, f"70 rows, {spec}"))
        parts = [layer(given[:, start:stop]) for start, stop in ((0, 2), (2, 33), (33, 70))]
        if products is not MLX and not np.array_equal(_floats(mx.concatenate(parts, axis=1)), _floats(y)):
            raise CheckFailedError(f"{spec}: rows of a product depend on the rows next to them")
    return f"{len(FORMATS)} formats, {products.description}, error at most {worst:.1e}"


def _gathered_products(dtype: str) -> str:
    worst = 0.0
    for spec in FORMATS:
        generator = np.random.default_rng(spec.bits)
        arrays, dense = _quantised(generator, (8, 64, 256), spec, dtype)
        x = _rounded(generator.standard_normal((6, 256)), dtype)
        slots = generator.integers(0, 8, (6, 2))
        layer = StackedLinear(arrays, spec)
        y = layer(mx.array(x).astype(MLX_DTYPES[dtype])[:, None, None, :], mx.array(slots), is_sorted=False)
        wanted = np.stack([[dense[slot] @ row for slot in chosen] for row, chosen in zip(x, slots, strict=True)])
        worst = max(worst, _compare(y[:, :, 0], wanted, dtype, f"gather_qmm {spec}"))
    return f"{len(FORMATS)} formats, error at most {worst:.1e}"


def _sorted_gathering(dtype: str) -> str:
    generator = np.random.default_rng(7)
    x = mx.array(_rounded(generator.standard_normal((1, 64, 128)), dtype)).astype(MLX_DTYPES[dtype])
    slots = mx.array(generator.integers(0, 8, (1, 64, 2)))
    if not gathers_sorted(slots.size, 8):
        raise CheckFailedError(f"{slots.size} pairs over 8 experts are not sorted")
    worst = 0.0
    # The CPU multiplies gathered matrices in 32 bits only.
    has_plain = dtype == "F32" or mx.default_device().type == mx.DeviceType.gpu
    for spec in (QuantizationSpec(4, 64), None) if has_plain else (QuantizationSpec(4, 64),):
        experts = _bank(generator, dtype, spec)
        together = experts(x, slots, 8)
        apart = np.concatenate([_floats(experts(x[:, i : i + 1], slots[:, i : i + 1], 8)) for i in range(64)], axis=1)
        worst = max(worst, _compare(together, apart, dtype, f"sorted gathering {spec or 'unquantised'}"))
    return f"64 tokens{', also unquantised' if has_plain else ''}, difference {worst:.1e}"


def _slots_from_disk(dtype: str) -> str:
    config = MixtralConfig.from_folder(checkpoint_path())
    checkpoint = Checkpoint(checkpoint_path())
    path = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    builder = Builder(config, checkpoint, "F32")
    builder.build()
    fills = [
        item for item in builder.ranges if item.info.name.startswith("model.layers.0.") and ".w2." in item.info.name
    ]
    whole = fills[0].array
    picked = [5, 1, 6]
    few = mx.zeros((len(picked), *whole.shape[1:]), whole.dtype)
    mx.eval(few)
    rows = whole.shape[1]
    own = [type(f)(few, n * rows, f.dtype, f.info, f.start, f.stop) for n, f in enumerate(fills[e] for e in picked)]
    with CheckpointReader(checkpoint) as reader:
        fill(reader, fills + own)
    x = mx.array(np.random.default_rng(3).standard_normal((4, 1, 1, whole.shape[2])).astype(np.float32))
    slots = np.array([[0, 1], [2, 0], [1, 2], [0, 2]])
    resident = StackedLinear({"weight": whole}, None)(x, mx.array(np.array(picked)[slots]), is_sorted=False)
    streamed = StackedLinear({"weight": few}, None)(x, mx.array(slots), is_sorted=False)
    if not np.array_equal(_floats(resident), _floats(streamed)):
        raise CheckFailedError(f"{path}: experts in other slots give different products")
    return f"3 of {config.num_local_experts} experts in separate slots, products identical"


def _streamed(dtype: str) -> str:
    """The bundled checkpoint in memory and with as few experts in memory as can be: the same bits."""
    with np.load(reference_path()) as archive:
        prompt = [int(i) for i in archive["greedy_prompt"]] * 2
    with load(checkpoint_path(), memory="1GB") as resident:
        wanted, greedy = resident.logits(prompt), resident.generate(prompt, max_tokens=8).token_ids
        least = resident.min_memory_bytes
    with load(checkpoint_path(), memory=least) as streamed:
        got = streamed.logits(prompt)
        own = streamed.generate(prompt, max_tokens=8).token_ids
        slots, misses = streamed.residency.slots, streamed.residency.misses
    if not misses:
        raise CheckFailedError(f"nothing was streamed with a budget of {least} bytes")
    if not np.array_equal(_floats(got), _floats(wanted)):
        worst = float(np.abs(_floats(got) - _floats(wanted)).max())
        raise CheckFailedError(f"logits differ by up to {worst:.1e} between resident and streamed experts")
    if own != greedy:
        raise CheckFailedError("tokens differ between resident and streamed experts")
    return f"{sum(slots)} of {8 * len(slots)} slots, {misses} reads, logits identical"


def _compiled(dtype: str) -> str:
    generator = np.random.default_rng(5)
    gate, up = (mx.array(_rounded(generator.standard_normal((33, 96)), dtype)).astype(MLX_DTYPES[dtype]) for _ in "gu")
    g, u = _floats(gate).astype(np.float64), _floats(up).astype(np.float64)
    wanted = (g / (1 + np.exp(-g)) * u).astype(np.float32)
    return f"difference {_compare(bank.swiglu(gate, up), wanted, dtype, 'the compiled SwiGLU'):.1e}"


def _routing(dtype: str) -> str:
    logits = np.random.default_rng(11).standard_normal((512, 8)).astype(np.float32)
    selected, weights = route(mx.array(logits), 2)
    chosen, shares = np.sort(np.asarray(selected)), _floats(weights)
    if not np.array_equal(chosen, np.sort(np.argsort(logits, axis=-1)[:, -2:])):
        raise CheckFailedError("the selected experts are not the two with the largest logits")
    likely = np.exp(np.take_along_axis(logits, np.asarray(selected).astype(np.int64), axis=-1))
    if np.abs(shares - likely / likely.sum(axis=-1, keepdims=True)).max() > 1e-5:
        raise CheckFailedError("the weights of a token's experts are not the softmax of their logits")
    return "512 tokens, top-2 of 8 as numpy sorts them"


def _decode_step(dtype: str) -> str:
    """Steps as generation takes them, compiled on a GPU, against the same tokens one forward each; and where they write."""
    with np.load(reference_path()) as archive:
        prompt = mx.array([(archive["greedy_prompt"].tolist() * 50)[:50]])
    worst = 0.0
    for kind, options in KV_KINDS.items():
        with load(checkpoint_path(), **options) as model:
            step = DecodeStep(model.module, compiled=model.device.kind != "cpu")
            plain, stepped = model.make_cache(), model.make_cache()
            stepped.reserve(1, ROOM_TOKENS)
            mx.eval(model.module(prompt, stepped))
            logits = model.module(prompt, plain)[:, -1:]
            for _ in range(STEPS):
                token = mx.argmax(logits, axis=-1)
                logits = model.module(token, plain)[:, -1:]
                got = step(token, stepped)
                worst = max(worst, _compare(got, _floats(logits), dtype, f"steps with {kind}"))
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(step(token, stepped), stepped.arrays)
            grown, held = mx.get_peak_memory() - before, stepped.nbytes
        # A copy of one layer's keys or values alone would be a twelfth.
        if options == {} and grown > held / 16:
            raise CheckFailedError(
                f"a step allocates {grown} bytes with a cache of {held}: the cache is copied, not written in place"
            )
    return f"{STEPS} steps in {len(KV_KINDS)} caches, difference at most {worst:.1e}, written in place"


def _recorded_logits(dtype: str) -> str:
    with np.load(reference_path()) as archive:
        recorded = dict(archive)
    with load(checkpoint_path()) as model:
        logits = np.stack([_floats(model.logits(row)) for row in recorded["ids"].tolist()])
        greedy = model.generate(recorded["greedy_prompt"].tolist(), max_tokens=24).token_ids
        whole = [*recorded["greedy_prompt"].tolist(), *recorded["greedy_ids"].tolist()]
        following = np.argmax(_floats(model.logits(whole)), axis=-1)[len(recorded["greedy_prompt"]) - 1 : -1]
    wanted, got = _log_softmax(recorded["logits"]), _log_softmax(logits)
    divergence = float((np.exp(wanted) * (wanted - got)).sum(axis=-1).mean())
    if not divergence <= DIVERGENCE[dtype]:
        raise CheckFailedError(
            f"divergence {divergence:.1e} nats from the recorded logits; at most {DIVERGENCE[dtype]:.0e}"
        )
    right = float(np.mean(following == recorded["greedy_ids"]))
    if right < AGREEING:
        raise CheckFailedError(
            f"of a text of {len(whole)} tokens read at once, {right:.0%} of the continuation are the recorded tokens; "
            f"at least {AGREEING:.0%}"
        )
    agreeing = sum(a == b for a, b in zip(greedy, recorded["greedy_ids"].tolist(), strict=False))
    if dtype == "F32" and agreeing < len(greedy):
        raise CheckFailedError(f"greedy tokens diverge from the recorded ones after {agreeing} of {len(greedy)}")
    return f"divergence {max(divergence, 0.0):.1e} nats, {agreeing} of {len(greedy)} greedy tokens as recorded"


CHECKS: tuple[Check, ...] = (
    Check(
        "in-place fill",
        "weights read from disk would not reach the GPU, so no other result can be trusted",
        _fill_in_place,
    ),
    Check(
        "fused products",
        "MLX's quantised products are wrong in some format: text from models in that format is wrong",
        _fused_products,
    ),
    Check("long products", "prompts are misread, or depend on how they are divided into chunks", _long_products),
    Check(
        "gathered products",
        "experts compute wrongly in some format: text from models in that format is wrong",
        _gathered_products,
    ),
    Check(
        "sorted gathering",
        "long prompts give different results than single tokens: prompts are misread",
        _sorted_gathering,
    ),
    Check("slots from disk", "the output of an expert depends on where it is in memory", _slots_from_disk),
    Check(
        "resident against streamed",
        "a model that does not fit in memory gives different answers: do not use --memory below its size",
        _streamed,
    ),
    Check(
        "compiled against plain",
        "MLX's kernel compiler gives different numbers: report it with your MLX version",
        _compiled,
    ),
    Check("routing", "tokens go to the wrong experts", _routing),
    Check(
        "decode step",
        "tokens after the first are computed differently from a prompt, or each copies the cache: text is slow or wrong",
        _decode_step,
    ),
    Check("recorded logits", "the whole model differs from the reference implementation", _recorded_logits),
)


def _quantised(
    generator: np.random.Generator, shape: tuple[int, ...], spec: QuantizationSpec, dtype: str
) -> tuple[dict[str, mx.array], Floats]:
    """Packed arrays as the model holds them, and the same weights dequantised on the CPU in float32."""
    weight = mx.array(generator.standard_normal(shape).astype(np.float32)).astype(MLX_DTYPES[dtype])
    with mx.stream(mx.cpu):
        packed = mx.quantize(weight.astype(mx.float32), spec.group_size, spec.bits, spec.mode)
        rounded = [packed[0], *(p if p.dtype == mx.uint8 else p.astype(MLX_DTYPES[dtype]) for p in packed[1:])]
        exact = [p if p.dtype in (mx.uint8, mx.uint32) else p.astype(mx.float32) for p in rounded]
        biases = exact[2] if spec.has_biases else None
        dense = mx.dequantize(exact[0], exact[1], biases, spec.group_size, spec.bits, spec.mode, dtype=mx.float32)
        mx.eval(rounded, dense)
    return dict(zip(("weight", "scales", "biases"), rounded, strict=False)), np.asarray(dense)


def _bank(generator: np.random.Generator, dtype: str, spec: QuantizationSpec | None) -> ExpertBank:
    def weights(*shape: int) -> dict[str, mx.array]:
        if spec is not None:
            return _quantised(generator, shape, spec, dtype)[0]
        return {"weight": mx.array(_rounded(generator.standard_normal(shape), dtype)).astype(MLX_DTYPES[dtype])}

    gate_up, down = weights(8, 2 * 192, 128), weights(8, 128, 192)
    return ExpertBank([StackedLinear(gate_up, spec)], StackedLinear(down, spec))


def _rounded(values: npt.NDArray[np.float64], dtype: str) -> Floats:
    return _floats(mx.array(values.astype(np.float32)).astype(MLX_DTYPES[dtype]))


def _floats(array: mx.array) -> Floats:
    return np.asarray(array.astype(mx.float32))


def _compare(got: mx.array, wanted: Floats, dtype: str, what: str) -> float:
    values = _floats(got)
    error = float(np.sqrt(np.mean((values - wanted) ** 2) / np.mean(wanted**2)))
    if not error <= TOLERANCE[dtype]:
        raise CheckFailedError(f"{what}: relative error {error:.1e}, at most {TOLERANCE[dtype]:.0e} in this type")
    return error


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)

"""Packed checkpoints written from the formats' descriptions: known integers, zero points and scales, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tests.convert.support import CONFIG, Floats, weights

Integers = npt.NDArray[np.int64]
Packer = Callable[["Grouped"], dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Grouped:
    """A matrix ``[in, out]`` of integers, with zero point and scale of each group of inputs ``[groups, out]``."""

    q: Integers
    zeros: Integers
    scales: npt.NDArray[np.float16]
    group_of: Integers
    bits: int = 4

    @property
    def values(self) -> Floats:
        """The weights meant, ``[out, in]``: one sum of integers and one product at a time."""
        out = np.empty(self.q.shape[::-1], np.float32)
        for i, group in enumerate(self.group_of):
            out[:, i] = (self.q[i] - self.zeros[group]).astype(np.float32) * self.scales[group].astype(np.float32)
        return out


def random_grouped(
    random: np.random.Generator, outputs: int, inputs: int, group: int, bits: int = 4, *, act_order: bool = False
) -> Grouped:
    groups = inputs // group
    group_of = np.arange(inputs) // group
    return Grouped(
        q=random.integers(0, 2**bits, (inputs, outputs)),
        # The ends of the range now and then, where taking or adding one wraps.
        zeros=random.integers(0, 2**bits, (groups, outputs)),
        scales=(random.uniform(0.2, 1, (groups, outputs)) * 0.2 / 2**bits).astype(np.float16),
        group_of=random.permutation(group_of) if act_order else group_of,
        bits=bits,
    )


def words(columns: list[Integers], bits: int) -> npt.NDArray[np.int32]:
    """One int32 word from numbers, the first in the lowest bits."""
    total = sum(column.astype(np.uint64) * np.uint64(2 ** (bits * place)) for place, column in enumerate(columns))
    return np.asarray(total, np.uint64).astype(np.uint32).view(np.int32)


def stream(numbers: Integers, bits: int) -> npt.NDArray[np.int32]:
    """Words down each column of ``numbers``, as one stream of bits from the lowest on: numbers of 3 bits lie across words."""
    single = (numbers.T[:, :, None] >> np.arange(bits) & 1).astype(np.uint8).reshape(numbers.shape[1], -1)
    return np.ascontiguousarray(np.packbits(single, axis=1, bitorder="little").view("<i4").T)


def awq(matrix: Grouped) -> dict[str, npt.NDArray[Any]]:
    """Eight outputs to a word, from the low bits on outputs 0, 2, 4, 6, 1, 3, 5, 7."""

    def packed(numbers: Integers) -> npt.NDArray[np.int32]:
        return words([numbers[:, first::8] for first in (0, 2, 4, 6, 1, 3, 5, 7)], 4)

    return {"qweight": packed(matrix.q), "qzeros": packed(matrix.zeros), "scales": matrix.scales}


def gptq(matrix: Grouped, *, version: int = 1, g_idx: bool = True) -> dict[str, npt.NDArray[Any]]:
    """Inputs in order down the words of qweight, outputs in order along those of qzeros; version 1 takes one from zeros."""
    count = 32 // matrix.bits
    zeros = (matrix.zeros - 1) % 2**matrix.bits if version == 1 else matrix.zeros
    if matrix.bits == 3:
        qweight, qzeros = stream(matrix.q, 3), np.ascontiguousarray(stream(zeros.T, 3).T)
    else:
        qweight = words([matrix.q[first::count] for first in range(count)], matrix.bits)
        qzeros = words([zeros[:, first::count] for first in range(count)], matrix.bits)
    made: dict[str, npt.NDArray[Any]] = {"qweight": qweight, "qzeros": qzeros, "scales": matrix.scales}
    return made | ({"g_idx": matrix.group_of.astype(np.int32)} if g_idx else {})


def packed_modules(config: dict[str, Any], *, head: bool = False) -> list[str]:
    """The modules such tools pack: everything in a layer but router and norms."""
    named = [name.removesuffix(".weight") for name, value in weights(config).items() if value.ndim == 2]
    packed = [name for name in named if ".layers." in name and not name.endswith(".gate")]
    return packed + ["lm_head"] * head


def make_packed(
    folder: Path,
    entry: dict[str, Any],
    pack: Callable[[str, Floats], tuple[dict[str, npt.NDArray[Any]], Floats]],
    *,
    head: bool = False,
    shards: int = 1,
    settings: str | None = None,
    plain_bytes: tuple[str, ...] = (),
    **changes: Any,
) -> dict[str, Floats]:
    """Write a packed folder and return, under the hub's names, the weights it means.

    Args:
        settings: a file for ``entry``, in place of config.json.
        plain_bytes: fields whose uint8 are bytes and not float8.
        pack: (module, its unpacked weights) to the tensors ``module.*`` and the weights they mean.
    """
    config = CONFIG | changes
    meant = weights(config)
    tensors: dict[str, npt.NDArray[Any]] = {}
    modules = packed_modules(config, head=head)
    for module in modules:
        fields, meant[f"{module}.weight"] = pack(module, meant[f"{module}.weight"])
        tensors |= {f"{module}.{field}": np.ascontiguousarray(value) for field, value in fields.items()}
    plain = {
        name: value.astype(np.float16) for name, value in meant.items() if name.removesuffix(".weight") not in modules
    }
    meant |= {name: value.astype(np.float32) for name, value in plain.items()}
    tensors |= plain
    folder.mkdir()
    said = {"quantization_config": entry} if settings is None else {}
    (folder / "config.json").write_text(json.dumps(config | said | {"torch_dtype": "float16"}))
    if settings is not None:
        (folder / settings).write_text(json.dumps(entry))
    save(folder, tensors, shards, plain_bytes)
    return meant


def save(
    folder: Path, tensors: dict[str, npt.NDArray[Any]], shards: int = 1, plain_bytes: tuple[str, ...] = ()
) -> None:
    """One file, or several with an index; float8 arrives as uint8 and is renamed in the header."""
    fp8 = {n for n, value in tensors.items() if value.dtype == np.uint8 and not n.endswith(plain_bytes or "\0")}
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        rename(folder / file, fp8 & set(part))
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def rename(file: Path, fp8: set[str]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in fp8:
        header[name]["dtype"] = "F8_E4M3"
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def grouped_packer(
    packer: Packer, group: int, bits: int = 4, *, act_order: bool = False, kept: dict[str, Grouped] | None = None
) -> Callable[[str, Floats], tuple[dict[str, npt.NDArray[Any]], Floats]]:
    """Random integers for every module; ``kept`` gathers them."""
    random = np.random.default_rng(1)

    def pack(module: str, weight: Floats) -> tuple[dict[str, npt.NDArray[Any]], Floats]:
        outputs, inputs = weight.shape
        matrix = random_grouped(random, outputs, inputs, inputs if group == -1 else group, bits, act_order=act_order)
        if kept is not None:
            kept[module] = matrix
        return packer(matrix), matrix.values

    return pack


def fp8(
    weight: Floats, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32
) -> tuple[dict[str, npt.NDArray[Any]], Floats]:
    """e4m3 codes by MLX, a scale for the tensor or each row; and what they mean."""
    per_row = len(weight) in shape
    peak = np.abs(weight).max(axis=1, keepdims=True) if per_row else np.abs(weight).max()
    scale = np.asarray(peak / 448, dtype).astype(np.float32)
    codes = mx.to_fp8(mx.array(weight / scale))
    meant = np.array(mx.from_fp8(codes, dtype=mx.float32)) * scale
    return {"weight": np.array(codes), "weight_scale": scale.astype(dtype).reshape(shape)}, meant

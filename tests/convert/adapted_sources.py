"""Checkpoints of one small model in many kinds, for adapters to be fused into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mixtral_convert import Recipe, convert
from tests.convert.gguf_writer import renamed, write_gguf
from tests.convert.native_writer import make_native, native
from tests.convert.packers import awq, fp8, gptq, grouped_packer, make_packed
from tests.convert.support import CONFIG, make_checkpoint, read_output, weights

FLOATS: dict[str, Any] = {"recipe": Recipe(bits=None), "dtype": "float32"}


def native_source(folder: Path) -> None:
    make_native(folder, native(weights(CONFIG), CONFIG), CONFIG, "consolidated.safetensors")


def stacked_source(folder: Path) -> None:
    """Rows interleaved, w2 transposed, all experts in one tensor."""
    make_native(folder, native(weights(CONFIG), CONFIG, stacked=True), CONFIG, "consolidated.{}.pt", 8)


def gguf_source(folder: Path) -> None:
    folder.mkdir()
    write_gguf(folder / "m.gguf", CONFIG, renamed(weights(CONFIG), CONFIG), "F32")


def packed_gguf_source(folder: Path) -> None:
    folder.mkdir()
    write_gguf(folder / "m.gguf", CONFIG, renamed(weights(CONFIG), CONFIG), "Q4_0")


def gptq_source(folder: Path) -> None:
    make_packed(
        folder,
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        grouped_packer(gptq, 64, act_order=True),
        shards=2,
    )


def awq_source(folder: Path) -> None:
    make_packed(
        folder, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, grouped_packer(awq, 64)
    )


def fp8_source(folder: Path) -> None:
    make_packed(folder, {"quant_method": "compressed-tensors"}, lambda _, weight: fp8(weight, (len(weight), 1)))


def mlx_source(folder: Path) -> None:
    make_checkpoint(folder.with_name("floats"))
    convert(folder.with_name("floats"), folder, recipe=Recipe(4, overrides={"*.o_proj": False}))


SOURCES: dict[str, Callable[[Path], object]] = {
    "hf": make_checkpoint,
    "hf, float16": lambda folder: make_checkpoint(folder, dtype="F16"),
    "hf, float32": lambda folder: make_checkpoint(folder, dtype="F32", shards=3),
    "fused": lambda folder: make_checkpoint(folder, layout="fused"),
    "native": native_source,
    "native, stacked": stacked_source,
    "gguf": gguf_source,
    "gguf, packed": packed_gguf_source,
    "gptq": gptq_source,
    "awq": awq_source,
    "fp8": fp8_source,
    "mlx": mlx_source,
}


def place(folder: Path) -> Path:
    """The source in a folder: itself, or the one GGUF in it."""
    return next(folder.glob("*.gguf"), folder)


def base_of(source: Path, folder: Path) -> dict[str, mx.array]:
    """A source's own weights in float32, as a plain conversion gives them."""
    convert(source, folder, **FLOATS)
    return read_output(folder)

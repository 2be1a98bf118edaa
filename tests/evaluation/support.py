"""Copies of the bundled checkpoint with other weights, and the figures recorded from transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.evaluation.texts import Text
from mlx_mixtral.weights.safetensors import read_header

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "evaluation.json").read_text(encoding="utf-8"))
TEXTS = [Text(name, f"{name}.txt", text) for name, text in GOLDEN["texts"].items()]

Bits = np.ndarray[Any, Any]


def altered(folder: Path, change: Callable[[str, Bits], Bits]) -> Path:
    """A copy of the bundled checkpoint; ``change`` gives a tensor's bfloat16 bits (uint16) anew."""
    shutil.copytree(checkpoint_path(), folder, copy_function=shutil.copyfile)
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    for info in read_header(checkpoint_path() / "model.safetensors").values():
        bits = np.frombuffer(raw, np.uint16, info.nbytes // 2, info.offset)
        bits[:] = change(info.name, bits)
    file.write_bytes(raw)
    return folder


def coarse(folder: Path) -> Path:
    """The copy that ``record_evaluation.py`` measures."""
    return altered(folder, lambda name, bits: bits & np.uint16(GOLDEN["mask"]))


def even(folder: Path) -> Path:
    """A model to which every token is as likely as any: probability 1 / 4096, 12 bits."""
    return altered(folder, lambda name, bits: bits * np.uint16(name != "lm_head.weight"))

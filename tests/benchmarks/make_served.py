"""A checkpoint for the server's benchmark: random weights in float32, with the bundled tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import make_checkpoint
import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parents[2]))
from mlx_mixtral.demo import checkpoint_path

__all__ = ["make_served"]


def make_served(folder: Path, layers: int) -> None:
    """A checkpoint of the shape "mid" with the bundled tokenizer."""
    source = checkpoint_path()
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    shape = make_checkpoint.SHAPES["mid"] | {"vocab_size": vocabulary, "torch_dtype": "float32"}
    make_checkpoint.SHAPES["served"] = shape
    make_checkpoint.make("served", folder, layers=layers)
    for file in folder.glob("*.safetensors"):
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        whole = file.with_name("whole.safetensors")
        mx.save_safetensors(
            str(whole), {name: array.astype(mx.float32) for name, array in arrays.items()}, {"format": "pt"}
        )
        whole.replace(file)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)

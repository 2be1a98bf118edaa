"""Convert a checkpoint with a recipe: more bits where they matter, fewer where most of the weights are.

python examples/convert.py [SOURCE DEST]
"""

import sys
import tempfile
from pathlib import Path

from mlx_mixtral import load
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral_convert import Progress, Recipe, convert

scratch = tempfile.TemporaryDirectory()
source, dest = sys.argv[1:3] if len(sys.argv) > 2 else (checkpoint_path(), Path(scratch.name) / "mixtral-mixed")

# Attention is 3% of the weights and takes part in every token; the experts are 96%.
recipe = Recipe(bits=4, overrides={"*.self_attn.*": {"bits": 8}, "*.switch_mlp.*": {"bits": 3}})


def show(progress: Progress) -> None:
    if progress.total_bytes:
        print(f"\r{progress.stage} {progress.done_bytes / progress.total_bytes:4.0%}", end="", file=sys.stderr)


with scratch:
    report = convert(source, dest, recipe=recipe, progress=show)
    print(file=sys.stderr)
    print(f"{report.source_bytes:,} -> {report.output_bytes:,} bytes, {report.bits_per_weight:.2f} bits per weight")
    for part, size in report.sizes_by_part.items():
        print(f"  {part:<10} {size.bits:5.2f} bits {size.bytes:>14,} bytes")

    with load(dest) as model:
        print(model.generate("In the beginning", max_tokens=16).text)

"""Peak memory and time of calibrating and of the conversions that learn from a calibration, at the full width of 8x7B.

    python tests/benchmarks/make_checkpoint.py wide bench-data/wide-2 --layers 2
    python tests/benchmarks/make_checkpoint.py wide bench-data/wide-4 --layers 4
    python tests/benchmarks/calibrated_memory.py bench-data/wide-2 bench-data/wide-4

Each run is in a process of its own. What is to be seen: memory is the same for two layers and for four, so also for 32; and
the seconds of a layer, which times 32 are those of 8x7B on this machine. Text is the bundled one and this project's own pages,
by the bundled tokenizer, which a checkpoint made here gets where it has none. With ``--short`` conversions learn from a sixth
of the text, a block in two steps instead of 120, corrections try one penalty, and where GPTQ would compensate codes are rounded
plainly: a layer takes minutes, and but for GPTQ's own 0.3 GB memory is the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from processes import peak_bytes, run_json

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.weights.safetensors import read_header
from mlx_mixtral_convert import Calibration, Recipe, calibrate, convert, rounding
from mlx_mixtral_convert.tuning import attention, correction, experts

RUNS = ("calibrate", "search", "gptq", "tuned")
PAGES = Path(__file__).parents[2] / "docs"


def one(run: str, folder: Path, calibration: Path, tokens: int, bits: int, *, short: bool) -> dict[str, Any]:
    """What the other process does."""
    started = time.perf_counter()
    if run == "calibrate":
        done = calibrate(folder, sorted(PAGES.glob("*.md")), tokens=tokens, save=calibration)
        return {"seconds": time.perf_counter() - started, "peak": peak_bytes(), "tokens": done.tokens.size}
    if short:
        attention.STEPS = experts.STEPS = 2
        correction.PENALTIES = correction.PENALTIES[:1]
        rounding.gptq = plain
    known = Calibration.load(calibration)
    if short:
        known = replace(known, tokens=known.tokens[::6])
    with tempfile.TemporaryDirectory(dir=folder.parent) as held:
        convert(folder, Path(held) / "out", recipe=Recipe(bits, rounding=run), calibration=known)
    return {"seconds": time.perf_counter() - started, "peak": peak_bytes()}


def plain(weights: mx.array, spec: QuantizationSpec, _: object) -> dict[str, mx.array]:
    """In place of GPTQ."""
    packed = mx.quantize(weights, group_size=spec.group_size, bits=spec.bits)
    return dict(zip(("weight", "scales", "biases"), packed, strict=True))


def layers_of(folder: Path) -> int:
    layers: int = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--short", action="store_true", help="memory only, see above")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder = given.folders[0]
        place = folder.with_suffix(".calibration")
        made = one(given.one, folder, place, given.tokens, given.bits, short=given.short)
        print(json.dumps(made))
        return
    short = ["--short"] if given.short else []
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for run in given.runs:
        for folder in given.folders:
            if not any(folder.glob("tokenizer*")):
                shutil.copy(checkpoint_path() / "tokenizer.model", folder)
            files = sum(info.nbytes for file in folder.glob("*.safetensors") for info in read_header(file).values())
            found = run_json(__file__, folder, "--one", run, "--tokens", given.tokens, "--bits", given.bits, *short)
            results.setdefault(run, {})[layers_of(folder)] = found
            text = f"{run:<10} {layers_of(folder):>2} layers, {files / 1e9:.1f} GB: {found['peak'] / 1e9:.3f} GB at the most, "
            print(
                f"{text}{found['seconds']:.0f} s",
                *([f"{found['tokens']} tokens"] if "tokens" in found else []),
                flush=True,
            )
    for run, found in results.items():
        few, many = min(found), max(found)
        if few < many:
            ratio = found[many]["peak"] / found[few]["peak"]
            each = (found[many]["seconds"] - found[few]["seconds"]) / (many - few)
            print(f"{run}: memory with {many} layers {ratio:.3f}x of that with {few}; {each:.0f} s a layer")


if __name__ == "__main__":
    main()

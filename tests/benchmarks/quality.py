"""Quality against size: KL to the source model on held-out text, our conversions beside mlx-lm's quantisers.

    python tests/benchmarks/quality.py                      the bundled checkpoint, about ten minutes
    python tests/benchmarks/quality.py --model smollm2      SmolLM2 as a mixture (upcycle.py), most of an hour
    python tests/benchmarks/quality.py --only 'ours fit*'
    python tests/benchmarks/quality.py --keep FOLDER --markdown --plot quality.png

Each row is made in a process of its own, so that time and peak memory are its own. KL is the mean over seven domains, in nats
a token; every network is evaluated by the same code, mlx-lm's, from the float32 values its weights stand for. Every method
that learns from text learns from the same one: the text bundled for calibration, which shares nothing with the held-out text.
mlx-lm's own download is not used. With ``--keep`` rows and calibration stay in a folder, and what it has is not made again.

On Linux, MLX's wheel multiplies float32 matrices with the reference BLAS. ``LD_PRELOAD=libopenblas.so.0`` puts a fast one
before it: without, the larger model takes many hours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm_quantizers import METHODS, WIDTHS, load_network, log_probabilities, mean_kl
from processes import peak_bytes, run_json
from upcycle import upcycle

from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.weights.safetensors import read_header
from mlx_mixtral_convert import Recipe, calibrate, convert
from mlx_mixtral_convert.calibration.text import default_texts, sequences

HELD_OUT = Path(__file__).parents[1] / "goldens" / "tiny-mixtral" / "heldout"
UPCYCLED = Path(__file__).parents[2] / "bench-data" / "upcycled"
START = 4000  # characters into each file
RECORD, CALIBRATE, CALIBRATION, REFERENCE = "record", "ours calibrate", "calibration", "reference.safetensors"
# What is compared with a row: mlx-lm's rows of its size. The router, 16 bits here and packed by mlx-lm, makes the difference.
SMALLER, LARGER = 0.02, 0.2

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model to quantise, the tokens of each held-out text and of the calibration text, and rows that take too long."""

    title: str
    folder: Path
    held_out_tokens: int
    calibration_tokens: int | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @property
    def parameters(self) -> int:
        return sum(
            prod(info.shape) for file in self.folder.glob("*.safetensors") for info in read_header(file).values()
        )

    def held_out(self) -> mx.array:
        """Token ids ``[7, L]``."""
        texts = [path.read_text()[START : START + 4000] for path in sorted(HELD_OUT.glob("*.txt"))]
        return mx.array([self.tokenizer.encode(text)[: self.held_out_tokens] for text in texts])

    def calibration(self) -> mx.array:
        """Token ids ``[B, 256]``, those that ``calibrate`` takes."""
        return mx.array(sequences(self.tokenizer, default_texts(), self.calibration_tokens, 1024))


SUBJECTS = {
    "tiny": Subject("The bundled checkpoint, 8.4 million weights", checkpoint_path(), 300),
    "smollm2": Subject("SmolLM2-135M as a mixture, 692 million weights", UPCYCLED, 128, 2048),
}


@dataclass(frozen=True)
class Bench:
    """One row's surroundings: the model, and the files every row shares."""

    subject: Subject
    calibration: Path
    reference: Path

    def ours(self, rounding: str, width: str, *, fit: bool, calibrated: bool) -> Row:
        source, (bits, group) = self.subject.folder, WIDTHS[width]
        recipe = Recipe(bits, group, rounding=rounding)
        used = self.calibration if calibrated else None
        with tempfile.TemporaryDirectory() as folder:
            dest = Path(folder) / "out"
            size = convert(source, dest, recipe=recipe, dry_run=True, calibration=used).output_bytes
            started = time.perf_counter()
            report = convert(source, dest, recipe=recipe, fit=size if fit else None, calibration=used)
            row = {"bits": report.bits_per_weight, "seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
            return row | {"kl": mean_kl(load_network(dest), self.subject.held_out(), self.reference)}

    def record(self) -> Row:
        """The source model's own log-probabilities."""
        started = time.perf_counter()
        true = log_probabilities(load_network(self.subject.folder), self.subject.held_out())
        mx.save_safetensors(str(self.reference), {"reference": true})
        return {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}

    def calibrate(self) -> Row:
        started = time.perf_counter()
        limit = {} if self.subject.calibration_tokens is None else {"tokens": self.subject.calibration_tokens}
        calibrate(self.subject.folder, sensitivities=True, **limit).save(self.calibration)
        return {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}

    def theirs(self, method: str, argument: str) -> Row:
        from mlx.utils import tree_flatten

        network, tokens = load_network(self.subject.folder), self.subject.calibration()
        started = time.perf_counter()
        network = METHODS[method](network, tokens, argument)
        mx.eval(network.parameters())
        row = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
        network.set_dtype(mx.bfloat16)
        row["bits"] = 8 * sum(array.nbytes for _, array in tree_flatten(network.parameters())) / self.subject.parameters
        network.set_dtype(mx.float32)
        return row | {"kl": mean_kl(network, self.subject.held_out(), self.reference)}


def rows() -> dict[str, Callable[[Bench], Row]]:
    """Name -> how it is made."""
    listed: dict[str, Callable[[Bench], Row]] = {}

    def theirs(name: str, method: str, argument: str) -> None:
        listed[f"mlx-lm {name}"] = lambda bench: bench.theirs(method, argument)

    def ours(name: str, rounding: str, width: str, *, fit: bool = False, calibrated: bool = False) -> None:
        listed[f"ours {name}"] = lambda bench: bench.ours(rounding, width, fit=fit, calibrated=calibrated)

    for width in WIDTHS:
        theirs(f"uniform {width}", "uniform", width)
        theirs(f"gptq {width}", "gptq", width)
        for rate in ("1e-6", "1e-4"):
            theirs(f"dwq {width} rate {rate}", "dwq", f"{width}@{rate}")
    for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        theirs(recipe, "mixed", recipe)
    for name, argument in (("4.5", "4/5/4.52"), ("4.5 of 3 and 5", "3/5/4.52"), ("4", "3/5/4.02"), ("3.5", "3/4/3.6")):
        theirs(f"dynamic_quant to {name} bits", "dynamic", argument)
    listed[CALIBRATE] = Bench.calibrate
    for width in WIDTHS:
        ours(f"plain {width}", "plain", width)
        ours(f"search {width}", "search", width)
        ours(f"search calibrated {width}", "search", width, calibrated=True)
        ours(f"gptq {width}", "gptq", width, calibrated=True)
        ours(f"fit {width} built-in, search", "search", width, fit=True)
        ours(f"fit {width} calibrated, search", "search", width, fit=True, calibrated=True)
        ours(f"fit {width} calibrated, gptq", "gptq", width, fit=True, calibrated=True)
    return listed


def measure(name: str, model: str, folder: Path) -> Row:
    """A row, made by this script in another process."""
    try:
        found: Row = run_json(__file__, "--model", model, "--keep", folder, "--one", name)
    except RuntimeError as error:
        return {"name": name, "failed": str(error).splitlines()[-1]}
    return found


def run(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """The rows asked for, those that ``folder`` has included; printed as they come."""
    subject, kept = SUBJECTS[arguments.model], folder / "rows.json"
    found: dict[str, Row] = json.loads(kept.read_text()) if kept.exists() else {}
    if not (folder / REFERENCE).exists() and "failed" in (made := measure(RECORD, arguments.model, folder)):
        raise SystemExit(made["failed"])
    wanted = [name for name in rows() if fnmatch(name, arguments.only)]
    if not (folder / CALIBRATION).exists():
        wanted = [CALIBRATE, *(name for name in wanted if name != CALIBRATE)]
    print(f"{'':<44}{'bits':>7}{'KL':>10}{'time':>9}{'peak':>9}")
    for name in wanted:
        reason = next((why for pattern, why in subject.left_out.items() if fnmatch(name, pattern)), None)
        if reason is not None and not arguments.all:
            found.setdefault(name, {"name": name, "left_out": reason})
        if name not in found or (arguments.all and "left_out" in found[name]):
            found[name] = measure(name, arguments.model, folder)
            kept.write_text(json.dumps(found, indent=2) + "\n")
        print(line(found[name]), flush=True)
    return [found[name] for name in rows() if name in found]


def line(row: Row) -> str:
    if "kl" not in row and "seconds" not in row:
        return f"{row['name']:<44} " + (
            f"failed: {row['failed']}" if "failed" in row else f"left out: {row['left_out']}"
        )
    size = f"{row['peak_bytes'] / 1e6:.0f} MB"
    quality = f"{row['bits']:>7.3f}{row['kl']:>10.5f}" if "kl" in row else f"{'':>17}"
    return f"{row['name']:<44}{quality}{row['seconds']:>7.1f} s{size:>9}"


def rival(row: Row, results: list[Row]) -> Row | None:
    """The best row of mlx-lm's that is as large as ``row``, or a little larger."""
    near = [
        other
        for other in results
        if other["name"].startswith("mlx-lm") and "kl" in other and -SMALLER <= other["bits"] - row["bits"] <= LARGER
    ]
    return min(near, key=lambda other: other["kl"], default=None)


def markdown(results: list[Row]) -> str:
    lines = ["| | bits | KL | time | peak memory | to the best of mlx-lm |", "|---|---:|---:|---:|---:|---:|"]
    for row in results:
        if (reason := row.get("failed") or row.get("left_out")) is not None:
            lines.append(f"| {row['name']} | {'failed' if 'failed' in row else 'left out'}: {reason} | | | | |")
            continue
        bits, kl = (f"{row[key]:.{digits}f}" if key in row else "" for key, digits in (("bits", 3), ("kl", 5)))
        other = rival(row, results) if row["name"].startswith("ours") and "kl" in row else None
        ratio = f"{row['kl'] / other['kl']:.2f}" if other else ""
        cost = f"{row['seconds']:.1f} s | {row['peak_bytes'] / 1e6:.0f} MB"
        lines.append(f"| {row['name']} | {bits} | {kl} | {cost} | {ratio} |")
    return "\n".join(lines)


# Colour, marker and what its rows' names start with; mlx-lm's are cold and open, ours warm and full.
FAMILIES = {
    "mlx-lm uniform": ("#1f3b73", "s"),
    "mlx-lm gptq": ("#2a7fb8", "^"),
    "mlx-lm dwq": ("#4bacc6", "v"),
    "mlx-lm dynamic_quant": ("#6b8e9f", "D"),
    "mlx-lm mixed": ("#9aa5b1", "X"),
    "ours plain": ("#7a5c3e", "s"),
    "ours search": ("#e0a030", "o"),
    "ours gptq": ("#e2672a", "^"),
    "ours fit": ("#b3123f", "*"),
}


def plot(results: list[Row], title: str, path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for family, (colour, marker) in FAMILIES.items():
        points = sorted((row["bits"], row["kl"]) for row in results if row["name"].startswith(family) and "kl" in row)
        if not points:
            continue
        ours = family.startswith("ours")
        axes.scatter(
            *zip(*points, strict=True),
            s=110 if marker == "*" else 45,
            marker=marker,
            facecolors=colour if ours else "none" if marker != "X" else colour,
            edgecolors=colour,
            label=family,
            zorder=3 if ours else 2,
        )
        best = [(bits, kl) for bits, kl in points if kl <= min(k for b, k in points if b <= bits + 0.02)]
        axes.plot(*zip(*best, strict=True), color=colour, linewidth=1, alpha=0.5, linestyle="-" if ours else "--")
    axes.set(yscale="log", title=title, xlabel="bits per weight, scales included", ylabel="KL, nats per token")
    axes.grid(which="both", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SUBJECTS), default="tiny")
    parser.add_argument("--only", default="*", help="names of rows, with wildcards")
    parser.add_argument("--all", action="store_true", help="also the rows that take longest")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep rows and calibration, and make only what it lacks"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table once more, with ratios, as Markdown")
    parser.add_argument("--plot", metavar="FILE", help="needs matplotlib, the extra plots")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    subject = SUBJECTS[arguments.model]
    if arguments.one:
        make = Bench.record if arguments.one == RECORD else rows()[arguments.one]
        made = make(Bench(subject, arguments.keep / CALIBRATION, arguments.keep / REFERENCE))
        print(json.dumps({"name": arguments.one} | made))
        return
    if subject.folder == UPCYCLED and not UPCYCLED.exists():
        UPCYCLED.parent.mkdir(exist_ok=True)
        upcycle(UPCYCLED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = run(arguments, folder)
    if arguments.markdown:
        print(markdown(results))
    if arguments.plot:
        plot(results, subject.title, arguments.plot)


if __name__ == "__main__":
    main()

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
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from upcycle import upcycle

from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.weights.safetensors import read_header
from mlx_mixtral_convert import Recipe, calibrate, convert
from mlx_mixtral_convert.calibration.text import default_texts, sequences

HELD_OUT = Path(__file__).parents[1] / "goldens" / "tiny-mixtral" / "heldout"
UPCYCLED = Path(__file__).parents[2] / "bench-data" / "upcycled"
START = 4000  # characters into each file
# Bits and group of the uniform conversions, 4.5, 4.0 and 3.5 bits with scales; the fitted ones are held to their bytes.
WIDTHS = {"4": (4, 64), "3.5": (3, 32), "3": (3, 64)}
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


def load_network(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    network, _ = load_model(folder)
    # 16-bit arithmetic is slow on the CPU backend; what is stored in 16 bits is rounded to them where it counts.
    network.set_dtype(mx.float32)
    return network


class ByExpert(nn.Module):
    """mlx-lm's ``SwitchGLU``, unquantised, one expert after the other: the same sums in large products, far faster on a CPU."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def __call__(self, x: mx.array, selected_experts: mx.array) -> mx.array:
        flat, chosen = x.reshape(-1, x.shape[-1]), np.array(selected_experts).reshape(-1, selected_experts.shape[-1])
        out = mx.zeros((*chosen.shape, x.shape[-1]))
        gates, ups, downs = (self.experts[name].weight for name in ("gate_proj", "up_proj", "down_proj"))
        for expert in range(len(gates)):
            tokens, places = (mx.array(found.astype(np.int32)) for found in np.nonzero(chosen == expert))
            if tokens.size:
                own = flat[tokens]
                inner = nn.silu(own @ gates[expert].T) * (own @ ups[expert].T)
                out[tokens, places] = inner @ downs[expert].T
        return out.reshape(*selected_experts.shape, -1)


def log_probabilities(network: Any, tokens: mx.array) -> mx.array:
    """``[7, L, V]`` float32; ``network`` is mlx-lm's, quantised or not, its floats in float32. It is used up."""
    from mlx_lm.utils import dequantize_model

    network = dequantize_model(network)
    for layer in network.layers:
        layer.block_sparse_moe.switch_mlp = ByExpert(layer.block_sparse_moe.switch_mlp)
    network.eval()
    found = []
    for text in tokens:
        logits = network(text[None])[0]
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(found)
    return mx.stack(found)


def mean_kl(network: Any, tokens: mx.array, reference: Path) -> float:
    true, other = mx.load(str(reference))["reference"], log_probabilities(network, tokens)
    return float(np.mean([(mx.exp(p) * (p - q)).sum(axis=-1).mean().item() for p, q in zip(true, other, strict=True)]))


def peak_bytes() -> int:
    """Peak resident memory of this process. Linux's ``ru_maxrss`` begins with the parent's, so it is not asked."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


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
        calibrate(self.subject.folder, **limit).save(self.calibration)
        return {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}

    def theirs(self, method: str, argument: str) -> Row:
        from mlx.utils import tree_flatten

        network, tokens = load_network(self.subject.folder), self.subject.calibration()
        started = time.perf_counter()
        network = _THEIRS[method](network, tokens, argument)
        mx.eval(network.parameters())
        row = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
        network.set_dtype(mx.bfloat16)
        row["bits"] = 8 * sum(array.nbytes for _, array in tree_flatten(network.parameters())) / self.subject.parameters
        network.set_dtype(mx.float32)
        return row | {"kl": mean_kl(network, self.subject.held_out(), self.reference)}


def _uniform(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx_lm.utils import quantize_model

    bits, group = WIDTHS[argument]
    return quantize_model(network, {}, group, bits)[0]


def _mixed(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    return quantize_model(network, {}, 64, 4, quant_predicate=mixed_quant_predicate_builder(argument, network, 64))[0]


def _gptq(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx_lm.quant.gptq import gptq_quantize

    bits, group = WIDTHS[argument]
    return gptq_quantize(network, tokens, bits, group, 6, 64)[0]


def _dynamic(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    low, high, target = (float(part) for part in argument.split("/"))
    found = dict(estimate_sensitivities(network, tokens, int(low), 64, int(high), 64))
    threshold = estimate_threshold(network, found, target, int(low), 64, int(high), 64)

    def predicate(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": int(high), "group_size": 64} if found[path] > threshold else True

    return quantize_model(network, {}, 64, int(low), quant_predicate=predicate)[0]


def _dwq(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    width, rate = argument.split("@")
    bits, group = WIDTHS[width]
    student = quantize_model(copy.deepcopy(network), {}, group, bits)[0]
    listed = [(row, 0) for row in np.array(tokens).tolist()]
    train, valid = listed[4:] * 6, listed[:4]
    dwq_quantize(
        student, lambda batch, _index, split: network(batch), Adam(float(rate), bias_correction=True), train, valid, 4, 257, 0,
        dtype=mx.float32,
    )  # fmt: skip
    return student


_THEIRS = {"uniform": _uniform, "mixed": _mixed, "gptq": _gptq, "dynamic": _dynamic, "dwq": _dwq}


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
    command = [sys.executable, __file__, "--model", model, "--keep", str(folder), "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return {"name": name, "failed": f"ended by signal {-done.returncode}"}
    if done.returncode:
        return {"name": name, "failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
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
    axes.set(yscale="log", title=title, xlabel="bits a weight, scales included", ylabel="KL, nats a token")
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

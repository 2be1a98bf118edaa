"""Quality against size on the bundled checkpoint: KL to the source model on held-out text, ours beside mlx-lm's quantisers.

    python tests/benchmarks/quality.py                      the whole table, about ten minutes
    python tests/benchmarks/quality.py --only 'fit*' --json
    python tests/benchmarks/quality.py --plot quality.png   needs matplotlib

Each row is made in a process of its own, so that time and peak memory are its own. KL is the mean over seven domains of 300
tokens each, in nats a token, in float32 on both sides. Every method that learns from text learns from the same one: the text
bundled for calibration, which shares nothing with the held-out text. mlx-lm's own download is not used.
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
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral import load
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral_convert import Recipe, calibrate, convert
from mlx_mixtral_convert.calibration.text import default_texts, sequences

HELD_OUT = Path(__file__).parents[1] / "goldens" / "tiny-mixtral" / "heldout"
TOKENS = 300
PARAMETERS = 8_429_184
START = 4000  # characters into each file
# Bits and group of the uniform conversions, 4.5, 4.0 and 3.5 bits with scales; the fitted ones are held to their bytes.
WIDTHS = {"4": (4, 64), "3.5": (3, 32), "3": (3, 64)}

Network = Callable[[mx.array], mx.array]


def held_out() -> list[mx.array]:
    tokenizer = load(checkpoint_path()).tokenizer
    return [
        mx.array([tokenizer.encode(path.read_text()[START : START + 4000])[:TOKENS]])
        for path in sorted(HELD_OUT.glob("*.txt"))
    ]


def log_probabilities(network: Network, texts: list[mx.array]) -> list[mx.array]:
    found = [network(text)[0].astype(mx.float32) for text in texts]
    return [logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in found]


def mean_kl(network: Network) -> float:
    texts = held_out()
    true = log_probabilities(load(checkpoint_path()).module, texts)
    other = log_probabilities(network, texts)
    return float(np.mean([(mx.exp(p) * (p - q)).sum(axis=-1).mean().item() for p, q in zip(true, other, strict=True)]))


def calibration_tokens() -> mx.array:
    return mx.array(sequences(load(checkpoint_path()).tokenizer, default_texts(), None, 1024))


def ours(calibration: Path, rounding: str, width: str, *, fit: bool, calibrated: bool) -> dict[str, Any]:
    bits, group = WIDTHS[width]
    recipe = Recipe(bits, group, rounding=rounding)
    used = calibration if calibrated else None
    with tempfile.TemporaryDirectory() as folder:
        dest = Path(folder) / "out"
        size = convert(checkpoint_path(), dest, recipe=recipe, dry_run=True, calibration=used).output_bytes
        started = time.perf_counter()
        report = convert(checkpoint_path(), dest, recipe=recipe, fit=size if fit else None, calibration=used)
        took = time.perf_counter() - started
        return {"bits": report.bits_per_weight, "seconds": took, "kl": mean_kl(load(dest).module)}


def theirs(method: str, argument: str) -> dict[str, Any]:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    network, config = load_model(checkpoint_path())
    network.set_dtype(mx.float32)  # 16-bit arithmetic is slow on the CPU backend; scales are rounded to 16 bits below
    started = time.perf_counter()
    network = _THEIRS[method](network, config, argument)
    took = time.perf_counter() - started
    network.set_dtype(mx.bfloat16)
    nbytes = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    network.set_dtype(mx.float32)
    network.eval()
    return {"bits": 8 * nbytes / PARAMETERS, "seconds": took, "kl": mean_kl(network)}


def _uniform(network: Any, config: Any, argument: str) -> Any:
    from mlx_lm.utils import quantize_model

    bits, group = WIDTHS[argument]
    return quantize_model(network, config, group, bits)[0]


def _mixed(network: Any, config: Any, argument: str) -> Any:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    return quantize_model(network, config, 64, 4, quant_predicate=mixed_quant_predicate_builder(argument, network, 64))[
        0
    ]


def _gptq(network: Any, config: Any, argument: str) -> Any:
    from mlx_lm.quant.gptq import gptq_quantize

    bits, group = WIDTHS[argument]
    return gptq_quantize(network, calibration_tokens(), bits, group, 6, 64)[0]


def _dynamic(network: Any, config: Any, argument: str) -> Any:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    low, high, target = (float(part) for part in argument.split("/"))
    found = dict(estimate_sensitivities(network, calibration_tokens(), int(low), 64, int(high), 64))
    threshold = estimate_threshold(network, found, target, int(low), 64, int(high), 64)

    def predicate(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": int(high), "group_size": 64} if found[path] > threshold else True

    return quantize_model(network, config, 64, int(low), quant_predicate=predicate)[0]


def _dwq(network: Any, config: Any, argument: str) -> Any:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    width, rate = argument.split("@")
    bits, group = WIDTHS[width]
    student = quantize_model(copy.deepcopy(network), config, group, bits)[0]
    rows = [(row, 0) for row in np.array(calibration_tokens()).tolist()]
    train, valid = rows[4:] * 6, rows[:4]
    dwq_quantize(
        student, lambda batch, _index, split: network(batch), Adam(float(rate), bias_correction=True), train, valid, 4, 257, 0,
        dtype=mx.float32,
    )  # fmt: skip
    return student


_THEIRS = {"uniform": _uniform, "mixed": _mixed, "gptq": _gptq, "dynamic": _dynamic, "dwq": _dwq}


def rows() -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Name -> how it is made, given a calibration file."""
    listed: dict[str, Callable[[Path], dict[str, Any]]] = {}

    def add(name: str, make: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> None:
        listed[name] = lambda calibration: make(*([calibration] if make is ours else []), *arguments, **options)

    for width in WIDTHS:
        add(f"mlx-lm uniform {width}", theirs, "uniform", width)
        add(f"mlx-lm gptq {width}", theirs, "gptq", width)
        for rate in ("1e-6", "1e-4"):
            add(f"mlx-lm dwq {width} rate {rate}", theirs, "dwq", f"{width}@{rate}")
    for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        add(f"mlx-lm {recipe}", theirs, "mixed", recipe)
    for name, argument in (("4.5", "4/5/4.52"), ("4.5 of 3 and 5", "3/5/4.52"), ("4", "3/5/4.02"), ("3.5", "3/4/3.6")):
        add(f"mlx-lm dynamic_quant to {name} bits", theirs, "dynamic", argument)
    for width in WIDTHS:
        add(f"ours plain {width}", ours, "plain", width, fit=False, calibrated=False)
        add(f"ours search {width}", ours, "search", width, fit=False, calibrated=False)
        add(f"ours search calibrated {width}", ours, "search", width, fit=False, calibrated=True)
        add(f"ours gptq {width}", ours, "gptq", width, fit=False, calibrated=True)
        add(f"ours fit {width} built-in, search", ours, "search", width, fit=True, calibrated=False)
        add(f"ours fit {width} calibrated, search", ours, "search", width, fit=True, calibrated=True)
        add(f"ours fit {width} calibrated, gptq", ours, "gptq", width, fit=True, calibrated=True)
    return listed


def plot(results: list[dict[str, Any]], path: str) -> None:
    import matplotlib.pyplot as plt

    for label, marker in (("mlx-lm", "x"), ("ours", "o")):
        side = [row for row in results if row["name"].startswith(label) and "kl" in row]
        plt.scatter([row["bits"] for row in side], [row["kl"] for row in side], marker=marker, label=label)
    plt.yscale("log")
    plt.xlabel("bits a weight, scales included")
    plt.ylabel("KL to the unquantised model, nats a token")
    plt.legend()
    plt.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names of rows, with wildcards")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--calibration", type=Path, help="a calibration of the bundled checkpoint; made when left out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.one:
        found = rows()[arguments.one](arguments.calibration)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({"name": arguments.one, **found, "peak_bytes": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        calibration = arguments.calibration
        if calibration is None:
            calibration = Path(folder) / "calibration"
            started = time.perf_counter()
            calibrate(checkpoint_path()).save(calibration)
            print(f"calibration: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        results = []
        print(f"{'':<44}{'bits':>7}{'KL':>10}{'time':>9}{'peak':>9}")
        for name in rows():
            if not fnmatch(name, arguments.only):
                continue
            command = [sys.executable, __file__, "--one", name, "--calibration", str(calibration)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                row = {"name": name, "failed": done.stderr.strip().splitlines()[-1]}
                print(f"{name:<44} failed: {row['failed']}", flush=True)
            else:
                row = json.loads(done.stdout.splitlines()[-1])
                size = f"{row['peak_bytes'] / 1e6:.0f} MB"
                print(f"{name:<44}{row['bits']:>7.3f}{row['kl']:>10.5f}{row['seconds']:>7.1f} s{size:>9}", flush=True)
            results.append(row)
    if arguments.json:
        print(json.dumps(results, indent=2))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()

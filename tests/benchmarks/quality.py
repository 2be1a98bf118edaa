"""Quality against size: KL to the source model on held-out text, ours beside mlx-lm's quantisers and llama.cpp's files.

    python tests/benchmarks/quality.py                      the bundled checkpoint, most of an hour
    python tests/benchmarks/quality.py --llama-python llama/bin/python      with llama.cpp's files: llama_files.py
    python tests/benchmarks/quality.py --model smollm2      SmolLM2 as a mixture (upcycle.py), many hours
    python tests/benchmarks/quality.py --only 'ours fit*'
    python tests/benchmarks/quality.py --keep FOLDER --markdown --plot quality.png

Each row is made in a process of its own, so that time and peak memory are its own. KL is the mean over seven domains, in nats
a token; every network is evaluated by the same code (held_out.py), from the float32 values its weights stand for. Every method
that learns from text learns from the same one: the text bundled for calibration, which shares nothing with the held-out text.
llama.cpp's importance matrices are made of its statistics. Rows "written" learn from text that the model wrote itself
(``calibrate --written``; 65,536 tokens), llama.cpp's as well as ours. mlx-lm's own download is not used. With
``--keep``, rows, calibration and F16 file stay in a folder for each model, and what it has is not made again.

On Linux, MLX's wheel multiplies float32 matrices with the reference BLAS. ``LD_PRELOAD=libopenblas.so.0`` puts a fast one
before it: without, the larger model takes many hours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from held_out import SUBJECTS, UPCYCLED, Subject, held_out_kl, load_network, reference
from kinds import by_kind, save_moments
from llama_files import MIXES, file_bytes, importance, join_rows, quantise, read_back, write_f16
from mlx_lm_quantizers import METHODS, WIDTHS
from processes import peak_bytes, run_json
from quality_report import Row, against_llama, kinds_table, line, markdown, plot, predictions
from upcycle import dense_model, upcycle

from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.weights.safetensors import read_header
from mlx_mixtral_convert import Calibration, Recipe, calibrate, convert
from mlx_mixtral_convert.calibration.file import identity
from mlx_mixtral_convert.calibration.measurements import Measurements
from mlx_mixtral_convert.calibration.progress import WorkCounter, trial_seconds
from mlx_mixtral_convert.calibration.run import DEFAULT_TOKENS
from mlx_mixtral_convert.calibration.unfinished import Unfinished
from mlx_mixtral_convert.sources import open_source

WRITTEN_TOKENS = 65536
FIT_TO = (2.1, 2.2, 2.3, 2.4, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.25, 4.5)
UNWEIGHTED = ("Q2_K", "Q3_K_M", "Q4_K_M")
TYPE_OF_ROWS_OF_32 = ("IQ4_NL", "Q4_0")
AS_IT_IS = tuple(mix for mix in MIXES if mix not in TYPE_OF_ROWS_OF_32)


@dataclass(frozen=True)
class Bench:
    """One row's surroundings: the model, the files every row shares, and llama.cpp's interpreter."""

    model: str
    folder: Path
    llama: str | None = None

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.model]

    def file(self, step: str) -> Path:
        return self.folder / STEPS[step][0]

    def grade(self, network: Any, nbytes: dict[str, int], total: int) -> Row:
        """Bits, KL and errors of mlx-lm's ``network``, whose matrices take ``nbytes`` each and all tensors ``total``."""
        from mlx.utils import tree_flatten
        from mlx_lm.utils import dequantize_model

        network = dequantize_model(network)
        found: Row = {"bits": 8 * total / self.subject.parameters}
        if self.subject.taken_apart:
            floats = dict(tree_flatten(network.parameters()))
            found["kinds"] = by_kind(self.subject.folder, floats, nbytes, *map(self.file, MOMENTS))
            del floats
        return found | {"kl": held_out_kl(network, self.model, self.file("record"))}

    def ours(self, recipe: Recipe, *, calibration: str | None = None, fit_to: float | None = None) -> Row:
        source, used = self.subject.folder, None if calibration is None else self.file(calibration)
        with tempfile.TemporaryDirectory() as folder:
            dest, size = Path(folder) / "out", None
            if fit_to is not None:
                plan = convert(source, dest, recipe=Recipe(4), dry_run=True)
                besides = plan.output_bytes - plan.bits_per_weight * self.subject.parameters / 8
                size = int(besides + fit_to * self.subject.parameters / 8)
            started = time.perf_counter()
            report = convert(source, dest, recipe=recipe, fit=size, calibration=used)
            row: Row = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
            row["predicted"] = report.predicted_kl
            nbytes: Counter[str] = Counter()
            for file in dest.glob("*.safetensors"):
                for info in read_header(file).values():
                    nbytes[info.name.rpartition(".")[0]] += info.nbytes
            return row | self.grade(load_network(dest), nbytes, nbytes.total())

    def theirs(self, method: str, argument: str) -> Row:
        from mlx.utils import tree_flatten

        network, tokens = load_network(self.subject.folder), self.subject.calibration()
        started = time.perf_counter()
        network = METHODS[method](network, tokens, argument)
        mx.eval(network.parameters())
        row: Row = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
        network.set_dtype(mx.bfloat16)
        nbytes: Counter[str] = Counter()
        flat: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
        for name, array in flat:
            nbytes[name.rpartition(".")[0]] += array.nbytes
        network.set_dtype(mx.float32)
        return row | self.grade(network, nbytes, nbytes.total())

    def llama_cpp(self, mix: str, *, weighted: str | None = "statistics", join: bool = True) -> Row:
        """``weighted``: the step whose statistics are its importance matrix."""
        assert self.llama is not None
        weights = None
        with open_source(self.subject.folder, "hf") as source:
            config = source.config
        if weighted is not None:
            weights = importance(Calibration.load(self.file(weighted)), config)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            made = Path(folder) / "made.gguf"
            started = time.perf_counter()
            quantise(self.llama, self.file("join" if join else "f16"), made, mix, weights, join=join)
            row: Row = {"seconds": time.perf_counter() - started}
            tensors, total = read_back(made, config), file_bytes(made)
        types: Counter[str] = Counter()
        for values, _, kind in tensors.values():
            types[kind] += values.size
        row["types"] = {kind: count / types.total() for kind, count in types.most_common()}
        network = load_network(self.subject.folder)
        network.load_weights([(f"{path}.weight", mx.array(found[0])) for path, found in tensors.items()], strict=False)
        nbytes = {path: found[1] for path, found in tensors.items()}
        del tensors
        return row | self.grade(network, nbytes, total)

    # What rows share, each a file.

    def record(self) -> None:
        """The source model's own log-probabilities."""
        reference(self.model, self.file("record"))

    def calibrate(self, step: str = "calibrate") -> None:
        folder, asked = self.subject.folder, step != "statistics"
        if not (asked and self.subject.upcycled):
            self._calibration(folder, step, sensitivities=asked).save(self.file(step))
            return
        # Experts packed alike are the dense network packed: what that costs is measured there, in an eighth of the time.
        dense = self.folder / "dense"
        if not dense.exists():
            dense_model(dense)
        known = self._calibration(dense, step, sensitivities=True)
        with open_source(folder, "hf") as source:
            work = WorkCounter(source.config, (known.tokens.size, 0), trial_seconds(source, sensitivities=False), None)
            found = Measurements(source, known.tokens, None, None, work).run(Unfinished(None, {}))
            own = replace(known, identity=identity(source), mean_squares=found.mean_squares, routed=found.routed)
        own.save(self.file(step))

    def _calibration(self, folder: Path, step: str, *, sensitivities: bool) -> Calibration:
        if step == "written":
            return calibrate(folder, tokens=WRITTEN_TOKENS, written=folder, sensitivities=sensitivities)
        return calibrate(folder, tokens=self.subject.calibration_tokens or DEFAULT_TOKENS, sensitivities=sensitivities)

    def moments(self) -> None:
        save_moments(self.subject.folder, Calibration.load(self.file("statistics")).tokens, self.file("moments"))

    def held_out_moments(self) -> None:
        save_moments(self.subject.folder, np.array(self.subject.held_out(), np.int32), self.file("held-out moments"))

    def f16(self) -> None:
        own = self.subject.folder / "tokenizer.model"
        vocabulary = own if own.exists() else checkpoint_path() / "tokenizer.model"
        write_f16(self.subject.folder, vocabulary, self.file("f16"))

    def join(self) -> None:
        partial = self.folder / "joining.gguf"
        shutil.copy(self.file("f16"), partial)
        with open_source(self.subject.folder, "hf") as source:
            join_rows(partial, source.config)
        partial.rename(self.file("join"))


Make = Callable[[Bench], Row | None]
STEPS: dict[str, tuple[str, Make]] = {
    "record": ("reference.safetensors", Bench.record),
    "statistics": ("statistics", lambda bench: bench.calibrate("statistics")),
    "moments": ("moments.safetensors", Bench.moments),
    "held-out moments": ("held_out_moments.safetensors", Bench.held_out_moments),
    "calibrate": ("calibration", Bench.calibrate),
    "written": ("written", lambda bench: bench.calibrate("written")),
    "f16": ("f16.gguf", Bench.f16),
    "join": ("joined.gguf", Bench.join),
}
"""What rows need: the file it is, and how it is made."""
MOMENTS = ("held-out moments", "moments")
ALWAYS = ("record", "statistics", *MOMENTS)


def rows() -> dict[str, tuple[Make, tuple[str, ...]]]:
    """Name -> how it is made, and the steps it needs."""
    listed: dict[str, tuple[Make, tuple[str, ...]]] = {}

    def theirs(name: str, method: str, argument: str) -> None:
        listed[f"mlx-lm {name}"] = (lambda bench: bench.theirs(method, argument)), ALWAYS

    def ours(name: str, recipe: Recipe, calibration: str | None = None, fit_to: float | None = None) -> None:
        needs = ALWAYS if calibration is None else (*ALWAYS, calibration)
        listed[f"ours {name}"] = (lambda bench: bench.ours(recipe, calibration=calibration, fit_to=fit_to)), needs

    def llama(name: str, mix: str, *, weighted: str | None = "statistics", join: bool = True) -> None:
        needs = (*ALWAYS, "f16", *(["join"] if join else []), *(["written"] if weighted == "written" else []))
        listed[f"llama.cpp {name}"] = (lambda bench: bench.llama_cpp(mix, weighted=weighted, join=join)), needs

    for mix in MIXES:
        llama(mix, mix, join=mix not in TYPE_OF_ROWS_OF_32)
    for mix in MIXES:
        llama(f"{mix}, written", mix, weighted="written", join=mix not in TYPE_OF_ROWS_OF_32)
    for mix in UNWEIGHTED:
        llama(f"{mix}, no importance matrix", mix, weighted=None)
    for mix in AS_IT_IS:
        llama(f"{mix}, rows not joined", mix, join=False)
    for width in WIDTHS:
        theirs(f"uniform {width}", "uniform", width)
    for width in ("2g64", "4g64"):  # it has no 3 bits
        theirs(f"gptq {width}", "gptq", width)
    for width in ("4g64", "3g32", "3g64"):
        for rate in ("1e-6", "1e-4"):
            theirs(f"dwq {width} rate {rate}", "dwq", f"{width}@{rate}")
    for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        theirs(recipe, "mixed", recipe)
    for name, argument in (
        ("4.5", "4/5/4.52"), ("4.5 of 3 and 5", "3/5/4.52"), ("4", "3/5/4.02"), ("3.5", "3/4/3.6"), ("3", "2/4/3.02"),
        ("2.7", "2/4/2.7"),
    ):  # fmt: skip
        theirs(f"dynamic_quant to {name} bits", "dynamic", argument)
    for width, (bits, group) in WIDTHS.items():
        ours(f"plain {width}", Recipe(bits, group))
        ours(f"search {width}", Recipe(bits, group, rounding="search"))
        ours(f"search calibrated {width}", Recipe(bits, group, rounding="search"), "statistics")
        ours(f"gptq {width}", Recipe(bits, group, rounding="gptq"), "statistics")
    for rounding in ("gptq", "tuned"):
        ours(f"{rounding} 4g64, written", Recipe(4, rounding=rounding), "written")
    for bits_each in FIT_TO:
        ours(f"fit to {bits_each} bits, search, built-in", Recipe(rounding="search"), None, bits_each)
        ours(f"fit to {bits_each} bits, search", Recipe(rounding="search"), "calibrate", bits_each)
        ours(f"fit to {bits_each} bits, gptq", Recipe(rounding="gptq"), "calibrate", bits_each)
        ours(f"fit to {bits_each} bits, gptq, written", Recipe(rounding="gptq"), "written", bits_each)
        ours(f"fit to {bits_each} bits, tuned, written", Recipe(rounding="tuned"), "written", bits_each)
    return listed


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> Row:
    """A row or a step, made by this script in another process."""
    llama = ["--llama-python", arguments.llama_python] if arguments.llama_python else []
    try:
        found: Row = run_json(__file__, "--model", arguments.model, "--keep", folder.parent, "--one", name, *llama)
    except RuntimeError as error:
        return {"name": name, "failed": str(error).splitlines()[-1]}
    return found


def kept_rows(path: Path) -> dict[str, Row]:
    found: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}
    return found


def run(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """The rows asked for, those that ``folder`` has included; printed as they come."""
    subject, kept, listed = SUBJECTS[arguments.model], folder / "rows.json", rows()
    found = kept_rows(kept)
    print(f"{'':<44}{'bits':>7}{'KL':>10}{'time':>9}{'peak':>9}")
    for name in (name for name in listed if fnmatch(name, arguments.only)):
        reason = next((why for pattern, why in subject.left_out.items() if fnmatch(name, pattern)), None)
        if name.startswith("llama.cpp") and not arguments.llama_python:
            reason = "no --llama-python"
        if name not in found and reason is not None and not arguments.all:
            print(line({"name": name, "left_out": reason}), flush=True)
            continue
        if name not in found:
            for step in listed[name][1]:
                if step in MOMENTS and not subject.taken_apart:
                    continue
                if not (folder / STEPS[step][0]).exists():
                    print(line(done := measure(step, arguments, folder)), flush=True)
                    if "failed" in done:
                        raise SystemExit(1)
            found[name] = measure(name, arguments, folder)
            if "failed" not in found[name]:  # read again: another run may share the folder
                kept.write_text(json.dumps(kept_rows(kept) | {name: found[name]}, indent=2) + "\n")
        print(line(found[name]), flush=True)
    return [found[name] for name in listed if name in found]


def make_one(arguments: argparse.Namespace) -> Row:
    """What the other process does."""
    bench = Bench(arguments.model, arguments.keep / arguments.model, arguments.llama_python)
    make = STEPS[arguments.one][1] if arguments.one in STEPS else rows()[arguments.one][0]
    started = time.perf_counter()
    made = make(bench)
    if made is None:
        made = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
    return {"name": arguments.one} | made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SUBJECTS), default="tiny")
    parser.add_argument("--only", default="*", help="names of rows, with wildcards")
    parser.add_argument("--all", action="store_true", help="also the rows that take longest")
    parser.add_argument("--llama-python", metavar="PATH", help="an interpreter that has llama-cpp-python, for its rows")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep rows and calibration, and make only what it lacks"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables once more, with ratios, as Markdown")
    parser.add_argument("--plot", metavar="FILE", help="needs matplotlib, the extra plots")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(make_one(arguments)))
        return
    subject = SUBJECTS[arguments.model]
    if subject.folder == UPCYCLED and not UPCYCLED.exists():
        UPCYCLED.parent.mkdir(exist_ok=True)
        upcycle(UPCYCLED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)) / arguments.model
        folder.mkdir(parents=True, exist_ok=True)
        results = run(arguments, folder)
    if arguments.markdown:
        print(*(table(results) for table in (markdown, against_llama, kinds_table, predictions)), sep="\n\n")
    if arguments.plot:
        plot(results, subject.title, arguments.plot)


if __name__ == "__main__":
    main()

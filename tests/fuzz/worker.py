"""One process of the campaign: reads ``format number`` lines, converts each mutated file, answers with a line of JSON.

The process may be lost to a case: a crash ends it, and so does a watchdog that needs no cooperation of the interpreter.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mlx_mixtral.errors import MixtralError
from mlx_mixtral_convert import convert, verify
from tests.fuzz.guard import Canary, limit_memory
from tests.fuzz.mutate import mutate
from tests.fuzz.places import put
from tests.fuzz.seeds import Files, Seed, make_seeds
from tests.fuzz.use import OWN, check_line, use_checkpoint, use_own

CASE_LIMIT_S = 10
# Files of 350 KB at most are read: twice what a conversion of one of them reserves, threads' stacks and arenas included.
MORE_BYTES = 2**30
# Imported when first needed; from here on an import would be one more thing the canary has to tell apart.
LATE = (
    "encodings.cp437",
    "encodings.raw_unicode_escape",
    "gguf",
    "gguf.quants",
    "sentencepiece",
    "mlx_mixtral.hub",
    "mlx_mixtral_convert.calibration.file",
)


def main(root: Path) -> None:
    warnings.simplefilter("error")
    seeds = make_seeds(_empty(root / "seeds"))
    canary = Canary(root)
    put(root, {"outside.safetensors": seeds["safetensors"][0].files["model.safetensors"]})
    put(root, {"outside.bin": seeds["torch"][0].files["pytorch_model.bin"]})
    for name in LATE:
        importlib.import_module(name)
    for fmt, made in seeds.items():
        for seed in made:
            for exact in {False, seed.quantised}:
                if (found := attempt(root, fmt, seed, seed.files, exact, canary))["outcome"] != "valid":
                    raise SystemExit(f"the seed {seed.name} is not valid: {found}")
    limit_memory(MORE_BYTES)
    print("ready", flush=True)
    for fmt, number in map(str.split, sys.stdin):
        seed, files, exact = mutate(seeds[fmt], fmt, int(number))
        faulthandler.dump_traceback_later(CASE_LIMIT_S, exit=True)
        answer = attempt(root, fmt, seed, files, exact, canary)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), flush=True)


def attempt(root: Path, fmt: str, seed: Seed, files: Files, exact: bool, canary: Canary) -> dict[str, Any]:
    """Convert ``files``: ``outcome`` is the error's name or ``valid``, ``failure`` what must not happen, if it did."""
    source, dest = _empty(root / "source"), _empty(root / "out") / "model"
    put(source, files)
    if seed.name in OWN:
        return _used(seed, lambda: use_own(source, seed.name))
    before = _listing(root)
    started, failure = time.perf_counter(), None
    unexpected: BaseException | None = None
    with canary.watching():
        try:
            convert(source / seed.single if seed.single else source, dest, exact=exact)
            outcome = "valid"
        except MixtralError as error:
            outcome = type(error).__name__
            # Printed as it is: a line of its own for a terminal to obey must not come out of a file.
            if not str(error).isprintable():
                failure = f"a message with control characters: {str(error)[:300]!r}"
        except BaseException as error:
            # Printed later: a traceback is made with the compiler.
            outcome, unexpected = type(error).__name__, error
    seconds = time.perf_counter() - started
    if unexpected is not None:
        failure = "".join(traceback.format_exception(unexpected))
    if failure is None and unexpected is None and fmt in ("companion", "config"):
        failure = _used(seed, lambda: use_checkpoint(source))["failure"]
    if canary.seen:
        failure = f"the canary saw {canary.seen[:5]}"
    elif failure is None and _listing(root) != before:
        failure = f"files beside the destination: {sorted(set(_listing(root)) ^ set(before))}"
    elif outcome == "valid" and (problems := verify(dest).problems):
        failure = f"the result does not pass verify: {problems[:3]}"
    elif outcome == "valid" and [path.name for path in dest.parent.iterdir()] != [dest.name]:
        failure = "something was left beside a finished conversion"
    elif outcome != "valid" and dest.exists():
        failure = f"a destination after {outcome}"
    return {"seed": seed.name, "exact": exact, "outcome": outcome, "seconds": round(seconds, 3), "failure": failure}


def _used(seed: Seed, use: Callable[[], None]) -> dict[str, Any]:
    """The same for what is read and loaded, with numpy's warnings as errors."""
    started, outcome, failure = time.perf_counter(), "valid", None
    try:
        use()
    except MixtralError as error:
        outcome = type(error).__name__
        try:
            check_line(error)
        except AssertionError as problem:
            failure = str(problem)
    except BaseException as error:
        outcome, failure = type(error).__name__, "".join(traceback.format_exception(error))
    seconds = round(time.perf_counter() - started, 3)
    return {"seed": seed.name, "exact": False, "outcome": outcome, "seconds": seconds, "failure": failure}


def _listing(root: Path) -> list[str]:
    """Everything below ``root`` that is not the destination's."""
    kept: Iterable[Path] = (path for path in root.iterdir() if path.name not in ("out", "seeds"))
    return sorted(str(path) for top in kept for path in (top, *(top.rglob("*") if top.is_dir() else ())))


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""Other programs decoding the same weights under a limit on their memory, for ``streaming.py``.

mlx-lm has to hold everything. llama.cpp maps its file: what does not fit is dropped from the page cache and read again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# The interpreter and its libraries, which a budget for the model does not cover.
PROCESS_BYTES = 400_000_000
LIMIT_S = 600


@contextmanager
def limited(nbytes: int | None) -> Iterator[list[str]]:
    """A prefix for a command that may not use more memory, where control groups can be made; else none."""
    if nbytes is None:
        yield []
        return
    # Control groups of version 2, or the memory controller of version 1.
    root, limit = CGROUP, "memory.max"
    if not (CGROUP / "cgroup.controllers").exists():
        root, limit = CGROUP / "memory", "memory.limit_in_bytes"
    group = root / f"mlx-mixtral-bench-{os.getpid()}"
    try:
        if not (root / "cgroup.procs").exists():
            raise FileNotFoundError(root)
        group.mkdir()
        (group / limit).write_text(str(nbytes))
    except OSError:
        yield []
        return
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        time.sleep(0.2)
        group.rmdir()


def mlx_lm(folder: Path, budget: int, tokens: int) -> str:
    """mlx-lm on the folder, in float32 on the CPU backend."""
    return _run("mlx-lm", [sys.executable, "-c", _MLX_LM, str(folder), str(tokens)], budget)


def llama_cpp(python: str, gguf: Path, budget: int, tokens: int) -> str:
    """llama.cpp on a GGUF that is not in the page cache, by the llama-cpp-python of the interpreter ``python``."""
    if hasattr(os, "posix_fadvise"):
        with gguf.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _run("llama.cpp", [python, "-c", _LLAMA_CPP, str(gguf), str(tokens)], budget)


def _run(name: str, command: list[str], budget: int) -> str:
    with limited(budget + PROCESS_BYTES) as prefix:
        try:
            done = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"{name}: not done after {LIMIT_S} s"
    if done.returncode < 0:
        return f"{name}: ended by signal {-done.returncode}"
    if done.returncode:
        return f"{name}: failed: {done.stderr.strip()[-200:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    return (
        f"{name}: {found['decode_s']:.3f} s per token, {found['read'] / 1e6:.0f} MB read per token, "
        f"peak of the process {found['peak'] / 1e9:.2f} GB"
    )


_MEASURE = """
import json, resource, sys, time
from pathlib import Path

def read_bytes():
    io = Path("/proc/self/io")
    lines = io.read_text().splitlines() if io.exists() else ["read_bytes: 0"]
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])

def measure(steps):
    next(steps)
    before, started = read_bytes(), time.perf_counter()
    count = sum(1 for _ in steps)
    decode_s, read = (time.perf_counter() - started) / count, (read_bytes() - before) / count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"decode_s": decode_s, "read": read, "peak": peak}))
"""

_MLX_LM = f"""{_MEASURE}
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
network, _ = load_model(Path(sys.argv[1]))
if mx.default_device().type == mx.DeviceType.cpu:
    network.set_dtype(mx.float32)
measure(generate_step(mx.arange(10, 18), network, max_tokens=int(sys.argv[2]), prompt_cache=make_prompt_cache(network)))
"""

_LLAMA_CPP = f"""{_MEASURE}
import itertools, os
from llama_cpp import Llama
threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
llama = Llama(sys.argv[1], n_ctx=1024, n_threads=threads, verbose=False, use_mmap=True)
measure(itertools.islice(llama.generate(list(range(10, 18)), temp=0.0), int(sys.argv[2])))
"""

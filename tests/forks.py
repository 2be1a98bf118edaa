"""Python processes by the hundred: one that has imported the large modules forks each of them, in milliseconds.

For programs whose start is not what the test is about. The process that forks only imports: it has no thread, and MLX has
computed nothing in it, so that a child begins as a fresh interpreter does. It has not imported huggingface_hub, which reads the
environment as it is imported. On a Mac, whose frameworks do not stand a fork, each is a fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_python"]

IMPORTED = (
    "numpy", "mlx.core", "mlx_mixtral.hub", "mlx_mixtral_convert.conversion", "mlx_mixtral_convert.calibration",
    "mlx_mixtral_convert.sources.storage.remote", "httpx2", "httpx", "anyio", "tqdm", "yaml", "filelock", "truststore",
    "http.server", "asyncio", "zipfile", "csv",
    # What huggingface_hub itself imports, and the converter when it looks at a folder.
    "anyio.to_thread", "anyio.streams.tls", "h11", "httpcore2", "filelock._soft", "tqdm.asyncio", "uuid", "shlex",
    *(f"mlx_mixtral_convert.sources.{name}" for name in (
        "gguf.source", "hf", "mlx", "native", "packed.awq", "packed.fp8", "packed.gptq", "torch.hf_bin",
    )),
)  # fmt: skip
TIMEOUT_S = 120.0


def run_python(code: str, arguments: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``python -c code arguments…`` in this environment: its status, what it printed, what it said on stderr."""
    if sys.platform == "darwin":
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = {"code": code, "arguments": list(arguments), "environment": environment, "out": str(out), "err": str(err)}
        status = _server(environment.get("PYTHONPATH", "")).run(job)
        return subprocess.CompletedProcess(list(arguments), status, out.read_text("utf-8"), err.read_text("utf-8"))


class _Server:
    """The process that forks, for one PYTHONPATH."""

    def __init__(self, pythonpath: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONPATH": pythonpath},
        )
        self._turn = threading.Lock()
        atexit.register(self.close)

    def run(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._turn:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        if answer.strip() == "timeout":
            raise subprocess.TimeoutExpired(job["arguments"], TIMEOUT_S)
        return int(answer)

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()


_servers: dict[str, _Server] = {}


def _server(pythonpath: str) -> _Server:
    if pythonpath not in _servers:
        _servers[pythonpath] = _Server(pythonpath)
    return _servers[pythonpath]


def _serve() -> None:
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert "huggingface_hub" not in sys.modules
    assert threading.active_count() == 1
    # A child need not look through what is here already.
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_work(job))
        print(_status(child), flush=True)


def _status(child: int) -> int | str:
    """As subprocess reports it; "timeout" for a child that had to be killed."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        os.kill(child, signal.SIGKILL)

    timer = threading.Timer(TIMEOUT_S, kill)
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    timer.join()
    return "timeout" if late.is_set() else os.waitstatus_to_exitcode(status)


def _work(job: dict[str, Any]) -> int:
    for stream, place in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        opened = os.open(place, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(job["environment"])
    tempfile.tempdir = None
    sys.argv = ["-c", *job["arguments"]]
    status = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    # What the interpreter does at its end and os._exit does not.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve()

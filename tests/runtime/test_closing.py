"""How a model ends: streams that are open, on this thread or another, and what the process keeps of it."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral import DraftModel, Mixtral, load
from mlx_mixtral.errors import BusyError, ClosedError
from mlx_mixtral.runtime.steps import Steps
from tests.forks import run_python
from tests.processes import PYTHONPATH
from tests.shared import SharedFolders, short_checkpoint

Open = Callable[[Mixtral], Any]
PROMPTS = ["And God said", "In the beginning"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")


@pytest.fixture(scope="module")
def short(shared: SharedFolders) -> Path:
    return shared("short", short_checkpoint)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


OPENED: list[Open] = [
    lambda model: model.stream("And God said", max_tokens=50),
    lambda model: model.stream_batch(PROMPTS, max_tokens=50),
    lambda model: model.stream_chat([{"role": "user", "content": "hello"}], max_tokens=50),
]


@pytest.mark.parametrize("opened", OPENED)
def test_the_block_of_a_model_is_left_in_the_middle_of_a_stream(short: Path, opened: Open) -> None:
    def breaks() -> Any:
        with load(short) as model:
            stream = opened(model)
            for _ in stream:
                break
        assert list(stream) == []
        return model

    def returns() -> Any:
        with load(short) as model:
            stream = opened(model)
            for _ in stream:
                return model, stream  # held by the caller
        raise AssertionError("a stream without a chunk")

    def raises() -> None:
        with load(short) as model:
            stream = opened(model)
            for _ in stream:
                raise LookupError("the user's own")

    for model in (breaks(), returns()[0]):
        with pytest.raises(ClosedError):
            model.generate("And God said")
    with pytest.raises(LookupError, match="the user's own"):
        raises()


def test_a_draft_that_is_closed_ends_the_stream_it_proposes_to(short: Path, tiny: Path) -> None:
    with load(short) as model:
        with load(short) as draft:
            stream = model.stream("And God said", max_tokens=50, speculation=DraftModel(draft))
            next(stream)
        assert list(stream) == []
        assert model.generate("And God said", max_tokens=2).stats.tokens == 2


def test_another_error_is_seen_where_the_model_cannot_be_closed(short: Path) -> None:
    def leave(error: Exception | None) -> None:
        with load(short) as model, ExitStack() as busy:
            # As a thread that computes logits meanwhile.
            busy.enter_context(model.engine.exclusive())
            held.append(busy.pop_all())
            if error is not None:
                raise error

    held: list[ExitStack] = []
    with pytest.raises(LookupError) as raised:
        leave(LookupError("the user's own"))
    assert any("could not be closed: this model is already generating" in note for note in raised.value.__notes__)
    with pytest.raises(BusyError):
        leave(None)
    for busy in held:
        busy.close()


class Halting:
    """A generator whose second step waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.let_go, self.is_closed = threading.Event(), threading.Event(), False

    def __call__(self) -> Iterator[int]:
        try:
            yield 1
            self.begun.set()
            self.let_go.wait(30)
            yield 2
            yield 3
        finally:
            self.is_closed = True


def test_closing_from_another_thread_waits_for_the_step_and_ends_it() -> None:
    halting = Halting()
    steps = Steps(halting())  # type: ignore[arg-type]
    seen: list[int] = []
    reader = threading.Thread(target=lambda: seen.extend(steps))
    reader.start()
    assert halting.begun.wait(30)
    with pytest.raises(BusyError, match="already being read"):
        next(steps)
    closer = threading.Thread(target=steps.close)
    closer.start()
    halting.let_go.set()
    for thread in (closer, reader):
        thread.join(30)
        assert not thread.is_alive()
    assert halting.is_closed
    assert seen in ([1, 2], [1, 2, 3])
    assert list(steps) == []


def test_a_step_may_close_its_own_stream() -> None:
    steps: Steps[int]

    def generate() -> Iterator[int]:
        yield 1
        steps.close()
        yield 2
        raise AssertionError("a step after the end")

    steps = Steps(generate())  # type: ignore[arg-type]
    assert list(steps) == [1, 2]


@pytest.mark.parametrize("closed", ["stream", "model"])
def test_a_stream_that_another_thread_closes_is_cancelled(short: Path, closed: str) -> None:
    model = load(short)
    stream = model.stream("And God said", max_tokens=100_000)
    begun, out = threading.Event(), []

    def read() -> None:
        next(stream)
        begun.set()
        out.append(stream.collect())

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    (stream if closed == "stream" else model).close()
    reader.join(60)
    assert not reader.is_alive()
    assert out[0].finish_reason == "cancelled"
    model.close()


@on_linux
def test_threads_and_files_do_not_grow_with_models(short: Path) -> None:
    def use(*, close: bool) -> None:
        model = load(short, memory=least)
        model.generate("And God said", max_tokens=2)
        if close:
            model.close()

    with load(short) as model:
        least = model.min_memory_bytes
    use(close=True)
    gc.collect()
    before = threads(), descriptors()
    for _ in range(25):
        use(close=True)
    gc.disable()
    try:
        for _ in range(5):
            use(close=False)
    finally:
        gc.enable()
    gc.collect()
    assert descriptors() <= before[1]
    for _ in range(1000):
        # The workers of a pool end a moment after it is shut down.
        if threads() <= before[0]:
            break
        time.sleep(0.01)
    assert threads() <= before[0]


FORKED = """
import os, sys
from mlx_mixtral import load
from mlx_mixtral.errors import MixtralError
model = load(sys.argv[1])
def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except MixtralError as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
child(lambda: model.generate([1], max_tokens=1))
child(lambda: model.logits([1]))
child(lambda: list(model.stream_batch([[1]], max_tokens=1)))
child(lambda: load(sys.argv[1]))
print(model.generate([1], max_tokens=1).stats.tokens, repr(model.residency).startswith("<Residency: "))
model.close()
print(repr(model), repr(model.residency))
"""


@on_linux
def test_a_forked_child_is_told_and_does_not_hang(short: Path) -> None:
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = run_python(FORKED, [str(short)], dict(environment))
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 6), done.stderr
    for line in lines[:4]:
        assert line.startswith("UnsupportedPlatformError this process was forked from process ")
        assert line.endswith("or start processes with multiprocessing's spawn method")
    assert lines[4:] == ["1 True", "<Mixtral: closed> <Residency: released>"]

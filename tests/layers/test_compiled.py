"""What a thread compiled goes with the thread, not after it."""

from __future__ import annotations

import subprocess
import sys
import threading

import mlx.core as mx

from mlx_mixtral.layers.compiled import Compiled

MANY_THREADS = """
import threading
import mlx.core as mx
from mlx_mixtral.layers.expert_bank import swiglu
from mlx_mixtral.layers.compiled import Compiled

step = Compiled(lambda x: mx.sigmoid(x) * x + 1)

def work():
    with mx.stream(mx.new_stream(mx.cpu)):
        x = mx.ones((2, 8))
        mx.eval(step(x), swiglu(x, x))

threads = [threading.Thread(target=work) for _ in range(48)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_a_program_may_leave_as_soon_as_its_threads_are_joined() -> None:
    """A race: each run aborted in about a third of the cases when compiled functions outlived the threads."""
    for _ in range(12):
        done = subprocess.run([sys.executable, "-c", MANY_THREADS], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_each_thread_has_its_own_and_the_numbers_are_those_of_the_function() -> None:
    calls: list[int] = []

    def twice(x: mx.array) -> mx.array:
        calls.append(threading.get_ident())
        return x * 2

    def work() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            assert compiled(mx.array([1.0, 2.0])).tolist() == [2.0, 4.0]
            assert compiled(mx.array([3.0, 4.0])).tolist() == [6.0, 8.0]

    compiled = Compiled(twice)
    work()
    other = threading.Thread(target=work)
    other.start()
    other.join()
    assert len(calls) == len(set(calls)) == 2

"""The program ``mlx-mixtral``: the composition root, and the only part that prints.

Results and generated text go to stdout, everything else to stderr. Exit status: 0 done, 1 a ``MixtralError`` in one line,
2 a wrong call, 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Entry point of the program; never returns.

    Ctrl-C while modules are imported would surface as whatever the module at hand makes of it: until then it just ends.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # Started with a closed stream: reading finds nothing, writing goes nowhere.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
    ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    )
    before = signal.signal(signal.SIGINT, _end) if ours else None
    if not {"-h", "--help", "-V", "--version"} & set(sys.argv) and "_MLX_MIXTRAL_COMPLETE" not in os.environ:
        import numpy as _  # noqa: F401
    from mlx_mixtral.cli.app import main as run

    if ours:
        signal.signal(signal.SIGINT, before)
    run()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)

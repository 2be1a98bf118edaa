"""The program ``mlx-mixtral``: the composition root, and the only part that prints.

Results and generated text go to stdout, everything else to stderr. Exit status: 0 done, 1 a ``MixtralError`` in one line,
2 usage, 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

from mlx_mixtral.cli.app import main

__all__ = ["main"]

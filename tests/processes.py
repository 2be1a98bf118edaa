"""What a Python process that a test starts finds its modules by."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOOKS = Path(__file__).parent / "hooks"
PYTHONPATH = os.pathsep.join(map(str, (HOOKS, ROOT, ROOT / "convert")))
"""The hook first that keeps MLX on the CPU (``tests/hooks/sitecustomize.py``), then both packages."""

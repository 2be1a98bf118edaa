"""``python -m mlx_mixtral``: the same program as ``mlx-mixtral``."""

from __future__ import annotations

from mlx_mixtral.cli import main

if __name__ == "__main__":
    main()

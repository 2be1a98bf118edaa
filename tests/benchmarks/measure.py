"""One measured task in a process of its own, so that its peak memory is its own. Prints a JSON object on its last line.

python tests/benchmarks/measure.py TASK FOLDER [DEST]
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from processes import peak_bytes


def _convert_ours(folder: Path, dest: Path) -> dict[str, Any]:
    from mlx_mixtral_convert import Recipe, convert

    convert(folder, dest, recipe=Recipe(bits=4, group_size=64))
    return {}


def _convert_mlx_lm(folder: Path, dest: Path) -> dict[str, Any]:
    # mlx_lm.convert insists on a tokenizer, which synthetic checkpoints lack: these are the steps it takes.
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    network, config = load_model(folder, lazy=True)
    network, config = quantize_model(network, config, 64, 4)
    dest.mkdir()
    save_model(dest, network)
    save_config(config, dest / "config.json")
    return {}


def _load_ours(folder: Path, _: Path) -> dict[str, Any]:
    from mlx_mixtral import load

    return {"weight_bytes": load(folder).nbytes}


def _load_mlx_lm(folder: Path, _: Path) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    network, _ = load_model(folder)
    mx.eval(network.parameters())
    return {}


TASKS = {
    "convert-ours": _convert_ours,
    "convert-mlx-lm": _convert_mlx_lm,
    "load-ours": _load_ours,
    "load-mlx-lm": _load_mlx_lm,
}


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    dest = Path(sys.argv[3]) if len(sys.argv) > 3 else Path()
    if task.startswith("convert") and dest.exists():
        shutil.rmtree(dest)
    started = time.perf_counter()
    result = TASKS[task](folder, dest)
    result["seconds"] = time.perf_counter() - started
    result["peak_bytes"] = peak_bytes()
    print(json.dumps(result))


if __name__ == "__main__":
    main()

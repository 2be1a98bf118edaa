"""Streaming from a hub on this machine that breaks a tenth of all requests: extra disk, requests made again, MB per second.

python tests/benchmarks/hub.py [LAYERS]

Every kind is converted in a process of its own; "layer" is what one layer's tensors take in the source.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "convert")]

from tests.convert.gguf_writer import renamed, write_gguf  # noqa: E402
from tests.convert.hub_server import WEIGHTS, run, serve  # noqa: E402
from tests.convert.packers import awq, grouped_packer, make_packed  # noqa: E402
from tests.convert.support import CONFIG, make_checkpoint, weights  # noqa: E402

# 12 MB per layer in bfloat16.
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 8}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}


def of_gguf(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    write_gguf(folder / "m.gguf", config, renamed(weights(config), config), "Q8_0")


def main() -> None:
    changes = SHAPE | {"num_hidden_layers": int(sys.argv[1]) if len(sys.argv) > 1 else 4}
    kinds: dict[str, Callable[[Path], Any]] = {
        "safetensors": lambda folder: make_checkpoint(folder, shards=4, **changes),
        "awq": lambda folder: make_packed(folder, AWQ, grouped_packer(awq, 128), shards=2, **changes),
        "gguf": lambda folder: of_gguf(folder, CONFIG | changes),
    }
    print(
        f"{'source':12} {'weights':>10} {'layer':>10} {'extra disk':>10} {'broken':>7} {'again':>6} {'received':>10}  MB/s"
    )
    for name, make in kinds.items():
        with tempfile.TemporaryDirectory() as place:
            repository = Path(place, "repository")
            make(repository)
            stored = sum(path.stat().st_size for path in repository.iterdir() if path.suffix in WEIGHTS)
            with serve(repository) as hub:
                hub.failures = 0.1
                started = time.perf_counter()
                result = run(Path(place, "home"), hub, Path(place, "out"))
                seconds = time.perf_counter() - started
            if "error" in result:
                raise SystemExit(f"{name}: {result['message']}")
            print(
                f"{name:12} {stored:10} {stored // changes['num_hidden_layers']:10} {result['peak']:10} "
                f"{sum(hub.broken.values()):7} {result['retries']:6} {result['received']:10} {stored / seconds / 1e6:5.1f}"
            )


if __name__ == "__main__":
    main()

"""One process that asks a hub for many repositories at once, each in a thread of its own, so that silences pass together."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.forks import run_python
from tests.processes import PYTHONPATH

__all__ = ["ask_all"]

SCRIPT = """
import json, logging, resource, sys, time
from concurrent.futures import ThreadPoolExecutor
from mlx_mixtral.errors import HubError
from mlx_mixtral.hub import answers, ranges, resolve
for module, limits in ((answers, "answers"), (ranges, "ranges")):
    vars(module).update(json.loads(sys.argv[2])[limits])
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("mlx_mixtral").addHandler(handler)
logging.getLogger("mlx_mixtral").setLevel(logging.INFO)
def ask(name):
    started = time.monotonic()
    try:
        result = {"folder": str(resolve(f"owner/{name}"))}
    except HubError as error:
        result = {"message": str(error)}
    except BaseException as error:
        result = {"wrong": repr(error)}
    return name, result | {"seconds": time.monotonic() - started}
with ThreadPoolExecutor(16) as pool:
    results = dict(pool.map(ask, json.loads(sys.argv[1])))
print(json.dumps({"results": results, "said": said, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""
# Seconds, all of them short: a lie that is waited for costs little.
ANSWERS = {"ANSWER_S": 4.0, "QUIET_S": 0.2}
RANGES = {"TIMEOUT_S": 0.5, "WAIT_S": 0.001, "MAX_ASKED_S": 0.001, "MAX_SILENT_S": 1.5, "SAID_S": 0.2}


def ask_all(url: str, home: Path, names: Sequence[str]) -> dict[str, Any]:
    """What became of ``owner/NAME`` for each of the names, the lines said meanwhile, and the peak of memory in kB.

    Raises:
        AssertionError: the process failed, or printed something on stderr.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "4", "NO_PROXY": "*", "PYTHONPATH": PYTHONPATH,
    }  # fmt: skip
    limits = json.dumps({"answers": ANSWERS, "ranges": RANGES})
    done = run_python(SCRIPT, [json.dumps(list(names)), limits], environment)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found

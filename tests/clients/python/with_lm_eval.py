"""lm-eval's local-completions with the server's own tokenizer, on the bundled checkpoint: https://pypi.org/project/lm_eval/

What it measures has to be what its Hugging Face backend measured on the same weights, recorded in
tests/goldens/harness.json. tests/evaluation/harness compares `evaluate --tasks` with the same recording.

lm-eval asks a remote tokenizer for tokens without BOS, and has no option for it; as a system instruction, `<s>` stands before
every prompt, and the server reads it as BOS.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mlx-mixtral-lm-eval-")

import lm_eval
from lm_eval.tasks import TaskManager
from outcomes import BASE_URL, MODEL, check

TESTS = Path(__file__).resolve().parents[2]
TASKS = TESTS / "evaluation" / "harness" / "tasks"
GOLDEN = json.loads((TESTS / "goldens" / "harness.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4
"""Of a figure beyond 1, its share: those of long texts are sums over hundreds of tokens."""
KINDS = {
    "choices": ("tiny_arithmetic", "tiny_endings"),
    "passages": ("tiny_passages",),
    "generations": ("tiny_sums", "tiny_stories"),
}

os.chdir(TASKS)  # task files name their data from there


def measured(names: tuple[str, ...]) -> Any:
    options = {
        "model": MODEL,
        "base_url": f"{BASE_URL}/completions",
        "tokenizer_backend": "remote",
        # One is kept for a token that is generated, and in texts of several windows another for BOS.
        "max_length": GOLDEN["max_length"] + (2 if names == KINDS["passages"] else 1),
    }
    return lm_eval.simple_evaluate(
        model="local-completions",
        model_args=options,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        system_instruction="<s>",
        log_samples=True,
        bootstrap_iters=0,
    )


def compared(names: tuple[str, ...]) -> None:
    found = measured(names)
    farthest = 0.0
    for name in names:
        for metric, value in GOLDEN["tasks"][name]["metrics"].items():
            if "_stderr" not in metric:
                farthest = max(farthest, abs(found["results"][name][metric] - value) / max(1, abs(value)))
        for sample, expected in zip(found["samples"][name], GOLDEN["tasks"][name]["samples"], strict=True):
            for answer, other in zip(sample["resps"], expected["answers"], strict=True):
                given = answer[0]
                if isinstance(other, str):
                    assert given.strip() == other.strip(), f"{given!r} instead of {other!r}"
                    continue
                logprob, recorded = (each[0] if isinstance(each, list | tuple) else each for each in (given, other))
                farthest = max(farthest, abs(logprob - recorded) / max(1, abs(recorded)))
                if isinstance(other, list):
                    assert bool(given[1]) == other[1], f"greedy is {given[1]}"
    print(f"{', '.join(names)}: {farthest:.1e}", file=sys.stderr)
    assert farthest <= TOLERANCE, f"{farthest} from what was recorded"


for kind, names in KINDS.items():
    check(kind, lambda names=names: compared(names))

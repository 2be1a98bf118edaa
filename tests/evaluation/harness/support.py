"""What lm_eval's Hugging Face backend answered: ``tests/goldens/record_harness.py`` recorded it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_mixtral.demo import checkpoint_path

TASKS = Path(__file__).parent / "tasks"
GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "harness.json").read_text(encoding="utf-8"))


def requests_and_answers(task: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """All of a recorded task, sample after sample."""
    requests = [tuple(request) for sample in task["samples"] for request in sample["arguments"]]
    return requests, [answer for sample in task["samples"] for answer in sample["answers"]]


def with_template(folder: Path, template: str) -> Path:
    """A copy of the bundled checkpoint that brings a chat template."""
    shutil.copytree(checkpoint_path(), folder, copy_function=shutil.copyfile)
    place = folder / "tokenizer_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"chat_template": template}))
    return folder

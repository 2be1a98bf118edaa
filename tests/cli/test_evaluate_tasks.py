"""``mlx-mixtral evaluate --tasks``: lm-evaluation-harness from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral.cli.evaluate.task_tables import print_tasks
from mlx_mixtral.evaluation.harness.published import PUBLISHED, published_for
from mlx_mixtral.evaluation.harness.responder import Responder
from mlx_mixtral.evaluation.harness.tasks import TaskResults, TaskScore

from .conftest import Invoke, assert_one_error

TASKS = Path(__file__).parents[1] / "evaluation" / "harness" / "tasks"
pytestmark = pytest.mark.filterwarnings("default")  # of lm_eval and what it imports


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the data of the task files are; nothing is fetched, and nothing left behind."""
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def shown(capsys: pytest.CaptureFixture[str], *scores: TaskScore, limit: int | None = None, truncated: int = 0) -> str:
    print_tasks("model", TaskResults(scores, truncated, 1.0, "0.4.13"), limit, False)
    return capsys.readouterr().out


def test_a_table_has_what_was_measured(invoke: Invoke, tiny: Path, local: None) -> None:
    result = invoke("evaluate", tiny, "--tasks", "tiny_arithmetic", "--task-path", TASKS, "--limit", "4")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("tiny_arithmetic")]
    assert [row[:4] for row in rows] == [["tiny_arithmetic", name, "3", "4"] for name in ("acc", "acc_norm")]
    assert all(row[-1] == "–" for row in rows)
    assert "only the first 4 questions of each task" in result.stdout
    assert "as plain text by lm_eval" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if line.startswith("tiny"))


def test_json_and_the_file_say_the_same(invoke: Invoke, tiny: Path, local: None, tmp_path: Path) -> None:
    place = tmp_path / "found.json"
    result = invoke(
        "evaluate", tiny, "--tasks", "tiny_sums", "--task-path", TASKS, "--limit", "2", "--shots", "1", "--chat-template",
        "--batch-size", "2", "--output", place, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads(place.read_text())
    assert [path.name for path in tmp_path.glob("found*")] == ["found.json"]
    (score,) = found["tasks"]
    assert {name: score[name] for name in ("task", "metric", "filter", "shots", "samples", "published")} == {
        "task": "tiny_sums", "metric": "exact_match", "filter": "stripped", "shots": 1, "samples": 2, "published": None,
    }  # fmt: skip
    assert found["chat_template"] is True
    assert found["limit"] == 2


def test_an_interrupted_run_goes_on_where_it_was(
    invoke: Invoke, tiny: Path, local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "evaluate", tiny, "--tasks", "tiny_sums,tiny_endings", "--task-path", TASKS, "--limit", "3", "--output",
        tmp_path / "a.json", "--json",
    )  # fmt: skip
    whole = json.loads(invoke(*command).stdout)
    (tmp_path / "a.json").unlink()
    original, answered = Responder.generate_until, 0

    def interrupted(self: Responder, requests: Any, done: Any, known: Any) -> Any:
        def stop(index: int, answer: Any) -> None:
            nonlocal answered
            done(index, answer)
            answered += 1
            if answered == 2:
                raise KeyboardInterrupt

        return original(self, requests, stop, known)

    monkeypatch.setattr(Responder, "generate_until", interrupted)
    result = invoke(*command)
    assert result.exit_code == 130, result.stderr
    assert "repeat the command to continue from there" in result.stderr
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    assert answered == 3
    assert json.loads(result.stdout)["tasks"] == whole["tasks"]
    assert not list(tmp_path.glob("*.journal"))


def test_the_papers_figures_stand_beside_the_same_task_metric_and_shots_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = shown(
        capsys,
        TaskScore("hellaswag", "acc_norm", "none", 0.8451, 0.0036, 0, 10042),
        TaskScore("hellaswag", "acc_norm", "none", 0.85, None, 5, 10042),
        TaskScore("hellaswag", "acc", "none", 0.65, None, 0, 10042),
        TaskScore("gsm8k", "exact_match", "strict-match", 0.58, 0.01, 5, 1319),
        TaskScore("gsm8k", "exact_match", "strict-match", 0.74, 0.01, 8, 1319),
        TaskScore("mmlu", "acc", "none", 0.7, 0.01, None, None),
    )
    rows = [line.split() for line in found.splitlines() if line.startswith(("hellaswag", "gsm8k", "mmlu"))]
    assert [row[-1] for row in rows] == ["84.4%", "–", "–", "58.4%", "–", "–"]
    assert "84.5% ± 0.4%" in found
    assert "arXiv 2401.04088, tables 2 and 3" in found


def test_published_figures_are_those_of_the_paper() -> None:
    by_table = {
        table: {(row.task, row.shots): row.percent for row in PUBLISHED if row.table == table} for table in (2, 3)
    }
    assert by_table[2] == {
        ("mmlu", 5): 70.6, ("hellaswag", 0): 84.4, ("winogrande", 0): 77.2, ("piqa", 0): 83.6, ("arc_easy", 0): 83.1,
        ("arc_challenge", 0): 59.7, ("nq_open", 5): 30.6, ("triviaqa", 5): 71.5,
    }  # fmt: skip
    assert by_table[3] == {
        ("hellaswag", 10): 86.7, ("arc_challenge", 25): 85.8, ("winogrande", 5): 81.2, ("gsm8k", 5): 58.4,
    }  # fmt: skip
    assert published_for("hellaswag", "acc_norm", None) is None


def test_requests_that_lost_their_start_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    score = TaskScore("t", "word_perplexity", "none", 123.456, None, 0, 5)
    found = shown(capsys, score, truncated=1, limit=1)
    assert "1 request was longer than the context" in found
    assert "only the first 1 question of each task" in found
    assert "123.5" in found


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--task-path", "missing"), "missing is not a folder"),
        (("--limit", "0"), "limit is 0"),
        (("--batch-size", "0"), "batch-size is 0"),
        (("--output", "no/folder/a.json"), "no/folder"),
    ],
)
def test_bad_input_is_one_line(invoke: Invoke, tiny: Path, local: None, options: tuple[str, ...], part: str) -> None:
    assert_one_error(invoke("evaluate", tiny, "--tasks", "tiny_sums", *options), part)


def test_without_lm_eval_the_extra_is_named(invoke: Invoke, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = invoke("evaluate", tiny, "--tasks", "hellaswag")
    assert_one_error(result, "pip install 'mlx-mixtral[eval]'")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--tasks", "x", "--text", "a.txt"), "--tasks cannot be combined"),
        (("--tasks", "x", "--passkey"), "--tasks cannot be combined"),
        (("--text", "a.txt", "--shots", "0"), "--shots applies only with --tasks"),
        (("--passkey", "--chat-template"), "--chat-template applies only with --tasks"),
        (("--tasks", "x", "--reference", "other"), "--reference applies only with --text"),
        ((), "give --text, --passkey or both, or else --tasks"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(
    invoke: Invoke, tiny: Path, arguments: tuple[str, ...], part: str
) -> None:
    result = invoke("evaluate", tiny, *arguments)
    assert result.exit_code == 2
    assert part in result.stderr

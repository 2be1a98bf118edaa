"""Tasks run by lm_eval itself on local files, against its Hugging Face backend on the same weights."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.errors import CheckpointError, HubError, InvalidRequestError, MissingDependencyError
from mlx_mixtral.evaluation.harness.tasks import TaskScore, check_harness, load_tasks, run_tasks

from .support import GOLDEN, TASKS, with_template

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # of lm_eval and what it imports

NAMES = list(GOLDEN["tasks"])


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Task files name their data from where one is; nothing is fetched, and nothing left behind."""
    import datasets

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval without its thousands of task files, which take long to read."""
    import lm_eval.tasks

    def manager(*arguments: Any, include_defaults: bool = True, **options: Any) -> Any:
        return original(*arguments, include_defaults=False, **options)

    original = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.wraps(original)(manager))


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixtral]:
    folder = with_template(tmp_path_factory.mktemp("chat") / "model", GOLDEN["chat"]["template"])
    with load(folder) as loaded:
        yield loaded


def harness(model: Mixtral, **options: Any) -> Any:
    from mlx_mixtral.evaluation.harness.lm import HarnessLM

    return HarnessLM(model, max_length=GOLDEN["max_length"], **options)


def metrics(scores: tuple[TaskScore, ...], task: str) -> dict[str, float]:
    return {f"{score.metric},{score.filter}": score.value for score in scores if score.task == task}


def recorded(task: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in task["metrics"].items() if "_stderr" not in name}


def test_metrics_equal_the_recorded_ones_accuracies_exactly(model: Mixtral) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr, call-overload]
    told: list[tuple[int, int]] = []
    lm = harness(model, progress=lambda *at: told.append(at))
    results = run_tasks(lm, load_tasks(NAMES, path=TASKS))
    for name in NAMES:
        found, expected = metrics(results.scores, name), recorded(GOLDEN["tasks"][name])
        if name == "tiny_passages":
            assert found == pytest.approx(expected, rel=1e-5)
        else:
            assert found == expected
    assert {score.task: score.shots for score in results.scores} == {
        name: task["shots"] for name, task in GOLDEN["tasks"].items()
    }
    errors = {score.task: score.stderr for score in results.scores if score.metric == "acc"}
    assert errors["tiny_endings"] == pytest.approx(GOLDEN["tasks"]["tiny_endings"]["metrics"]["acc_stderr,none"])
    assert told[-1][0] == told[-1][1]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[union-attr, call-overload]


def test_tasks_in_a_chat_format_equal_the_recorded_ones(chatting: Mixtral) -> None:
    names = list(GOLDEN["chat"]["tasks"])
    asked: list[Any] = []
    lm = harness(chatting)
    lm.responder.generate_until = _kept(lm.responder.generate_until, asked)
    results = run_tasks(lm, load_tasks(names, path=TASKS), chat_template=True)
    for name in names:
        assert metrics(results.scores, name) == recorded(GOLDEN["chat"]["tasks"][name])
    samples = GOLDEN["chat"]["tasks"]["tiny_sums"]["samples"]
    assert [context for context, _ in asked] == [sample["arguments"][0][0] for sample in samples]
    assert lm.chat_template(True) == GOLDEN["chat"]["template"]


def _kept(original: Any, asked: list[Any]) -> Any:
    def run(requests: Any, *others: Any) -> Any:
        asked.extend(requests)
        return original(requests, *others)

    return run


def test_shots_and_limit_are_what_was_asked_for(model: Mixtral) -> None:
    results = run_tasks(harness(model), load_tasks(["tiny_endings", "tiny_arithmetic"], shots=1, path=TASKS), limit=3)
    assert {(score.shots, score.samples) for score in results.scores} == {(1, 3)}


def test_a_task_that_is_named_twice_is_run_once(model: Mixtral) -> None:
    results = run_tasks(harness(model), load_tasks(["tiny_sums", "tiny_sums"], path=TASKS), limit=1)
    assert [score.metric for score in results.scores] == ["exact_match"]


def test_names_of_caches_tell_models_and_chat_formats_apart(model: Mixtral, chatting: Mixtral) -> None:
    names = {harness(model, name="a/b").tokenizer_name, harness(chatting, name="a/b").tokenizer_name}
    assert len(names) == 2
    assert all(name.startswith("a__b-") for name in names)


def test_an_unknown_task_names_those_that_are_like_it(own_tasks_only: None) -> None:
    with pytest.raises(InvalidRequestError, match=r"'tiny_sum' is unknown to .*did you mean tiny_sums"):
        load_tasks(["tiny_sum"], path=TASKS)
    with pytest.raises(InvalidRequestError, match=r"'zzzz' is unknown to .*run `lm_eval ls tasks` for a list"):
        load_tasks(["zzzz"], path=TASKS)


def test_folders_without_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="is not a folder"):
        load_tasks(["x"], path=tmp_path / "missing")
    with pytest.raises(InvalidRequestError, match=r"holds no tasks: it has no .yaml file"):
        load_tasks(["x"], path=tmp_path)
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(InvalidRequestError, match=r"holds no tasks: no .yaml file in it has a task"):
        load_tasks(["x"], path=tmp_path)


def write_task(folder: Path, **settings: str) -> Path:
    base = {
        "task": "t",
        "dataset_path": "json",
        "dataset_kwargs": f"{{data_files: {{test: {TASKS / 'endings.jsonl'}}}}}",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": '"{{start}}"',
        "doc_to_choice": '"{{endings}}"',
        "doc_to_target": '"{{answer}}"',
    }
    text = "".join(f"{name}: {value}\n" for name, value in (base | settings).items())
    (folder / "t.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"dataset_kwargs": "{data_files: {test: nowhere.jsonl}}"},
            InvalidRequestError,
            "task t cannot be loaded: .*nowhere",
        ),
        ({"dataset_path": "nobody/nothing"}, HubError, "the data of task t cannot be fetched .*--task-path"),
        ({"unsafe_code": "true"}, InvalidRequestError, "task t runs code written by a model"),
    ],
)
def test_tasks_that_cannot_be_loaded_are_refused(
    settings: dict[str, str], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        load_tasks(["t"], path=write_task(tmp_path, **settings))


def test_a_task_whose_questions_cannot_be_made_is_refused(model: Mixtral, tmp_path: Path) -> None:
    tasks = load_tasks(["t"], path=write_task(tmp_path, doc_to_text='"{{ 1 // (answer - 1) }}"'))
    with pytest.raises(InvalidRequestError, match="tasks t cannot be run: "):
        run_tasks(harness(model), tasks)


def test_a_standard_error_without_a_formula_is_drawn_and_nothing_printed(
    model: Mixtral, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, output_type="loglikelihood", doc_to_choice="null", doc_to_target='"{{endings[answer]}}"')
    results = run_tasks(harness(model), load_tasks(["t"], path=tmp_path))
    found = {score.metric: score for score in results.scores}
    assert found["perplexity"].stderr is not None
    assert found["perplexity"].stderr > 0
    assert found["acc"].stderr == pytest.approx((found["acc"].value * (1 - found["acc"].value) / 9) ** 0.5)
    assert capfd.readouterr() == ("", "")


def test_an_error_of_the_model_stays_its_own(model: Mixtral, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    lm = harness(model)
    monkeypatch.setattr("mlx_mixtral.evaluation.harness.responder.score_pairs", fail)
    with pytest.raises(ZeroDivisionError):
        run_tasks(lm, load_tasks(["tiny_endings"], path=TASKS), limit=1)
    monkeypatch.setattr("mlx_mixtral.evaluation.harness.responder.score_pairs", _raise_checkpoint_error)
    with pytest.raises(CheckpointError):
        run_tasks(lm, load_tasks(["tiny_endings"], path=TASKS), limit=1)
    tasks = load_tasks(["t"], path=write_task(tmp_path, doc_to_text='"{{ 1 // (answer - 1) }}"'))
    with pytest.raises(InvalidRequestError, match="tasks t cannot be run: "):
        run_tasks(lm, tasks)


def _raise_checkpoint_error(*arguments: Any) -> None:
    raise CheckpointError("the weights are damaged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "no task was named"),
        ({"names": ["tiny_sums"], "shots": -1}, "shots is -1"),
        ({"names": ["tiny_sums"], "shots": True}, "shots is True"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        load_tasks(path=TASKS, **arguments)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlx-mixtral\[eval\]'"):
        check_harness()

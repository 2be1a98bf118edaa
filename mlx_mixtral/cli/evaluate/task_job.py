"""One ``evaluate --tasks`` of the program: tasks and their data first, then the model, then files and a table."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.arguments import as_path, check_integer
from mlx_mixtral.cli.console import json_text
from mlx_mixtral.cli.destinations import EVALUATION, check_destinations, journal_path
from mlx_mixtral.cli.evaluate.options import EvaluateOptions
from mlx_mixtral.cli.evaluate.task_tables import print_tasks
from mlx_mixtral.cli.progress import count_progress
from mlx_mixtral.cli.subject import Subject
from mlx_mixtral.evaluation.harness.published import published_for
from mlx_mixtral.evaluation.harness.tasks import TaskResults, TaskScore, check_harness, load_tasks, run_tasks
from mlx_mixtral.evaluation.journal import EvaluationJournal
from mlx_mixtral.files import replace_file

__all__ = ["TaskJob"]


class TaskJob:
    """Everything checked first, then the model."""

    def __init__(self, given: EvaluateOptions) -> None:
        self.given = given
        names = list(dict.fromkeys((given.tasks or "").replace(",", " ").split()))
        for name, value, minimum in (
            ("shots", given.shots, 0),
            ("limit", given.limit, 1),
            ("batch-size", given.batch_size, 1),
        ):
            if value is not None:
                check_integer(name, value, minimum, wanted=f"at least {minimum}")
        files = {"--output": given.output, "--resume": given.resume}
        places = check_destinations(files, {"--output": EVALUATION}, overwrite=given.overwrite)
        self.output, self.journal_path = places.get("--output"), journal_path(places)
        check_harness()
        self.subject = Subject(given.model, given.loading)
        _ = self.subject.tokenizer  # one that cannot be used says so before data are fetched
        with count_progress("loading tasks") as show:
            self.tasks = load_tasks(names, shots=given.shots, path=given.task_path, progress=show)
        self._identity = {
            "version": __version__,
            "lm_eval": version("lm_eval"),
            "model": self.subject.identity,
            "tasks": names,
            "shots": given.shots,
            "limit": given.limit,
            "chat_template": given.chat_template,
            "task_path": None if given.task_path is None else str(as_path("task-path", given.task_path).resolve()),
            "context": given.loading.context,
            **given.loading.identity(),
        }
        self.results: TaskResults | None = None

    def run(self) -> dict[str, Any]:
        """The result as JSON has it; files are written."""
        from mlx_mixtral.evaluation.harness.lm import HarnessLM
        from mlx_mixtral.evaluation.harness.responder import DEFAULT_BATCH

        with EvaluationJournal(self.journal_path, self._identity, restart=self.given.restart) as journal:
            with self.subject.load(self.given.loading) as model, count_progress("asking") as show:
                harness = HarnessLM(
                    model,
                    batch_size=self.given.batch_size or DEFAULT_BATCH,
                    name=self.subject.title,
                    journal=journal,
                    progress=show,
                )
                self.results = run_tasks(
                    harness, self.tasks, limit=self.given.limit, chat_template=self.given.chat_template
                )
            found = self._result(self.results)
            if self.output is not None:
                replace_file(self.output, (json_text(found) + "\n").encode())
        return found

    def report(self) -> None:
        """A table on stdout."""
        assert self.results is not None
        print_tasks(self.subject.title, self.results, self.given.limit, self.given.chat_template)

    def _result(self, results: TaskResults) -> dict[str, Any]:
        return {
            **self.subject.facts(),
            "tasks": [_score(score) for score in results.scores],
            "limit": self.given.limit,
            "chat_template": self.given.chat_template,
            "truncated": results.truncated,
            "seconds": results.seconds,
            "lm_eval": results.harness,
        }


def _score(score: TaskScore) -> dict[str, Any]:
    row = published_for(score.task, score.metric, score.shots)
    published = None if row is None else {"percent": row.percent, "source": f"arXiv 2401.04088, table {row.table}"}
    return score.to_dict() | {"published": published}

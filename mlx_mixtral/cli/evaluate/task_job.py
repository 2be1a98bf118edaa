"""One ``evaluate --tasks`` of the program: tasks and their data first, then the model, then files and a table."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.cli.console import json_text
from mlx_mixtral.cli.evaluate.subject import Subject
from mlx_mixtral.cli.evaluate.task_tables import print_tasks
from mlx_mixtral.cli.progress import count_progress
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.harness.published import published_for
from mlx_mixtral.evaluation.harness.tasks import TaskResults, TaskScore, check_harness, load_tasks, run_tasks
from mlx_mixtral.evaluation.journal import Journal
from mlx_mixtral.files import check_destination, replace_file

__all__ = ["TaskJob"]


class TaskJob:
    """Everything checked first, then the model."""

    def __init__(
        self,
        model: str,
        *,
        tasks: str,
        shots: int | None,
        limit: int | None,
        task_path: str | None,
        batch_size: int | None,
        chat_template: bool,
        output: str | None,
        resume: str | None,
        restart: bool,
        **loading: Any,
    ) -> None:
        names = list(dict.fromkeys(name for name in tasks.replace(",", " ").split()))
        for name, value, least in (("shots", shots, 0), ("limit", limit, 1), ("batch-size", batch_size, 1)):
            if value is not None and value < least:
                raise InvalidRequestError(f"{name} is {value}; it must be at least {least}")
        self.loading, self.limit, self.batch_size, self.chat = loading, limit, batch_size, chat_template
        self.restart = restart
        places = {"--output": output, "--resume": resume}
        found = {name: check_destination(name, path) for name, path in places.items() if path is not None}
        if len(set(found.values())) < len(found):
            raise InvalidRequestError("--output, --resume name one file; give each its own")
        self.output, self.journal_path = found.get("--output"), found.get("--resume")
        if self.journal_path is None and self.output is not None:
            self.journal_path = self.output.with_name(f"{self.output.name}.journal")
        check_harness()
        self.subject = Subject(model, loading["revision"])
        _ = self.subject.tokenizer  # one that cannot be used says so before data are fetched
        with count_progress("loading tasks") as show:
            self.tasks = load_tasks(names, shots=shots, path=task_path, progress=show)
        self._identity = {
            "version": __version__,
            "lm_eval": version("lm_eval"),
            "model": self.subject.identity,
            "tasks": names,
            "shots": shots,
            "limit": limit,
            "chat_template": chat_template,
            "task_path": None if task_path is None else str(Path(task_path).resolve()),
            "context": loading["context"],
        } | {name: value for name, value in loading.items() if name == "dtype" or name.startswith("kv_")}
        self.results: TaskResults | None = None

    def run(self) -> dict[str, Any]:
        """The result as JSON has it; files are written."""
        from mlx_mixtral.evaluation.harness.lm import HarnessLM
        from mlx_mixtral.evaluation.harness.responder import DEFAULT_BATCH

        with Journal(self.journal_path, self._identity, restart=self.restart) as journal:
            with self.subject.load(self.loading) as model, count_progress("asking") as show:
                harness = HarnessLM(
                    model,
                    batch_size=self.batch_size or DEFAULT_BATCH,
                    name=self.subject.name,
                    journal=journal,
                    progress=show,
                )
                self.results = run_tasks(harness, self.tasks, limit=self.limit, chat_template=self.chat)
            found = self._result(self.results)
            if self.output is not None:
                replace_file(self.output, (json_text(found) + "\n").encode())
        return found

    def report(self) -> None:
        """A table on stdout."""
        assert self.results is not None
        print_tasks(self.subject.name, self.results, self.limit, self.chat)

    def _result(self, results: TaskResults) -> dict[str, Any]:
        return {
            "model": self.subject.name,
            "tasks": [_score(score) for score in results.scores],
            "limit": self.limit,
            "chat_template": self.chat,
            "truncated": results.truncated,
            "seconds": results.seconds,
            "lm_eval": results.harness,
        }


def _score(score: TaskScore) -> dict[str, Any]:
    row = published_for(score.task, score.metric, score.shots)
    published = None if row is None else {"percent": row.percent, "source": f"arXiv 2401.04088, table {row.table}"}
    return score.to_dict() | {"published": published}

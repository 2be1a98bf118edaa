"""A ``Mixtral`` as a model of lm_eval: ``lm_eval.simple_evaluate(model=HarnessLM(model), tasks=[…])``.

Importing this module imports lm_eval.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import LM

from mlx_mixtral.arguments import check_callbacks
from mlx_mixtral.evaluation.corpus import vocabulary_sha256
from mlx_mixtral.evaluation.harness.responder import DEFAULT_BATCH, Responder
from mlx_mixtral.evaluation.harness.scoring import Answer
from mlx_mixtral.evaluation.journal import Journal
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["HarnessLM"]


class HarnessLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """Hands requests on to a ``Responder``; see there for arguments and errors.

    Args:
        name: of the model, for caches of requests.
        journal: where answers are kept, and found again.
        progress: called with how many requests of a kind are done, of how many.
    """

    def __init__(
        self,
        model: Mixtral,
        *,
        batch_size: int = DEFAULT_BATCH,
        max_length: int | None = None,
        name: str = "",
        journal: Journal | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        check_callbacks(progress=progress)
        self.responder = Responder(model, batch_size=batch_size, max_length=max_length)
        self.name = name
        self.is_asked = False
        """Whether an answer is being computed: an error is this model's then, not the task's."""
        self._journal, self._progress = journal or Journal(), progress

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.responder.max_length

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval tells its caches of requests apart by: the model, its vocabulary and its chat format."""
        tokenizer = self.responder.model.tokenizer
        chat = hashlib.sha256(tokenizer.chat_source.encode()).hexdigest()
        return f"{self.name.replace('/', '__')}-{vocabulary_sha256(tokenizer)[:16]}-{chat[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, or the name of a native format; lm_eval keeps it with results, and its hash."""
        return None if chat_template is False else self.responder.model.tokenizer.chat_source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt, which the methods below know again."""
        return self.responder.encoder.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """For each (context, continuation): its log-probability, and whether greedy decoding would write it."""
        return self._run("loglikelihood", requests, lambda args: args, lambda kept: Answer(*kept))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log-probability."""
        return self._run("loglikelihood_rolling", requests, lambda args: args[0], float)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, generation_kwargs): the text that follows."""
        return self._run("generate_until", requests, lambda args: args, str)

    def _run(
        self,
        kind: str,
        requests: Sequence[Any],
        argument: Callable[[Any], Any],
        recalled: Callable[[Any], Any],
    ) -> list[Any]:
        known = {}
        for index, request in enumerate(requests):
            entry = self._journal.get(kind, index)
            if entry is not None and entry.get("request") == _fingerprint(request.args):
                known[index] = recalled(entry["answer"])
        done = len(known)

        def keep(index: int, answer: Any) -> None:
            nonlocal done
            done += 1
            args = requests[index].args
            self._journal.add(kind, [(index, {"request": _fingerprint(args), "answer": answer})])
            # A plain tuple: lm_eval's cache is to be read without this project.
            self.cache_hook.add_partial(kind, args, tuple(answer) if isinstance(answer, Answer) else answer)
            self._show(done, len(requests))

        self._show(done, len(requests))
        self.is_asked = True
        answers: list[Any] = getattr(self.responder, kind)(
            [argument(request.args) for request in requests], keep, known
        )
        self.is_asked = False
        return answers

    def _show(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def _fingerprint(args: Any) -> str:
    return hashlib.sha256(json.dumps(args, sort_keys=True, default=str).encode()).hexdigest()[:16]

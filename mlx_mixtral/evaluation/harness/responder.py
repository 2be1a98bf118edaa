"""What lm_eval asks of a model, answered by a ``Mixtral``; of lm_eval only its rolling windows are needed here."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_mixtral.arguments import check_callbacks, check_integer, check_type
from mlx_mixtral.errors import ContextLengthError
from mlx_mixtral.evaluation.forward import context_limit
from mlx_mixtral.evaluation.harness.encoding import Encoder, Pair
from mlx_mixtral.evaluation.harness.generation_kwargs import GenerationSettings
from mlx_mixtral.evaluation.harness.scoring import Answer, score_pairs, truncated
from mlx_mixtral.machine.device import wired
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["DEFAULT_BATCH", "Responder"]

DEFAULT_BATCH = 16

Done = Callable[[int, Any], None]
"""Called with the number of a request and its answer, in the order they are found."""

NONE: Mapping[int, Any] = {}


def _ignore(index: int, answer: Any) -> None:
    """What ``done`` is when none is given."""


class Responder:
    """Log-probabilities and greedy or sampled texts, as lm_eval's Hugging Face backend computes them.

    A sequence longer than ``max_length`` loses tokens at its left; ``truncated`` counts such requests. Every method takes
    answers that are ``known``, by the number of the request: they are given back, and not computed again.

    Args:
        batch_size: most rows of a batch; fewer are read at once where the memory that was planned holds no more.
        max_length: tokens of context; the model's own, or those a memory budget holds KV cache for, when None.

    Raises:
        InvalidRequestError, ContextLengthError: an argument out of range.
        TokenizerError: a checkpoint without a tokenizer.
    """

    def __init__(self, model: Mixtral, *, batch_size: int = DEFAULT_BATCH, max_length: int | None = None) -> None:
        check_type("model", model, Mixtral, "a model that load() gave")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None:
                check_integer(name, value, 1)
        limit = context_limit(model)
        if max_length is not None and max_length > limit:
            raise ContextLengthError(f"max_length is {max_length} tokens; the model's context holds {limit}")
        self.model, self.batch_size = model, batch_size
        self.max_length = max_length or limit
        self.encoder = Encoder(model.tokenizer)
        self.truncated = 0

    def loglikelihood(
        self, requests: Sequence[tuple[str, str]], done: Done = _ignore, known: Mapping[int, Answer] = NONE
    ) -> list[Answer]:
        """For each (context, continuation): the log-probability of the continuation, and whether it is the greedy one.

        Raises:
            InvalidRequestError, ContextLengthError: a continuation of no tokens, or of more than the context holds.
            CheckpointError: logits that are not finite.
        """
        check_callbacks(done=done)
        answers = dict(known)
        left = [index for index in range(len(requests)) if index not in known]
        pairs = [self.encoder.pair(*requests[index]) for index in left]
        self.truncated += sum(len(pair.context) + len(pair.continuation) > self.max_length + 1 for pair in pairs)

        def keep(number: int, answer: Answer) -> None:
            answers[left[number]] = answer
            done(left[number], answer)

        with self._wired():
            score_pairs(self.model, [truncated(pair, self.max_length) for pair in pairs], self.batch_size, keep)
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[str], done: Done = _ignore, known: Mapping[int, float] = NONE
    ) -> list[float]:
        """The log-probability of each whole text, read in windows of ``max_length`` tokens; the first token follows BOS.

        lm_eval's Hugging Face backend reads two BOS where a tokenizer adds one by itself (``add_bos_token=False`` has it
        right); here there is one.

        Raises:
            CheckpointError: logits that are not finite.
        """
        check_callbacks(done=done)
        totals = [known.get(index, 0.0) for index in range(len(requests))]
        pairs: list[Pair] = []
        owners: list[int] = []
        for index, text in enumerate(requests):
            if index not in known:
                windows = self.encoder.windows(text, self.max_length)
                pairs += windows
                owners += [index] * len(windows)
                if not windows:  # a text of no tokens
                    done(index, 0.0)
        left = Counter(owners)

        def keep(number: int, answer: Answer) -> None:
            index = owners[number]
            totals[index] += answer.logprob
            left[index] -= 1
            if not left[index]:
                done(index, totals[index])

        with self._wired():
            score_pairs(self.model, pairs, self.batch_size, keep)
        return totals

    def generate_until(
        self, requests: Sequence[tuple[str, Mapping[str, Any]]], done: Done = _ignore, known: Mapping[int, str] = NONE
    ) -> list[str]:
        """For each (context, settings of lm_eval) the text that follows, up to the first of its stop strings.

        Requests that are asked again are sampled again, each time with another seed, the same in every run.

        Raises:
            InvalidRequestError, ContextLengthError: settings that are not known or out of range.
        """
        check_callbacks(done=done)
        texts = [known.get(index, "") for index in range(len(requests))]
        seen: Counter[str] = Counter()
        alike: dict[tuple[str, int], list[int]] = {}
        for index, (context, given) in enumerate(requests):
            key = json.dumps(dict(given), sort_keys=True, default=str)
            repeat = seen[name := json.dumps([context, key])]
            seen[name] += 1
            if index not in known:
                alike.setdefault((key, repeat), []).append(index)
        for (_, repeat), members in alike.items():
            settings = GenerationSettings.of(requests[members[0]][1])
            room = self.max_length - settings.max_tokens
            if room < 1:
                raise ContextLengthError(
                    f"a task asks for up to {settings.max_tokens} tokens; the model's context holds {self.max_length}, and "
                    "the prompt needs some: load it with more --context, or leave the task out"
                )
            prompts = [self.encoder.prompt(requests[index][0]) for index in members]
            self.truncated += sum(len(prompt) > room for prompt in prompts)

            def keep(number: int, text: str, members: list[int] = members) -> None:
                texts[members[number]] = text
                done(members[number], text)

            self._generate([prompt[-room:] for prompt in prompts], settings, repeat, keep)
        return texts

    def _generate(
        self, prompts: list[list[int]], settings: GenerationSettings, seed: int, done: Callable[[int, str], None]
    ) -> None:
        eos = self.model.tokenizer.eos_token_id
        stops = [*settings.until, *([] if eos is None else [self.model.tokenizer.id_to_piece(eos)])]
        made: dict[int, list[int]] = {}
        chunks = self.model.stream_batch(
            prompts,
            max_rows=self.batch_size,
            max_tokens=settings.max_tokens,
            sampling=settings.sampling(seed),
            stop=stops,
        )
        # Closed before an error goes on: the model is busy until then.
        with contextlib.closing(chunks):
            for number, chunk in chunks:
                made.setdefault(number, []).append(chunk.token_id)
                if chunk.finish_reason is not None:
                    # As text by itself: a first token's space, which SentencePiece puts there, is not shown.
                    done(number, _cut(self.model.tokenizer.decode(made.pop(number)), stops))

    def _wired(self) -> Any:
        stream = mx.default_stream(mx.default_device())
        return wired(self.model.device, stream, self.model.residency.budget_bytes)


def _cut(text: str, stops: Sequence[str]) -> str:
    """What comes before the first stop string."""
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]

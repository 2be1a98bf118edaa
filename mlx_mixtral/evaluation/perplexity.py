"""``evaluate``: perplexity of a model on texts, and its distance to a reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import as_path, check_callbacks, check_type, checked
from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral.evaluation.corpus import Corpus, TextWindow, TokenProgress, check_window, encode_texts
from mlx_mixtral.evaluation.forward import Scored, TopTokens, context_limit, score
from mlx_mixtral.evaluation.journal import EvaluationJournal, pack, unpack
from mlx_mixtral.evaluation.reference import (
    DEFAULT_TOP_K,
    Reference,
    ReferenceHeader,
    ReferenceWriter,
    check_replaceable,
)
from mlx_mixtral.evaluation.results import Evaluation, Score, Tokens, WorstToken, length_buckets
from mlx_mixtral.evaluation.statistics import BLOCK_TOKENS, kl_divergence
from mlx_mixtral.evaluation.texts import Text
from mlx_mixtral.files import check_destination
from mlx_mixtral.machine.device import wired
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["evaluate"]

WORST_TOKENS = 10
CONTEXT_SHOWN = 24


@checked()
def evaluate(
    model: Mixtral,
    texts: Sequence[Text] | Corpus,
    *,
    window: int | None = None,
    stride: int | None = None,
    reference: str | Path | Reference | None = None,
    save_reference: str | Path | None = None,
    top_k: int = DEFAULT_TOP_K,
    worst: int = WORST_TOKENS,
    name: str = "",
    identity: str = "",
    journal: EvaluationJournal | None = None,
    progress: Callable[[TokenProgress], None] | None = None,
) -> Evaluation:
    """Perplexity, bits per byte and, with a reference, KL divergence: overall, by domain and by file.

    Each text is encoded once, with BOS, and read in windows that begin ``stride`` tokens apart; every token but BOS is
    predicted exactly once. Short windows are read several at a time. No other generation may run meanwhile.

    Args:
        texts: as ``read_texts`` gives them.
        window: tokens read at once; the context or 2048, whichever is less, when None.
        stride: the window, so that windows do not overlap, when None.
        reference: a file that ``save_reference`` wrote for another model on the same texts and windows.
        save_reference: where to write this model's own distributions.
        top_k: likeliest tokens of each distribution that ``save_reference`` keeps. KL to the file counts all others as one
            token, which makes it a lower bound, exact with the whole vocabulary.
        worst: how many of the tokens with the largest KL are shown.
        name, identity: what the file says it is of: a name to show, and what tells checkpoints apart.
        journal: where finished windows are kept, and found again.
        progress: called after every batch, from this thread.

    Raises:
        InvalidRequestError, ContextLengthError: an argument out of range, a text of fewer than two tokens, a reference of
            another vocabulary, text or windows.
        TokenizerError: a checkpoint without a tokenizer.
        CheckpointError: a file that is not a reference; logits that are not finite.
        DestinationError, DiskSpaceError: a file cannot be written.
    """
    check_type("model", model, Mixtral, "a model that load() gave")
    check_callbacks(progress=progress)
    check_type("worst", worst, int, "a number of tokens")
    corpus = texts if isinstance(texts, Corpus) else encode_texts(model.tokenizer, texts)
    size, step = check_window(window, stride, model.config.max_context_tokens, context_limit(model))
    vocab_size = model.config.vocab_size
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(as_path("reference", reference))
    if reference is not None:
        reference.header.check_text(corpus, vocab_size, size, step, reference.path)
    with ExitStack() as stack:
        writer = None
        if save_reference is not None:
            if reference is not None:
                raise InvalidRequestError("save_reference and reference cannot be given together; save one first")
            header = ReferenceHeader(
                name, identity, corpus.sha256, corpus.vocabulary, vocab_size, size, step, corpus.tokens, top_k
            )
            place = check_destination("the reference file", save_reference)
            check_replaceable(place)
            writer = stack.enter_context(ReferenceWriter(place, header))
        run = _Run(
            model, corpus, corpus.windows(size, step), reference, writer, journal or EvaluationJournal(), progress
        )
        started = time.perf_counter()
        try:
            read = run.go()
        except BaseException:
            if writer is not None and run.journal.path is None:
                writer.discard()
            raise
        seconds = time.perf_counter() - started
        if writer is not None:
            writer.finish()
    tokens = run.tokens()
    return Evaluation(
        Score.of(tokens, sum(passage.nbytes for passage in corpus.passages)),
        {domain: _score(corpus, tokens, numbers) for domain, numbers in corpus.domains.items()},
        {file: _score(corpus, tokens, numbers) for file, numbers in corpus.files.items()},
        length_buckets(tokens, size),
        size,
        step,
        seconds,
        read / seconds if read else 0.0,
        None if reference is None else reference.header.top_k,
        [] if reference is None else run.worst(tokens, max(0, worst)),
    )


class _Run:
    """One pass over the windows. ``logprobs``, ``best`` and ``kl`` fill as windows are done."""

    def __init__(
        self,
        model: Mixtral,
        corpus: Corpus,
        windows: list[TextWindow],
        reference: Reference | None,
        writer: ReferenceWriter | None,
        journal: EvaluationJournal,
        progress: Callable[[TokenProgress], None] | None,
    ) -> None:
        self.model, self.corpus, self.windows = model, corpus, windows
        self.reference, self.writer, self.journal, self.progress = reference, writer, journal, progress
        self.logprobs = np.full(corpus.tokens, np.nan, np.float32)
        self.best = np.zeros(corpus.tokens, np.int32)
        self.kl = None if reference is None else np.full(corpus.tokens, np.nan)
        self._offsets = corpus.offsets
        self._part = "reference" if writer is not None else "model"

    def go(self) -> int:
        """Run the windows that the journal does not have; how many tokens were read."""
        # What an earlier run wrote into the reference file may be gone, and its journal with it.
        known = self.writer is None or not self.writer.is_new
        left = [index for index in range(len(self.windows)) if not (known and self._recall(index))]
        done, read = len(self.logprobs) - sum(self.windows[index].tokens for index in left), 0
        stream = mx.default_stream(mx.default_device())
        with wired(self.model.device, stream, self.model.residency.budget_bytes):
            for batch in self._batches(left):
                self._show(done)
                self._do(batch)
                done += sum(self.windows[index].tokens for index in batch)
                read += sum(self.windows[index].length for index in batch)
        self._show(done)
        return read

    def _show(self, done: int) -> None:
        if self.progress is not None:
            self.progress(TokenProgress(done, len(self.logprobs)))

    def _batches(self, left: list[int]) -> Iterator[list[int]]:
        """Windows of one length and one stretch of context, as many as a chunk of a prompt has tokens."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for index in left:
            window = self.windows[index]
            shapes.setdefault((window.length, window.tokens), []).append(index)
        for (length, _), members in shapes.items():
            rows = max(1, self.model.engine.plan.chunk_tokens // length)
            for start in range(0, len(members), rows):
                yield members[start : start + rows]

    def _do(self, batch: list[int]) -> None:
        windows = [self.windows[index] for index in batch]
        ids = [self.corpus.passages[window.passage].ids for window in windows]
        rows = np.stack([own[window.start : window.stop] for own, window in zip(ids, windows, strict=True)])
        targets = np.stack([own[window.first : window.stop + 1] for own, window in zip(ids, windows, strict=True)])
        theirs: list[TopTokens] = []
        if self.reference is not None:
            theirs = [self.reference.kept(*self._places(window)) for window in windows]
        found = score(
            self.model,
            rows,
            targets,
            windows[0].length - windows[0].tokens,
            top_k=None if self.writer is None else self.writer.header.top_k,
            ids=np.stack([kept.ids for kept in theirs]) if theirs else None,
        )
        for number, (window, scored) in enumerate(zip(windows, found, strict=True)):
            self._keep(window, scored, theirs[number] if theirs else None)
        if self.writer is not None and self.journal.path is not None:
            self.writer.flush()
        self.journal.add(self._part, [(index, self._entry(self.windows[index])) for index in batch])

    def _keep(self, window: TextWindow, scored: Scored, theirs: TopTokens | None) -> None:
        places = slice(*self._places(window))
        self.logprobs[places], self.best[places] = scored.logprobs, scored.best
        if self.writer is not None:
            assert scored.kept is not None
            self.writer.write(places.start, scored.kept, scored.logprobs)
        if self.kl is not None:
            assert scored.kept is not None
            assert theirs is not None
            self.kl[places] = kl_divergence(theirs.logprobs, theirs.rest, scored.kept.logprobs, scored.kept.rest)

    def _entry(self, window: TextWindow) -> dict[str, str]:
        places = slice(*self._places(window))
        entry = {"logprobs": pack(self.logprobs[places]), "best": pack(self.best[places])}
        return entry if self.kl is None else entry | {"kl": pack(self.kl[places])}

    def _recall(self, index: int) -> bool:
        if (entry := self.journal.get(self._part, index)) is None:
            return False
        window = self.windows[index]
        places = slice(*self._places(window))
        self.logprobs[places] = unpack(entry.get("logprobs"), "<f4", window.tokens)
        self.best[places] = unpack(entry.get("best"), "<i4", window.tokens)
        if self.kl is not None:
            self.kl[places] = unpack(entry.get("kl"), "<f8", window.tokens)
        return True

    def _places(self, window: TextWindow) -> tuple[int, int]:
        offset = self._offsets[window.passage]
        return offset + window.first - 1, offset + window.stop

    def tokens(self) -> Tokens:
        """Everything by token, when all windows are done."""
        blocks: list[npt.NDArray[np.int64]] = []
        for passage in self.corpus.passages:
            start = int(blocks[-1][-1]) + 1 if blocks else 0
            blocks.append(start + np.arange(passage.tokens) // BLOCK_TOKENS)
        contexts, logprobs = self.corpus.contexts(self.windows), self.logprobs.astype(np.float64)
        if self.reference is None:
            return Tokens(logprobs, np.concatenate(blocks), contexts)
        if self.kl is None or not np.isfinite(self.kl).all():
            # A reference with probability where the model has none at all.
            raise CheckpointError("the KL divergence is not finite; a model's logits are too large for float32")
        return Tokens(
            logprobs,
            np.concatenate(blocks),
            contexts,
            self.kl,
            self.best == self.reference.best,
            self.reference.target.astype(np.float64),
        )

    def worst(self, tokens: Tokens, count: int) -> list[WorstToken]:
        """Those with the largest KL, largest first."""
        assert self.reference is not None
        assert tokens.kl is not None
        assert tokens.reference is not None
        tokenizer, theirs = self.model.tokenizer, self.reference.best
        found = []
        for place in np.argsort(-tokens.kl, kind="stable")[: min(count, np.count_nonzero(tokens.kl))].tolist():
            number = int(np.searchsorted(self._offsets, place, side="right")) - 1
            passage, at = self.corpus.passages[number], place - self._offsets[number] + 1

            def show(ids: npt.NDArray[np.int32]) -> str:
                return tokenizer.decode(ids.tolist(), continues=True)

            found.append(
                WorstToken(
                    passage.text.name,
                    at,
                    float(tokens.kl[place]),
                    show(passage.ids[max(0, at - CONTEXT_SHOWN) : at]),
                    show(passage.ids[at : at + 1]),
                    float(tokens.logprobs[place]),
                    float(tokens.reference[place]),
                    show(self.best[place : place + 1]),
                    show(theirs[place : place + 1]),
                )
            )
        return found


def _score(corpus: Corpus, tokens: Tokens, numbers: list[int]) -> Score:
    offsets = corpus.offsets
    places = np.concatenate([np.arange(offsets[number], offsets[number + 1]) for number in numbers])
    return Score.of(tokens[places], sum(corpus.passages[number].nbytes for number in numbers))

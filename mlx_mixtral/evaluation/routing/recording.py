"""Texts through a model while its routers are watched: hidden states only, no logits, a chunk in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import check_callbacks, check_integer, check_type
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.corpus import Corpus, TokenProgress, check_window, encode_texts
from mlx_mixtral.evaluation.forward import context_limit, hidden_states
from mlx_mixtral.evaluation.routing.record import RoutingRecord
from mlx_mixtral.evaluation.texts import Text
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.machine.device import wired
from mlx_mixtral.model.routing import Routed, RoutingObserver
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["Stretch", "record_texts", "stretches"]

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Stretch:
    """Tokens that are read at once: ``ids`` after ``before`` (BOS), which is read too and not recorded.

    ``continues`` says that they are not the beginning of their text.
    """

    domain: str
    before: tuple[int, ...]
    ids: Ids
    continues: bool = False


def stretches(corpus: Corpus, before: Sequence[int], window: int, max_tokens: int | None) -> list[Stretch]:
    """Texts cut into windows of at most ``window`` tokens, BOS included, each read by itself.

    Args:
        before: what a tokenizer puts in front of every text: BOS, or nothing.
        max_tokens: of each domain, from its beginning; all when None.

    Raises:
        InvalidRequestError, ContextLengthError: a window that has no room, or a limit out of range.
    """
    if max_tokens is not None:
        check_integer("max_tokens", max_tokens, 2, wanted="a number of tokens, at least 2")
    if (room := window - len(before)) < 2:
        raise InvalidRequestError(f"window is {window}; it must hold at least {2 + len(before)} tokens")
    found, taken = [], dict.fromkeys(corpus.domains, 0)
    for passage in corpus.passages:
        domain = passage.text.domain
        ids = passage.ids[len(before) :]
        if max_tokens is not None:
            ids = ids[: max_tokens - taken[domain]]
        taken[domain] += len(ids)
        found += [
            Stretch(domain, tuple(before), ids[start : start + room], start > 0) for start in range(0, len(ids), room)
        ]
    return found


def record_texts(
    model: Mixtral,
    texts: Sequence[Text] | Corpus,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    keep_text: bool = True,
    name: str = "",
    progress: Callable[[TokenProgress], None] | None = None,
) -> RoutingRecord:
    """What the routers choose for texts, by domain, with the gate's entropy. Streamed experts give the same.

    Each text is encoded once and cut into windows, each of which is read after BOS; BOS itself is not recorded. No other
    generation may run meanwhile.

    Args:
        texts: as ``read_texts`` gives them.
        window: tokens read at once, BOS included; the context or 2048, whichever is less, when None.
        max_tokens: of each domain, from its beginning; all when None.
        keep_text: keep each token's text, for coloured text; it is saved with the record.
        name: of the model, for reports.
        progress: called after every window, from this thread.

    Raises:
        InvalidRequestError, ContextLengthError: an argument out of range, a text of fewer than two tokens, a dense model.
        TokenizerError: a checkpoint without a tokenizer.
        CheckpointError: gate logits that are not finite.
    """
    check_type("model", model, Mixtral, "a model that load() gave")
    check_callbacks(progress=progress)
    corpus = texts if isinstance(texts, Corpus) else encode_texts(model.tokenizer, texts)
    size, _ = check_window(window, None, model.config.max_context_tokens, context_limit(model))
    parts = stretches(corpus, model.tokenizer.encode(""), size, max_tokens)
    total, done = sum(len(part.ids) for part in parts), 0
    experts, entropy = [], []
    stream = mx.default_stream(mx.default_device())
    with (
        RoutingObserver(model.module) as observer,
        wired(model.device, stream, model.residency.budget_bytes),
    ):
        for part in parts:
            for routed in _read(model, part, observer):
                experts.append(routed.experts)
                entropy.append(routed.entropy.astype(np.float16))
            done += len(part.ids)
            if progress is not None:
                progress(TokenProgress(done, total))
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])[:-1]
    domains = tuple(corpus.domains)
    return RoutingRecord(
        RoutingTrace(np.concatenate(experts), model.config.num_local_experts, tuple(starts.tolist())),
        domains,
        np.array([domains.index(part.domain) for part in parts], np.int64),
        np.concatenate(entropy),
        tuple(token_texts(model.tokenizer, parts)) if keep_text else None,
        name,
    )


def _read(model: Mixtral, part: Stretch, observer: RoutingObserver) -> Iterator[Routed]:
    ids = np.array([[*part.before, *part.ids.tolist()]], np.int32)
    for start, _ in hidden_states(model, ids):
        routed, unwanted = observer.take(), max(0, len(part.before) - start)
        yield Routed(routed.experts[unwanted:], routed.entropy[unwanted:])


def token_texts(tokenizer: Tokenizer, parts: Sequence[Stretch]) -> Iterator[str]:
    """Each token's text as decoding one after another shows it: a character of several tokens comes with its last."""
    for part in parts:
        decoder = tokenizer.streaming_decoder(continues=part.continues)
        for token in part.ids.tolist():
            yield decoder.add(token)

"""``calibrate``: a text through a checkpoint, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mlx_mixtral import __version__
from mlx_mixtral.arguments import as_path, check_callbacks, check_type, checked
from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.hub import Source
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral_convert.calibration.file import Calibration, identity
from mlx_mixtral_convert.calibration.layer import read_matrix, read_norm
from mlx_mixtral_convert.calibration.measurements import Measurements
from mlx_mixtral_convert.calibration.place import check_place
from mlx_mixtral_convert.calibration.progress import CalibrationProgress, WorkCounter, trial_seconds
from mlx_mixtral_convert.calibration.text import (
    MIN_SEQUENCES,
    SEQUENCE_TOKENS,
    default_texts,
    read_texts,
    sequences,
)
from mlx_mixtral_convert.calibration.unfinished import Unfinished, digest_of, journal_of
from mlx_mixtral_convert.calibration.written import kept_text, text_of, written_sequences
from mlx_mixtral_convert.sources import TensorSource, open_source

__all__ = ["calibrate"]

DEFAULT_TOKENS = 16384
# Sensitivities are measured on fewer tokens, which travel 4 times a layer: a wide model's 1024, a narrow one's up to 4096, as
# long as their states are no more than those of 8x7B. With four sequences it is chance which layer seems to need few bits.
SENSITIVITY_TOKENS = 4096
LEAST_SENSITIVITY_TOKENS = 1024
STATE_NUMBERS = 2**22
MIN_TOKENS = MIN_SEQUENCES * SEQUENCE_TOKENS


@checked()
def calibrate(
    source: str | Path,
    texts: Sequence[str | Path] = (),
    *,
    tokens: int = DEFAULT_TOKENS,
    written: str | Path | None = None,
    sensitivities: bool = False,
    trace: RoutingTrace | str | Path | None = None,
    save: str | Path | None = None,
    restart: bool = False,
    revision: str | None = None,
    progress: Callable[[CalibrationProgress], None] | None = None,
) -> Calibration:
    """Measure the inputs of every matrix of a checkpoint on a text, and if asked what each packing of each group would cost.

    Memory: one layer's attention and one expert in float32; a model of 93 GB is calibrated on a machine with 16 GB. Hidden
    states are on the disk, beside ``save`` if that is given: 0.5 GB for 16,384 tokens of 8x7B, 4.2 GB more for sensitivities.

    Example:
        calibrate("mixtral", ["wiki.txt"], sensitivities=True, save="mixtral.calibration")
        convert("mixtral", "mixtral-20gb", calibration="mixtral.calibration", fit="20GB")

    Args:
        source: a folder or hub repository, as for ``convert``.
        texts: UTF-8 text files; a bundled text in several languages and code when empty.
        tokens: how many tokens at most; 1024 at least.
        written: a model, the source itself or a conversion of it, that writes ``tokens`` tokens to be measured on, in place of
            ``texts``: from nothing, at temperature 1. It has to fit in memory, or is slow. What learns from text, as ``tuned``
            rounding, wants more of it than is bundled.
        sensitivities: measure the cost of packings too, which ``convert(fit=)`` needs and nothing else: every matrix is packed
            in thirteen ways, which takes many times as long as all the rest.
        trace: what ``mlx-mixtral routing --save-trace`` recorded of this model, or a conversion of it, on text like that it is
            wanted for, or its file. Sensitivities then weigh each expert's error by how often it was chosen there, so that
            fitting a size spends fewer bits on layers whose errors are those of experts that are rarely chosen.
        save: a file to save the calibration to. While it is measured, finished layers are kept beside it under its name and
            ``.journal``: after an interruption the same call goes on from there, with the same result to the bit.
        restart: forget what an interrupted calibration left.
        progress: told each step, from this thread; the first time before anything is measured.

    Raises:
        InvalidRequestError: a text that cannot be read, is empty or too short; too few ``tokens``; a trace without
            sensitivities, or of a model of another shape.
        NonFiniteWeightsError: NaN or infinity in the source.
        CheckpointError: a file that is no routing trace.
        DestinationError: ``save`` cannot be written, or the journal beside it is of another calibration.
        DiskSpaceError: the disk is full.
        CheckpointError, ConfigError, HubError, TokenizerError: as ``convert`` and loading a tokenizer.
    """
    named = Source.parse(source, revision)
    check_type("tokens", tokens, int, "a number of tokens")
    check_type("texts", texts, (list, tuple), "a list of text files")
    check_callbacks(progress=progress)
    if tokens < MIN_TOKENS:
        raise InvalidRequestError(
            f"{tokens} tokens are too few to calibrate on; give at least {MIN_TOKENS}, {MIN_SEQUENCES} sequences of "
            f"{SEQUENCE_TOKENS}"
        )
    check_type("trace", trace, (RoutingTrace, str, Path, type(None)), "a RoutingTrace, its file, or None")
    if trace is not None and not sensitivities:
        raise InvalidRequestError(
            "a trace only affects sensitivities, which are not measured; measure them, or leave it out"
        )
    if written is not None and texts:
        raise InvalidRequestError("give texts, or let a model write them with written, not both")
    place = None if save is None else check_place(save, source)
    recorded = RoutingTrace.load(as_path("trace", trace)) if isinstance(trace, (str, Path)) else trace
    folder = named.resolve()
    given = read_texts([as_path("a text", path) for path in texts]) if texts else default_texts()
    journal = None if place is None else journal_of(place)
    with open_source(folder) as tensors:
        config = tensors.config
        if recorded is not None:
            _check_trace(recorded, config)
        tokenizer = load_tokenizer(tensors.folder, vocab_size=config.vocab_size)
        if written is None:
            ids = sequences(tokenizer, given, tokens, config.max_context_tokens)
        else:
            bos, *_ = tokenizer.encode("a")
            if restart and journal is not None:
                text_of(journal).unlink(missing_ok=True)
            ids = kept_text(
                None if journal is None else text_of(journal),
                {"writer": str(written), "tokens": tokens, "source": identity(tensors)},
                lambda: written_sequences(written, tokens, bos, config.vocab_size, config.max_context_tokens),
            )
        _check_ends(tensors)
        counts = None if recorded is None else recorded.counts
        most = min(SENSITIVITY_TOKENS, max(LEAST_SENSITIVITY_TOKENS, STATE_NUMBERS // config.hidden_size))
        few = max(1, min(len(ids), most // ids.shape[1]))
        picked = ids[np.linspace(0, len(ids) - 1, few).round().astype(int)] if sensitivities else None
        known = identity(tensors)
        told = {
            "checkpoint": [known, tensors.files.describe()],
            "text": digest_of(ids),
            "sensitivities": None if picked is None else digest_of(picked),
            "trace": None if counts is None else digest_of(counts),
            "converter": __version__,
        }
        measured = (ids.size, 0 if picked is None else picked.size)
        seconds = trial_seconds(tensors, sensitivities=sensitivities)
        with Unfinished(journal, told, restart=restart) as unfinished:
            work = WorkCounter(config, measured, seconds, progress)
            states_in = None if place is None else place.parent
            found = Measurements(tensors, ids, picked, counts, work, states_in).run(unfinished)
            result = Calibration(known, ids, found.mean_squares, found.routed, found.losses, found.anchors)
            if place is not None:
                result.save(place)
                unfinished.remove()
                if journal is not None:
                    text_of(journal).unlink(missing_ok=True)
        return result


def _check_trace(trace: RoutingTrace, config: MixtralConfig) -> None:
    if config.is_dense:
        raise InvalidRequestError("the model is dense: it has no experts for a trace to weigh; leave the trace out")
    _, layers, per_token = trace.experts.shape
    own = (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok)
    if (layers, trace.num_experts, per_token) != own:
        raise InvalidRequestError(
            f"the trace is of {layers} layers with {per_token} of {trace.num_experts} experts per token, the "
            f"model has {own[0]} "
            f"with {own[2]} of {own[1]}; record one of this model with mlx-mixtral routing --save-trace"
        )


def _check_ends(source: TensorSource) -> None:
    """Refuse NaN now in what is used after the last layer; without sensitivities the head is not read again at all."""
    read_matrix(source, list(matrices(source.config))[0 if source.config.tie_word_embeddings else -1])
    read_norm(source, list(norms(source.config))[-1])

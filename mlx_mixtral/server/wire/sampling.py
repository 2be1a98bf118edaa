"""Fields that every generating endpoint has: how tokens are chosen, where the text ends, how it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_mixtral.errors import MixtralError
from mlx_mixtral.generation.sampling_params import SamplingParams
from mlx_mixtral.server.options import MAX_CHOICES
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.kinds import Anything, Either, Flag, Integer, ListOf, MapOf, Number, String
from mlx_mixtral.server.wire.reply import UsageSoFar
from mlx_mixtral.server.wire.unsupported import PENALTY_WINDOWS, check_windows

__all__ = [
    "CHOOSING_FIELDS", "COMMON_FIELDS", "MAX_STOPS", "MAX_TOP_LOGPROBS", "SAMPLING_FIELDS", "STREAM_FIELDS", "check_stream",
    "sampling_params", "seed_of_row", "stops", "usage_so_far",
]  # fmt: skip

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_BIASES = 1024
SEED_BITS = 64

CHOOSING_FIELDS = (
    BodyField(
        "temperature", Number(0, 2), "Divides the logits; 0 takes the likeliest token. Left out: 0.7 in chats, else 1."
    ),
    BodyField(
        "top_p",
        Number(above=0, most=1),
        "Sample from the likeliest tokens that add up to it. Left out: 0.95 in chats, else 1.",
    ),
    BodyField("top_k", Integer(-1), "Sample from the K likeliest tokens; 0 and -1 are no limit.", 0),
    BodyField("min_p", Number(0, 1), "Drop tokens less likely than this fraction of the likeliest.", 0.0),
    BodyField("xtc_probability", Number(0, 1), "XTC: how often the likeliest tokens are left out.", 0.0),
    BodyField("xtc_threshold", Number(0, 0.5), "XTC: of those likelier than this, all but the last are left out.", 0.1),
    BodyField("repetition_penalty", Number(above=0, most=100), "Divides the logits of earlier tokens; 1 is off.", 1.0),
    BodyField("presence_penalty", Number(-2, 2), "Lowers the logits of tokens that were generated.", 0.0),
    BodyField("frequency_penalty", Number(-2, 2), "The same for each time a token was generated.", 0.0),
    *PENALTY_WINDOWS,
    BodyField(
        "logit_bias", MapOf(Number(-100, 100), MAX_BIASES), "Added to the logits of token ids, which are the keys."
    ),
    BodyField(
        "seed",
        Integer(-(2 ** (SEED_BITS - 1)), 2**SEED_BITS - 1),
        "The same seed and request give the same text, whatever runs beside it.",
    ),
)
"""How a token is chosen."""

SAMPLING_FIELDS = (
    *CHOOSING_FIELDS,
    BodyField(
        "stop",
        Either((String(1), ListOf(String(1), most=MAX_STOPS))),
        "Text that ends the answer and is not part of it.",
        [],
    ),
    BodyField(
        "stop_token_ids", ListOf(Integer(0), most=MAX_STOPS), "Token ids that end it, beside the model's own.", []
    ),
    BodyField("n", Integer(1, MAX_CHOICES), "How many answers; the prompt is computed once.", 1),
)

STREAM_FIELDS = (
    BodyField("stream", Flag(), "Send the answer as it is generated, as server-sent events.", False),
    BodyField(
        "stream_options",
        BodyTable((
            BodyField("include_usage", Flag(), "A last event with the counts of tokens, before [DONE].", False),
            BodyField("continuous_usage_stats", Flag(), "And the counts so far in each event; needs include_usage.", False),
            BodyField("include_obfuscation", Flag(), "Ignored: nothing is padded.", False),
        )),
        "Only with stream.",
    ),
)  # fmt: skip

COMMON_FIELDS = (
    BodyField("model", String(), "Its name or an alias; the model there is when it is left out."),
    BodyField("user", String(), "Ignored."),
    BodyField("metadata", Anything(), "Ignored."),
    BodyField("store", None, "Nothing is stored.", off=(False,), instead="nothing is stored: leave it out"),
    BodyField("min_tokens", None, "Answers of a least length.", off=(0,)),
    BodyField("ignore_eos", None, "Answers past their end.", off=(False,)),
    BodyField("use_beam_search", None, "Beam search.", off=(False,), instead="use n for several answers"),
)


def sampling_params(
    body: Mapping[str, Any], row: int, *, temperature: float, top_p: float, logprobs: int | None
) -> SamplingParams:
    """What a body with ``CHOOSING_FIELDS`` asks of its answer number ``row``.

    Args:
        temperature, top_p: when the body says nothing.
        logprobs: likeliest tokens that are wanted beside each; None for no log-probabilities.

    Raises:
        ApiError: 400, with the field.
    """
    check_windows(body)
    biases: dict[int, float] = {}
    for key, bias in (body["logit_bias"] or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise ApiError.field("logit_bias", f"has the key {key[:40]!r}; keys are token ids")
        biases[int(key)] = bias
    try:
        return SamplingParams(
            temperature=temperature if body["temperature"] is None else body["temperature"],
            top_p=top_p if body["top_p"] is None else body["top_p"],
            top_k=max(0, body["top_k"]),
            min_p=body["min_p"],
            xtc_probability=body["xtc_probability"],
            xtc_threshold=body["xtc_threshold"],
            repetition_penalty=body["repetition_penalty"],
            presence_penalty=body["presence_penalty"],
            frequency_penalty=body["frequency_penalty"],
            logit_bias=biases or None,
            seed=seed_of_row(body["seed"], row),
            logprobs=logprobs,
        )
    except MixtralError as error:
        name = str(error).partition(" ")[0]
        raise ApiError(400, str(error), name if name in body else None, code="invalid_value") from None


def seed_of_row(seed: int | None, row: int) -> int | None:
    """The seed of one of several answers: the first has the request's own, each the next one, as ``Mixtral.batch`` has it."""
    return None if seed is None else seed + row


def stops(body: Mapping[str, Any]) -> list[str]:
    """The texts of ``stop``."""
    given = body["stop"]
    return [given] if isinstance(given, str) else list(given)


def check_stream(body: Mapping[str, Any]) -> None:
    """That ``stream_options`` come with ``stream``, and make sense. Raises ApiError 400."""
    options = body["stream_options"] or {}
    if body["stream_options"] is not None and not body["stream"]:
        raise ApiError.field("stream_options", "is for streams; give stream: true, or leave it out")
    if options.get("continuous_usage_stats") and not options.get("include_usage"):
        raise ApiError.field("stream_options.continuous_usage_stats", "needs include_usage: true")


def usage_so_far(body: Mapping[str, Any], prompt_tokens: int) -> UsageSoFar:
    """What the chunks of a stream say of usage, as ``stream_options`` has it.

    Args:
        prompt_tokens: of all prompts.
    """
    options = (body["stream_options"] or {}) if body["stream"] else {}
    return UsageSoFar(
        prompt_tokens,
        is_told=options.get("include_usage", False),
        is_continuous=options.get("continuous_usage_stats", False),
    )

"""Fields of vLLM's, llama.cpp's and mlx-lm's servers that would change an answer and are not kept here: refused by name.

What they send by default asks for nothing and passes. Fields that change no answer, such as ``priority``, ``cache_prompt`` or
``service_tier``, are among the unknown ones, which are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.fields import BodyField
from mlx_mixtral.server.wire.kinds import Integer

__all__ = [
    "NOT_IN_CHATS", "NOT_IN_GENERATING", "NOT_IN_READING", "NOT_IN_STRUCTURES", "NOT_IN_TEMPLATES", "PENALTY_WINDOWS",
    "check_windows",
]  # fmt: skip

NOT_IN_READING = (
    BodyField(
        "truncate_prompt_tokens", None, "Cutting a long prompt.", off=(-1,), instead="shorten the prompt yourself"
    ),
)
"""Wherever text is read."""

NOT_IN_TEMPLATES = (
    BodyField("chat_template", None, "Another template.", instead="start the server with --chat-template"),
    BodyField(
        "chat_template_kwargs",
        None,
        "Variables of the template.",
        off=({}, {"enable_thinking": False}, {"thinking": False}),
        instead="the chat format has none: leave it out",
    ),
)
"""Wherever a conversation is written in the chat format."""

NOT_IN_GENERATING = (
    *NOT_IN_READING,
    # vLLM's
    BodyField(
        "prompt_logprobs",
        None,
        "Log-probabilities of the prompt.",
        instead="/v1/completions gives them with echo: true and logprobs",
    ),
    BodyField(
        "allowed_token_ids", None, "The only tokens there are.", instead="give guided_choice or guided_regex, or logit_bias"
    ),
    BodyField("bad_words", None, "Words that never come.", off=([],), instead="give logit_bias"),
    BodyField("logits_processors", None, "Code that changes logits.", off=([],), instead="give logit_bias"),
    BodyField(
        "skip_special_tokens",
        None,
        "Control tokens as text.",
        off=(True,),
        instead="answers never show control tokens: leave it out",
    ),
    BodyField(
        "include_stop_str_in_output",
        None,
        "The text of stop in the answer.",
        off=(False,),
        instead="answers end before it: leave it out",
    ),
    BodyField("return_token_ids", None, "Token ids in the reply.", off=(False,), instead="/tokenize has them"),
    BodyField(
        "return_tokens_as_token_ids",
        None,
        "Ids in place of texts in logprobs.",
        off=(False,),
        instead="logprobs have each token's bytes: leave it out",
    ),
    BodyField(
        "guided_whitespace_pattern",
        None,
        "White space in JSON.",
        instead="give a guided_regex or guided_grammar that says it",
    ),
    # llama.cpp's
    BodyField("n_predict", None, "Most tokens of an answer.", off=(-1,), instead="give max_tokens"),
    BodyField("repeat_penalty", None, "The penalty of repetition.", off=(1,), instead="give repetition_penalty"),
    BodyField("n_probs", None, "Likeliest tokens of each place.", off=(0,), instead="give logprobs"),
    BodyField("post_sampling_probs", None, "Probabilities after sampling.", off=(False,), instead="give logprobs"),
    BodyField("return_tokens", None, "Token ids in the reply.", off=(False,), instead="/tokenize has them"),
    BodyField("typical_p", None, "Locally typical sampling.", off=(1,), instead="give top_p or min_p"),
    BodyField("top_n_sigma", None, "Sampling within n sigma.", off=(-1, 0), instead="give top_p or min_p"),
    BodyField("mirostat", None, "Mirostat sampling.", off=(0,), instead="give top_p or min_p"),
    BodyField("dynatemp_range", None, "Dynamic temperature.", off=(0,), instead="give temperature"),
    BodyField("dry_multiplier", None, "DRY.", off=(0,), instead="give frequency_penalty or repetition_penalty"),
    BodyField("samplers", None, "The order of samplers.", instead="the order is fixed: leave it out"),
    BodyField("n_indent", None, "Least indentation.", off=(0,)),
    BodyField("t_max_predict_ms", None, "Most time of an answer.", off=(-1, 0), instead="give max_tokens"),
    BodyField("lora", None, "Adapters.", off=([],), instead="a request loads nothing: name one of /v1/models as model"),
    # mlx-lm's
    BodyField("adapters", None, "Adapters.", instead="a request loads nothing: name one of /v1/models as model"),
    BodyField("role_mapping", None, "Other names of roles.", instead="start the server with --chat-template"),
)  # fmt: skip
"""Wherever text is generated."""

NOT_IN_CHATS = (
    *NOT_IN_TEMPLATES,
    BodyField("echo", None, "The last message before the answer.", off=(False,), instead="put it there yourself"),
    BodyField("add_special_tokens", None, "A further BOS.", off=(False,), instead="the chat format has its own: leave it out"),
    BodyField("documents", None, "Texts for retrieval.", off=([],), instead="put them into a message"),
    BodyField("best_of", None, "Choosing among several.", off=(1,), instead="use n for several answers, and choose yourself"),
)  # fmt: skip

_SAID_BY_GRAMMAR = "give a regex or a grammar that says it"
NOT_IN_STRUCTURES = (
    BodyField("structural_tag", None, "Structures between tags.", instead="give tools, or a grammar"),
    BodyField("whitespace_pattern", None, "White space in JSON.", instead=_SAID_BY_GRAMMAR),
    BodyField("disable_any_whitespace", None, "JSON without white space.", off=(False,), instead=_SAID_BY_GRAMMAR),
    BodyField(
        "disable_additional_properties",
        None,
        "Objects without further properties.",
        off=(False,),
        instead='write "additionalProperties": false into the schema',
    ),
)
"""Of ``structured_outputs``."""

_WINDOWS = {
    "repetition_context_size": ("repetition_penalty", 1),
    "repeat_last_n": ("repetition_penalty", 1),
    "presence_context_size": ("presence_penalty", 0),
    "frequency_context_size": ("frequency_penalty", 0),
}
PENALTY_WINDOWS = tuple(
    BodyField(name, Integer(-1), f"Refused beside {penalty}, which looks at all tokens, unless it is -1.")
    for name, (penalty, _) in _WINDOWS.items()
)
"""mlx-lm's and llama.cpp's: the last tokens that a penalty looks at."""


def check_windows(body: Mapping[str, Any]) -> None:
    """That no penalty is to look at a part of the tokens. Raises ApiError 400."""
    for name, (penalty, off) in _WINDOWS.items():
        if body.get(name, -1) not in (None, -1) and body[penalty] != off:
            raise ApiError(
                400,
                f"{name} is not supported here beside {penalty}, which looks at all tokens; leave one of them out",
                name,
                code="unsupported_parameter",
            )

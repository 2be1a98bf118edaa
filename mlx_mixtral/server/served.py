"""What the HTTP side knows of the model: plain facts and the tokenizer, whether the weights are loaded or not."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_mixtral import __version__
from mlx_mixtral.errors import MixtralError
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["ServedModel"]


@dataclass(frozen=True)
class ServedModel:
    """One model under its names, and its adapters under theirs.

    Args:
        context_tokens: tokens that prompt and answer may have together.
        created: seconds since 1970: when it was loaded.
        adapters: what requests call it when it is to compute with one of them; none is one of the other names.
    """

    name: str
    aliases: tuple[str, ...]
    tokenizer: Tokenizer
    vocab_size: int
    context_tokens: int
    eos_token_ids: frozenset[int]
    created: int
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Mixtral, name: str, aliases: Sequence[str]) -> ServedModel:
        """The facts of a loaded model.

        Raises:
            TokenizerError: it has no tokenizer.
        """
        engine = model.engine
        return cls(
            name,
            tuple(aliases),
            model.tokenizer,
            engine.vocab_size,
            engine.context_limit,
            frozenset(engine.config.eos_token_ids) | model.tokenizer.eos_token_ids,
            int(time.time()),
            tuple(model.adapters),
        )

    @property
    def fingerprint(self) -> str:
        """What computes: replies with the same one and a seed are the same."""
        return f"mlx-mixtral-{__version__}"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def check_name(self, given: str | None) -> str:
        """The model's or an adapter's name as a request has it; "" and none stand for the model.

        Raises:
            ApiError: 404.
        """
        if not given:
            return self.name
        if given in (there := (*self.names, *self.adapters)):
            return given
        raise ApiError(
            404,
            f"model {given[:100]!r} is not here; this server has {' and '.join(there)}",
            "model",
            code="model_not_found",
        )

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a name which ``check_name`` gave stands for; None for the model itself."""
        return name if name in self.adapters else None

    def check_ids(self, ids: Sequence[int], param: str) -> list[int]:
        """``ids``, all of them in the vocabulary.

        Raises:
            ApiError: 400.
        """
        for index, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise ApiError.field(
                    f"{param}[{index}]", f"is token id {token}; ids go from 0 to {self.vocab_size - 1}"
                )
        return list(ids)

    def check_biases(self, biases: Mapping[int, float] | None) -> None:
        """That ``logit_bias`` names tokens of the vocabulary. Raises ApiError 400."""
        for token in biases or ():
            if token >= self.vocab_size:
                raise ApiError.field(f"logit_bias.{token}", f"is beyond the last token id, {self.vocab_size - 1}")

    def check_room(self, prompt_tokens: int, param: str) -> int:
        """Tokens that can be generated after a prompt.

        Raises:
            ApiError: 400: the prompt is empty, or leaves no room.
        """
        if not prompt_tokens:
            raise ApiError.field(param, "is empty; give some text")
        if prompt_tokens >= self.context_tokens:
            raise ApiError(
                400,
                f"{param} has {prompt_tokens} tokens; the context holds {self.context_tokens}, and one must be left to "
                "generate: shorten it",
                param,
                code="context_length_exceeded",
            )
        return self.context_tokens - prompt_tokens

    def check_length(self, prompt_tokens: int, param: str) -> None:
        """That a text which is only read fits into the context. Raises ApiError 400."""
        if prompt_tokens > self.context_tokens:
            raise ApiError(
                400,
                f"{param} has {prompt_tokens} tokens; the context holds {self.context_tokens}: shorten it",
                param,
                code="context_length_exceeded",
            )

    def encode(self, text: str, param: str, *, special: bool, bos: bool = True) -> list[int]:
        """Token ids of a text. Raises ApiError 400."""
        try:
            return self.tokenizer.encode(text, bos=bos, special=special)
        except MixtralError as error:
            raise ApiError(400, f"{param}: {error}", param) from None

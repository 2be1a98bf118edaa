"""What a task of lm_eval says of generating: its names, aliases and defaults, as its Hugging Face backend reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.arguments import is_number
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.generation.sampling import SamplingParams

__all__ = ["GenerationSettings"]

DEFAULT_TOKENS = 256
TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")
WITHOUT_EFFECT = {"num_beams": 1, "use_cache": True}
"""Settings of transformers that may be given with these values."""


@dataclass(frozen=True)
class GenerationSettings:
    """Stop strings, most tokens, and how tokens are chosen: greedily at temperature 0."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    others: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationSettings:
        """From ``generation_kwargs``.

        Raises:
            InvalidRequestError: a setting that is not known, or has no effect here.
        """
        left = {name: value for name, value in given.items() if value is not None}
        until = left.pop("until", [])
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
            raise InvalidRequestError(
                f"generation_kwargs of a task: until is {until!r}; it must be text, or a list of texts"
            )
        limits = [left.pop(name) for name in TOKENS if name in left]
        samples = left.pop("do_sample", None)
        # Sampling without a temperature is at 1, as in transformers; a temperature without sampling says that it is meant.
        temperature = _number("temperature", left.pop("temperature", 1.0 if samples else 0.0))
        others = {name: _number(name, left.pop(name)) for name in SAMPLING if name in left}
        for name, value in left.items():
            if name not in WITHOUT_EFFECT or WITHOUT_EFFECT[name] != value:
                raise InvalidRequestError(
                    f"generation_kwargs of a task: {name} is {value!r}, which is not supported; supported are "
                    f"until, do_sample, temperature, {', '.join(SAMPLING)} and {TOKENS[0]}"
                )
        most = int(_number(TOKENS[0], limits[0] if limits else DEFAULT_TOKENS))
        if most < 1:
            raise InvalidRequestError(f"generation_kwargs of a task: {TOKENS[0]} is {most}; it must be at least 1")
        stops = tuple(stop for stop in until if stop)
        return cls(stops, most, 0.0 if samples is False else temperature, others)

    def sampling(self, seed: int) -> SamplingParams:
        """How tokens are chosen.

        Raises:
            InvalidRequestError: a setting out of its range.
        """
        others = dict(self.others)
        if "top_k" in others:
            others["top_k"] = int(others["top_k"])
        if self.temperature == 0:
            others = {name: value for name, value in others.items() if name == "repetition_penalty"}
        return SamplingParams(temperature=self.temperature, seed=seed, **others)


def _number(name: str, value: Any) -> float:
    if not is_number(value):
        raise InvalidRequestError(f"generation_kwargs of a task: {name} is {value!r}; it must be a number")
    return float(value)

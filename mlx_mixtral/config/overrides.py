"""What a model is run with in place of what its ``config.json`` says: experts per token, rope scaling, rope base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_mixtral.arguments import check_integer, check_type, is_integer, is_number, shown
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.rope import EXTENDING_KINDS, MAX_FACTOR, RopeConfig
from mlx_mixtral.errors import ConfigError, InvalidRequestError

__all__ = ["ConfigOverrides", "settings_of"]


@dataclass(frozen=True)
class ConfigOverrides:
    """Settings of one run; nothing of a checkpoint is written. None leaves what the file says.

    Args:
        experts_per_token: K, from 1 to the model's number of experts.
        rope_scaling: ``KIND=FACTOR`` with the kind yarn, linear or dynamic, which stretches the context the model was
            pretrained with by the factor; or a mapping in place of the file's ``rope_scaling``, which may be any kind.
        rope_theta: base of the rotary embedding.

    Raises:
        InvalidRequestError: of another type, or out of range.
    """

    experts_per_token: int | None = None
    rope_scaling: str | Mapping[str, Any] | None = None
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        if self.experts_per_token is not None:
            check_integer("experts_per_token", self.experts_per_token, 1)
        wanted = "text such as yarn=4, or a mapping as in config.json"
        check_type("rope_scaling", self.rope_scaling, (str, Mapping, type(None)), wanted)
        if isinstance(self.rope_scaling, str):
            _kind_and_factor(self.rope_scaling)
        if self.rope_theta is not None and (not is_number(self.rope_theta) or not 1 < self.rope_theta < 1e30):
            raise InvalidRequestError(
                f"rope_theta is {shown(self.rope_theta)}; it must be a number above 1, such as 1000000"
            )

    def apply(self, config: MixtralConfig, context: int | None = None) -> MixtralConfig:
        """The configuration to run.

        Args:
            context: tokens wanted. Where the base is given and no scaling is, the context is as long as is wanted: a base does
                not tell how far it reaches.

        Raises:
            InvalidRequestError: more experts per token than there are, or scaling that is not to be computed.
        """
        if (chosen := self.experts_per_token) is not None:
            if config.is_dense and chosen != 1:
                raise InvalidRequestError(f"experts_per_token is {shown(chosen)}; this model is dense: leave it out")
            if chosen > config.num_local_experts:
                experts = config.num_local_experts
                raise InvalidRequestError(
                    f"experts_per_token is {shown(chosen)}; this model has {experts} experts: give 1 to {experts}"
                )
            config = replace(config, num_experts_per_tok=chosen)
        if self.rope_scaling is None and self.rope_theta is None:
            return config
        try:
            return self._with_rope(config, context)
        except ConfigError as error:
            raise InvalidRequestError(str(error).replace("config.json: ", "rope_scaling: ")) from None

    def _with_rope(self, config: MixtralConfig, context: int | None) -> MixtralConfig:
        rope, tokens = config.rope, config.max_position_embeddings
        if isinstance(self.rope_scaling, str):
            kind, factor = _kind_and_factor(self.rope_scaling)
            # In place of the file's own scaling: the factor stretches what was there before that.
            tokens = rope.original
            rope = RopeConfig(rope.theta, tokens, kind, tokens, {"factor": factor})
        elif self.rope_scaling is not None:
            entries = {"rope_scaling": {"original_max_position_embeddings": rope.original, **self.rope_scaling}}
            rope = RopeConfig.from_hf(entries, rope.theta, tokens)
        if self.rope_theta is not None:
            rope = replace(rope, theta=float(self.rope_theta))
            if self.rope_scaling is None and is_integer(context):
                tokens = max(tokens, context)
        return replace(config, rope=rope, max_position_embeddings=tokens)


def settings_of(config: MixtralConfig, own: MixtralConfig) -> str:
    """What ``config`` computes otherwise than ``own``, which is what the file says; empty where it is the same."""
    found: dict[str, Any] = {}
    if config.num_experts_per_tok != own.num_experts_per_tok:
        found["experts_per_token"] = config.num_experts_per_tok
    if config.rope != own.rope:
        found["rope"] = {name: value for name, value in vars(config.rope).items() if value is not None}
    return json.dumps(found, sort_keys=True, default=dict) if found else ""


def _kind_and_factor(text: str) -> tuple[str, float]:
    kind, _, written = text.partition("=")
    try:
        factor = float(written)
    except ValueError:
        factor = 0.0
    if kind not in EXTENDING_KINDS or not 1 <= factor <= MAX_FACTOR:
        kinds = ", ".join(EXTENDING_KINDS)
        raise InvalidRequestError(
            f"rope_scaling is {shown(text)}; write KIND=FACTOR, of {kinds} and a number from 1 to {MAX_FACTOR}, such as yarn=4"
        )
    return kind, factor

"""PEFT's ``adapter_config.json``: what an adapter's scales are, and settings that would change the maths (peft 0.21)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_mixtral.adapters.peft_patterns import Patterns
from mlx_mixtral.adapters.settings import flag, mapping, positive, rank, text
from mlx_mixtral.arguments import is_integer, shown
from mlx_mixtral.errors import CheckpointError

__all__ = ["PeftSettings", "check_type"]

_TYPES = ("LORA", "TRAINABLE_TOKENS")
# Settings under which PEFT computes something else than a low-rank product, and what that is.
_OTHER_MATHS = {
    "alora_invocation_tokens": "an activated LoRA, which acts only after certain tokens",
    "arrow_config": "a mixture of adapters",
    "kasa_config": "a base that KaSA truncated",
    "layer_replication": "a model whose layers were repeated",
    "megatron_config": "layers of Megatron",
    "monteclora_config": "an adapter that is sampled",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "inputs that were averaged in groups (QALoRA)",
    "velora_config": "activations that were compressed (VeLoRA)",
}
# Ways to begin that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take the first factors out of it.
_INITS = ("default", "gaussian", "eva", "orthogonal", "mica", "true", "false", "none")


def check_type(config_file: Path, entries: Mapping[str, Any]) -> None:
    """Raise CheckpointError for an adapter that is no LoRA."""
    kind = entries.get("peft_type")
    if kind not in _TYPES:
        raise CheckpointError(
            f"{config_file}: peft_type is {shown(kind)}; {' and '.join(_TYPES)} are read: merge others into the model with "
            "PEFT's merge_and_unload(), and convert the result"
        )


class PeftSettings:
    """What the settings say of every change.

    Raises:
        CheckpointError: a value of no use, or one that calls for other maths.
    """

    def __init__(self, config_file: Path, entries: Mapping[str, Any]) -> None:
        self.where, self._entries = str(config_file), entries
        self.is_lora = entries.get("peft_type") == "LORA"
        for key, what in _OTHER_MATHS.items():
            if entries.get(key):
                raise CheckpointError(
                    f"{self.where}: {key} is {shown(entries[key])}: {what}, which is not computed here"
                )
        self._refuse_init()
        self.use_dora = flag(self.where, entries, "use_dora")
        self.lora_bias = flag(self.where, entries, "lora_bias")
        self.ties_weights = flag(self.where, entries, "ensure_weight_tying")
        self._rslora = flag(self.where, entries, "use_rslora")
        if self.use_dora and self.lora_bias:
            raise CheckpointError(
                f"{self.where}: use_dora and lora_bias are both true; PEFT does not train the two together"
            )
        if self.is_lora:
            self._rank = rank(f"{self.where}: r", entries.get("r"))
            self._alpha = positive(f"{self.where}: lora_alpha", entries.get("lora_alpha"))
        self._ranks, self._alphas = (
            Patterns(f"{self.where}: {key}", mapping(self.where, entries, key))
            for key in ("rank_pattern", "alpha_pattern")
        )

    def scale(self, *modules: str, found_rank: int, tensor: str) -> float:
        """What multiplies the change of a module (or parameter) of these names, whose factors have this rank.

        Raises:
            CheckpointError: the rank is another one than the settings say, so that the scale is not known.
        """
        wanted = self._ranks.value(*modules)
        own = self._rank if wanted is None else rank(f"{self.where}: rank_pattern", wanted)
        if own != found_rank:
            raise CheckpointError(
                f"{self.where} gives rank {own} to tensor {tensor!r}, which has rank {found_rank}; the two files do not belong "
                "together"
            )
        alpha = self._alphas.value(*modules)
        value = self._alpha if alpha is None else positive(f"{self.where}: alpha_pattern", alpha)
        return value / (math.sqrt(own) if self._rslora else own)

    def experts_are_transposed(self) -> bool | None:
        """Whether PEFT took a stack of experts for ``[experts, in, out]``, as before 0.19; None if it does not say."""
        version = re.match(r"(\d{1,4})\.(\d{1,4})", text(self._entries, "peft_version") or "")
        return None if version is None else (int(version[1]), int(version[2])) < (0, 19)

    def tokens(self, path: str, vocabulary: int) -> tuple[int, ...]:
        """The tokens whose rows of the matrix ``path`` were trained, in the order of those rows.

        Raises:
            CheckpointError: there are none, or some that the model does not have.
        """
        key = "trainable_token_indices" if self.is_lora else "token_indices"
        value = self._entries.get(key)
        if isinstance(value, dict):
            value = next((found for name, found in value.items() if path == name or path.endswith(f".{name}")), None)
        if not isinstance(value, list) or not value or not all(map(is_integer, value)):
            raise CheckpointError(f"{self.where}: {key} is {shown(value)} for {path}; a list of token ids is needed")
        for token in value:
            if not 0 <= token < vocabulary:
                raise CheckpointError(
                    f"{self.where}: {key} has token {token}; the model's ids go from 0 to {vocabulary - 1}: the adapter is of "
                    "another model, or of this one with its vocabulary resized, which is not supported"
                )
        if len(set(value)) < len(value):
            raise CheckpointError(f"{self.where}: {key} names a token twice for {path}")
        return tuple(value)

    def notes(self, paths: frozenset[str]) -> Iterator[str]:
        """What is in the settings and of no consequence; ``paths`` are the modules that the file changes."""
        if self._entries.get("lora_dropout"):
            yield f"dropout {shown(self._entries['lora_dropout'])} is for training and ignored"
        targets = self._entries.get("target_modules")
        if isinstance(targets, list):
            ends = {path[start:] for path in paths for start in (0, *(dot.end() for dot in re.finditer(r"\.", path)))}
            nowhere = [target for target in targets if isinstance(target, str) and target not in ends]
            if nowhere:
                yield f"target_modules {', '.join(map(repr, sorted(nowhere)[:6]))} changed nothing where it was trained"
        if base := text(self._entries, "base_model_name_or_path"):
            yield f"it was trained on {shown(base)[1:-1]}"

    def _refuse_init(self) -> None:
        init = self._entries.get("init_lora_weights")
        if str(init).lower() not in _INITS:
            raise CheckpointError(
                f"{self.where}: init_lora_weights is {shown(init)}, which took the first factors out of the base model, so "
                "that the adapter fits what was left of it: write true there if the model here is that rest, or save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion"
            )

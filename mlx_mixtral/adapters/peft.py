"""PEFT's adapters: ``adapter_model.safetensors`` beside an ``adapter_config.json`` (peft 0.4 to 0.21).

    …q_proj.lora_A.weight                   [r, in]      lora_B.weight  [out, r]
    …q_proj.lora_magnitude_vector           [out]        DoRA
    …q_proj.lora_B.bias                     [out]        lora_bias
    …embed_tokens.lora_embedding_A          [r, V]       lora_embedding_B  [D, r]
    lm_head.weight, model.norm.weight       modules_to_save, which stand in place of the model's
    …token_adapter.trainable_tokens_delta   [n, D]       rows that stand in place of the embedding's

A change is multiplied by alpha / r, with rslora by alpha / sqrt(r). Where experts lie: ``adapters.peft_experts``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_mixtral.adapters.parts import AdapterContents, Factors, MatrixPlace, whole
from mlx_mixtral.adapters.peft_experts import Stack, StackedExperts, place_of
from mlx_mixtral.adapters.peft_settings import PeftSettings, check_type
from mlx_mixtral.adapters.places import Places
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.names import unwrapped
from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["WEIGHTS", "check_type", "read_peft"]

WEIGHTS = "adapter_model.safetensors"
# The adapter's own name stands in the middle of a key where something else than PEFT saved it.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<side>lora_[AB])(?:\.[^.]+)?\.(?P<of>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.[^.]+)?|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+){0,2})"
)
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_COPY = re.compile(r"(.+)\.(?:base_layer|original_module|token_adapter\.base_layer)\.weight")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)?)?\.weight")


def read_peft(
    config_file: Path, entries: Mapping[str, Any], tensors: Mapping[str, TensorInfo], places: Places
) -> AdapterContents:
    """What a file of PEFT's changes of the model of ``places``.

    Raises:
        CheckpointError: settings or tensors that make no adapter of this model, or one that is not computed here.
    """
    settings = PeftSettings(config_file, entries)
    found = _PeftTensors()
    for name, info in unwrapped(tensors).items():
        found.add(name if name.startswith(("model.", "lm_head.")) else f"model.{name}", info)
    changes = _changes(found.factors, settings, places)
    token_rows: dict[str, tuple[tuple[int, ...], TensorInfo]] = {}
    for path, info in found.tokens.items():
        matrix = places.matrix(path, info)
        if matrix.part not in ("embedding", "head"):
            raise CheckpointError(f"{info.file}: tensor {info.name!r} holds rows of tokens, which {path} does not have")
        tokens = settings.tokens(path, places.config.vocab_size)
        places.check_shape(info, (len(tokens), matrix.in_features))
        token_rows[path] = tokens, info
    replaced: dict[str, TensorInfo] = {}
    for module, info in found.saved.items():
        path, _ = place_of(module, places)
        places.replacement(path, info)
        replaced[path] = info
    _refuse_overlaps(changes, replaced, token_rows)
    _refuse_tied(changes, replaced, settings, places)
    notes = [*settings.notes(frozenset((*found.factors, *found.saved, *found.tokens)))]
    if found.copies:
        count = "one copy" if len(found.copies) == 1 else f"{len(found.copies)} copies"
        notes.append(f"{count} of the base model's own weights ({found.copies[0].name!r}) are ignored")
    return AdapterContents(changes, replaced, token_rows, tuple(notes))


@dataclass
class _PeftTensors:
    """The tensors of a file by what they are."""

    factors: dict[str, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))
    """By module: ``A``, ``B``, ``bias``, ``magnitude``, ``embedding_A``, ``embedding_B``."""
    saved: dict[str, TensorInfo] = field(default_factory=dict)
    tokens: dict[str, TensorInfo] = field(default_factory=dict)
    copies: list[TensorInfo] = field(default_factory=list)

    def add(self, name: str, info: TensorInfo) -> None:
        if match := _FACTOR.fullmatch(name):
            if match["side"]:
                kind = match["side"][-1] if match["of"] == "weight" else "bias"
                if kind == "bias" and match["side"] == "lora_A":
                    raise _unknown(info)
            else:
                kind = match["embedding"].removeprefix("lora_") if match["embedding"] else "magnitude"
            self._put(self.factors[match["module"]], kind, info)
        elif match := _TOKENS.fullmatch(name):
            self._put(self.tokens, match["module"], info)
        elif _COPY.fullmatch(name):
            self.copies.append(info)
        elif (match := _SAVED.fullmatch(name)) and ".lora_" not in name:
            self._put(self.saved, match["module"], info)
        else:
            raise _unknown(info)

    def _put(self, target: dict[str, TensorInfo], key: str, info: TensorInfo) -> None:
        if (other := target.get(key)) is not None:
            raise CheckpointError(
                f"{info.file}: tensors {other.name!r} and {info.name!r} are of the same matrix; the file holds several "
                "adapters, or is damaged"
            )
        target[key] = info


def _unknown(info: TensorInfo) -> CheckpointError:
    what = "is a bias, which this model does not have" if info.name.endswith(".bias") else "is nothing known of a LoRA"
    return CheckpointError(f"{info.file}: tensor {info.name!r} {what}; the adapter is of another model or kind")


def _changes(
    factors: Mapping[str, Mapping[str, TensorInfo]], settings: PeftSettings, places: Places
) -> dict[MatrixPlace, Factors]:
    changes: dict[MatrixPlace, Factors] = {}
    stacks: list[Stack] = []
    for module, fields in factors.items():
        first = next(iter(fields.values()))
        if not settings.is_lora:
            raise CheckpointError(f"{first.file}: tensor {first.name!r} is a LoRA's, but peft_type says otherwise")
        a, b = _pair(module, fields, settings)
        if (stack := Stack.of(module, a, b, places)) is not None:
            if len(fields) > 2:
                extra = next(info for kind, info in fields.items() if kind not in ("A", "B"))
                raise CheckpointError(
                    f"{extra.file}: tensor {extra.name!r} is of a stack of experts, which has none in PEFT"
                )
            stacks.append(stack)
            continue
        path, expert = place_of(module, places)
        matrix = places.matrix(path, first)
        if expert is not None:
            places.check_expert(matrix, expert, first)
        elif matrix.num_experts is not None:
            raise places.foreign(module, first)
        for info in (a, b):
            if len(info.shape) != 2:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}, not that of a matrix"
                )
        embedding = "embedding_A" in fields
        if embedding != (matrix.part == "embedding"):
            raise CheckpointError(f"{a.file}: tensor {a.name!r} is not how PEFT changes {path}")
        parts = (whole(b, transposed=True), whole(a, transposed=True)) if embedding else (whole(a), whole(b))
        scale = settings.scale(module, f"{module}.weight", found_rank=parts[0].shape[0], tensor=a.name)
        change = Factors(*parts, scale, fields.get("magnitude"), fields.get("bias"))
        if (path, expert) in changes:
            raise CheckpointError(
                f"{a.file}: tensors {changes[path, expert].a.info.name!r} and {a.name!r} change the same matrix"
            )
        changes[path, expert] = places.check(matrix, change)
    for place, change in StackedExperts(stacks, settings, places).changes():
        if place in changes:
            raise CheckpointError(
                f"{change.a.info.file}: tensors {changes[place].a.info.name!r} and {change.a.info.name!r} change the same "
                "matrix"
            )
        changes[place] = change
    return changes


def _pair(module: str, fields: Mapping[str, TensorInfo], settings: PeftSettings) -> tuple[TensorInfo, TensorInfo]:
    """Both factors of a module.

    Raises:
        CheckpointError: one is missing, or what else there is contradicts the settings.
    """
    first = next(iter(fields.values()))
    embedding = any(kind.startswith("embedding") for kind in fields)
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for name in names:
        if name not in fields:
            raise CheckpointError(f"{first.file}: tensor {module + '.lora_' + name!r} is missing beside {first.name!r}")
    if embedding and "A" in fields:
        raise CheckpointError(f"{first.file}: {module} is changed both as an embedding and as a matrix")
    if embedding and (fields.keys() & {"magnitude", "bias"}):
        raise CheckpointError(
            f"{first.file}: {module} is an embedding trained with DoRA or a bias, which is not computed here; merge the "
            "adapter into the model with PEFT's merge_and_unload()"
        )
    for kind, wanted in (("magnitude", settings.use_dora), ("bias", settings.lora_bias)):
        key = "use_dora" if kind == "magnitude" else "lora_bias"
        # PEFT trains neither for stacks of experts; an embedding never has a bias.
        if kind in fields and not wanted:
            raise CheckpointError(
                f"{fields[kind].file}: tensor {fields[kind].name!r} is there, but {key} is not true in adapter_config.json; "
                "the two files do not belong together"
            )
        if wanted and kind not in fields and not (embedding and kind == "bias"):
            raise CheckpointError(
                f"{first.file}: {key} is true in adapter_config.json, but {module} has no tensor for it; the file is incomplete"
            )
    return fields[names[0]], fields[names[1]]


def _refuse_overlaps(
    changes: Mapping[MatrixPlace, Factors], replaced: Mapping[str, TensorInfo], rows: Mapping[str, Any]
) -> None:
    for path in (*replaced, *rows):
        if (path, None) in changes or (path in replaced and path in rows):
            raise CheckpointError(f"{path} is both replaced and changed by the adapter; one of the two cannot be meant")


def _refuse_tied(
    changes: Mapping[MatrixPlace, Factors], replaced: Mapping[str, TensorInfo], settings: PeftSettings, places: Places
) -> None:
    """PEFT changes an embedding alone where the head shares it, unless it is told otherwise; here both are one matrix."""
    if not places.config.tie_word_embeddings or settings.ties_weights:
        return
    for path in (*replaced, *(path for path, _ in changes)):
        if path == "model.embed_tokens":
            raise CheckpointError(
                f"{settings.where}: the adapter changes the embedding, which this model also uses as its head; PEFT trained "
                "the embedding alone, which is not computed here (ensure_weight_tying trains both)"
            )

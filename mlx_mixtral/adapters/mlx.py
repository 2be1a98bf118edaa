"""mlx-lm's adapters: ``adapters.safetensors`` beside an ``adapter_config.json`` (``mlx_lm.lora``, mlx-lm 0.32).

    …q_proj.lora_a                  [in, r]       lora_b  [r, out]
    …switch_mlp.up_proj.lora_a      [E, r, in]    lora_b  [E, out, r]    before August 2025 lora_a is [E·r, in]
    model.embed_tokens.lora_a       [V, r]        lora_b  [r, D]
    …q_proj.m                       [out]         DoRA

``lora_parameters.scale`` multiplies the product as it is, whatever the rank. ``fine_tune_type: full`` holds weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_mixtral.adapters.parts import AdapterContents, Factors, MatrixPlace, TensorPart, whole
from mlx_mixtral.adapters.places import Places
from mlx_mixtral.adapters.settings import mapping, positive, rank
from mlx_mixtral.arguments import shown
from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["WEIGHTS", "read_mlx"]

WEIGHTS = "adapters.safetensors"
_FIELDS = ("lora_a", "lora_b", "m")
_KINDS = ("lora", "dora", "full")


def read_mlx(
    config_file: Path, entries: Mapping[str, Any], tensors: Mapping[str, TensorInfo], places: Places
) -> AdapterContents:
    """What a file of mlx-lm's changes of the model of ``places``.

    Raises:
        CheckpointError: settings or tensors that make no adapter of this model.
    """
    kind = entries.get("fine_tune_type") or "lora"
    if kind not in _KINDS:
        raise CheckpointError(f"{config_file}: fine_tune_type is {shown(kind)}; {', '.join(_KINDS)} are read")
    if kind == "full":
        return _full(tensors, places)
    settings = mapping(str(config_file), entries, "lora_parameters")
    where = f"{config_file}: lora_parameters"
    if "scale" not in settings:
        raise CheckpointError(f"{where} has no scale, by which every change is multiplied")
    scale = positive(f"{where}: scale", settings["scale"])
    wanted_rank = rank(f"{where}: rank", settings["rank"]) if "rank" in settings else None
    changes: dict[MatrixPlace, Factors] = {}
    for path, fields in _by_path(tensors).items():
        first = next(iter(fields.values()))
        matrix = places.matrix(path, first)
        for name in ("lora_a", "lora_b"):
            if name not in fields:
                raise CheckpointError(f"{first.file}: tensor {path + '.' + name!r} is missing beside {first.name!r}")
        for expert, change in _changes(matrix, fields, scale):
            places.check(matrix, change)
            if wanted_rank not in (None, change.a.shape[0]):
                raise CheckpointError(
                    f"{first.file}: tensor {fields['lora_a'].name!r} has rank {change.a.shape[0]}, but {config_file.name} says "
                    f"{wanted_rank}; the two files do not belong together"
                )
            changes[path, expert] = change
    return AdapterContents(changes, notes=tuple(_notes(settings)))


def _full(tensors: Mapping[str, TensorInfo], places: Places) -> AdapterContents:
    replaced: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        path, _, field = name.rpartition(".")
        if field != "weight":
            raise CheckpointError(f"{info.file}: tensor {name!r} has no place in a model that was trained in full")
        places.replacement(path, info)
        replaced[path] = info
    return AdapterContents(replaced=replaced)


def _by_path(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        path, _, field = name.rpartition(".")
        if field not in _FIELDS:
            raise CheckpointError(f"{info.file}: tensor {name!r} is none of mlx-lm's: {', '.join(_FIELDS)}")
        found[path][field] = info
    return found


def _changes(matrix: Matrix, fields: Mapping[str, TensorInfo], scale: float) -> Iterator[tuple[int | None, Factors]]:
    a, b, magnitude = fields["lora_a"], fields["lora_b"], fields.get("m")
    experts = matrix.num_experts
    if experts is not None and not (experts == 1 and len(b.shape) == 2):
        if magnitude is not None:
            raise CheckpointError(f"{a.file}: tensor {magnitude.name!r} is of experts, for which mlx-lm has no DoRA")
        yield from enumerate(_stacked(matrix, experts, a, b, scale))
        return
    for info in (a, b):
        if len(info.shape) != 2:
            raise CheckpointError(f"{a.file}: tensor {info.name!r} has shape {list(info.shape)}, not that of a matrix")
    if matrix.part == "embedding":
        change = Factors(whole(b), whole(a), scale, magnitude)
    else:
        change = Factors(whole(a, transposed=True), whole(b, transposed=True), scale, magnitude)
    yield None if experts is None else 0, change


def _stacked(matrix: Matrix, experts: int, a: TensorInfo, b: TensorInfo, scale: float) -> Iterator[Factors]:
    if len(b.shape) != 3 or b.shape[0] != experts:
        raise _other_experts(b, f"[{experts}, {matrix.out_features}, rank]")
    r = b.shape[2]
    if a.shape[:-1] not in ((experts, r), (experts * r,)):
        raise _other_experts(a, f"[{experts}, {r}, {matrix.in_features}]")
    out = b.shape[1]
    for expert in range(experts):
        yield Factors(
            TensorPart(a, range(expert * r, (expert + 1) * r), range(a.shape[-1])),
            TensorPart(b, range(expert * out, (expert + 1) * out), range(r)),
            scale,
        )


def _other_experts(info: TensorInfo, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}; the experts of this model call for {wanted}: the "
        "adapter is of another model"
    )


def _notes(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("dropout"):
        yield f"dropout {shown(settings['dropout'])} is for training and ignored"
    if "alpha" in settings:
        yield f"alpha {shown(settings['alpha'])} is ignored, as mlx-lm does: its scale is used as it is"

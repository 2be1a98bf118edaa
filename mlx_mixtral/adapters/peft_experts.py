"""Where PEFT puts the experts of a Mixtral: three layouts, told apart by names and shapes.

    transformers 4    block_sparse_moe.experts.M.w1.lora_A.weight     [r, D]       lora_B  [F, r]          one expert each
    peft >= 0.19      mlp.experts[.base_layer].lora_A.weight          [E·r, in]    lora_B  [out, r·E]      stacked
    peft 0.17, 0.18   the same names                                  [E·r, out]   lora_B  [in, r·E]       stacked, transposed

Stacks (transformers 5) change ``gate_up_proj [E, 2F, D]`` or ``down_proj [E, D, F]``; which one a name stands for depends on
what else was trained, the shapes say it. A is ordered by experts, then ranks; B by ranks, then experts. The older PEFT took
``[E, out, in]`` for ``[E, in, out]``: its change of W is (B A) transposed. Shapes tell this too, unless D = F or D = 2F; then
the other stack of the file does, or ``peft_version``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_mixtral.adapters.parts import Factors, MatrixPlace, TensorPart
from mlx_mixtral.adapters.peft_settings import PeftSettings
from mlx_mixtral.adapters.places import Places
from mlx_mixtral.config.layout import EXPERT_NAMES, layer_path
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["Stack", "StackedExperts", "place_of"]

_BLOCK = r"model\.layers\.(\d{1,9})\.(?:block_sparse_moe|mlp)"
_EXPERT = re.compile(rf"{_BLOCK}\.experts\.(\d{{1,9}})\.(\w+)")
_ROUTER = re.compile(rf"{_BLOCK}\.gate")
_STACK = re.compile(rf"({_BLOCK}\.experts)(?:\.base_layer)*")
_OWN_NAMES = {hub: own for own, hub in EXPERT_NAMES.items()} | {own: own for own in EXPERT_NAMES}


def place_of(module: str, places: Places) -> MatrixPlace:
    """Path of a matrix and its expert, for a module as PEFT calls it; a name that is not known stays as it is."""
    if places.config.is_dense:
        projection = module.rpartition(".")[2]
        return module, 0 if ".mlp." in module and projection in EXPERT_NAMES else None
    if (match := _EXPERT.fullmatch(module)) and match[3] in _OWN_NAMES:
        path = f"{layer_path(int(match[1]))}.block_sparse_moe.switch_mlp.{_OWN_NAMES[match[3]]}"
        return path, int(match[2])
    if match := _ROUTER.fullmatch(module):
        return f"{layer_path(int(match[1]))}.block_sparse_moe.gate", None
    return module, None


@dataclass(frozen=True)
class Stack:
    """The factors of all experts of ``gate_up_proj`` or ``down_proj`` of a layer."""

    layer: int
    parameter: str
    """As PEFT calls it: ``model.layers.0.mlp.experts.down_proj``."""
    a: TensorInfo
    b: TensorInfo
    rank: int
    orders: frozenset[bool]
    """Whether it is transposed, as far as the shapes tell: one answer or both."""

    @classmethod
    def of(cls, module: str, a: TensorInfo, b: TensorInfo, places: Places) -> Stack | None:
        """The stack that two tensors are of; None for tensors of something else.

        Raises:
            CheckpointError: they fit neither stack of the model.
        """
        config = places.config
        if config.is_dense or (match := _STACK.fullmatch(module)) is None:
            return None
        layer, experts = int(match[2]), config.num_local_experts
        if layer >= config.num_hidden_layers:
            raise places.foreign(module, a)
        hidden, width = config.hidden_size, config.intermediate_size
        for info in (a, b):
            if len(info.shape) != 2:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}, not that of a matrix"
                )
        found = a.shape[1], b.shape[0]
        shapes = {"gate_up_proj": (hidden, 2 * width), "down_proj": (width, hidden)}
        name = next((name for name, shape in shapes.items() if found in (shape, shape[::-1])), None)
        if name is None:
            raise CheckpointError(
                f"{a.file}: tensors {a.name!r} of shape {list(a.shape)} and {b.name!r} of shape {list(b.shape)} fit no experts "
                f"with {hidden} and {width} features, as this model's have; the adapter is of another model"
            )
        rank, rest = divmod(a.shape[0], experts)
        if rest or rank == 0 or b.shape[1] != a.shape[0]:
            raise CheckpointError(
                f"{a.file}: tensors {a.name!r} of shape {list(a.shape)} and {b.name!r} of shape {list(b.shape)} are not of "
                f"{experts} experts, as this model has; the adapter is of another model"
            )
        orders = [order for order in (False, True) if found == (shapes[name][::-1] if order else shapes[name])]
        return cls(layer, f"{match[1]}.{name}", a, b, rank, frozenset(orders))


class StackedExperts:
    """All stacks of a file, which one PEFT wrote."""

    def __init__(self, stacks: Sequence[Stack], settings: PeftSettings, places: Places) -> None:
        self._stacks, self._settings, self._places = stacks, settings, places

    def changes(self) -> Iterator[tuple[MatrixPlace, Factors]]:
        """The change of every expert.

        Raises:
            CheckpointError: stacks that contradict one another, or cannot be told.
        """
        if not self._stacks:
            return
        transposed = self._are_transposed()
        width, experts = self._places.config.intermediate_size, self._places.config.num_local_experts
        for stack in self._stacks:
            scale = self._settings.scale(stack.parameter, found_rank=stack.rank, tensor=stack.a.name)
            halves = {"down_proj": 0}
            if stack.parameter.endswith("gate_up_proj"):
                halves = {"gate_proj": 0, "up_proj": width}
            for projection, start in halves.items():
                path = f"{layer_path(stack.layer)}.block_sparse_moe.switch_mlp.{projection}"
                matrix = self._places.matrix(path, stack.a)
                outputs = range(start, start + matrix.out_features)
                for expert in range(experts):
                    yield (
                        (path, expert),
                        self._places.check(matrix, _change(stack, expert, outputs, experts, scale, transposed)),
                    )

    def _are_transposed(self) -> bool:
        orders = frozenset((False, True)).intersection(*(stack.orders for stack in self._stacks))
        first = self._stacks[0].a
        if not orders:
            raise CheckpointError(
                f"{first.file}: some experts are transposed and others are not; no PEFT writes such a file"
            )
        if len(orders) == 1:
            return next(iter(orders))
        if (said := self._settings.experts_are_transposed()) is None:
            raise CheckpointError(
                f"{self._settings.where} has no peft_version, by which the shapes of experts are told apart (0.19 turned "
                "them): write the version that trained the adapter there"
            )
        return said


def _change(stack: Stack, expert: int, outputs: range, experts: int, scale: float, transposed: bool) -> Factors:
    """One expert's; ``outputs`` are the rows of the stacked matrix."""
    ranks = range(expert * stack.rank, (expert + 1) * stack.rank)
    strided = range(expert, stack.b.shape[1], experts)
    if transposed:
        return Factors(
            TensorPart(stack.b, range(stack.b.shape[0]), strided, transposed=True),
            TensorPart(stack.a, ranks, outputs, transposed=True),
            scale,
        )
    return Factors(TensorPart(stack.a, ranks, range(stack.a.shape[1])), TensorPart(stack.b, outputs, strided), scale)

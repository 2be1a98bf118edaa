"""Adapters put on a loaded model: what they change of each matrix, as its layer computes it, in the compute type.

A matrix that is fused of several has one change, ``A`` of all of them stacked and ``B`` block-diagonal, so that it costs two
products as well. A machine that holds a part of a model holds that part of the changes: rows of ``B`` where it has rows of a
matrix, columns of ``A`` where it has columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import mlx.core as mx
import numpy as np

from mlx_mixtral.adapters.adapter import Adapter, Floats, LowRank
from mlx_mixtral.config.layout import experts_path, layer_path
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.experts.gather import GatheredExperts
from mlx_mixtral.layers.adapted import LowRankChange, Replaced, ReplacedRows
from mlx_mixtral.layers.adapted_experts import ExpertChanges, Projection, StackedChange
from mlx_mixtral.layers.expert_bank import FeedForward
from mlx_mixtral.layers.linear import Adapted, Linear, StackedLinear
from mlx_mixtral.layers.norm import RMSNorm
from mlx_mixtral.machine.device import DTYPE_NAMES
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.weights.dtypes import MLX_DTYPES

__all__ = ["Adapting"]

_PARTS: tuple[Projection, ...] = ("gate", "up", "down")
# Rows of a matrix that are unpacked at once to take their norms.
NORM_ROWS = 1024


@dataclass(frozen=True)
class _Target:
    """A matrix of the network: its module, and the paths of the checkpoint's matrices whose rows it has, in order."""

    module: Linear
    paths: Sequence[str]


class Adapting:
    """Puts adapters on models that ``builder`` made, and takes them off. Nothing may be computed meanwhile."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._held, self._dtype = builder.held, MLX_DTYPES[builder.dtype]

    def check(self, adapter: Adapter, *, on_cpu: bool) -> None:
        """That the model can run with ``adapter``.

        Raises:
            InvalidRequestError: what only a conversion can do, or what this device cannot.
        """
        experts = [path for path in adapter.ranks if self._held.checkpoint_matrices[path].part == "expert"]
        is_dense = self._builder.config.is_dense
        if not is_dense and (path := next((path for path in experts if path in adapter.dora), None)):
            raise InvalidRequestError(
                f"the adapter {adapter.name} has DoRA on experts ({path}), which takes the norms of all their weights; fuse "
                "it: mlx-mixtral convert SOURCE DEST --adapter PATH"
            )
        if on_cpu and experts and not is_dense and self._builder.dtype != "F32":
            raise InvalidRequestError(
                f"the adapter {adapter.name} changes experts, which cannot be computed in {DTYPE_NAMES[self._builder.dtype]} "
                "on MLX's CPU backend; use --dtype float32"
            )

    def nbytes(self, adapter: Adapter) -> int:
        """Bytes that ``adapter`` will take in memory, biases of outputs left out."""
        held, numbers = self._held, 0
        for paths in self._builder.matrix_groups():
            parts = [held.matrices[path] for path in paths]
            rows, columns = sum(part.out_features for part in parts), parts[0].in_features
            if any(path in adapter.replaced for path in paths):
                numbers += rows * columns
                continue
            numbers += sum(adapter.ranks.get(path, 0) for path in paths) * (rows + columns)
            numbers += rows * any(path in adapter.dora for path in paths)
            if paths[0] in adapter.token_rows:
                numbers += rows + adapter.rows(paths[0]).rows.size
        for experts in self._expert_paths():
            for path in (f"{experts}.{part}_proj" for part in _PARTS):
                matrix = held.matrices[path]
                a_rank = (matrix.out_features + matrix.in_features) * (matrix.num_experts or 1)
                numbers += adapter.ranks.get(path, 0) * a_rank
        numbers += sum(norm.size for path, norm in held.norms.items() if path in adapter.replaced)
        return numbers * held.item_bytes

    def put_on(self, module: MixtralModel, number: int, adapter: Adapter) -> None:
        """Let ``module`` compute rows of adapter ``number`` with ``adapter``; after an error with none of it.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            for place in self._places(module):
                if (change := self._change(adapter, place)) is not None:
                    place.module.adapted[number] = change
            for norm, path in self._norms(module):
                if path in adapter.replaced:
                    norm.adapted[number] = self._array(adapter.replacement(path))
                    mx.eval(norm.adapted[number])
            for experts, layer in self._gathered(module):
                pairs = {
                    part: stacked
                    for part in _PARTS
                    if (stacked := self._stacked(adapter, f"{layer}.{part}_proj")) is not None
                }
                if pairs:
                    experts.adapted[number] = ExpertChanges(pairs)
        except BaseException:
            self.take_off(module, number)
            raise

    def take_off(self, module: MixtralModel, number: int) -> None:
        """Forget adapter ``number``."""
        for place in self._places(module):
            place.module.adapted.pop(number, None)
        for norm, _ in self._norms(module):
            norm.adapted.pop(number, None)
        for experts, _ in self._gathered(module):
            experts.adapted.pop(number, None)

    # Where things are

    def _places(self, module: MixtralModel) -> Iterator[_Target]:
        """Every matrix that is no gathered expert's."""
        modules = [matrix for matrix in (module.embed_tokens, module.lm_head) if matrix is not None]
        for layer in module.layers:
            modules += [*layer.attention.qkv, layer.attention.o_proj]
            modules += [*layer.moe.gate_up, layer.moe.down] if isinstance(layer.moe, FeedForward) else [layer.moe.gate]
        for matrix, paths in zip(modules, self._builder.matrix_groups(), strict=True):
            yield _Target(matrix, paths)

    def _expert_paths(self) -> Sequence[str]:
        """What the paths of each layer's gathered experts have in common."""
        config = self._builder.config
        return [] if config.is_dense else [experts_path(config, layer) for layer in self._held.layers]

    def _gathered(self, module: MixtralModel) -> Iterator[tuple[GatheredExperts, str]]:
        return zip(module.gathered, self._expert_paths(), strict=True)

    def _norms(self, module: MixtralModel) -> Iterator[tuple[RMSNorm, str]]:
        if module.norm is not None:
            yield module.norm, "model.norm"
        for index, layer in zip(self._held.layers, module.layers, strict=True):
            yield layer.input_norm, f"{layer_path(index)}.input_layernorm"
            yield layer.post_attention_norm, f"{layer_path(index)}.post_attention_layernorm"

    # What they change

    def _change(self, adapter: Adapter, place: _Target) -> Adapted | None:
        """What an adapter makes of a matrix; None where it leaves it as it is."""
        paths, change = place.paths, self._low_rank(adapter, place)
        if any(path in adapter.replaced for path in paths):
            return self._replaced(adapter, place, change)
        if paths[0] in adapter.token_rows:
            assert change is None, "an adapter both replaces rows and changes them"
            own = adapter.rows(paths[0])
            places = np.full(self._held.matrices[paths[0]].out_features, -1, np.int32)
            places[list(own.tokens)] = np.arange(len(own.tokens))
            found = ReplacedRows(mx.array(places), self._linear(own.rows))
            mx.eval(list(found.arrays))
            return found
        return change

    def _replaced(self, adapter: Adapter, place: _Target, change: LowRankChange | None) -> Replaced:
        """A whole matrix of floats: the rows that are replaced, and the others as they are computed without that."""
        rows, start = [], 0
        for path in place.paths:
            stop = start + self._held.matrices[path].out_features
            if path in adapter.replaced:
                rows.append(self._array(adapter.replacement(path)))
            else:
                own = place.module.part(start, stop)
                at = mx.arange(stop - start)
                base = own.rows(at, self._dtype)
                rows.append(base if change is None else change.part(start, stop).rows(at, base))
            start = stop
        found = Replaced(Linear({"weight": mx.concatenate(rows)}, None, self._builder.products))
        mx.eval(list(found.arrays))
        return found

    def _low_rank(self, adapter: Adapter, place: _Target) -> LowRankChange | None:
        held = self._held
        lows = [
            self._low(adapter, path, None if held.matrices[path].num_experts is None else 0) for path in place.paths
        ]
        if not any(low is not None for low in lows):
            return None
        outs = [held.matrices[path].out_features for path in place.paths]
        spans = list(pairwise(accumulate(outs, initial=0)))
        ranks = [0 if low is None else len(low.a) for low in lows]
        a = np.concatenate([low.a for low in lows if low is not None])
        b = np.zeros((sum(outs), sum(ranks)), np.float32)
        factor, bias, first = np.ones(sum(outs), np.float32), np.zeros(sum(outs), np.float32), 0
        for low, rank, (start, stop) in zip(lows, ranks, spans, strict=True):
            if low is None:
                continue
            b[start:stop, first : first + rank] = low.b
            first += rank
            if low.magnitude is not None:
                factor[start:stop] = low.magnitude / self._row_norms(place.module.part(start, stop), low)
            if low.bias is not None:
                bias[start:stop] = low.bias
        is_scaled = any(low is not None and low.magnitude is not None for low in lows)
        is_moved = any(low is not None and low.bias is not None for low in lows)
        change = LowRankChange(
            self._linear(a),
            self._linear(b),
            self._array(factor) if is_scaled else None,
            self._array(bias) if is_moved else None,
        )
        mx.eval(list(change.arrays))
        return change

    def _row_norms(self, base: Linear, low: LowRank) -> Floats:
        """``|W + b a|`` of each row ``[out]``, in float32."""
        norms, a, b = [], mx.array(low.a), mx.array(low.b)
        for start in range(0, len(low.b), NORM_ROWS):
            at = mx.arange(start, min(start + NORM_ROWS, len(low.b)))
            whole = base.rows(at, mx.float32).astype(mx.float32) + b[at] @ a
            norms.append(np.asarray(mx.linalg.norm(whole, axis=-1)))
        return np.concatenate(norms)

    def _stacked(self, adapter: Adapter, path: str) -> StackedChange | None:
        """``A [E, r, in]`` and ``B [E, out, r]`` of a matrix of experts; experts of a lower rank have zeros."""
        if (rank := adapter.ranks.get(path)) is None:
            return None
        matrix = self._held.matrices[path]
        count, out = matrix.num_experts or 1, matrix.out_features
        a = np.zeros((count, rank, matrix.in_features), np.float32)
        b = np.zeros((count, out, rank), np.float32)
        bias = np.zeros((count, 1, out), np.float32)
        for expert in range(count):
            if (low := self._low(adapter, path, expert)) is None:
                continue
            a[expert, : len(low.a)], b[expert, :, : len(low.a)] = low.a, low.b
            if low.bias is not None:
                bias[expert] = low.bias
        products = self._builder.products
        change = StackedChange(
            StackedLinear({"weight": self._array(a)}, None, products),
            StackedLinear({"weight": self._array(b)}, None, products),
            self._array(bias) if bias.any() else None,
        )
        mx.eval(list(change.arrays))
        return change

    def _low(self, adapter: Adapter, path: str, expert: int | None) -> LowRank | None:
        """This machine's part of a change."""
        low = adapter.low_rank(path, expert)
        columns = self._held.columns_cut(path)
        if low is None or columns is None:
            return low
        cut = slice(columns.start, columns.stop)
        if path.endswith(".down_proj"):
            # What machines compute is added up: the bias is the first one's.
            is_leader = self._builder.share is None or self._builder.share.is_leader
            return LowRank(np.ascontiguousarray(low.a[:, cut]), low.b, low.magnitude, low.bias if is_leader else None)
        magnitude, bias = (None if array is None else array[cut] for array in (low.magnitude, low.bias))
        return LowRank(low.a, low.b[cut], magnitude, bias)

    def _linear(self, weight: Floats) -> Linear:
        return Linear({"weight": self._array(weight)}, None, self._builder.products)

    def _array(self, numbers: Floats) -> mx.array:
        return mx.array(numbers).astype(self._dtype)

"""From a checkpoint to a model: which matrices are fused, what is allocated, and where every byte goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import mlx.core as mx

from mlx_mixtral.budget.slots import ModelSizes
from mlx_mixtral.config.layout import FIELDS, Field, Matrix, Norm, Rows, layer_path, locate, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.experts.gather import GatheredExperts
from mlx_mixtral.experts.policy import make_policy
from mlx_mixtral.experts.pool import SlotPool
from mlx_mixtral.experts.store import ExpertPart, ExpertStore
from mlx_mixtral.layers.attention import Attention
from mlx_mixtral.layers.expert_bank import ExpertBank, FeedForward
from mlx_mixtral.layers.linear import MLX, Linear, Products, StackedLinear
from mlx_mixtral.layers.norm import RMSNorm
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral.model.moe import SparseMoe
from mlx_mixtral.model.transformer import DecoderLayer, MixtralModel
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.direct import identities
from mlx_mixtral.weights.dtypes import MLX_DTYPES
from mlx_mixtral.weights.fill import ReadRange, allocate
from mlx_mixtral.weights.packing import packing_of
from mlx_mixtral.weights.safetensors import ITEM_BYTES
from mlx_mixtral.weights.unused import refuse_unused, unused_tensors

__all__ = ["Builder"]


class Builder:
    """Allocates a model for ``checkpoint`` and lists the reads that fill it.

    Args:
        dtype: compute type by safetensors name: ``F32``, ``F16`` or ``BF16``. Norms, router, scales and unquantised weights
            are held in it; packed words go in place as they are.
        fuse: make one matrix of q, k, v and one of gate and up where their packing agrees. Without it the results are the
            same up to rounding; tests use it.
        page_cache: whether experts are streamed through the operating system's page cache.
        policy: which expert makes room for a streamed one, by name.
        products: who multiplies.

    Raises:
        CheckpointError: a tensor is missing, left over, or has the wrong shape. All is checked before anything is allocated.
        ConfigError: the quantisation entry contradicts the tensors.
    """

    def __init__(
        self,
        config: MixtralConfig,
        checkpoint: Checkpoint,
        dtype: str,
        *,
        fuse: bool = True,
        page_cache: bool = False,
        policy: str = "lru",
        products: Products = MLX,
    ) -> None:
        self.config, self.checkpoint, self.dtype, self.fuse = config, checkpoint, dtype, fuse
        self.page_cache, self.policy, self.products = page_cache, policy, products
        self.identities = identities(checkpoint)
        self.ranges: list[ReadRange] = []
        self.overflow: dict[int, SlotPool] = {}
        self.matrices = {matrix.path: matrix for matrix in matrices(config)}
        self.norms = {norm.path: norm for norm in norms(config)}
        self.specs = {
            path: packing_of(matrix, config.quantization, checkpoint) for path, matrix in self.matrices.items()
        }
        for norm in self.norms.values():
            self._norm_info(norm)
        used = {f"{path}.weight" for path in self.norms}
        for matrix in self.matrices.values():
            for field in self._fields(matrix):
                used.update(rows.name for rows in self._locations(matrix, field))
        if unused := unused_tensors(checkpoint, used, config):
            with CheckpointReader(checkpoint) as reader:
                refuse_unused(unused, reader)

    @property
    def item_bytes(self) -> int:
        """Bytes of one number in the compute type."""
        return ITEM_BYTES[self.dtype]

    @property
    def largest_matrix(self) -> int:
        """Numbers of the largest matrix, an expert's counted by itself."""
        return max(matrix.out_features * matrix.in_features for matrix in self.matrices.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes the weights will take in memory with all experts resident, scales in the compute type."""
        norms_bytes = sum(norm.size * self.item_bytes for norm in self.norms.values())
        return norms_bytes + sum(self._memory_bytes(matrix) for matrix in self.matrices.values())

    def sizes(self) -> ModelSizes:
        """What the planner of residency has to know. A dense model has no experts: all of it is trunk."""
        config, stacked = self.config, [m for m in self.matrices.values() if m.part == "expert"]
        if config.is_dense:
            return ModelSizes(self.memory_bytes, (), (), (), 1, 1)
        layers = range(config.num_hidden_layers)
        kinds: dict[tuple[QuantizationSpec | None, ...], int] = {}
        signatures = [tuple(self.specs[m.path] for m in stacked if m.layer == layer) for layer in layers]
        for signature in signatures:
            kinds.setdefault(signature, len(kinds))
        experts = config.num_local_experts
        return ModelSizes(
            self.memory_bytes - sum(map(self._memory_bytes, stacked)),
            tuple(sum(self._memory_bytes(m) for m in stacked if m.layer == layer) // experts for layer in layers),
            tuple(self.store.file_bytes(layer) for layer in layers),
            tuple(kinds[signature] for signature in signatures),
            experts,
            config.num_experts_per_tok,
        )

    def build(
        self, slots: Sequence[int] | None = None, overflow_slots: Mapping[int, int] | None = None
    ) -> MixtralModel:
        """The model, allocated; it is complete once ``ranges`` are read.

        Args:
            slots: expert slots of each layer; all experts are resident when None. A layer with fewer than there are experts
                streams the rest; one with none goes through the overflow bank of its kind.
            overflow_slots: slots of the overflow banks by kind, as in ``sizes().kinds``.
        """
        config = self.config
        rotary = Rotary(config.rope, config.head_dim)
        experts = config.num_local_experts
        slots = [experts] * config.num_hidden_layers if slots is None else slots
        kinds = () if config.is_dense else self.sizes().kinds
        for kind, count in (overflow_slots or {}).items():
            self.overflow[kind] = SlotPool(self.bank(kinds.index(kind), count), count, make_policy(self.policy))
        return MixtralModel(
            config,
            self._matrix(["model.embed_tokens"]),
            [
                self._layer(index, rotary, slots[index], self.overflow.get(kinds[index]) if kinds else None)
                for index in range(config.num_hidden_layers)
            ],
            self._norm("model.norm"),
            None if config.tie_word_embeddings else self._matrix(["lm_head"]),
            MLX_DTYPES[self.dtype],
            self.products.min_prompt_tokens,
        )

    @cached_property
    def store(self) -> ExpertStore:
        """Where every expert lies in the checkpoint."""
        layers = () if self.config.is_dense else range(self.config.num_hidden_layers)
        return ExpertStore(
            self.checkpoint, self.identities, {layer: self._expert_parts(layer) for layer in layers}, self.page_cache
        )

    def _layer(self, index: int, rotary: Rotary, slots: int, overflow: SlotPool | None) -> DecoderLayer:
        path = layer_path(index)
        qkv = [self._matrix(paths) for paths in self._fused([f"{path}.self_attn.{name}_proj" for name in "qkv"])]
        attention = Attention(self.config, qkv, self._matrix([f"{path}.self_attn.o_proj"]), rotary, self.products)
        moe: SparseMoe | FeedForward
        if self.config.is_dense:
            gate_up = [self._matrix(paths) for paths in self._fused([f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj"])]
            moe = FeedForward(gate_up, self._matrix([f"{path}.mlp.down_proj"]), self.products)
        else:
            gate = self._matrix([f"{path}.block_sparse_moe.gate"])
            experts = self._gathered(index, slots, overflow)
            moe = SparseMoe(gate, experts, self.config.num_local_experts, self.config.num_experts_per_tok)
        return DecoderLayer(
            self._norm(f"{path}.input_layernorm"), attention, self._norm(f"{path}.post_attention_layernorm"), moe
        )

    def _gathered(self, layer: int, slots: int, overflow: SlotPool | None) -> GatheredExperts:
        """A layer's experts, the first ``slots`` of them to be read into a bank of its own."""
        gathered = GatheredExperts(layer, self.config.num_local_experts, self.store)
        if not slots:
            assert overflow is not None
            gathered.make_streamed(overflow)
            return gathered
        bank = self.bank(layer, slots)
        for expert in range(slots):
            self.ranges += self.store.ranges(layer, expert, bank.arrays, expert)
        if slots == self.config.num_local_experts:
            gathered.make_resident(bank)
        else:
            pool = SlotPool(bank, slots, make_policy(self.policy))
            pool.fill({(layer, expert): expert for expert in range(slots)})
            gathered.make_streamed(pool)
        return gathered

    def bank(self, layer: int, slots: int) -> ExpertBank:
        """An allocated bank of the packing of a layer."""

        def stacked(paths: Sequence[str]) -> StackedLinear:
            matrix, spec = self.matrices[paths[0]], self.specs[paths[0]]
            rows = sum(self.matrices[path].out_features for path in paths)
            arrays: dict[str, mx.array] = {
                field: allocate((slots, rows, self._columns(matrix, field)), self._memory_dtype(spec, field))
                for field in self._fields(matrix)
            }
            return StackedLinear(arrays, spec, self.products)

        *gate_up, down = self._expert_matrices(layer)
        return ExpertBank([stacked(paths) for paths in gate_up], stacked(down), self.products)

    def _expert_matrices(self, layer: int) -> list[list[str]]:
        """Paths of the stacked matrices of a bank: gate and up, fused or apart, and down."""
        path = f"{layer_path(layer)}.block_sparse_moe.switch_mlp"
        return [*self._fused([f"{path}.gate_proj", f"{path}.up_proj"]), [f"{path}.down_proj"]]

    def _expert_parts(self, layer: int) -> list[list[ExpertPart]]:
        """Where each expert of a layer lies, by the names of ``ExpertBank.arrays``."""
        experts: list[list[ExpertPart]] = [[] for _ in range(self.config.num_local_experts)]
        *gate_up, down = self._expert_matrices(layer)
        for name, paths in [*((f"gate_up.{index}", paths) for index, paths in enumerate(gate_up)), ("down", down)]:
            spec, above = self.specs[paths[0]], 0
            for part in (self.matrices[path] for path in paths):
                for field in self._fields(part):
                    dtype = self._memory_dtype(spec, field)
                    for expert, found in enumerate(self._locations(part, field)):
                        info = self.checkpoint[found.name]
                        experts[expert].append(
                            ExpertPart(f"{name}.{field}", above, dtype, info, found.start, found.stop)
                        )
                above += part.out_features
        return experts

    def _fused(self, paths: Sequence[str]) -> list[list[str]]:
        """Which of ``paths`` become one matrix: all of them, or each its own where bits, group or mode differ."""
        if self.fuse and len({self.specs[path] for path in paths}) == 1:
            return [list(paths)]
        return [[path] for path in paths]

    def _matrix(self, paths: Sequence[str]) -> Linear:
        """One matrix with the rows of all ``paths``."""
        parts = [self.matrices[path] for path in paths]
        spec = self.specs[paths[0]]
        arrays: dict[str, mx.array] = {}
        rows = sum(part.out_features for part in parts)
        for field in self._fields(parts[0]):
            columns, dtype = self._columns(parts[0], field), self._memory_dtype(spec, field)
            arrays[field] = array = allocate((rows, columns), dtype)
            above = 0
            for part in parts:
                (found,) = self._locations(part, field)
                self.ranges.append(ReadRange(array, above, dtype, self.checkpoint[found.name], found.start, found.stop))
                above += part.out_features
        return Linear(arrays, spec, self.products)

    def _memory_bytes(self, matrix: Matrix) -> int:
        spec, rows = self.specs[matrix.path], matrix.parameters // matrix.in_features
        if spec is None:
            return matrix.parameters * self.item_bytes
        return spec.nbytes(rows, matrix.in_features, self.item_bytes)

    def _fields(self, matrix: Matrix) -> tuple[Field, ...]:
        spec = self.specs[matrix.path]
        if spec is None:
            return ("weight",)
        return FIELDS if spec.has_biases else ("weight", "scales")

    def _columns(self, matrix: Matrix, field: Field) -> int:
        spec = self.specs[matrix.path]
        if spec is None:
            return matrix.in_features
        return spec.packed_columns(matrix.in_features) if field == "weight" else spec.groups(matrix.in_features)

    def _memory_dtype(self, spec: QuantizationSpec | None, field: Field) -> str:
        if spec is None or (field != "weight" and spec.mode == "affine"):
            return self.dtype
        return "U32" if field == "weight" else "U8"

    def _locations(self, matrix: Matrix, field: Field) -> list[Rows]:
        found = locate(matrix, field, self.checkpoint)
        if found is None:
            raise CheckpointError(f"{self.checkpoint.folder}: tensor {matrix.path}.{field} is missing in every layout")
        columns = self._columns(matrix, field)
        wanted = self._memory_dtype(self.specs[matrix.path], field)
        for rows in found:
            info = self.checkpoint.rows_of(rows)
            if info.shape[-1] != columns:
                raise CheckpointError(
                    f"{info.file}: tensor {rows.name!r} has shape {list(info.shape)}; its last axis should be {columns}"
                )
            integer = wanted in ("U32", "U8")
            if (info.dtype != wanted) if integer else (info.dtype not in ("F32", "F16", "BF16")):
                kind = wanted if integer else "F32, F16 or BF16"
                raise CheckpointError(f"{info.file}: tensor {rows.name!r} has dtype {info.dtype}; {kind} was expected")
        return found

    def _norm_info(self, norm: Norm) -> None:
        info = self.checkpoint[f"{norm.path}.weight"]
        if info.shape != (norm.size,):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}; [{norm.size}] was expected"
            )
        if info.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has dtype {info.dtype}; a float type was expected"
            )

    def _norm(self, path: str) -> RMSNorm:
        array = allocate((self.norms[path].size,), self.dtype)
        info = self.checkpoint[f"{path}.weight"]
        self.ranges.append(ReadRange(array, 0, self.dtype, info, 0, 1))
        return RMSNorm(array, self.config.rms_norm_eps)

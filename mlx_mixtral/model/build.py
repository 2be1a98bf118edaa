"""From a checkpoint to a model: which matrices are fused, what is allocated, and where every byte goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import mlx.core as mx

from mlx_mixtral.budget.slots import ModelSizes
from mlx_mixtral.config.layout import experts_path, layer_path
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.distributed.shares import Share
from mlx_mixtral.experts.gather import GatheredExperts
from mlx_mixtral.experts.policy import make_policy
from mlx_mixtral.experts.pool import SlotPool
from mlx_mixtral.experts.store import ExpertPart, ExpertStore
from mlx_mixtral.layers.attention import Attention
from mlx_mixtral.layers.expert_bank import ExpertBank, FeedForward
from mlx_mixtral.layers.linear import MLX, Linear, Products, StackedLinear
from mlx_mixtral.layers.norm import RMSNorm
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral.model.held import HeldWeights
from mlx_mixtral.model.moe import SparseMoe
from mlx_mixtral.model.transformer import DecoderLayer, MixtralModel
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.direct import identities
from mlx_mixtral.weights.dtypes import MLX_DTYPES
from mlx_mixtral.weights.fill import ReadRange, allocate

__all__ = ["Builder"]


class Builder:
    """Allocates a model for ``checkpoint``, or one machine's share of it, and lists the reads that fill it.

    Layers are counted from 0 among those that are held: in ``sizes``, ``bank``, ``store`` and the model alike.

    Args:
        config: of the whole checkpoint, as are ``matrices`` and ``specs``; ``held`` is what is built.
        dtype: compute type by safetensors name: ``F32``, ``F16`` or ``BF16``. Norms, router, scales and unquantised weights
            are held in it; packed words go in place as they are.
        fuse: make one matrix of q, k, v and one of gate and up where their packing agrees. Without it the results are the
            same up to rounding; tests use it.
        page_cache: whether experts are streamed through the operating system's page cache.
        policy: which expert makes room for a streamed one, by name.
        products: who multiplies.
        share: what this machine holds of the model; all of it when None.

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
        share: Share | None = None,
    ) -> None:
        self.config, self.checkpoint, self.dtype, self.fuse = config, checkpoint, dtype, fuse
        self.page_cache, self.policy, self.products = page_cache, policy, products
        self.identities = identities(checkpoint)
        self.ranges: list[ReadRange] = []
        self.overflow: dict[int, SlotPool] = {}
        self.held = HeldWeights(config, checkpoint, dtype, share)
        self.share, self.matrices, self.specs = share, self.held.checkpoint_matrices, self.held.specs

    @property
    def item_bytes(self) -> int:
        """Bytes of one number in the compute type."""
        return self.held.item_bytes

    @property
    def largest_matrix(self) -> int:
        """Numbers of the largest matrix held, an expert's counted by itself."""
        return max(matrix.out_features * matrix.in_features for matrix in self.held.matrices.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes the weights will take in memory with all experts resident, scales in the compute type."""
        return self.held.nbytes

    def sizes(self) -> ModelSizes:
        """What the planner of residency has to know. A dense model has no experts: all of it is trunk."""
        held, config = self.held, self.config
        if config.is_dense:
            return ModelSizes(self.memory_bytes, (), (), (), 1, 1)
        layers = [held.expert_matrices(layer) for layer in held.layers]
        kinds: dict[tuple[QuantizationSpec | None, ...], int] = {}
        signatures = [tuple(self.specs[matrix.path] for matrix in layer) for layer in layers]
        for signature in signatures:
            kinds.setdefault(signature, len(kinds))
        experts, stacked = config.num_local_experts, [sum(map(held.matrix_bytes, layer)) for layer in layers]
        return ModelSizes(
            self.memory_bytes - sum(stacked),
            tuple(nbytes // experts for nbytes in stacked),
            tuple(self.store.file_bytes(layer) for layer in range(len(layers))),
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
        layers = self.held.layers
        slots = [experts] * len(layers) if slots is None else slots
        kinds = () if config.is_dense else self.sizes().kinds
        for kind, count in (overflow_slots or {}).items():
            self.overflow[kind] = SlotPool(self.bank(kinds.index(kind), count), count, make_policy(self.policy))
        return MixtralModel(
            config,
            self._held_matrix("model.embed_tokens"),
            [
                self._layer(index, rotary, slots[index], self.overflow.get(kinds[index]) if kinds else None)
                for index in range(len(layers))
            ],
            self._norm("model.norm") if "model.norm" in self.held.norms else None,
            self._held_matrix("lm_head"),
            MLX_DTYPES[self.dtype],
            self.products.min_prompt_tokens,
        )

    @cached_property
    def store(self) -> ExpertStore:
        """Where every expert lies in the checkpoint, or this machine's part of it."""
        layers = () if self.config.is_dense else range(len(self.held.layers))
        return ExpertStore(
            self.checkpoint, self.identities, {layer: self._expert_parts(layer) for layer in layers}, self.page_cache
        )

    def _layer(self, index: int, rotary: Rotary, slots: int, overflow: SlotPool | None) -> DecoderLayer:
        path = layer_path(self.held.layers[index])
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
            held, first = self.held, paths[0]
            rows = sum(held.matrices[path].out_features for path in paths)
            arrays: dict[str, mx.array] = {
                field: allocate(
                    (slots, rows, held.columns(held.matrices[first], field)), held.memory_dtype(first, field)
                )
                for field in held.fields(first)
            }
            return StackedLinear(arrays, self.specs[first], self.products)

        *gate_up, down = self._expert_matrices(layer)
        return ExpertBank([stacked(paths) for paths in gate_up], stacked(down), self.products)

    def _expert_matrices(self, layer: int) -> list[list[str]]:
        """Paths of the stacked matrices of a bank: gate and up, fused or apart, and down."""
        path = f"{layer_path(self.held.layers[layer])}.block_sparse_moe.switch_mlp"
        return [*self._fused([f"{path}.gate_proj", f"{path}.up_proj"]), [f"{path}.down_proj"]]

    def _expert_parts(self, layer: int) -> list[list[ExpertPart]]:
        """Where each expert of a layer lies, by the names of ``ExpertBank.arrays``."""
        experts: list[list[ExpertPart]] = [[] for _ in range(self.config.num_local_experts)]
        *gate_up, down = self._expert_matrices(layer)
        for name, paths in [*((f"gate_up.{index}", paths) for index, paths in enumerate(gate_up)), ("down", down)]:
            above = 0
            for path in paths:
                for field in self.held.fields(path):
                    dtype = self.held.memory_dtype(path, field)
                    for expert, at in enumerate(self.held.places(path, field)):
                        part = ExpertPart(f"{name}.{field}", above, dtype, at.info, at.start, at.stop, at.columns)
                        experts[expert].append(part)
                above += self.held.matrices[path].out_features
        return experts

    def matrix_groups(self) -> Iterator[list[str]]:
        """Paths of the held matrices but for gathered experts', those of one module together: embedding, head, then layers."""
        outside = ["model.embed_tokens", "lm_head"]
        yield from ([path] for path in outside if path in self.held.matrices)
        for layer in self.held.layers:
            path, experts = layer_path(layer), experts_path(self.config, layer)
            yield from self._fused([f"{path}.self_attn.{name}_proj" for name in "qkv"])
            yield [f"{path}.self_attn.o_proj"]
            if self.config.is_dense:
                yield from self._fused([f"{experts}.gate_proj", f"{experts}.up_proj"])
                yield [f"{experts}.down_proj"]
            else:
                yield [f"{path}.block_sparse_moe.gate"]

    def _fused(self, paths: Sequence[str]) -> list[list[str]]:
        """Which of ``paths`` become one matrix: all of them, or each its own where bits, group or mode differ."""
        if self.fuse and len({self.specs[path] for path in paths}) == 1:
            return [list(paths)]
        return [[path] for path in paths]

    def _held_matrix(self, path: str) -> Linear | None:
        """A matrix of no layer, None where another machine holds it, or where there is none: a head that is the embedding."""
        return self._matrix([path]) if path in self.held.matrices else None

    def _matrix(self, paths: Sequence[str]) -> Linear:
        """One matrix with the rows of all ``paths``."""
        held, first = self.held, paths[0]
        parts = [held.matrices[path] for path in paths]
        arrays: dict[str, mx.array] = {}
        rows = sum(part.out_features for part in parts)
        for field in held.fields(first):
            dtype = held.memory_dtype(first, field)
            arrays[field] = array = allocate((rows, held.columns(parts[0], field)), dtype)
            above = 0
            for part in parts:
                (at,) = held.places(part.path, field)
                self.ranges.append(ReadRange(array, above, dtype, at.info, at.start, at.stop, at.columns))
                above += part.out_features
        return Linear(arrays, self.specs[first], self.products)

    def _norm(self, path: str) -> RMSNorm:
        array = allocate((self.held.norms[path].size,), self.dtype)
        info = self.checkpoint[f"{path}.weight"]
        self.ranges.append(ReadRange(array, 0, self.dtype, info, 0, 1))
        return RMSNorm(array, self.config.rms_norm_eps)

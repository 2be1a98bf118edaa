"""What a memory budget has to hold besides experts: KV cache, working memory, buffers for reading. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_mixtral.budget.slots import ModelSizes, min_expert_bytes
from mlx_mixtral.cache.options import STEP_TOKENS, KVOptions
from mlx_mixtral.cache.quantized import PACKED_QUERIES
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import MemoryBudgetError
from mlx_mixtral.sizes import format_bytes, format_bytes_up

__all__ = [
    "DEFAULT_CONTEXT_TOKENS",
    "MAX_CHUNK_TOKENS",
    "MIN_CHUNK_TOKENS",
    "RESIDENT_CHUNK_TOKENS",
    "MemoryNeeds",
]

DEFAULT_CONTEXT_TOKENS = 4096
# A chunk of the prompt reads every missing expert once: long chunks read less, short ones need less memory.
MIN_CHUNK_TOKENS, RESIDENT_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 32, 1024, 4096
# Of a budget that cannot hold everything, the share working memory may take beyond its least.
WORKING_SHARE = 0.06


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes a model needs beside its weights.

    Args:
        context_tokens: tokens of KV cache.
        item_bytes: of a number in the compute type.
        keeps_scores: whether attention holds the scores of a step, as on the CPU backend; kernels of GPUs do not.
        reading_bytes: buffers of the threads that read experts.
        kv: how keys and values are kept.
        product_bytes: buffers of the threads that multiply, which do it in float32; 0 where MLX's kernels do.
        adapter_bytes: of adapters that are loaded with it.
    """

    config: MixtralConfig
    sizes: ModelSizes
    context_tokens: int
    item_bytes: int
    keeps_scores: bool
    reading_bytes: int = 0
    kv: KVOptions = field(default_factory=KVOptions)
    product_bytes: int = 0
    adapter_bytes: int = 0

    @property
    def context_capacity(self) -> int:
        """Tokens a sequence can have: ``context_tokens`` in whole steps, or the model's own where a window bounds memory."""
        if self.kv_columns < -(-self.context_tokens // STEP_TOKENS) * STEP_TOKENS:
            return self.config.max_context_tokens
        return self.kv_columns

    @property
    def kv_columns(self) -> int:
        """Tokens the KV cache is allocated for at most."""
        return self.kv.columns(self.config, self.context_tokens)

    @property
    def kv_bytes(self) -> int:
        """Of the cache, and of one layer's while it grows."""
        layers = self.config.num_hidden_layers
        return self.kv_columns * self.kv.bytes_per_token(self.config, self.item_bytes) * (layers + 1) // layers

    def working_bytes(self, chunk_tokens: int) -> int:
        """What computing needs for a while: a chunk of the prompt, one step's logits and their sampling."""
        c = self.config
        tokens = min(chunk_tokens, self.context_tokens)
        unpacked = self.kv.unpacked_bytes(c, self.item_bytes, self.kv_columns + tokens)
        heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        attention = 2 * heads + 3 * c.num_attention_heads * c.head_dim
        experts = c.num_experts_per_tok * (3 * c.hidden_size + 4 * c.intermediate_size)
        # A prompt's products are float32 on the CPU, whatever goes in and out.
        item_bytes = self.item_bytes if not self.product_bytes else max(self.item_bytes, 4)
        a_token = (max(attention, experts) + 6 * c.hidden_size) * item_bytes
        scores = 3 * 4 * c.num_attention_heads * self.context_tokens if self.keeps_scores else 0
        if self.kv.bits is not None:
            scores *= min(tokens, PACKED_QUERIES)
        return tokens * a_token + unpacked + scores + 16 * 4 * c.vocab_size + self.product_bytes

    @property
    def resident_bytes(self) -> int:
        """With all experts resident."""
        experts = sum(nbytes * self.sizes.num_experts for nbytes in self.sizes.expert_bytes)
        return self._held_bytes + experts + self.kv_bytes + self.working_bytes(RESIDENT_CHUNK_TOKENS)

    @property
    def min_bytes(self) -> int:
        """With as few experts and as short chunks as can be."""
        return self._fixed_bytes(MIN_CHUNK_TOKENS) + min_expert_bytes(self.sizes)

    def chunk_tokens(self, budget_bytes: int) -> int:
        """The chunk a budget that cannot hold everything has room for."""
        smallest = self.working_bytes(MIN_CHUNK_TOKENS)
        room = min(smallest + int(WORKING_SHARE * budget_bytes), smallest + budget_bytes - self.min_bytes)
        chunk = MAX_CHUNK_TOKENS
        while chunk > MIN_CHUNK_TOKENS and self.working_bytes(chunk) > room:
            chunk //= 2
        return chunk

    def room_for_experts(self, budget_bytes: int, chunk_tokens: int) -> int:
        """What a budget leaves to expert slots.

        Raises:
            MemoryBudgetError: it is below the least the model can do with, which is named with its parts.
        """
        if budget_bytes < self.min_bytes:
            parts = [
                f"{format_bytes(self.sizes.trunk_bytes)} of weights that are always needed",
                f"{format_bytes(self.kv_bytes)} of KV cache for {self.context_tokens} tokens",
                f"{format_bytes(self.working_bytes(MIN_CHUNK_TOKENS) + self.reading_bytes)} of working memory",
            ]
            if experts := min_expert_bytes(self.sizes):
                parts.insert(1, f"{format_bytes(experts)} for the experts of one token")
            if self.adapter_bytes:
                parts.insert(1, f"{format_bytes(self.adapter_bytes)} of adapters")
            raise MemoryBudgetError(
                f"a budget of {format_bytes(budget_bytes)} is too small: the minimum is {format_bytes_up(self.min_bytes)}: "
                f"{', '.join(parts)}; give a larger budget or a smaller context"
            )
        return budget_bytes - self._fixed_bytes(chunk_tokens)

    def _fixed_bytes(self, chunk_tokens: int) -> int:
        return self._held_bytes + self.kv_bytes + self.working_bytes(chunk_tokens) + self.reading_bytes

    @property
    def _held_bytes(self) -> int:
        return self.sizes.trunk_bytes + self.adapter_bytes

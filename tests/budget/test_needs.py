"""What a budget has to hold beside experts, part by part: each counted where it is needed and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_mixtral.budget.needs import MIN_CHUNK_TOKENS, RESIDENT_CHUNK_TOKENS, MemoryNeeds
from mlx_mixtral.budget.slots import ModelSizes, min_expert_bytes
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.cache.quantized import PACKED_QUERIES
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import MemoryBudgetError

CONFIG = MixtralConfig.from_hf(
    {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 1000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
)  # fmt: skip
SIZES = ModelSizes(10**6, (1000,) * 4, (1000,) * 4, (0,) * 4, 8, 2)


def needs(**changes: Any) -> MemoryNeeds:
    return replace(MemoryNeeds(CONFIG, SIZES, 1000, 2, False), **changes)


def test_scores_of_a_step_count_where_attention_holds_them() -> None:
    """Three float32 numbers for each head and token in sight: scores, their exponentials, and the mask applied."""
    for context in (256, 1000, 4096):
        with_scores = needs(keeps_scores=True, context_tokens=context)
        without = needs(context_tokens=context)
        for chunk in (1, 32, 1024):
            assert with_scores.working_bytes(chunk) - without.working_bytes(chunk) == 3 * 4 * 8 * context
    assert needs(keeps_scores=True).min_bytes - needs().min_bytes == 3 * 4 * 8 * 1000
    assert needs(keeps_scores=True).resident_bytes - needs().resident_bytes == 3 * 4 * 8 * 1000
    room = [one.room_for_experts(10**9, 32) for one in (needs(), needs(keeps_scores=True))]
    assert room[0] - room[1] == 3 * 4 * 8 * 1000


def test_scores_over_packed_keys_count_for_as_many_queries_as_are_computed_at_once() -> None:
    packed = KVOptions(bits=8)
    for chunk, queries in ((1, 1), (PACKED_QUERIES, PACKED_QUERIES), (1024, PACKED_QUERIES)):
        with_scores = needs(keeps_scores=True, kv=packed).working_bytes(chunk)
        assert with_scores - needs(kv=packed).working_bytes(chunk) == 3 * 4 * 8 * 1000 * queries
    assert PACKED_QUERIES > 1


def test_the_cache_is_whole_steps_of_all_layers_and_one_layer_more_while_it_grows() -> None:
    # 2 key-value heads of 64, keys and values, 2 bytes, 4 layers; 1000 tokens take four steps of 256.
    assert needs().kv_bytes == 1024 * (2 * 2 * 64 * 2) * 5
    assert needs(context_tokens=1024).kv_bytes == needs().kv_bytes
    assert needs(context_tokens=1025).kv_bytes == needs().kv_bytes * 5 // 4


def test_keys_that_are_unpacked_to_be_used_count_once_for_the_layer_at_hand() -> None:
    a_layer = 2 * 2 * 64 * 2
    plain, eight, half = needs(), needs(kv=KVOptions(bits=8)), needs(kv=KVOptions(bits=16))
    assert eight.working_bytes(100) - plain.working_bytes(100) == (1024 + 100) * a_layer
    assert half.working_bytes(100) == plain.working_bytes(100)
    wide = needs(kv=KVOptions(bits=16), item_bytes=4)
    assert wide.working_bytes(100) - needs(item_bytes=4).working_bytes(100) == (1024 + 100) * 2 * a_layer


def test_products_on_the_cpu_are_float32_and_have_buffers() -> None:
    plain, four = needs(), needs(item_bytes=4)
    on_cpu = needs(product_bytes=5000)
    for chunk in (32, 1000):
        assert on_cpu.working_bytes(chunk) == four.working_bytes(chunk) + 5000
        assert on_cpu.working_bytes(chunk) > plain.working_bytes(chunk) + 5000
    assert needs(item_bytes=4, product_bytes=5000).working_bytes(32) == four.working_bytes(32) + 5000


def test_buffers_that_experts_are_read_into_count_only_where_experts_are_read() -> None:
    reading = needs(reading_bytes=7000)
    assert reading.min_bytes - needs().min_bytes == 7000
    assert needs().room_for_experts(10**9, 32) - reading.room_for_experts(10**9, 32) == 7000
    assert reading.resident_bytes == needs().resident_bytes


def test_a_chunk_is_no_longer_than_the_context() -> None:
    assert needs(context_tokens=40).working_bytes(4096) == needs(context_tokens=40).working_bytes(40)
    assert needs().working_bytes(64) > needs().working_bytes(32)


def test_a_window_bounds_the_cache_and_not_the_length_of_a_sequence() -> None:
    bounded = needs(kv=KVOptions(size=100), context_tokens=4096)
    assert bounded.kv_columns < 256
    assert bounded.context_capacity == 8192
    # A context that the window holds as a whole is bounded as without a window.
    assert needs(kv=KVOptions(size=5000), context_tokens=1000).context_capacity == 1024
    assert needs().context_capacity == 1024


def test_the_least_is_its_parts_and_one_byte_less_is_refused() -> None:
    least = needs(reading_bytes=7000)
    parts = SIZES.trunk_bytes + least.kv_bytes + least.working_bytes(MIN_CHUNK_TOKENS) + 7000 + min_expert_bytes(SIZES)
    assert least.min_bytes == parts
    assert least.room_for_experts(parts, MIN_CHUNK_TOKENS) == min_expert_bytes(SIZES)
    with pytest.raises(MemoryBudgetError, match="the minimum is"):
        least.room_for_experts(parts - 1, MIN_CHUNK_TOKENS)
    everything = SIZES.trunk_bytes + 4 * 8 * 1000 + least.kv_bytes + least.working_bytes(RESIDENT_CHUNK_TOKENS)
    assert least.resident_bytes == everything


def test_the_chunk_takes_a_share_of_the_budget_and_nothing_that_experts_need() -> None:
    one = needs(context_tokens=8192)
    assert one.chunk_tokens(one.min_bytes) == MIN_CHUNK_TOKENS
    assert one.chunk_tokens(100 * one.min_bytes) == 4096
    for budget in range(one.min_bytes, 4 * one.min_bytes, one.min_bytes // 7):
        chunk = one.chunk_tokens(budget)
        extra = one.working_bytes(chunk) - one.working_bytes(MIN_CHUNK_TOKENS)
        assert extra <= 0.06 * budget
        assert one.room_for_experts(budget, chunk) >= min_expert_bytes(SIZES)

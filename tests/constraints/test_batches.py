"""Constraints in batches: beside others, and beside rows without one, each row is what it is alone, to the bit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_mixtral import Mixtral, SamplingParams
from mlx_mixtral.constraints.specs import JsonSchema, Regex

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}
LIST = {"type": "object", "properties": {"k": {"type": "array", "items": {"type": "number"}}}, "required": ["k"]}


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 4}], ids=str)
def test_rows_under_constraints_equal_themselves_alone(model: Mixtral, params: dict[str, Any]) -> None:
    """Two of them are closed early, to fit ``max_tokens``: a token takes the place of another while a step is under way."""
    sampling = SamplingParams(logprobs=0, **params)
    each: list[Any] = [
        {"constraint": JsonSchema(OBJECT)},
        {"constraint": JsonSchema(OBJECT), "max_tokens": 14},
        {"constraint": JsonSchema(LIST), "max_tokens": 14},
        {"constraint": Regex("[a-c]{3}-[0-9]{2}")},
        {},
    ]
    prompts = [f"Give {number} json: " for number in range(len(each))]
    found = model.generate_batch(prompts, each=each, max_tokens=30, sampling=sampling)
    for prompt, own, row in zip(prompts, each, found, strict=True):
        model.engine.prompt_cache.clear()
        alone = model.generate(prompt, **{"max_tokens": 30, "sampling": sampling} | own)
        assert (row.token_ids, row.logprobs, row.finish_reason) == (
            alone.token_ids,
            alone.logprobs,
            alone.finish_reason,
        )
    for row in found[:3]:
        json.loads(row.text)
    assert [row.finish_reason for row in found[1:3]] == ["length"] * 2

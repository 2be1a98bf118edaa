"""What tasks say of generating."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_mixtral import SamplingParams
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.harness.generation_kwargs import GenerationSettings


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0),
        ({"do_sample": False, "temperature": 0.8}, 0),
        ({"temperature": 0.8}, 0.8),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"do_sample": True}, 1),
        ({"do_sample": None, "temperature": None}, 0),
    ],
)
def test_a_temperature_is_that_of_sampling_alone(given: dict[str, Any], temperature: float) -> None:
    assert GenerationSettings.of(given).sampling(3).temperature == temperature


def test_names_that_other_backends_have_for_the_limit_are_known() -> None:
    assert GenerationSettings.of({}).max_tokens == 256
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert GenerationSettings.of({name: 7}).max_tokens == 7
    assert GenerationSettings.of({"max_new_tokens": 7, "max_gen_toks": 9}).max_tokens == 9


def test_sampling_takes_what_the_task_says() -> None:
    given = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "until": "\n", "num_beams": 1}
    settings = GenerationSettings.of(given)
    assert settings.sampling(5) == SamplingParams(temperature=0.7, top_p=0.9, top_k=40, seed=5)
    assert settings.until == ("\n",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "num_beams is 4, which is not supported"),
        ({"until": 3}, "until is 3"),
        ({"until": ["a", 3]}, "until is"),
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many'; it must be a number"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0; it must be at least 1"),
        ({"temperature": True}, "temperature is True"),
    ],
)
def test_settings_that_are_not_known_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        GenerationSettings.of(given)

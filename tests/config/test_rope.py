"""Rotary frequencies against a float64 derivation from the papers' formulas, pair by pair.

Each oracle below is written from its source: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), NTK-aware
dynamic scaling (2309.00071, section 3.3), YaRN (2309.00071, sections 3.2 and 3.4), LongRoPE (2402.13753) and Llama 3.1's
published code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.rope import RopeConfig
from mlx_mixtral.errors import ConfigError


def _plain(pair: int, dims: int, theta: float) -> float:
    return math.exp(-2 * pair / dims * math.log(theta))


def _linear(pair: int, dims: int, theta: float, factor: float) -> float:
    """A position is divided by the factor, which divides every angle."""
    return _plain(pair, dims, theta) / factor


def _dynamic(pair: int, dims: int, theta: float, factor: float, trained: int, length: int) -> float:
    """The base grows with the length once it is past what was trained, so that the slowest pair is stretched enough."""
    if length > trained:
        theta *= (factor * length / trained - (factor - 1)) ** (dims / (dims - 2))
    return _plain(pair, dims, theta)


def _yarn(
    pair: int, dims: int, theta: float, factor: float, trained: int, fast: float, slow: float, truncate: bool
) -> float:
    """NTK by parts: pairs that turn often are left alone, seldom-turning ones interpolated, a ramp over the index between."""

    def index_turning(times: float) -> float:
        # r = trained * theta^(-2i/d) / 2 pi, solved for i.
        return dims / 2 * math.log(trained / (2 * math.pi * times)) / math.log(theta)

    low, high = index_turning(fast), index_turning(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    share = min(max((pair - low) / ((high - low) or 0.001), 0.0), 1.0)
    frequency = _plain(pair, dims, theta)
    return share * frequency / factor + (1 - share) * frequency


def _llama3(
    pair: int, dims: int, theta: float, factor: float, low_factor: float, high_factor: float, trained: int
) -> float:
    frequency = _plain(pair, dims, theta)
    turns = trained * frequency / (2 * math.pi)
    if turns < low_factor:
        return frequency / factor
    if turns > high_factor:
        return frequency
    smooth = (turns - low_factor) / (high_factor - low_factor)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _frequencies(entries: dict[str, Any], context: int, dims: int, length: int = 1) -> np.ndarray[Any, Any]:
    frequencies = RopeConfig.from_hf(entries, 1e6, context).inverse_frequencies(dims, length)
    assert frequencies.dtype == np.float32
    assert frequencies.shape == (dims // 2,)
    return frequencies


def _agree(got: np.ndarray[Any, Any], oracle: Callable[[int], float]) -> None:
    wanted = np.array([oracle(pair) for pair in range(got.size)])
    np.testing.assert_allclose(got, wanted, rtol=3e-6)


@pytest.mark.parametrize("theta", [1e4, 1e6, 20.0])
@pytest.mark.parametrize("dims", [2, 16, 128])
def test_default_and_linear_frequencies_follow_the_papers(theta: float, dims: int) -> None:
    entries: dict[str, Any] = {"rope_theta": theta}
    _agree(_frequencies(entries, 256, dims), lambda i: _plain(i, dims, theta))
    entries |= {"rope_scaling": {"type": "linear", "factor": 4.0}}
    _agree(_frequencies(entries, 256, dims, 10_000), lambda i: _linear(i, dims, theta, 4.0))


@pytest.mark.parametrize("length", [1, 64, 65, 100, 256, 10_000])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8])
def test_dynamic_frequencies_stretch_past_the_trained_context_only(length: int, factor: float) -> None:
    got = _frequencies({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": factor}}, 64, 16, length)
    _agree(got, lambda i: _dynamic(i, 16, 1e4, factor, 64, length))


@pytest.mark.parametrize("theta", [1e4, 1e6, 20.0])
@pytest.mark.parametrize("trained", [16, 4096])
@pytest.mark.parametrize(("fast", "slow"), [(None, None), (32, 1), (8.0, 2.0)])
@pytest.mark.parametrize("truncate", [True, False, None])
def test_yarn_frequencies_follow_the_paper(
    theta: float, trained: int, fast: float | None, slow: float | None, truncate: bool | None
) -> None:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": trained}
    scaling |= {"rope_theta": theta, "beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    got = _frequencies({"rope_parameters": scaling}, 32768, 64)
    _agree(got, lambda i: _yarn(i, 64, theta, 4.0, trained, fast or 32, slow or 1, truncate is not False))


def test_yarn_with_equal_ends_of_the_ramp_has_no_singularity() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1}
    got = _frequencies({"rope_theta": 1e4, "rope_parameters": scaling}, 64, 16)
    assert np.isfinite(got).all()
    _agree(got, lambda i: _yarn(i, 16, 1e4, 4.0, 1, 32, 1, True))


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("trained", [64, 8192])
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1, 32)])
def test_llama3_frequencies_follow_the_published_code(theta: float, trained: int, low: float, high: float) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": trained,
    }  # fmt: skip
    got = _frequencies({"rope_theta": theta, "rope_scaling": scaling}, 131072, 128)
    _agree(got, lambda i: _llama3(i, 128, theta, 8.0, low, high, trained))


def test_longrope_takes_the_long_factors_past_the_original_context() -> None:
    short, long = [1.0 + i / 10 for i in range(8)], [3.0 + i for i in range(8)]
    scaling = {"type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": 32}
    for length in (1, 32):
        _agree(
            _frequencies({"rope_theta": 1e4, "rope_scaling": scaling}, 128, 16, length),
            lambda i: _plain(i, 16, 1e4) / short[i],
        )
    for length in (33, 500):
        _agree(
            _frequencies({"rope_theta": 1e4, "rope_scaling": scaling}, 128, 16, length),
            lambda i: _plain(i, 16, 1e4) / long[i],
        )


def test_longrope_with_a_wrong_number_of_factors_says_how_many_it_needs() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0] * 5}
    config = RopeConfig.from_hf({"rope_scaling": scaling}, 1e4, 128)
    with pytest.raises(ConfigError, match="longrope needs 8 factors for heads of 16, not 5"):
        config.inverse_frequencies(16, 1)


@settings(max_examples=200, deadline=None)
@given(
    theta=st.floats(2.0, 1e7),
    factor=st.floats(1.0, 64.0),
    trained=st.integers(8, 65536),
    half=st.integers(1, 64),
    fast=st.floats(2.0, 64.0),
    slow=st.floats(0.25, 1.5),
)
def test_yarn_frequencies_lie_between_interpolated_and_plain(
    theta: float, factor: float, trained: int, half: int, fast: float, slow: float
) -> None:
    scaling = {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow, "truncate": False}
    scaling |= {"original_max_position_embeddings": trained, "rope_theta": theta}
    got = _frequencies({"rope_parameters": scaling}, 1 << 20, 2 * half).astype(np.float64)
    plain = np.array([_plain(i, 2 * half, theta) for i in range(half)])
    assert (got <= plain * (1 + 1e-5)).all()
    assert (got >= plain / factor * (1 - 1e-5)).all()


@pytest.mark.parametrize(
    ("scaling", "context", "wanted"),
    [
        ({"rope_type": "default"}, 64, 1.0),
        ({"rope_type": "linear", "factor": 8.0}, 64, 1.0),
        ({"rope_type": "dynamic", "factor": 8.0}, 64, 1.0),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}, 64, 1.0),
        # YaRN, equation 22: sqrt(1/t) = 0.1 ln(s) + 1.
        ({"rope_type": "yarn", "factor": 4.0}, 64, 0.1 * math.log(4) + 1),
        ({"rope_type": "yarn", "factor": 0.5}, 64, 1.0),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.75}, 64, 0.75),
        # DeepSeek's variant: the quotient of two of them; one alone is ignored.
        (
            {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.5},
            64,
            (0.0707 * math.log(40) + 1) / (0.05 * math.log(40) + 1),
        ),
        ({"rope_type": "yarn", "factor": 40.0, "mscale": 0.707}, 64, 0.1 * math.log(40) + 1),
        ({"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0}, 64, 0.1 * math.log(40) + 1),
        # LongRoPE: sqrt(1 + ln(s) / ln(original)), s from the contexts unless given.
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 128, math.sqrt(1 + math.log(4, 32))),
        (
            {"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 2.0},
            128,
            math.sqrt(1 + math.log(2, 32)),
        ),
        ({"rope_type": "longrope", "original_max_position_embeddings": 128}, 128, 1.0),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32, "attention_factor": 1.5}, 128, 1.5),
    ],
)
def test_attention_factors_follow_the_papers(scaling: dict[str, Any], context: int, wanted: float) -> None:
    if scaling["rope_type"] == "longrope":
        scaling = scaling | {"short_factor": [1.0], "long_factor": [2.0]}
    config = RopeConfig.from_hf({"rope_scaling": scaling}, 1e4, context)
    assert config.attention_factor() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "switch"),
    [
        (None, None),
        ({"type": "linear", "factor": 2.0}, None),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, None),
        ({"type": "dynamic", "factor": 2.0}, 64),
        (
            {"type": "longrope", "short_factor": [1], "long_factor": [2], "original_max_position_embeddings": 16},
            16,
        ),
        ({"type": "longrope", "short_factor": [1], "long_factor": [2]}, 64),
    ],
)
def test_frequencies_switch_with_length_for_dynamic_and_longrope_only(
    scaling: dict[str, Any] | None, switch: int | None
) -> None:
    assert RopeConfig.from_hf({"rope_scaling": scaling}, 1e4, 64).switches_at() == switch


@pytest.mark.parametrize(
    ("kind", "given", "absent"),
    [
        ("linear", {}, "factor"),
        ("dynamic", {}, "factor"),
        ("yarn", {"beta_fast": 32}, "factor"),
        ("longrope", {"short_factor": [1.0]}, "long_factor"),
        ("longrope", {"long_factor": [1.0]}, "short_factor"),
        ("llama3", {"low_freq_factor": 1, "high_freq_factor": 4}, "factor"),
        ("llama3", {"factor": 8.0, "high_freq_factor": 4}, "low_freq_factor"),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1}, "high_freq_factor"),
    ],
)
def test_a_missing_parameter_is_named(kind: str, given: dict[str, Any], absent: str) -> None:
    """One that is null as well."""
    scaling = given | {"rope_type": kind} | ({absent: None} if kind == "llama3" else {})
    with pytest.raises(ConfigError, match=f"{kind}.*{absent}"):
        RopeConfig.from_hf({"rope_scaling": scaling}, 1e4, 64)


@pytest.mark.parametrize("kind", ["mrope", "ntk", "", None, 3, ["yarn"], {}])
def test_an_unknown_kind_is_named(kind: Any) -> None:
    with pytest.raises(ConfigError, match="is not supported; supported kinds are default, linear") as caught:
        RopeConfig.from_hf({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, 1e4, 64)
    assert repr(kind) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "unknown"),
    [("linear", "beta_fast"), ("dynamic", "alpha"), ("yarn", "mscale_x"), ("llama3", "attention_factor")],
)
def test_a_parameter_the_kind_does_not_read_is_refused_by_name(kind: str, unknown: str) -> None:
    scaling = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4, unknown: 3.0}
    if kind != "llama3":
        del scaling["low_freq_factor"], scaling["high_freq_factor"]
    with pytest.raises(ConfigError, match=unknown):
        RopeConfig.from_hf({"rope_scaling": scaling}, 1e4, 64)


def test_partial_rotation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"partial_rotary_factor = 0\.5"):
        RopeConfig.from_hf({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, 1e4, 64)
    RopeConfig.from_hf({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, 1e4, 64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("factor", value) for value in ("2", 0, -1.0, True, [2.0], {}, float("nan"), float("inf"), 10**400)),
        *((key, "2") for key in ("rope_theta", "original_max_position_embeddings", "beta_fast")),
    ],
)
def test_malformed_parameters_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        RopeConfig.from_hf({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, key: value}}, 1e4, 64)


@pytest.mark.parametrize("value", [[1.0, "2"], [1.0, 0], [[1.0]], [None], 0])
def test_malformed_longrope_factors_are_refused(value: Any) -> None:
    scaling = {"rope_type": "longrope", "short_factor": value, "long_factor": [1.0]}
    with pytest.raises(ConfigError, match="short_factor"):
        RopeConfig.from_hf({"rope_scaling": scaling}, 1e4, 64)


@pytest.mark.parametrize("value", ["linear", 4.0, ["linear"], True])
def test_scaling_that_is_not_an_object_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="not an object"):
        RopeConfig.from_hf({"rope_scaling": value}, 1e4, 64)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_theta other than 1"),
        (
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]},
                "original_max_position_embeddings": 1,
            },
            "original_max_position_embeddings above 1",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 2, "high_freq_factor": 2.0}},
            "low_freq_factor and high_freq_factor to differ",
        ),
    ],
)
def test_values_at_which_a_formula_divides_by_zero_are_refused(entries: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RopeConfig.from_hf(entries, 1e4, 64)


@pytest.mark.parametrize(
    ("declared", "scaling", "reached"),
    [
        (32768, None, 32768),
        # As transformers documents `factor`: that many times the pretrained context, which is the declared one.
        (4096, {"type": "linear", "factor": 4.0}, 16384),
        (4096, {"type": "dynamic", "factor": 2.5}, 10240),
        (32768, {"type": "yarn", "factor": 4.0}, 131072),
        (4096, {"type": "linear", "factor": 0.5}, 4096),
        # Declared scaled already, or not: Qwen's instructions, DeepSeek V3, Yarn-Mistral-7b-128k.
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        (32768, {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192, "finetuned": True}, 131072),
        (16384, {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        # Llama 3.1 and 3.2 1B: 8192 times 32 would be 262144, which nobody says it is.
        (131072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        (131072, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),
        # Phi-3-mini-128k, by the old name too.
        (131072, {"type": "longrope", "original_max_position_embeddings": 4096}, 131072),
        (131072, {"type": "su", "original_max_position_embeddings": 4096}, 131072),
        (4096, {"type": "longrope", "factor": 32.0}, 131072),
        (4096, {"type": "dynamic", "factor": 1e6}, 2**24),
    ],
)
def test_the_context_reached_is_scaled_once(declared: int, scaling: dict[str, Any] | None, reached: int) -> None:
    if scaling is not None and scaling.get("type") in ("longrope", "su"):
        scaling = scaling | {"short_factor": [1.0], "long_factor": [2.0]}
    if scaling is not None and scaling.get("rope_type") == "llama3":
        scaling = scaling | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert RopeConfig.from_hf({"rope_scaling": scaling}, 1e4, declared).max_context_tokens == reached


def test_su_is_longrope_by_its_first_name() -> None:
    entries = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 16}
    old, new = (RopeConfig.from_hf({"rope_scaling": entries | {"type": kind}}, 1e4, 64) for kind in ("su", "longrope"))
    assert old == new


EXTREMES = [0.5, 0.999, 1e-300, 1e-12, 1e7, 1e13, 1e38, 1e308]
NUMBERS = st.one_of(st.sampled_from([*EXTREMES, 1.0, 1.0001, 2.0, 1e3, 1e6, 1e12]), st.floats(1e-3, 1e12))
SCALINGS = st.one_of(
    st.fixed_dictionaries({"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": NUMBERS}),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": NUMBERS},
        optional=dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"), NUMBERS),
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("llama3")}
        | dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), NUMBERS)
        | {"original_max_position_embeddings": st.sampled_from([1, 2, 64, 8192, 2**24])}
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("longrope")}
        | {key: st.lists(NUMBERS, min_size=16, max_size=16) for key in ("long_factor", "short_factor")}
        | {"original_max_position_embeddings": st.sampled_from([2, 64, 8192])}
    ),
)


@settings(max_examples=150, deadline=None)
@given(theta=NUMBERS, scaling=SCALINGS, length=st.sampled_from([1, 2, 1000, 2**24]))
def test_a_configuration_has_frequencies_that_are_numbers_or_is_refused(
    theta: float, scaling: dict[str, Any], length: int
) -> None:
    """Where it is made, for every command: nothing overflows later, and numpy warns of nothing."""
    entries = {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": length,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            config = MixtralConfig.from_hf(entries | {"rope_theta": theta, "rope_scaling": scaling})
        except ConfigError:
            return
        for seen in (1, length // 2, length):
            found = config.rope.inverse_frequencies(32, seen) * np.float32(config.rope.attention_factor())
            assert np.isfinite(found).all()
            assert (found > 0).all()


@pytest.mark.parametrize("value", EXTREMES)
def test_an_absurd_base_or_factor_is_refused_with_its_range(value: float) -> None:
    if not 1 <= value <= 1e12:
        with pytest.raises(ConfigError, match=r"rope_theta is .* from 1 to 1e\+12"):
            RopeConfig.from_hf({"rope_theta": value}, 1e4, 64)
    if not 1e-3 <= value <= 1e6:
        with pytest.raises(ConfigError, match=r"factor is .* from 0\.001 to 1e\+06"):
            RopeConfig.from_hf({"rope_scaling": {"type": "yarn", "factor": value}}, 1e4, 64)


def test_factors_for_heads_of_another_size_are_refused_where_the_configuration_is_made() -> None:
    entries = {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    scaling = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
    with pytest.raises(ConfigError, match="longrope needs 16 factors for heads of 32, not 8"):
        MixtralConfig.from_hf(entries | {"rope_scaling": scaling})

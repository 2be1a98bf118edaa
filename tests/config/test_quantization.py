"""Quantised formats against what MLX itself accepts and the arrays it makes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_mixtral.config.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, MODES, QuantizationConfig, QuantizationSpec
from mlx_mixtral.errors import ConfigError

ALL = [
    *(QuantizationSpec(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES),
    *(QuantizationSpec.make(mode=mode) for mode in MODES if mode != "affine"),
]


def _mlx_takes(bits: int, group_size: int, mode: str) -> bool:
    try:
        mx.eval(mx.quantize(mx.zeros((1, 256)), group_size, bits, mode))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("mode", MODES)
def test_exactly_the_combinations_mlx_has_kernels_for_are_accepted(mode: Any) -> None:
    accepted = set()
    for bits in range(2, 10):
        for group_size in (8, 16, 32, 64, 128, 256):
            try:
                QuantizationSpec(bits, group_size, mode)
            except ConfigError:
                continue
            accepted.add((bits, group_size))
    assert accepted == {(b, g) for b in range(2, 10) for g in (8, 16, 32, 64, 128, 256) if _mlx_takes(b, g, mode)}


@pytest.mark.parametrize("spec", ALL, ids=str)
@pytest.mark.parametrize("in_features", [128, 384, 1024])
def test_sizes_are_those_of_the_arrays_mlx_makes(spec: QuantizationSpec, in_features: int) -> None:
    for dtype, scale_bytes in ((mx.float16, 2), (mx.float32, 4)):
        packed, scales, *biases = mx.quantize(
            mx.zeros((3, in_features), dtype), spec.group_size, spec.bits, mode=spec.mode
        )
        assert packed.dtype == mx.uint32
        assert packed.shape == (3, spec.packed_columns(in_features))
        assert scales.shape == (3, spec.groups(in_features))
        assert bool(biases) == spec.has_biases
        nbytes = packed.nbytes + scales.nbytes + sum(array.nbytes for array in biases)
        assert spec.nbytes(3, in_features, scale_bytes) == nbytes


def test_four_bits_in_groups_of_64_cost_four_and_a_half_bits() -> None:
    assert QuantizationSpec(4, 64).nbytes(1000, 4096) * 8 == 4.5 * 1000 * 4096


def test_a_mode_fills_in_its_own_bits_and_group() -> None:
    assert QuantizationSpec.make() == QuantizationSpec(4, 64, "affine")
    assert QuantizationSpec.make(8) == QuantizationSpec(8, 64)
    assert QuantizationSpec.make(group_size=32) == QuantizationSpec(4, 32)
    assert QuantizationSpec.make(mode="mxfp4") == QuantizationSpec(4, 32, "mxfp4")
    assert QuantizationSpec.make(mode="mxfp8") == QuantizationSpec(8, 32, "mxfp8")
    assert QuantizationSpec.make(mode="nvfp4") == QuantizationSpec(4, 16, "nvfp4")


@pytest.mark.parametrize(
    ("bits", "group_size", "mode", "said"),
    [
        (7, 64, "affine", "7 bits are not supported in affine mode; use 1, 2, 3, 4, 5, 6 or 8"),
        (4, 48, "affine", "group size 48 is not supported in affine mode; use 32, 64 or 128"),
        (8, 32, "mxfp4", "mxfp4 means 4 bits in groups of 32, not 8 bits in groups of 32; leave both out"),
        (4, 64, "nf4", "quantization mode 'nf4' is unknown; use one of affine, mxfp4, mxfp8, nvfp4"),
    ],
)
def test_errors_quote_the_value_and_the_choices(bits: int, group_size: int, mode: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantizationSpec(bits, group_size, mode)
    assert str(caught.value) == said
    with pytest.raises(ConfigError) as caught:
        QuantizationSpec.make(bits, group_size, mode)
    assert str(caught.value) == said


def test_rows_must_divide_into_groups_and_the_error_offers_those_that_fit() -> None:
    QuantizationSpec(4, 64).check_divides(128, "a")
    with pytest.raises(ConfigError, match="mlp: rows of 96 do not divide into groups of 64; use a group size of 32"):
        QuantizationSpec(4, 64).check_divides(96, "mlp")
    with pytest.raises(ConfigError, match="use a group size of 32 or 64"):
        QuantizationSpec(4, 128).check_divides(192, "mlp")
    with pytest.raises(ConfigError, match="leave it unquantised"):
        QuantizationSpec(4, 64).check_divides(100, "mlp")
    with pytest.raises(ConfigError, match="leave it unquantised"):
        QuantizationSpec.make(mode="mxfp4").check_divides(80, "mlp")


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_a_spec_survives_its_dictionary(spec: QuantizationSpec) -> None:
    assert QuantizationSpec.from_dict(spec.to_dict(), "here") == spec


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"bits": "4"}, "here: bits is '4', not an integer"),
        ({"bits": True}, "here: bits is True, not an integer"),
        ({"bits": 4.0}, "here: bits is 4.0, not an integer"),
        ({"group_size": [64]}, "here: group_size is"),
        ({"mode": 4}, "here: mode is 4, not a name"),
        ({"mode": ["affine"]}, "here: mode is"),
        ({"mode": "exl2"}, "exl2"),
        ({"bits": 10**30}, "bits are not supported"),
    ],
)
def test_a_malformed_entry_is_refused_with_its_place(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QuantizationSpec.from_dict(entry, "here")


def test_overrides_are_read_written_and_looked_up_by_module() -> None:
    entry = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "lm_head": {"group_size": 64, "bits": 8, "mode": "affine"},
        "model.layers.0.block_sparse_moe.gate": False,
    }
    config = QuantizationConfig.from_dict(entry)
    assert config.default == QuantizationSpec(4, 64)
    assert config.for_module("lm_head") == QuantizationSpec(8, 64)
    assert config.for_module("model.layers.0.block_sparse_moe.gate") is None
    assert config.for_module("model.layers.1.block_sparse_moe.gate") == QuantizationSpec(4, 64)
    assert config.to_dict() == entry
    assert QuantizationConfig.from_dict(config.to_dict()) == config


def test_an_override_without_a_mode_or_size_takes_the_defaults_of_mlx() -> None:
    config = QuantizationConfig.from_dict({"group_size": 32, "bits": 8, "a": {"bits": 6}, "b": {"mode": "mxfp8"}})
    assert config.for_module("a") == QuantizationSpec(6, 64)
    assert config.for_module("b") == QuantizationSpec(8, 32, "mxfp8")


def test_an_override_that_cannot_be_read_names_its_module() -> None:
    with pytest.raises(ConfigError, match=r"quantization of model\.embed_tokens: bits"):
        QuantizationConfig.from_dict({"bits": 4, "model.embed_tokens": {"bits": "six"}})


def test_a_spec_is_written_as_people_say_it() -> None:
    assert str(QuantizationSpec(4, 64)) == "4-bit g64"
    assert str(QuantizationSpec.make(mode="nvfp4")) == "nvfp4"

"""Rope scaling in tensors of a GGUF file: what the frequencies are divided by, read back as the configuration that gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral import load
from mlx_mixtral.config.rope import RopeConfig
from mlx_mixtral.errors import CheckpointError, ConfigError, MixtralError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.sources import open_source
from mlx_mixtral_convert.sources.gguf.rope import scaling_of_factors
from tests.convert.export_support import add_tokenizer
from tests.convert.gguf_writer import hub_tensors, renamed, write_gguf
from tests.convert.support import CONFIG, make_checkpoint, weights

Floats = npt.NDArray[np.float32]
TOKENS = [1, 5, 9, 33, 2, 60, 41, 8, 30, 17]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def divisors(dims: int, theta: float, factor: float, low: float, high: float, original: int) -> npt.NDArray[np.float64]:
    """The loop of llama.cpp's convert_hf_to_gguf.py."""
    found = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * theta ** (i / dims)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(found)


def frequencies(scaling: Any, dims: int, theta: float, context: int, length: int = 1) -> Floats:
    rope = RopeConfig.from_hf({"rope_scaling": scaling} if scaling else {}, theta, context)
    assert rope.attention_factor() == 1
    return rope.inverse_frequencies(dims, length)


@pytest.mark.parametrize(
    ("dims", "theta", "factor", "low", "high", "original"),
    [
        (128, 5e5, 8.0, 1.0, 4.0, 8192),
        (128, 5e5, 32.0, 1.0, 4.0, 8192),
        (64, 5e5, 32.0, 1.0, 4.0, 8192),
        (128, 1e6, 4.0, 1.0, 8.0, 32768),
        (128, 1e4, 16.0, 2.0, 6.0, 4096),
        (128, 5e5, 8.0, 0.5, 3.5, 5000),
        (32, 1e6, 8.0, 1.0, 4.0, 64),
        (16, 1e6, 8.0, 1.0, 4.0, 8192),
        (8, 1e6, 8.0, 1.0, 4.0, 8192),
    ],
)
def test_llama_3s_parameters_are_found_again(
    dims: int, theta: float, factor: float, low: float, high: float, original: int
) -> None:
    found = divisors(dims, theta, factor, low, high, original)
    scaling = scaling_of_factors(None, {"rope_freqs": found.astype(np.float32)}, theta, 131072, 1.0)
    assert scaling is not None
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", factor)
    plain = theta ** (-np.arange(0, dims, 2) / dims)
    np.testing.assert_allclose(frequencies(scaling, dims, theta, 131072), plain / found, rtol=2e-6)
    if (np.abs(found - 1) > 1e-3).sum() - (np.abs(found - factor) < 1e-3).sum() > 1:
        assert scaling["high_freq_factor"] == pytest.approx(high / low)
        assert scaling["original_max_position_embeddings"] == round(original / low)


@pytest.mark.parametrize("scaling", [LLAMA3, LLAMA3 | {"factor": 3.0, "original_max_position_embeddings": 48}])
def test_what_is_exported_comes_back_with_the_same_logits(tmp_path: Path, scaling: dict[str, Any]) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source", rope_scaling=scaling, max_position_embeddings=512))
    export(source, tmp_path / "out.gguf", to="gguf", type="BF16")
    convert(tmp_path / "out.gguf", tmp_path / "back", recipe=Recipe(bits=None), dtype="float32")
    with load(source, dtype="float32") as before, load(tmp_path / "back", dtype="float32") as after:
        for rope in (before.config.rope, after.config.rope):
            assert {**(rope.parameters or {})} == {key: scaling[key] for key in rope.parameters or {}}
            assert (rope.kind, rope.original) == ("llama3", scaling["original_max_position_embeddings"])
        np.testing.assert_array_equal(before.logits(TOKENS), after.logits(TOKENS))


def with_tensors(
    path: Path, tensors: dict[str, Any], keys: Callable[[gguf.GGUFWriter], None] | None = None
) -> tuple[Path, dict[str, Any]]:
    """A model with further tensors, and what its own mean under the hub's names."""
    own = write_gguf(path, CONFIG, renamed(weights(CONFIG), CONFIG) | tensors, keys=keys)
    return path, hub_tensors({name: own[name] for name in renamed(weights(CONFIG), CONFIG)}, CONFIG)


def same_logits(path: Path, meant: dict[str, Any], scaling: dict[str, Any]) -> None:
    """Converted, the file computes what the hub's folder of the same weights and this scaling does."""
    folder = path.parent
    convert(path, folder / "out", recipe=Recipe(bits=None), dtype="float32")
    make_checkpoint(folder / "hub", dtype="F32", edit=lambda held: held.update(meant), rope_scaling=scaling)
    with load(folder / "out", dtype="float32") as ours, load(folder / "hub", dtype="float32") as theirs:
        np.testing.assert_allclose(ours.logits(TOKENS), theirs.logits(TOKENS), atol=1e-5)


@pytest.mark.parametrize("names", [["rope_freqs"], ["blk.0.rope_freqs", "blk.1.rope_freqs"]])
def test_one_divisor_for_all_is_linear_scaling(tmp_path: Path, names: list[str]) -> None:
    tensors = {f"{name}.weight": np.full(16, 4, np.float32) for name in names}
    same_logits(*with_tensors(tmp_path / "m.gguf", tensors), {"rope_type": "linear", "factor": 4.0})


def test_divisors_and_linear_scaling_multiply(tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    tensors = {"rope_freqs.weight": np.full(16, 3, np.float32)}
    same_logits(*with_tensors(tmp_path / "m.gguf", tensors, keys), {"rope_type": "linear", "factor": 6.0})


def test_divisors_of_no_pattern_are_kept_as_they_are_and_go_back(tmp_path: Path) -> None:
    random = np.random.default_rng(5).uniform(0.5, 9, 16).astype(np.float32)
    path, _ = with_tensors(tmp_path / "m.gguf", {"rope_freqs.weight": random})
    convert(path, tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    export(add_tokenizer(tmp_path / "out"), tmp_path / "again.gguf", to="gguf", type="BF16")
    for file in (path, tmp_path / "again.gguf"):
        with open_source(file) as source:
            found = source.config.rope.inverse_frequencies(32, 1), source.config.rope.inverse_frequencies(32, 9999)
            np.testing.assert_array_equal(found[0], found[1])
            np.testing.assert_allclose(found[0], 1e6 ** (-np.arange(0, 32, 2) / 32) / random, rtol=1e-6)
            assert source.config.rope.attention_factor() == 1


def test_factors_for_short_and_long_texts_are_longrope(tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(4)
        writer.add_rope_scaling_attn_factors(1.25)

    short, long = np.linspace(1, 2, 16, dtype=np.float32), np.linspace(1, 30, 16, dtype=np.float32)
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    path, meant = with_tensors(tmp_path / "m.gguf", tensors, keys)
    same_logits(path, meant, {
        "rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(), "attention_factor": 1.25,
        "original_max_position_embeddings": 4,
    })  # fmt: skip


YARN = gguf.RopeScalingType.YARN
ONE = np.full(16, 8, np.float32)


@pytest.mark.parametrize(
    ("tensors", "keys", "error", "match"),
    [
        ({"rope_freqs": ONE}, lambda w: (w.add_rope_scaling_type(YARN), w.add_rope_scaling_factor(4.0)), ConfigError,
         "'rope_freqs.weight' scales the rotary frequencies, and rope.scaling.type 'yarn' does too"),
        ({"rope_freqs": ONE[:8]}, None, CheckpointError, "has 8 values; the configuration calls for 16"),
        ({"rope_freqs": ONE * np.nan}, None, ConfigError, "holds a divisor that is not a positive number"),
        ({"rope_freqs": ONE * 0}, None, ConfigError, "holds a divisor that is not a positive number"),
        ({"rope_freqs": np.ones((2, 16))}, None, CheckpointError, "a divisor for each rotary frequency was expected"),
        ({"blk.0.rope_freqs": ONE, "blk.1.rope_freqs": ONE * 2}, None, ConfigError, "differs from that of another layer"),
        ({"rope_factors_long": ONE}, None, ConfigError, "rope_factors_long and rope_factors_short belong together"),
        ({"rope_freqs": ONE}, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), ConfigError, "'longrope' does"),
        ({}, lambda w: w.add_rope_scaling_attn_factors(1.5), ConfigError, "attn_factor without longrope's tensors"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(
    tmp_path: Path, tensors: dict[str, Any], keys: Any, error: type[MixtralError], match: str
) -> None:
    path, _ = with_tensors(tmp_path / "m.gguf", {f"{name}.weight": value for name, value in tensors.items()}, keys)
    with pytest.raises(error, match=match):
        open_source(path)


def test_divisors_of_one_change_nothing(tmp_path: Path) -> None:
    path, _ = with_tensors(tmp_path / "m.gguf", {"rope_freqs.weight": np.ones(16, np.float32)})
    with open_source(path) as source:
        assert source.config.rope.kind == "default"
        assert "rope_scaling" not in source.entries

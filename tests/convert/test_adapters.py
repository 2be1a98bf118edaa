"""Adapters fused by a conversion: the weights are those of plain arithmetic, and the logits those of mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from mlx_mixtral import AdapterSource, load
from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert import Recipe, convert, verify
from tests.adapters import goldens
from tests.convert.adapted_sources import FLOATS, SOURCES, base_of, place
from tests.convert.adapter_writer import (
    ATTENTION,
    EVERYTHING,
    EXPERTS,
    Changes,
    fused_by_hand,
    write_mlx_adapter,
)
from tests.convert.support import CONFIG, dense_config, hashes, make_checkpoint, read_output

DENSE = CONFIG | dense_config() | {"tie_word_embeddings": False}
LOGITS = 5e-5
WITH_BIAS = ("v4-bias",)
IN_MLX_LM = ("mlx-lora", "v4-experts", "v4-dora-experts", "v4-saved", "v4-tokens", "new-stacks", "v4-dense")


def same(found: dict[str, mx.array], wanted: dict[str, Any]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, value in found.items():
        np.testing.assert_allclose(np.array(value), wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


def logits(folder: Path, adapter: Path | None = None) -> Any:
    """mlx-lm's, in float32."""
    network, _ = load_model(folder)
    network.set_dtype(mx.float32)
    if adapter is not None:
        network = load_adapters(network, str(adapter))
        network.eval()
    return np.array(network(mx.array([[1, 5, 9, 33, 2, 60]])))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_weights_of_plain_arithmetic(tmp_path: Path, kind: str) -> None:
    SOURCES[kind](tmp_path / "source")
    source = place(tmp_path / "source")
    before = hashes(tmp_path / "source")
    changes = write_mlx_adapter(tmp_path / "lora", CONFIG, EVERYTHING)
    report = convert(source, tmp_path / "out", adapters=[AdapterSource(tmp_path / "lora")], **FLOATS)
    base = base_of(source, tmp_path / "base")
    same(read_output(tmp_path / "out"), fused_by_hand(base, changes))
    assert hashes(tmp_path / "source") == before
    (fused,) = report.adapters
    assert (fused.name, fused.kind, fused.scale, fused.matrices, fused.rank) == ("lora", "mlx-lm", 1.0, 16, 4)


@pytest.mark.parametrize("kind", ["hf", "native, stacked", "gguf", "gptq"])
def test_mlx_lm_runs_the_result_as_it_runs_the_source_with_the_adapter(tmp_path: Path, kind: str) -> None:
    """In the source's order of rows or in any other: the logits would tell."""
    SOURCES[kind](tmp_path / "source")
    source = place(tmp_path / "source")
    write_mlx_adapter(tmp_path / "lora", CONFIG, EVERYTHING)
    convert(source, tmp_path / "base", **FLOATS)
    convert(source, tmp_path / "out", adapters=[AdapterSource(tmp_path / "lora")], **FLOATS)
    theirs = logits(tmp_path / "base", tmp_path / "lora")
    np.testing.assert_allclose(logits(tmp_path / "out"), theirs, atol=LOGITS)
    assert np.abs(theirs - logits(tmp_path / "base")).max() > 100 * LOGITS


@pytest.mark.parametrize("kind", [kind for kind in goldens.kinds() if kind not in WITH_BIAS])
def test_the_logits_are_those_that_its_writer_computes_with_the_adapter(tmp_path: Path, kind: str) -> None:
    """Recorded from PEFT and mlx-lm."""
    base = goldens.base_folder(kind, tmp_path)
    given = [AdapterSource(goldens.adapter_folder(kind))]
    convert(base, tmp_path / "out", adapters=given, **FLOATS)
    with load(tmp_path / "out", dtype="float32") as model:
        found = np.array(model.logits(goldens.tokens(kind)))
    assert np.abs(found - goldens.logits(kind)).max() < LOGITS
    if kind in IN_MLX_LM:
        network, _ = load_model(tmp_path / "out")
        theirs = np.array(network(mx.array([goldens.tokens(kind)])))[0]
        assert np.abs(theirs - goldens.logits(kind)).max() < LOGITS


@pytest.mark.parametrize("kind", WITH_BIAS)
def test_an_adapter_of_biases_is_one_line(tmp_path: Path, kind: str) -> None:
    base = goldens.base_folder(kind, tmp_path)
    with pytest.raises(ConversionError, match=f"adapter {kind} adds a bias to the output of model\\.layers") as caught:
        convert(base, tmp_path / "out", adapters=[AdapterSource(goldens.adapter_folder(kind))])
    assert "\n" not in str(caught.value)


def test_dora_is_mlx_lm_s(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    changes = write_mlx_adapter(tmp_path / "dora", CONFIG, ATTENTION, dora=True)
    convert(source, tmp_path / "out", adapters=[AdapterSource(tmp_path / "dora")], **FLOATS)
    base = base_of(source, tmp_path / "base")
    same(read_output(tmp_path / "out"), fused_by_hand(base, changes))
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(tmp_path / "base", tmp_path / "dora"), atol=LOGITS)


def test_a_dense_model_is_the_case_of_one_expert(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", **DENSE)
    keys = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    changes = write_dense_adapter(tmp_path / "lora", keys)
    convert(source, tmp_path / "out", adapters=[AdapterSource(tmp_path / "lora")], **FLOATS)
    same(read_output(tmp_path / "out"), fused_by_hand(base_of(source, tmp_path / "base"), changes))


def write_dense_adapter(folder: Path, keys: tuple[str, ...]) -> Changes:
    changes = write_mlx_adapter(folder, DENSE, keys)
    # A dense model's matrices are stacks of one: mlx-lm has them without that axis.
    file = folder / "adapters.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    flat = {n: v[0].T if v.ndim == 3 else v for n, v in tensors.items()}
    mx.save_safetensors(str(file), flat)
    return changes


def test_several_adapters_add_up_by_their_scales(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    first = write_mlx_adapter(tmp_path / "a", CONFIG, ATTENTION, scale=2.0)
    second = write_mlx_adapter(tmp_path / "b", CONFIG, EVERYTHING, scale=3.0, rank=8, seed=2)
    given = [AdapterSource(tmp_path / "a", scale=0.5), AdapterSource(tmp_path / "b", scale=-1)]
    convert(source, tmp_path / "out", adapters=given, **FLOATS)
    halved = {place: scaled(change, 0.5) for place, change in first.items()}
    negated = {place: scaled(change, -1) for place, change in second.items()}
    same(read_output(tmp_path / "out"), fused_by_hand(base_of(source, tmp_path / "base"), halved, negated))
    convert(source, tmp_path / "turned", adapters=given[::-1], **FLOATS)
    same(read_output(tmp_path / "turned"), fused_by_hand(read_output(tmp_path / "base"), halved, negated))


def scaled(change: Any, scale: float) -> Any:
    return type(change)(change.a, change.b * np.float32(scale), change.magnitude)


def test_dora_after_another_adapter_is_of_what_that_left(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    lora = write_mlx_adapter(tmp_path / "lora", CONFIG, ATTENTION)
    dora = write_mlx_adapter(tmp_path / "dora", CONFIG, ATTENTION, dora=True, seed=2)
    base = base_of(source, tmp_path / "base")
    for name, order, changes in (("one", ("lora", "dora"), (lora, dora)), ("two", ("dora", "lora"), (dora, lora))):
        convert(source, tmp_path / name, adapters=[AdapterSource(tmp_path / each) for each in order], **FLOATS)
        same(read_output(tmp_path / name), fused_by_hand(base, *changes))


def test_packed_weights_are_those_of_the_fused_floats(tmp_path: Path) -> None:
    """The same packing of the same values, in bfloat16 as the source."""
    source = make_checkpoint(tmp_path / "source")
    write_mlx_adapter(tmp_path / "lora", CONFIG, EXPERTS)
    given = [AdapterSource(tmp_path / "lora")]
    convert(source, tmp_path / "floats", adapters=given, recipe=Recipe(bits=None))
    assert json.loads((tmp_path / "floats" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert(tmp_path / "floats", tmp_path / "wanted", recipe=Recipe(4))
    report = convert(source, tmp_path / "out", adapters=given, recipe=Recipe(4))
    found, wanted = read_output(tmp_path / "out"), read_output(tmp_path / "wanted")
    assert report.dtype == "bfloat16"
    for name in wanted:
        assert mx.array_equal(found[name], wanted[name]), name
    assert verify(tmp_path / "out").ok

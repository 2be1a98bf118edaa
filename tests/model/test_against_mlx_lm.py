"""Quantised checkpoints: the same folder through mlx-lm in float32 and through this runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError, ConfigError
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.machine.device import current_device
from mlx_mixtral.model.build import Builder
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.fill import fill
from mlx_mixtral_convert import Recipe, convert
from tests.conftest import MlxLmFolder, read_npz
from tests.shared import SharedFolders, random_checkpoint

Logits = Callable[[Path, np.ndarray[Any, Any]], np.ndarray[Any, Any]]

FORMATS = [
    *({"bits": bits, "group_size": group} for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *({"mode": mode, "bits": None, "group_size": None} for mode in ("mxfp4", "mxfp8", "nvfp4")),
]


def _name(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values() if value is not None)


def mixed_packing(path: str, module: Any, *_: Any) -> bool | dict[str, Any]:
    """q/k/v differ, gate/up differ, the router in 8 bits, one layer's o_proj unquantised."""
    if path.endswith("layers.1.self_attn.o_proj"):
        return False
    for end, bits in {"v_proj": 6, "up_proj": 3, "block_sparse_moe.gate": 8, "embed_tokens": 8}.items():
        if path.endswith(end):
            return {"bits": bits, "group_size": 64}
    return {"bits": 4, "group_size": 32}


@pytest.fixture(scope="session")
def ids(recorded: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Tokens enough that they are sorted by expert."""
    return recorded["ids"][:2, :24]


@pytest.fixture(scope="session")
def narrow(shared: SharedFolders) -> Path:
    """Random weights as narrow as groups of 128 allow."""
    changes = {"hidden_size": 128, "intermediate_size": 128}
    return shared("floats for every format", lambda folder: random_checkpoint(folder, **changes))


def quantised(source: Path, folder: Path, **options: Any) -> None:
    """What mlx-lm's converter does but for the tokenizer: its quantiser alone needs none beside the weights."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    network, config = quantize_model(*load_model(source), **options)
    save_model(folder, network)
    save_config(config, folder / "config.json")


def _ours(folder: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with load(folder) as model:
        return np.asarray(model.module(mx.array(ids)))


def _assert_equal_to_rounding(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], atol: float = 1e-4) -> None:
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("options", FORMATS, ids=_name)
def test_every_format_computes_what_mlx_lm_computes(
    options: dict[str, Any], narrow: Path, mlx_lm_logits: Logits, ids: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    quantised(narrow, tmp_path, **options)
    within = ids % 256
    # Of one bit, weights are the least or the largest of their group: logits of 30, which rounding moves as far unpacked too.
    atol = 3e-3 if options["bits"] == 1 else 1e-4
    _assert_equal_to_rounding(_ours(tmp_path, within), mlx_lm_logits(tmp_path, within), atol)


@pytest.mark.parametrize(("options", "widths"), [
    ({"bits": 4, "group_size": 32}, {"hidden_size": 128, "intermediate_size": 344}),
    ({"mode": "mxfp4", "bits": None, "group_size": None}, {"hidden_size": 128, "intermediate_size": 344}),
    ({"bits": 4, "group_size": 64}, {"hidden_size": 344, "head_dim": 86, "intermediate_size": 128}),
], ids=["down", "mxfp4", "all but down"])  # fmt: skip
def test_a_width_that_no_group_divides_stays_as_it_is(
    options: dict[str, Any],
    widths: dict[str, int],
    mlx_lm_logits: Logits,
    ids: np.ndarray[Any, Any],
    tmp_path: Path,
) -> None:
    """The same matrices as with mlx-lm's quantiser, which leaves routers too only where a recipe does."""
    random_checkpoint(tmp_path / "source", **widths)
    quantised(tmp_path / "source", tmp_path / "theirs", **options)
    recipe = Recipe(options["bits"] or 4, options["group_size"], options.get("mode", "affine"))
    report = convert(tmp_path / "source", tmp_path / "ours", recipe=recipe)
    assert "unquantised" in report.notes[0]
    assert "no group size divides rows of 344" in report.notes[0]
    packed = [{n for n in Checkpoint(tmp_path / x) if n.endswith(".scales")} for x in ("ours", "theirs")]
    assert packed[0] == {name for name in packed[1] if not name.endswith(".gate.scales")}
    assert not any("down_proj" in name for name in packed[0]) or widths["hidden_size"] == 344
    within = ids % 256
    _assert_equal_to_rounding(_ours(tmp_path / "ours", within), mlx_lm_logits(tmp_path / "ours", within))


def test_a_model_fitted_to_fewer_bits_than_two_computes_what_mlx_lm_computes(
    tiny: Path, mlx_lm_logits: Logits, ids: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    """Smaller than with 2 bits throughout: some matrices have one bit, which config.json says of each."""
    report = convert(tiny, tmp_path / "out", fit="2.33MB", recipe=Recipe(rounding="search"))
    assert 2.05 < report.bits_per_weight < 2.12
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {1, 2} <= {entry["bits"] for entry in entries.values() if isinstance(entry, dict)} | {entries["bits"]}
    _assert_equal_to_rounding(_ours(tmp_path / "out", ids), mlx_lm_logits(tmp_path / "out", ids), 1e-3)


def test_modules_that_cannot_be_fused_compute_the_same(
    mlx_lm_folder: MlxLmFolder, mlx_lm_logits: Logits, ids: np.ndarray[Any, Any]
) -> None:
    folder = mlx_lm_folder(q_bits=4, quant_predicate=mixed_packing)
    with load(folder) as model:
        attention, moe = model.module.layers[0].attention, model.module.layers[0].moe
        assert len(attention.qkv) == 3
        assert len(moe.experts.bank.gate_up) == 2
        assert moe.gate.spec.bits == 8
        assert model.module.layers[1].attention.o_proj.spec is None
        ours = np.asarray(model.module(mx.array(ids)))
    _assert_equal_to_rounding(ours, mlx_lm_logits(folder, ids))


def test_fused_and_apart_agree(tiny: Path, model: Mixtral, ids: np.ndarray[Any, Any]) -> None:
    config, checkpoint = MixtralConfig.from_folder(tiny), Checkpoint(tiny)
    builder = Builder(config, checkpoint, "F32", fuse=False, products=products_for(current_device()))
    apart = builder.build()
    with CheckpointReader(checkpoint) as reader:
        fill(reader, builder.ranges)
    assert len(apart.layers[0].attention.qkv) == 3
    assert len(model.module.layers[0].attention.qkv) == 1
    np.testing.assert_allclose(apart(mx.array(ids)), model.module(mx.array(ids)), atol=1e-4)


def test_four_bit_router_of_default_mlx_lm_is_honoured(mlx_lm_folder: MlxLmFolder) -> None:
    with load(mlx_lm_folder(q_bits=4, q_group_size=64)) as model:
        assert model.module.layers[0].moe.gate.spec.bits == 4


def _rewritten(folder: Path, out: Path, rename: Callable[[dict[str, Any]], dict[str, Any]], config: Any = None) -> Path:
    """A copy of a one-file MLX folder with its tensors passed through ``rename``."""
    out.mkdir()
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.save_safetensors(str(out / "model.safetensors"), rename(tensors))
    entries = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config(entries) if config else entries))
    return out


def test_oldest_layout_with_experts_apart(
    mlx_lm_folder: MlxLmFolder, mlx_lm_logits: Logits, ids: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    def apart(tensors: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, tensor in tensors.items():
            if ".switch_mlp." not in name:
                out[name] = tensor
                continue
            head, tail = name.split(".switch_mlp.")
            projection, field = tail.split(".")
            w = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[projection]
            for expert in range(tensor.shape[0]):
                out[f"{head}.experts.{expert}.{w}.{field}"] = tensor[expert]
        return out

    folder = mlx_lm_folder(q_bits=4, q_group_size=64)
    old = _rewritten(folder, tmp_path / "old", apart)
    _assert_equal_to_rounding(_ours(old, ids), mlx_lm_logits(folder, ids))


def test_dense_models_are_the_one_expert_case(mlx_lm_logits: Logits, tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "goldens" / "transformers" / "llama"
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    network, config = load_model(source)
    # mlx-lm reads the old spelling only.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    network, config = quantize_model(network, config, 32, 4)
    save_model(tmp_path, network)
    save_config(config, tmp_path / "config.json")
    ids = read_npz(source / "reference.npz")["ids"]
    _assert_equal_to_rounding(_ours(tmp_path, ids), mlx_lm_logits(tmp_path, ids))


def test_override_missing_from_the_config_is_read_off_the_shapes(
    mlx_lm_folder: MlxLmFolder, mlx_lm_logits: Logits, ids: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    def forget(entries: dict[str, Any]) -> dict[str, Any]:
        keep = {"bits", "group_size", "mode"}
        entries["quantization"] = {k: v for k, v in entries["quantization"].items() if k in keep}
        return entries

    folder = mlx_lm_folder(q_bits=4, quant_predicate=mixed_packing)
    bare = _rewritten(folder, tmp_path / "bare", lambda tensors: tensors, forget)
    _assert_equal_to_rounding(_ours(bare, ids), mlx_lm_logits(folder, ids))


def test_named_packing_that_contradicts_the_shapes_is_an_error(mlx_lm_folder: MlxLmFolder, tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"

    def contradict(entries: dict[str, Any]) -> dict[str, Any]:
        entries["quantization"][path] = {"bits": 8, "group_size": 64}
        return entries

    folder = mlx_lm_folder(q_bits=4, q_group_size=64)
    wrong = _rewritten(folder, tmp_path / "wrong", lambda tensors: tensors, contradict)
    with pytest.raises(ConfigError, match=rf"{path}.*8-bit g64.*16 columns"):
        load(wrong)


def test_missing_and_misshapen_tensors_are_named(tiny: Path, tmp_path: Path) -> None:
    tensors = dict(mx.load(str(tiny / "model.safetensors")))
    name = "model.layers.3.block_sparse_moe.experts.5.w2.weight"
    for change, message in (
        (lambda t: t.pop(name), rf"{name}.*missing"),
        (lambda t: t.__setitem__(name, t[name][:64]), rf"{name}.*\[64, 384\].*\[128"),
        (lambda t: t.__setitem__(name, t[name].astype(mx.int32)), rf"{name}.*I32"),
        (lambda t: t.pop("model.norm.weight"), r"model.norm.weight.*missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head.weight.*missing"),
    ):
        folder = tmp_path / str(abs(hash(message)))
        folder.mkdir()
        changed = dict(tensors)
        change(changed)
        mx.save_safetensors(str(folder / "model.safetensors"), changed)
        (folder / "config.json").write_text((tiny / "config.json").read_text())
        with pytest.raises(CheckpointError, match=message):
            load(folder)


def test_nan_in_the_weights_is_reported_by_name(tiny: Path, tmp_path: Path) -> None:
    tensors = dict(mx.load(str(tiny / "model.safetensors")))
    name = "model.layers.2.block_sparse_moe.experts.1.w3.weight"
    poisoned = np.asarray(tensors[name].astype(mx.float32)).copy()
    poisoned[7, 9] = np.nan
    tensors[name] = mx.array(poisoned).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"{name}.*NaN"):
        load(tmp_path)

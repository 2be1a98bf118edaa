"""Adapters that are damaged, of another model, or of a kind that is not computed here: one line that names what is wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_mixtral.adapters.adapter import Adapter
from mlx_mixtral.adapters.opening import open_adapter
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError, InvalidRequestError, MixtralError

from .goldens import BASES, adapter_folder, base_name

Tensors = dict[str, Any]
Settings = dict[str, Any]
Change = Callable[[Tensors, Settings], object]

WEIGHTS = {"PEFT": "adapter_model.safetensors", "mlx-lm": "adapters.safetensors"}
LAYER = "base_model.model.model.layers.0."
Q = f"{LAYER}self_attn.q_proj"
W1 = f"{LAYER}block_sparse_moe.experts.0.w1"
STACK = f"{LAYER}mlp.experts"
MLX_Q = "model.layers.0.self_attn.q_proj"
MLX_UP = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"


def config_of(kind: str, **changes: Any) -> MixtralConfig:
    return MixtralConfig.from_hf(BASES[base_name(kind)] | changes)


def changed(kind: str, folder: Path, change: Change) -> Path:
    """A copy of a recorded adapter with other tensors or settings."""
    copy = folder / "adapter"
    shutil.copytree(adapter_folder(kind), copy)
    weights = next(copy / name for name in WEIGHTS.values() if (copy / name).exists())
    tensors, settings = load_file(weights), json.loads((copy / "adapter_config.json").read_text())
    change(tensors, settings)
    save_file(tensors, weights)
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    return copy


def read_all(adapter: Adapter) -> None:
    """Every number of an adapter."""
    for path in adapter.ranks:
        for expert in (None, 0, 1, 2, 3):
            adapter.low_rank(path, expert)
    for path in adapter.replaced:
        adapter.replacement(path)
    for path in adapter.token_rows:
        adapter.rows(path)


def renamed(old: str, new: str) -> Change:
    def change(tensors: Tensors, settings: Settings) -> None:
        tensors[new] = tensors.pop(old)

    return change


def removed(name: str) -> Change:
    return lambda tensors, settings: tensors.pop(name)


def reshaped(name: str, *shape: int) -> Change:
    return lambda tensors, settings: tensors.update({name: np.zeros(shape, np.float32)})


def typed(name: str, dtype: Any) -> Change:
    return lambda tensors, settings: tensors.update({name: tensors[name].astype(dtype)})


def filled(name: str, value: float) -> Change:
    def change(tensors: Tensors, settings: Settings) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-1] = value

    return change


def added(name: str, *shape: int) -> Change:
    return reshaped(name, *shape)


def both(first: Change, second: Change) -> Change:
    return lambda tensors, settings: (first(tensors, settings), second(tensors, settings))


def set_to(**entries: Any) -> Change:
    return lambda tensors, settings: settings.update(entries)


def parameters(**entries: Any) -> Change:
    return lambda tensors, settings: settings["lora_parameters"].update(entries)


def unset(key: str) -> Change:
    return lambda tensors, settings: settings.pop(key)


REFUSED: list[tuple[str, Change, str]] = [
    # Tensors of PEFT.
    ("v4-router", removed(f"{LAYER}block_sparse_moe.gate.lora_B.weight"),
     r"gate\.lora_B' is missing beside '.*lora_A.weight'"),
    ("v4-experts", removed(f"{W1}.lora_A.weight"), r"experts\.0\.w1\.lora_A' is missing"),
    ("v4-experts", reshaped(f"{Q}.lora_A.weight", 3, 60),
     r"q_proj\.lora_A\.weight' of shape \[3, 60\] .* 60 inputs; .* has 64: .*another model"),
    ("v4-experts", reshaped(f"{W1}.lora_B.weight", 90, 3),
     r"w1\.lora_B\.weight' of shape \[90, 3\] .* 90 outputs; .* has 96"),
    ("v4-experts", reshaped(f"{Q}.lora_B.weight", 64, 2), r"has rank 3 and .* has 2; the two do not belong together"),
    ("v4-experts", reshaped(f"{Q}.lora_A.weight", 3, 8, 8), r"has shape \[3, 8, 8\], not that of a matrix"),
    ("v4-experts", both(reshaped(f"{Q}.lora_A.weight", 5, 64), reshaped(f"{Q}.lora_B.weight", 64, 5)),
     r"gives rank 3 to tensor '.*q_proj\.lora_A\.weight', which has rank 5"),
    ("v4-experts", renamed(f"{Q}.lora_A.weight", f"{Q}.lora_C.weight"), r"lora_C\.weight' is nothing known of a LoRA"),
    ("v4-experts", renamed(f"{Q}.lora_A.weight", f"{Q}.lora_A.bias"), r"lora_A\.bias' is a bias"),
    ("v4-experts", added(f"{Q}.base_layer.bias", 64), r"base_layer\.bias' is a bias, which this model does not have"),
    ("v4-experts", added(f"{Q}.lora_magnitude_vector", 64),
     r"lora_magnitude_vector' is there, but use_dora is not true"),
    ("v4-experts", added(f"{Q}.lora_B.bias", 64), r"lora_B\.bias' is there, but lora_bias is not true"),
    ("v4-experts", added(f"{Q}.lora_A.other.weight", 3, 64),
     r"are of the same matrix; the file holds several adapters"),
    ("v4-dora", removed(f"{Q}.lora_magnitude_vector"),
     r"use_dora is true .* but model\.layers\.0\.self_attn\.q_proj has no tensor for it"),
    ("v4-dora", reshaped(f"{Q}.lora_magnitude_vector", 60),
     r"lora_magnitude_vector' has shape \[60\]; this model calls for \[64\]"),
    ("v4-bias", removed("base_model.model.lm_head.lora_B.bias"),
     r"lora_bias is true .* but lm_head has no tensor for it"),
    ("v4-experts", renamed(f"{Q}.lora_A.weight", f"{LAYER}mlp.gate_proj.lora_A.weight"),
     r"gate_proj\.lora_B' is missing|lora_A' is missing"),
    ("v4-experts", typed(f"{Q}.lora_A.weight", np.float64),
     r"q_proj\.lora_A\.weight' has dtype F64; adapters of F32, F16, BF16 are read"),
    ("v4-experts", typed(f"{Q}.lora_A.weight", np.int8), r"has dtype I8"),
    ("v4-experts", filled(f"{Q}.lora_A.weight", np.nan), r"q_proj\.lora_A\.weight' holds NaN or infinity"),
    ("v4-experts", filled(f"{W1}.lora_B.weight", np.inf), r"w1\.lora_B\.weight' holds NaN or infinity"),
    ("v4-experts", filled(f"{W1}.lora_B.weight", 3e38), r"w1\.lora_B\.weight' is beyond float32 when multiplied by 2"),
    ("v4-saved", filled("base_model.model.lm_head.weight", -np.inf), r"lm_head\.weight' holds NaN or infinity"),
    ("v4-saved", reshaped("base_model.model.lm_head.weight", 98, 64),
     r"lm_head\.weight' has shape \[98, 64\]; .* \[96, 64\]: .*vocabulary resized from 96"),
    ("v4-saved", reshaped("base_model.model.model.norm.weight", 60),
     r"norm\.weight' has shape \[60\]; this model calls for \[64\]"),
    ("v4-saved", added(f"{W1}.weight", 96, 64), r"w1\.weight' replaces a matrix of a feed-forward network"),
    ("v4-saved", added(f"{Q}.weight", 64, 64), r"q_proj is both replaced and changed by the adapter"),
    ("v4-saved", added("base_model.model.score.weight", 2, 64),
     r"score\.weight' changes 'model\.score', which the model does not have"),
    ("v4-embedding", reshaped("base_model.model.model.embed_tokens.lora_embedding_A", 4, 98),
     r"lora_embedding_A' .* 98 outputs; .*vocabulary resized"),
    ("v4-embedding", added("base_model.model.model.embed_tokens.lora_magnitude_vector", 64),
     r"is an embedding trained with DoRA or a bias"),
    ("v4-tokens", set_to(trainable_token_indices=[78, 3, 96]),
     r"has token 96; the model's ids go from 0 to 95: .*resized"),
    ("v4-tokens", set_to(trainable_token_indices=[78, 3]),
     r"trainable_tokens_delta' has shape \[3, 64\]; this model calls for \[2, 64\]"),
    ("v4-tokens", set_to(trainable_token_indices=[3, 3, 4]), r"names a token twice"),
    ("v4-tokens", set_to(trainable_token_indices={"lm_head": [1]}),
     r"trainable_token_indices is None for model\.embed_tokens"),
    ("v4-tokens", set_to(trainable_token_indices=[1, True, "3"]), r"trainable_token_indices is \[1, True, '3'\]"),
    # Stacks of experts.
    ("new-stacks", reshaped(f"{STACK}.lora_A.weight", 12, 95),
     r"of shape \[12, 95\] and .* fit no experts with 64 and 96 features"),
    ("new-stacks", both(reshaped(f"{STACK}.lora_A.weight", 10, 96), reshaped(f"{STACK}.lora_B.weight", 64, 10)),
     r"are not of 4 experts, as this model has"),
    ("new-stacks", reshaped(f"{STACK}.lora_B.weight", 64, 8), r"are not of 4 experts"),
    ("new-stacks", added(f"{STACK}.lora_magnitude_vector", 64),
     r"lora_magnitude_vector' is there, but use_dora is not true"),
    ("new-stacks", both(reshaped(f"{STACK}.lora_A.weight", 12, 64), reshaped(f"{STACK}.lora_B.weight", 96, 12)),
     r"some experts are transposed and others are not"),
    ("new-down-square", unset("peft_version"), r"adapter_config\.json has no peft_version, by which .*0\.19"),
    ("new-down-square", set_to(peft_version="latest"), r"has no peft_version"),
    # Settings of PEFT.
    ("v4-experts", set_to(peft_type="IA3"), r"peft_type is 'IA3'; LORA and TRAINABLE_TOKENS are read: merge others"),
    ("v4-experts", set_to(peft_type="PROMPT_TUNING"), r"peft_type is 'PROMPT_TUNING'"),
    ("v4-experts", set_to(peft_type=None), r"peft_type is None"),
    ("v4-experts", set_to(peft_type=["LORA"]), r"peft_type is \['LORA'\]"),
    ("v4-experts", set_to(peft_type="TRAINABLE_TOKENS"), r"is a LoRA's, but peft_type says otherwise"),
    ("v4-experts", set_to(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens is \[1, 2\]: an activated LoRA"),
    ("v4-experts", set_to(use_qalora=True), r"use_qalora is True: inputs that were averaged"),
    ("v4-experts", set_to(layer_replication=[[0, 2]]), r"layer_replication is \[\[0, 2\]\]"),
    ("v4-experts", set_to(init_lora_weights="pissa_niter_4"),
     r"init_lora_weights is 'pissa_niter_4', which took the first factors out"),
    ("v4-experts", set_to(init_lora_weights="loftq"), r"init_lora_weights is 'loftq'"),
    ("v4-experts", set_to(use_dora="yes"), r"use_dora is 'yes', not true or false"),
    ("v4-bias", set_to(use_dora=True), r"use_dora and lora_bias are both true"),
    ("v4-experts", set_to(lora_alpha="16"), r"adapter_config\.json: lora_alpha is '16'; it must be a number above 0"),
    ("v4-experts", set_to(lora_alpha=0), r"lora_alpha is 0"),
    ("v4-experts", set_to(lora_alpha=-8), r"lora_alpha is -8"),
    ("v4-experts", set_to(lora_alpha=1e300), r"lora_alpha is 1e\+300; .* at most 1e\+06"),
    ("v4-experts", set_to(lora_alpha=float("nan")), r"lora_alpha is nan"),
    ("v4-experts", set_to(lora_alpha=True), r"lora_alpha is True"),
    ("v4-experts", unset("lora_alpha"), r"lora_alpha is None"),
    ("v4-experts", set_to(r=0), r"adapter_config\.json: r is 0; a rank is an integer from 1"),
    ("v4-experts", set_to(r=3.0), r"r is 3\.0; a rank is an integer"),
    ("v4-experts", set_to(r=10**30), r"r is 10+; a rank"),
    ("v4-experts", set_to(rank_pattern=[1]), r"rank_pattern is \[1\], not an object"),
    ("v4-experts", set_to(rank_pattern={"q_proj": "x"}), r"rank_pattern is 'x'; a rank"),
    ("v4-experts", set_to(rank_pattern={"q_proj": 9}), r"gives rank 9 to tensor '.*q_proj\.lora_A"),
    ("v4-experts", set_to(alpha_pattern={"w1": None, "q_proj": 0}), r"alpha_pattern is 0"),
    ("v4-experts", set_to(alpha_pattern={"(a+)+q_proj": 1}), r"has the expression '\(a\+\)\+q_proj'; only short ones"),
    ("v4-experts", set_to(alpha_pattern={r"(a|\\)*q": 1}), r"has the expression"),
    ("v4-experts", set_to(alpha_pattern={"(?x:(a+) *q)": 1}), r"has the expression"),
    ("v4-experts", set_to(alpha_pattern={"(q": 1}), r"'\(q', which is no expression"),
    ("v4-experts", set_to(alpha_pattern={f"q{n}$": 1 for n in range(9)}), r"has 9 expressions; at most 8"),
    # Of mlx-lm.
    ("mlx-lora", removed(f"{MLX_Q}.lora_a"), r"'model\.layers\.0\.self_attn\.q_proj\.lora_a' is missing beside"),
    ("mlx-lora", reshaped(f"{MLX_Q}.lora_a", 60, 2),
     r"q_proj\.lora_a' of shape \[60, 2\] is for a matrix with 60 inputs; .* has 64"),
    ("mlx-lora", reshaped(f"{MLX_Q}.lora_a", 64), r"lora_a' has shape \[64\], not that of a matrix"),
    ("mlx-lora", reshaped(f"{MLX_UP}.lora_a", 3, 2, 64),
     r"up_proj\.lora_a' has shape \[3, 2, 64\]; the experts of this model call for \[4, 2, 64\]"),
    ("mlx-lora", reshaped(f"{MLX_UP}.lora_a", 6, 64), r"up_proj\.lora_a' has shape \[6, 64\]"),
    ("mlx-lora", reshaped(f"{MLX_UP}.lora_b", 96, 2), r"up_proj\.lora_b' has shape \[96, 2\]; .* \[4, 96, rank\]"),
    ("mlx-lora", both(reshaped(f"{MLX_UP}.lora_b", 4, 96, 0), reshaped(f"{MLX_UP}.lora_a", 4, 0, 64)),
     r"has rank 0"),
    ("mlx-lora", added(f"{MLX_UP}.m", 96), r"up_proj\.m' is of experts, for which mlx-lm has no DoRA"),
    ("mlx-lora", added(f"{MLX_Q}.weight", 64, 64), r"q_proj\.weight' is none of mlx-lm's"),
    ("mlx-lora", renamed(f"{MLX_Q}.lora_a", "model.layers.2.self_attn.q_proj.lora_a"),
     r"is of layer 2, but the model has 2 layers|lora_a' is missing"),
    ("mlx-lora", filled(f"{MLX_UP}.lora_b", np.nan), r"up_proj\.lora_b' holds NaN"),
    ("mlx-lora", parameters(scale="20"), r"lora_parameters: scale is '20'; it must be a number above 0"),
    ("mlx-lora", parameters(scale=0.0), r"scale is 0\.0"),
    ("mlx-lora", parameters(scale=-1), r"scale is -1"),
    ("mlx-lora", parameters(scale=float("inf")), r"scale is inf"),
    ("mlx-lora", parameters(rank=5), r"has rank 2, but adapter_config\.json says 5"),
    ("mlx-lora", parameters(rank="2"), r"rank is '2'; a rank is an integer"),
    ("mlx-lora", lambda t, s: s["lora_parameters"].pop("scale"), r"lora_parameters has no scale"),
    ("mlx-lora", unset("lora_parameters"), r"has no scale"),
    ("mlx-lora", set_to(lora_parameters=[1]), r"lora_parameters is \[1\], not an object"),
    ("mlx-lora", set_to(fine_tune_type="prefix"), r"fine_tune_type is 'prefix'; lora, dora, full are read"),
    ("mlx-full", added(f"{MLX_UP}.weight", 4, 96, 64), r"up_proj\.weight' replaces a matrix of a feed-forward network"),
    ("mlx-full", added(f"{MLX_Q}.scales", 64, 2), r"q_proj\.scales' has no place in a model that was trained in full"),
    ("mlx-dense", renamed(f"{MLX_Q}.lora_a", "model.rotary.lora_a"), r"changes 'model\.rotary'|is missing beside"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "message"), REFUSED, ids=[f"{n}-{kind}" for n, (kind, *_) in enumerate(REFUSED)]
)
def test_what_is_wrong_is_named(kind: str, change: Change, message: str, tmp_path: Path) -> None:
    folder = changed(kind, tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_all(open_adapter(folder, config_of(kind)))
    assert "\n" not in str(raised.value)


OTHER_MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("v4-experts", {"num_hidden_layers": 1}, r"is of layer 1, but the model has 1; the adapter is of another model"),
    ("v4-experts", {"num_local_experts": 2}, r"is of expert [23], but the model's layers have 2"),
    ("v4-experts", {"hidden_size": 128}, r"is for a matrix with 64 (in|out)puts; .* has 128"),
    ("v4-experts", {"intermediate_size": 112}, r"96 outputs; .*gate_proj has 112|96 inputs; .*down_proj has 112"),
    ("new-stacks", {"num_hidden_layers": 1}, r"is of layer 1, but the model has 1"),
    ("new-stacks", {"num_local_experts": 8}, r"are not of 8 experts"),
    ("new-stacks", {"hidden_size": 128}, r"fit no experts with 128 and 96 features|has 128"),
    ("v4-head", {"vocab_size": 104},
     r"96 outputs; lm_head has 104: .*vocabulary resized from 104, which is not supported"),
    ("v4-head", {"tie_word_embeddings": True}, r"is of the output head, which this model shares with its embedding"),
    ("v4-embedding", {"vocab_size": 104}, r"vocabulary resized from 104"),
    ("v4-saved", {"vocab_size": 104}, r"vocabulary resized from 104"),
    ("mlx-lora", {"num_hidden_layers": 1}, r"is of layer 1, but the model has 1"),
    ("mlx-lora", {"num_local_experts": 8}, r"call for \[8, |gate has 8"),
    ("mlx-embedding", {"vocab_size": 104}, r"vocabulary resized from 104"),
    ("mlx-lora", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
     r"block_sparse_moe\..*', which the model does not have"),
    ("mlx-dense", {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
     r"mlp\.\w+', which the model does not have"),
    ("v4-dense", {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
     r"mlp\.\w+', which the model does not have"),
    ("v4-experts", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
     r"which the model does not have"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), OTHER_MODELS)
def test_an_adapter_of_another_model_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_adapter(adapter_folder(kind), config_of(kind, **changes))


def test_an_embedding_that_peft_trained_beside_its_own_copy_is_refused(tmp_path: Path) -> None:
    def only_embedding(tensors: Tensors, settings: Settings) -> None:
        for name in [name for name in tensors if "lm_head" in name]:
            del tensors[name]

    folder = changed("v4-embedding", tmp_path, only_embedding)
    tied = config_of("v4-embedding", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"changes the embedding, which this model also uses as its head"):
        open_adapter(folder, tied)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"ensure_weight_tying": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert open_adapter(folder, tied).ranks == {"model.embed_tokens": 4}


FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("cut in the data", lambda f: f.write_bytes(f.read_bytes()[:-100]), r"the file is truncated|belong to no tensor"),
    ("cut in the header", lambda f: f.write_bytes(f.read_bytes()[:40]),
     r"claims \d+ bytes, but the file has 40; it is truncated"),
    ("nothing", lambda f: f.write_bytes(b""), r"has 0 bytes"),
    ("a huge header", lambda f: f.write_bytes(struct.pack("<Q", 2**62) + b"{}"), r"claims 4611686018427387904 bytes"),
    ("more at the end", lambda f: f.write_bytes(f.read_bytes() + b"\0" * 8), r"8 bytes at the end belong to no tensor"),
    ("no tensors", lambda f: save_file({}, f), r"holds no tensors; the adapter changes nothing"),
    ("a pointer", lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     r"git-lfs pointer"),
    ("a folder", lambda f: (f.unlink(), f.mkdir()), r"cannot be read: it is a folder"),
    ("a pickle", lambda f: f.rename(f.with_name("adapter_model.bin")),
     r"adapter_model\.bin is a pickle, which can run code .*weights_only=True"),
    ("gone", lambda f: f.unlink(), r"has adapter_config\.json of PEFT, but no adapter_model\.safetensors"),
    ("another name", lambda f: f.rename(f.with_name("adapters.safetensors")),
     r"there are weights of the other kind only"),
    ("both kinds", lambda f: shutil.copy(f, f.with_name("adapters.safetensors")),
     r"holds adapters of PEFT \(.*\) and of mlx-lm"),
    ("no settings", lambda f: f.with_name("adapter_config.json").unlink(),
     r"has an adapter's weights and no adapter_config\.json"),
    ("broken settings", lambda f: f.with_name("adapter_config.json").write_text("{"),
     r"adapter_config\.json is not valid JSON"),
    ("a list", lambda f: f.with_name("adapter_config.json").write_text("[]"), r"holds a JSON list, not an object"),
    ("twice", lambda f: f.with_name("adapter_config.json").write_text('{"r": 1, "r": 2}'), r"the key 'r' occurs twice"),
    ("huge settings", lambda f: f.with_name("adapter_config.json").write_bytes(b" " * (2**22 + 1)),
     r"has 4194305 bytes; no file of its kind"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_damaged_and_missing_files_are_named(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = changed("v4-router", tmp_path, lambda tensors, settings: None)
    damage(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        open_adapter(folder, config_of("v4-router"))
    assert "\n" not in str(raised.value)


FOLDERS: list[tuple[dict[str, str], str]] = [
    ({}, r"holds no adapter: it has no adapter_config\.json"),
    ({"config.json": "{}", "model.safetensors": ""}, r"holds a model, not an adapter"),
    ({"lora.gguf": "GGUF"}, r"holds an adapter as GGUF \(lora\.gguf\), or a model"),
    ({"adapter_config.json": "{}"}, r"has adapter_config\.json of mlx-lm, but no adapters\.safetensors"),
    ({"adapter_config.json": "{}", "adapters.npz": ""}, r"adapters\.npz is of an mlx-lm before March 2024"),
    ({"adapter_config.json": "{}", "0000100_adapters.safetensors": ""}, r"but no adapters\.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), FOLDERS)
def test_folders_of_something_else_say_what_they_hold(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tmp_path, config_of("v4-router"))


def test_a_file_is_no_folder_of_an_adapter(tmp_path: Path) -> None:
    for name, message in (
        ("lora.gguf", "is a GGUF file"),
        ("adapters.safetensors", "is a file, not an adapter's folder"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=message):
            open_adapter(tmp_path / name, config_of("v4-router"))
    with pytest.raises(CheckpointError, match="no such folder"):
        open_adapter(tmp_path / "absent", config_of("v4-router"))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e9, True, "2", None])
def test_a_scale_is_a_finite_number(scale: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"scale is .*; it must be a finite number"):
        open_adapter(adapter_folder("v4-router"), config_of("v4-router"), scale=scale)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("v4-saved", "replaces matrices or norms"), ("v4-tokens", r"replaces rows of tokens \(model\.embed_tokens\)")],
)
def test_what_stands_in_place_of_the_models_has_no_scale(kind: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        open_adapter(adapter_folder(kind), config_of(kind), scale=0.5)


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    opened = refused = 0
    for kind in ("v4-router", "mlx-embedding"):
        folder, config = changed(kind, tmp_path / kind, lambda tensors, settings: None), config_of(kind)
        files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
        whole = {path: path.read_bytes() for path in files}
        for _ in range(400):
            file = files[int(random.integers(len(files)))]
            data = bytearray(whole[file])
            # The header, mostly: damage of numbers is a number.
            end = len(data) if random.random() < 0.2 else min(len(data), 1200)
            for _ in range(int(random.integers(1, 4))):
                data[int(random.integers(end))] = int(random.choice([0, 34, 48, 57, 125, 255, random.integers(256)]))
            if random.random() < 0.2:
                del data[int(random.integers(len(data))) :]
            file.write_bytes(bytes(data))
            try:
                with contextlib.closing(open_adapter(folder, config)) as damaged:
                    read_all(damaged)
                opened += 1
            except MixtralError:
                refused += 1
            file.write_bytes(whole[file])
    assert refused > 200
    assert opened > 50

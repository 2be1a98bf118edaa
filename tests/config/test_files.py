"""The files a configuration is read from: params.json, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError, ConfigError
from mlx_mixtral.reading import read_json
from tests.config.entries import MIXTRAL, PARAMS


def test_params_json_of_8x7b_gives_the_same_network_as_its_config_json() -> None:
    config = MixtralConfig.from_hf(
        {
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8,
            "num_experts_per_tok": 2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        }
    )  # fmt: skip
    params = MixtralConfig.from_params(PARAMS)
    assert params.rope.theta == 1e6
    assert {k: v for k, v in vars(params).items() if k not in ("source", "rope")} == {
        k: v for k, v in vars(config).items() if k not in ("source", "rope")
    }


def test_params_json_without_moe_is_dense_and_honours_its_optional_keys() -> None:
    dense = {key: value for key, value in PARAMS.items() if key not in ("moe", "head_dim", "n_kv_heads")}
    config = MixtralConfig.from_params(
        dense | {"rope_theta": 1e4, "sliding_window": 4096, "max_seq_len": 8192, "tied_embeddings": True}
    )
    assert config.architecture == "mistral"
    assert (config.num_local_experts, config.num_experts_per_tok) == (1, 1)
    assert (config.num_key_value_heads, config.head_dim) == (32, 128)
    assert (config.rope.theta, config.sliding_window, config.max_position_embeddings) == (1e4, 4096, 8192)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora": {}}, "lora"),
        ({"vision_encoder": {"hidden_size": 4}}, "vision_encoder"),
        ({"yarn": {"factor": 4}}, "yarn"),
        ({"use_biases": True}, "use_biases"),
        ({"ffn_dim_multiplier": 1.3}, "ffn_dim_multiplier"),
        ({"moe": 8}, "moe"),
        ({"moe": {}}, "num_experts is missing"),
        ({"moe": {"num_experts": 8}}, "num_experts_per_tok is missing"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "experts"),
        ({"dim": "4096"}, "dim"),
        ({"n_heads": None}, "n_heads is missing"),
        ({"n_kv_heads": 5}, "key-value heads"),
        ({"norm_eps": -1}, "norm_eps"),
        ({"rope_theta": "a"}, "rope_theta"),
        ({"tied_embeddings": "yes"}, "tied_embeddings"),
        ({"n_heads": 0}, "num_attention_heads"),
    ],
)
def test_params_json_faults_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MixtralConfig.from_params(PARAMS | change)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_folder_unites_the_stop_ids_of_both_files_in_order(tmp_path: Path) -> None:
    _write(tmp_path / "config.json", MIXTRAL | {"eos_token_id": 2})
    assert MixtralConfig.from_folder(tmp_path).eos_token_ids == (2,)
    _write(tmp_path / "generation_config.json", {"eos_token_id": [9, 2, 5]})
    assert MixtralConfig.from_folder(tmp_path).eos_token_ids == (2, 9, 5)
    _write(tmp_path / "generation_config.json", {"eos_token_id": None})
    assert MixtralConfig.from_folder(tmp_path).eos_token_ids == (2,)
    _write(tmp_path / "generation_config.json", {"eos_token_id": [2, 64]})
    with pytest.raises(
        ConfigError, match=r"generation_config\.json: eos_token_id is 64; the vocabulary's ids go from 0 to 63"
    ):
        MixtralConfig.from_folder(tmp_path)
    _write(tmp_path / "generation_config.json", {"eos_token_id": "</s>"})
    with pytest.raises(ConfigError, match="</s>"):
        MixtralConfig.from_folder(tmp_path)


def test_a_folder_prefers_config_json_to_params_json(tmp_path: Path) -> None:
    _write(tmp_path / "params.json", PARAMS)
    assert MixtralConfig.from_folder(tmp_path).hidden_size == 4096
    _write(tmp_path / "config.json", MIXTRAL)
    assert MixtralConfig.from_folder(tmp_path).hidden_size == 512


def test_a_folder_with_neither_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json nor params\.json"):
        MixtralConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "\xff\xfe"}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n",
            "is a git-lfs pointer.*run git lfs pull",
        ),
        (b"", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' * 200_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b"7", "a JSON int"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_a_checkpoint_error(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_says_how_a_file_is_written(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "config.json").write_bytes('{"a": "é"}'.encode(encoding))
    assert read_json(tmp_path / "config.json") == {"a": "é"}


def test_an_unreadable_or_enormous_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)
    sparse = tmp_path / "large.json"
    with sparse.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=str(2**40)):
        read_json(sparse)

"""Tensors that have no place in the model are an error at load, as they are at convert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mixtral import load
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert import Recipe, convert
from tests.convert.support import load_arrays, make_checkpoint
from tests.shared import SharedFolders


@pytest.fixture(params=["plain", "4-bit", "mxfp4"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, shared: SharedFolders) -> Path:
    def make(place: Path) -> None:
        make_checkpoint(place.parent / "source")
        recipes = {"4-bit": Recipe(4, 32), "mxfp4": Recipe(mode="mxfp4")}
        if request.param == "plain":
            (place.parent / "source").rename(place)
        else:
            convert(place.parent / "source", place, recipe=recipes[request.param])

    copied = Path(shutil.copytree(shared(f"leftovers {request.param}", make), tmp_path / "model"))
    (copied / "conversion.json").unlink(missing_ok=True)
    return copied


def config(folder: Path, **changes: Any) -> None:
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | changes))


def add(folder: Path, name: str, *, listed: bool = True) -> None:
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    mx.save_safetensors(str(file), {**load_arrays(file), name: mx.zeros((2, 2), mx.bfloat16)}, {"format": "mlx"})
    index = folder / "model.safetensors.index.json"
    if index.exists() and listed:
        entries = json.loads(index.read_text())
        entries["weight_map"][name] = file.name
        index.write_text(json.dumps(entries))


def test_a_file_with_more_layers_than_the_configuration_is_no_other_model(folder: Path) -> None:
    load(folder).close()
    config(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"tensor 'model\.layers\.1\.\S+' has no place .*check num_hidden_layers"):
        load(folder)


def test_a_tensor_of_another_network_is_named(folder: Path) -> None:
    add(folder, "model.layers.0.self_attn.q_norm.weight")
    with pytest.raises(CheckpointError, match=r"tensor 'model\.layers\.0\.self_attn\.q_norm\.weight' has no place"):
        load(folder)


def test_one_that_the_index_does_not_name_is_seen_too(folder: Path) -> None:
    add(folder, "model.layers.9.input_layernorm.weight", listed=False)
    with pytest.raises(CheckpointError, match=r"tensor 'model\.layers\.9\.input_layernorm\.weight' has no place"):
        load(folder)


def test_scales_beside_weights_that_are_not_packed_are_left_over(folder: Path) -> None:
    add(folder, "model.embed_tokens.weight_scale")
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight_scale' has no place"):
        load(folder)


def test_what_follows_from_the_configuration_or_from_others_may_be_there(folder: Path) -> None:
    for layer in (0, 1):
        add(folder, f"model.layers.{layer}.self_attn.rotary_emb.inv_freq")
    load(folder).close()
    config(folder, tie_word_embeddings=True)
    load(folder).close()

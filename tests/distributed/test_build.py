"""What one machine holds: parts that together are the whole model, at its own size, read at its own cost."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral.distributed.shares import Share
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.layers.expert_bank import ExpertBank
from mlx_mixtral.model.moe import SparseMoe, route
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.weights.checkpoint import CheckpointReader
from mlx_mixtral.weights.safetensors import TensorInfo
from tests.shared import SharedFolders

from .conftest import LAYERS, PACKINGS, SHAPE, MakeFolder
from .support import EQUAL, UNEVEN, Built, array, builder, built, rewritten, shares_of, tensors_of

TOKENS = mx.array([[1, *(int(i) for i in np.random.default_rng(5).integers(3, 250, 21))]], mx.int32)


def _moe(module: MixtralModel, layer: int) -> SparseMoe:
    moe = module.layers[layer].moe
    assert isinstance(moe, SparseMoe)
    return moe


def _bank(module: MixtralModel, layer: int) -> ExpertBank:
    bank = _moe(module, layer).experts.bank
    assert bank is not None
    return bank


def _parts(folder: Path, weights: Sequence[float], split: str = "experts") -> tuple[Built, list[Built]]:
    return built(folder), [built(folder, share) for share in shares_of(folder, split, weights)]


@pytest.mark.parametrize("weights", [EQUAL, UNEVEN], ids=["2 equal", "3 uneven"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_partial_outputs_of_experts_add_up_to_the_whole(
    folder_of: MakeFolder, packing: str, weights: Sequence[float]
) -> None:
    whole, parts = _parts(folder_of(packing), weights)
    for layer in range(len(whole.module.layers)):
        for length in (1, 40):  # a decode step; a chunk whose tokens are sorted by expert
            x = mx.random.normal((1, length, whole.builder.config.hidden_size), key=mx.random.key(layer))
            moe = _moe(whole.module, layer)
            selected, mixture = route(moe.gate(x), moe.num_experts_per_tok)

            def output(module: MixtralModel) -> mx.array:
                y, _ = _moe(module, layer).experts(x, selected, moe.num_experts)  # noqa: B023
                return (mixture[..., None] * y).sum(axis=-2)  # noqa: B023

            wanted = array(output(whole.module))
            got = np.sum([array(output(part.module)) for part in parts], axis=0)
            assert np.abs(wanted).max() > 0.1
            # Of one bit, weights are the least or the largest of their group: outputs of 36.
            np.testing.assert_allclose(got, wanted, atol=5e-5, rtol=1e-5)
            assert all(np.abs(array(output(part.module)) - wanted).max() > 0.01 for part in parts)


@pytest.mark.parametrize("weights", [EQUAL, UNEVEN], ids=["2 equal", "3 uneven"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_arrays_of_all_shares_together_are_the_whole_models(
    folder_of: MakeFolder, packing: str, weights: Sequence[float]
) -> None:
    whole, parts = _parts(folder_of(packing), weights)
    for layer in range(len(whole.module.layers)):
        bank, banks = _bank(whole.module, layer), [_bank(part.module, layer) for part in parts]
        for name, wanted in bank.arrays.items():
            held = [array(each.arrays[name]) for each in banks]
            if name.startswith("down"):
                got = np.concatenate(held, axis=2)
            elif len(bank.gate_up) == 2:
                got = np.concatenate(held, axis=1)
            else:
                halves = [np.split(each, 2, axis=1) for each in held]
                got = np.concatenate([half[index] for index in (0, 1) for half in halves], axis=1)
            np.testing.assert_array_equal(got, array(wanted), err_msg=f"layer {layer} {name}")


def test_every_machine_has_the_trunk_and_only_the_leader_the_head(floats: Path) -> None:
    whole, parts = _parts(floats, UNEVEN)
    wanted = whole.module.hidden(TOKENS, whole.module.make_cache())
    for part in parts:
        assert len(part.module.layers) == LAYERS
        assert part.module.norm is not None
        assert (part.module.lm_head is None) == (part.builder.share != parts[0].builder.share)
        for ours, theirs in zip(part.module.layers, whole.module.layers, strict=True):
            for mine, other in ((ours.attention.qkv[0], theirs.attention.qkv[0]), (_gate(ours), _gate(theirs))):
                np.testing.assert_array_equal(array(mine.weight), array(other.weight))
    leader, *followers = parts
    np.testing.assert_array_equal(array(leader.module.head(wanted)), array(whole.module.head(wanted)))
    with pytest.raises(AssertionError, match="does not hold the output head"):
        followers[0].module.head(wanted)


def _gate(layer: Any) -> Any:
    return layer.moe.gate


def _through(parts: Sequence[Built], tokens: mx.array, caches: Sequence[Any], *, last_only: bool = False) -> mx.array:
    """Hidden states, the stages one after the other."""
    x, (rows, length) = parts[0].module.embed(tokens), tokens.shape
    for part, cache in zip(parts, caches, strict=True):
        view = cache.chunk(rows, length, part.module.frequencies(cache.length + length))
        x = part.module.stage(x, view, last_only=last_only and part is parts[-1])
        cache.advance(length)
    return x


@pytest.mark.parametrize("kind", ["mixture", "tied", "dense"])
@pytest.mark.parametrize("weights", [EQUAL, (1, 1, 1)], ids=["2", "3"])
def test_stages_one_after_the_other_are_the_whole_model(
    floats: Path, shared: SharedFolders, weights: Sequence[float], kind: str
) -> None:
    folder = floats
    if kind == "tied":
        tensors = tensors_of(floats)
        del tensors["lm_head.weight"]
        folder = shared("shares tied", lambda out: rewritten(floats, out, tensors, tie_word_embeddings=True))
    elif kind == "dense":
        folder = shared("shares dense", lambda out: _dense(floats, out))
    whole, parts = _parts(folder, weights, "layers")
    cache, caches = whole.module.make_cache(), [part.module.make_cache() for part in parts]
    for tokens in (TOKENS, TOKENS[:, 3:4], TOKENS[:, 9:10]):
        wanted, got = whole.module.hidden(tokens, cache), _through(parts, tokens, caches)
        np.testing.assert_array_equal(array(got), array(wanted))
        np.testing.assert_array_equal(array(parts[0].module.head(got)), array(whole.module.head(wanted)))
    wanted, got = whole.module.hidden(TOKENS, cache, last_only=True), _through(parts, TOKENS, caches, last_only=True)
    np.testing.assert_array_equal(array(got), array(wanted))
    assert sum(each.nbytes for each in caches) == cache.nbytes
    assert [len(part.module.layers) for part in parts] == [len(part.builder.held.layers) for part in parts]
    for part in parts[1:]:
        assert part.module.embed_tokens is part.module.norm is part.module.lm_head is None


def _dense(floats: Path, out: Path) -> None:
    tensors = {name: tensor for name, tensor in tensors_of(floats).items() if ".block_sparse_moe." not in name}
    for name, tensor in tensors_of(floats).items():
        if ".experts.0." in name:
            head, _, tail = name.partition(".block_sparse_moe.experts.0.")
            tensors[f"{head}.mlp.{ {'w1': 'gate', 'w2': 'down', 'w3': 'up'}[tail[:2]] }_proj.weight"] = tensor
    rewritten(floats, out, tensors, model_type="llama", architectures=["LlamaForCausalLM"])


@pytest.mark.parametrize("split", ["experts", "layers"])
@pytest.mark.parametrize("packing", ["hugging face", "3 bits", "mixed", "mxfp4"])
def test_sizes_are_what_is_allocated(folder_of: MakeFolder, packing: str, split: str) -> None:
    weights = UNEVEN if split == "experts" else (1, 1, 1)
    whole, parts = _parts(folder_of(packing), weights, split)
    for part in (whole, *parts):
        sizes = part.builder.sizes()
        assert part.module.nbytes == part.builder.memory_bytes == sizes.trunk_bytes + sizes.all_expert_bytes
        assert len(sizes.expert_bytes) == len(sizes.kinds) == len(part.module.layers)
        for layer in range(len(part.module.layers)):
            arrays = _bank(part.module, layer).arrays.values()
            assert sum(each.nbytes for each in arrays) == sizes.expert_bytes[layer] * sizes.num_experts
    assert sum(part.builder.sizes().all_expert_bytes for part in parts) == whole.builder.sizes().all_expert_bytes
    if split == "layers":
        assert sum(part.module.nbytes for part in parts) == whole.module.nbytes
        return
    largest = [part.builder.largest_matrix for part in (whole, parts[2])]
    assert largest == [384 * 128, 256 * 128]  # an expert's; the embedding, where experts are narrow


def _files_bytes(built_of: Built, part: str) -> int:
    """Bytes on disk of experts, or of everything else."""
    moe, found = (".experts.", ".switch_mlp."), 0
    for name, info in built_of.builder.checkpoint.items():
        if any(each in name for each in moe) == (part == "experts"):
            found += info.nbytes
    return found


@pytest.mark.parametrize("packing", ["hugging face", "fused", "4 bits", "3 bits", "packed apart"])
def test_a_machine_reads_its_rows_of_gate_and_up_and_whole_rows_of_down(
    folder_of: MakeFolder, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, counted = CheckpointReader.read, list[int]()

    def counting(self: CheckpointReader, info: TensorInfo, buffer: memoryview, skip_bytes: int = 0) -> None:
        counted.append(buffer.nbytes)
        read(self, info, buffer, skip_bytes)

    monkeypatch.setattr(CheckpointReader, "read", counting)
    folder = folder_of(packing)
    whole = built(folder)
    assert sum(counted) == whole.builder.checkpoint.nbytes
    for share, sixths in zip(shares_of(folder, "experts", UNEVEN), UNEVEN, strict=True):
        counted.clear()
        made = built(folder, share)
        assert sum(counted) == made.nbytes_read
        kept = Fraction(1, 3) + Fraction(2, 3) * Fraction(sixths, 6)
        head = 0 if share.is_leader else _head_bytes(whole)
        assert sum(counted) + head == _files_bytes(whole, "trunk") + _files_bytes(whole, "experts") * kept
        sizes, all_sizes = made.builder.sizes(), whole.builder.sizes()
        assert list(sizes.expert_file_bytes) == [nbytes * kept for nbytes in all_sizes.expert_file_bytes]


def _head_bytes(whole: Built) -> int:
    return sum(info.nbytes for name, info in whole.builder.checkpoint.items() if name.startswith("lm_head."))


def test_a_stage_reads_its_own_layers(folder_of: MakeFolder) -> None:
    whole, parts = _parts(folder_of("4 bits"), (1, 1, 1), "layers")
    assert sum(part.nbytes_read for part in parts) == whole.nbytes_read == whole.builder.checkpoint.nbytes
    assert parts[1].nbytes_read == parts[2].nbytes_read < parts[0].nbytes_read


@pytest.mark.parametrize("split", ["experts", "layers"])
def test_a_tensor_that_only_another_machine_needs_is_missed_everywhere(
    floats: Path, tmp_path: Path, split: str
) -> None:
    tensors = tensors_of(floats)
    del tensors[f"model.layers.{LAYERS - 1}.block_sparse_moe.experts.3.w2.weight"]
    rewritten(floats, tmp_path / "out", tensors)
    for share in shares_of(floats, split, EQUAL):
        with pytest.raises(CheckpointError, match=r"layers\.2.*experts\.3\.w2"):
            builder(tmp_path / "out", share)


def test_values_beyond_the_type_are_found_in_columns_too(floats: Path, tmp_path: Path) -> None:
    tensors = tensors_of(floats)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    damaged = np.array(tensors[name].astype(mx.float32))
    damaged[77, SHAPE["intermediate_size"] - 1] = np.nan
    tensors[name] = mx.array(damaged).astype(mx.bfloat16)
    rewritten(floats, tmp_path / "out", tensors)
    first, last = shares_of(floats, "experts", EQUAL)
    built(tmp_path / "out", first)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2\.weight' holds NaN or infinity in row 77;"):
        built(tmp_path / "out", last)


def test_one_machine_holds_all_of_it(floats: Path) -> None:
    whole = built(floats)
    for split in ("experts", "layers"):
        (share,) = shares_of(floats, split, (1,))
        made = built(floats, share)
        assert (made.module.nbytes, made.nbytes_read) == (whole.module.nbytes, whole.nbytes_read)
        logits = (array(each.module(TOKENS)) for each in (made, whole))
        np.testing.assert_array_equal(*logits)


def test_a_cut_within_a_group_is_a_defect_of_ours(folder_of: MakeFolder) -> None:
    share = Share(0, 2, "experts", range(LAYERS), range(32))
    with pytest.raises(AssertionError, match="parts a quantisation group"):
        builder(folder_of("4 bits"), share)

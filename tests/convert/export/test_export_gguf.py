"""Export to GGUF, read back by the ``gguf`` package: keys, tensors, the order of rows, and integers that move unchanged."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from mlx_mixtral import load
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.export.gguf_blocks import repack
from mlx_mixtral_convert.packing.codes import pack
from tests.convert.export_support import (
    BYTE,
    PIECES,
    UNUSED,
    add_tokenizer,
    expected,
    fields,
    floats,
    interleaved,
    tensors,
)
from tests.convert.support import CONFIG, EXPERT, Tensors, dense_config, load_arrays, make_checkpoint, weights

TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def kind_of(tensor: Any) -> str:
    return str(gguf.GGMLQuantizationType(tensor.tensor_type).name)


def packed_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every quantised tensor."""
    found = {name: (kind_of(tensor), tensor.data.tobytes()) for name, tensor in tensors(path).items()}
    return {name: entry for name, entry in found.items() if entry[0] != "F32"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return add_tokenizer(make_checkpoint(tmp_path / "source"))


@pytest.mark.parametrize("kind", TYPES)
def test_every_tensor_is_there_in_llama_cpps_order(kind: str, source: Path, tmp_path: Path) -> None:
    report = export(source, tmp_path / "out.gguf", to="gguf", type=kind)
    found, wanted = tensors(tmp_path / "out.gguf"), expected(weights(CONFIG), CONFIG)
    assert sorted(found) == sorted(wanted)
    for name, weight in wanted.items():
        plain = "norm" in name or "ffn_gate_inp" in name
        assert kind_of(found[name]) == ("F32" if plain else kind), name
        stored = gguf.GGMLQuantizationType["F32" if plain else kind]
        theirs = quants.quantize(weight, stored)
        if plain or kind in ("F16", "BF16"):
            assert found[name].data.tobytes() == theirs.tobytes(), name
        else:
            # The package spreads a block's range; a search finds less error.
            error = np.linalg.norm(floats(found[name]) - weight)
            assert error < 0.995 * np.linalg.norm(quants.dequantize(theirs, stored) - weight), name
    assert (report.type, report.format) == (kind, "gguf")
    assert report.output_bytes == (tmp_path / "out.gguf").stat().st_size
    assert report.bits_per_weight == pytest.approx(8 * sum(t.data.nbytes for t in found.values()) / report.parameters)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "source"]


def test_float16_is_the_default_and_holds_bfloat16_weights_exactly(source: Path, tmp_path: Path) -> None:
    assert export(source, tmp_path / "out.gguf", to="gguf").type == "F16"
    wanted = expected(weights(CONFIG), CONFIG)
    for name, tensor in tensors(tmp_path / "out.gguf").items():
        large = np.abs(wanted[name]) >= 2.0**-14
        assert np.array_equal(floats(tensor)[large], wanted[name][large]), name


def test_keys_describe_the_model(tmp_path: Path) -> None:
    source = add_tokenizer(
        make_checkpoint(tmp_path / "my-model", head_dim=16, num_key_value_heads=1, edit=_narrow_heads)
    )
    export(source, tmp_path / "out.gguf", to="gguf", type="Q8_0")
    found = fields(tmp_path / "out.gguf")
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "my-model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": 64,
        "llama.context_length": 64,
        "llama.embedding_length": 128,
        "llama.block_count": 2,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 1e6,
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
    }
    assert {key: found[key] for key in wanted} == wanted
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    others = {key for key in found if key not in wanted and not key.startswith(("tokenizer.", "GGUF."))}
    assert others == {"llama.attention.layer_norm_rms_epsilon"}


def _narrow_heads(made: Tensors) -> None:
    for name in made:
        if "q_proj" in name:
            made[name] = made[name][:64]
        elif "k_proj" in name or "v_proj" in name:
            made[name] = made[name][:16]
        elif "o_proj" in name:
            made[name] = made[name][:, :64]


def test_the_vocabulary_is_the_tokenizers_padded_to_the_models(source: Path, tmp_path: Path) -> None:
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
        "add_eos_token": True,
        "added_tokens_decoder": {
            "11": {"content": "<|im_end|>", "special": True},
            "12": {"content": "<think>", "special": False},
            "99": {"content": "<beyond>", "special": True},
        },
        "chat_template": [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}],
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    report = export(source, tmp_path / "out.gguf", to="gguf")
    found = fields(tmp_path / "out.gguf")
    pieces = len(PIECES)
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[:pieces] == [piece for piece, _, _ in PIECES]
    assert tokens[pieces:] == ["[PAD10]", "<|im_end|>", "<think>", *(f"[PAD{i}]" for i in range(13, 64))]
    assert found["tokenizer.ggml.scores"][:pieces] == [score for _, score, _ in PIECES]
    # [INST] is a marker: CONTROL (3), whatever the model calls it. <think> is shown in text: USER_DEFINED (4).
    assert found["tokenizer.ggml.token_type"] == [2, 3, 3, 1, 1, 1, 1, 1, 3, 5, UNUSED, 3, 4, *[UNUSED] * 51]
    ids = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")}
    assert ids == {"bos": 1, "eos": 11, "unknown": 0}
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is True
    assert found["tokenizer.chat_template"] == "{{ 1 }}"
    assert found["tokenizer.chat_template.tool_use"] == "{{ 2 }}"
    assert report.notes == ()


def test_without_settings_the_model_says_where_texts_begin_and_end(source: Path, tmp_path: Path) -> None:
    report = export(source, tmp_path / "out.gguf", to="gguf")
    found = fields(tmp_path / "out.gguf")
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert "tokenizer.chat_template" not in found
    assert ["chat template" in note for note in report.notes] == [True]


def test_the_bundled_tokenizer_is_as_sentencepiece_has_it(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "out.gguf", to="gguf", type="Q4_0")
    found, pieces = fields(tmp_path / "out.gguf"), SentencePieceProcessor()
    pieces.LoadFromSerializedProto((tiny / "tokenizer.model").read_bytes())
    size = pieces.vocab_size()
    assert found["tokenizer.ggml.tokens"][:size] == [pieces.id_to_piece(i) for i in range(size)]
    assert found["tokenizer.ggml.scores"][:size] == [pieces.get_score(i) for i in range(size)]
    kinds = found["tokenizer.ggml.token_type"]
    assert [i for i, kind in enumerate(kinds) if kind == BYTE] == [i for i in range(size) if pieces.is_byte(i)]
    assert kinds.count(BYTE) == 256


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_a_dense_model_has_no_experts(kind: str, tmp_path: Path) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source", **dense_config(kind)))
    export(source, tmp_path / "out.gguf", to="gguf", type="BF16")
    config = CONFIG | dense_config(kind)
    wanted = expected(weights(config), config)
    found = tensors(tmp_path / "out.gguf")
    assert sorted(found) == sorted(wanted)
    assert all(np.array_equal(floats(found[name]), weight) for name, weight in wanted.items())
    assert not [key for key in fields(tmp_path / "out.gguf") if "expert" in key]


def test_tied_embeddings_have_no_output_matrix(tmp_path: Path) -> None:
    def drop(made: Tensors) -> None:
        del made["lm_head.weight"]

    source = add_tokenizer(make_checkpoint(tmp_path / "source", edit=drop, tie_word_embeddings=True))
    export(source, tmp_path / "out.gguf", to="gguf")
    assert "output.weight" not in tensors(tmp_path / "out.gguf")
    assert "token_embd.weight" in tensors(tmp_path / "out.gguf")


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source", sliding_window=48))
    report = export(source, tmp_path / "out.gguf", to="gguf")
    assert fields(tmp_path / "out.gguf")["llama.context_length"] == 48
    assert "48 tokens" in report.notes[0]


def test_linear_rope_scaling_has_keys(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", rope_scaling={"type": "linear", "factor": 4.0})
    export(add_tokenizer(source), tmp_path / "out.gguf", to="gguf")
    found = fields(tmp_path / "out.gguf")
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_yarn_rope_scaling_has_keys(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32}
    source = make_checkpoint(tmp_path / "source", rope_scaling=scaling)
    export(add_tokenizer(source), tmp_path / "out.gguf", to="gguf")
    found = fields(tmp_path / "out.gguf")
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("yarn", 4.0)
    assert found["llama.rope.scaling.original_context_length"] == 16


def test_tensors_of_odd_sizes_are_padded(tmp_path: Path) -> None:
    odd = {"hidden_size": 40, "intermediate_size": 36, "vocab_size": 63, "num_local_experts": 3}
    source = add_tokenizer(make_checkpoint(tmp_path / "source", **odd))
    report = export(source, tmp_path / "out.gguf", to="gguf", type="BF16")
    found, wanted = tensors(tmp_path / "out.gguf"), expected(weights(CONFIG | odd), CONFIG | odd)
    assert any(tensor.data.nbytes % 32 for tensor in found.values())
    assert all(np.array_equal(floats(found[name]), weight) for name, weight in wanted.items())
    assert report.output_bytes == (tmp_path / "out.gguf").stat().st_size


def test_llama3_rope_scaling_is_a_tensor_of_divisors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = make_checkpoint(tmp_path / "source", rope_scaling=scaling)
    export(add_tokenizer(source), tmp_path / "out.gguf", to="gguf")
    found = floats(tensors(tmp_path / "out.gguf")["rope_freqs.weight"])
    # The loop of llama.cpp's convert_hf_to_gguf.py.
    wanted = []
    for i in range(0, 32, 2):
        wavelength = 2 * np.pi * 1e6 ** (i / 32)
        if wavelength < 64 / 4:
            wanted.append(1.0)
        elif wavelength > 64:
            wanted.append(8.0)
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            wanted.append(1 / ((1 - smooth) / 8 + smooth))
    assert {1.0, 8.0} < set(wanted)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_mlx_weights_of_four_bits_or_less_are_q4_1_exactly(bits: int, group: int, dtype: str, tmp_path: Path) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source", dtype=dtype))
    convert(source, tmp_path / "mlx", recipe=Recipe(bits, group))
    report = export(tmp_path / "mlx", tmp_path / "out.gguf", to="gguf", type="Q4_1")
    assert (report.packed_matrices, report.exact_matrices) == (16, 16)
    packed: dict[str, mx.array] = {}
    for file in (tmp_path / "mlx").glob("*.safetensors"):
        packed |= load_arrays(file)
    found = tensors(tmp_path / "out.gguf")

    def unpacked(path: str) -> np.ndarray[Any, Any]:
        words, scales, biases = (packed[f"{path}.{field}"] for field in ("weight", "scales", "biases"))
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        return np.array(mx.dequantize(words, *wide, group_size=group, bits=bits))

    layer = "model.layers.1"
    for ours, theirs in (("gate", "gate"), ("up", "up"), ("down", "down")):
        stacked = unpacked(f"{layer}.block_sparse_moe.switch_mlp.{ours}_proj")
        np.testing.assert_array_equal(floats(found[f"blk.1.ffn_{theirs}_exps.weight"]), stacked)
    np.testing.assert_array_equal(floats(found["token_embd.weight"]), unpacked("model.embed_tokens"))
    k = interleaved(unpacked(f"{layer}.self_attn.k_proj"), 2)
    np.testing.assert_array_equal(floats(found["blk.1.attn_k.weight"]), k)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([32, 64]),
    zero=st.sampled_from([0, 1, 7, 8, 9, 16, 20, 128, 129]),
    nudge=st.booleans(),
    kind=st.sampled_from(["Q4_0", "Q8_0"]),
    seed=st.integers(0, 99),
)
def test_a_symmetric_type_takes_integers_in_its_range_and_no_others(
    bits: int, group: int, zero: int, nudge: bool, kind: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (3, 64)).astype(np.uint8)
    scales = random.choice([0.0, 0.25, -0.75, 3.0], (3, 64 // group)).astype(np.float16)
    biases = (-zero * scales).astype(np.float16)
    if nudge:
        biases[1, 0] += np.float16(0.5) if abs(biases[1, 0]) > 64 else np.float16(0.0625)
    blocks = repack(
        {"weight": np.array(pack(mx.array(codes), bits)), "scales": scales, "biases": biases},
        QuantizationSpec(bits, group),
        kind,
    )
    wide = [np.repeat(array, group, axis=1).astype(np.float64) for array in (scales, biases)]
    moved = np.where(wide[0] == 0, 0, codes.astype(int) - zero)
    lowest, highest = {"Q4_0": (-8, 7), "Q8_0": (-128, 127)}[kind]
    fits = moved.min() >= lowest and moved.max() <= highest
    if nudge or not fits:
        assert blocks is None
    else:
        assert blocks is not None
        found = quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(found, wide[0] * codes + wide[1])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_to_mlx_and_back_is_the_same_bytes(kind: str, short: Path, tmp_path: Path) -> None:
    export(short, tmp_path / "first.gguf", to="gguf", type=kind)
    convert(tmp_path / "first.gguf", tmp_path / "mlx", exact=True)
    report = export(tmp_path / "mlx", tmp_path / "second.gguf", to="gguf", type=kind)
    assert report.packed_matrices == report.exact_matrices > 0
    assert packed_bytes(tmp_path / "first.gguf") == packed_bytes(tmp_path / "second.gguf")
    assert (
        fields(tmp_path / "first.gguf")["tokenizer.ggml.tokens"]
        == fields(tmp_path / "second.gguf")["tokenizer.ggml.tokens"]
    )


def test_scales_that_float16_cannot_hold_are_quantised_anew(tmp_path: Path) -> None:
    def shrink(made: Tensors) -> None:
        made[EXPERT] *= np.float32(2.0**-16)

    source = add_tokenizer(make_checkpoint(tmp_path / "source", edit=shrink))
    convert(source, tmp_path / "mlx", recipe=Recipe(4, 64))
    report = export(tmp_path / "mlx", tmp_path / "out.gguf", to="gguf", type="Q4_1")
    assert (report.packed_matrices, report.exact_matrices) == (16, 15)


def test_scales_beyond_float16_are_quantised_anew_too(tmp_path: Path) -> None:
    def enlarge(made: Tensors) -> None:
        made[EXPERT] *= np.float32(2.0**22)

    source = add_tokenizer(make_checkpoint(tmp_path / "source", edit=enlarge))
    convert(source, tmp_path / "mlx", recipe=Recipe(4, 64))
    export(tmp_path / "mlx", tmp_path / "out.gguf", to="gguf", type="Q8_0")
    found = floats(tensors(tmp_path / "out.gguf")["blk.1.ffn_down_exps.weight"])[2]
    kept = weights(CONFIG)[EXPERT] * np.float32(2.0**22)
    assert np.linalg.norm(found - kept) < 0.12 * np.linalg.norm(kept)


def test_eight_bits_do_not_pass_for_q4_1_nor_an_odd_bias_for_q8_0(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "mlx", recipe=Recipe(8, 32))
    for kind in ("Q4_1", "Q8_0", "F16"):
        report = export(tmp_path / "mlx", tmp_path / f"{kind}.gguf", to="gguf", type=kind)
        assert report.exact_matrices == 0
    kept = weights(CONFIG)["lm_head.weight"]
    found = floats(tensors(tmp_path / "Q8_0.gguf")["output.weight"])
    assert np.linalg.norm(found - kept) < 0.01 * np.linalg.norm(kept)


def test_logits_survive_gguf_and_the_way_back(tiny: Path, tmp_path: Path, recorded: dict[str, Any]) -> None:
    export(tiny, tmp_path / "out.gguf", to="gguf", type="F16")
    convert(tmp_path / "out.gguf", tmp_path / "back", recipe=Recipe(None))
    ids = [int(token) for token in recorded["ids"][0]]
    # The trained weights are bfloat16 in the source, float16 in the result: computed in one type they are compared as such.
    with load(tiny, dtype="float32") as first, load(tmp_path / "back", dtype="float32") as second:
        ours, theirs = (np.asarray(model.logits(ids)) for model in (first, second))
    assert np.abs(ours - theirs).max() < 1e-3
    assert ours.std() > 1


def test_the_same_source_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(source, tmp_path / f"{name}.gguf", to="gguf", type="Q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    peaks = []
    for experts in (2, 2, 20):
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": experts, "num_hidden_layers": 1}
        source = add_tokenizer(make_checkpoint(tmp_path / f"source-{len(peaks)}", **sizes))
        tracemalloc.start()
        try:
            export(source, tmp_path / f"{len(peaks)}.gguf", to="gguf", type="Q8_0")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    # The first loads modules. The third has 54 matrices more than the second.
    expert_bytes = 256 * 1024 * 2
    assert peaks[2] < peaks[1] + 6 * expert_bytes

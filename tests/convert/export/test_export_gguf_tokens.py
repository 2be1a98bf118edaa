"""Special tokens through GGUF: declared contents, kinds and stops, read by the ``gguf`` package and converted back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.export import export
from tests.convert.export_support import PIECES, add_tokenizer, fields, spm_model
from tests.convert.support import make_checkpoint

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5


def declared(content: str, special: bool = True) -> dict[str, Any]:
    return {"content": content, "special": special}


# What tokenizer_config.json declares: base pieces renamed, tokens added, both, and by other files.
DECLARED: dict[str, dict[str, Any]] = {
    "the end is a base piece": {"eos_token": "<|im_end|>", "added_tokens_decoder": {"2": declared("<|im_end|>")}},
    "an ordinary piece renamed": {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"7": declared("<|im_start|>"), "2": declared("<|im_end|>")},
    },
    "unknown and unused renamed": {
        "added_tokens_decoder": {"0": declared("<|unk|>"), "9": declared("<tool>", False), "1": declared("<|bos|>")},
        "bos_token": "<|bos|>",
        "pad_token": "<|unk|>",
    },
    "onto a spelling that another piece has": {"added_tokens_decoder": {"12": declared("c"), "13": declared("ab")}},
    "beyond the pieces": {
        "eos_token": "</s>",
        "added_tokens_decoder": {
            "12": declared("<|im_start|>"),
            "13": declared("<|im_end|>"),
            "14": declared("<x>", False),
        },
        "chat_template": CHATML,
    },
    "a marker of the model that is shown": {"added_tokens_decoder": {"8": declared("[INST]", False)}},
}


def opened(folder: Path) -> Tokenizer:
    config = MixtralConfig.from_folder(folder)
    return load_tokenizer(folder, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)


def there_and_back(source: Path, tmp_path: Path) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer of an MLX folder, and of the MLX folder made of its GGUF."""
    convert(source, tmp_path / "mlx", recipe=Recipe(bits=None))
    export(tmp_path / "mlx", tmp_path / "out.gguf", to="gguf")
    convert(tmp_path / "out.gguf", tmp_path / "again", recipe=Recipe(bits=None))
    return opened(tmp_path / "mlx"), opened(tmp_path / "again")


@pytest.mark.parametrize("case", DECLARED)
def test_ids_of_special_tokens_are_the_same_after_a_round_trip(tmp_path: Path, case: str) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source"))
    (source / "tokenizer.model").write_bytes(spm_model((*PIECES, ("d", -4.0, 1), ("<e>", -5.0, 4))))
    (source / "tokenizer_config.json").write_text(json.dumps(DECLARED[case]))
    before, after = there_and_back(source, tmp_path)
    specials = before.markers.by_content
    assert {content: after.special_id(content) for content in specials} == {
        content: token.token_id for content, token in specials.items()
    }
    for content, token in specials.items():
        assert after.encode(f"a{content}b", bos=False, special=True) == before.encode(
            f"a{content}b", bos=False, special=True
        )
        # What the model alone calls a marker is control in GGUF, and shown here; the unknown token is shown in its own way.
        if str(token.token_id) in DECLARED[case]["added_tokens_decoder"] and token.token_id != 0:
            assert after.decode([token.token_id]) == before.decode([token.token_id]), content
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)
    assert after.eos_token_ids == before.eos_token_ids
    assert after.encode("abc ab") == before.encode("abc ab")


def test_declared_contents_and_kinds_are_in_the_file(tmp_path: Path) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source", eos_token_id=2))
    settings = {
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "added_tokens_decoder": {
            "0": declared("<|unk|>"), "2": declared("<|end|>"), "3": declared("<|pad|>"), "5": declared("<t>", False),
            "12": declared("<|im_start|>"), "13": declared("<|im_end|>"), "14": declared("</s>"),
        },
        "chat_template": CHATML,
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 14, 13, 11]}))
    report = export(source, tmp_path / "out.gguf", to="gguf")
    found = fields(tmp_path / "out.gguf")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[:8] == ["<|unk|>", "<s>", "<|end|>", "<|pad|>", "\u2581", "<t>", "b", "ab"]
    assert kinds[:6] == [UNKNOWN, CONTROL, CONTROL, CONTROL, 1, USER_DEFINED]
    assert (tokens[12:15], kinds[12:15]) == (["<|im_start|>", "<|im_end|>", "</s>"], [CONTROL] * 3)
    assert len(set(tokens)) == len(tokens)
    named = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom", "unknown", "padding")}
    assert named == {"eos": 2, "eot": 13, "eom": 14, "unknown": 0, "padding": 3}
    assert any("will not stop at 11" in note for note in report.notes)


def test_files_beside_the_tokenizer_travel_with_a_conversion(tmp_path: Path) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source"))
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (source / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 10, "<|im_end|>": 11}))
    (source / "chat_template.jinja").write_text(CHATML)
    before, after = there_and_back(source, tmp_path)
    for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        assert (tmp_path / "mlx" / name).read_bytes() == (source / name).read_bytes()
    export(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert opened(tmp_path / "hf").eos_token_ids == before.eos_token_ids == after.eos_token_ids == {2, 11}
    assert before.eos_token_id == after.eos_token_id == 11
    messages = [{"role": "user", "content": "ab <|im_end|>"}]
    assert after.encode_chat(messages) == before.encode_chat(messages) == opened(tmp_path / "hf").encode_chat(messages)


def test_a_conversion_says_where_two_tokenizers_differ(tmp_path: Path) -> None:
    source = add_tokenizer(make_checkpoint(tmp_path / "source"))
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(PIECES)}
    (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    assert convert(source, tmp_path / "same", recipe=Recipe(bits=None)).notes == ()
    vocabulary["z"] = vocabulary.pop("c")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    (note,) = convert(source, tmp_path / "other", recipe=Recipe(bits=None)).notes
    assert "id 3 is 'c' in the first and 'z' in the second" in note
    (source / "special_tokens_map.json").write_text("[]")
    (note,) = convert(source, tmp_path / "broken", recipe=Recipe(bits=None)).notes
    assert note.startswith("the tokenizer cannot be used: special_tokens_map.json holds")

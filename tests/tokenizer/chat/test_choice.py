"""Which chat format a checkpoint gets without a template of its own, what the named ones write, and how to choose another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlx_mixtral.errors import ChatTemplateError, InvalidRequestError
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer
from mlx_mixtral.tokenizer.chat.choice import given_template
from mlx_mixtral.tokenizer.chat.named import TEMPLATES
from tests.tokenizer.support import CHATML, FolderMaker

SYSTEM, USER, REPLY, AGAIN = "You help", "Hello", "Hi there", "Who are you"
TURNS = [
    {"role": "user", "content": USER},
    {"role": "assistant", "content": REPLY},
    {"role": "user", "content": AGAIN},
]
TALK = [{"role": "system", "content": SYSTEM}, *TURNS]
MARKERS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama-3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi-3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": ["<|system|>", "<|user|>", "<|assistant|>"],
    "openchat": ["<|end_of_turn|>"],
}
# As their authors show them: model cards of OpenHermes, Llama 3, Gemma, Phi-3, Zephyr and OpenChat, llama's and Alpaca's
# repositories, FastChat's Vicuna 1.1.
WRITTEN = {
    "chatml": (
        "<s><|im_start|>system\nYou help<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there"
        "<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou help<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi there<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nWho are you<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\nYou help\n\nHello<end_of_turn>\n<start_of_turn>model\nHi there<end_of_turn>\n"
        "<start_of_turn>user\nWho are you<end_of_turn>\n<start_of_turn>model\n"
    ),
    "phi-3": (
        "<s><|system|>\nYou help<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi there<|end|>\n<|user|>\nWho are you<|end|>\n"
        "<|assistant|>\n"
    ),
    "zephyr": (
        "<s><|system|>\nYou help</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n<|user|>\nWho are you</s>\n"
        "<|assistant|>\n"
    ),
    "openchat": (
        "<s>You help<|end_of_turn|>GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant: Hi there<|end_of_turn|>"
        "GPT4 Correct User: Who are you<|end_of_turn|>GPT4 Correct Assistant:"
    ),
    "llama-2": (
        "<s>[INST] <<SYS>>\nYou help\n<</SYS>>\n\nHello [/INST] Hi there </s><s>[INST] Who are you [/INST]"
    ),
    "vicuna": "<s>You help USER: Hello ASSISTANT: Hi there</s>USER: Who are you ASSISTANT:",
    "alpaca": (
        "<s>You help\n\n### Instruction:\nHello\n\n### Response:\nHi there</s>\n\n### Instruction:\nWho are you\n\n"
        "### Response:\n"
    ),
}  # fmt: skip
ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi-3": "<|end|>"} | {
    "zephyr": "</s>", "openchat": "<|end_of_turn|>", "llama-2": "</s>", "vicuna": "</s>", "alpaca": "</s>"
}  # fmt: skip


def added(model_size: int, markers: list[str]) -> dict[str, Any]:
    return {str(model_size + i): {"content": marker, "special": True} for i, marker in enumerate(markers)}


@pytest.mark.parametrize("name", MARKERS)
def test_a_family_is_known_by_its_control_tokens(make_folder: FolderMaker, name: str) -> None:
    config = {"added_tokens_decoder": added(4096, MARKERS[name])}
    tokenizer = load_tokenizer(make_folder("tiny", tokenizer_config=config))
    assert (tokenizer.chat_format, tokenizer.chat_origin) == (name, "control tokens")
    assert f"the control tokens indicate {name}" in tokenizer.chat_note
    ids = tokenizer.encode_chat(TALK)
    assert ids == tokenizer.encode(WRITTEN[name], special=True)
    assert ids.count(tokenizer.end_of_turn or -1) == {"zephyr": 4}.get(name, 3 if name == "gemma" else 4)
    typed = tokenizer.encode_chat([{"role": "user", "content": MARKERS[name][-1]}])
    assert typed.count(tokenizer.special_id(MARKERS[name][-1]) or -1) <= 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_format_is_written_as_its_authors_show_it(make_folder: FolderMaker, name: str) -> None:
    config = {"added_tokens_decoder": added(4096, MARKERS.get(name, []))}
    folder = make_folder("tiny", tokenizer_config=config)
    tokenizer = load_tokenizer(folder, chat_template=given_template(name))
    assert tokenizer.render_chat(TALK) == WRITTEN[name]
    assert (tokenizer.chat_format, tokenizer.chat_origin, tokenizer.chat_note) == (name, name, "")
    assert {tokenizer.id_to_piece(i) for i in tokenizer.eos_token_ids} == {"</s>", ENDS[name]}
    without = tokenizer.render_chat(TURNS)
    instead = "Below is an instruction that describes a task." if name == "alpaca" else ""
    assert SYSTEM not in without
    assert instead in without
    assert USER in without


def test_the_ids_openchat_publishes(make_folder: FolderMaker) -> None:
    """From the model card of openchat/openchat_3.5, whose vocabulary is v1 with <|end_of_turn|> at 32000."""
    folder = make_folder("v1", added_tokens={"<|end_of_turn|>": 32000, "<|pad_0|>": 32001})
    tokenizer = load_tokenizer(folder, vocab_size=32002)
    assert tokenizer.encode_chat([{"role": "user", "content": "Hello"}]) == [
        1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000, 420, 6316, 28781, 3198, 3123, 21631, 28747,
    ]  # fmt: skip
    assert tokenizer.eos_token_ids == {2, 32000}


def test_chatml_without_a_template_is_what_transformers_makes_of_the_usual_one(make_folder: FolderMaker) -> None:
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added(32000, ["<|im_end|>", "<|im_start|>"])}
    folder = make_folder("v1", tokenizer_config=config | {"tokenizer_class": "LlamaTokenizer", "legacy": True})
    tokenizer = load_tokenizer(folder, vocab_size=32002)
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(TALK, chat_template=CHATML, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(TALK) == [1, *ids]
    config["add_bos_token"] = False
    assert load_tokenizer(make_folder("v1", tokenizer_config=config)).encode_chat(TALK)[0] == 32001


@pytest.mark.parametrize(
    ("model", "markers", "expected"),
    [
        ("v1", [], ("mistral-v1", "a guess", True)),
        ("v3", [], ("mistral-v3", "control tokens", False)),
        # A fine-tune's markers say more than those its base model had.
        ("v3", MARKERS["chatml"], ("chatml", "control tokens", True)),
        ("v1", ["<|im_start|>"], ("mistral-v1", "a guess", True)),
        ("v1", ["[INST]", "[/INST]"], ("mistral-v3", "control tokens", False)),
    ],
)
def test_where_nothing_says_it_the_format_is_a_guess_and_called_one(
    make_folder: FolderMaker, model: str, markers: list[str], expected: tuple[str, str, bool]
) -> None:
    size = {"v1": 32000, "v3": 32768}[model]
    folder = make_folder(model, tokenizer_config={"added_tokens_decoder": added(size, markers)})
    tokenizer = load_tokenizer(folder)
    note = "--chat-template FILE or NAME" in tokenizer.chat_note
    assert (tokenizer.chat_format, tokenizer.chat_origin, note) == expected


@pytest.mark.parametrize(
    ("files", "origin"),
    [
        ({"chat_template": CHATML}, "chat_template.jinja"),
        ({"chat_template": {"chat_template": CHATML}}, "chat_template.json"),
        ({"tokenizer_config": {"chat_template": CHATML}}, "tokenizer_config.json"),
    ],
)
def test_a_template_of_its_own_is_named_and_another_overrides_it(
    make_folder: FolderMaker, tmp_path: Path, files: dict[str, Any], origin: str
) -> None:
    folder = make_folder("v1", **files)
    own = load_tokenizer(folder)
    assert (own.chat_format, own.chat_origin, own.chat_note) == ("template", origin, "")

    def chosen(value: str | Path) -> Tokenizer:
        return load_tokenizer(folder, chat_template=given_template(value))

    (tmp_path / "mine.jinja").write_text("Q: {{ messages[-1].content }} A:", "utf-8")
    (tmp_path / "mine.json").write_text(json.dumps({"chat_template": "{{ messages | length }}"}))
    assert chosen(tmp_path / "mine.jinja").render_chat(TALK) == "Q: Who are you A:"
    assert chosen(str(tmp_path / "mine.json")).render_chat(TALK) == "4"
    assert chosen("{{ messages[0].role }}").render_chat(TALK) == "system"
    assert chosen("mistral-v1").encode_chat(TALK) == load_tokenizer(make_folder("v1")).encode_chat(TALK)
    assert chosen(tmp_path / "mine.jinja").chat_origin == "mine.jinja"
    mistral = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"
    assert chosen(mistral).chat_format == "mistral-v1"


def test_a_format_that_does_not_fit_or_is_not_there_is_refused(make_folder: FolderMaker, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"mistral-v3 needs the control token \[INST\].*use mistral-v1"):
        load_tokenizer(make_folder("v1"), chat_template=given_template("mistral-v3"))
    with pytest.raises(
        InvalidRequestError, match="'chatmll' is neither a file here nor a known format; the formats are chatml, ll"
    ):
        given_template("chatmll")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match=r"empty\.json has no chat_template"):
        given_template(tmp_path / "empty.json")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidRequestError, match="cannot be read as UTF-8"):
        given_template(tmp_path / "bytes.jinja")
    broken = load_tokenizer(make_folder("v1"), chat_template=given_template("{% if %}"))
    with pytest.raises(ChatTemplateError, match="is broken"):
        broken.encode_chat(TALK)

"""The tokenizer out of a GGUF file's keys, as the files a checkpoint folder has.

``tokenizer.ggml.model`` ``llama`` is SentencePiece with byte-pair merges: pieces, scores and types become a ``tokenizer.model``
again, a protocol buffer by the fields of ``sentencepiece_model.proto``. ``gpt2`` is byte-level BPE: tokens and merges become a
``tokenizer.json``; how its text is cut into words first has only a name in the file (``tokenizer.ggml.pre``).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from mlx_mixtral.errors import TokenizerError
from mlx_mixtral.tokenizer.sentencepiece_proto import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, varint
from mlx_mixtral_convert.sources.gguf.header import GgufHeader

__all__ = ["tokenizer_files"]

_PREFIX = "tokenizer.ggml."
_MAX_SCORE = 3.4e38

_WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name -> a pattern of its own, or GPT-2's with every digit apart (True) or not (False). The names are those of
# convert_hf_to_gguf.py in ggml-org/llama.cpp, the patterns those of the models' own tokenizer.json.
_PRE: dict[str, str | bool] = {
    "gpt-2": False, "gpt2": False, "olmo": False, "jina-v2-code": False,
    "smollm": True, "starcoder": True, "refact": True, "command-r": True, "codeshell": True,
    "llama-bpe": _CONTRACTIONS + _WORDS % "{1,3}", "llama3": _CONTRACTIONS + _WORDS % "{1,3}",
    "llama-v3": _CONTRACTIONS + _WORDS % "{1,3}", "qwen2": _CONTRACTIONS + _WORDS % "",
    "tekken": _TEKKEN,
}  # fmt: skip
# Whole words that are tokens are taken as they are, whatever the merges would make of them.
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")


def tokenizer_files(header: GgufHeader) -> dict[str, bytes]:
    """``tokenizer.model`` or ``tokenizer.json``, and ``tokenizer_config.json``; nothing for a file without a tokenizer.

    Raises:
        TokenizerError: a kind, or a way to cut words, that is not known here, or lists that do not match.
    """
    keys, where = header.keys, str(header.path)
    kind = keys.get(f"{_PREFIX}model", "none")
    if kind == "none":
        return {}
    tokens, types = _texts(header, "tokens"), keys.get(f"{_PREFIX}token_type")
    if types is None:
        types = [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise TokenizerError(f"{where}: {_PREFIX}token_type does not match the {len(tokens)} tokens")
    if not all(isinstance(kind, int) and 0 <= kind <= BYTE for kind in types):
        raise TokenizerError(f"{where}: {_PREFIX}token_type holds a type that is not one of 0 to {BYTE}")
    config = _settings(header, tokens, types)
    if kind == "llama":
        return {"tokenizer.model": _sentencepiece(header, tokens, types), "tokenizer_config.json": _json(config)}
    if kind != "gpt2":
        raise TokenizerError(
            f"{where}: its tokenizer is of type {kind!r}; llama (SentencePiece) and gpt2 can be converted"
        )
    return {"tokenizer.json": _json(_byte_level(header, tokens, types)), "tokenizer_config.json": _json(config)}


def _sentencepiece(header: GgufHeader, tokens: Sequence[str], types: Sequence[int]) -> bytes:
    scores = header.keys.get(f"{_PREFIX}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"{header.path}: {_PREFIX}scores does not match the {len(tokens)} tokens")
    if list(types).count(UNKNOWN) != 1:
        raise TokenizerError(
            f"{header.path}: its tokenizer has {list(types).count(UNKNOWN)} unknown tokens instead of one"
        )
    # Written as float32. NaN compares false.
    if not all(isinstance(score, int | float) and -_MAX_SCORE <= score <= _MAX_SCORE for score in scores):
        raise TokenizerError(f"{header.path}: {_PREFIX}scores holds a value that is not a finite float32")
    special = {name: header.keys.get(f"{_PREFIX}{key}_token_id", -1) for name, key in
               (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    model = bytearray()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        piece = _field(1, token.encode()) + b"\x15" + struct.pack("<f", score)
        model += _field(1, piece if kind == NORMAL else piece + b"\x18" + varint(kind))
    # TrainerSpec: model_type BPE = 3, vocab_size = 4, byte_fallback = 35, unk_id … pad_id = 40 … 43, unk_piece … = 45 …
    trainer = _number(3, 2) + _number(4, len(tokens)) + _number(35, int(BYTE in types))
    special["unk"] = list(types).index(UNKNOWN)
    for at, token_id in enumerate(special.values()):
        valid = isinstance(token_id, int) and 0 <= token_id < len(tokens)
        trainer += _number(40 + at, token_id if valid else -1)
    for at, token_id in enumerate(list(special.values())[:3]):
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            trainer += _field(45 + at, tokens[token_id].encode())
    # NormalizerSpec: name = 1, add_dummy_prefix = 3, remove_extra_whitespaces = 4. SentencePiece's defaults but the last.
    prefix = header.keys.get(f"{_PREFIX}add_space_prefix", True) is not False
    squeeze = header.keys.get(f"{_PREFIX}remove_extra_whitespaces", False) is True
    normalizer = _field(1, b"identity") + _number(3, int(prefix)) + _number(4, int(squeeze))
    if charsmap := header.keys.get(f"{_PREFIX}precompiled_charsmap"):
        if not isinstance(charsmap, list) or not all(isinstance(value, int) for value in charsmap):
            raise TokenizerError(f"{header.path}: {_PREFIX}precompiled_charsmap is not a list of bytes")
        normalizer += _field(2, bytes(value & 0xFF for value in charsmap))
    return bytes(model) + _field(2, trainer) + _field(3, normalizer)


def _byte_level(header: GgufHeader, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    name = header.keys.get(f"{_PREFIX}pre", "default")
    if not isinstance(name, str) or (pattern := _PRE.get(name)) is None:
        raise TokenizerError(
            f"{header.path}: its tokenizer splits text into words by {name!r} ({_PREFIX}pre), which is not supported; "
            f"known are {', '.join(_PRE)}: convert the original checkpoint"
        )
    merges = [merge.split(" ") for merge in _texts(header, "merges")]
    if any(len(pair) != 2 for pair in merges):
        raise TokenizerError(f"{header.path}: {_PREFIX}merges holds an entry that is not two pieces")
    spaced = header.keys.get(f"{_PREFIX}add_space_prefix", False) is True
    steps: list[dict[str, Any]] = []
    if isinstance(pattern, str):
        steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    elif pattern:
        steps.append({"type": "Digits", "individual_digits": True})
    byte_level = {"type": "ByteLevel", "add_prefix_space": spaced, "trim_offsets": True}
    steps.append(byte_level | {"use_regex": not isinstance(pattern, str)})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id, "content": tokens[token_id], "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": types[token_id] == CONTROL,
            }
            for token_id in _added(types)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": name in _IGNORE_MERGES,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": merges,
        },
    }  # fmt: skip


def _settings(header: GgufHeader, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """tokenizer_config.json: special ids by spelling, the chat template, and the tokens that no text becomes."""
    keys, llama = header.keys, header.keys.get(f"{_PREFIX}model") == "llama"
    # llama.cpp's defaults where a file says nothing.
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if llama else "PreTrainedTokenizerFast",
        "add_bos_token": keys.get(f"{_PREFIX}add_bos_token", llama) is True,
        "add_eos_token": keys.get(f"{_PREFIX}add_eos_token", False) is True,
        "clean_up_tokenization_spaces": False,
    }
    if llama:
        config["legacy"] = True
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = keys.get(f"{_PREFIX}{key}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            # A padding token beside the vocabulary is common and never used.
            if name in ("pad", "unk"):
                continue
            raise TokenizerError(
                f"{header.path}: {_PREFIX}{key}_token_id is {token_id!r}; it has {len(tokens)} tokens: correct it with "
                "gguf-set-metadata of the package gguf"
            )
        config[f"{name}_token"] = tokens[token_id]
    config["added_tokens_decoder"] = {
        str(token_id): {"content": tokens[token_id], "special": types[token_id] != USER_DEFINED}
        for token_id in _added(types)
    }
    named = {key.removeprefix("tokenizer.chat_template."): value for key, value in keys.items()
             if key.startswith("tokenizer.chat_template.") and isinstance(value, str)}  # fmt: skip
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, str) and named:
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in {"default": template, **named}.items()
        ]
    elif isinstance(template, str):
        config["chat_template"] = template
    return config


def _added(types: Sequence[int]) -> list[int]:
    return [token_id for token_id, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]


def _texts(header: GgufHeader, name: str) -> list[str]:
    values = header.keys.get(f"{_PREFIX}{name}")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise TokenizerError(f"{header.path}: {_PREFIX}{name} is missing or not a list of texts")
    return values


def _json(entries: dict[str, Any]) -> bytes:
    return (json.dumps(entries, indent=1, ensure_ascii=False) + "\n").encode()


def _field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    # A negative int32 is written as 64 bits, as protocol buffers do.
    return varint(number << 3) + varint(value & 0xFFFF_FFFF_FFFF_FFFF)

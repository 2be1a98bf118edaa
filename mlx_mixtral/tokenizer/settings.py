"""What the files beside a tokenizer say: added tokens, BOS and EOS, the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_mixtral.arguments import is_integer
from mlx_mixtral.errors import CheckpointError, TokenizerError
from mlx_mixtral.reading import MAX_TEXT_BYTES, companion_bytes, is_there, read_file, read_json
from mlx_mixtral.tokenizer.markers import AddedToken

__all__ = ["Settings", "read_settings", "read_settings_file"]


# The largest known files have 7 thousand, most of them reserved.
MAX_ADDED_TOKENS = 2**15
MAX_SPELLING = 1024


@dataclass(frozen=True)
class Settings:
    """Everything outside the tokenizer's own model.

    Attributes:
        added: Added tokens by id; tokenizer_config.json wins over tokenizer.json, which wins over added_tokens.json.
        bos, eos: Spelling of these tokens where tokenizer_config.json names them.
        add_bos: tokenizer_config.json's `add_bos_token`, None where it says nothing.
        prefix_after_marker: Whether text after a marker gets a dummy prefix too (`legacy`, as all of Mistral's are).
        templates: The checkpoint's jinja chat templates by name ("default", "tool_use").
        eos_token_ids: Further stop ids, from the model's configuration.
    """

    added: Mapping[int, AddedToken] = field(default_factory=dict)
    bos: str | None = None
    eos: str | None = None
    add_bos: bool | None = None
    prefix_after_marker: bool = True
    templates: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: frozenset[int] = frozenset()


def read_settings(folder: Path, eos_token_ids: Sequence[int] = ()) -> Settings:
    """Read the settings of a folder; files that are not there say nothing.

    Raises:
        TokenizerError: A file is there and is not what it should be.
    """
    config = read_settings_file(folder / "tokenizer_config.json")
    fast = read_settings_file(folder / "tokenizer.json")
    add_bos = config.get("add_bos_token")
    return Settings(
        added=_added_tokens(folder, config, fast),
        bos=_spelling(config.get("bos_token")),
        eos=_spelling(config.get("eos_token")),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        prefix_after_marker=_prefix_after_marker(config, fast),
        templates=_templates(folder, config),
        eos_token_ids=frozenset(int(i) for i in eos_token_ids),
    )


def read_settings_file(path: Path) -> dict[str, Any]:
    """The object a JSON file holds, {} when there is no such file.

    Raises:
        TokenizerError: The file cannot be read or holds something else.
    """
    if not is_there(path):
        return {}
    try:
        return read_json(path, companion_bytes(path.name))
    except CheckpointError as error:
        raise TokenizerError(f"{error}; download it again") from error


def _added_tokens(folder: Path, config: Mapping[str, Any], fast: Mapping[str, Any]) -> dict[int, AddedToken]:
    extra = config.get("additional_special_tokens") or ()
    named = {_spelling(config.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    special = named | {_spelling(token) for token in (extra if isinstance(extra, list) else ())}
    added: dict[int, AddedToken] = {}
    for content, token_id in read_settings_file(folder / "added_tokens.json").items():
        _declare(added, token_id, {"content": content, "special": content in special}, folder / "added_tokens.json")
    for token in _list(fast.get("added_tokens")):
        _declare(added, token.get("id") if isinstance(token, dict) else None, token, folder / "tokenizer.json")
    decoder = config.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        token_id = int(key) if str(key).isdecimal() else None
        _declare(added, token_id, token, folder / "tokenizer_config.json")
    return added


def _declare(added: dict[int, AddedToken], token_id: Any, token: Any, source: Path) -> None:
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str) or not is_integer(token_id) or token_id < 0:
        raise TokenizerError(
            f"{source}: added token {token_id!r}: {repr(token)[:100]} needs an id from 0 up and a string `content`"
        )
    if len(added) >= MAX_ADDED_TOKENS:
        raise TokenizerError(f"{source}: there are more than {MAX_ADDED_TOKENS} added tokens; no model has as many")
    if len(content) > MAX_SPELLING:
        raise TokenizerError(
            f"{source}: added token {token_id} has {len(content)} characters; no token has more than {MAX_SPELLING}"
        )
    special, left, right = (token.get(key) is True for key in ("special", "lstrip", "rstrip"))
    added[token_id] = AddedToken(content, token_id, special, left, right)


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else ()


def _spelling(token: Any) -> str | None:
    """A token is written as its spelling, or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _prefix_after_marker(config: Mapping[str, Any], fast: Mapping[str, Any]) -> bool:
    """tokenizer.json decides, as it does for transformers; else `legacy`, which is true unless a file says false."""
    normalizer, pre = fast.get("normalizer"), fast.get("pre_tokenizer")
    for part in (normalizer, pre):
        steps = part.get("normalizers") or part.get("pretokenizers") or [part] if isinstance(part, dict) else []
        for step in _list(steps):
            kind = step.get("type") if isinstance(step, dict) else None
            if kind == "Prepend":
                return True
            if kind == "Metaspace" and isinstance(step.get("prepend_scheme"), str):
                return bool(step["prepend_scheme"] == "always")
    return config.get("legacy") is not False


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja wins over chat_template.json, which wins over tokenizer_config.json, as in transformers."""
    source = folder / "chat_template.jinja"
    if is_there(source):
        try:
            return {"default": read_file(source, MAX_TEXT_BYTES, TokenizerError).decode("utf-8")}
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{source} cannot be read as UTF-8 text ({error})") from error
    value = read_settings_file(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
        if named and all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
            return named
    raise TokenizerError(f"{folder}: chat_template should be a string or a list of objects with `name` and `template`")

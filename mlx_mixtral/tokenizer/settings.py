"""What the files beside a tokenizer say: added tokens, BOS and EOS, the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_mixtral.arguments import is_integer
from mlx_mixtral.errors import CheckpointError, TokenizerError
from mlx_mixtral.reading import MAX_TEXT_BYTES, companion_bytes, is_there, parse_json, read_file, read_json
from mlx_mixtral.tokenizer.markers import AddedToken

__all__ = ["Settings", "read_settings", "read_settings_file", "read_template"]


# The largest known files have 7 thousand, most of them reserved.
MAX_ADDED_TOKENS = 2**15
MAX_SPELLING = 1024


@dataclass(frozen=True)
class Settings:
    """Everything outside the tokenizer's own model.

    Attributes:
        added: Added tokens by id; tokenizer_config.json wins over tokenizer.json, which wins over added_tokens.json.
        beside: The same without tokenizer.json: what is added to a SentencePiece model where that file is not believed.
        named: Special tokens that a file names (`eos_token`, `additional_special_tokens`, …) by spelling. Their id, -1
            here, is that of the piece or added token so spelled.
        bos, eos, pad: Spelling of these tokens where a file names them.
        add_bos: tokenizer_config.json's `add_bos_token`, None where it says nothing.
        prefix_after_marker: Whether text after a marker gets a dummy prefix too (`legacy`, as all of Mistral's are).
        templates: The checkpoint's jinja chat templates by name ("default", "tool_use").
        template_file: Which file they are from, "" where there are none.
        eos_token_ids: Further stop ids, from the model's configuration.
        fast: What tokenizer.json holds, {} where there is none.
    """

    added: Mapping[int, AddedToken] = field(default_factory=dict)
    beside: Mapping[int, AddedToken] = field(default_factory=dict)
    named: Mapping[str, AddedToken] = field(default_factory=dict)
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    add_bos: bool | None = None
    prefix_after_marker: bool = True
    templates: Mapping[str, str] = field(default_factory=dict)
    template_file: str = ""
    eos_token_ids: frozenset[int] = frozenset()
    fast: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Files:
    """The files of ``folder``, or those of them that are ``held`` in memory."""

    folder: Path
    held: Mapping[str, bytes] | None

    def entries(self, name: str) -> dict[str, Any]:
        """The object a JSON file holds, {} when it is not there."""
        if self.held is None:
            return read_settings_file(self.folder / name)
        try:
            return parse_json(name, self.held[name]) if name in self.held else {}
        except CheckpointError as error:
            raise TokenizerError(f"{error}; download it again") from error

    def has_template(self, name: str) -> bool:
        return self.held is None and is_there(self.folder / name)


def read_settings(
    folder: Path, eos_token_ids: Sequence[int] = (), *, held: Mapping[str, bytes] | None = None
) -> Settings:
    """Read the settings of a folder; files that are not there say nothing.

    Args:
        held: the JSON files by name, where they are in memory.

    Raises:
        TokenizerError: A file is there and is not what it should be.
    """
    files = _Files(folder, held)
    config = files.entries("tokenizer_config.json")
    fast = files.entries("tokenizer.json")
    names = _special_names(config, files.entries("special_tokens_map.json"))
    named = _named_tokens(names)
    add_bos = config.get("add_bos_token")
    templates, template_file = _templates(files, config)
    return Settings(
        added=_added_tokens(files, config, named, fast),
        beside=_added_tokens(files, config, named, {}),
        named=named,
        bos=_spelling(names.get("bos_token")),
        eos=_spelling(names.get("eos_token")),
        pad=_spelling(names.get("pad_token")),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        prefix_after_marker=_prefix_after_marker(config, fast),
        templates=templates,
        template_file=template_file,
        eos_token_ids=frozenset(int(i) for i in eos_token_ids),
        fast=fast,
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


def _special_names(config: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """What the two files call their special tokens, in the order of transformers.

    special_tokens_map.json wins, but not over a tokenizer_config.json with `added_tokens_decoder`: files of that time keep
    the map for older readers, and it only fills in what the other leaves out.
    """
    given = [{key: value for key, value in file.items() if value is not None} for file in (config, names)]
    if "added_tokens_decoder" in config:
        given.reverse()
    return given[0] | given[1]


def _named_tokens(names: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Tokens under any `…_token`, `image_token` too, and those of the lists; one of these may be an object of names."""
    listed: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = names.get(key)
        listed += value.values() if isinstance(value, dict) else _list(value)
    found: dict[str, AddedToken] = {}
    for token in (*listed, *(value for key, value in names.items() if key.endswith("_token"))):
        if (content := _spelling(token)) is not None:
            left, right = (isinstance(token, dict) and token.get(key) is True for key in ("lstrip", "rstrip"))
            found[content] = AddedToken(content, -1, lstrip=left, rstrip=right)
    return found


def _added_tokens(
    files: _Files, config: Mapping[str, Any], named: Mapping[str, AddedToken], fast: Mapping[str, Any]
) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    folder = files.folder
    for content, token_id in files.entries("added_tokens.json").items():
        _declare(added, token_id, {"content": content, "special": content in named}, folder / "added_tokens.json")
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
        raise TokenizerError(f"{source}: there are more than {MAX_ADDED_TOKENS} added tokens; no model has that many")
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


def _templates(files: _Files, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """chat_template.jinja wins over chat_template.json, which wins over tokenizer_config.json, as in transformers."""
    folder = files.folder
    if files.has_template("chat_template.jinja"):
        return read_template(folder / "chat_template.jinja"), "chat_template.jinja"
    value = files.entries("chat_template.json").get("chat_template")
    if value is not None:
        return _named_templates(value, folder), "chat_template.json"
    found = _named_templates(config.get("chat_template"), folder)
    return found, "tokenizer_config.json" if found else ""


def read_template(path: Path) -> dict[str, str]:
    """The templates of a file by name: a jinja template, or JSON with `chat_template`.

    Raises:
        TokenizerError: It cannot be read, or holds none.
    """
    if path.suffix == ".json":
        return _named_templates(read_settings_file(path).get("chat_template"), path)
    try:
        return {"default": read_file(path, MAX_TEXT_BYTES, TokenizerError).decode("utf-8")}
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} cannot be read as UTF-8 text ({error})") from error


def _named_templates(value: Any, place: Path) -> dict[str, str]:
    """`chat_template` as the files at `place` have it, by name.

    Raises:
        TokenizerError: It is of another form.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
        if named and all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
            return named
    raise TokenizerError(f"{place}: chat_template should be a string or a list of objects with `name` and `template`")

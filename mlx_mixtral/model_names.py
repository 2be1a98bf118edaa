"""What people call a model: addresses of the hub's pages, names without their owner, and the short names of Mixtral."""

from __future__ import annotations

import difflib
import re
from urllib.parse import unquote

from mlx_mixtral.errors import InvalidRequestError

__all__ = ["hub_name", "not_there", "repository_name"]

_HOSTS = r"(?:www\.)?(?:huggingface\.co|hf\.co)"
_PAGE = re.compile(rf"(?:https?://{_HOSTS}|{_HOSTS}|hf:/)/+([^?#]*)(?:[?#].*)?", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PART = re.compile(r"[A-Za-z0-9][\w.-]*")
# First parts of an address that are no owner.
_NOT_MODELS = ("datasets", "spaces", "docs", "papers", "collections", "blog", "buckets")
_REVISION = re.compile(r"refs/(?:pr|convert|heads|tags)/[^/]+|[^/]+")
_EXAMPLE = "mistralai/Mixtral-8x7B-Instruct-v0.1"

_KNOWN = (
    "mistralai/Mixtral-8x7B-v0.1",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mistralai/Mixtral-8x22B-v0.1",
    "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "mlx-community/Mixtral-8x7B-Instruct-v0.1-4bit",
    "mlx-community/Mixtral-8x22B-Instruct-v0.1-4bit",
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO",
)
_SHORT = {
    "mixtral": "8x7B",
    "8x7b": "8x7B",
    "mixtral-8x7b": "8x7B",
    "mixtral-instruct": "8x7B",
    "8x22b": "8x22B",
    "mixtral-8x22b": "8x22B",
}


def hub_name(text: str) -> str:
    """``owner/name``, with ``@revision`` and ``:file.gguf`` where they are there, of the address of a page of the hub.

    Addresses of a repository, of a revision (``/tree/REV``) and of a file (``/blob/REV/FILE``, ``/resolve/REV/FILE``), as a
    browser shows them, with or without ``https://``; ``hf://owner/name`` too. Text that is no address is given back.

    Raises:
        InvalidRequestError: an address of something else than a model of the hub.
    """
    page = _PAGE.fullmatch(text.strip())
    if page is None:
        if _ADDRESS.match(text):
            raise InvalidRequestError(
                f"{text} is an address, but not that of a model on the hub; write owner/name or https://huggingface.co/owner/name"
            )
        return text
    parts = [unquote(part) for part in page[1].split("/") if part]
    if parts[:1] == ["models"]:
        del parts[0]
    if len(parts) < 2 or parts[0] in _NOT_MODELS or not all(map(_PART.fullmatch, parts[:2])):
        raise InvalidRequestError(f"{text} is not the address of a model; write https://huggingface.co/owner/name")
    owner, name = parts[0], parts[1].removesuffix(".git")
    if len(parts) < 4 or parts[2] not in ("tree", "blob", "resolve", "raw"):
        return f"{owner}/{name}"
    rest = "/".join(parts[3:])
    revision = _REVISION.match(rest)
    assert revision is not None
    file = rest[revision.end() :].lstrip("/")
    return f"{owner}/{name}@{revision[0]}" + (f":{file}" if file.endswith(".gguf") and "/" not in file else "")


def repository_name(text: str) -> str:
    """``owner/name`` of the address of a repository's page, at its main branch; any other text as it is.

    Raises:
        InvalidRequestError: an address of something else.
    """
    named = hub_name(text)
    return named if named == text else named.removesuffix("@main")


def not_there(name: str) -> str:
    """What to say of a name that is no folder here and not written ``owner/name``: one line, with a name that works."""
    word = name.lower().replace(":", "-").replace(" ", "-").strip("-")
    if word in _SHORT:
        size = _SHORT[word]
        return (
            f"{name}: no such folder; write a hub repository as owner/name: "
            f"mlx-community/Mixtral-{size}-Instruct-v0.1-4bit runs as it is, mistralai/Mixtral-{size}-Instruct-v0.1 must be "
            f"converted first: mlx-mixtral convert mistralai/Mixtral-{size}-Instruct-v0.1 DEST"
        )
    if "/" in name or "\\" in name or name in (".", "..") or name.startswith("~"):
        return f"{name}: no such folder"
    return f"{name}: no such folder; write a hub repository as owner/name, such as {_nearest(word)}"


def _nearest(word: str) -> str:
    names = {known.partition("/")[2].lower(): known for known in _KNOWN}
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return names[found[0]] if found else _EXAMPLE

"""What files a repository has, as far as the hub can be believed: names that are names, sizes that are sizes, a commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mlx_mixtral.errors import HubError
from mlx_mixtral.hub.answers import HubClient
from mlx_mixtral.hub.failures import check_revision

__all__ = ["COMMIT", "Listing", "RemoteFile", "list_files"]

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_FILE_BYTES = 2**50
MAX_NAME_BYTES = 255
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: bytes, the sha256 of its content, which the hub knows of all large files, and a hash of git.

    Each is None where the listing does not say.
    """

    nbytes: int | None
    sha256: str | None
    git_hash: str | None = None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]

    def size(self, name: str) -> int:
        """Bytes of a file. Raises HubError if the hub does not say."""
        if (nbytes := self.files[name].nbytes) is None:
            raise HubError(f"the hub does not say how large {name} is")
        return nbytes

    def blob(self, name: str) -> str:
        """What a file's content is called in the Hub's cache. Raises HubError if the hub does not say."""
        # https://huggingface.co/docs/hub/local-cache: large files by their sha256, others by their hash in git.
        if (blob := self.files[name].sha256 or self.files[name].git_hash) is None:
            raise HubError(f"the hub does not say the hash of {name}; check that HF_ENDPOINT is a hub")
        return blob


def list_files(repository: str, revision: str | None) -> Listing:
    """What a repository holds, and the commit its revision stands for now.

    Raises:
        InvalidRequestError: ``revision`` cannot be the name of one.
        HubUnreachableError: no answer, or a server in trouble.
        HubError: the repository is gated, absent, has no such revision; or the answer is not a listing.
    """
    check_revision(revision)
    client = HubClient()
    url = f"{client.constants.ENDPOINT}/api/models/{repository}"
    if revision is not None:
        url += f"/revision/{quote(revision, safe='')}"
    what = f"the list of files of {repository}"
    answer = client.json(f"{url}?blobs=true", what, repository, revision)
    if not isinstance(answer, dict):
        raise HubError(f"the hub's answer for {what} is a JSON {type(answer).__name__}, not an object")
    commit, siblings = answer.get("sha"), answer.get("siblings")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubError(f"the hub says the commit is {_shown(commit)}, which is not 40 hexadecimal digits")
    if revision is not None and COMMIT.fullmatch(revision) and commit != revision:
        raise HubError(f"commit {revision} was asked for, the hub answered with {commit}")
    if not isinstance(siblings, list):
        raise HubError(f"the hub's answer for {what} has no list of files")
    return Listing(repository, commit, dict(_file(entry) for entry in siblings if not _is_odd(entry)))


def _is_odd(entry: Any) -> bool:
    """Whether a name is one that no file read here has, harmless where it is not used.

    Raises:
        HubError: it is no name, or leads out of the repository.
    """
    name = entry.get("rfilename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or any(part in ("", ".", "..") for part in name.split("/")):
        raise HubError(
            f"the hub lists a file {_shown(name if isinstance(entry, dict) else entry)}, which is no file's name"
        )
    return not name.isprintable() or "\\" in name or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES


def _file(entry: dict[str, Any]) -> tuple[str, RemoteFile]:
    name, nbytes, large = entry["rfilename"], entry.get("size"), entry.get("lfs")
    is_size = isinstance(nbytes, int) and not isinstance(nbytes, bool) and nbytes >= 0
    if nbytes is not None and not is_size:
        raise HubError(f"the hub says {name} has {_shown(nbytes)} bytes, which is no size")
    if nbytes is not None and nbytes > MAX_FILE_BYTES:
        raise HubError(f"the hub says {name} has {_shown(nbytes)} bytes; no file of a model is that large")
    hashes = large.get("sha256") if isinstance(large, dict) else None, entry.get("blobId")
    for digest, pattern, what in zip(hashes, (_SHA256, COMMIT), ("64", "40"), strict=True):
        if digest is not None and not (isinstance(digest, str) and pattern.fullmatch(digest)):
            raise HubError(f"the hub says a hash of {name} is {_shown(digest)}, which is not {what} hexadecimal digits")
    return name, RemoteFile(nbytes, *hashes)


def _shown(value: Any) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"

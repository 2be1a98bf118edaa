"""What a request to the hub can end in, in one line each."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping

from mlx_mixtral.errors import HubError, InvalidRequestError, MissingDependencyError, MixtralError
from mlx_mixtral.installing import how_to_install

__all__ = ["HubUnreachableError", "check_revision", "hub_errors", "is_unreachable", "reason_of", "status_error"]

MAX_REASON_CHARACTERS = 200


class HubUnreachableError(HubError):
    """No connection, no answer in time, offline mode, or a server in trouble: what is in the cache may do."""


@contextlib.contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Failures inside become one line that names the repository.

    Raises:
        HubError: what the hub or its client made fail, and what cannot be written to its cache.
        MissingDependencyError: the client is not installed.
    """
    try:
        from huggingface_hub import errors as kinds
    except ImportError as error:
        raise MissingDependencyError(
            f"{repository} is a hub repository and huggingface-hub is not installed: "
            f"{how_to_install('huggingface-hub')}"
        ) from error
    try:
        yield
    except HubUnreachableError as error:
        what = f"the hub cannot be reached ({error}); check the connection or HF_HUB_OFFLINE"
        raise HubError(f"{repository}: {what}") from error
    except HubError as error:
        text = str(error)
        raise HubError(text if text.startswith(repository) else f"{repository}: {text}") from error
    except MixtralError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk of the hub's cache is full; free some room or set HF_HOME to another disk"
        else:
            what = f"download failed: {reason_of(error)}"
        raise HubError(f"{repository}: {what}") from error
    except kinds.HFValidationError as error:
        raise HubError(f"{repository} is not a valid repository name: {reason_of(error)}") from error


def status_error(status: int, headers: Mapping[str, str], repository: str, revision: str | None, what: str) -> HubError:
    """The error for an answer that is a refusal. Its text, which may be anything, is not read."""
    code = headers.get("X-Error-Code", "")
    page = f"https://huggingface.co/{repository}"
    if status >= 500:
        return HubUnreachableError(f"status {status} for {what}")
    if code == "GatedRepo":
        return HubError(
            f"{repository} is gated: accept its licence on {page}, then run `hf auth login` or set HF_TOKEN"
        )
    if code == "RevisionNotFound":
        return HubError(f"{repository} has no revision {revision!r}; {page}/commits/main lists them")
    if code == "RepoNotFound":
        return HubError(
            "no such folder here and no such public repository on the hub; check the name, and for a private one run "
            "`hf auth login` or set HF_TOKEN"
        )
    hint = "run `hf auth login` or set HF_TOKEN" if status in (401, 403) else "try again later"
    return HubError(f"the hub answered with status {status} for {what}; {hint}")


def is_unreachable(error: BaseException) -> bool:
    """No connection, a time-out, or offline mode. The client's HTTP library changed its name once."""
    if isinstance(error, ConnectionError | TimeoutError | HubUnreachableError):
        return True
    kinds = type(error).__mro__
    return any(k.__module__.split(".")[0].startswith("httpx") and k.__name__ == "TransportError" for k in kinds)


def check_revision(revision: str | None) -> None:
    """Raise InvalidRequestError for what is no branch, tag or commit, and would lead out of the cache as a path."""
    if revision is None:
        return
    bad = any(part in ("", ".", "..") for part in revision.split("/")) or "\\" in revision or not revision.isprintable()
    if bad or len(revision) > MAX_REASON_CHARACTERS:
        shown = revision if len(revision) <= MAX_REASON_CHARACTERS else f"{revision[:MAX_REASON_CHARACTERS]}…"
        raise InvalidRequestError(f"revision {shown!r} is not the name of a branch, a tag or a commit")


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its type."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= MAX_REASON_CHARACTERS else f"{line[:MAX_REASON_CHARACTERS]}…"

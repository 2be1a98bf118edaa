"""One request to the hub, within limits: so long until it is answered, so many redirects, so many bytes."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.errors import HubError
from mlx_mixtral.hub.failures import HubUnreachableError, is_unreachable, reason_of, status_error
from mlx_mixtral.sizes import format_bytes

__all__ = ["HubAnswer", "HubClient", "logger"]

# Of one request: from the first byte sent to the answer's head, redirects included, and as long again for a JSON answer.
ANSWER_S = 20.0
# After this long without an answer it is said what is waited for.
QUIET_S = 5.0
POLL_S = 0.1
MAX_REDIRECTS = 8
# A repository of 100,000 files lists itself in less; what it makes of the memory is some twenty times as much.
MAX_JSON_BYTES = 16 * 2**20

logger = logging.getLogger("mlx_mixtral.hub")
"""Told what is waited for, at level INFO; the command line shows it."""


@dataclass(frozen=True)
class HubAnswer:
    """The head of an answer. ``passed`` are the heads of the redirects that led to it."""

    status: int
    headers: Any
    passed: tuple[Any, ...]
    response: Any

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives.

        Raises:
            HubUnreachableError: the connection broke, or nothing came in time.
            HubError: it is compressed, which was not asked for, or is no HTTP.
        """
        if (encoding := self.headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise HubError(f"the hub sent it as {reason_of(Exception(encoding))}, which was not asked for")
        try:
            yield from self.response.iter_raw()
        except Exception as error:
            raise _client_error(error) from error


class HubClient:
    """The Hub's session and headers, with limits of our own."""

    def __init__(self) -> None:
        hub: Any = importlib.import_module("huggingface_hub.utils")
        self.constants: Any = importlib.import_module("huggingface_hub.constants")
        self._session: Any = hub.get_session()
        # No cookie is kept or sent: the hub needs none, and one that is not ASCII would fail every request after it.
        self._session.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # The client's own headers name the program that runs it, and it asks the hub which there are, without these limits.
        self._headers = {"User-Agent": f"mlx-mixtral/{__version__}", "Accept-Encoding": "identity"}
        if (token := hub.get_token_to_send(None)) is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    @contextlib.contextmanager
    def ask(
        self,
        url: str,
        what: str,
        *,
        headers: dict[str, str] | None = None,
        timeout_s: float,
        stopped: threading.Event | None = None,
    ) -> Iterator[HubAnswer]:
        """The answer to a GET, whatever its status; its body is not read.

        Args:
            what: is asked for, in words.
            timeout_s: the longest silence.
            stopped: ends the wait when it is set.

        Raises:
            HubUnreachableError: no connection, or no answer in time.
            HubError: redirects without end, or no HTTP.
        """
        request = self._session.build_request(
            "GET", url, headers={**self._headers, **(headers or {})}, timeout=timeout_s
        )
        answer = _within(lambda: self._send(request), what, stopped)
        try:
            yield answer
        finally:
            # Without the rest of a body: the connection is given up.
            with contextlib.suppress(Exception):
                answer.response.close()

    def json(self, url: str, what: str, repository: str, revision: str | None) -> Any:
        """The JSON at an address of the hub.

        Raises:
            HubUnreachableError: as ``ask``, or a server in trouble.
            HubError: a refusal, too large, too slow, or no JSON.
        """
        body = bytearray()
        with self.ask(url, what, timeout_s=float(self.constants.HF_HUB_ETAG_TIMEOUT)) as answer:
            if answer.status != 200:
                raise status_error(answer.status, answer.headers, repository, revision, what)
            ends = time.monotonic() + ANSWER_S
            for chunk in answer.chunks():
                body += chunk
                if len(body) > MAX_JSON_BYTES:
                    raise HubError(
                        f"the hub's answer for {what} has more than {format_bytes(MAX_JSON_BYTES)}, which no repository needs"
                    )
                if time.monotonic() > ends:
                    raise HubUnreachableError(f"the hub's answer for {what} was not complete after {ANSWER_S:.0f} s")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            start = f"begins with {bytes(body[:40])!r}" if body else "is empty"
            raise HubError(
                f"the hub's answer for {what} is not JSON (it {start}); check HF_ENDPOINT and any proxy"
            ) from error

    def _send(self, request: Any) -> HubAnswer:
        passed: list[Any] = []
        while True:
            # Not followed by the session, which reads the body of each redirect.
            response = self._session.send(request, stream=True, follow_redirects=False)
            if (request := response.next_request) is None:
                return HubAnswer(response.status_code, response.headers, tuple(passed), response)
            passed.append(response.headers)
            response.close()
            if len(passed) > MAX_REDIRECTS:
                raise HubError(f"the hub answered with more than {MAX_REDIRECTS} redirects in a row")


def _within(send: Callable[[], HubAnswer], what: str, stopped: threading.Event | None) -> HubAnswer:
    """What ``send`` returns, from a thread that is left to itself after ``ANSWER_S``: a socket's own limit counts silence,
    and an answer may come one byte at a time."""
    result: Future[HubAnswer] = Future()

    def work() -> None:
        try:
            result.set_result(send())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name="mlx-mixtral-hub", daemon=True).start()
    started, said = time.monotonic(), False
    try:
        while True:
            try:
                return result.result(POLL_S)
            except FutureTimeoutError:
                # Since Python 3.11 this is TimeoutError, which ``send`` may raise as well.
                if result.done():
                    return result.result()
            waited = time.monotonic() - started
            if stopped is not None and stopped.is_set():
                raise HubError(f"stopped while waiting for {what}")
            if waited > ANSWER_S:
                raise HubUnreachableError(f"no answer for {what} in {ANSWER_S:.0f} s")
            if waited > QUIET_S and not said:
                said = True
                logger.info("waiting for the hub to answer: %s", what)
    except HubError:
        result.add_done_callback(_close)
        raise
    except Exception as error:
        raise _client_error(error) from error
    except BaseException:
        result.add_done_callback(_close)
        raise


def _close(result: Future[HubAnswer]) -> None:
    with contextlib.suppress(BaseException):
        result.result().response.close()


def _client_error(error: Exception) -> HubError:
    """What the session raised, as one of ours."""
    if isinstance(error, HubError):
        return error
    return HubUnreachableError(reason_of(error)) if is_unreachable(error) else HubError(reason_of(error))

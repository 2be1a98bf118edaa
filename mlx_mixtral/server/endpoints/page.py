"""The page at /: one document with its styles and scripts inside, and the policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.server.service import Service

__all__ = ["PAGE_FOLDER", "PageDocument", "page", "page_document"]

PAGE_FOLDER = Path(__file__).parents[1] / "page"

_NAMED_FILE = re.compile(r'<(?:link rel="stylesheet" href|script src)="([\w-]+\.(?:css|js))">(?:</script>)?')


@dataclass(frozen=True)
class PageDocument:
    """What is sent.

    Args:
        body: UTF-8.
        policy: the value of Content-Security-Policy (https://www.w3.org/TR/CSP3/).
    """

    body: bytes
    policy: str

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the reply. The page may not be framed, sends no address on, and is asked for again each time."""
        return [
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-length", str(len(self.body)).encode()),
            (b"content-security-policy", self.policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"cache-control", b"no-cache"),
        ]


@cache
def page_document() -> PageDocument:
    """``index.html`` with the files it names put in their places, each allowed by its hash."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inside(found: re.Match[str]) -> str:
        text = (PAGE_FOLDER / found[1]).read_text(encoding="utf-8")
        tag = "style" if found[1].endswith(".css") else "script"
        hashes[tag].append(_hash(text))
        return f"<{tag}>{text}</{tag}>"

    html = _NAMED_FILE.sub(inside, (PAGE_FOLDER / "index.html").read_text(encoding="utf-8"))
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(hashes["script"]),
        "style-src": " ".join(hashes["style"]),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return PageDocument(html.encode(), "; ".join(f"{name} {value}" for name, value in policy.items()))


async def page(service: Service, request: Request, send: Send) -> None:
    """The page. It needs no key: it holds nothing but itself, and asks for the key that its requests need."""
    document = page_document()
    await send({"type": "http.response.start", "status": 200, "headers": document.headers})
    await send({"type": "http.response.body", "body": document.body})


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

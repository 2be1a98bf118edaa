"""A recorded routing: the trace, with the domain of each stretch, the gate's entropy, and each token's text.

Saved as one file that is a routing trace too: `mlx_mixtral.experts.trace.RoutingTrace.load` reads it and leaves the rest aside.

T tokens, L layers, K experts per token, E experts.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral.experts.trace import FORMAT, MAX_FILE_BYTES, RoutingTrace, is_trace
from mlx_mixtral.files import check_destination, check_kind, replace_file
from mlx_mixtral.reading import parse_json

__all__ = ["MAX_DOMAINS", "RoutingRecord", "trace_file_bytes"]

MAX_DOMAINS = 256
HEADER_BYTES = 2**16


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """Routing of texts by domain. ``trace.starts`` says where a new stretch of text begins; no pair of tokens spans two.

    Args:
        domains: names.
        segments: int64, for each stretch the number of its domain; every domain has at least one.
        entropy: float16 ``[T, L]`` of the gate's softmax over all experts, in bits, where it was recorded.
        pieces: text of each token, where it was kept; "" for a part of a character that a later token completes.
        name: of the model.

    Raises:
        InvalidRequestError: they are not that.
    """

    trace: RoutingTrace
    domains: tuple[str, ...]
    segments: npt.NDArray[np.int64]
    entropy: npt.NDArray[np.float16] | None = None
    pieces: tuple[str, ...] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        shape = self.trace.experts.shape
        if not self.domains or len(self.domains) > MAX_DOMAINS or len(set(self.domains)) < len(self.domains):
            raise InvalidRequestError(
                f"routing of {len(self.domains)} domains; it must have 1 to {MAX_DOMAINS}, each name once"
            )
        if self.segments.shape != (len(self.starts),) or self.segments.dtype != np.int64:
            raise InvalidRequestError(
                f"segments must be a domain's number, int64, for each of {len(self.starts)} stretches, "
                f"not {self.segments.dtype} {self.segments.shape}"
            )
        if self.segments.min() < 0 or self.segments.max() >= len(self.domains):
            raise InvalidRequestError(f"a stretch of text is of a domain beyond the {len(self.domains)} named")
        present = set(self.segments.tolist())
        for number, domain in enumerate(self.domains):
            if number not in present:
                raise InvalidRequestError(f"domain {domain!r} has no tokens; give it some text, or leave it out")
        if self.entropy is not None and (
            self.entropy.dtype != np.float16 or self.entropy.shape != shape[:2] or not np.isfinite(self.entropy).all()
        ):
            raise InvalidRequestError(f"entropy must be finite float16 {shape[:2]}, one number a token and layer")
        if self.pieces is not None and len(self.pieces) != shape[0]:
            raise InvalidRequestError(f"{len(self.pieces)} pieces of text were given for {shape[0]} tokens")

    @property
    def starts(self) -> tuple[int, ...]:
        """Where stretches begin, the first at 0."""
        own = self.trace.starts
        return own if own and own[0] == 0 else (0, *own)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each stretch."""
        return np.diff([*self.starts, len(self.trace.experts)])

    @classmethod
    def of_trace(cls, trace: RoutingTrace, name: str = "") -> RoutingRecord:
        """A bare trace, all of one domain, "text"."""
        stretches = len(trace.starts) + (not trace.starts or trace.starts[0] != 0)
        return cls(trace, ("text",), np.zeros(stretches, np.int64), name=name)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; the same record gives the same bytes.

        Raises:
            InvalidRequestError: it would be larger than what is read.
            DestinationError, DiskSpaceError: it cannot be written, or something that is no trace lies there.
        """
        place = check_destination("the trace file", path)
        check_kind(place, "a routing trace", is_trace)
        arrays: dict[str, npt.NDArray[Any]] = {
            "experts": np.ascontiguousarray(self.trace.experts),
            "starts": np.array(self.starts, np.int64),
            "segments": np.ascontiguousarray(self.segments),
        }
        if self.entropy is not None:
            arrays["entropy"] = np.ascontiguousarray(self.entropy)
        if self.pieces is not None:
            texts = [piece.encode("utf-8", "replace") for piece in self.pieces]
            arrays["text"] = np.frombuffer(b"".join(texts) or b"\0", np.uint8)
            arrays["text_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
        header = {"num_experts": self.trace.num_experts, "domains": self.domains, "model": self.name}
        # One key: safetensors writes several in an order of its own, another one each time.
        data = save(arrays, {FORMAT: json.dumps(header)})
        if len(data) > MAX_FILE_BYTES:
            raise InvalidRequestError(_too_large(str(place), len(data)))
        replace_file(place, data)

    @classmethod
    def load(cls, path: str | Path) -> RoutingRecord:
        """Read what ``save`` wrote, or a bare trace.

        Raises:
            CheckpointError: it cannot be read, or is something else.
        """
        place = as_path("a trace file", path)
        trace = RoutingTrace.load(place)
        try:
            with safe_open(str(place), "numpy") as file:
                header = parse_json(f"the header of {place}", (file.metadata() or {})[FORMAT])
                arrays = {name: file.get_tensor(name) for name in file.keys() if name not in ("experts", "starts")}  # noqa: SIM118
            name = header.get("model", "")
            if "segments" not in arrays:
                return cls.of_trace(trace, name if isinstance(name, str) else "")
            domains = header.get("domains")
            if (
                not isinstance(name, str)
                or not isinstance(domains, list)
                or not all(isinstance(d, str) for d in domains)
            ):
                raise CheckpointError(f"routing trace {place} is damaged: its header names no domains")
            pieces = _pieces(arrays["text"], arrays["text_ends"]) if "text_ends" in arrays else None
            return cls(trace, tuple(domains), arrays["segments"], arrays.get("entropy"), pieces, name)
        except InvalidRequestError as error:
            raise CheckpointError(f"routing trace {place} is damaged: {error}") from error
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"routing trace {place} cannot be read: {error}") from error


def _pieces(text: npt.NDArray[Any], ends: npt.NDArray[Any]) -> tuple[str, ...]:
    if text.dtype != np.uint8 or text.ndim != 1 or ends.dtype != np.int64 or ends.ndim != 1:
        raise InvalidRequestError("its text is not bytes")
    bounds = [0, *ends.tolist()]
    if any(a > b for a, b in itertools.pairwise(bounds)) or bounds[-1] > len(text):
        raise InvalidRequestError("the ends of its tokens' texts do not ascend within the text")
    data = text.tobytes()
    return tuple(data[a:b].decode("utf-8", "replace") for a, b in itertools.pairwise(bounds))


def trace_file_bytes(tokens: int, layers: int, per_token: int, text_bytes: int, stretches: int = 1) -> int:
    """An upper bound of a file's bytes, known before a model is run.

    Raises:
        InvalidRequestError: more than what is read.
    """
    own = tokens * layers * (2 * per_token + 2)
    own += (text_bytes + 8 * tokens if text_bytes else 0) + 16 * stretches + HEADER_BYTES
    if own > MAX_FILE_BYTES:
        raise InvalidRequestError(_too_large("the trace file", own))
    return own


def _too_large(name: str, size: int) -> str:
    return (
        f"{name} would have {size / 1e6:.0f} MB; at most {MAX_FILE_BYTES / 1e6:.0f} MB are read: "
        "take fewer tokens of each domain"
    )

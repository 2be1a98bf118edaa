"""A model's distributions in a file: the K likeliest tokens of each, so that a large model is run once and dropped.

A safetensors file of N predicted tokens: ``ids [N, K]`` (uint16, or uint32 for large vocabularies), ``logprobs [N, K]``
float32 with the likeliest first, ``rest [N]`` the log-probability of all other tokens together, ``target [N]`` that of the
token that came. Its header says which text (by its token ids), which vocabulary and which windows it was made with.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mlx_mixtral.arguments import check_integer, is_integer
from mlx_mixtral.errors import CheckpointError, DestinationError, InvalidRequestError
from mlx_mixtral.evaluation.corpus import Corpus
from mlx_mixtral.evaluation.forward import TopTokens
from mlx_mixtral.files import check_destination, disk_errors, open_partial, partial_path, put_in_place
from mlx_mixtral.reading import check_size, is_there, open_file, parse_json
from mlx_mixtral.sizes import format_bytes

__all__ = ["DEFAULT_TOP_K", "MAX_FILE_BYTES", "Reference", "ReferenceHeader", "ReferenceWriter", "check_replaceable"]

FORMAT = "mlx-mixtral-reference-1"
DEFAULT_TOP_K = 128
MAX_FILE_BYTES = 4 * 10**9


@dataclass(frozen=True)
class ReferenceHeader:
    """What the distributions are of. ``model`` is a name to show, ``identity`` tells checkpoints apart."""

    model: str
    identity: str
    text_sha256: str
    vocabulary_sha256: str
    vocab_size: int
    window: int
    stride: int
    tokens: int
    top_k: int

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """NumPy type and shape of each array, as they follow in the file."""
        n, k = self.tokens, self.top_k
        ids = "<u2" if self.vocab_size <= 2**16 else "<u4"
        # The ids last: the others stay aligned to their four bytes.
        return {"logprobs": ("<f4", (n, k)), "rest": ("<f4", (n,)), "target": ("<f4", (n,)), "ids": (ids, (n, k))}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(_nbytes(kind, shape) for kind, shape in self.arrays.values())

    def check_size(self) -> None:
        """Raise InvalidRequestError for a K out of range, or one that makes a file larger than ``MAX_FILE_BYTES``."""
        size = self.vocab_size
        check_integer("top_k", self.top_k, 1, size, wanted=f"1 to {size}, the size of the vocabulary")
        if self.nbytes > MAX_FILE_BYTES:
            most = (MAX_FILE_BYTES // self.tokens - 8) // (self.nbytes // self.tokens // self.top_k)
            advice = f"give --top-k {most} at most, or less text" if most >= 1 else "give less text"
            raise InvalidRequestError(
                f"the reference of {self.tokens} tokens with {self.top_k} of each would take {format_bytes(self.nbytes)}; "
                f"the limit is {format_bytes(MAX_FILE_BYTES)}: {advice}"
            )

    def check_text(self, corpus: Corpus, vocab_size: int, window: int, stride: int, place: object) -> None:
        """Raise InvalidRequestError unless it was made with this vocabulary, text and windows."""
        if (self.vocab_size, self.vocabulary_sha256) != (vocab_size, corpus.vocabulary):
            sizes = (
                f"{self.vocab_size} tokens and different pieces" if self.vocab_size == vocab_size else self.vocab_size
            )
            raise InvalidRequestError(
                f"reference {place} (of {self.model}) has another vocabulary: {sizes}, while the model's has {vocab_size}; "
                "distributions over different tokens cannot be compared: make one from the original of this model with "
                "--save-reference"
            )
        if self.text_sha256 != corpus.sha256:
            raise InvalidRequestError(
                f"reference {place} (of {self.model}) was made from another text: {self.tokens} tokens, but this one has "
                f"{corpus.tokens}; give the same files in the same order, or make it again with --save-reference"
            )
        if (self.window, self.stride) != (window, stride):
            raise InvalidRequestError(
                f"reference {place} (of {self.model}) was made with window {self.window} and stride {self.stride}, not "
                f"{window} and {stride}; give --window {self.window} --stride {self.stride}"
            )


class Reference:
    """A file that ``ReferenceWriter`` made. Read a window at a time.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Beside the arrays a header.
        check_size(path, MAX_FILE_BYTES + 2**20)
        try:
            file: Any = safe_open(str(path), "numpy")
            self._file = file
            self.header = ReferenceHeader(**parse_json(path, (file.metadata() or {})[FORMAT]))
            _check_header(self.header)
            for name, (kind, shape) in self.header.arrays.items():
                found = file.get_slice(name)
                if (tuple(found.get_shape()), found.get_dtype()) != (shape, _DTYPES[kind]):
                    raise CheckpointError(f"{path} is not a reference: its {name} have another shape or type")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            if isinstance(error, OSError):
                raise CheckpointError(f"reference {path} cannot be read: {error.strerror or error}") from error
            raise CheckpointError(
                f"{path} is not a reference; name a model, or a file that --save-reference wrote"
            ) from error

    @property
    def target(self) -> npt.NDArray[np.float32]:
        """``[N]``: log-probabilities of the tokens that came."""
        found = np.asarray(self._file.get_tensor("target"))
        if not np.isfinite(found).all():
            raise CheckpointError(f"{self.path} is damaged: it holds numbers that are not finite")
        return found

    @property
    def best(self) -> npt.NDArray[np.int32]:
        """``[N]``: the likeliest token of each distribution."""
        return np.asarray(self._file.get_slice("ids")[:, :1])[:, 0].astype(np.int32)

    def kept(self, start: int, stop: int) -> TopTokens:
        """Distributions of predicted tokens ``start`` to ``stop``.

        Raises:
            CheckpointError: the file is damaged.
        """
        ids = np.asarray(self._file.get_slice("ids")[start:stop]).astype(np.int32)
        logprobs = np.asarray(self._file.get_slice("logprobs")[start:stop])
        rest = np.asarray(self._file.get_slice("rest")[start:stop])
        if (ids >= self.header.vocab_size).any() or np.isnan(logprobs).any() or np.isnan(rest).any():
            raise CheckpointError(f"{self.path} is damaged: tokens {start} to {stop} are not distributions")
        return TopTokens(ids, logprobs, rest)


class ReferenceWriter:
    """Fills a hidden file beside ``path``, which appears when ``finish`` is called. Rows may come in any order.

    ``is_new`` tells whether nothing is in it yet; else it is what an earlier run with the same header left behind.

    Raises:
        InvalidRequestError: more bytes than are written.
        DestinationError, DiskSpaceError: it cannot be written.
    """

    def __init__(self, path: Path, header: ReferenceHeader) -> None:
        header.check_size()
        # Filled in any order: a pipe or a device cannot be.
        path = check_destination("the reference file", path, regular=True)
        self.path, self.header, self.partial = path, header, partial_path(path)
        start = _file_header(header)
        total = len(start) + header.nbytes
        self._arrays: dict[str, np.memmap[Any, Any]] = {}
        with disk_errors(path):
            self.is_new = not _begins_with(self.partial, start, total)
            if self.is_new:
                try:
                    with open_partial(self.partial) as file:
                        file.write(start)
                        # All of it now: a full disk is known before the work, not by a signal in the middle of it.
                        for done in range(len(start), total, 2**20):
                            file.write(bytes(min(2**20, total - done)))
                except BaseException:
                    self.discard()
                    raise
            offset = len(start)
            for name, (kind, shape) in header.arrays.items():
                self._arrays[name] = np.memmap(self.partial, kind, "r+", offset, shape)
                offset += _nbytes(kind, shape)

    def __enter__(self) -> ReferenceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arrays.clear()

    def write(self, start: int, kept: TopTokens, target: npt.NDArray[np.float32]) -> None:
        """Put distributions at predicted tokens from ``start`` on."""
        rows = slice(start, start + len(target))
        for name, values in zip(("ids", "logprobs", "rest", "target"), (*kept, target), strict=True):
            self._arrays[name][rows] = values

    def flush(self) -> None:
        """Wait until all that was written is on the disk."""
        with disk_errors(self.path):
            for array in self._arrays.values():
                array.flush()

    def finish(self) -> None:
        """Make the file appear, in place of one that was there."""
        self.flush()
        self._arrays.clear()
        with disk_errors(self.path):
            put_in_place(self.partial, self.path)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._arrays.clear()
        with contextlib.suppress(OSError):
            self.partial.unlink()


def check_replaceable(place: Path) -> None:
    """Raise DestinationError for a file at ``place`` that is not a reference: it might be weights."""
    if not is_there(place):
        return
    try:
        Reference(place)
    except CheckpointError:
        raise DestinationError(f"{place} exists and is not a reference file; give another name") from None


def _check_header(header: ReferenceHeader) -> None:
    """Raise ValueError for a header that ``ReferenceWriter`` cannot have written."""
    counts = (header.vocab_size, header.window, header.stride, header.tokens, header.top_k)
    texts = (header.model, header.identity, header.text_sha256, header.vocabulary_sha256)
    if not all(is_integer(n) and 0 < n < 2**31 for n in counts) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a header of other values")


_DTYPES = {"<u2": "U16", "<u4": "U32", "<f4": "F32"}


def _nbytes(kind: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize


def _file_header(header: ReferenceHeader) -> bytes:
    """The file up to its first array (https://huggingface.co/docs/safetensors: u64 length, JSON, padded to 8 bytes)."""
    entries: dict[str, Any] = {"__metadata__": {FORMAT: json.dumps(asdict(header))}}
    offset = 0
    for name, (kind, shape) in header.arrays.items():
        end = offset + _nbytes(kind, shape)
        entries[name] = {"dtype": _DTYPES[kind], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _begins_with(path: Path, start: bytes, total: int) -> bool:
    try:
        with open_file(path) as file:
            return not path.is_symlink() and path.stat().st_size == total and file.read(len(start)) == start
    except (CheckpointError, OSError):
        return False

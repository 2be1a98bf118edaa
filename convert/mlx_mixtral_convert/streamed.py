"""A hub repository as a source whose weights are never stored: each matrix is fetched when its turn comes.

Configuration, tokenizer and index are small and come through the hub's cache; weight files are read by byte range.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from mlx_mixtral.errors import CheckpointError, ConversionError, HubError
from mlx_mixtral.hub import explained, resolve, wanted_files
from mlx_mixtral.weights.checkpoint import INDEX, Checkpoint, CheckpointReader
from mlx_mixtral.weights.safetensors import TensorInfo, header_bytes, parse_header
from mlx_mixtral_convert.ranges import Listing, RangeReader, list_files
from mlx_mixtral_convert.sources import SourceFiles
from mlx_mixtral_convert.sources.hf import HuggingFaceSource

__all__ = ["StreamedSource", "open_streamed"]

# Most headers are shorter: one request then brings all of one.
HEADER_GUESS_BYTES = 2**17


def open_streamed(repository: str, revision: str | None) -> StreamedSource:
    """Open a hub repository of safetensors weights under Hugging Face names.

    Raises:
        HubError: it cannot be reached, or has other weights.
        CheckpointError, ConfigError, ConversionError: as for a folder.
    """
    listing = list_files(repository, revision)
    with explained(repository, revision):
        wanted = wanted_files(listing.files)
        weights = [name for name in wanted if name.endswith(".safetensors") and not name.startswith("consolidated")]
        if not weights or "config.json" not in listing.files:
            raise HubError("only safetensors weights with a config.json can be streamed; convert without --stream")
    folder = resolve(repository, revision=listing.commit, weights=False)
    if INDEX in listing.files:
        with explained(repository, revision):
            import huggingface_hub as hub

            hub.hf_hub_download(repository, INDEX, revision=listing.commit)
    reader = RangeReader(listing)
    try:
        return StreamedSource(folder, StreamedCheckpoint(folder, reader, weights))
    except BaseException:
        reader.close()
        raise


class StreamedCheckpoint(Checkpoint):
    """The tensors of a repository; ``folder`` has its small files."""

    def __init__(self, folder: Path, ranges: RangeReader, weights: list[str]) -> None:
        self.ranges, self._weights = ranges, weights
        super().__init__(folder)

    def _has(self, file: str) -> bool:
        return file in self.ranges.listing.files

    def _single_file(self) -> Path:
        if len(self._weights) > 1:
            raise CheckpointError(
                f"{self.ranges.listing.repository} has {len(self._weights)} safetensors files and no {INDEX} "
                "to say which tensor is where"
            )
        return Path(self._weights[0])

    def _header(self, file: str) -> dict[str, TensorInfo]:
        size = self.ranges.listing.files[file].nbytes
        path = Path(self.ranges.listing.repository, file)
        raw = bytearray(min(size, HEADER_GUESS_BYTES))
        self.ranges.read_into(file, memoryview(raw), 0)
        end = struct.calcsize("<Q") + header_bytes(path, bytes(raw[:8]), size)
        if end > (have := len(raw)):
            raw += bytes(end - have)
            self.ranges.read_into(file, memoryview(raw)[have:], have)
        return parse_header(path, bytes(raw[8:end]), size)


class StreamedReader(CheckpointReader):
    """Reads tensors of a ``StreamedCheckpoint``."""

    def __init__(self, checkpoint: StreamedCheckpoint) -> None:
        self.checkpoint: Checkpoint = checkpoint
        self._ranges = checkpoint.ranges

    def read(self, info: TensorInfo, buffer: memoryview, skip_bytes: int = 0) -> None:
        self._ranges.read_into(info.file.name, buffer.cast("B"), info.offset + skip_bytes)

    def close(self) -> None:
        self._ranges.close()


class StreamedFiles(SourceFiles):
    """The weight files of a repository, pinned to a commit: they cannot change."""

    def __init__(self, ranges: RangeReader, paths: list[Path]) -> None:
        self.paths = tuple(paths)
        self._ranges, self._listing = ranges, ranges.listing

    @property
    def sizes(self) -> dict[str, int]:
        return {path.name: self._listing.files[path.name].nbytes for path in self.paths}

    def describe(self) -> dict[str, dict[str, Any]]:
        return {path.name: self._describe(self._listing, path.name) for path in self.paths}

    def check_unchanged(self) -> None:
        pass

    def stop_waiting(self) -> None:
        self._ranges.stop()

    @staticmethod
    def _describe(listing: Listing, name: str) -> dict[str, Any]:
        file = listing.files[name]
        # As for a file in the hub's cache, so that a conversion may go on from a downloaded copy and the other way round.
        return {"bytes": file.nbytes} | ({"sha256": file.sha256} if file.sha256 else {"blob": file.blob})


class StreamedSource(HuggingFaceSource):
    """A repository under Hugging Face names, fetched as it is read."""

    checkpoint: StreamedCheckpoint

    def _open(self) -> tuple[SourceFiles, CheckpointReader]:
        if not isinstance(self.checkpoint, StreamedCheckpoint):
            raise ConversionError("a streamed source needs a streamed checkpoint")
        return StreamedFiles(self.checkpoint.ranges, self.checkpoint.files), StreamedReader(self.checkpoint)

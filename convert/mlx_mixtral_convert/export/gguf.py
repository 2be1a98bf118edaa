"""A GGUF file for llama.cpp and what is built on it: architecture ``llama``, experts merged, queries and keys interleaved.

    token_embd, output_norm, output                                            [V, D], [D], [V, D]
    blk.N.{attn_norm,ffn_norm}                                                 [D], float32
    blk.N.{attn_q,attn_k,attn_v,attn_output}                                   [out, D]
    blk.N.ffn_gate_inp                                                         [E, D], the router, float32
    blk.N.ffn_{gate,up,down}_exps (a dense model: ffn_{gate,up,down})          [E, out, in]

The header is written by the ``gguf`` package; the data, far larger than memory, follows it one expert at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, Norm, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import ConversionError, InvalidRequestError, MissingDependencyError
from mlx_mixtral.files import disk_error, disk_errors
from mlx_mixtral.installing import how_to_install
from mlx_mixtral.weights.dtypes import FLOATS, convert
from mlx_mixtral_convert.export.gguf_blocks import encode, repack, repackable
from mlx_mixtral_convert.export.gguf_header import rope_factors, write_header
from mlx_mixtral_convert.export.gguf_mixes import WEIGHABLE, fallback_notes, mix_of, tensor_types
from mlx_mixtral_convert.export.gguf_vocabulary import Vocabulary, read_vocabulary
from mlx_mixtral_convert.export.job import Job, Result
from mlx_mixtral_convert.output.destination import SPARE_BYTES
from mlx_mixtral_convert.output.file_destination import FileDestination
from mlx_mixtral_convert.packing.measure import decode
from mlx_mixtral_convert.packing.quantize import cast
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.rounding import Search
from mlx_mixtral_convert.sources import GeneratedFiles, PackedSource, TensorSource, small_files, tensor_place
from mlx_mixtral_convert.sources.gguf.names import gguf_name
from mlx_mixtral_convert.sources.gguf.source import GgufSource
from mlx_mixtral_convert.sources.gguf.types import TYPES_BY_NAME, GgufTensor
from mlx_mixtral_convert.sources.row_order import join_halves, rotary_heads

__all__ = ["write_gguf"]

ALIGNMENT = 32


def write_gguf(job: Job, kind: str | None) -> Result:
    """Write the file. ``kind`` is one of ``GGUF_TYPES``, F16 when None.

    Raises:
        ConversionError: the calibration is another model's.
        InvalidRequestError: rows that do not divide into the blocks of ``kind``, or a calibration that it has no use for.
        MissingDependencyError: the package ``gguf`` is not installed.
        ConfigError: rope scaling that GGUF has no keys for.
        TokenizerError: no SentencePiece tokenizer that fits.
    """
    mix = mix_of("F16" if kind is None else kind)
    config, importance = job.source.config, _importance(job, mix)
    types = tensor_types(config, mix)
    destination = FileDestination(job.dest, job.folder, overwrite=job.overwrite)
    _require_gguf()
    listed: list[Matrix | Norm] = [*norms(config), *matrices(config)]
    factors = rope_factors(config)
    tensors = {item.path: _tensor(item, types.get(item.path, "F32")) for item in listed}
    if factors is not None:
        tensors["rope"] = GgufTensor("rope_freqs.weight", TYPES_BY_NAME["F32"], factors.shape)
    vocabulary = _vocabulary(job)
    data_bytes = sum(tensor.nbytes for tensor in tensors.values())
    padded = sum(_padded(tensor.nbytes) for tensor in tensors.values())
    # A generous bound of the header, which is known exactly only once it is written.
    text = sum(map(len, vocabulary.templates.values())) * 4 + sum(
        len(token.encode()) + 16 for token in vocabulary.tokens
    )
    header = text + 256 * len(tensors) + 2**16
    needed, free = padded + header + SPARE_BYTES, destination.free_bytes()
    output_bytes, exact = padded + header, 0
    if not job.dry_run:
        destination.check_space(needed)
        with destination as partial:
            write_header(partial, job.name, config, vocabulary, mix, list(tensors.values()))
            exact = _append(job, partial, tensors, importance, factors)
            output_bytes = partial.stat().st_size
            job.finish(data_bytes)
            destination.commit()
    notes = (*fallback_notes(config, mix, types), *_notes(config, vocabulary))
    return Result(destination.path, mix, output_bytes, data_bytes, needed, free, exact, notes)


def _tensor(item: Matrix | Norm, kind: str) -> GgufTensor:
    name, type_ = gguf_name(item), TYPES_BY_NAME[kind]
    if isinstance(item, Norm):
        return GgufTensor(f"{name}.weight", type_, (item.size,))
    if item.path.rpartition(".")[0].endswith(".mlp"):
        return GgufTensor(f"{name}.weight", type_, (item.out_features, item.in_features))
    return GgufTensor(f"{name}{'_exps' * (item.num_experts is not None)}.weight", type_, item.shape)


def _importance(job: Job, mix: str) -> Search | None:
    """What weighs errors, None without a calibration."""
    if job.calibration is None:
        return None
    if mix not in WEIGHABLE:
        raise InvalidRequestError(f"{mix} has no scales that a calibration could improve; use {', '.join(WEIGHABLE)}")
    job.calibration.check_fits(job.source)
    return Search(job.calibration)


def _vocabulary(job: Job) -> Vocabulary:
    if not isinstance(job.source, GeneratedFiles):
        return read_vocabulary(job.source.folder, job.source.config)
    with tempfile.TemporaryDirectory() as held:
        for name, data in small_files(job.source).items():
            (Path(held) / name).write_bytes(data)
        return read_vocabulary(Path(held), job.source.config)


def _append(
    job: Job,
    path: Path,
    tensors: dict[str, GgufTensor],
    importance: Search | None,
    factors: npt.NDArray[np.float32] | None,
) -> int:
    """Write all data after the header, in the header's order; returns how many matrices kept their integers."""
    source, config = job.source, job.source.config
    changed: set[str] = set()
    with (
        path.open("ab", buffering=0) as file,
        ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mlx-mixtral-encode") as pool,
        closing(job.walk(list(matrices(config)), _reader(source, tensors))) as walk,
    ):
        out = _Out(file.fileno(), path, file.tell() + sum(_padded(tensor.nbytes) for tensor in tensors.values()))
        out.pad()
        for norm in norms(config):
            out.write(cast(source.read_norm(norm), "F32", tensor_place(source, norm)).array)
            out.pad()
        for matrix, expert, read in walk:
            if isinstance(read, Values):
                changed.add(matrix.path)
                weighing = None if importance is None else importance.importance(matrix, expert)
                weights = None if weighing is None else np.array(weighing)
                rows = encode(read, tensors[matrix.path].kind.name, tensor_place(source, matrix, expert), pool, weights)
            else:
                rows = read
            if (heads := rotary_heads(matrix, config)) is not None:
                rows = join_halves(rows, heads)
            out.write(rows)
            if expert + 1 == (matrix.num_experts or 1):
                out.pad()
        if factors is not None:
            out.write(factors)
            out.pad()
        out.finish()
    return sum(matrix.path not in changed for matrix in matrices(config))


def _reader(source: TensorSource, tensors: dict[str, GgufTensor]) -> Any:
    """Reads an expert as blocks of the file where the source's integers fit them, else as floats."""

    def read(matrix: Matrix, expert: int, scratch: npt.NDArray[np.uint8]) -> Values | npt.NDArray[np.uint8]:
        kind = tensors[matrix.path].kind.name
        if isinstance(source, GgufSource) and source.type_name(matrix) == kind and kind not in FLOATS:
            # The same type already. Its floats are what is checked.
            cast(source.read(matrix, expert, scratch), "F32", tensor_place(source, matrix, expert))
            return source.read_blocks(matrix, expert)
        native = source.native(matrix) if isinstance(source, PackedSource) else None
        if native is None or not native.exact or not repackable(native.spec, kind):
            return source.read(matrix, expert, scratch)
        assert isinstance(source, PackedSource)
        try:
            packed = {str(field): array for field, array in source.read_packed(matrix, expert).items()}
        except ConversionError:  # scales that float16 cannot hold
            return source.read(matrix, expert, scratch)
        values = None
        if not native.lossless:
            # Scales of bfloat16 are float16's too unless they are very small or large: the weights themselves tell.
            values = source.read(matrix, expert, scratch)
            as_floats = {field: a if field == "weight" else convert(a, "F16", "F32") for field, a in packed.items()}
            if not np.array_equal(decode(as_floats, native.spec), convert(values.array, values.dtype, "F32")):
                return values
        rows = repack(packed, native.spec, kind)
        return rows if rows is not None else source.read(matrix, expert, scratch) if values is None else values

    return read


class _Out:
    """Appends to the open file, with the padding the format asks for between tensors."""

    def __init__(self, descriptor: int, path: Path, expected: int) -> None:
        self._descriptor, self._path, self._expected = descriptor, path, expected
        self._written = os.fstat(descriptor).st_size

    def write(self, array: npt.NDArray[Any]) -> None:
        data, done = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)), 0  # type: ignore[arg-type]
        while done < len(data):
            try:
                done += os.write(self._descriptor, data[done:])
            except OSError as error:
                raise disk_error(error, self._path, self._written + done, self._expected) from error
        self._written += done

    def pad(self) -> None:
        self.write(np.zeros(_padded(self._written) - self._written, np.uint8))

    def finish(self) -> None:
        with disk_errors(self._path):
            os.fsync(self._descriptor)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _notes(config: MixtralConfig, vocabulary: Vocabulary) -> Iterator[str]:
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        yield f"the context is limited to {window} tokens: GGUF's llama architecture has no sliding window"
    if lost := vocabulary.lost_ends:
        yield f"generation will not stop at {', '.join(map(str, lost))}: GGUF can store only three stop tokens"
    if not vocabulary.templates:
        yield "the source has no chat template, so other programs will guess one"


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"writing GGUF needs the package gguf: {how_to_install('gguf')}") from error

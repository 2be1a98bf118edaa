"""llama.cpp's own quantised files, for ``quality.py``: made by its quantiser, read back as the floats they stand for.

llama.cpp runs in an interpreter of its own, which has llama-cpp-python (compiled while it is installed, a quarter of an hour):

    python -m venv llama && llama/bin/pip install llama-cpp-python==0.3.36

Its types of few bits put 256 weights of a row in a block. A model whose rows do not divide into 256, as both subjects here, it
packs with other types: Q4_0 or IQ4_NL instead of 2 and 3 bits. To measure those types all the same, rows are joined until they
do: ``[out, 128]`` is passed as ``[out / 2, 256]`` and ``[out, 576]`` as ``[out / 4, 2304]``. The data stays where it is, only
the header changes; the importance matrix is repeated in the same way. A block of 256 then has parts of two rows, but its groups
of 16 or 32 weights, which have scales of their own, do not. Types are chosen by llama.cpp's own rules for eight experts.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from math import lcm
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import numpy.typing as npt
from gguf import quants

from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral_convert import Calibration
from mlx_mixtral_convert.calibration.statistics import input_name
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.sources.gguf.names import gguf_name
from mlx_mixtral_convert.sources.row_order import part_halves, rotary_heads

MIXES = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_S", "Q3_K_M",
    "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M",
)  # fmt: skip
"""In about the order of their size."""
BLOCK = 256
Floats = npt.NDArray[np.float32]
QUANTIZE = """
import ctypes, sys
import numpy as np
from llama_cpp import llama_cpp as lib
given = lib.llama_model_quantize_default_params()
given.nthread, given.ftype, held = 2, getattr(lib, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3]), []
if len(sys.argv) > 4:
    file = np.load(sys.argv[4])
    entries = (lib.llama_model_imatrix_data * (len(file.files) + 1))()
    for entry, name in zip(entries, file.files):
        data = np.ascontiguousarray(file[name], np.float32).reshape(-1)
        held.append(data)
        entry.name, entry.size = name.encode(), data.size
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    given.imatrix = ctypes.cast(entries, ctypes.POINTER(lib.llama_model_imatrix_data))
assert lib.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(given)) == 0
"""
"""What llama.cpp does. Arguments: an F16 file, the file to make, its mix, and the importance of inputs if there is one."""


def run_llama(python: str, code: str, *arguments: object) -> None:
    """``code`` in an interpreter that has llama-cpp-python, which has nothing of ours on its path.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    command = [python, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in said if "llama_model_quantize: failed" in line] or said[-1:]
        raise RuntimeError(f"llama.cpp: {errors[-1] if errors else f'exit status {done.returncode}'}")


def tensor_name(matrix: Matrix) -> str:
    return f"{gguf_name(matrix)}{'_exps' * (matrix.num_experts is not None)}.weight"


def importance(calibration: Calibration, config: MixtralConfig) -> dict[str, Floats]:
    """By GGUF's names, ``[experts, in]``: mean squares of the inputs, as llama.cpp's own tool gathers them.

    An expert no token reached gets ones, as there. A token counts for an expert with the square of its routing weight. The head
    has an entry, which llama.cpp's tool makes on request only; the embedding has none.
    """
    found = {}
    for matrix in matrices(config):
        if matrix.part in ("router", "embedding"):
            continue
        squares = calibration.mean_squares[input_name(matrix)]
        found[tensor_name(matrix)] = np.where(squares.any(axis=1, keepdims=True), squares, np.float32(1))
    return found


def write_f16(folder: Path, vocabulary: Path, path: Path) -> None:
    """An F16 file by our export.

    Args:
        vocabulary: ``tokenizer.model`` of any SentencePiece tokenizer that has no more pieces than the model has tokens. It
            stands in where the model's own is of another kind, which the export refuses: quantising only copies it.
    """
    with TemporaryDirectory(dir=path.parent) as held:
        for file in folder.iterdir():
            if not file.name.startswith("tokenizer"):
                (Path(held) / file.name).symlink_to(file.resolve())
        (Path(held) / "tokenizer.model").symlink_to(vocabulary.resolve())
        export(held, path, to="gguf", type="F16")


def joined(columns: int) -> int:
    """How many rows of so many columns make one that divides into blocks."""
    return lcm(columns, BLOCK) // columns


def join_rows(path: Path, config: MixtralConfig) -> None:
    """Change the shapes in the header of an F16 file; see above."""
    changed = {tensor_name(m): joined(m.in_features) for m in matrices(config) if m.part != "router"}
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if (times := changed.get(tensor.name, 1)) > 1:
            shape = tensor.field.parts[3]
            assert shape[1] % times == 0, tensor.name
            shape[0], shape[1] = shape[0] * times, shape[1] // times
    reader.data.flush()


def quantise(
    python: str, source: Path, dest: Path, mix: str, weights: Mapping[str, Floats] | None, *, join: bool
) -> None:
    """Have llama.cpp quantise an F16 file, weighted by ``weights``; ``join``: its rows are joined."""
    with TemporaryDirectory(dir=dest.parent) as held:
        entries = []
        if weights is not None:
            tiled = {name: np.tile(w, joined(w.shape[-1]) if join else 1) for name, w in weights.items()}
            entries = [Path(held) / "importance.npz"]
            np.savez(entries[0], **tiled)
        run_llama(python, QUANTIZE, source, dest, mix, *entries)


def read_back(path: Path, config: MixtralConfig) -> dict[str, tuple[Floats, int, str]]:
    """Of every matrix by path, in our order of rows: its floats, the bytes it takes, and its type."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for matrix in matrices(config):
        tensor = tensors[tensor_name(matrix)]
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        values = np.ascontiguousarray(values.reshape(matrix.shape))
        if (heads := rotary_heads(matrix, config)) is not None:
            part_halves(values, heads)
        found[matrix.path] = (values, int(tensor.n_bytes), tensor.tensor_type.name)
    return found


def file_bytes(path: Path) -> int:
    """Of all its tensors."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)

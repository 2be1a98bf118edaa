"""PyTorch files without PyTorch: what is read from them, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.sources import KINDS, detect
from mlx_mixtral_convert.sources.storage.file import StoredTensor
from mlx_mixtral_convert.sources.storage.local import LocalStorage
from mlx_mixtral_convert.sources.torch.files import read_torch
from tests.convert.support import CONFIG, EXPERT, Tensors, dense_config, hashes, make_checkpoint, weights
from tests.convert.torch_writer import EMPTY, View, named, number, save_torch, tensor_operations, text, transposed


def opened(path: Path) -> dict[str, StoredTensor]:
    return read_torch(path, LocalStorage(path))


GOLDENS = Path(__file__).parents[2] / "goldens" / "torch"
ONE = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def values(info: StoredTensor) -> list[Any]:
    raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    if info.dtype == "BF16":
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    kind = {"F32": np.float32, "BF16": np.float32, "F16": np.float16, "I64": np.int64}[info.dtype]
    array = np.frombuffer(raw, kind)
    listed: list[Any] = (array.reshape(info.shape[::-1]).T if info.transposed else array.reshape(info.shape)).tolist()
    return listed


@pytest.mark.parametrize("name", ["small.bin", "small-before-1.6.bin"])
def test_a_file_pytorch_wrote_is_read(name: str) -> None:
    found = opened(GOLDENS / name)
    whole = np.arange(24.0)
    assert {name: (info.dtype, values(info)) for name, info in found.items()} == {
        "plain": ("F32", whole.reshape(4, 6).tolist()),
        "parameter": ("BF16", np.arange(6.0).reshape(2, 3).tolist()),
        "transposed": ("F16", np.arange(12.0).reshape(3, 4).T.tolist()),
        "shares_and_starts_later": ("F32", whole[10:18].reshape(2, 4).tolist()),
        "vector": ("F32", [1.0] * 5),
        "numbers": ("I64", [0, 1, 2]),
    }


def make_bin(folder: Path, tensors: dict[str, Any], *, shards: int = 1, dtype: str = "BF16", **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if shards == 1:
        save_torch(folder / "pytorch_model.bin", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for number_ in range(shards):
        part = dict(list(tensors.items())[number_::shards])
        file = f"pytorch_model-{number_ + 1:05}-of-{shards:05}.bin"
        save_torch(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def weights_and_config(folder: Path) -> dict[str, str]:
    return {name: value for name, value in hashes(folder).items() if name != "conversion.json"}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("change", [{}, dense_config()])
@pytest.mark.parametrize("bits", [4, None])
def test_a_folder_of_bin_files_gives_the_bytes_its_safetensors_do(
    tmp_path: Path, shards: int, change: dict[str, Any], bits: int | None
) -> None:
    convert(make_checkpoint(tmp_path / "reference", **change), tmp_path / "a", recipe=Recipe(bits))
    source = make_bin(tmp_path / "source", weights(CONFIG | change), shards=shards, **change)
    assert detect(source) == "hf-bin"
    convert(source, tmp_path / "b", recipe=Recipe(bits))
    assert weights_and_config(tmp_path / "a") == weights_and_config(tmp_path / "b")


def test_transposed_tensors_are_turned_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small blocks, so that a matrix takes several and the last is short.
    monkeypatch.setattr("mlx_mixtral_convert.sources.row_order.BLOCK_BYTES", 5000)
    convert(make_checkpoint(tmp_path / "reference"), tmp_path / "a")
    turned = {name: transposed(value) if value.ndim == 2 else value for name, value in weights(CONFIG).items()}
    convert(make_bin(tmp_path / "source", turned), tmp_path / "b")
    assert weights_and_config(tmp_path / "a") == weights_and_config(tmp_path / "b")


def test_safetensors_are_preferred_to_bin_files(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"never opened")
    assert detect(source) == "hf"
    assert list(KINDS)[-1] == "hf"


class Runs:
    """Unpickled the usual way, this would make a file."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("ran",)


def dictionary(item: bytes) -> bytes:
    return b"\x80\x02" + EMPTY + text("weight") + item + b"s."


STORED = tensor_operations(View(ONE["weight"]), "0", "F32")
NESTED = b"\x80\x02" + b")" * 1 + b"\x85" * 300_000
BAD_PICKLES = {
    "runs code": (pickle.dumps(Runs(), 2), r"asks for (posix|nt)\.mkdir, which is not part of a tensor; it is refused"),
    "runs code, protocol 4": (pickle.dumps({"weight": Runs()}, 4), r"asks for posix\.mkdir"),
    "builtins": (dictionary(named("builtins", "eval") + text("1") + b"\x85R"), r"asks for builtins\.eval"),
    "torch, but not a tensor": (dictionary(named("torch", "load") + b")R"), r"asks for torch\.load"),
    "an instance": (b"\x80\x02" + named("collections", "OrderedDict") + b")\x81.", "uses operation NEWOBJ"),
    "an old class": (b"(ios\nsystem\n.", "uses operation INST"),
    "an extension": (b"\x80\x02\x82\x01.", "uses operation EXT1"),
    "calls a number": (dictionary(number(1) + b")R"), "calls something that is not a function"),
    "not a dictionary": (b"\x80\x02]" + STORED + b"a.", "holds a list, not a dictionary of tensors"),
    "an entry that is text": (dictionary(text("x")), "entry 'weight' is a str, not a tensor"),
    "no end": (b"\x80\x02" + EMPTY, "damaged"),
    "nothing": (b"", "damaged"),
    "noise": (bytes(range(256)), "damaged"),
    "takes too much": (b"\x80\x02s.", "damaged|pops more"),
    "a memo that is not there": (b"\x80\x02h\x07.", "damaged"),
    "nested as a key": (NESTED + b"h\0s.", "damaged|not a dictionary"),
    "nested as a value": (NESTED + b".", "holds a tuple"),
    "a name that cannot be hashed": (b"\x80\x02}]" + STORED + b"s.", "sets named items of something that is not a dictionary"),
    "longer than is there": (b"\x80\x02X\xff\xff\xff\xffabc.", "damaged"),
    "a negative shape": (
        dictionary(tensor_operations(View(ONE["weight"], (-2, 3), (3, 1)), "0", "F32")), "are not a tensor's",
    ),
    "a negative offset": (
        dictionary(tensor_operations(View(ONE["weight"], offset=-1), "0", "F32")), "are not a tensor's",
    ),
    "more axes than any tensor": (
        dictionary(tensor_operations(View(ONE["weight"], (1,) * 40, (1,) * 40), "0", "F32")), "are not a tensor's",
    ),
    "beyond its storage": (
        dictionary(tensor_operations(View(ONE["weight"], (3, 3)), "0", "F32")), "needs 9 values of its storage, which has 6",
    ),
    "a start beyond its storage": (
        dictionary(tensor_operations(View(ONE["weight"], offset=1), "0", "F32")), "needs 7 values",
    ),
    "a storage beyond the file": (
        dictionary(tensor_operations(View(ONE["weight"], (2**40, 3), numel=2**60), "0", "F32")), "which has 6",
    ),
    "a storage that is not there": (dictionary(tensor_operations(View(ONE["weight"]), "7", "F32")), "storage 'model/data/7'"),
    "strides": (
        dictionary(tensor_operations(View(ONE["weight"], (2, 1, 2), (3, 3, 2)), "0", "F32")), r"'weight'.*strides \[3, 3, 2\]",
    ),
    "overlapping rows": (
        dictionary(tensor_operations(View(ONE["weight"], (2, 3), (0, 1)), "0", "F32")), r"'weight'.*strides \[0, 1\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_a_pickle_of_anything_but_tensors_is_refused(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, match = BAD_PICKLES[case]
    path = save_torch(tmp_path / "model.bin", ONE, "F32", pickle=data)
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_cannot_take_much_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = b"\x80\x02" + b"(" + b"}q\0" + b"h\0" * 1_000_000 + b"t."
    with pytest.raises(CheckpointError, match="holds a tuple"):
        opened(save_torch(tmp_path / "many.bin", ONE, "F32", pickle=many))
    with pytest.raises(CheckpointError, match="are read"):
        opened(save_torch(tmp_path / "long.bin", ONE, "F32", pickle=b"\x80\x02" + b"N0" * 2**22))
    # The standard library's own unpickler would make room for all memos up to this one.
    far = b"\x80\x02}r\xff\xff\xff\x7f."
    assert opened(save_torch(tmp_path / "far.bin", ONE, "F32", pickle=far)) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def lie_about_place(data: bytes) -> bytes:
    at = data.rindex(b"PK\1\2", 0, data.rindex(b"model/data/0"))
    return data[: at + 42] + struct.pack("<I", 5) + data[at + 46 :]


def lie_about_size(data: bytes) -> bytes:
    at = data.rindex(b"PK\1\2", 0, data.rindex(b"model/data/0"))
    return data[: at + 20] + struct.pack("<II", 10**9, 10**9) + data[at + 28 :]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (cut, "truncated, or not a torch file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n", "run git lfs pull"),
        (lambda data: data[:100], "truncated"),
        (lambda data: b"", "truncated"),
        (
            lambda data: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + data[:50],
            "the pickle that describes the tensors is damaged",
        ),
        (lambda data: data[:70] + b"~" + data[71:], "truncated|damaged|CRC"),
        (lie_about_place, "'model/data/0' is not where the directory says"),
        (lie_about_size, "'model/data/0' ends beyond the file's"),
    ],
)
def test_a_damaged_zip_is_refused(tmp_path: Path, edit: Callable[[bytes], bytes], match: str) -> None:
    path = save_torch(tmp_path / "model.bin", ONE, "F32")
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(CheckpointError, match=match):
        opened(path)


def test_compressed_entries_and_foreign_byte_orders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        opened(save_torch(tmp_path / "a.bin", ONE, "F32", compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="big-endian"):
        opened(save_torch(tmp_path / "b.bin", ONE, "F32", byteorder="big"))
    with zipfile.ZipFile(tmp_path / "c.bin", "w") as archive:
        archive.writestr("a/b.txt", "x")
    with pytest.raises(CheckpointError, match="zip file without tensors"):
        opened(tmp_path / "c.bin")


def refused(source: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        convert(source, source.parent / "out")
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize("file", ["../model.bin", "/etc/passwd", "sub/model.bin", "..", "", 3, "absent.bin"])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: Any) -> None:
    source = make_bin(tmp_path / "source", weights(CONFIG), shards=2)
    save_torch(tmp_path / "model.bin", weights(CONFIG))
    index = source / "pytorch_model.bin.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"][EXPERT] = file
    index.write_text(json.dumps(entries))
    refused(
        source, "names 'absent.bin', which is not in" if file == "absent.bin" else f"tensor '{EXPERT}' is placed in"
    )


def test_missing_surplus_and_misplaced_tensors_are_named(tmp_path: Path) -> None:
    made: Tensors = dict(weights(CONFIG))
    refused(make_bin(tmp_path / "a", {n: v for n, v in made.items() if n != EXPERT}), f"'{EXPERT}' is missing")
    refused(make_bin(tmp_path / "b", made | {"score.weight": ONE["weight"]}), "'score.weight' has no place")
    refused(make_bin(tmp_path / "c", made | {EXPERT: ONE["weight"]}), rf"'{EXPERT}' has shape \[2, 3\]")
    refused(make_bin(tmp_path / "d", made | {EXPERT: np.ones((128, 256), np.int64)}), f"'{EXPERT}' has dtype I64")
    source = make_bin(tmp_path / "e", made, shards=2)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "model-00002-of"))
    refused(source, "which does not have it")

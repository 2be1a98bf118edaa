"""GGUF files that must be refused: one line that names what is wrong, and nothing left behind."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_mixtral.cli.app import app
from mlx_mixtral.errors import CheckpointError, ConfigError, InvalidRequestError, MixtralError
from mlx_mixtral_convert import convert
from mlx_mixtral_convert.sources.gguf.header import read_header
from mlx_mixtral_convert.sources.storage.local import LocalStorage
from tests.convert.gguf_writer import renamed, write_gguf
from tests.convert.support import CONFIG, dense_config, weights
from tests.fuzz.gguf_file import ARRAY, STRING, Key, tiny


def made(path: Path, edit: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> Path:
    tensors = renamed(weights(CONFIG), CONFIG, merged=options.pop("merged", True))
    if edit is not None:
        edit(tensors)
    write_gguf(path, CONFIG, tensors, options.pop("kind", "Q8_0"), **options)
    return path


def refused(source: Path, error: type[MixtralError], match: str, **options: Any) -> None:
    around = sorted(source.parent.iterdir())
    for exact in (False, True):
        with pytest.raises(error, match=match) as caught:
            convert(source, source.parent / "out", exact=exact, **options)
        assert "\n" not in str(caught.value)
        assert sorted(source.parent.iterdir()) == around


def put(path: Path, at: int, data: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)
    return path


def test_another_architecture(tmp_path: Path) -> None:
    refused(made(tmp_path / "m.gguf", architecture="falcon"), ConfigError, "holds a 'falcon' model")


@pytest.mark.parametrize(("version", "match"), [(1, "version 1; versions 2 and 3"), (99, "version 99")])
def test_another_version(tmp_path: Path, version: int, match: str) -> None:
    refused(put(made(tmp_path / "m.gguf"), 4, struct.pack("<I", version)), CheckpointError, match)


def test_the_other_byte_order(tmp_path: Path) -> None:
    refused(put(made(tmp_path / "m.gguf"), 4, struct.pack(">I", 3)), CheckpointError, "big-endian")


@pytest.mark.parametrize("share", [0.0005, 0.005, 0.02, 0.5, 0.999])
def test_truncated_anywhere(tmp_path: Path, share: float) -> None:
    path = made(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: max(9, int(len(data) * share))])
    refused(path, CheckpointError, "is truncated|more than its .* bytes can hold")


@pytest.mark.parametrize("count", [2**20, 2**40, 2**64 - 1])
@pytest.mark.parametrize("at", [8, 16])
def test_absurd_counts_are_refused(tmp_path: Path, at: int, count: int) -> None:
    refused(
        put(made(tmp_path / "m.gguf"), at, struct.pack("<Q", count)), CheckpointError, "more than its .* bytes can hold"
    )


@pytest.mark.parametrize("length", [2**20, 2**63])
def test_absurd_lengths_are_refused(tmp_path: Path, length: int) -> None:
    refused(put(made(tmp_path / "m.gguf"), 24, struct.pack("<Q", length)), CheckpointError, "are read")


def test_an_absurd_array_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "m.gguf", keys=lambda w: w.add_token_list(["marker"] * 3))
    at = path.read_bytes().index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    refused(put(path, at, struct.pack("<Q", 2**50)), CheckpointError, "says it has 1125899906842624 values")


def edited_shape(path: Path, name: bytes, shape: list[int]) -> Path:
    at = path.read_bytes().index(name) + len(name) + 4
    return put(path, at, struct.pack(f"<{len(shape)}Q", *shape))


@pytest.mark.parametrize(("shape", "match"), [
    ([2**40, 2**40], "which is not possible"), ([100, 64], "not whole Q8_0 blocks"), ([2**30, 64], "is truncated"),
    ([0, 64], "which is not possible"),
])  # fmt: skip
def test_absurd_shapes(tmp_path: Path, shape: list[int], match: str) -> None:
    refused(edited_shape(made(tmp_path / "m.gguf"), b"token_embd.weight", shape), CheckpointError, match)


def test_an_unknown_type_of_tensor(tmp_path: Path) -> None:
    path = made(tmp_path / "m.gguf")
    at = path.read_bytes().index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    refused(put(path, at, struct.pack("<I", 31)), CheckpointError, "'token_embd.weight' in type 31")


def test_not_gguf_at_all(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGML" + bytes(100))
    refused(tmp_path / "m.gguf", CheckpointError, "not a checkpoint that can be converted")
    refused(tmp_path / "m.gguf", CheckpointError, "does not begin with 'GGUF'", kind="gguf")


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.1.ffn_gate_inp.weight", "blk.0.attn_norm.weight", "output_norm.weight"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    refused(made(tmp_path / "m.gguf", drop(name)), CheckpointError, f"tensor '{name}' is missing")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    path = made(tmp_path / "m.gguf", drop("blk.1.ffn_down.2.weight"), merged=False)
    refused(path, CheckpointError, r"'blk\.1\.ffn_down\.2\.weight' is missing")


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["blk.0.attn_q_norm.weight"] = np.ones(128, np.float32)

    refused(made(tmp_path / "m.gguf", add), CheckpointError, r"'blk\.0\.attn_q_norm\.weight' has no place")


def test_git_lfs_pointers_are_named_as_that(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n")
    for place, kind in ((folder, "auto"), (folder / "m.gguf", "auto"), (folder / "m.gguf", "gguf")):
        with pytest.raises(CheckpointError, match=r"m\.gguf:? is a git-lfs pointer.*run git lfs pull"):
            convert(place, tmp_path / "out", kind=kind)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_k.weight"][:32]

    refused(
        made(tmp_path / "m.gguf", cut), CheckpointError, r"shape \[32, 128\]; the configuration calls for \[64, 128\]"
    )


@pytest.mark.parametrize(("keys", "match"), [
    (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope.scaling.type = 'longrope'"),
    (lambda w: w.add_uint32("llama.attention.value_length", 16), "value_length is 16"),
    (lambda w: w.add_float32("llama.logit_scale", 2.0), r"llama.logit_scale'? = 2.0 changes the computation"),
    (lambda w: w.add_type("adapter"), "holds a 'adapter'"),
    (lambda w: w.add_custom_alignment(0), "general.alignment 0"),
])  # fmt: skip
def test_keys_that_change_the_computation_are_named(tmp_path: Path, keys: Any, match: str) -> None:
    if "alignment" in match:
        path = made(tmp_path / "m.gguf", keys=lambda w: w.add_uint32("general.alignment", 64))
        at = path.read_bytes().index(b"general.alignment") + len("general.alignment") + 4
        refused(put(path, at, struct.pack("<I", 0)), CheckpointError, match)
        return
    refused(made(tmp_path / "m.gguf", keys=keys), ConfigError, match)


def test_rope_scaling_is_passed_on(tmp_path: Path) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    from mlx_mixtral_convert.sources import open_source

    with open_source(made(tmp_path / "m.gguf", keys=keys)) as source:
        rope = source.config.rope
    assert (rope.kind, rope.original, dict(rope.parameters or {})) == ("yarn", 16, {"factor": 4.0})


def test_the_rope_base_of_a_file_that_names_none(tmp_path: Path) -> None:
    from mlx_mixtral_convert.sources import open_source

    for name, config, theta in (("a", CONFIG, 1e6), ("b", CONFIG | dense_config("llama"), 1e4)):
        path = tmp_path / f"{name}.gguf"
        write_gguf(path, config, renamed(weights(config), config))
        raw = path.read_bytes().replace(b"llama.rope.freq_base", b"other.rope.freq_base")
        path.write_bytes(raw)
        with open_source(path) as source:
            assert source.config.rope.theta == theta


def split(folder: Path) -> list[Path]:
    folder.mkdir()
    made(folder / "m.gguf", split_tensors=7)
    return sorted(folder.iterdir())


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    files = split(tmp_path / "s")
    files[1].unlink()
    for source in (tmp_path / "s", files[0], files[2]):
        refused(source, CheckpointError, f"{files[1].name} is missing; it is one of the {len(files)} files")


def test_a_part_alone_under_another_name(tmp_path: Path) -> None:
    files = split(tmp_path / "s")
    files[0].rename(tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", CheckpointError, f"is one of {len(files)} files of a model, but there are 1")


def test_parts_that_were_exchanged(tmp_path: Path) -> None:
    files = split(tmp_path / "s")
    files[1].rename(tmp_path / "x")
    files[2].rename(files[1])
    (tmp_path / "x").rename(files[2])
    refused(tmp_path / "s", CheckpointError, "says it is part 3, but its name says 2")


def test_two_models_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in "ab":
        made(tmp_path / "two" / f"{name}.gguf")
    refused(tmp_path / "two", CheckpointError, r"holds 2 GGUF models \(a\.gguf, b\.gguf\); name the file")


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    path = put(made(tmp_path / "m.gguf"), 4, struct.pack("<I", 1))
    result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out"), "--exact", "--kind", "gguf"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "is a GGUF file of version 1" in line
    both = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out"), "--exact", "--bits", "4"])
    assert both.exit_code == 2
    with pytest.raises(InvalidRequestError, match="kind 'ggml' is unknown"):
        convert(path, tmp_path / "out", kind="ggml")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_a_scale_that_is_not_finite_is_named(tmp_path: Path, kind: str) -> None:
    path = made(tmp_path / "m.gguf", kind=kind)
    tensor = read_header(path, LocalStorage(path)).tensors["blk.1.attn_v.weight"]
    put(path, tensor.offset, struct.pack("<e", np.nan))
    refused(path, CheckpointError, r"tensor 'blk\.1\.attn_v\.weight' holds NaN or infinity")


def _moved(path: Path, moves: dict[int, int]) -> Path:
    """A file whose tensors begin elsewhere: number of the tensor -> bytes it is moved by."""
    file = tiny("F16")
    at = 0
    for number, tensor in enumerate(file.tensors):
        tensor.offset = at + moves.get(number, 0)
        at += len(tensor.data) + -len(tensor.data) % 32
    path.write_bytes(file.write() + bytes(max(0, *moves.values())))
    return path


def _read_by_gguf(path: Path) -> bool:
    """Whether the ``gguf`` package's reader finds each tensor where llama.cpp's ``gguf_init_from_file`` expects it."""
    expected = 0
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        if tensor.data_offset - reader.data_offset != expected:
            return False
        expected += int(tensor.n_bytes) + -int(tensor.n_bytes) % int(reader.alignment)
    return True


@pytest.mark.parametrize(
    ("moves", "match"),
    [
        ({1: -32}, "share bytes"),
        ({3: -1}, "share bytes"),
        ({2: 32}, "32 bytes before tensor .* belong to no tensor|share bytes"),
        (dict.fromkeys(range(1, 99), 32), "32 bytes before tensor"),
        (dict.fromkeys(range(1, 99), 4096), "4096 bytes before tensor"),
        (dict.fromkeys(range(99), 64), "64 bytes before tensor"),
        (dict.fromkeys(range(1, 99), 1), "1 bytes before tensor"),
        ({5: 2**40}, "is truncated"),
        ({5: 2**63 - 2**20}, "is truncated"),
    ],
)
def test_tensors_that_share_bytes_or_leave_gaps_are_refused(tmp_path: Path, moves: dict[int, int], match: str) -> None:
    """They would convert to wrong weights: the head is not that of this data."""
    path = _moved(tmp_path / "m.gguf", {number: by for number, by in moves.items() if by < 2**20} or {0: 0})
    if max(moves.values()) >= 2**20:
        path = _far(path, moves)
    else:
        assert not _read_by_gguf(path)
    refused(path, CheckpointError, match)


def _far(path: Path, moves: dict[int, int]) -> Path:
    file = tiny("F16")
    for number, by in moves.items():
        file.tensors[number].offset = by
    path.write_bytes(file.write())
    return path


def test_tensors_where_they_belong_are_read(tmp_path: Path) -> None:
    path = _moved(tmp_path / "m.gguf", {0: 0})
    assert _read_by_gguf(path)
    convert(path, tmp_path / "out")


def test_lists_of_millions_of_strings_are_refused_unread(tmp_path: Path) -> None:
    """20 million strings fit 160 MB; the file here is sparse, and the count is believed only up to a bound."""
    file = tiny("F16")
    file.keys.insert(0, Key("tokenizer.ggml.tokens", ARRAY, [], STRING, 20_000_000))
    path = tmp_path / "m.gguf"
    path.write_bytes(file.write())
    os.truncate(path, 2**28)
    refused(path, CheckpointError, "more than 2097152 values in the lists of its head")

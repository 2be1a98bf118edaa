"""Texts: what is read from files, folders and JSONL, the domains they count for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.texts import Text, read_texts


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(path: Path, *records: object) -> Path:
    return write(path, "\n".join(json.dumps(record) for record in records) + "\n\n")


def test_a_file_counts_for_its_stem_and_is_read_to_the_byte(tmp_path: Path) -> None:
    file = write(tmp_path / "fr.txt", "\N{ZERO WIDTH NO-BREAK SPACE}Où est-ce ?\r\nLà.\n")
    assert read_texts([file]) == [Text("fr", str(file), "Où est-ce ?\r\nLà.\n")]
    assert read_texts([str(file)])[0].nbytes == len("Où est-ce ?\r\nLà.\n".encode())


def test_a_folder_gives_its_texts_in_order_of_name_and_leaves_the_rest(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.TXT", "image.png", ".hidden/d.txt", ".e.txt"):
        write(tmp_path / name, name)
    assert [(text.domain, text.text) for text in read_texts([tmp_path])] == [
        ("a", "a.md"), ("b", "b.txt"), ("c", "deep/c.TXT")
    ]  # fmt: skip


def test_a_name_before_the_path_is_the_domain_of_all_that_is_there(tmp_path: Path) -> None:
    write(tmp_path / "x" / "a.txt", "one")
    jsonl(tmp_path / "x" / "b.jsonl", {"text": "two", "domain": "mine"})
    assert [text.domain for text in read_texts([f"law={tmp_path / 'x'}"])] == ["law", "law"]
    odd = write(tmp_path / "k=v.txt", "three")
    assert [text.domain for text in read_texts([str(odd)])] == ["k=v"]


def test_jsonl_gives_a_text_a_line_with_its_own_domain(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "mix.jsonl", {"text": "one"}, {"text": "two\u2028x", "domain": "code"}, {"text": "3", "domain": 7}
    )
    assert read_texts([file]) == [
        Text("mix", f"{file}:1", "one"), Text("code", f"{file}:2", "two\u2028x"), Text("7", f"{file}:3", "3")
    ]  # fmt: skip
    other = jsonl(tmp_path / "other.jsonl", {"body": "b", "lang": "de"})
    assert read_texts([other], text_field="body", domain_field="lang") == [Text("de", f"{other}:1", "b")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\t", r"a\.txt is empty"),
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8: byte 2"),
        ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl:1 has no text under 'text' \(it has: body\)"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1 has no text under 'text' \(it has: list\)"),
        ("a.jsonl", b'{"text": ""}', r"a\.jsonl:1 is empty"),
        ("a.jsonl", b'{"text": "a\\ud800"}', r"a\.jsonl:1 holds a lone surrogate U\+D800"),
        ("a.jsonl", b'{"text": "a", "domain": ["x"]}', r"a\.jsonl:1 has a domain under 'domain' that is not a name"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named_with_its_place(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_texts([write(tmp_path / name, data)])


def test_places_without_texts_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one")
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([], "no text was given"),
        ([tmp_path / "none.txt"], r"none\.txt does not exist"),
        ([f"x={tmp_path / 'none'}"], r"none does not exist"),
        (["=a.txt"], "not NAME=PATH"),
        (["x" * 5000], "does not exist"),
        ([tmp_path / "empty"], "has no texts"),
        ([file, tmp_path], "given twice"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            read_texts(paths)  # type: ignore[arg-type]

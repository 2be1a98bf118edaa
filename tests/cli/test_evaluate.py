"""``evaluate``: the library's figures in tables and JSON, two models never in memory at once, bad input in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral import Mixtral
from mlx_mixtral.cli import subject as evaluation_subject
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.evaluation.texts import read_texts

from .conftest import Invoke, assert_one_error


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two domains, one of them in two texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "en.txt").write_text("And it came to pass in those days, that there went out a decree.\n")
    records = [{"text": "def f(x):\n    return x\n", "domain": "code"}, {"text": "And God said, Let there be light."}]
    (folder / "more.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_json_is_what_the_library_measures(invoke: Invoke, tiny: Path, model: Mixtral, texts: Path) -> None:
    result = invoke("evaluate", tiny, "--text", texts, "--window", 16, "--stride", 9, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    wanted = evaluate(model, read_texts([texts]), window=16, stride=9)
    assert found["perplexity"] == pytest.approx(wanted.overall.perplexity)
    assert found["bits_per_byte"] == pytest.approx(wanted.overall.bits_per_byte)
    assert (found["tokens"], found["bytes"]) == (wanted.overall.tokens, sum(t.nbytes for t in read_texts([texts])))
    assert list(found["domains"]) == ["en", "code", "more"]
    assert {"perplexity", "tokens", "bytes", "bits_per_byte"} <= found["domains"]["code"].keys()
    assert [Path(name).name for name in found["files"]] == ["en.txt", "more.jsonl"]
    assert "kl_mean" not in found
    assert found["tok_s"] > 0


def test_a_reference_model_is_gone_before_the_model_comes(
    invoke: Invoke, tiny: Path, quantised: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, loaded = 0, []
    load, close = evaluation_subject.Subject.load, Mixtral.close

    def counted(self: Any, options: dict[str, Any]) -> Mixtral:
        nonlocal at_once
        at_once += 1
        assert at_once == 1
        loaded.append(self.folder)
        return load(self, options)

    def closed(self: Mixtral) -> None:
        nonlocal at_once
        at_once -= 1
        close(self)

    monkeypatch.setattr(evaluation_subject.Subject, "load", counted)
    monkeypatch.setattr(Mixtral, "close", closed)
    command = ("evaluate", quantised, "--text", texts, "--json")
    direct = json.loads(invoke(*command, "--reference", tiny, "--top-k", 4096).stdout)
    assert loaded == [tiny, quantised]
    assert 0 < direct["kl_mean"] < 1
    assert 0.5 < direct["top1_agreement"] <= 1
    assert direct["perplexity_ratio"] == pytest.approx(direct["perplexity"] / direct["reference_perplexity"])
    assert direct["domains"]["en"]["kl_mean"] > 0
    assert direct["reference"] == "tiny-mixtral"
    assert len(direct["worst"]) == 5
    saved = tmp_path / "tiny.ref"
    assert invoke("evaluate", tiny, "--text", texts, "--save-reference", saved, "--top-k", 4096).exit_code == 0
    through = json.loads(invoke(*command, "--reference", saved).stdout)
    assert through["kl_mean"] == pytest.approx(direct["kl_mean"], rel=1e-5)
    kept = json.loads(
        invoke(*command, "--reference", tiny, "--save-reference", tmp_path / "8.ref", "--top-k", 8).stdout
    )
    assert kept["kl_mean"] < direct["kl_mean"]
    assert kept["top_k"] == 8
    assert (tmp_path / "8.ref").stat().st_size < saved.stat().st_size / 100


def test_tables_name_domains_errors_and_what_top_k_does(
    invoke: Invoke, tiny: Path, quantised: Path, texts: Path
) -> None:
    shown = invoke(
        "evaluate", quantised, "--text", texts, "--text", f"law={tiny / 'README.md'}", "--max-bytes", 80,
        "--reference", tiny, "--by-length", "--window", 64,
    ).stdout  # fmt: skip
    assert "tiny-4bit compared with tiny-mixtral" in shown
    for part in ("en", "code", "more", "law", "all", "mean KL", "top-1", "lower bound", "± is one standard error"):
        assert part in shown
    assert "By length of context" in shown
    assert max(map(len, shown.split("KL ")[0].splitlines())) <= 80


def test_output_is_the_json_and_the_journal_goes_when_it_is_written(
    invoke: Invoke, tiny: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "found.json"
    command = (
        "evaluate",
        tiny,
        "--text",
        texts,
        "--passkey",
        "--lengths",
        "128,150",
        "--depths",
        "0",
        "--output",
        place,
    )

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Mixtral, "generate", interrupted)
        stopped = invoke(*command)
    assert stopped.exit_code == 130
    assert "finished parts are kept in" in stopped.stderr
    journal = tmp_path / "found.json.journal"
    assert journal.exists()
    assert not place.exists()
    assert_one_error(invoke(*command, "--window", 32), "window 1024, but this one has 32", "--restart")
    with monkeypatch.context() as patched:
        patched.setattr("mlx_mixtral.evaluation.perplexity.score", interrupted)  # nothing is left to score
        done = invoke(*command, "--json")
    assert done.exit_code == 0
    found = json.loads(place.read_text())
    assert found == json.loads(done.stdout)
    assert found["passkey"]["found"] == [[0.0], [0.0]]
    assert math.isfinite(found["perplexity"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "texts"]


def test_an_interrupted_comparison_keeps_the_reference(
    invoke: Invoke, tiny: Path, quantised: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "found.json"
    command = ("evaluate", quantised, "--text", texts, "--reference", tiny, "--output", place, "--json")
    load = evaluation_subject.Subject.load
    loads: list[Path] = []

    def fails(self: Any, options: dict[str, Any]) -> Mixtral:
        loads.append(self.folder)
        if len(loads) == 2:
            raise KeyboardInterrupt
        return load(self, options)

    monkeypatch.setattr(evaluation_subject.Subject, "load", fails)
    assert invoke(*command).exit_code == 130
    assert (tmp_path / "found.json.journal.reference").exists()
    assert invoke(*command).exit_code == 0
    assert loads == [tiny, quantised, quantised]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "texts"]


def test_passkeys_are_a_heat_map(invoke: Invoke, short: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--passkey", "--lengths", "120,128", "--depths", "0,1", "--trials", 2, "--plot", tmp_path / "p.png")
    shown = invoke("evaluate", short, *arguments).stdout
    assert "Passkeys found, 0% of all" in shown
    assert "8 prompts, 2 each, seed 0" in shown
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--text", "{}/none.txt"], ["none.txt does not exist"]),
        (["--text", "x={}/short.txt"], ["short.txt of domain 'x' has 1 token"]),
        (["--text", "{}/good.txt", "--window", "2000"], ["window is 2000", "holds 1024"]),
        (["--text", "{}/good.txt", "--max-bytes", "0"], ["--max-bytes: size '0' must be more than zero"]),
        (["--text", "{}/good.txt", "--reference", "{}/good.txt"], ["good.txt is not a reference"]),
        (["--text", "{}/good.txt", "--save-reference", "{}/good.txt"], ["not a reference file"]),
        (["--text", "{}/good.txt", "--save-reference", "{}/r", "--top-k", "0"], ["--top-k is 0"]),
        (["--text", "{}/good.txt", "--output", "{}"], ["is a folder"]),
        (["--text", "{}/good.txt", "--output", "{}/none/o"], ["there is no folder"]),
        (["--text", "{}/good.txt", "--output", "{}/o", "--save-reference", "{}/o"], ["name the same file"]),
        (["--passkey", "--lengths", "1025"], ["1025 tokens", "holds 1024"]),
        (["--passkey", "--trials", "0"], ["trials is 0"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_the_model_is_loaded(
    invoke: Invoke,
    tiny: Path,
    tmp_path: Path,
    arguments: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(evaluation_subject, "load_model", never)
    (tmp_path / "good.txt").write_text("And it came to pass")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9 b")
    before = sorted(tmp_path.iterdir())
    given = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    assert_one_error(invoke("evaluate", tiny, *given), *parts)
    assert sorted(tmp_path.iterdir()) == before


def test_a_reference_with_another_vocabulary_is_refused_before_it_is_run(
    invoke: Invoke, tiny: Path, texts: Path, checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_subject, "load_model", lambda *_, **__: pytest.fail("loaded"))
    data = (checkpoint_copy / "tokenizer.model").read_bytes()
    piece = "▁the".encode()
    assert data.count(piece) > 1
    (checkpoint_copy / "tokenizer.model").write_bytes(data.replace(piece, "▁tje".encode(), 1))
    result = invoke("evaluate", tiny, "--text", texts, "--reference", checkpoint_copy)
    assert_one_error(result, "another vocabulary", "4096 tokens too, but different pieces")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text, --passkey or both"),
        (["--passkey", "--window", "8"], "--window applies only with --text"),
        (["--text", "x", "--lengths", "8"], "--lengths applies only with --passkey"),
        (["--text", "x", "--plot", "p.png"], "--plot shows"),
        (["--text", "x", "--restart"], "--restart applies only with"),
        (["--passkey", "--lengths", "a"], "not a list of numbers"),
    ],
)
def test_options_that_mean_nothing_together_are_usage_errors(
    invoke: Invoke, arguments: list[str], message: str
) -> None:
    result = invoke("evaluate", "nowhere", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())

"""``report``: the figures of the evaluations in Markdown that can be published, whole or not at all."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mixtral import load
from mlx_mixtral.cli.app import app
from mlx_mixtral.cli.report import job as report_job
from mlx_mixtral.cli.report.job import ReportJob
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.evaluation.passkey import passkey
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.evaluation.routing import analyse, record_texts
from mlx_mixtral.evaluation.routing.repeats import repeat_tables
from mlx_mixtral.evaluation.statistics import with_error
from mlx_mixtral.evaluation.texts import Text, read_texts
from tests.convert.support import dense_config, make_checkpoint
from tests.markdown import by_header, headings, tables

from .conftest import SLOW_READS, Invoke, Spawn, assert_one_error

NAME, DOMAIN = "we|ird *$x$ [4bit] <b>_`", "a|b_*c* $d$"
VERSES = "And it came to pass in those days, that there went out a decree from Caesar Augustus.\n"
CODE = "def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        return 2\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """As ``--text`` has them: two domains."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "verses").write_text(VERSES)
    (folder / "code.txt").write_text(CODE)
    return f"{DOMAIN}={folder / 'verses'}", str(folder / "code.txt")


def options(texts: tuple[str, ...]) -> list[str]:
    flags = [part for text in texts for part in ("--text", text)]
    return [*flags, "--max-bytes", "64", "--window", "16", "--lengths", "120", "--depths", "0,1"]


@pytest.fixture(scope="module")
def made(
    quantised: Path, tiny: Path, texts: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, what was printed, and the arguments of one run."""
    place = tmp_path_factory.mktemp("made")
    model = shutil.copytree(quantised, place / NAME)
    arguments = [
        "report",
        str(model),
        "--reference",
        str(tiny),
        "--output",
        str(place / "out"),
        *options(texts),
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return place / "out", json.loads(result.stdout), arguments


def markdown_of(folder: Path) -> str:
    return (folder / "README-section.md").read_text(encoding="utf-8")


def test_figures_are_those_of_the_evaluations(
    made: tuple[Path, dict[str, Any], list[str]], quantised: Path, tiny: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    folder, found, _ = made
    given = [Text(t.domain, t.name, t.text[:64]) for t in read_texts(texts)]
    with load(tiny) as model:
        evaluate(model, given, window=16, save_reference=tmp_path / "reference")
    with load(quantised) as model:
        wanted = evaluate(model, given, window=16, reference=tmp_path / "reference")
        keys = passkey(model, (120,), (0.0, 1.0))
        routing = analyse(record_texts(model, given, window=16))
    perplexity, distance = (
        rows for rows in tables(markdown_of(folder)) if rows[0][0] == "domain" and "layer 0" not in rows[0]
    )
    assert list(wanted.domains) == [DOMAIN, "code"]
    for row, other, (name, score) in zip(
        perplexity[1:], distance[1:], {**wanted.domains, "all": wanted.overall}.items(), strict=True
    ):
        assert row == [
            name,
            str(score.tokens),
            str(score.bytes),
            with_error(score.perplexity, score.perplexity_stderr),
            with_error(score.bits_per_byte, score.bits_per_byte_stderr),
        ]
        compared = score.comparison
        assert compared is not None
        assert other == [
            name,
            with_error(compared.perplexity_ratio, compared.perplexity_ratio_stderr),
            with_error(compared.kl_mean, compared.kl_stderr),
            *(f"{compared.kl[p]:.4f}" for p in ("50", "95", "99", "100")),
            f"{compared.top1_agreement:.1%}",
        ]
    evaluated = found["evaluation"]
    assert evaluated["kl_mean"] == pytest.approx(wanted.to_dict()["kl_mean"])
    assert evaluated["domains"][DOMAIN]["perplexity"] == pytest.approx(wanted.domains[DOMAIN].perplexity)
    assert found["passkey"]["found"] == [list(cells) for cells in keys.found]
    assert by_header(markdown_of(folder), "depth of the key")[0] == ["depth of the key", "120"]
    shown = [rows for rows in tables(markdown_of(folder)) if "layer 0" in rows[0]]
    assert shown == [[table.columns, *table.rows] for table in repeat_tables(routing, (0, 2, 5))]
    shares = by_header(markdown_of(folder), "layer")
    assert [row[1:9] for row in shares[1:]] == [
        [f"{share:.1%}" for share in layer] for layer in routing.overall.shares.value.tolist()
    ]


def test_the_checkpoint_is_described_as_info_and_its_conversion_have_it(
    made: tuple[Path, dict[str, Any], list[str]], quantised: Path, invoke: Invoke
) -> None:
    markdown, found = markdown_of(made[0]), made[1]
    known = json.loads(invoke("info", quantised, "--json").stdout)
    total = by_header(markdown, "part")[-1]
    assert total == ["all", "", f"{known['parameters']:,}", f"{known['bits_per_weight']:.2f}", "4.75 MB"]
    assert [row[0] for row in by_header(markdown, "part")[1:-1]] == [
        "embedding", "attention", "router", "experts", "head", "norms",
    ]  # fmt: skip
    errors = json.loads((quantised / "conversion.json").read_text())["errors"]
    worst = sorted(errors, key=lambda path: -errors[path]["relative_rms"])[:5]
    assert [row[0] for row in by_header(markdown, "tensor")[1:]] == [path.removeprefix("model.") for path in worst]
    assert "- Source: tiny-mixtral\n- Recipe: 4 bits in groups of 64; " in markdown
    assert found["checkpoint"]["conversion"]["source"]["name"] == "tiny-mixtral"


def test_names_are_text_tables_are_whole_and_plots_are_there(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, found, arguments = made
    markdown = markdown_of(folder)
    assert headings(markdown) == [
        f"Evaluation of {NAME}", "Checkpoint", "Perplexity", "Distance to tiny-mixtral", "Long context", "Routing", "Memory",
        "How this was measured",
    ]  # fmt: skip
    for rows in tables(markdown):
        assert {len(row) for row in rows} == {len(rows[0])}
    linked = [part.partition(")")[0] for part in markdown.split("](")[1:]]
    assert linked == ["plots/perplexity.png", "plots/long_context.png", "plots/routing.png"]
    for name in linked:
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert found["files"] == sorted(["README-section.md", *linked])
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == found["files"]
    assert found["command"] == shlex.join(["mlx-mixtral", *arguments])
    assert f"\n{found['command']}\n```" in markdown
    assert f"- {found['date']} UTC, with mlx-mixtral " in markdown
    assert f"sha256 of its token ids: `{report_sha(markdown)}`" in markdown
    assert VERSES[:20] not in markdown


def report_sha(markdown: str) -> str:
    digest = markdown.rpartition("token ids: `")[2].partition("`")[0]
    assert len(digest) == 64
    return digest


def test_what_is_there_is_replaced_only_when_told_and_only_if_it_is_a_report(
    invoke: Invoke, quantised: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    flags = ("report", quantised, "--output", tmp_path / "out", *options(texts), "--no-plots")
    first = invoke(*flags)
    assert first.exit_code == 0, first.stderr
    assert "out: README-section.md" in first.stdout
    assert "perplexity " in first.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["README-section.md"]
    assert "![" not in markdown_of(tmp_path / "out")
    (tmp_path / "out" / "README-section.md").write_text("earlier")
    assert_one_error(invoke(*flags), "exists", "--overwrite")
    assert markdown_of(tmp_path / "out") == "earlier"
    assert invoke(*flags, "--overwrite").exit_code == 0
    assert "## Evaluation of tiny-4bit" in markdown_of(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    assert_one_error(invoke(*flags, "--overwrite"), "notes.md", "did not write")


def test_parts_that_do_not_apply_are_left_out_with_the_reason(
    invoke: Invoke, tiny: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "dense", **dense_config(), vocab_size=4096)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, model / name)
    flags = ("report", model, "--text", texts[1], "--output", tmp_path / "out", "--no-plots", "--json")
    result = invoke(*flags)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found["left_out"]) == {"passkeys", "by length", "routing"}
    assert "has no room for filler" in found["left_out"]["passkeys"]
    assert "dense" in found["left_out"]["routing"]
    assert not {"passkey", "routing"} & set(found)
    markdown = markdown_of(tmp_path / "out")
    for reason in found["left_out"].values():
        assert reason in markdown
    # What was asked for by name is not left out in silence.
    assert_one_error(invoke(*flags[:-1], "--overwrite", "--lengths", 64), "64 tokens", "no room")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("passkey", CheckpointError("the weights are damaged")),
        ("analyse", KeyboardInterrupt()),
        ("report_files", KeyboardInterrupt()),
        ("write_folder", CheckpointError("the weights are damaged")),
    ],
)
def test_nothing_is_left_behind_by_what_ends_it_in_the_middle(
    invoke: Invoke,
    quantised: Path,
    texts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(report_job, where, fail)
    result = invoke("report", quantised, "--output", tmp_path / "out", *options(texts[1:]), "--no-plots")
    if isinstance(error, CheckpointError):
        assert_one_error(result, "the weights are damaged")
    else:
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_weights_are_read_leaves_nothing(
    spawn: Spawn, quantised: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    process = spawn(
        "report",
        quantised,
        "--output",
        tmp_path / "out",
        *options(texts),
        before=SLOW_READS,
        env={"TMPDIR": str(tmp_path)},
    )
    assert process.stderr is not None
    while (line := process.stderr.readline()) != b"reading\n":
        assert line, "it ended by itself"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == b"interrupted"
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_before_weights_are_read(
    invoke: Invoke, tiny: Path, checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mixtral.cli.subject.Subject.load", lambda *_: pytest.fail("weights were read"))
    output = ("--output", tmp_path / "out")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_one_error(invoke("report", tiny, *output, "--text", tmp_path / "none.txt"), "none.txt does not exist")
    assert_one_error(invoke("report", tmp_path / "nowhere" / "x", *output), "nowhere")
    assert_one_error(invoke("report", tiny, *output, "--window", 5000), "window is 5000", "1024")
    assert_one_error(invoke("report", tiny, *output, "--lengths", 2048), "2048", "1024")
    assert_one_error(invoke("report", tiny, "--output", tmp_path / "no" / "out"), "create it first")
    assert_one_error(invoke("report", tiny, *output, "--reference", tiny / "config.json"), "is not a reference")
    weights = checkpoint_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_one_error(invoke("report", checkpoint_copy, *output), "copy does not load", "model.safetensors")
    assert_one_error(invoke("report", tiny, *output, "--reference", tmp_path / "other"), "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_matplotlib_it_says_how_to_do_without(
    invoke: Invoke, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert_one_error(invoke("report", tiny, "--output", tmp_path / "out"), "mlx-mixtral[plots]", "--no-plots")


def test_without_text_the_bundled_one_is_used_and_named(
    invoke: Invoke, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[ReportJob] = []

    def run(self: ReportJob) -> dict[str, Any]:
        jobs.append(self)
        return {}

    monkeypatch.setattr(ReportJob, "run", run)
    monkeypatch.chdir(tmp_path)
    for flags in ((), ("--quick",)):
        assert invoke("report", tiny, "--json", *flags).exit_code == 0
    usual, quick = jobs
    assert list(usual.corpus.domains) == ["code", "de", "en", "es", "fr", "it", "math"]
    assert usual.folder == tmp_path / "tiny-mixtral-report"
    assert (usual.lengths, usual.depths, usual.max_bytes) == ((512, 1024), (0.0, 0.25, 0.5, 0.75, 1.0), 32768)
    assert (quick.lengths, quick.depths, quick.max_bytes) == ((512, 1024), (0.0, 0.5, 1.0), 4096)
    assert max(passage.text.nbytes for passage in quick.corpus.passages) == 4096
    assert usual._text().startswith("the calibration text that comes with mlx-mixtral")

"""The pages say what the code does: commands, snippets, options, paths and links in them, and figures that can be computed."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_mixtral import Mixtral, __version__, load
from mlx_mixtral.cli.app import COMMANDS, app
from mlx_mixtral.cli.info.tables import recipe_cells
from mlx_mixtral.experts.trace import chance_of_repeat
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral_convert import NAMED
from mlx_mixtral_convert.sources import KINDS
from tests.adapters.made import lora
from tests.benchmarks.residency import policy_rows
from tests.markdown import anchors, blocks_of_code, code_spans, links, tables_as_written
from tests.test_rooms import ROOMS

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "mlx_mixtral", ROOT / "convert" / "mlx_mixtral_convert", ROOT / "tests" / "benchmarks")
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(path for folder in ("mlx_mixtral", "convert", "tests") for path in (ROOT / folder).rglob("*.md")),
    ]
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
README, ARCHITECTURE = TEXTS["README.md"], TEXTS["docs/architecture.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROGRAMS = ("mlx-mixtral", "make", "python", "pip", "uv", "pipx", "curl", ".venv/bin/python", ".venv/bin/pre-commit")
# What the reader has: models and repositories in the pages, for which the bundled checkpoint stands in.
MODELS = re.compile(r'"(?:mi[sx]tral-4bit|[\w-]+/Mi[sx]tral-[\w.-]+)"')
SERVER = "http://127.0.0.1:8080"
# On a line about code that is being written: what it names may not be there yet.
TO_BE_CHECKED = "<!-- check -->"


def shown(page: str) -> list[str]:
    """Command lines of a page: behind a ``$`` in a session, in an indented block, or within a line."""
    found = []
    for language, code in blocks_of_code(TEXTS[page]):
        lines = code.replace("\\\n", " ").splitlines()
        found += [line[2:] for line in lines if line.startswith("$ ")] if language else lines
    found += code_spans(TEXTS[page])
    return [line for line in dict.fromkeys(found) if line.split(" ")[0] in PROGRAMS]


SHOWN = [(page, line) for page in TEXTS for line in shown(page)]


def test_sessions_hold_only_commands_that_are_checked() -> None:
    lines = [
        (page, line)
        for page, text in TEXTS.items()
        for language, code in blocks_of_code(text)
        for line in code.splitlines()
        if language == "console" and line.startswith("$ ") and line[2:].split(" ")[0] not in PROGRAMS
    ]
    assert not lines
    assert len(SHOWN) > 50


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=[f"{page}: {line}" for page, line in SHOWN])
def test_a_command_shown_is_one_that_exists(page: str, line: str) -> None:
    """Parsed by the real program, or looked up where it is defined; nothing is carried out."""
    program, *arguments = shlex.split(line.rstrip("…"), comments=True)
    if program == "mlx-mixtral":
        _check_ours(arguments)
    elif program == "make":
        _check_make(arguments)
    elif program in ("pip", "uv", "pipx"):
        _check_pip(arguments)
    elif program == "curl":
        # Those of docs/server.md are carried out by tests/server/test_documentation.py.
        assert page == "docs/server.md"
        assert [each for each in arguments if each.startswith(SERVER)]
    elif program.endswith("python"):
        _check_python(arguments)
    else:
        groups = [name for group in PROJECT["dependency-groups"].values() for name in group]
        assert any(re.match(rf"{Path(program).name}\b", name) for name in groups)


def _check_ours(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        assert arguments in ([], ["--help"], ["--version"])
        return
    name, *rest = arguments
    command = app.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None, f"there is no command {name}"
    if rest:  # a name alone is spoken of, not called
        command.make_context(name, rest)


def _check_make(arguments: list[str]) -> None:
    for argument in arguments:
        variable, equals, _ = argument.partition("=")
        if equals:
            assert re.search(rf"\$\({variable}\)", MAKEFILE), f"the Makefile knows no {variable}"
        else:
            assert re.search(rf"^{argument}:", MAKEFILE, re.MULTILINE), f"the Makefile has no target {argument}"


def _check_pip(arguments: list[str]) -> None:
    for extras in re.findall(r"(?:\.|mlx-mixtral)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    if "--group" in arguments:
        assert arguments[arguments.index("--group") + 1] in PROJECT["dependency-groups"]


def _check_python(arguments: list[str]) -> None:
    if arguments[:1] == ["-m"]:
        own = ROOT / f"{arguments[1].replace('.', '/')}.py"
        assert arguments[1] in ("pytest", "mlx_mixtral", "pip") or own.is_file()
        paths = [argument for argument in arguments[2:] if "/" in argument]
        assert all((ROOT / path).exists() for path in paths)
        return
    script = ROOT / arguments[0]
    assert script.is_file(), f"there is no {arguments[0]}"
    unknown = {argument for argument in arguments[1:] if argument.startswith("--")} - _options_of_script(script)
    assert not unknown


def _options_of_script(script: Path) -> set[str]:
    return set(re.findall(r"""add_argument\(\s*"(--[\w-]+)""", script.read_text(encoding="utf-8")))


@cache
def _known_options() -> set[str]:
    commands = [app.get_command(None, name) for name in COMMANDS]  # type: ignore[arg-type]
    found = {
        option
        for command in commands
        if command is not None
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    scripts = [*(ROOT / "examples").glob("*.py"), *(ROOT / "tests" / "benchmarks").glob("*.py")]
    return {"--help", "--version", *found, *(option for script in scripts for option in _options_of_script(script))}


@pytest.mark.parametrize("page", TEXTS)
def test_every_option_named_exists(page: str) -> None:
    lines = [line for line in TEXTS[page].splitlines() if TO_BE_CHECKED not in line]
    named = {re.split(r"[ =]", span)[0] for span in code_spans("\n".join(lines)) if span.startswith("--")}
    assert named <= _known_options()


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in links(TEXTS[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), target


def _is_path_of_ours(span: str) -> bool:
    if re.fullmatch(r"[\w./-]+\.(py|md|png)", span):
        return span != "README-section.md"  # what `report` writes
    return re.match(r"(mlx_mixtral|convert|docs|examples|tests)/[\w./-]*$", span) is not None


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_named_exists(page: str) -> None:
    places = (*FOLDERS, (ROOT / page).parent)
    for line in TEXTS[page].splitlines():
        paths = [span for span in code_spans(line) if _is_path_of_ours(span) and "NAME" not in span]
        missing = [path for path in paths if not any((folder / path).exists() for folder in places)]
        assert TO_BE_CHECKED in line or not missing


SNIPPETS = [
    page
    for page, text in TEXTS.items()
    if page != "docs/server.md" and any(language == "python" for language, _ in blocks_of_code(text))
]  # that page's need a server: tests/server/test_documentation.py


@pytest.mark.parametrize("page", SNIPPETS)
def test_the_snippets_of_a_page_run_one_after_another(
    page: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(re.findall(r"\./(lora-\w+)", TEXTS[page])):
        if not (tmp_path / name).exists():
            lora(tmp_path / name, tiny, seed=index, rank=2)
    names: dict[str, Any] = {}
    for language, code in blocks_of_code(TEXTS[page]):
        if language == "python":
            exec(compile(MODELS.sub(lambda _: repr(str(tiny)), code), page, "exec"), names)
            assert "print(" not in code or capsys.readouterr().out.strip()


def test_every_attribute_of_a_model_named_exists(model: Mixtral) -> None:
    named = {
        name
        for text in TEXTS.values()
        for span in code_spans(text)
        for name in re.findall(r"\bmodel\.([a-z_]+)(?![\w.]*\.(?:safetensors|py|json))", span)
        if not span.startswith(("model.layers", "tokenizer", "--"))
    } - {"embed_tokens"}
    assert {"residency", "set_memory"} <= named
    assert {name for name in named if not hasattr(model, name)} == set()


def test_every_argument_of_load_named_exists() -> None:
    calls = [span for text in TEXTS.values() for span in code_spans(text) if span.startswith("load(")]
    named = {name for call in calls for name in re.findall(r"(\w+)=", call)}
    assert len(named) > 3
    assert named <= set(inspect.signature(load).parameters)


def test_the_table_of_commands_has_each_of_them_once() -> None:
    assert sorted(re.findall(r"^\| `mlx-mixtral (\w+)", README, re.MULTILINE)) == sorted(COMMANDS)


def test_the_table_of_sizes_is_what_info_computes() -> None:
    table = next(table for table in tables_as_written(README) if "4-bit" in table[0])
    expected = []
    for name, title in (("8x7b", "Mixtral 8x7B"), ("8x22b", "Mixtral 8x22B")):
        found = json.loads(CliRunner().invoke(app, ["info", name, "--json"]).stdout)["widths"]
        assert table[0] == ["", *(f"{width['bits']}-bit" for width in found)]
        expected.append([title, *(format_bytes(width["bytes"]) for width in found)])
    assert table[1:] == expected


def test_recipes_for_macs_are_what_info_computes() -> None:
    table = next(table for table in tables_as_written(README) if "for the GPU" in table[0])
    found = {name: json.loads(CliRunner().invoke(app, ["info", name, "--json"]).stdout) for name in ("8x7b", "8x22b")}
    expected = []
    for recipe in (recipe for recipe in found["8x7b"]["recipes"] if recipe["memory_gib"] <= 64):
        memory, option, bits, loss, speeds = recipe_cells(recipe)
        usable = format_bytes(recipe["usable_bytes"])
        expected.append([memory, usable, f"`{option}`", bits, loss, speeds.replace("*", "\\*")])
    assert table[1:] == expected
    words = " ".join(README.split())
    for name, title, full in (("8x7b", "8x7B", 32768), ("8x22b", "8x22B", 65536)):
        size = format_bytes(found[name]["kv_cache"]["bytes_per_token"] * full)
        assert re.search(rf"{re.escape(size)} (of KV cache )?to {title} \({full // 1024}k", words)


def _without_numbers(line: str) -> str:
    return re.sub(r"[\d.,]+ (?:[kMG]?B|m?s)\b|\d[\d.,]*", "N", line)


def test_the_session_of_the_demo_is_what_it_prints() -> None:
    """All but the generated text, numbers, and the machine's name."""
    session = next(code for language, code in blocks_of_code(README) if language == "console")
    printed = CliRunner().invoke(app, ["demo"]).stdout.splitlines()
    before, after = session.partition("3. generate\n")[::2]
    facts = [*before[before.index("A real but small Mixtral") :].splitlines(), "3. generate"]
    known = {_without_numbers(line) for line in printed}
    assert [line for line in facts if _without_numbers(line) not in known] == []
    start = _without_numbers(after.splitlines()[-1].partition(" on ")[0])
    assert any(line.startswith(start) for line in known)


def test_the_kinds_and_recipes_listed_are_those_there_are() -> None:
    page = TEXTS["docs/converting.md"]
    (kinds,) = [table for table in tables_as_written(page) if table[0][0] == "kind"]
    assert sorted(row[0].strip("`") for row in kinds[1:]) == sorted(KINDS)
    (options,) = [table for table in tables_as_written(page) if table[0][0] == "option"]
    (recipes,) = [row[1] for row in options if row[0] == "`--recipe`"]
    assert set(code_spans(recipes)) == set(NAMED)


def test_chance_is_what_the_page_on_routing_says() -> None:
    (table,) = [table for table in tables_as_written(TEXTS["docs/evaluating.md"]) if table[0][0] == "figure"]
    values = {row[0]: row[2] for row in table}
    assert values["repeats, first or second choice"] == f"{chance_of_repeat(8, 2):.1%}"
    assert values["repeats, first choice"] == f"{chance_of_repeat(8, 1):.1%}"


def test_quality_in_short_is_quality_in_full() -> None:
    """The figures in docs/benchmarks.md are rounded ones of the table with every row."""
    (short,) = [table for table in tables_as_written(TEXTS["docs/benchmarks.md"]) if "bits per weight" in table[0]]
    measured = {
        model: {row[0]: float(row[2]) for row in table[1:] if re.fullmatch(r"[\d.]+", row[2])}
        for model, table in zip(
            ("bundled", "SmolLM2 mixture"),
            [table for table in tables_as_written(TEXTS["tests/benchmarks/quality.md"]) if "KL" in table[0]],
            strict=True,
        )
    }
    for model, bits, *figures in short[1:]:
        theirs = {
            "4.5": ("uniform 4g64", "gptq 4g64"),
            "4": ("uniform 3g32", "dynamic_quant to 4.5 of 3 and 5 bits"),
            "3.5": ("uniform 3g64", "mixed_3_4"),
        }[bits]
        text = "" if model == "bundled" else ", written"
        rows = [f"ours fit to {bits} bits, gptq{text}", *(f"mlx-lm {name}" for name in theirs)]
        for name, figure in zip(rows, figures, strict=True):
            half_a_digit = 0.5 * 10.0 ** -len(figure.partition(".")[2])
            assert float(figure) == pytest.approx(measured[model][name], abs=1.001 * half_a_digit), (model, bits, name)


def test_comparison_with_llama_cpp_follows_from_the_rows() -> None:
    """Ours at the size of a file lies between two of our rows, KL's logarithm linear in bits."""
    listed = tables_as_written(TEXTS["tests/benchmarks/quality.md"])
    all_rows = [table for table in listed if "KL" in table[0]]
    comparisons = [table for table in listed if "file: bits" in table[0]]
    for rows, compared in zip(all_rows, comparisons, strict=True):
        best: list[tuple[float, float]] = []
        for bits, kl in sorted((float(row[1]), float(row[2])) for row in rows if row[0].startswith("ours") and row[2]):
            if not best or kl < best[-1][1]:
                best.append((bits, kl))
        sizes, losses = zip(*best, strict=True)
        for name, bits, theirs, ours, ratio, _ in compared[1:]:
            assert [bits, theirs] == next(row[1:3] for row in rows if row[0] == name)
            if not sizes[0] <= float(bits) <= sizes[-1]:
                assert [ours, ratio] == ["", ""]
                continue
            expected = float(np.exp(np.interp(float(bits), sizes, np.log(losses))))
            assert float(ours) == pytest.approx(expected, rel=5e-3)
            assert float(ratio) == pytest.approx(expected / float(theirs), abs=0.0051 + 5e-3 * expected / float(theirs))


def test_hit_rates_on_a_synthetic_trace_are_what_its_benchmark_prints() -> None:
    (table,) = [table for table in tables_as_written(TEXTS["docs/experts.md"]) if table[0][0] == "policy"]
    assert [tuple(row) for row in table] == list(policy_rows())


def test_every_benchmark_is_described() -> None:
    named = set(code_spans(TEXTS["docs/benchmarks.md"]))
    text = TEXTS["docs/benchmarks.md"]
    scripts = {path.name for path in (ROOT / "tests" / "benchmarks").glob("*.py")} - {"run.py"}  # `make bench`
    assert {name for name in scripts if name not in named and f"tests/benchmarks/{name}" not in text} == set()


def test_the_rooms_are_those_of_the_rule_in_their_order() -> None:
    (rooms,) = [table for table in tables_as_written(ARCHITECTURE) if table[0][0] == "room"]
    assert tuple(row[0].strip("`") for row in rooms[1:]) == ROOMS


def test_every_step_of_a_walk_names_what_its_file_has() -> None:
    walks = [table for table in tables_as_written(ARCHITECTURE) if table[0][0] == "file"]
    assert len(walks) == 4
    absent = []
    for file, text in (row for walk in walks for row in walk[1:]):
        if TO_BE_CHECKED in text:
            continue
        source = (ROOT / file.strip("`")).read_text(encoding="utf-8")
        names = [span for span in code_spans(text) if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", span)]
        absent += [
            f"{file} has no {name}"
            for name in names
            if not all(re.search(rf"\b{word}\b", source) for word in name.split("."))
        ]
    assert absent == []


def test_pages_that_are_to_be_short_are() -> None:
    assert len(README.splitlines()) <= 150
    assert len(ARCHITECTURE.splitlines()) <= 150


def test_how_long_the_suite_takes_is_said_once() -> None:
    said = [
        page
        for page, text in TEXTS.items()
        for paragraph in text.split("\n\n")
        if re.search(r"make test\b|\bthe suite\b", paragraph) and re.search(r"\bminutes?\b", paragraph)
    ]
    assert said == ["CONTRIBUTING.md"]


def test_the_version_is_one() -> None:
    released = re.search(r"^## \[(\d[\w.]*)\]", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert released is not None
    assert PROJECT["project"]["version"] == __version__ == released[1]


@pytest.mark.parametrize("page", TEXTS)
def test_no_page_names_a_place_on_one_machine(page: str) -> None:
    assert re.findall(r"(?<![\w.>)])/(?:home|Users|root|work|tmp|var|opt|mnt)/\S*", TEXTS[page]) == []

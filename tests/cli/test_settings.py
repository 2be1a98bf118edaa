"""The file of defaults: read, checked, shown, and beaten by what is typed."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from mlx_mixtral.cli.app import COMMANDS, app
from mlx_mixtral.cli.settings import EXCLUSIVE, NEEDS, settings_path
from tests.markdown import blocks_of_code

from .conftest import Invoke

Write = Callable[[str], Path]
PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    file = tmp_path / "settings.toml"
    monkeypatch.setenv("MLX_MIXTRAL_CONFIG", str(file))

    def put(text: str) -> Path:
        file.write_text(text)
        return file

    return put


def test_it_lies_where_settings_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLX_MIXTRAL_CONFIG", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert settings_path() == tmp_path / ".config" / "mlx-mixtral" / "config.toml"
    with monkeypatch.context() as nobody:
        nobody.delenv("HOME")
        nobody.setattr("os.path.expanduser", lambda path: path)
        assert settings_path() == Path("/dev/null")
    monkeypatch.setenv("XDG_CONFIG_HOME", "~/settings")
    assert settings_path() == tmp_path / "settings" / "mlx-mixtral" / "config.toml"
    monkeypatch.setenv("MLX_MIXTRAL_CONFIG", "~/mine.toml")
    assert settings_path() == tmp_path / "mine.toml"


def test_it_gives_defaults_and_what_is_typed_wins(invoke: Invoke, write: Write, tiny: Path) -> None:
    write("[generate]\nmax-tokens = 3\njson = true\nstop-token-id = [4095]\nstats = false\nmemory = 2e9\n")

    def tokens(*options: object) -> int:
        return len(json.loads(invoke("generate", tiny, "-p", "And it came", *options).stdout)["token_ids"])

    assert (tokens(), tokens("-n", 2), tokens("--max-tokens", 4)) == (3, 2, 4)


def test_help_shows_the_default_in_force(invoke: Invoke, write: Write) -> None:
    def line(command: tuple[str, ...], flag: str) -> str:
        text = " ".join(invoke(*command).stdout.split())
        return text[text.index(f"{flag} ") :].partition(" --")[0]

    write("")
    assert "[default: 0.0]" in line(("generate", "--help"), "--temp")
    assert "[default: what this machine can give]" in line(("chat", "--help"), "--memory")
    write('[generate]\ntemperature = 0.7\n[chat]\nmemory = "12g"\nstop = ["a", "b"]\n')
    for command in (("generate", "--help"), ("help", "generate")):
        assert "[default: 0.7, from the settings file]" in line(command, "--temp")
    assert line(("chat", "--help"), "--memory").endswith("read from disk. [default: 12g, from the settings file]")
    assert "[default: a, b, from the settings file]" in line(("chat", "--help"), "--stop")
    assert "[default: what this machine can give]" in line(("generate", "--help"), "--memory")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[generate]\ntemperture = 1", "[generate] temperture is not an option of generate; did you mean temperature?"),
        ("[generate]\nmax_tokens = 1", "[generate] max_tokens is not an option of generate; did you mean max-tokens?"),
        ("[generate]\nmodel = 'x'", "[generate] model is not an option"),
        ("[generate]\ntemperature = 'hot'", '[generate] temperature is "hot"; it must be a number'),
        ("[generate]\ntemperature = true", "[generate] temperature is true; it must be a number"),
        ("[generate]\nmax-tokens = 1.5", "[generate] max-tokens is 1.5; it must be a whole number"),
        ("[generate]\njson = 1", "[generate] json is 1; it must be true or false"),
        ("[generate]\nmemory = 1.5", "[generate] memory is 1.5; it must be text in quotes"),
        ("[generate]\nstop = 'x'", '[generate] stop is "x"; it may be repeated and must be a list, such as ["x"]'),
        ("[generate]\nstop = [1]", "[generate] stop is 1; it must be text in quotes"),
        ("[generate]\ndtype = 'float8'", "[generate] dtype: 'float8' is not one of"),
        ("[generate]\nseed = 'x'", "[generate] seed: seed is 'x'; it must be an integer"),
        ("[generate]\ntemp = 1\ntemperature = 1", "[generate] temperature is set twice"),
        ("[generate.sampling]\ntemperature = 1", "[generate] sampling is not an option"),
        ("[genrate]\nx = 1", "there is no command [genrate]; did you mean generate?"),
        ("temperature = 1", "temperature is outside any table; write it under the name of a command, such as [chat]"),
        ("[generate", "is not TOML: "),
    ],
)
def test_what_is_wrong_in_it_is_one_line_with_file_and_key(invoke: Invoke, write: Write, text: str, said: str) -> None:
    file = write(text)
    result = invoke("generate", "absent", "-p", "x")
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {file}")
    assert said in line


def test_a_file_that_is_named_must_be_there(invoke: Invoke, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("generate", "absent", "-p", "x")
    assert "settings.toml cannot be read: No such file" in result.stderr
    monkeypatch.setenv("MLX_MIXTRAL_CONFIG", "/dev/null")
    assert "absent: no such folder" in invoke("generate", "absent", "-p", "x").stderr


def test_help_and_version_work_with_a_broken_file(invoke: Invoke, write: Write) -> None:
    write("[")
    for words in (["--help"], ["--version"], ["help"], ["version"]):
        assert invoke(*words).exit_code == 0


def test_info_shows_all_of_it_checked(invoke: Invoke, write: Write) -> None:
    file = write("[chat]\ntemperature = 0.5\n[evaluate]\nlengths = [64, 128]\n")
    found = json.loads(invoke("info", "--settings", "--json").stdout)
    assert found["file"] == str(file)
    assert found["settings"] == tomllib.loads(file.read_text())
    shown = [line.split() for line in invoke("info", "--settings").stdout.splitlines()]
    assert ["mlx-mixtral", "chat", "--temperature", "0.5"] in shown
    assert ["mlx-mixtral", "evaluate", "--lengths", "[64,", "128]"] in shown
    write("[chat]\ntemprature = 0.5\n")
    assert "did you mean temperature?" in invoke("info", "--settings").stderr
    write("")
    assert "sets nothing" in invoke("info", "--settings").stdout
    assert invoke("info", "8x7b", "--settings").exit_code == 2


def test_without_a_file_info_says_where_it_would_be(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_MIXTRAL_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    said = invoke("info", "--settings").stdout
    assert str(tmp_path / "mlx-mixtral" / "config.toml") in said
    assert said.startswith("no settings")


def test_lists_and_paths_are_read_as_typed_ones(
    invoke: Invoke, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_text("")
    write("[generate]\nprompt-file = '~/prompt.txt'\n[bench]\nprompt = [8, 16]\ndepth = 'none'\n")
    assert "the prompt is empty" in invoke("generate", "absent").stderr
    assert "absent: no such folder" in invoke("bench", "absent").stderr


# (the file, what is typed, what is then not said)
MEETING = [
    ('[convert]\nbits = "8"\n', ["--fit", "1GB"], "--fit chooses the bits"),
    ('[convert]\nfit = "1GB"\n', ["--bits", "4"], "--fit chooses the bits"),
    ('[convert]\nrecipe = "experts-3bit"\n', ["--bits", "4"], "--recipe already says"),
    ("[convert]\npublic = true\n", [], "give --upload"),
    ("[convert]\ncontext = 4096\n", [], "--context is for"),
    ("[convert]\nbits = 8\n", ["--to", "hf"], "does not apply"),
]


@pytest.mark.parametrize(("text", "typed", "unsaid"), MEETING)
def test_what_is_typed_meets_no_refusal_because_of_the_file(
    invoke: Invoke, write: Write, tmp_path: Path, text: str, typed: list[str], unsaid: str
) -> None:
    write(text)
    said = invoke("convert", tmp_path / "absent", tmp_path / "out", *typed).stderr
    assert unsaid not in said
    assert "no such folder" in said


def test_prompts_and_requirements_of_the_file_step_back(invoke: Invoke, write: Write) -> None:
    write('[generate]\nprompt = "x"\nlogprobs = 2\n[info]\ndisk = "5GB"\n[evaluate]\nlengths = [64]\nrestart = true\n')
    assert "absent: no such folder" in invoke("generate", "absent", "--token-ids", "1").stderr
    assert invoke("info", "8x7b").exit_code == 0
    assert "absent: no such folder" in invoke("evaluate", "absent", "--text", PAGE).stderr
    write('[chat]\njson = true\nsystem-file = "gone"\n')
    assert "absent: no such folder" in invoke("chat", "absent", "--system", "Be brief.").stderr


def test_the_rules_name_options_that_there_are() -> None:
    for name in {*EXCLUSIVE, *NEEDS}:
        command = app.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        known = {option.name for option in command.params if isinstance(option, click.Option)}
        named = {key for pair in EXCLUSIVE.get(name, ()) for part in pair for key in part}
        named |= {key for item in NEEDS.get(name, {}).items() for key in (item[0], *item[1])}
        assert named <= known, name
    assert set(EXCLUSIVE) | set(NEEDS) <= set(COMMANDS)


def test_the_example_of_the_page_is_taken(invoke: Invoke, write: Write) -> None:
    (example,) = [code for language, code in blocks_of_code(PAGE.read_text()) if language == "toml"]
    write(example)
    assert invoke("info", "--settings").exit_code == 0

"""One rule for every file a command writes: never what is of another kind, and its own kind only when that is wanted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import mlx.core as mx
import pytest

from mlx_mixtral import Mixtral
from mlx_mixtral.cli import destinations
from mlx_mixtral.cli.chat.conversation import Conversation
from mlx_mixtral.cli.chat.session import Session
from mlx_mixtral.cli.chat.settings import AnswerOptions
from mlx_mixtral.cli.destinations import FileKind, check_place
from mlx_mixtral.errors import DestinationError, InvalidRequestError
from mlx_mixtral.evaluation.routing.analysis import analyse
from mlx_mixtral.evaluation.routing.page import routing_page
from mlx_mixtral.evaluation.routing.record import RoutingRecord
from mlx_mixtral.experts.trace import published_trace

from .conftest import Invoke

mpl.use("Agg")
TRACE = published_trace(2, 4, 2, tokens=64)


def _prompt(path: Path) -> None:
    about = {"format": "mlx-mixtral-prompt", "version": "0", "model": "", "storage": ""}
    mx.save_safetensors(str(path.with_suffix(".safetensors")), {"tokens": mx.array([1])}, about)
    path.with_suffix(".safetensors").rename(path)


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _page(path: Path) -> None:
    path.write_text(routing_page(analyse(RoutingRecord.of_trace(TRACE)), [], (0,)))


def _png(path: Path) -> None:
    from matplotlib.figure import Figure

    held = io.BytesIO()
    Figure().savefig(held, format="png")
    path.write_bytes(held.getvalue())


KINDS: dict[str, Callable[[Path], object]] = {
    "PROMPT": _prompt,
    "EVALUATION": lambda path: path.write_text(json.dumps({"model": "m", "perplexity": 3.0, "domains": {}})),
    "PAGE": _page,
    "PLOT": _png,
    "TRACE": lambda path: TRACE.save(path),
    "CONVERSATION": lambda path: Conversation("Be brief.").save(path),
}
# Each is refused before anything is loaded: the model need not be there.
COMMANDS: dict[str, tuple[str, tuple[object, ...]]] = {
    "generate --save-prompt": ("PROMPT", ("generate", "MODEL", "-p", "Hi", "--save-prompt")),
    "evaluate --output": ("EVALUATION", ("evaluate", "MODEL", "--text", "T", "--output")),
    "evaluate --tasks --output": ("EVALUATION", ("evaluate", "MODEL", "--tasks", "hellaswag", "--output")),
    "evaluate --plot": ("PLOT", ("evaluate", "MODEL", "--text", "T", "--by-length", "--plot")),
    "routing --html": ("PAGE", ("routing", "MODEL", "--text", "T", "--html")),
    "routing --save-trace": ("TRACE", ("routing", "MODEL", "--text", "T", "--save-trace")),
    "routing --plot": ("PLOT", ("routing", "MODEL", "--text", "T", "--plot")),
    "bench --plot": ("PLOT", ("bench", "MODEL", "--plot")),
}


def _model(arguments: tuple[object, ...], short: Path) -> list[object]:
    text = short / "generation_config.json"
    return [short if word == "MODEL" else text if word == "T" else word for word in arguments]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_slip_of_one_letter_destroys_nothing(invoke: Invoke, short: Path, tmp_path: Path, command: str) -> None:
    """A model's configuration, weights, or another command's result in the place of the output."""
    kind, arguments = COMMANDS[command]
    file = tmp_path / "file"
    others: list[Callable[[Path], object]] = [make for name, make in KINDS.items() if name != kind]
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        others += [partial(_put, (short / name).read_bytes())]
    others += [partial(_put, data) for data in (b"", b"\x89PNG<!doctype html>years of work")]
    for make in others:
        make(file)
        before = file.read_bytes()
        for flags in ((), ("--overwrite",)):
            result = invoke(*_model(arguments, short), file, *flags)
            assert result.exit_code == 1
            assert f"{file} exists and is not" in result.stderr
            assert file.read_bytes() == before
        file.unlink()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_earlier_result_needs_to_be_given_up(invoke: Invoke, short: Path, tmp_path: Path, command: str) -> None:
    kind, arguments = COMMANDS[command]
    KINDS[kind](tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    result = invoke(*_model(arguments, short), tmp_path / "file")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.strip() == (
        f"error: {tmp_path / 'file'} exists; give another name, or use --overwrite to replace it"
    )
    assert (tmp_path / "file").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("answer", "goes_on"), [(True, True), (False, False), (None, False)])
def test_on_a_terminal_there_is_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, answer: bool | None, goes_on: bool
) -> None:
    """None: no terminal to ask on."""
    asked: list[str] = []

    def confirm(text: str, *, err: bool) -> bool:
        asked.append(text)
        return bool(answer)

    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: answer is not None, raising=False)
    monkeypatch.setattr(destinations.click, "confirm", confirm)
    found: FileKind = getattr(destinations, kind)
    assert check_place("--output", tmp_path / "file", found, overwrite=False) == tmp_path / "file"
    KINDS[kind](tmp_path / "file")
    assert check_place("--output", tmp_path / "file", found, overwrite=True) == tmp_path / "file"
    assert asked == []
    if goes_on:
        check_place("--output", tmp_path / "file", found, overwrite=False)
    else:
        with pytest.raises(DestinationError, match="--overwrite to replace it"):
            check_place("--output", tmp_path / "file", found, overwrite=False)
    assert asked == ([] if answer is None else [f"{tmp_path / 'file'} exists; replace it?"])


def test_the_library_replaces_its_own_kind_only(short_model: Mixtral, short: Path, tmp_path: Path) -> None:
    saves: dict[str, Callable[[Path], object]] = {
        "PROMPT": lambda path: short_model.save_prompt(path, [1, 2, 3]),
        "TRACE": TRACE.save,
        "RECORD": RoutingRecord.of_trace(TRACE).save,
    }
    for save in saves.values():
        place = tmp_path / "config.json"
        place.write_bytes((short / "config.json").read_bytes())
        with pytest.raises((DestinationError, InvalidRequestError), match="exists and is not"):
            save(place)
        assert place.read_bytes() == (short / "config.json").read_bytes()
        save(tmp_path / "own")
        save(tmp_path / "own")
        (tmp_path / "own").unlink()


def test_a_conversation_saved_in_this_session_is_saved_again(
    short_model: Mixtral, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(session: Session, line: str) -> str:
        session.handle(line)
        return capsys.readouterr().err

    session = Session(short_model, AnswerOptions(), Conversation("Be brief."))
    assert "saved 1 messages" in said(session, f"/save {tmp_path / 'talk'}")
    assert "saved 1 messages" in said(session, f"/save {tmp_path / 'talk'}")
    other = Session(short_model, AnswerOptions(), Conversation())
    before = (tmp_path / "talk").read_bytes()
    assert "exists; give another name, or use --overwrite" in said(other, f"/save {tmp_path / 'talk'}")
    assert (tmp_path / "talk").read_bytes() == before
    (tmp_path / "config.json").write_text('{"messages": [], "model_type": "mixtral"}')
    for flag in ("", "--overwrite "):
        assert "is not a saved conversation" in said(other, f"/save {flag}{tmp_path / 'config.json'}")
    assert "saved 0 messages" in said(other, f"/save --overwrite {tmp_path / 'talk'}")


def test_a_saved_prompt_is_read_under_both_names_of_the_option(invoke: Invoke, short: Path, tmp_path: Path) -> None:
    """--save-prompt and --from-prompt cannot be mistaken; the older name is not in the help."""
    file = tmp_path / "prompt.cache"
    made = invoke("generate", short, "--token-ids", "1,2,3", "-n", 1, "--save-prompt", file)
    assert made.exit_code == 0, made.stderr
    results = [
        json.loads(invoke("generate", short, flag, file, "--token-ids", "4", "-n", 2, "--json").stdout)["token_ids"]
        for flag in ("--from-prompt", "--saved-prompt")
    ]
    whole = invoke("generate", short, "--token-ids", "1,2,3,4", "-n", 2, "--json")
    assert results == [json.loads(whole.stdout)["token_ids"]] * 2
    both = invoke("generate", short, "--from-prompt", file, "--saved-prompt", file, "--token-ids", "4")
    assert both.exit_code == 2
    assert "--saved-prompt " not in invoke("generate", "--help").stdout


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_a_question_that_is_not_answered_is_a_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Ctrl-C and Ctrl-D reach click as these exceptions."""

    def asked(*_: object) -> str:
        raise KeyboardInterrupt if key == "\x03" else EOFError

    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", asked)
    Conversation().save(tmp_path / "talk")
    with pytest.raises(DestinationError, match="--overwrite to replace it"):
        check_place("--output", tmp_path / "talk", destinations.CONVERSATION, overwrite=False)


@pytest.mark.usefixtures("guarded_devices")
def test_a_pipe_or_a_device_takes_a_result_every_time(invoke: Invoke, short: Path) -> None:
    for _ in range(2):
        result = invoke("generate", short, "--token-ids", "1,2,3", "-n", 1, "--save-prompt", "/dev/null")
        assert result.exit_code == 0, result.stderr
    assert Path("/dev/null").is_char_device()

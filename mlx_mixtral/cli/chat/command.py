"""``mlx-mixtral chat``: talk with an instruct model, or ask it one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from mlx_mixtral.cli.chat.settings import AnswerOptions
from mlx_mixtral.cli.console import note, one_line
from mlx_mixtral.cli.constraints import ConstraintOptions
from mlx_mixtral.cli.fields import argument, group, option, takes
from mlx_mixtral.cli.given_text import given_text, prompt_file_option
from mlx_mixtral.cli.options import LoadOptions, SpeculationOptions, chat_template_option, json_flag
from mlx_mixtral.cli.several import follow_leader
from mlx_mixtral.cli.values import ModelName
from mlx_mixtral.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlx_mixtral.cli.chat.line_input import LineReader
    from mlx_mixtral.cli.chat.session import Session
    from mlx_mixtral.cli.chat.terminal_input import TerminalReader

__all__ = ["chat"]


@dataclass(frozen=True)
class ChatOptions:
    model: str = argument(type=ModelName())
    prompt: str | None = option(
        "-p, --prompt TEXT", "Ask this alone, print the answer and end; - reads standard input."
    )
    prompt_file: str | None = prompt_file_option()
    system: str | None = option("--system TEXT", "System prompt.")
    system_file: str | None = option("--system-file FILE", "Read the system prompt from a file (UTF-8).")
    answers: AnswerOptions = group(AnswerOptions)
    constraint: ConstraintOptions = group(ConstraintOptions)
    chat_template: str | None = chat_template_option()
    history: bool = option(
        "--history/--no-history", "Remember what is typed at a terminal from one chat to the next.", default=True
    )
    loading: LoadOptions = group(LoadOptions)
    speculation: SpeculationOptions = group(SpeculationOptions)
    stats: bool = option("--stats/--no-stats", "With --prompt: a line of speeds on stderr at the end.", default=True)
    as_json: bool = json_flag("With --prompt: print the answer as JSON on stdout.")


@click.command()
@takes(ChatOptions)
def chat(given: ChatOptions) -> None:
    """Talk with MODEL, a folder or a hub repository, in its own chat format.

    /help lists the commands. With --prompt one question is answered, and the exit status tells whether it was. Answers go to
    stdout, so a chat can also be scripted by piping messages in, one a line.
    """
    follow_leader(given.model, given.loading)
    is_one = given.prompt is not None or given.prompt_file is not None
    if given.as_json and not is_one:
        raise click.UsageError("--json is for one answer; add --prompt")

    from mlx_mixtral.cli.chat.conversation import Conversation
    from mlx_mixtral.cli.chat.one_answer import print_one_answer
    from mlx_mixtral.cli.chat.session import Session
    from mlx_mixtral.cli.load import load_with_speculation

    # Everything that can be refused without the model is refused before it is loaded.
    given.answers.check()
    constraint = given.constraint.spec()
    system = given_text("--system", given.system, given.system_file, reads_input=False)
    prompt = (given_text("--prompt", given.prompt, given.prompt_file) or "").strip()
    if is_one and not prompt:
        raise InvalidRequestError("the prompt is empty; give some text")
    loaded, speculation = load_with_speculation(
        given.model, given.loading, given.speculation, chat_template=given.chat_template
    )
    conversation = Conversation((system or "").strip() or None)
    session = Session(loaded.model, given.answers, conversation, speculation, constraint)
    if not is_one:
        session.check()
    if chat_note := loaded.model.tokenizer.chat_note:
        note(f"note: {chat_note}")
    if is_one:
        conversation.ask(prompt)
        print_one_answer(
            loaded,
            conversation.messages,
            given.answers,
            speculation,
            constraint,
            as_json=given.as_json,
            with_stats=given.stats,
        )
    else:
        _talk(session, given)


def _talk(session: Session, given: ChatOptions) -> None:
    from contextlib import nullcontext

    from mlx_mixtral.cli.chat.line_input import BadInputError
    from mlx_mixtral.cli.streaming import Interruptible
    from mlx_mixtral.sizes import format_bytes

    reader = _reader(session, given.history)
    session.ask = reader.confirm
    if reader.is_terminal:
        model = session.model
        used = "" if (name := model.adapters.in_use) is None else f", adapter {name}"
        note(
            f"{one_line(given.model)}: {format_bytes(model.nbytes)}, context {model.config.max_context_tokens} tokens, "
            f"format {model.tokenizer.chat_format}{used}. /help for help, Ctrl-D to leave."
        )
    # At a terminal no Ctrl-C ends the program, whenever it comes: what was said would be lost.
    with Interruptible(asks_only=True) if reader.is_terminal else nullcontext(), reader.session():
        while True:
            try:
                message = reader.read()
            except BadInputError as error:
                note(f"error: {one_line(error)}")
                continue
            except KeyboardInterrupt:
                if not reader.is_terminal:
                    raise
                note("(Ctrl-D or /exit to leave)")
                continue
            if message is None:
                if reader.is_terminal:
                    note("")
                return
            reader.wait()
            if not session.handle(message):
                return


def _reader(session: Session, with_history: bool) -> LineReader | TerminalReader:
    import sys

    from mlx_mixtral.cli.chat.line_input import LineReader

    if not sys.stdin.isatty():
        return LineReader(is_terminal=False)

    from mlx_mixtral.cli.chat.terminal_input import TerminalReader, can_edit

    if not can_edit():
        return LineReader(is_terminal=True)

    from mlx_mixtral.cli.chat.command_completion import CommandCompleter
    from mlx_mixtral.cli.chat.history import FileHistory, history_path

    place = history_path() if with_history else None
    history = None if place is None else FileHistory(place)
    completer = CommandCompleter(session.commands, {"/set": session.settings.names, "/adapter": session.adapters})
    return TerminalReader(completer, history)

"""``mlx-mixtral chat``: talk with an instruct model."""

from __future__ import annotations

from dataclasses import dataclass

import click

from mlx_mixtral.arguments import check_integer
from mlx_mixtral.cli.console import note, one_line
from mlx_mixtral.cli.constraints import ConstraintOptions
from mlx_mixtral.cli.fields import argument, group, option, takes
from mlx_mixtral.cli.options import LoadOptions, SamplingOptions, SpeculationOptions, StopOptions, chat_template_option

__all__ = ["chat"]


@dataclass(frozen=True)
class ChatOptions:
    model: str = argument()
    system: str | None = option("--system TEXT", "System prompt.")
    max_tokens: int = option("-n, --max-tokens", "Most tokens of one answer.", default=1024)
    sampling: SamplingOptions = group(SamplingOptions, temperature=0.7, top_p=0.95)
    stopping: StopOptions = group(StopOptions)
    constraint: ConstraintOptions = group(ConstraintOptions)
    chat_template: str | None = chat_template_option()
    loading: LoadOptions = group(LoadOptions)
    speculation: SpeculationOptions = group(SpeculationOptions)


@click.command()
@takes(ChatOptions)
def chat(given: ChatOptions) -> None:
    """Talk with MODEL, a folder or a hub repository, in its own chat format.

    /help lists the commands. Answers go to stdout, so a chat can be scripted by piping messages in, one a line.
    """
    from mlx_mixtral.cli.chat.session import Session
    from mlx_mixtral.cli.chat.terminal_input import BadInputError, MessageReader
    from mlx_mixtral.cli.load import load_with_speculation
    from mlx_mixtral.sizes import format_bytes

    sampling = given.sampling.params()
    check_integer("max_tokens", given.max_tokens, 1)
    given.stopping.check()
    constraint = given.constraint.spec()
    loaded, speculation = load_with_speculation(
        given.model, given.loading, given.speculation, chat_template=given.chat_template
    )
    session = Session(loaded.model, sampling, given.max_tokens, given.system, speculation, given.stopping, constraint)
    session.check()
    if chat_note := loaded.model.tokenizer.chat_note:
        note(f"note: {chat_note}")
    reader = MessageReader()
    if reader.is_terminal:
        config = loaded.model.config
        note(
            f"{one_line(given.model)}: {format_bytes(loaded.model.nbytes)}, context {config.max_context_tokens} tokens, "
            f"format {loaded.model.tokenizer.chat_format}. /help for help, Ctrl-D to leave."
        )
    while True:
        try:
            message = reader.read()
        except BadInputError as error:
            note(f"error: {one_line(error)}")
            continue
        if message is None:
            if reader.is_terminal:
                note("")
            return
        if not session.handle(message):
            return

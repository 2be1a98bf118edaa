"""``mlx-mixtral chat``: talk with an instruct model."""

from __future__ import annotations

from typing import Any

import click

from mlx_mixtral.cli.console import note, one_line
from mlx_mixtral.cli.options import check_max_tokens, loading_options, sampling_options, take_sampling
from mlx_mixtral.cli.speculation import load_with_speculation, speculation_options

__all__ = ["chat"]


@click.command(short_help="Talk with an instruct model.")
@click.argument("model")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("-n", "--max-tokens", type=int, default=1024, show_default=True, help="Most tokens of one answer.")
@sampling_options(temperature=0.7, top_p=0.95)
@loading_options
@speculation_options
def chat(model: str, system: str | None, max_tokens: int, **options: Any) -> None:
    """Talk with MODEL, a folder or a hub repository, in its own chat format.

    /help lists the commands. Answers go to stdout, so a chat can be scripted by piping messages in, one a line.
    """
    from mlx_mixtral.cli.chat.session import Session
    from mlx_mixtral.cli.chat.terminal_input import BadInputError, MessageReader
    from mlx_mixtral.sizes import format_bytes

    sampling = take_sampling(options)
    check_max_tokens(max_tokens)
    loaded, speculation = load_with_speculation(model, **options)
    session = Session(loaded.model, sampling, max_tokens, system, speculation)
    session.check()
    reader = MessageReader()
    if reader.is_terminal:
        config = loaded.model.config
        note(
            f"{one_line(model)}: {format_bytes(loaded.model.nbytes)}, context {config.max_position_embeddings} tokens, "
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

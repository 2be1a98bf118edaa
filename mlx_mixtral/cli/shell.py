"""``mlx-mixtral completion SHELL`` and ``mlx-mixtral man``: what a shell and ``man`` know of the program."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion", "man"]

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_MLX_MIXTRAL_COMPLETE"
# A fresh zsh has not loaded what registers completions.
_BEFORE = {"zsh": "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }\n"}


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what SHELL needs to complete commands, options and models; docs/command-line.md has the line for each shell."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(_BEFORE.get(shell, "") + kind(ctx.find_root().command, {}, "mlx-mixtral", _VARIABLE).source())


@click.command("man")
@click.pass_context
def man(ctx: click.Context) -> None:
    """Print the manual page, in the format of man: `mlx-mixtral man > mlx-mixtral.1`."""
    from mlx_mixtral.cli.manual import manual

    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    click.echo(manual(root), nl=False)

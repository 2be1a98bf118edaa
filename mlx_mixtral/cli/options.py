"""Options that several commands share, and what they become."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_mixtral.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlx_mixtral import SamplingParams

__all__ = ["check_max_tokens", "json_option", "loading_options", "number_list", "sampling_options", "take_sampling"]

F = TypeVar("F", bound=Callable[..., Any])
N = TypeVar("N", int, float)

DTYPES = ("auto", "float32", "float16", "bfloat16")


def number_list(
    kind: Callable[[str], N], what: str, example: str
) -> Callable[[click.Context, click.Parameter, str | None], tuple[N, ...] | None]:
    """Option callback for a list such as ``1,415,2936``; it may be empty."""

    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[N, ...] | None:
        try:
            return None if value is None else tuple(kind(part) for part in value.replace(",", " ").split())
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of {what}; write {example}", ctx, param) from None

    return parse


def parse_logit_bias(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    """Option callback for ``13=-5``, repeatable."""
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=VALUE; write 13=-5", ctx, param) from None
    return biases


def parse_seed(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Option callback: a seed out of its range is refused as any other sampling value is."""
    try:
        return None if value is None else int(value)
    except ValueError:
        raise InvalidRequestError(f"seed is {value!r}; it must be an integer") from None


def loading_options(command: F) -> F:
    """``--memory --context --dtype --revision --verify``, of the KV cache and of streaming, named as in ``load``."""
    for option in (
        click.option(
            "--prefetch",
            "--lookahead",
            "prefetch",
            type=click.Choice(("off", "on", "auto")),
            default="off",
            show_default=True,
            help="Read the next layer's experts early; auto measures whether it pays.",
        ),
        click.option(
            "--policy",
            type=click.Choice(("lru", "lfu")),
            default="lru",
            show_default=True,
            help="Which expert makes room for one that is read.",
        ),
        click.option(
            "--kv-sinks", type=int, default=4, show_default=True, help="Of --kv-size, tokens kept from the start."
        ),
        click.option(
            "--kv-size", type=int, metavar="N", help="Most tokens a token sees; bounds the KV cache.  [default: all]"
        ),
        click.option(
            "--kv-bits", type=int, metavar="4|8|16", help="Bits of the KV cache.  [default: those of the compute type]"
        ),
        click.option(
            "--prefix-cache",
            metavar="SIZE",
            help="What is kept of earlier prompts and answers; 0 keeps none.  [default: 1GB]",
        ),
        click.option("--page-cache", is_flag=True, help="Let streamed experts fill the system's page cache too."),
        click.option("--verify", is_flag=True, help="Check the files' hashes first, for a model `convert` wrote."),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub repository."),
        click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Compute type.", show_default=True),
        click.option("--context", type=int, metavar="N", help="Tokens that --memory reserves KV cache for."),
        click.option(
            "--memory",
            metavar="SIZE",
            help="Memory budget, such as 12GB; experts beyond it are read from disk.  [default: what this machine can give]",
        ),
    ):
        command = option(command)
    return command


def sampling_options(*, temperature: float, top_p: float) -> Callable[[F], F]:
    """The fields of ``SamplingParams`` as options, with a command's own defaults."""

    def decorate(command: F) -> F:
        for option in (
            click.option("--seed", callback=parse_seed, metavar="INTEGER", help="Same seed, same prompt, same text."),
            click.option(
                "--logit-bias",
                callback=parse_logit_bias,
                multiple=True,
                metavar="ID=VALUE",
                help="Added to a token's logit; repeatable.",
            ),
            click.option("--frequency-penalty", type=float, default=0.0, help="Off at 0."),
            click.option("--presence-penalty", type=float, default=0.0, help="Off at 0."),
            click.option("--repetition-penalty", type=float, default=1.0, help="Off at 1."),
            click.option("--min-p", type=float, default=0.0, help="Keep tokens this fraction as likely as the best."),
            click.option("--top-k", type=int, default=0, help="Keep the K likeliest tokens; 0 keeps all."),
            click.option("--top-p", type=float, default=top_p, show_default=True, help="Keep this much probability."),
            click.option(
                "--temperature", "-t", type=float, default=temperature, show_default=True, help="0 is greedy."
            ),
        ):
            command = option(command)
        return command

    return decorate


def take_sampling(options: dict[str, Any], logprobs: int | None = None) -> SamplingParams:
    """Take the sampling options out of ``options`` and check them, before any model is loaded."""
    from mlx_mixtral import SamplingParams

    names = (
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    )  # fmt: skip
    taken = {name: options.pop(name) for name in names}
    return SamplingParams(**taken, logit_bias=options.pop("logit_bias") or None, logprobs=logprobs)


def check_max_tokens(max_tokens: int) -> None:
    """As ``generate`` of the library does, before the model is loaded."""
    if max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {max_tokens}; it must be an integer of at least 1")


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")

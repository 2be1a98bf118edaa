"""``mlx-mixtral generate``: continue a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from mlx_mixtral.cli.console import emit_json, note
from mlx_mixtral.cli.options import (
    check_max_tokens,
    json_option,
    loading_options,
    number_list,
    sampling_options,
    take_sampling,
)
from mlx_mixtral.cli.speculation import load_with_speculation, speculation_options
from mlx_mixtral.errors import InvalidRequestError, TokenizerError

__all__ = ["generate"]


@click.command(short_help="Continue a prompt.")
@click.argument("model")
@click.option("-p", "--prompt", help="Text to continue, sent as it is; - reads standard input (UTF-8).")
@click.option(
    "--token-ids",
    callback=number_list(int, "token ids", "1,415,2936"),
    metavar="IDS",
    help="Token ids to continue instead of text: 1,415,2936.",
)
@click.option("-n", "--max-tokens", type=int, default=256, show_default=True, help="Most tokens to generate.")
@sampling_options(temperature=0.0, top_p=1.0)
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends the generation; repeatable.")
@click.option("--stop-token-id", type=int, multiple=True, metavar="ID", help="Token that ends it; repeatable.")
@click.option("--logprobs", type=int, metavar="N", help="With --json: log-probabilities, and the N likeliest tokens.")
@click.option("--save-prompt", metavar="FILE", help="Save what computing the prompt gave, for --saved-prompt.")
@click.option("--saved-prompt", metavar="FILE", help="Continue a saved prompt; --prompt comes after it.")
@loading_options
@speculation_options
@click.option("--stats/--no-stats", default=True, help="A line of speeds on stderr at the end.", show_default=True)
@json_option
def generate(
    model: str,
    prompt: str | None,
    token_ids: tuple[int, ...] | None,
    max_tokens: int,
    stop: tuple[str, ...],
    stop_token_id: tuple[int, ...],
    logprobs: int | None,
    save_prompt: str | None,
    saved_prompt: str | None,
    stats: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt with MODEL, a folder or a hub repository.

    The prompt is sent as it is, without a chat format: use `chat` to talk with an instruct model. Greedy unless
    --temperature is given.
    """
    if (prompt is None) == (token_ids is None):
        raise click.UsageError("give either --prompt or --token-ids")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are part of the JSON result; add --json")

    from mlx_mixtral.cli.streaming import Interruptible, print_stream, stats_line
    from mlx_mixtral.files import check_destination
    from mlx_mixtral.generation.stop import StopStrings
    from mlx_mixtral.runtime.prompt_cache import check_saved

    # Everything that can be refused without the model is refused before it is loaded.
    sampling = take_sampling(options, logprobs)
    check_max_tokens(max_tokens)
    StopStrings(stop)
    given: str | Sequence[int] = read_prompt(prompt) if prompt is not None else token_ids or ()
    if not given:
        raise InvalidRequestError("the prompt is empty; give some text or token ids")

    if save_prompt is not None:
        check_destination("--save-prompt", save_prompt)
    if saved_prompt is not None:
        check_saved(saved_prompt)
    loaded, speculation = load_with_speculation(model, **options)
    if saved_prompt is not None:
        before = loaded.model.load_prompt(saved_prompt)
        given = [*before, *(loaded.model.tokenizer.encode(given, bos=False) if isinstance(given, str) else given)]
    if save_prompt is not None:
        loaded.model.save_prompt(save_prompt, given)
    with Interruptible() as interrupt:
        stream = loaded.model.stream(
            given,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            stop_token_ids=stop_token_id,
            cancelled=interrupt.cancelled,
            on_prefill=interrupt.on_prefill,
            speculation=speculation,
        )
        if as_json:
            with stream:
                chunks = list(stream)
        else:
            _, chunks = print_stream(stream, show_ids=not _has_tokenizer(loaded.model))
        if interrupt.pressed:
            raise KeyboardInterrupt
    if not as_json:
        if stats:
            note(stats_line(stream.stats))
        return
    result: dict[str, Any] = {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [chunk.token_id for chunk in chunks],
        "finish_reason": chunks[-1].finish_reason,
        "stats": {**stream.stats.to_dict(), "load_s": loaded.load_s},
    }
    if logprobs is not None:
        result["logprobs"] = [
            {
                "token_id": chunk.token_id,
                "logprob": chunk.logprob,
                "top": [{"token_id": token, "logprob": value} for token, value in chunk.top_logprobs],
            }
            for chunk in chunks
        ]
    emit_json(result)


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input when it is ``-``.

    Raises:
        InvalidRequestError: standard input is not UTF-8; the message names the byte.
    """
    if prompt != "-":
        return prompt
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the prompt on standard input is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it with iconv"
        ) from None


def _has_tokenizer(model: Any) -> bool:
    try:
        return model.tokenizer is not None
    except TokenizerError:
        return False

"""``mlx-mixtral generate``: continue a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mlx_mixtral.arguments import check_integer
from mlx_mixtral.cli.constraints import ConstraintOptions
from mlx_mixtral.cli.fields import argument, group, option, takes
from mlx_mixtral.cli.given_text import given_text, prompt_file_option
from mlx_mixtral.cli.options import (
    LoadOptions,
    SamplingOptions,
    SpeculationOptions,
    StopOptions,
    chat_template_option,
    json_flag,
    number_list,
    overwrite_flag,
)
from mlx_mixtral.cli.several import follow_leader
from mlx_mixtral.cli.values import ModelName
from mlx_mixtral.errors import InvalidRequestError, TokenizerError

if TYPE_CHECKING:
    from mlx_mixtral import TextStream
    from mlx_mixtral.cli.streaming import Interruptible

__all__ = ["generate"]


@dataclass(frozen=True)
class GenerateOptions:
    model: str = argument(type=ModelName())
    prompt: str | None = option(
        "-p, --prompt", "Text to continue, without a chat format; - reads standard input (UTF-8)."
    )
    prompt_file: str | None = prompt_file_option()
    token_ids: tuple[int, ...] | None = option(
        "--token-ids IDS",
        "Token ids to continue instead of text: 1,415,2936.",
        callback=number_list(int, "token ids", "1,415,2936"),
    )
    max_tokens: int = option("-n, --max-tokens", "Most tokens to generate.", default=256)
    sampling: SamplingOptions = group(SamplingOptions)
    stopping: StopOptions = group(StopOptions)
    constraint: ConstraintOptions = group(ConstraintOptions)
    special: bool = option(
        "--special/--no-special",
        "Read control tokens that the prompt spells, such as <|im_start|>, as these tokens.",
        default=True,
    )
    chat_template: str | None = chat_template_option()
    logprobs: int | None = option("--logprobs N", "With --json: log-probabilities, and the N likeliest tokens.")
    save_prompt: str | None = option("--save-prompt FILE", "Save what computing the prompt gave, for --from-prompt.")
    from_prompt: str | None = option(
        "--from-prompt FILE", "Continue a saved prompt, as it is or with --prompt after it."
    )
    saved_prompt: str | None = option("--saved-prompt FILE", "The older name of --from-prompt.", hidden=True)
    overwrite: bool = overwrite_flag("the --save-prompt")
    loading: LoadOptions = group(LoadOptions)
    speculation: SpeculationOptions = group(SpeculationOptions)
    stats: bool = option("--stats/--no-stats", "A line of speeds on stderr at the end.", default=True)
    as_json: bool = json_flag()


@click.command()
@takes(GenerateOptions)
def generate(given: GenerateOptions) -> None:
    """Continue a prompt with MODEL, a folder or a hub repository.

    The prompt is sent as it is, without a chat format: use `chat` to talk with an instruct model. Control tokens it spells
    become these tokens; --no-special keeps them text. Greedy unless --temperature is given.
    """
    follow_leader(given.model, given.loading)
    if given.from_prompt is not None and given.saved_prompt is not None:
        raise click.UsageError("--saved-prompt is the older name of --from-prompt; give one of them")
    saved = given.saved_prompt if given.from_prompt is None else given.from_prompt
    texts = sum(text is not None for text in (given.prompt, given.prompt_file, given.token_ids))
    if texts > 1 or (texts == 0 and saved is None):
        raise click.UsageError("give one of --prompt, --prompt-file and --token-ids, or continue a --from-prompt")
    if given.logprobs is not None and not given.as_json:
        raise click.UsageError("--logprobs are part of the JSON result; add --json")

    from mlx_mixtral.cli.adapters import adapter_used
    from mlx_mixtral.cli.answer import print_answer
    from mlx_mixtral.cli.destinations import PROMPT, check_place
    from mlx_mixtral.cli.load import load_with_speculation
    from mlx_mixtral.runtime.saved_prompt import check_saved

    # Everything that can be refused without the model is refused before it is loaded.
    sampling = given.sampling.params(given.logprobs)
    check_integer("max_tokens", given.max_tokens, 1)
    given.stopping.check()
    constraint = given.constraint.spec()
    text = given_text("--prompt", given.prompt, given.prompt_file)
    prompt: str | Sequence[int] = (given.token_ids or ()) if text is None else text
    if texts and not prompt:
        raise InvalidRequestError("the prompt is empty; give some text or token ids")
    if given.save_prompt is not None:
        check_place("--save-prompt", given.save_prompt, PROMPT, overwrite=given.overwrite)
    if saved is not None:
        check_saved(saved, has_adapter=bool(given.loading.adapters))

    loaded, speculation = load_with_speculation(
        given.model, given.loading, given.speculation, chat_template=given.chat_template
    )
    model = loaded.model
    special_tokens = None
    if saved is not None:
        before = model.load_prompt(saved)
        if isinstance(prompt, str):
            special_tokens = len(model.tokenizer.markers.sequence(prompt)) if given.special else 0
            prompt = model.tokenizer.encode(prompt, bos=False, special=given.special)
        prompt = [*before, *prompt]
    if given.save_prompt is not None:
        model.save_prompt(given.save_prompt, prompt, special=given.special)

    def begin(interrupt: Interruptible) -> TextStream:
        stream = model.stream(
            prompt,
            special=given.special,
            max_tokens=given.max_tokens,
            sampling=sampling,
            stop=given.stopping.stop,
            stop_token_ids=given.stopping.stop_token_ids,
            cancelled=interrupt.cancelled,
            on_prefill=interrupt.on_prefill,
            speculation=speculation,
            constraint=constraint,
        )
        if special_tokens is not None:
            stream.stats.prompt_special_tokens = special_tokens
        return stream

    print_answer(
        begin,
        load_s=loaded.load_s,
        adapter=adapter_used(model),
        as_json=given.as_json,
        with_stats=given.stats,
        with_logprobs=given.logprobs is not None,
        show_ids=not _has_tokenizer(model),
    )


def _has_tokenizer(model: Any) -> bool:
    try:
        return model.tokenizer is not None
    except TokenizerError:
        return False

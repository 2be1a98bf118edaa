"""Options that several commands share, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_mixtral.cli.fields import flag, group, option
from mlx_mixtral.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlx_mixtral import SamplingParams
    from mlx_mixtral.config.overrides import ConfigOverrides

__all__ = [
    "LoadOptions",
    "OverrideOptions",
    "RecordOptions",
    "SamplingOptions",
    "SpeculationOptions",
    "StopOptions",
    "chat_template_option",
    "device_option",
    "json_flag",
    "number_list",
    "overwrite_flag",
    "revision_option",
]

N = TypeVar("N", int, float)

DEVICES = ("gpu", "cpu")
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


def parse_breakers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    r"""Option callback: ``\n`` and ``\t`` may be typed."""
    return tuple(value.replace(r"\n", "\n").replace(r"\t", "\t") for value in values)


def parse_seed(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Option callback: a seed out of its range is refused as any other sampling value is."""
    try:
        return None if value is None else int(value)
    except ValueError:
        raise InvalidRequestError(f"seed is {value!r}; it must be an integer") from None


def set_device(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Option callback: the device of the whole process, mlx-lm's too, before anything is loaded or even imported."""
    if value is not None:
        from mlx_mixtral.machine.device import set_default_device

        set_default_device(value)
    return value


def device_option() -> Any:
    return option(
        "--device",
        "Where to compute.  [default: the GPU, if there is one]",
        type=click.Choice(DEVICES),
        callback=set_device,
    )


def json_flag(help: str = "Print the result as JSON on stdout.") -> Any:
    return flag("--json", help)


def check_chat_template(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Option callback: refused before any model is loaded."""
    if value is not None:
        from mlx_mixtral.tokenizer.chat.choice import given_template

        given_template(value)
    return value


def chat_template_option() -> Any:
    return option(
        "--chat-template FILE|NAME",
        "Chat format in place of the model's own: a file of jinja, or chatml, llama-3, mistral-v1, …",
        callback=check_chat_template,
    )


def overwrite_flag(files: str) -> Any:
    return flag("--overwrite", f"Replace {files} of an earlier run.")


def revision_option() -> Any:
    return option("--revision REV", "Branch, tag or commit of a hub repository.")


def parse_rope_scaling(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Option callback: refused before anything is downloaded."""
    if value is not None:
        from mlx_mixtral.config.overrides import ConfigOverrides

        ConfigOverrides(rope_scaling=value)
    return value


@dataclass(frozen=True)
class OverrideOptions:
    """What is computed otherwise than the checkpoint says, named as the fields of ``ConfigOverrides``."""

    experts_per_token: int | None = option(
        "--experts-per-token N", "Experts each token goes through.  [default: the model's own]"
    )
    rope_scaling: str | None = option(
        "--rope-scaling KIND=FACTOR",
        "Stretch the context: yarn, linear or dynamic, such as yarn=4.",
        callback=parse_rope_scaling,
    )
    rope_theta: float | None = option("--rope-theta X", "Base of the rotary embedding.  [default: the model's own]")

    @property
    def checked(self) -> ConfigOverrides:
        """As the library takes them; raises InvalidRequestError for values that are none."""
        from mlx_mixtral.config.overrides import ConfigOverrides

        return ConfigOverrides(**vars(self))


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, named as the arguments of ``load``."""

    memory: str | int | None = option(
        "--memory SIZE",
        "Memory budget, such as 12GB; experts beyond it are read from disk.  [default: what this machine can give]",
    )
    context: int | None = option("--context N", "Tokens that --memory reserves KV cache for.")
    dtype: str = option("--dtype", "Compute type.", type=click.Choice(DTYPES), default="auto")
    device: str | None = device_option()
    revision: str | None = revision_option()
    verify: bool = flag("--verify", "Check the files' hashes first, for a model `convert` wrote.")
    page_cache: bool = flag("--page-cache", "Let streamed experts fill the system's page cache too.")
    prefix_cache: str | None = option(
        "--prefix-cache SIZE", "What is kept of earlier prompts and answers; 0 keeps none.  [default: 1GB]"
    )
    tokenizer: str | None = option(
        "--tokenizer",
        "Which file to read text with, where both are there.  [default: tokenizer.model]",
        type=click.Choice(("model", "json")),
    )
    kv_bits: int | None = option("--kv-bits 4|8|16", "Bits of the KV cache.  [default: those of the compute type]")
    kv_size: int | None = option("--kv-size N", "Most tokens a token sees; bounds the KV cache.  [default: all]")
    kv_sinks: int = option("--kv-sinks", "Of --kv-size, tokens kept from the start.", default=4)
    policy: str = option(
        "--policy", "Which expert makes room for one that is read.", type=click.Choice(("lru", "lfu")), default="lru"
    )
    prefetch: str = option(
        "--prefetch, --lookahead",
        "Read the next layer's experts early; auto measures whether it pays.",
        type=click.Choice(("off", "on", "auto")),
        default="off",
    )
    overrides: OverrideOptions = group(OverrideOptions)

    def arguments(self) -> dict[str, Any]:
        """As ``load`` takes them, of a folder and for the device in force."""
        left_out = ("device", "revision", "overrides")
        return {name: value for name, value in vars(self).items() if name not in left_out} | vars(self.overrides)

    def identity(self) -> dict[str, Any]:
        """What changes the numbers a model gives."""
        found = {name: value for name, value in vars(self).items() if name == "dtype" or name.startswith("kv_")}
        found |= {name: value for name, value in vars(self.overrides).items() if value is not None}
        return found | {name: value for name in ("device", "tokenizer") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class SamplingOptions:
    """The fields of ``SamplingParams``."""

    temperature: float = option("--temperature, --temp, -t", "0 is greedy.", default=0.0)
    top_p: float = option("--top-p", "Keep this much probability.", default=1.0)
    top_k: int = option("--top-k", "Keep the K likeliest tokens; 0 keeps all.", default=0, show_default=False)
    min_p: float = option(
        "--min-p", "Keep tokens this fraction as likely as the best.", default=0.0, show_default=False
    )
    repetition_penalty: float = option("--repetition-penalty", "Off at 1.", default=1.0, show_default=False)
    presence_penalty: float = option("--presence-penalty", "Off at 0.", default=0.0, show_default=False)
    frequency_penalty: float = option("--frequency-penalty", "Off at 0.", default=0.0, show_default=False)
    logit_bias: Mapping[int, float] = option(
        "--logit-bias ID=VALUE", "Added to a token's logit; repeatable.", callback=parse_logit_bias, multiple=True
    )
    xtc_probability: float = option(
        "--xtc-probability", "How often the likeliest tokens are left out (XTC).", default=0.0, show_default=False
    )
    xtc_threshold: float = option("--xtc-threshold", "Of XTC: how likely those are, but for the last.", default=0.1)
    dry_multiplier: float = option(
        "--dry-multiplier", "Penalty on repeating a sequence (DRY); off at 0.", default=0.0, show_default=False
    )
    dry_base: float = option("--dry-base", "Of DRY: times as much for each token repeated.", default=1.75)
    dry_allowed_length: int = option("--dry-allowed-length", "Of DRY: tokens that may be repeated.", default=2)
    dry_penalty_last_n: int = option("--dry-penalty-last-n", "Of DRY: tokens looked at; -1 is all.", default=-1)
    dry_sequence_breakers: tuple[str, ...] = option(
        "--dry-sequence-breaker TEXT",
        'Of DRY: no repetition is followed past it; repeatable, none for none.  [default: line break, colon, ", *]',
        callback=parse_breakers,
        multiple=True,
    )
    seed: int | None = option("--seed INTEGER", "Same seed, same prompt, same text.", type=str, callback=parse_seed)

    def params(self, logprobs: int | None = None) -> SamplingParams:
        """Checked, before any model is loaded."""
        from mlx_mixtral import SamplingParams

        given = vars(self) | {"logit_bias": self.logit_bias or None}
        if not given["dry_sequence_breakers"]:
            del given["dry_sequence_breakers"]
        elif given["dry_sequence_breakers"] == ("none",):
            given["dry_sequence_breakers"] = ()
        return SamplingParams(**given, logprobs=logprobs)


@dataclass(frozen=True)
class StopOptions:
    """What ends a generation beside the checkpoint's own end, named as in ``GenerationOptions``."""

    stop: tuple[str, ...] = option(
        "--stop TEXT",
        "Text that ends the generation, or a control token as it is spelled; repeatable.",
        multiple=True,
    )
    stop_token_ids: tuple[int, ...] = option(
        "--stop-token-id ID", "Token that ends it; repeatable.", type=int, multiple=True
    )

    def check(self) -> None:
        """Raise InvalidRequestError for what can be refused before any model is loaded."""
        from mlx_mixtral.generation.stop import StopStrings

        StopStrings(self.stop)


@dataclass(frozen=True)
class SpeculationOptions:
    """How several tokens are verified at once, if at all."""

    speculate: str | None = option(
        "--speculate",
        "Verify several tokens at once, where the text repeats what was said before; same text, sooner.",
        type=click.Choice(("lookup",)),
    )
    draft: str | None = option(
        "--draft MODEL",
        "Verify what this smaller model with the same vocabulary writes ahead; its memory is part of --memory.",
    )


@dataclass(frozen=True)
class RecordOptions:
    """Where a line of JSONL has its text and its domain."""

    text_field: str = option("--text-field KEY", "Key of the text in JSONL.", default="text")
    domain_field: str = option("--domain-field KEY", "Key of its domain.", default="domain")

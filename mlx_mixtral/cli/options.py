"""Options that several commands share, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.cli.fields import flag, group, option
from mlx_mixtral.cli.values import check_adapters
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
        "Chat format: a Jinja file, or chatml, llama-3, mistral-v1, …  [default: the model's own]",
        callback=check_chat_template,
    )


def overwrite_flag(files: str) -> Any:
    return flag("--overwrite", f"Replace {files} of an earlier run.")


def revision_option() -> Any:
    return option("--revision REV", "Branch, tag or commit of a hub repository.  [default: main]")


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
        "--experts-per-token N", "Experts that process each token.  [default: the model's own]"
    )
    rope_scaling: str | None = option(
        "--rope-scaling KIND=FACTOR",
        "Extend the context by yarn, linear or dynamic scaling, such as yarn=4.  [default: the model's own]",
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
    context: int | None = option(
        "--context N",
        "Context length, in tokens, for which --memory reserves KV cache.  [default: 4096, or the model's own if shorter]",
    )
    adapters: tuple[AdapterSource, ...] = option(
        "--adapter [NAME=]PATH[=SCALE]",
        "A LoRA adapter of PEFT or mlx-lm to compute with: a folder or a hub repository, a name for it, and what to multiply "
        "it by. chat and serve take several: chat begins with the first, requests to serve name theirs.",
        callback=check_adapters,
        multiple=True,
    )
    dtype: str = option("--dtype", "Compute type.", type=click.Choice(DTYPES), default="auto")
    device: str | None = device_option()
    revision: str | None = revision_option()
    verify: bool = flag("--verify", "First check the hashes of a folder that `convert` wrote.")
    page_cache: bool = flag("--page-cache", "Read streamed experts through the system's page cache.")
    prefix_cache: str | None = option(
        "--prefix-cache SIZE",
        "Memory for keys and values of earlier prompts, to be reused; 0 keeps none.  "
        "[default: 1GB; with serve a quarter of what is free]",
    )
    tokenizer: str | None = option(
        "--tokenizer",
        "Which tokenizer file to use if there are both.  [default: model]",
        type=click.Choice(("model", "json")),
    )
    kv_bits: int | None = option("--kv-bits 4|8|16", "Bits per value in the KV cache.  [default: those of --dtype]")
    kv_size: int | None = option(
        "--kv-size N", "Attend to the last N tokens only, which bounds the KV cache.  [default: all]"
    )
    kv_sinks: int = option("--kv-sinks", "How many of the --kv-size tokens are the first ones of the text.", default=4)
    policy: str = option(
        "--policy",
        "Which expert is evicted when another is read: the least recently or least frequently used.",
        type=click.Choice(("lru", "lfu")),
        default="lru",
    )
    prefetch: str = option(
        "--prefetch, --lookahead",
        "Read the next layer's likely experts early; auto measures whether that helps.",
        type=click.Choice(("off", "on", "auto")),
        default="off",
    )
    split: str = option(
        "--split",
        "On several machines: cut experts, or give each machine whole layers; auto measures the link.",
        type=click.Choice(("auto", "experts", "layers")),
        default="auto",
    )
    shares: tuple[float, ...] | None = option(
        "--shares LIST",
        "Relative sizes of the machines' parts, such as 2,1.  [default: by their memory]",
        callback=number_list(float, "numbers", "2,1"),
    )
    peer_timeout_s: float = option(
        "--peer-timeout SECONDS", "How long another machine may take for its part of the work.", default=60.0
    )
    overrides: OverrideOptions = group(OverrideOptions)

    def arguments(self) -> dict[str, Any]:
        """As ``load`` takes them, of a folder and for the device in force; a list of adapters, none of them in use yet."""
        left_out = ("device", "revision", "adapters", "overrides")
        given = {name: value for name, value in vars(self).items() if name not in left_out} | vars(self.overrides)
        return given | {"adapter": list(self.adapters)}

    def identity(self) -> dict[str, Any]:
        """What changes the numbers a model gives, adapters left out."""
        found = {name: value for name, value in vars(self).items() if name == "dtype" or name.startswith("kv_")}
        found |= {name: value for name, value in vars(self.overrides).items() if value is not None}
        return found | {name: value for name in ("device", "tokenizer") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class SamplingOptions:
    """The fields of ``SamplingParams``."""

    temperature: float = option("--temperature, --temp, -t", "0 is greedy.", default=0.0)
    top_p: float = option("--top-p", "Sample from the likeliest tokens that add up to this probability.", default=1.0)
    top_k: int = option("--top-k", "Sample from the K likeliest tokens; 0 is no limit.", default=0)
    min_p: float = option("--min-p", "Drop tokens less likely than this fraction of the likeliest.", default=0.0)
    repetition_penalty: float = option(
        "--repetition-penalty", "Divide the logits of earlier tokens; 1 is off.", default=1.0
    )
    presence_penalty: float = option("--presence-penalty", "Lower the logits of earlier tokens; 0 is off.", default=0.0)
    frequency_penalty: float = option(
        "--frequency-penalty", "The same for each time a token occurred; 0 is off.", default=0.0
    )
    logit_bias: Mapping[int, float] = option(
        "--logit-bias ID=VALUE",
        "Add VALUE to the logit of token ID; repeatable.",
        callback=parse_logit_bias,
        multiple=True,
    )
    xtc_probability: float = option(
        "--xtc-probability", "XTC: how often the likeliest tokens are left out; 0 is off.", default=0.0
    )
    xtc_threshold: float = option(
        "--xtc-threshold", "XTC: tokens likelier than this are left out, except the last of them.", default=0.1
    )
    dry_multiplier: float = option("--dry-multiplier", "DRY: penalty on repeating a sequence; 0 is off.", default=0.0)
    dry_base: float = option("--dry-base", "DRY: factor of the penalty for each further token repeated.", default=1.75)
    dry_allowed_length: int = option(
        "--dry-allowed-length", "DRY: tokens that may be repeated without a penalty.", default=2
    )
    dry_penalty_last_n: int = option(
        "--dry-penalty-last-n", "DRY: how many of the last tokens are searched; -1 is all.", default=-1
    )
    dry_sequence_breakers: tuple[str, ...] = option(
        "--dry-sequence-breaker TEXT",
        'DRY: text at which a repetition ends; repeatable, `none` for no such text.  [default: line break, colon, ", *]',
        callback=parse_breakers,
        multiple=True,
    )
    seed: int | None = option(
        "--seed INTEGER",
        "Makes sampling repeatable: the same seed and prompt give the same text.  [default: random]",
        type=str,
        callback=parse_seed,
    )

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
        "Text or control token that ends the generation; repeatable.  [default: the model's own end]",
        multiple=True,
    )
    stop_token_ids: tuple[int, ...] = option(
        "--stop-token-id ID", "The same by token id; repeatable.", type=int, multiple=True
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
        "Guess tokens where the text repeats earlier text and verify several at once: the same text, faster.  [default: off]",
        type=click.Choice(("lookup",)),
    )
    draft: str | None = option(
        "--draft MODEL",
        "Guess tokens with this smaller model of the same vocabulary and verify several at once. Counts towards --memory.",
    )


@dataclass(frozen=True)
class RecordOptions:
    """Where a line of JSONL has its text and its domain."""

    text_field: str = option("--text-field KEY", "JSONL key that holds the text.", default="text")
    domain_field: str = option("--domain-field KEY", "JSONL key that holds the domain.", default="domain")

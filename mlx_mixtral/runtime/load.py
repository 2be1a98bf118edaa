"""``load``: from a folder or repository to a model in memory, within a budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mixtral.adapters.adapter import Adapter
from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.arguments import as_path, check_callbacks, checked
from mlx_mixtral.cache.options import DEFAULT_SINKS, KVOptions
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.overrides import ConfigOverrides, settings_of
from mlx_mixtral.distributed.group import DEFAULT_PEER_TIMEOUT_S, Group
from mlx_mixtral.distributed.meeting import agree, same
from mlx_mixtral.errors import DtypeRangeError, MissingDependencyError, TokenizerError
from mlx_mixtral.experts.policy import make_policy
from mlx_mixtral.hub import resolve
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.machine.device import compute_dtype, current_device
from mlx_mixtral.machine.streams import StreamLease
from mlx_mixtral.model.adapting import Adapting
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.prefetch import PrefetchControl
from mlx_mixtral.runtime.adapters import AdapterSources, open_all, sources_of
from mlx_mixtral.runtime.engine import Engine
from mlx_mixtral.runtime.filling import LoadProgress, load_whole
from mlx_mixtral.runtime.joining import check_joining, load_share
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.sizes import parse_size
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer
from mlx_mixtral.tokenizer.chat.choice import GivenTemplate, given_template
from mlx_mixtral.tokenizer.load import check_kind
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.fingerprint import checkpoint_identity
from mlx_mixtral.weights.manifest import check_files, check_sizes

__all__ = ["load"]


@checked()
def load(
    path: str | Path,
    *,
    memory: str | float | None = None,
    context: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    verify: bool = False,
    page_cache: bool = False,
    policy: str = "lru",
    prefetch: str = "off",
    kv_bits: int | None = None,
    kv_size: int | None = None,
    kv_sinks: int = DEFAULT_SINKS,
    prefix_cache: str | float | None = None,
    tokenizer: str | None = None,
    chat_template: str | Path | None = None,
    experts_per_token: int | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    rope_theta: float | None = None,
    adapter: AdapterSources | None = None,
    progress: Callable[[LoadProgress], None] | None = None,
    group: mx.distributed.Group | None = None,
    split: str = "auto",
    shares: Sequence[float] | None = None,
    peer_timeout_s: float = DEFAULT_PEER_TIMEOUT_S,
) -> Mixtral:
    """Load a model from a folder or a hub repository.

    Reads MLX checkpoints (ours and mlx-lm's, quantised in any MLX mode) and unquantised Hugging Face folders; dense Mistral
    and Llama models as the one-expert case. Weights are read straight into arrays of their final size.

    Args:
        path: folder, ``owner/name`` or ``owner/name@revision``.
        memory: budget for weights, the KV cache of ``context`` tokens and working memory, such as "12GB". Experts it has no
            room for are read from disk when a token needs them; the answer is the same. What this machine can give when None.
        context: tokens the budget reserves KV cache for; the smaller of the model's and 4096 when left out.
        dtype: compute type: auto (by device), float32, float16 or bfloat16.
        device: gpu or cpu; MLX's default device when None.
        verify: compare every file of one of our conversions with its sha256 first, which reads the weights once more. The
            sizes of its weight files are compared always.
        page_cache: let experts that are read from disk fill the operating system's page cache too; worth it where the machine
            has memory to spare beyond the budget.
        policy: which expert makes room for another one: lru or lfu.
        prefetch: read the next layer's experts before its router has chosen: off, on, or auto, which measures whether it pays.
        kv_bits: bits of the key-value cache: 4 or 8, with a scale and a bias for every 64 numbers, or 16; those of the compute
            type when None.
        kv_size: most tokens a token sees, so that the cache of a long text stays within them: the last ones, and ``kv_sinks``
            from its start. All when None. Text between is forgotten.
        kv_sinks: see ``kv_size``.
        prefix_cache: bytes of keys and values of earlier prompts and answers that are kept, such as "1GB": a prompt that begins
            like one of them is computed from where it differs. When None 1 GB where no budget binds; under a budget that of the
            last generation alone, in the memory reserved for the next. 0 keeps none. What is given here comes on top of
            ``memory``.
        tokenizer: which file to read text with, where a checkpoint has both: "model" or "json" (``tokenizer.model``,
            ``tokenizer.json``). The model when None; ``model.tokenizer.notes`` says where they differ.
        chat_template: a chat format in place of the checkpoint's own: a name ("chatml", "llama-3", "mistral-v1", …), a file of
            jinja, or the template itself.
        experts_per_token: experts each token goes through, in place of the checkpoint's own number: fewer are faster, and
            budgets and predictions follow. It was trained with its own number.
        rope_scaling: longer contexts than the checkpoint declares: "yarn=4", "linear=2" or "dynamic=2" stretch the one it was
            pretrained with by the factor, in place of its own scaling; or a mapping as ``rope_scaling`` in config.json.
        rope_theta: base of the rotary embedding in place of the checkpoint's; without ``rope_scaling`` ``context`` may then be
            any.
        adapter: a LoRA or DoRA adapter of mlx-lm or PEFT: a folder, ``owner/name``, or an ``AdapterSource`` with a name and a
            scale. It is in use from the start. Of a list of them none is: generations name theirs. Their memory is part of
            ``memory``; ``model.adapters`` adds and removes more.
        progress: told the bytes read so far, from this thread.
        group: machines to compute with, as ``join_group`` gives them. All of them load the same model with the same arguments,
            ``memory`` apart; then the first, whose ``is_leader`` is True, generates, and the others call ``follow``.
        split: what each machine of ``group`` holds: "experts", a part of the width of every expert; "layers", a run of decoder
            layers; or "auto", the faster one by the time that a sum over the machines takes, of those that fit.
        shares: relative sizes of the machines' parts, by rank; by their memory when None.
        peer_timeout_s: seconds that other machines may take for their part of the work, after which the process ends.

    Raises:
        CheckpointError, ConfigError, HubError: the model cannot be found, read or run.
        MemoryBudgetError: ``memory`` is below the least the model can do with.
        InvalidRequestError: an argument out of range.
        UnsupportedPlatformError: this process was forked from one that had loaded a model.
        GroupError: another machine of ``group`` failed, differs from the first, or is lost.

    Example:
        >>> model = load("mixtral-4bit", memory="20GB")
        >>> model.generate("Mixtral is", max_tokens=64).text
    """
    as_path("path", path)
    check_callbacks(progress=progress)
    place = current_device(device)
    kind = compute_dtype(dtype, place)
    overrides = ConfigOverrides(experts_per_token, rope_scaling, rope_theta)
    control, _ = PrefetchControl(prefetch), make_policy(policy)
    kv = KVOptions(kv_bits, kv_size, kv_sinks)
    kept = None if prefix_cache is None else _kept_bytes(prefix_cache)
    given = None if chat_template is None else given_template(chat_template)
    check_kind(tokenizer)
    check_joining(group, split, shares, peer_timeout_s)
    sources = sources_of(adapter)
    team = None if group is None else Group(group, peer_timeout_s)
    with contextlib.ExitStack() as opened:

        def found() -> _Found:
            folder = resolve(path, revision=revision)
            check_sizes(folder)
            if verify:
                check_files(folder)
            own = MixtralConfig.from_folder(folder)
            config = overrides.apply(own, context)
            return _Found(folder, own, config, Checkpoint(folder), open_all(sources, config, opened))

        products, lease = products_for(place), StreamLease(place)
        if team is None:
            at = found()
        else:
            facts = {
                "dtype": dtype,
                "backend": place.kind,
                "split": split,
                "shares": shares and list(shares),
                "kv": asdict(kv),
            }
            at, told = agree(team, found, lambda at: facts | at.facts())
            same(told)
        words = _tokenizer(at, tokenizer, given)
        for name in (kind, "BF16"):
            build = partial(
                Builder, at.config, at.checkpoint, name, page_cache=page_cache, policy=policy, products=products
            )
            try:
                with mx.stream(lease.stream):
                    if team is None:
                        weights = load_whole(build, place, kv, memory, context, progress, at.adapters)
                    else:
                        weights = load_share(
                            *(team, build, place, kv, memory, context, progress),
                            split=split,
                            shares=shares,
                            adapters=at.adapters,
                        )
            except DtypeRangeError:
                if name != "F16" or dtype != "auto" or team is not None:
                    raise
                continue
            weights.module.kv = kv
            engine = Engine(
                at.config,
                weights.module,
                weights.residency,
                weights.planner,
                place,
                control,
                lease=lease,
                allocate=weights.builder.bank,
                adapting=Adapting(weights.builder),
                identity=lambda: checkpoint_identity(at.folder),
                prefix_cache=kept,
                settings=settings_of(at.config, at.own_config),
            )
            _put_on(engine, team, sources, at.adapters)
            if sources and isinstance(adapter, str | Path | AdapterSource):
                engine.adapters.use(sources[0].label)
            return Mixtral(engine, words)
    raise AssertionError("bfloat16 has the range of float32")


@dataclass(frozen=True)
class _Found:
    """A checkpoint that was looked at."""

    folder: Path
    own_config: MixtralConfig
    config: MixtralConfig
    checkpoint: Checkpoint
    adapters: list[Adapter]

    def facts(self) -> dict[str, Any]:
        """What machines that load it together have to have alike."""
        return {
            "mlx-mixtral": version("mlx-mixtral"),
            "mlx": version("mlx"),
            "checkpoint": checkpoint_identity(self.folder)[:16],
            "settings": settings_of(self.config, self.own_config),
            "adapters": [f"{adapter.fingerprint[:16]} {adapter.scale!r}" for adapter in self.adapters],
        }


def _put_on(engine: Engine, team: Group | None, sources: Sequence[AdapterSource], opened: Sequence[Adapter]) -> None:
    """Put adapters on a model that was loaded, on all machines of a group or on none."""

    def put_on() -> None:
        with mx.stream(engine.stream):
            engine.adapters.put_on(sources, opened)

    if team is None:
        put_on()
    elif sources:
        agree(team, put_on, lambda _: True)


def _tokenizer(at: _Found, kind: str | None, template: GivenTemplate | None) -> Tokenizer | TokenizerError:
    try:
        return load_tokenizer(
            at.folder,
            vocab_size=at.config.vocab_size,
            eos_token_ids=at.config.eos_token_ids,
            kind=kind,
            chat_template=template,
        )
    except (MissingDependencyError, TokenizerError) as error:
        # A fresh error: a raised one keeps this frame alive by its traceback, and the weights with it.
        return TokenizerError(str(error))


def _kept_bytes(prefix_cache: str | float) -> int:
    is_none = isinstance(prefix_cache, str | int | float) and prefix_cache in (0, "0")
    return 0 if is_none else parse_size(prefix_cache)

"""``load``: from a folder or repository to a model in memory, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mixtral.arguments import as_path, check_callbacks, checked
from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.cache.options import DEFAULT_SINKS, KVOptions
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.overrides import ConfigOverrides, settings_of
from mlx_mixtral.distributed.group import DEFAULT_PEER_TIMEOUT_S, Group
from mlx_mixtral.distributed.link import Link
from mlx_mixtral.distributed.meeting import agree, same
from mlx_mixtral.errors import DtypeRangeError, InvalidRequestError, MissingDependencyError, TokenizerError
from mlx_mixtral.experts.policy import make_policy
from mlx_mixtral.experts.residency import Residency
from mlx_mixtral.hub import resolve
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.machine.device import DTYPE_NAMES, Device, compute_dtype, current_device
from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.machine.streams import StreamLease
from mlx_mixtral.model.build import Builder
from mlx_mixtral.model.planning import make_planner
from mlx_mixtral.model.prefetch import PrefetchControl
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.engine import Engine
from mlx_mixtral.runtime.joining import agreed_plan, choose_shares, split_of
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.sizes import parse_size
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer
from mlx_mixtral.tokenizer.chat.choice import GivenTemplate, given_template
from mlx_mixtral.tokenizer.load import check_kind
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.fill import fill
from mlx_mixtral.weights.fingerprint import checkpoint_identity
from mlx_mixtral.weights.manifest import check_files, check_sizes

__all__ = ["LoadProgress", "load", "load_module", "refuse_cpu_gather"]


@dataclass(frozen=True)
class LoadProgress:
    """How far loading is, in bytes read from disk.

    Example:
        >>> load("mixtral-4bit", progress=lambda at: print(f"{at.done_bytes / at.total_bytes:.0%}"))
    """

    done_bytes: int
    total_bytes: int


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
    split_of(split)
    team = None if group is None else Group(group, peer_timeout_s)

    def found() -> _Found:
        folder = resolve(path, revision=revision)
        check_sizes(folder)
        if verify:
            check_files(folder)
        own = MixtralConfig.from_folder(folder)
        return _Found(folder, own, overrides.apply(own, context), Checkpoint(folder))

    products, lease = products_for(place), StreamLease(place)
    if team is None:
        at = found()
    else:
        facts = {"dtype": dtype, "backend": place.kind, "split": split, "kv": asdict(kv)}
        at, told = agree(team, found, lambda at: facts | at.facts(overrides, context))
        same(told)
    words = _tokenizer(at, tokenizer, given)
    for name in (kind, "BF16"):
        build = partial(
            Builder, at.config, at.checkpoint, name, page_cache=page_cache, policy=policy, products=products
        )
        builder = build()
        refuse_cpu_gather(builder, place)
        link: Link | None = None
        with mx.stream(lease.stream):
            if team is not None:
                usable = parse_size(memory) if memory is not None else usable_bytes(place, read_system_memory())
                parts = choose_shares(team, builder, lambda share: build(share=share), split, shares, usable)
                link, builder = Link(team, parts), build(share=parts[team.rank])
            planner = make_planner(builder, place, kv=kv)
            try:
                if team is None:
                    module, residency = load_module(builder, planner.plan(memory, context), progress)
                else:
                    plan = agreed_plan(team, lambda: planner.plan(memory, context), at.config.max_context_tokens)
                    load_part = partial(load_module, builder, plan, progress)
                    (module, residency), _ = agree(team, load_part, lambda made: True)
                    if link is not None:
                        module.join(link)
            except DtypeRangeError:
                if name != "F16" or dtype != "auto" or team is not None:
                    raise
                continue
        module.kv = kv
        engine = Engine(
            module,
            residency,
            planner,
            place,
            control,
            lease=lease,
            allocate=builder.bank,
            identity=lambda: checkpoint_identity(at.folder),
            prefix_cache=kept,
            settings=settings_of(at.config, at.own_config),
        )
        return Mixtral(engine, words)
    raise AssertionError("bfloat16 has the range of float32")


@dataclass(frozen=True)
class _Found:
    """A checkpoint that was looked at."""

    folder: Path
    own_config: MixtralConfig
    config: MixtralConfig
    checkpoint: Checkpoint

    def facts(self, overrides: ConfigOverrides, context: int | None) -> dict[str, Any]:
        """What machines that load it together have to have alike."""
        return {
            "mlx-mixtral": version("mlx-mixtral"),
            "mlx": version("mlx"),
            "checkpoint": checkpoint_identity(self.folder)[:16],
            "settings": settings_of(self.config, self.own_config),
            "context": context,
        }


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


def load_module(
    builder: Builder, plan: MemoryPlan, progress: Callable[[LoadProgress], None] | None
) -> tuple[MixtralModel, Residency]:
    """Allocate the model and read what stays in memory.

    Raises:
        CheckpointError: weights that cannot be read or held.
    """
    module = builder.build(plan.slots, plan.overflow_slots)
    total = sum(item.nbytes for item in builder.ranges)

    def report(done_bytes: int) -> None:
        if progress is not None:
            progress(LoadProgress(done_bytes, total))

    with CheckpointReader(builder.checkpoint) as reader:
        fill(reader, builder.ranges, report)
    builder.ranges.clear()
    residency = Residency(builder.store, builder.sizes(), module.gathered, builder.overflow, plan, builder.policy)
    builder.overflow = {}
    return module, residency


def refuse_cpu_gather(builder: Builder, device: Device) -> None:
    """MLX's CPU ``gather_mm`` computes float32 only: say so at load, not in the first forward."""
    plain = any(m.part == "expert" and builder.specs[path] is None for path, m in builder.matrices.items())
    if plain and not builder.config.is_dense and builder.dtype != "F32" and device.kind == "cpu":
        raise InvalidRequestError(
            f"unquantised experts cannot be computed in {DTYPE_NAMES[builder.dtype]} on MLX's CPU backend; "
            "use --dtype float32, or convert the checkpoint"
        )

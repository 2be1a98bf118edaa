"""``convert``: one checkpoint in, one MLX folder out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.arguments import check_callbacks, check_type, checked
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.files import replace_file
from mlx_mixtral.hub import Source
from mlx_mixtral.machine.device import DTYPE_NAMES, DTYPES, current_device
from mlx_mixtral.sizes import parse_size
from mlx_mixtral.weights.manifest import MANIFEST
from mlx_mixtral_convert.calibration.file import Calibration, Losses
from mlx_mixtral_convert.estimate import estimate_conversion
from mlx_mixtral_convert.exact import check_kept, exact_recipe, exact_specs, packed_as
from mlx_mixtral_convert.fusing import OF_THE_BASE, check_adapters, fused_adapters, open_fused, recorded
from mlx_mixtral_convert.output.destination import SPARE_BYTES, FolderDestination, as_destination
from mlx_mixtral_convert.output.journal import ConversionJournal, check_cancelled
from mlx_mixtral_convert.output.manifest import (
    conversion_text,
    model_config_text,
    write_small_files,
)
from mlx_mixtral_convert.output.plan import INDEX_FILE, Plan, make_plan
from mlx_mixtral_convert.output.vocabulary import check_stop_ids, check_vocabulary, tokenizer_notes
from mlx_mixtral_convert.pipeline import Written, write_weights
from mlx_mixtral_convert.progress import Progress, ProgressCounter, downloading
from mlx_mixtral_convert.recipes import Recipe
from mlx_mixtral_convert.recipes.fit import Expected, expected_loss
from mlx_mixtral_convert.recipes.fit import fit as fit_recipe
from mlx_mixtral_convert.recipes.machine import room_for_weights
from mlx_mixtral_convert.report import (
    ConversionReport,
    FusedAdapter,
    part_sizes,
    peak_memory_bytes,
    width_notes,
)
from mlx_mixtral_convert.rounding import LayerByLayer, Search, make_rounder
from mlx_mixtral_convert.sources import TensorSource, main_dtype, matrix_bytes, small_files
from mlx_mixtral_convert.sources.adapted import AdaptedSource
from mlx_mixtral_convert.sources.storage.remote import open_remote

__all__ = ["convert"]

WORST_LISTED = 10


@checked()
def convert(
    source: str | Path,
    dest: str | Path,
    *,
    recipe: Recipe | None = None,
    adapters: Sequence[AdapterSource] = (),
    exact: bool = False,
    kind: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    stream: bool = False,
    dry_run: bool = False,
    calibration: Calibration | str | Path | None = None,
    fit: str | float | None = None,
    context: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ConversionReport:
    """Convert a checkpoint to an MLX folder that this runtime and mlx-lm load.

    ``dest`` appears complete or not at all, and memory is bounded by a few experts' matrices whatever the model's size.
    The same source and recipe give the same bytes. A conversion that was interrupted (killed, cancelled, out of disk) left its
    finished layers beside ``dest``; the same call goes on from there.

    Example:
        report = convert("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-4bit", recipe=Recipe(bits=4))
        print(report.output_bytes, report.worst[0])

    Args:
        source: a folder, a GGUF file, ``owner/name`` or ``owner/name@revision`` of the hub, with ``:file.gguf`` after it to
            choose one of several.
        dest: the folder to make.
        recipe: which matrix gets which bits; 4 bits in groups of 64 when None.
        adapters: LoRA adapters to fuse in before packing, in float32, each into what those before it made; see
            ``sources.adapted``.
        exact: keep the packing of a source that is quantised already: integers move as they are where MLX has a packing
            for them, and what has none is rounded into the nearest. Of ``recipe`` only overrides and rounding count then.
            Matrices that an adapter changes are rounded anew.
        kind: the source's layout, one of ``sources.KINDS``; auto finds it from the content.
        dtype: float type of scales, norms and what stays unquantised: float16, bfloat16, float32, or auto, the source's own
            (bfloat16 for a float32 source that is quantised, float16 with ``exact``).
        revision: branch, tag or commit of a hub repository.
        overwrite: replace a finished conversion at ``dest``, once the new one is complete.
        restart: forget what an interrupted conversion left.
        stream: fetch a hub repository's weights by byte range as they are needed, and store none of them.
        dry_run: check and plan everything, pack one matrix on trial to tell the time, write nothing.
        calibration: of this checkpoint, or its file: weights the search of ``rounding``, is needed by ``gptq``, and with
            sensitivities gives ``fit`` its losses.
        fit: the size of the weight files ("20GB", bytes) to choose bits for; of ``recipe`` only the rounding counts then.
            ``mac`` is what this machine recommends to its GPU, less a KV cache of ``context`` tokens and working memory.
        context: tokens that ``fit="mac"`` leaves room for; the smaller of 4096 and the model's own when None.
        progress: told each step, from this thread (while downloading, from the downloading ones).
        cancelled: asked before each matrix, with rounding by gptq or tuned also after each expert of the layer they are at;
            True ends the conversion with ConversionError.

    Raises:
        CheckpointError: the source is damaged, incomplete, or holds NaN, infinity or values beyond ``dtype``; an adapter is
            damaged, or one of another model.
        ConfigError: another architecture, token ids beyond the vocabulary, or a recipe that does not fit the model.
        ConversionError: quantised already, changed while it was read, or cancelled; an adapter that cannot be fused.
        DestinationError: ``dest`` cannot be used, or holds an unfinished conversion of another source or with other options.
        DiskSpaceError: the disk has too little room, before or while writing.
        HubError: the repository cannot be downloaded.
        InvalidRequestError: an argument of a wrong type; an empty ``source`` or ``dest``; an unknown ``dtype`` or ``kind``;
            ``exact`` with ``fit`` or a source of floats; rounding by gptq or tuned without a calibration; ``fit`` with one that
            has no sensitivities.
        MemoryBudgetError: ``fit`` is less than the model can be made.
        TokenizerError: the tokenizer has more pieces than the model has embeddings.
    """
    started = time.perf_counter()
    named, place = Source.parse(source, revision), as_destination(dest)
    check_type("recipe", recipe, (Recipe, type(None)), "a Recipe, or None")
    check_type("calibration", calibration, (Calibration, str, Path, type(None)), "a Calibration, its file, or None")
    check_callbacks(progress=progress, cancelled=cancelled)
    check_adapters(adapters)
    recipe = Recipe() if recipe is None else recipe
    if dtype not in ("auto", *DTYPES):
        raise InvalidRequestError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    with ExitStack() as opened:
        remote = opened.enter_context(closing(open_remote(named))) if stream else None
        download = downloading(progress)
        folder = named.resolve(convertible=True, progress=download) if remote is None else remote.folder
        destination = FolderDestination(place, folder, overwrite=overwrite)
        tensors = opened.enter_context(open_fused(folder if remote is None else remote, kind, adapters, download))

        def again() -> TensorSource:
            return open_fused(folder if remote is None else remote.again(), kind, adapters)

        chosen = _choose(tensors, recipe, calibration, again, exact=exact, fit=fit, dtype=dtype, context=context)
        plan, small, fused = chosen.plan, small_files(tensors), fused_adapters(tensors)
        check_vocabulary(small, tensors.config.vocab_size)
        check_stop_ids(small, tensors.config)
        asked = chosen.recipe.default is not None or any(spec is not None for spec in plan.specs.values())
        notes = (*(width_notes(plan) if asked else ()), *tensors.notes, *tokenizer_notes(small), *chosen.notes)
        small["config.json"] = model_config_text(tensors.entries, plan, chosen.recipe.default)
        small[INDEX_FILE] = plan.index()
        needed = plan.output_bytes + sum(map(len, small.values())) + SPARE_BYTES
        free = destination.free_bytes()
        written: Written | None = None
        resumed_layers = 0
        needs = estimate_conversion(tensors, plan, chosen.rounder) if dry_run else None
        if not dry_run:
            name, commit = named.origin(folder)
            origin = {"name": name, "revision": commit, "files": tensors.files.describe()}
            identity = _identity(origin, plan, chosen.recorded, small, fused)
            with destination as partial, ConversionJournal(partial, identity, plan.shards, restart=restart) as journal:
                destination.check_space(needed - journal.kept_bytes)
                resumed_layers = journal.kept_layers
                counter = _counter(tensors, plan, progress, journal.kept)
                written = _write(tensors, chosen, partial, journal, counter, cancelled)
                files = {s.file: {"bytes": s.nbytes, "sha256": written.hashes[s.file]} for s in plan.shards}
                files |= write_small_files(partial, small)
                told = conversion_text(
                    origin, plan, chosen.recorded, written.errors, files, [recorded(each) for each in fused]
                )
                replace_file(partial / MANIFEST, told)
                counter.finish(MANIFEST)
                destination.commit()
        worst = sorted(written.errors, key=lambda error: -error.relative_rms)[:WORST_LISTED] if written else ()
        return ConversionReport(
            source=str(source),
            destination=str(destination.path),
            dtype=DTYPE_NAMES[plan.dtype],
            source_bytes=tensors.files.nbytes,
            output_bytes=plan.output_bytes,
            bits_per_weight=8 * plan.data_bytes / plan.parameters,
            parameters=plan.parameters,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
            layers=plan.config.num_hidden_layers,
            resumed_layers=resumed_layers,
            sizes_by_part=part_sizes(plan),
            worst=tuple(worst),
            disk_needed_bytes=needed,
            disk_free_bytes=free,
            dry_run=dry_run,
            rounding=chosen.recipe.rounding,
            packings=tuple(packed_as(plan, written)),
            expected_seconds=needs.seconds if needs else None,
            expected_memory_bytes=needs.memory_bytes if needs else None,
            predicted_kl=None if chosen.expected is None else chosen.expected.kl,
            predicted_kl_error=None if chosen.expected is None else chosen.expected.error,
            adapters=fused,
            notes=notes,
        )


@dataclass(frozen=True)
class _Chosen:
    """What becomes of every matrix: packings and files, how codes are found, and what ``conversion.json`` says of it."""

    recipe: Recipe
    recorded: dict[str, Any]
    plan: Plan
    rounder: Search | LayerByLayer | None
    expected: Expected | None
    notes: tuple[str, ...] = ()


def _choose(
    tensors: TensorSource,
    recipe: Recipe,
    calibration: Calibration | str | Path | None,
    again: Callable[[], TensorSource],
    *,
    exact: bool,
    fit: str | float | None,
    dtype: str,
    context: int | None,
) -> _Chosen:
    base = tensors.base if isinstance(tensors, AdaptedSource) else tensors
    if exact and fit is not None:
        raise InvalidRequestError("exact keeps the source's bits, but fit chooses others; give only one of them")
    calibrated = Calibration.load(calibration) if isinstance(calibration, (str, Path)) else calibration
    if calibrated is not None:
        calibrated.check_fits(base)
    if fit is not None:
        losses = None if calibrated is None else calibrated.losses
        if losses is not None and not losses:
            raise InvalidRequestError(
                "fit chooses bits by sensitivities, but this calibration has none; measure them with mlx-mixtral calibrate "
                "--sensitivities, or fit without a calibration"
            )
        budget = room_for_weights(tensors.config, current_device(), context) if fit == "mac" else parse_size(fit)
        # What a Mixtral of one bit loses is known where it was measured: nobody gets one for asking what fits.
        least_bits = 2 if fit == "mac" and not losses else 1
        recipe = _fit(tensors, budget, losses, recipe.rounding, dtype, least_bits)
    if exact and isinstance(tensors, AdaptedSource):
        check_kept(tensors)
    recipe = exact_recipe(recipe) if exact else recipe
    recorded = recipe.to_dict() | ({"exact": True} if exact else {})
    recorded |= {"calibration": calibrated.digest} if calibrated is not None else {}
    plan = _plan(tensors, recipe, dtype, exact=exact)
    rounder = make_rounder(recipe.rounding, calibrated, again, plan)
    # What keeps the source's integers loses none of what packing floats would.
    expected = None if exact else expected_loss(tensors.config, plan.specs, calibrated, recipe.rounding)
    notes = (OF_THE_BASE,) if calibrated is not None and isinstance(tensors, AdaptedSource) else ()
    return _Chosen(recipe, recorded, plan, rounder, expected, notes)


def _write(
    tensors: TensorSource,
    chosen: _Chosen,
    partial: Path,
    journal: ConversionJournal,
    counter: ProgressCounter,
    cancelled: Callable[[], bool] | None,
) -> Written:
    rounder = chosen.rounder
    if isinstance(rounder, LayerByLayer):

        def told(layer: int, share: float) -> None:
            check_cancelled(cancelled)
            counter.walk(layer, share)

        rounder.folder, rounder.told = partial, told
        layers = {shard.layer: partial / shard.file for shard in chosen.plan.shards if shard.file in journal.finished}
        rounder.finished = {layer: file for layer, file in layers.items() if layer is not None}
    with closing(rounder) if isinstance(rounder, LayerByLayer) else nullcontext():
        return write_weights(
            tensors, chosen.plan, partial, journal=journal, step=counter.step, cancelled=cancelled, rounder=rounder
        )


def _fit(
    tensors: TensorSource, budget: int, losses: Losses | None, rounding: str, dtype: str, least_bits: int
) -> Recipe:
    """Fit the files, headers included, and not the tensors alone."""
    scale_bytes = 4 if dtype == "float32" else 2
    unpacked = _plan(tensors, Recipe(bits=None), dtype)
    overhead = unpacked.output_bytes - unpacked.data_bytes
    while True:
        found = fit_recipe(
            tensors.config,
            budget,
            losses,
            scale_bytes=scale_bytes,
            overhead_bytes=overhead,
            rounding=rounding,
            least_bits=least_bits,
        )
        plan = _plan(tensors, found.recipe, dtype)
        if plan.output_bytes <= budget:
            return found.recipe
        overhead = max(overhead + 1, plan.output_bytes - plan.data_bytes)


def _plan(tensors: TensorSource, recipe: Recipe, dtype: str, *, exact: bool = False) -> Plan:
    specs, native = exact_specs(tensors, recipe) if exact else (recipe.assign(tensors.config), {})
    if dtype != "auto" or native:
        return make_plan(tensors.config, specs, "F16" if dtype == "auto" else DTYPES[dtype], native)
    # What an adapter touches is read as float32, whatever the model is made of.
    own = main_dtype(tensors.base if isinstance(tensors, AdaptedSource) else tensors)
    packs = any(spec is not None for spec in specs.values())
    return make_plan(tensors.config, specs, "BF16" if own == "F32" and packs else own)


def _identity(
    origin: dict[str, Any],
    plan: Plan,
    recipe: Mapping[str, Any],
    small: Mapping[str, bytes],
    fused: Sequence[FusedAdapter],
) -> dict[str, Any]:
    """Everything the bytes of the output follow from: an unfinished conversion goes on only where all of it is the same."""
    return {
        "converter": __version__,
        "source": origin,
        # By number, so that a message names what differs between two lists.
        **({"adapters": {str(i): recorded(each) for i, each in enumerate(fused, start=1)}} if fused else {}),
        "recipe": recipe,
        "dtype": DTYPE_NAMES[plan.dtype],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(small.items())},
    }


def _counter(
    tensors: TensorSource, plan: Plan, progress: Callable[[Progress], None] | None, kept: Collection[str]
) -> ProgressCounter:
    sizes = {
        shard.file: sum(matrix_bytes(tensors, matrix) * (matrix.num_experts or 1) for matrix in shard.matrices)
        for shard in plan.shards
    }
    ahead = {s.layer: sizes[s.file] for s in plan.shards if s.layer is not None and s.file not in kept}
    done = sum(sizes[file] for file in kept)
    return ProgressCounter(progress, sum(sizes.values()), plan.config.num_hidden_layers, done, layer_bytes=ahead)

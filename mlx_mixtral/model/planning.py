"""The planner of a model at hand: its sizes, its disk, its routing trace."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.budget.planner import Planner
from mlx_mixtral.budget.slots import Speeds
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.experts.speeds import measure_speeds
from mlx_mixtral.experts.trace import RoutingTrace, hit_rates, published_trace
from mlx_mixtral.machine.device import Device
from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.model.build import Builder
from mlx_mixtral.reading import is_there
from mlx_mixtral.weights.dtypes import MLX_DTYPES

__all__ = ["TRACE_FILE", "make_planner"]

TRACE_FILE = "routing.trace"
"""A routing trace of the model itself, beside its weights."""


def make_planner(
    builder: Builder, device: Device, *, kv: KVOptions | None = None, speeds: Speeds | None = None
) -> Planner:
    """A planner for the model of ``builder``, or the part of it that this machine holds, on ``device``.

    Speeds are measured, and curves of hit rates made, when the first budget that cannot hold everything needs them.

    Args:
        speeds: in place of those measured on the checkpoint, which takes a fraction of a second.

    Raises:
        InvalidRequestError: ``kv`` asks for what the model's heads do not allow.
    """
    kv = kv or KVOptions()
    kv.storage(builder.config, MLX_DTYPES[builder.dtype])
    return Planner(
        builder.held.config,
        builder.sizes(),
        item_bytes=builder.item_bytes,
        reading_bytes=0 if builder.config.is_dense else builder.store.reading_bytes,
        product_bytes=builder.products.buffer_bytes(builder.largest_matrix),
        keeps_scores=device.kind == "cpu",
        kv=kv,
        available_bytes=lambda: usable_bytes(device, read_system_memory()),
        speeds=lambda: _measured(builder) if speeds is None else speeds,
        hit_rates=lambda: _hit_rates(builder),
    )


def _measured(builder: Builder) -> Speeds:
    kinds = builder.sizes().kinds
    layers = [layer for layer, kind in enumerate(kinds) if kind == kinds[0]]
    x = mx.ones((1, builder.config.hidden_size), MLX_DTYPES[builder.dtype])
    return measure_speeds(builder.store, builder.bank(0, 1), layers, x)


def _hit_rates(builder: Builder) -> npt.NDArray[np.float64]:
    """Of the model's own routing trace where it has one beside its weights, else of the published repeat rates."""
    config, own = builder.config, builder.checkpoint.folder / TRACE_FILE
    trace = RoutingTrace.load(own) if is_there(own) else None
    shape = (config.num_hidden_layers, config.num_experts_per_tok)
    if (
        trace is not None and trace.experts.shape[2] > shape[1]
    ):  # recorded with more experts per token: the first choices of it
        trace = RoutingTrace(trace.experts[..., : shape[1]], trace.num_experts, trace.starts)
    if trace is None or (trace.experts.shape[1:], trace.num_experts) != (shape, config.num_local_experts):
        trace = published_trace(shape[0], config.num_local_experts, shape[1])
    if builder.share is not None:
        held = builder.held.layers
        trace = RoutingTrace(trace.experts[:, held.start : held.stop], trace.num_experts, trace.starts)
    return hit_rates(trace, builder.policy)

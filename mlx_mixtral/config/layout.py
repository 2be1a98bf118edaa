"""The checkpoint contract: which tensors a model consists of, and what each layout on disk calls them.

The network has a fixed list of matrices and norms (``matrices``, ``norms``). Each matrix has a module path, the one MLX
checkpoints use, and a shape: ``[out, in]``, or ``[experts, out, in]`` for the experts. Layouts differ in how experts are cut:

    stacked      model.layers.N.block_sparse_moe.switch_mlp.gate_proj.weight      [E, F, D]   MLX, what we write
    per expert   model.layers.N.block_sparse_moe.experts.M.w1.weight              [F, D]      HF hub, oldest MLX
    named        model.layers.N.mlp.experts.M.gate_proj.weight                    [F, D]      llm-compressor
    fused        model.layers.N.mlp.experts.gate_up_proj                          [E, 2F, D]  transformers 5 in memory
    dense        model.layers.N.mlp.gate_proj.weight                              [F, D]      Llama, Mistral: one expert

In all of them one expert of one matrix is one run of rows of one tensor, so ``locate`` answers every question with a list
of ``Rows``, and reading, converting and streaming need no cases. w1 is gate, w3 is up, w2 is down. Blocks are called
``block_sparse_moe`` or ``mlp`` whatever the cut is: ``_expert_rows`` has every spelling.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Literal

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec

__all__ = [
    "EXPERT_NAMES",
    "FIELDS",
    "Matrix",
    "Norm",
    "Rows",
    "experts_path",
    "fields_of",
    "hf_name",
    "layer_path",
    "locate",
    "matrices",
    "module_tensor",
    "norms",
]

Part = Literal["embedding", "attention", "router", "expert", "head"]
Field = Literal["weight", "scales", "biases"]
FIELDS: tuple[Field, ...] = ("weight", "scales", "biases")

EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""What Mistral and Hugging Face call the matrices of one expert."""


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of the network: where it lives as a module, its shape ``[out, in]`` and how often (experts)."""

    path: str
    part: Part
    out_features: int
    in_features: int
    layer: int | None = None
    num_experts: int | None = None
    """Number of stacked experts; None for a matrix that is not an expert's."""

    @property
    def shape(self) -> tuple[int, ...]:
        matrix = (self.out_features, self.in_features)
        return matrix if self.num_experts is None else (self.num_experts, *matrix)

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features * (self.num_experts or 1)


@dataclass(frozen=True)
class Norm:
    """One RMSNorm weight of ``size`` features; ``path`` is the module's."""

    path: str
    size: int
    layer: int | None = None


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of the tensor ``name`` seen as two-dimensional (leading axes flattened).

    ``of`` is the number of rows the whole tensor must have, ``experts`` its leading axis when it is stacked.
    """

    name: str
    start: int
    stop: int
    of: int
    experts: int | None = None


def fields_of(spec: QuantizationSpec | None) -> tuple[Field, ...]:
    """The tensors a matrix is stored as: packed when there is a ``spec``."""
    if spec is None:
        return ("weight",)
    return FIELDS if spec.has_biases else ("weight", "scales")


def layer_path(layer: int) -> str:
    return f"model.layers.{layer}"


def matrices(config: MixtralConfig) -> Iterator[Matrix]:
    """Every weight matrix of the model, embeddings first, then layer by layer, the output head last."""
    hidden, width, heads = config.hidden_size, config.intermediate_size, config.head_dim
    yield Matrix("model.embed_tokens", "embedding", config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        attention = f"{layer_path(layer)}.self_attn"
        kv = config.num_key_value_heads * heads
        yield Matrix(f"{attention}.q_proj", "attention", config.num_attention_heads * heads, hidden, layer)
        yield Matrix(f"{attention}.k_proj", "attention", kv, hidden, layer)
        yield Matrix(f"{attention}.v_proj", "attention", kv, hidden, layer)
        yield Matrix(f"{attention}.o_proj", "attention", hidden, config.num_attention_heads * heads, layer)
        if not config.is_dense:
            gate = f"{layer_path(layer)}.block_sparse_moe.gate"
            yield Matrix(gate, "router", config.num_local_experts, hidden, layer)
        experts = experts_path(config, layer)
        count = config.num_local_experts
        yield Matrix(f"{experts}.gate_proj", "expert", width, hidden, layer, count)
        yield Matrix(f"{experts}.up_proj", "expert", width, hidden, layer, count)
        yield Matrix(f"{experts}.down_proj", "expert", hidden, width, layer, count)
    if not config.tie_word_embeddings:
        yield Matrix("lm_head", "head", config.vocab_size, hidden)


def experts_path(config: MixtralConfig, layer: int) -> str:
    """Module path of a layer's experts; a dense model's single network is ``mlp``, as mlx-lm and HF call it."""
    return f"{layer_path(layer)}.{'mlp' if config.is_dense else 'block_sparse_moe.switch_mlp'}"


def norms(config: MixtralConfig) -> Iterator[Norm]:
    """Every RMSNorm of the model."""
    for layer in range(config.num_hidden_layers):
        yield Norm(f"{layer_path(layer)}.input_layernorm", config.hidden_size, layer)
        yield Norm(f"{layer_path(layer)}.post_attention_layernorm", config.hidden_size, layer)
    yield Norm("model.norm", config.hidden_size)


def module_tensor(matrix: Matrix, field: Field) -> str:
    """The tensor name our own checkpoints (and mlx-lm's) give to a field of a matrix."""
    return f"{matrix.path}.{field}"


def hf_name(matrix: Matrix, expert: int = 0) -> str:
    """The hub's name for one expert of a matrix (expert 0 of what has none)."""
    block, _, projection = matrix.path.rpartition(".")
    if block.endswith(".switch_mlp"):
        return f"{block.removesuffix('.switch_mlp')}.experts.{expert}.{EXPERT_NAMES[projection]}.weight"
    return f"{matrix.path}.weight"


def locate(matrix: Matrix, field: Field, names: Container[str]) -> list[Rows] | None:
    """Where a field of a matrix lies among the tensor ``names`` of a checkpoint, one ``Rows`` an expert, in order.

    Matrices that are not experts give a list of one. None means that no layout known here has all of it; when some
    experts are there and others not, the list names the absent ones too, so that reading reports them.
    """
    rows = matrix.out_features
    if matrix.num_experts is None:
        candidates = [f"{matrix.path}.{field}"]
        if matrix.part == "router":
            candidates.append(f"{_block(matrix)}.mlp.gate.{field}")
        return next(([Rows(name, 0, rows, rows)] for name in candidates if name in names), None)
    experts = range(matrix.num_experts)
    if f"{matrix.path}.{field}" in names:
        stacked = matrix.num_experts if not matrix.path.endswith(_DENSE_PATHS) else None
        name = f"{matrix.path}.{field}"
        return [Rows(name, e * rows, (e + 1) * rows, matrix.num_experts * rows, stacked) for e in experts]
    return next((found for found in _expert_rows(matrix, field) if any(rows.name in names for rows in found)), None)


def _expert_rows(matrix: Matrix, field: Field) -> Iterator[list[Rows]]:
    """Every spelling in use of a field of experts, apart from the matrix's own path."""
    assert matrix.num_experts is not None
    rows, count, projection = matrix.out_features, matrix.num_experts, matrix.path.rpartition(".")[2]
    both, skip = ("gate_up_proj", rows * (projection == "up_proj")) if projection != "down_proj" else ("down_proj", 0)
    # What gate and up are halves of.
    tall = rows if projection == "down_proj" else 2 * rows
    for block in (f"{_block(matrix)}.{name}" for name in ("block_sparse_moe", "mlp")):
        for own in (EXPERT_NAMES[projection], projection):
            yield [Rows(f"{block}.experts.{e}.{own}.{field}", 0, rows, rows) for e in range(count)]
        stacked = [f"{block}.switch_mlp.{projection}.{field}", f"{block}.experts.{projection}.{field}"]
        if projection != "down_proj":
            yield [Rows(f"{block}.experts.{e}.gate_up_proj.{field}", skip, skip + rows, tall) for e in range(count)]
        elif field == "weight":
            stacked.append(f"{block}.experts.w2_weight")
        for name in stacked:
            yield [Rows(name, e * rows, (e + 1) * rows, count * rows, count) for e in range(count)]
        if field == "weight":
            halves = [f"{block}.experts.{both}", f"{block}.experts.{both}.weight"]
            halves += [f"{block}.experts.w13_weight"] if projection != "down_proj" else []
            for name in halves:
                starts = (e * tall + skip for e in range(count))
                yield [Rows(name, start, start + rows, count * tall, count) for start in starts]


_DENSE_PATHS = (".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")


def _block(matrix: Matrix) -> str:
    return layer_path(matrix.layer or 0)

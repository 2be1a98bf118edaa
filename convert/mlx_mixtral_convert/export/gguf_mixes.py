"""Which matrix gets which GGUF type: the mixes of llama.cpp's quantiser, by their names there.

A mix has a type for most matrices and better ones where an error costs most. What raises a matrix above the mix's own type
(``llama_tensor_get_type`` in src/llama-quant.cpp of ggml-org/llama.cpp):

    output          Q6_K in every mix, and so are embeddings that are the output too; Q8_0 if its rows have no blocks of 256
    attn_v, attn_k  Q8_0 if the model has eight experts, for attention is small beside them
    attn_v          else Q2_K: Q3_K, Q4_K from four query heads a key head on. Q3_K_M: Q4_K, in two layers Q5_K. Q3_K_L: Q5_K.
                    Q4_K_S: Q5_K in four layers. Q4_K_M, Q5_K_M: Q6_K in the layers that get more bits.
                    80 layers: Q5_K in place of Q3_K and Q4_K
    attn_output     eight experts: Q5_K in mixes up to Q4_K but Q3_K_L. Else Q2_K: Q3_K. Q3_K_M: Q4_K. Q3_K_L: Q5_K
    ffn_down        Q2_K: Q3_K. Q3_K_M: Q4_K, Q5_K in the first sixteenth of layers. Q3_K_L: Q5_K. Q4_K_S: Q5_K in the first
                    eighth. Q4_K_M, Q5_K_M: Q6_K in the layers that get more bits

More bits get the first and the last eighth of layers and every third between. Rows with no blocks of 256 fall back to a type
with blocks of 32, and if they have none of those either, to F16. Routers and norms are F32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral_convert.sources.gguf.names import gguf_name
from mlx_mixtral_convert.sources.gguf.types import TYPES_BY_NAME

__all__ = ["GGUF_TYPES", "WEIGHABLE", "fallback_notes", "mix_of", "tensor_types"]

# Mix -> the type of most matrices.
_MIXES = {
    "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K",
}  # fmt: skip
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_PLAIN = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
GGUF_TYPES = (*_PLAIN, *_MIXES, *_ALIASES)
WEIGHABLE = ("Q8_0", "Q4_0", "Q4_1", *_MIXES)
"""Those that a calibration changes."""
# What stands in for a type whose blocks do not fit a row.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_OUTPUT_BY_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")


def mix_of(kind: str) -> str:
    """The mix, or the one type, that a name of ``GGUF_TYPES`` means: llama.cpp's short names are the medium mixes."""
    return _ALIASES.get(kind, kind)


def tensor_types(config: MixtralConfig, mix: str) -> dict[str, str]:
    """Type of every matrix by its path.

    Raises:
        InvalidRequestError: rows that do not divide into the blocks of ``mix``, and nothing stands in for it.
    """
    return {matrix.path: _fitting(matrix, _type(matrix, config, mix), mix) for matrix in matrices(config)}


def fallback_notes(config: MixtralConfig, mix: str, types: Mapping[str, str]) -> Iterable[str]:
    """A sentence for each kind of row that has another type than the mix wants."""
    found: dict[tuple[int, str, str], int] = {}
    for matrix in matrices(config):
        wanted = _type(matrix, config, mix)
        if types[matrix.path] != wanted:
            key = matrix.in_features, wanted, types[matrix.path]
            found[key] = found.get(key, 0) + 1
    for (width, wanted, given), count in found.items():
        blocks = TYPES_BY_NAME[wanted].weights
        yield (
            f"rows of {width} weights do not divide into {wanted}'s blocks of {blocks}: {count} "
            f"{'matrix is' if count == 1 else 'matrices are'} {given} instead, as llama.cpp makes them"
        )


def _fitting(matrix: Matrix, kind: str, mix: str) -> str:
    if matrix.in_features % TYPES_BY_NAME[kind].weights == 0:
        return kind
    if mix not in _MIXES:
        blocks = TYPES_BY_NAME[kind].weights
        raise InvalidRequestError(
            f"{matrix.path} has rows of {matrix.in_features} weights, which do not divide into {kind}'s blocks of "
            f"{blocks}; use F16 or BF16"
        )
    instead = _FALLBACKS.get(kind, "F16")
    return instead if matrix.in_features % TYPES_BY_NAME[instead].weights == 0 else "F16"


def _type(matrix: Matrix, config: MixtralConfig, mix: str) -> str:
    """What the mix wants, whether it fits or not."""
    if matrix.part == "router":
        return "F32"
    if mix not in _MIXES:
        return mix
    name, own = gguf_name(matrix).rpartition(".")[2], _MIXES[mix]
    if name == "output" or (name == "token_embd" and config.tie_word_embeddings):
        return "Q6_K" if matrix.in_features % TYPES_BY_NAME[own].weights == 0 else "Q8_0"
    eight = not config.is_dense and config.num_local_experts == 8
    if name in ("attn_k", "attn_v") and eight:
        return "Q8_0"
    if name == "attn_v":
        assert matrix.layer is not None
        raised = _value_type(matrix.layer, config, mix) or own
        return "Q5_K" if config.num_hidden_layers == 80 and raised in ("Q3_K", "Q4_K") else raised
    if name == "attn_output":
        if eight:
            return "Q5_K" if mix in _OUTPUT_BY_EXPERTS else own
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, own)
    if name == "ffn_down":
        assert matrix.layer is not None
        return _down_type(matrix.layer, config.num_hidden_layers, mix) or own
    return own


def _value_type(layer: int, config: MixtralConfig, mix: str) -> str | None:
    if mix == "Q2_K":
        return "Q4_K" if config.num_attention_heads >= 4 * config.num_key_value_heads else "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < 4):
        return "Q5_K"
    return "Q6_K" if mix in ("Q4_K_M", "Q5_K_M") and _gets_more(layer, config.num_hidden_layers) else None


def _down_type(layer: int, layers: int, mix: str) -> str | None:
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if mix == "Q3_K_L" or (mix == "Q4_K_S" and layer < layers // 8):
        return "Q5_K"
    return "Q6_K" if mix in ("Q4_K_M", "Q5_K_M") and _gets_more(layer, layers) else None


def _gets_more(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2

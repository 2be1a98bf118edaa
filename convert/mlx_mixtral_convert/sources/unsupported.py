"""Ways to quantise that are not read here: what they are, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["unsupported_method"]

_ORIGINAL = "convert from the original"
_KERNELS = "vector codebooks, for which MLX has no kernel"
_SMALL = f"{_ORIGINAL}; --recipe experts-2bit gives the same size"
_AUTO_ROUND = f"{_ORIGINAL}, or have AutoRound export its auto_gptq or auto_awq format and convert that"
_DEQUANTIZE = (
    "convert from the original, or, if only these weights exist, load them with transformers, call model.dequantize(), "
    "save that and convert it"
)
# quant_method -> what the weights are, and the way out.
_METHODS: dict[str, tuple[str, str]] = {
    "hqq": ("HQQ: integers with scales in the library's own layout", _DEQUANTIZE),
    "quanto": ("quanto: tensors in the library's own packing", _ORIGINAL),
    "torchao": ("torchao: tensor subclasses that only the library can read", _ORIGINAL),
    "exl2": ("EXL2: several bit widths per matrix, for ExLlamaV2's kernels", f"{_ORIGINAL}; --fit mixes bits here"),
    "exl3": ("EXL3: trellis codes for ExLlamaV3's kernels", f"{_ORIGINAL}; --fit mixes bits here"),
    "aqlm": (f"AQLM: {_KERNELS}", _SMALL),
    "vptq": (f"VPTQ: {_KERNELS}", _SMALL),
    "quip": ("QuIP#: rotated lattice codes, for which MLX has no kernel", _SMALL),
    "spqr": ("SpQR: integers and sparse outliers", _ORIGINAL),
    "squeezellm": ("SqueezeLLM: one codebook per row, and sparse outliers", _ORIGINAL),
    "higgs": ("HIGGS: rotated codes for FLUTE's kernels", _DEQUANTIZE),
    "eetq": ("EETQ: int8 laid out for one GPU's kernels", f"{_ORIGINAL}, with --bits 8"),
    "fp_quant": ("FP-Quant: rotated NVFP4 or MXFP4", f"{_ORIGINAL}, with --mode nvfp4 or mxfp4"),
    "fouroversix": ("Four Over Six: NVFP4 laid out for its own kernels", f"{_ORIGINAL}, with --mode nvfp4"),
    "nvfp4": ("NVFP4 laid out for one GPU's kernels", f"{_ORIGINAL}, with --mode nvfp4"),
    "mxfp4": ("MXFP4 in gpt-oss's layout, which Mixtral's experts do not use", f"{_ORIGINAL}, with --mode mxfp4"),
    "bitnet": ("BitNet: ternary weights for another kind of layer", "run it with the program it was made for"),
    "quark": ("AMD Quark", f"{_ORIGINAL}, or have Quark export compressed-tensors or FP8 and convert that"),
    "auto-round": ("AutoRound's own format", _AUTO_ROUND),
    "intel/auto-round": ("AutoRound's own format", _AUTO_ROUND),
    "metal": ("transformers' Metal kernels", _ORIGINAL),
    "sinq": ("SINQ: integers with separate scales for rows and columns", _ORIGINAL),
    "gguf": ("GGUF", "give the .gguf file itself"),
    "marlin": ("GPTQ in Marlin's layout, for one GPU's kernels", "convert the folder it was made from"),
    "experts_int8": ("int8 experts that vLLM makes while it loads", _ORIGINAL),
    "deepspeedfp": ("DeepSpeed's FP6 and FP8", _ORIGINAL),
    "tpu_int8": ("int8 that vLLM makes for TPUs", f"{_ORIGINAL}, with --bits 8"),
}  # fmt: skip


def unsupported_method(entry: Mapping[str, Any]) -> str:
    """What to say of weights whose ``quantization_config`` is ``entry``: the method, and what to do instead."""
    method = str(entry.get("quant_method", "an unnamed method"))
    known = _METHODS.get(method.lower().replace("-bit", ""))
    # As text a terminal can be given: control characters escaped.
    shown = repr(method[:40])[1:-1]
    if known is None:
        return f"the weights are quantised with {shown}, which is not supported; {_ORIGINAL}"
    return f"the weights are quantised with {shown} ({known[0]}), which is not supported; {known[1]}"

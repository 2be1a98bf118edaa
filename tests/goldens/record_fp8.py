"""Record FP8 modules that compressed-tensors packs, and what it unpacks them to.

    pip install torch==2.13.0 compressed-tensors==0.20.0 && python tests/goldens/record_fp8.py

`fp8.npz` holds for each strategy the tensors as stored (float8 as bytes) and `meant`, float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

FILE = Path(__file__).parent / "fp8.npz"


def main() -> None:
    torch.manual_seed(0)
    arrays: dict[str, np.ndarray] = {}
    for strategy in ("channel", "tensor"):
        args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = torch.randn(64, 128) * 0.05 * torch.rand(64, 1)
        peak = weight.abs().amax(dim=1, keepdim=True) if strategy == "channel" else weight.abs().amax().reshape(1)
        stored = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": peak / 448}, scheme)
        meant = FloatQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert stored["weight"].dtype == torch.float8_e4m3fn
        assert meant.dtype == torch.float32
        arrays[f"{strategy}.weight"] = stored["weight"].view(torch.uint8).numpy()
        arrays[f"{strategy}.weight_scale"] = stored["weight_scale"].numpy()
        arrays[f"{strategy}.meant"] = meant.numpy()
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()

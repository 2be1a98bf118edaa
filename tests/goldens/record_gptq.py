"""Record matrices of 3 bits as AutoGPTQ packs them: ``python tests/goldens/record_gptq.py AUTO_GPTQ``.

``AUTO_GPTQ`` is the package's folder out of its wheel (0.7.1; it need not be installed): its packer for the CPU is one file,
which needs torch and transformers. The integers, scales and zero points are ours, so that what the words mean is known.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "gptq3.npz"
OUTPUTS, INPUTS, GROUP, BITS = 64, 128, 32, 3


def main(package: Path) -> None:
    place = package / "nn_modules" / "qlinear" / "qlinear_cuda_old.py"
    spec = importlib.util.spec_from_file_location("packer", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    random = np.random.default_rng(3)
    codes = random.integers(0, 2**BITS, (OUTPUTS, INPUTS))
    # From 1 on: the first format stores one less.
    zeros = random.integers(1, 2**BITS, (OUTPUTS, INPUTS // GROUP))
    scales = (2.0 ** random.integers(-6, -2, zeros.shape)).astype(np.float32)
    meant = (codes - np.repeat(zeros, GROUP, 1)) * np.repeat(scales, GROUP, 1)
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = torch.tensor(meant, dtype=torch.float32)
    packed = module.QuantLinear(BITS, GROUP, INPUTS, OUTPUTS, False, use_cuda_fp16=False)
    g_idx = torch.arange(INPUTS, dtype=torch.int32) // GROUP
    packed.pack(linear, torch.tensor(scales), torch.tensor(zeros, dtype=torch.float32), g_idx)
    fields = {name: getattr(packed, name).numpy() for name in ("qweight", "qzeros", "scales", "g_idx")}
    np.savez_compressed(FILE, meant=meant.astype(np.float32), **fields)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Record a file of tensors as PyTorch writes it, and as it did before 1.6: ``python tests/goldens/record_torch.py``.

It needs the ``goldens`` group.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "torch"


def main() -> None:
    whole = torch.arange(24, dtype=torch.float32)
    tensors = OrderedDict(
        plain=whole.reshape(4, 6),
        parameter=torch.nn.Parameter(torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)),
        transposed=torch.arange(12, dtype=torch.float16).reshape(3, 4).T,
        shares_and_starts_later=whole[10:18].reshape(2, 4),
        vector=torch.ones(5),
        numbers=torch.arange(3),
    )
    FOLDER.mkdir(exist_ok=True)
    torch.save(tensors, FOLDER / "small.bin")
    torch.save(tensors, FOLDER / "small-before-1.6.bin", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()

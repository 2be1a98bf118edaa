"""bitsandbytes: nf4 and fp4, nested or not, and int8, as transformers saves them."""

from __future__ import annotations

from mlx_mixtral_convert.sources.packed.coded import CodedModules
from mlx_mixtral_convert.sources.packed.modules import packing_entry
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["BitsAndBytesSource", "detect"]


def detect(storage: Storage) -> bool:
    """Whether the configuration says bitsandbytes; the oldest ones only say ``load_in_4bit`` or ``load_in_8bit``."""
    entry = packing_entry(storage)
    if "quant_method" in entry:
        return str(entry["quant_method"]) == "bitsandbytes"
    return bool(entry.get("load_in_4bit") or entry.get("load_in_8bit"))


class BitsAndBytesSource(CodedModules):
    """A folder whose modules are 4-bit codes or bytes with a scale a row; those that were skipped are plain."""

"""Record small Mixtral folders that libraries quantise and save, and the logits of the weights they mean.

In one environment for each library, as their requirements contradict each other:

    pip install torch==2.13.0 llmcompressor==0.14.0.1 && python tests/goldens/record_packed.py llm-compressor
    pip install torch==2.13.0 transformers==5.24.0 bitsandbytes==0.50.2 compressed-tensors==0.20.1 nvidia-modelopt==0.47.0
    python tests/goldens/record_packed.py compressed-tensors transformers bitsandbytes modelopt

`packed/CASE` is a folder as the library saved it, of random weights made here: no licence but this project's applies to them.
`packed/logits.npz` holds for each case the logits of TOKENS by transformers in float32, with the weights the library itself makes of
the folder in float32. `packed/cases.json` says which library and version wrote each.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

FOLDER = Path(__file__).parent / "packed"
TOKENS = [1, 5, 9, 30, 2, 17, 8, 31]
WIDTH, EXPERTS = 96, 2
Tensors = dict[str, torch.Tensor]
Meant = dict[str, torch.Tensor]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "floats"
        torch.manual_seed(0)
        config = MixtralConfig(
            hidden_size=64, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=EXPERTS, num_experts_per_tok=2, vocab_size=32, max_position_embeddings=64, rope_theta=1e6,
            rms_norm_eps=1e-5, tie_word_embeddings=False,
        )  # fmt: skip
        model = MixtralForCausalLM(config)
        for value in model.parameters():
            # Rows and groups of different sizes, so that a scale in the wrong place shows.
            value.data *= torch.linspace(0.5, 3, value.shape[-1]) if value.ndim > 1 else 1
            if value.ndim > 1:
                value.data *= torch.linspace(0.5, 2, value.shape[-2])[:, None]
        model.to(torch.bfloat16).save_pretrained(floats)
        for library in sys.argv[1:]:
            for case, write, mean in LIBRARIES[library](floats):
                saved = FOLDER / case
                shutil.rmtree(saved, ignore_errors=True)
                write(saved)
                for file in saved.iterdir():
                    if file.name not in ("config.json", "hf_quant_config.json", "model.safetensors"):
                        file.unlink()
                tensors = load_file(saved / "model.safetensors")
                logits = logits_of(floats, mean(tensors, json.loads((saved / "config.json").read_text())))
                keep(case, library, logits)
                print(case, (saved / "model.safetensors").stat().st_size, float(logits.abs().max()))


def keep(case: str, library: str, logits: torch.Tensor) -> None:
    file, listed = FOLDER / "logits.npz", FOLDER / "cases.json"
    known = dict(np.load(file)) if file.is_file() else {}
    cases = json.loads(listed.read_text()) if listed.is_file() else {}
    names = {"llm-compressor": "llmcompressor", "modelopt": "nvidia-modelopt"}
    version = importlib.metadata.version(names.get(library, library))
    np.savez_compressed(file, **dict(sorted((known | {case: logits.numpy()}).items())))
    listed.write_text(json.dumps(dict(sorted((cases | {case: f"{library} {version}"}).items())), indent=1) + "\n")


def logits_of(floats: Path, meant: Meant) -> torch.Tensor:
    """With the weights ``meant`` by module in place of the model's own, float32."""
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32, attn_implementation="eager")
    own = dict(model.named_parameters())
    for module, weight in meant.items():
        assert weight.dtype == torch.float32
        if found := re.fullmatch(r"model\.layers\.0\.\w+\.experts\.(\d+)\.(\w+)", module):
            expert, matrix = int(found[1]), found[2]
            block = "model.layers.0.mlp.experts"
            if matrix in ("w2", "down_proj"):
                own[f"{block}.down_proj"].data[expert] = weight
            else:
                rows = slice(WIDTH) if matrix in ("w1", "gate_proj") else slice(WIDTH, None)
                own[f"{block}.gate_up_proj"].data[expert, rows] = weight
        else:
            name = f"{module}.weight".replace("block_sparse_moe", "mlp")
            assert own[name].shape == weight.shape
            own[name].data[:] = weight
    assert len(meant) >= 4
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


Cases = Iterator[tuple[str, Callable[[Path], None], Callable[[Tensors, dict[str, Any]], Meant]]]
IGNORED = ["lm_head", "re:.*gate$"]


def of_llm_compressor(floats: Path) -> Cases:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    def integers(bits: int, **kwargs: Any) -> QuantizationScheme:
        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=bits, type="int", **kwargs))

    blocks = preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    blocks.weights.block_structure = [32, 48]
    group = {"strategy": "group", "group_size": 32}
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    schemes: dict[str, Any] = {
        "fp8-channel": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
        "fp8-block": blocks,
        "int4-group": integers(4, symmetric=True, **group),
        "int4-group-asymmetric": integers(4, symmetric=False, **group),
        "int3-group": integers(3, symmetric=True, **group),
        "int8-channel": integers(8, symmetric=True, strategy="channel"),
        "int8-w8a8": preset_name_to_scheme("W8A8", ["Linear"]),
        "nvfp4": preset_name_to_scheme("NVFP4A16", ["Linear"]),
        "mxfp4": preset_name_to_scheme("MXFP4A16", ["Linear"]),
        "mxfp8": preset_name_to_scheme("MXFP8A16", ["Linear"]),
    }
    for case, scheme in schemes.items():

        def write(saved: Path, scheme: Any = scheme, case: str = case) -> None:
            model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16)
            recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=IGNORED)
            oneshot(model=model, recipe=recipe)
            model.save_pretrained(saved, save_compressed=True)
            if case == "fp8-channel":
                with_cache_scales(saved, cache)

        yield case, write, decompressed


def with_cache_scales(saved: Path, cache: dict[str, Any]) -> None:
    """As a recipe with a kv_cache_scheme adds them, which only a calibration on a device fills."""
    tensors, config = load_file(saved / "model.safetensors"), json.loads((saved / "config.json").read_text())
    tensors |= {f"model.layers.0.self_attn.{name}_scale": torch.tensor([0.01]) for name in "kv"}
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    config["quantization_config"]["kv_cache_scheme"] = cache
    (saved / "config.json").write_text(json.dumps(config, indent=1))


def modules_of(tensors: Tensors, field: str) -> list[str]:
    return [name.removesuffix(f".{field}") for name in tensors if name.endswith(f".{field}")]


def decompressed(tensors: Tensors, config: dict[str, Any]) -> Meant:
    """By compressed-tensors' own compressors and quantisation arithmetic, in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    (group,) = config["quantization_config"]["config_groups"].values()
    kind = group["format"] or config["quantization_config"]["format"]
    scheme = QuantizationScheme.model_validate({k: v for k, v in group.items() if k != "format"})
    meant = {}
    for module in modules_of(tensors, "weight_scale"):
        state = {n.removeprefix(f"{module}."): v for n, v in tensors.items() if n.startswith(f"{module}.")}
        scale = state["weight_scale"]
        if scale.dtype in (torch.uint8, torch.float8_e4m3fn) and "weight_packed" in state:
            codes = unpack_fp4_from_uint8(
                state["weight_packed"], *state["weight_packed"].shape[:1], 2 * state["weight_packed"].shape[1]
            )
            scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
            meant[module] = dequantize(
                x_q=codes.float(), scale=scale, args=scheme.weights, dtype=torch.float32,
                global_scale=state.get("weight_global_scale"),
            )  # fmt: skip
            continue
        if scale.dtype == torch.uint8:
            scale = torch.exp2(scale.float() - 127)
            meant[module] = dequantize(x_q=state["weight"], scale=scale, args=scheme.weights, dtype=torch.float32)
            continue
        state["weight_scale"] = scale.float()
        meant[module] = BaseCompressor.get_value_from_registry(kind).decompress(state, scheme)["weight"]
    return meant


LIBRARIES: dict[str, Callable[[Path], Cases]] = {"llm-compressor": of_llm_compressor}


if __name__ == "__main__":
    main()

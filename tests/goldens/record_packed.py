"""Record small Mixtral folders that libraries quantise and save, and the logits of the weights they mean.

In one environment for each library, as their requirements contradict each other:

    pip install torch==2.13.0 llmcompressor==0.14.0.1 && python tests/goldens/record_packed.py llm-compressor
    pip install torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1 nvidia-modelopt==0.47.0
    python tests/goldens/record_packed.py compressed-tensors transformers modelopt
    pip install torch==2.13.0 transformers==4.57.6 bitsandbytes==0.50.2 accelerate
    python tests/goldens/record_packed.py bitsandbytes

`packed/CASE` is a folder as the library saved it, of random weights made here: no licence but this project's applies to them.
`packed/logits.npz` holds for each case the logits of TOKENS by transformers in float32, with the weights the library itself
makes of the folder in float32. `packed/cases.json` says which library and version wrote each.
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
            hidden_size=32, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
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
                logits = logits_of(floats, tensors, mean(tensors, json.loads((saved / "config.json").read_text())))
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


def logits_of(floats: Path, tensors: Tensors, meant: Meant) -> torch.Tensor:
    """With the weights ``meant`` by module and the saved norms in place of the model's own, float32."""
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32, attn_implementation="eager")
    own = dict(model.named_parameters())
    for name, value in tensors.items():
        if "norm" in name:
            own[name].data[:] = value.float()
    for module, weight in meant.items():
        assert weight.dtype == torch.float32
        if f"{module}.weight" in own:
            assert own[f"{module}.weight"].shape == weight.shape
            own[f"{module}.weight"].data[:] = weight
        elif found := re.fullmatch(r"model\.layers\.0\.\w+\.experts\.(\d+)\.(\w+)", module):
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
    blocks.weights.block_structure = [16, 24]
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


def of_compressed_tensors(floats: Path) -> Cases:
    """What llm-compressor had no preset for: the compressors on each matrix, under its names."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args: dict[str, dict[str, Any]] = {
        "mxfp6": {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True},
        "fp8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
    }
    for case, entry in args.items():
        kind = {"mxfp6": "mxfp6-pack-quantized", "fp8-tensor": "float-quantized"}[case]
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**entry))

        def write(saved: Path, scheme: Any = scheme, kind: str = kind) -> None:
            tensors = {}
            for name, value in load_file(floats / "model.safetensors").items():
                if value.ndim < 2 or re.search("embed|lm_head|gate", name):
                    tensors[name] = value
                    continue
                module, weight = name.removesuffix(".weight"), value.float()
                for index, own in ((1, "gate_proj"), (2, "down_proj"), (3, "up_proj")):
                    module = module.replace(f".w{index}", f".{own}")
                if scheme.weights.num_bits == 6:
                    scale = torch.exp2(torch.floor(torch.log2(weight.unflatten(1, (-1, 32)).abs().amax(2) / 7.5)) + 1)
                else:
                    scale = weight.abs().amax().reshape(1) / 448
                state = {"weight": weight, "weight_scale": scale}
                stored = BaseCompressor.get_value_from_registry(kind).compress(state, scheme)
                tensors |= {f"{module}.{field}": field_value for field, field_value in stored.items()}
            config = json.loads((floats / "config.json").read_text())
            group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json"), "format": kind}
            entry = {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}
            saved.mkdir()
            save_file(tensors, saved / "model.safetensors", {"format": "pt"})
            (saved / "config.json").write_text(json.dumps(config | {"quantization_config": entry}, indent=1))

        def mean(tensors: Tensors, config: dict[str, Any], case: str = case) -> Meant:
            if case != "mxfp6":
                return decompressed(tensors, config)
            meant = {}
            for module in modules_of(tensors, "weight_packed"):
                packed = tensors[f"{module}.weight_packed"]
                codes = unpack_fp6_from_uint8(packed, len(packed), packed.shape[1] * 4 // 3, torch.float32)
                scale = torch.exp2(tensors[f"{module}.weight_scale"].float() - 127)
                meant[module] = codes * scale.repeat_interleave(32, 1)
            return meant

        yield case, write, mean


def of_transformers(floats: Path) -> Cases:
    """Its own FP8: what it saves has experts apart and their scales stacked."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    # It asks for a GPU, to compute with; to quantise it needs none.
    FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None

    def write(saved: Path) -> None:
        entry = FineGrainedFP8Config(weight_block_size=(16, 16), modules_to_not_convert=["lm_head", "gate"])
        AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16, quantization_config=entry).save_pretrained(
            saved
        )

    def mean(tensors: Tensors, config: dict[str, Any]) -> Meant:
        size, meant = config["quantization_config"]["weight_block_size"], {}
        block = "model.layers.0.block_sparse_moe.experts"
        for name, weight in tensors.items():
            if weight.dtype != torch.float8_e4m3fn:
                continue
            module = name.removesuffix(".weight")
            if (scale := tensors.get(f"{module}.weight_scale_inv")) is None:
                expert, own = module.removeprefix(f"{block}.").split(".")
                scale = tensors[f"{block}.{'down' if own == 'w2' else 'gate_up'}_proj_scale_inv"][int(expert)]
                half = len(scale) // 2
                scale = scale if own == "w2" else scale[:half] if own == "w1" else scale[half:]
            meant[module] = _dequantize_fp8_weight(weight, scale, size, torch.float32)
        return meant

    yield "fp8-transformers", write, mean


def of_bitsandbytes(floats: Path) -> Cases:
    """Through transformers 4, which knows experts one by one."""
    import bitsandbytes.functional as bnb
    from transformers import BitsAndBytesConfig

    ways: dict[str, dict[str, Any]] = {
        "bnb-nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
        "bnb-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "bnb-int8": {"load_in_8bit": True},
    }
    for case, options in ways.items():

        def write(saved: Path, options: dict[str, Any] = options) -> None:
            entry = BitsAndBytesConfig(**options)
            AutoModelForCausalLM.from_pretrained(
                floats, dtype=torch.bfloat16, quantization_config=entry, device_map="cpu"
            ).save_pretrained(saved)

        def mean(tensors: Tensors, config: dict[str, Any]) -> Meant:
            meant = {
                module: bnb.int8_vectorwise_dequant(tensors[f"{module}.weight"], tensors[f"{module}.SCB"])
                for module in modules_of(tensors, "SCB")
            }
            for module in modules_of(tensors, "weight.quant_map"):
                own = f"{module}.weight."
                fields = {n.removeprefix(own): v for n, v in tensors.items() if n.startswith(own)}
                state = bnb.QuantState.from_dict(fields, torch.device("cpu"))
                # As one row: blocks run on over the ends of rows, which this release's kernel for CPUs, unlike those for
                # GPUs and its own quantiser, does not follow where a row is no multiple of a block.
                shape, state.shape, state.dtype = state.shape, torch.Size([1, state.shape.numel()]), torch.float32
                flat = bnb.dequantize_4bit(tensors[f"{module}.weight"].view(torch.uint8).reshape(1, -1), state)
                meant[module] = flat.reshape(shape)
            return meant

        yield case, write, mean


def of_modelopt(floats: Path) -> Cases:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    configs = {
        "modelopt-fp8": mtq.FP8_DEFAULT_CFG, "modelopt-nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "modelopt-int8": mtq.INT8_SMOOTHQUANT_CFG,
    }  # fmt: skip
    for case, entry in configs.items():

        def write(saved: Path, case: str = case, entry: Any = entry) -> None:
            model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16)
            model = mtq.quantize(model, entry, lambda model: model(torch.tensor([TOKENS])))
            export_hf_checkpoint(model, export_dir=saved)
            if case == "modelopt-fp8":
                as_before(saved)

        def mean(tensors: Tensors, config: dict[str, Any]) -> Meant:
            meant = {}
            for module in modules_of(tensors, "weight_scale"):
                weight, scale = (tensors[f"{module}.{field}"] for field in ("weight", "weight_scale"))
                if weight.dtype == torch.uint8:
                    shape = torch.Size([len(weight), 2 * weight.shape[1]])
                    meant[module] = NVFP4QTensor(shape, torch.float32, weight).dequantize(
                        torch.float32,
                        scale=scale,
                        double_scale=tensors[f"{module}.weight_scale_2"],
                        block_sizes={-1: 16},
                    )
                    continue
                if scale.dtype == torch.uint8:
                    scale = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
                meant[module] = weight.float() * (scale[:, None] if scale.ndim == 1 else scale)
                if (before := tensors.get(f"{module}.pre_quant_scale")) is not None:
                    meant[module] = meant[module] * before.float()
            return meant

        yield case, write, mean


def as_before(saved: Path) -> None:
    """Releases before 0.27 wrote hf_quant_config.json alone; scales of a cache in FP8 as they name them."""
    tensors, config = load_file(saved / "model.safetensors"), json.loads((saved / "config.json").read_text())
    tensors |= {f"model.layers.0.self_attn.{name}_proj.{name}_scale": torch.tensor(0.01) for name in "kv"}
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    del config["quantization_config"]
    (saved / "config.json").write_text(json.dumps(config, indent=1))


LIBRARIES: dict[str, Callable[[Path], Cases]] = {
    "llm-compressor": of_llm_compressor,
    "compressed-tensors": of_compressed_tensors,
    "transformers": of_transformers,
    "bitsandbytes": of_bitsandbytes,
    "modelopt": of_modelopt,
}


if __name__ == "__main__":
    main()

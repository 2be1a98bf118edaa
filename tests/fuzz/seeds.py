"""The smallest valid checkpoints of every format, as file name to bytes: what the mutations start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mixtral import load
from mlx_mixtral.cli.chat.conversation import Conversation
from mlx_mixtral.config.layout import matrices
from mlx_mixtral.evaluation.forward import TopTokens
from mlx_mixtral.evaluation.reference import ReferenceHeader, ReferenceWriter
from mlx_mixtral.evaluation.routing.record import RoutingRecord
from mlx_mixtral.experts.trace import published_trace
from mlx_mixtral_convert import convert
from mlx_mixtral_convert.calibration.file import Calibration, identity
from mlx_mixtral_convert.calibration.statistics import input_name
from mlx_mixtral_convert.packing.measure import E4M3
from mlx_mixtral_convert.sources import open_source
from tests.convert import packers
from tests.convert.export_support import spm_model
from tests.convert.module_packers import fp8_blocks, integers, lookup, nvfp4, row_pairs
from tests.convert.native_writer import make_native, native
from tests.convert.support import CONFIG, Floats, dense_config, fused, make_checkpoint, weights
from tests.convert.torch_writer import save_torch
from tests.fuzz.gguf_file import GgufFile, tiny
from tests.fuzz.mutate_torch import entries_of, rewritten

__all__ = ["FORMATS", "Files", "Seed", "make_seeds"]

FORMATS = ("gguf", "safetensors", "torch", "index", "companion", "config", "own")
Files = dict[str, bytes]

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """``targets`` are the files worth mutating; ``gguf`` is the structure a GGUF file was written from.

    A source that is one file is named by ``single``. ``quantised`` sources can be converted with ``exact`` too.
    """

    name: str
    files: Files
    targets: tuple[str, ...]
    quantised: bool = False
    single: str | None = None
    gguf: GgufFile | None = field(default=None, repr=False)


def make_seeds(folder: Path) -> dict[str, list[Seed]]:
    """Seeds of every format; ``folder`` is where the writers put their files first."""
    return {
        "gguf": list(_gguf()),
        "safetensors": list(_safetensors(folder)),
        "torch": list(_torch(folder)),
        "index": list(_index(folder)),
        "companion": list(_companions(folder)),
        "config": [Seed("hf", read_folder(folder / "hf"), ("config.json",))],
        "own": list(_own(folder)),
    }


def read_folder(folder: Path) -> Files:
    return {path.name: _undated(path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()}


def _undated(data: bytes) -> bytes:
    """A zip without the time it was written at, so that a case is the same tomorrow; anything else as it is."""
    return rewritten(entries_of(data)) if data.startswith(b"PK") else data


def _gguf() -> Iterator[Seed]:
    made = {
        "f16": tiny("F16"), "bf16-bpe": tiny("BF16", vocabulary="gpt2"), "apart": tiny("Q8_0", merged=False),
        "dense": tiny("Q4_0", experts=0), "q4_1": tiny("Q4_1"), "q5_0": tiny("Q5_0"), "iq4_nl": tiny("IQ4_NL"),
        "mxfp4": tiny("MXFP4"), "q4_k": tiny("Q4_K", experts=0, hidden=256), "q6_k": tiny("Q6_K", experts=0, hidden=256),
    }  # fmt: skip
    for name, file in made.items():
        quantised = not name.startswith(("f16", "bf16"))
        yield Seed(name, {"m.gguf": file.write()}, ("m.gguf",), quantised, "m.gguf", file)


def _safetensors(folder: Path) -> Iterator[Seed]:
    one = ("model.safetensors",)
    yield Seed("hf", read_folder(make_checkpoint(folder / "hf", **TINY)), one)
    yield Seed("fused", read_folder(make_checkpoint(folder / "fused", layout="fused", dtype="F16", **TINY)), one)
    yield Seed("dense", read_folder(make_checkpoint(folder / "dense", **TINY | dense_config())), one)
    params = CONFIG | TINY
    made = native(weights(params), params)
    consolidated = "consolidated.safetensors"
    yield Seed("native", read_folder(make_native(folder / "native", made, params, consolidated)), (consolidated,))
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    packers.make_packed(folder / "awq", awq, packers.grouped_packer(packers.awq, 32), **TINY)
    yield Seed("awq", read_folder(folder / "awq"), one, quantised=True)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    packers.make_packed(folder / "gptq", gptq, packers.grouped_packer(packers.gptq, 32), **TINY)
    yield Seed("gptq", read_folder(folder / "gptq"), one, quantised=True)
    order = packers.grouped_packer(packers.gptq, 32, act_order=True)
    packers.make_packed(folder / "order", gptq | {"desc_act": True}, order, **TINY)
    yield Seed("gptq-order", read_folder(folder / "order"), one, quantised=True)
    fp8 = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*gate$"]}
    packers.make_packed(folder / "fp8", fp8, lambda _, weight: packers.fp8(weight, (len(weight), 1)), **TINY)
    yield Seed("fp8", read_folder(folder / "fp8"), one, quantised=True)
    for name, entry, pack, kept in _coded():
        packers.make_packed(folder / name, entry, lambda _, weight, pack=pack: pack(weight), plain_bytes=kept, **TINY)
        yield Seed(name, read_folder(folder / name), one, quantised=True)
    convert(folder / "hf", folder / "mlx")
    yield Seed("mlx", read_folder(folder / "mlx"), _weights(folder / "mlx"), quantised=True)


def _coded() -> Iterator[tuple[str, dict[str, Any], Callable[[Floats], Any], tuple[str, ...]]]:
    """Name, configuration, packer and fields of bytes of modules that say by their tensors how they are packed."""
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    packed = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {"group_0": scheme}}
    yield "int4", packed, partial(integers, bits=4, group=32, zeros="packed", order=True), ()
    floats = partial(nvfp4, table=E4M3, whole=1, field="weight_global_scale", codes_field="weight_packed")
    yield "nvfp4", packed, floats, ("weight_packed",)
    blocks = partial(fp8_blocks, table=E4M3, rows=32, columns=32, field="weight_scale_inv", powers=True)
    yield "fp8-block", {"quant_method": "fp8", "weight_block_size": [32, 32]}, blocks, ("weight_scale_inv",)
    yield "nf4", {"quant_method": "bitsandbytes"}, lookup, ("weight", "weight.absmax", "bitsandbytes__nf4")
    awq = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
    yield "row-pairs", awq, partial(row_pairs, group=32, scaled_inputs=True), ("weight",)


def _torch(folder: Path) -> Iterator[Seed]:
    config = CONFIG | TINY
    made = weights(config)
    file = _undated(save_torch(folder / "pytorch_model.bin", made).read_bytes())
    entries = json.dumps(config).encode()
    yield Seed("bin", {"config.json": entries, "pytorch_model.bin": file}, ("pytorch_model.bin",))
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    parts = [dict(list(made.items())[number::2]) for number in (0, 1)]
    shards: Files = {"config.json": entries}
    for name, part in zip(names, parts, strict=True):
        shards[name] = _undated(save_torch(folder / name, part, "F16").read_bytes())
    placed = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    shards["pytorch_model.bin.index.json"] = json.dumps({"weight_map": placed}).encode()
    yield Seed("bin-shards", shards, tuple(names))
    stacked = native(made, config, stacked=True)
    pth = "consolidated.00.pth"
    yield Seed("pth", read_folder(make_native(folder / "pth", stacked, config, pth)), (pth,))
    fused_bin = _undated(save_torch(folder / "fused.bin", fused(made, config)).read_bytes())
    yield Seed("fused-bin", {"config.json": entries, "pytorch_model.bin": fused_bin}, ("pytorch_model.bin",))


def _index(folder: Path) -> Iterator[Seed]:
    """The JSON files: the index first of all, the configuration it is read with."""
    index = "model.safetensors.index.json"
    yield Seed("hf", read_folder(make_checkpoint(folder / "two", shards=2, **TINY)), (index, index, "config.json"))
    (folder / "again").mkdir()
    torch = next(seed for seed in _torch(folder / "again") if seed.name == "bin-shards")
    yield Seed("bin", torch.files, ("pytorch_model.bin.index.json",))
    yield Seed("mlx", read_folder(folder / "mlx"), (index, "config.json"), quantised=True)
    config = CONFIG | TINY
    made = native(weights(config), config)
    yield Seed(
        "native",
        read_folder(make_native(folder / "params", made, config, "consolidated.safetensors")),
        ("params.json",),
    )
    for name in ("awq", "gptq", "fp8", "int4", "nf4"):
        yield Seed(name, read_folder(folder / name), ("config.json",), quantised=True)


TOKENIZER_JSON: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
    "added_tokens": [{"id": 12, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False}],
    "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False},
    "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False},
    "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
              "vocab": {"<unk>": 0, "\u2581": 1, "a": 2, "b": 3, "ab": 4}, "merges": [["a", "b"]]},
}  # fmt: skip


def _companions(folder: Path) -> Iterator[Seed]:
    """A checkpoint with every file that may lie beside the weights."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    beside: dict[str, Any] = {
        "tokenizer.json": TOKENIZER_JSON, "added_tokens.json": {"<x>": 20}, "special_tokens_map.json": {"bos_token": "<s>"},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {"21": {"content": "<y>"}}},
        "chat_template.json": {"chat_template": template}, "generation_config.json": {"eos_token_id": [2, 3]},
    }  # fmt: skip
    files = read_folder(folder / "hf") | {name: json.dumps(entries).encode() for name, entries in beside.items()}
    files |= {"LICENSE": b"Do what you want.", "chat_template.jinja": template.encode(), "tokenizer.model": spm_model()}
    own = tuple(sorted(files.keys() - {"config.json", "model.safetensors"}))
    yield Seed("spm", files, own)
    fast = {name: data for name, data in files.items() if name != "tokenizer.model"}
    yield Seed("json", fast, ("tokenizer.json", "tokenizer_config.json"))


def _own(folder: Path) -> Iterator[Seed]:
    """Files that commands write, beside the checkpoint they belong to."""
    place = folder / "hf"
    made = folder / "own"
    made.mkdir()
    with load(place) as model:
        model.save_prompt(made / "saved.prompt", [1, 2, 3])
    with open_source(place) as source:
        listed = {input_name(m): m for m in matrices(source.config) if m.part not in ("router", "embedding")}
        squares = {name: np.ones((m.num_experts or 1, m.in_features), np.float32) for name, m in listed.items()}
        counts = {name: np.full(len(held), 9, np.int64) for name, held in squares.items()}
        losses = {"all": {"4-bit g64": 0.1}}
        Calibration(identity(source), np.ones((2, 4), np.int32), squares, counts, losses).save(made / "calibration")
    RoutingRecord.of_trace(published_trace(2, 4, 2, tokens=64)).save(made / "routing.trace")
    header = ReferenceHeader("m", "i", "t", "v", vocab_size=32, window=4, stride=4, tokens=8, top_k=2)
    with ReferenceWriter(made / "reference", header) as writer:
        ids, lines = np.zeros((8, 2), np.int32), np.zeros((8, 2), np.float32)
        writer.write(0, TopTokens(ids, lines, lines[:, 0]), lines[:, 0])
        writer.finish()
    Conversation("Be brief.").save(made / "talk.json")
    for path in sorted(made.iterdir()):
        files = read_folder(place) | {path.name: path.read_bytes()}
        yield Seed(path.name, files, (path.name,))


def _weights(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.glob("*.safetensors")))

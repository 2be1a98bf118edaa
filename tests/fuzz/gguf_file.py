"""A GGUF file as lists of keys and tensors, so that a mutation can bend one field and the rest is written around it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALIGNMENT = 32
U32, F32, STRING, ARRAY = 4, 6, 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
# Number, weights and bytes of a block.
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q8_0": (8, 32, 34), "IQ4_NL": (20, 32, 18), "MXFP4": (39, 32, 17), "Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210),
    "Q3_K": (11, 256, 110), "IQ2_XXS": (16, 256, 66),
}  # fmt: skip


@dataclass
class Key:
    """``kind`` is GGUF's number of the value's type; ``item`` that of an array's items."""

    name: str
    kind: int
    value: Any
    item: int = 0
    count: int | None = None

    def write(self) -> bytes:
        return text(self.name) + struct.pack("<I", self.kind) + self._value()

    def _value(self) -> bytes:
        if self.kind == STRING:
            return text(str(self.value))
        if self.kind != ARRAY:
            return scalar(self.kind, self.value)
        values = self.value if isinstance(self.value, list) else [self.value]
        count = len(values) if self.count is None else self.count
        items = [text(str(v)) if self.item == STRING else scalar(self.item, v) for v in values]
        return struct.pack("<IQ", self.item, count & (2**64 - 1)) + b"".join(items)


@dataclass
class Tensor:
    """``axes`` fastest first, as the file lists them; ``offset`` None follows from the tensors before."""

    name: str
    axes: list[int]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class GgufFile:
    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None

    def write(self) -> bytes:
        counts = [
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.key_count is None else self.key_count,
        ]
        head = b"GGUF" + struct.pack("<IQQ", self.version & 0xFFFFFFFF, *(count & (2**64 - 1) for count in counts))
        head += b"".join(key.write() for key in self.keys)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            head += text(tensor.name) + struct.pack("<I", len(tensor.axes))
            head += b"".join(struct.pack("<Q", axis & (2**64 - 1)) for axis in tensor.axes)
            head += struct.pack("<IQ", tensor.kind & 0xFFFFFFFF, offset & (2**64 - 1))
            data += tensor.data + bytes(-len(tensor.data) % ALIGNMENT)
        return head + bytes(-len(head) % ALIGNMENT) + data


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    """``value`` as type ``kind``; what does not fit is cut to its low bits."""
    code = SCALARS.get(kind, "<I")
    if kind in (6, 12):
        try:
            return struct.pack(code, float(value))
        except (OverflowError, ValueError, TypeError):
            return struct.pack(code, float("inf"))
    number = int(value) if isinstance(value, int | float) and abs(value) < 2**70 else 1
    size = struct.calcsize(code)
    return (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def tiny(kind: str, *, experts: int = 2, merged: bool = True, hidden: int = 64, vocabulary: str = "llama") -> GgufFile:
    """One layer with matrices of ``kind``: its bytes are below 0x3C, so every float16 in them is finite and below one."""
    random = np.random.default_rng(7)
    width, heads, kv_heads, vocab = hidden, 2, 1, 32
    kv = hidden // heads * kv_heads
    made = GgufFile()

    def tensor(name: str, rows: int, columns: int, stacked: int = 0, type_name: str = kind) -> None:
        number, weights, nbytes = TYPES[type_name]
        size = (stacked or 1) * rows * columns // weights * nbytes
        raw = random.integers(0, 256, size, np.uint8) & np.uint8(0x3B)
        axes = [columns, rows, stacked] if stacked else [columns, rows]
        made.tensors.append(Tensor(f"{name}.weight", axes, number, raw.tobytes()))

    def norm(name: str) -> None:
        made.tensors.append(Tensor(f"{name}.weight", [hidden], 0, np.ones(hidden, np.float32).tobytes()))

    tensor("token_embd", vocab, hidden)
    norm("output_norm")
    tensor("output", vocab, hidden)
    norm("blk.0.attn_norm")
    norm("blk.0.ffn_norm")
    for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("output", hidden)):
        tensor(f"blk.0.attn_{name}", rows, hidden)
    if experts:
        tensor("blk.0.ffn_gate_inp", experts, hidden, 0, "F32")
    for name in ("gate", "up", "down"):
        if not experts:
            tensor(f"blk.0.ffn_{name}", width, hidden)
        elif merged:
            tensor(f"blk.0.ffn_{name}_exps", width, hidden, experts)
        else:
            for expert in range(experts):
                tensor(f"blk.0.ffn_{name}.{expert}", width, hidden)
    counts = {
        "context_length": 64, "embedding_length": hidden, "block_count": 1, "feed_forward_length": width,
        "attention.head_count": heads, "attention.head_count_kv": kv_heads, "rope.dimension_count": hidden // heads,
    }  # fmt: skip
    if experts:
        counts |= {"expert_count": experts, "expert_used_count": 1}
    made.keys = [Key("general.architecture", STRING, "llama"), Key("general.alignment", U32, ALIGNMENT)]
    made.keys += [Key(f"llama.{name}", U32, value) for name, value in counts.items()]
    made.keys += [
        Key("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        Key("llama.rope.freq_base", F32, 1e6),
        *_tokenizer(vocabulary, vocab),
    ]
    return made


def _tokenizer(kind: str, vocab: int) -> list[Key]:
    prefix = "tokenizer.ggml"
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(vocab - 6)), "ab", "abc", "\u2581a"]
    keys = [
        Key(f"{prefix}.model", STRING, kind),
        Key(f"{prefix}.tokens", ARRAY, tokens, STRING),
        Key(f"{prefix}.token_type", ARRAY, [2, 3, 3] + [1] * (vocab - 3), 5),
        Key(f"{prefix}.bos_token_id", U32, 1),
        Key(f"{prefix}.eos_token_id", U32, 2),
        Key(f"{prefix}.add_bos_token", 7, 1),
        Key("tokenizer.chat_template", STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ]
    if kind == "llama":
        return [*keys, Key(f"{prefix}.scores", ARRAY, [-float(i) for i in range(vocab)], F32)]
    return [
        *keys,
        Key(f"{prefix}.pre", STRING, "tekken"),
        Key(f"{prefix}.merges", ARRAY, ["a b", "ab c"], STRING),
    ]

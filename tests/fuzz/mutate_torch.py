"""Torch files bent behind the checksums: pickles that import and call, storages cut short, directories that lie."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile

__all__ = ["Entries", "bend_torch", "entries_of", "rewritten"]

Entries = list[tuple[str, bytes]]

# What a hostile pickle does; the campaign's canary sees every one of these that runs.
HOSTILE = (
    b"cos\nsystem\n(X\x04\0\0\0truetR0", b"cposix\nsystem\nX\x04\0\0\0true\x85R0", b"cbuiltins\neval\n(X\x03\0\0\01+1tR0",
    b"c__builtin__\nexec\n(X\x04\0\0\0passtR0", b"cbuiltins\nopen\n(X\x06\0\0\0pwned\nX\x01\0\0\0wtR0",
    b"csubprocess\nPopen\n(](X\x04\0\0\0trueetR0", b"X\x02\0\0\0osX\x06\0\0\0system\x93X\x04\0\0\0true\x85R0",
    b"(X\x04\0\0\0trueios\nsystem\n0", b"(cos\nsystem\nX\x04\0\0\0trueo0", b"cos\nsystem\n)\x810", b"ctorch\nload\n0",
    b"cnumpy.core.multiarray\n_reconstruct\n0", b"ccollections\nOrderedDict\n(X\x01\0\0\0atR0", b"\x82\x01", b"\x97",
    b"ccollections\nOrderedDict\n)R(X\x01\0\0\0ahelloNub", b"P0\n", b"Q",
)  # fmt: skip
# Operations that unbalance the stack, and literals that are large or deep.
ODD = (
    b"0", b"1", b"2", b"(", b"t", b"a", b"e", b"s", b"u", b"R", b"b", b"N", b"}", b"]", b")", b".", b"\x85", b"\x86", b"\x87",
    b"q\0", b"r\xff\xff\xff\x7f", b"h\0", b"j\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"M\xff\xff", b"\x94",
    b"I1" + b"0" * 5000 + b"\n",
    b"\x8a\xff" + b"\x7f" * 255, b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"B\xff\xff\xff\x7f",
    b"G\x7f\xf0\0\0\0\0\0\0", b"F1e999\n", b"(" * 50_000, b"(" * 3000 + b"t" * 3000,
    b")\x85" + b"\x85" * 30_000, b"\x95" + b"\xff" * 8,
    b"]q\xfah\xfaa", b"}q\xfbX\x01\0\0\0ah\xfbs", b"L1" + b"0" * 5000 + b"L\n", b"S'x'\n", b"V\\ud800\n", b"\x80\xff",
)  # fmt: skip
RENAMED = (
    (b"BFloat16", b"Float"), (b"BFloat16", b"Long"), (b"cpu", b"\xff\xff\xff"), (b"storage", b"stOrage"),
    (b"_rebuild_tensor_v2", b"_rebuild_qtensor"),
)  # fmt: skip
NUMBERS = (0, 1, 2, 63, 65, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
NAMES = ("../../evil", "/evil", "a/data.pkl", "x" * 60_000, "\0", "pytorch_model/data/0", "data.pkl")


def bend_torch(rng: random.Random, data: bytes) -> bytes:
    entries = entries_of(data)
    what = rng.random()
    if what < 0.65:
        entries = [(name, _pickle(rng, raw) if name.endswith("data.pkl") else raw) for name, raw in entries]
    elif what < 0.8:
        _entries(rng, entries)
    packed = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
    data = rewritten(entries, packed)
    return _directory(rng, data) if what >= 0.8 else data


def entries_of(data: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def rewritten(entries: Entries, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of ``entries``, without dates: the same bytes whenever it is made."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as archive:
        warnings.simplefilter("ignore")  # a name twice is meant
        for name, raw in entries:
            archive.writestr(zipfile.ZipInfo(name), raw, compression)
    return out.getvalue()


def _pickle(rng: random.Random, raw: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, what = rng.randrange(len(raw) or 1), rng.random()
        if what < 0.25:
            # After the head, at the very end, or in the middle of something.
            at = rng.choice((2, max(len(raw) - 1, 0), max(len(raw) - 2, 0), at))
            raw = raw[:at] + rng.choice(HOSTILE) + raw[at:]
        elif what < 0.45:
            raw = raw[:at] + rng.choice(ODD) + raw[at:]
        elif what < 0.6:
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        elif what < 0.75:
            raw = _integer(rng, raw)
        elif what < 0.85:
            raw = raw[:at] + raw[at + rng.choice((1, 5, 64)) :]
        elif what < 0.92:
            raw = raw[: at + 200] + raw[at:]
        else:
            raw = raw.replace(*rng.choice(RENAMED))
    return raw


def _integer(rng: random.Random, raw: bytes) -> bytes:
    """A size, stride, offset or count: they are written as J and four bytes."""
    places = [at for at in range(len(raw) - 5) if raw[at : at + 1] == b"J"]
    if not places:
        return raw
    at = rng.choice(places)
    (value,) = struct.unpack_from("<i", raw, at + 1)
    if rng.random() < 0.5:
        value += rng.choice((-64, -1, 1, 64, value))
        return raw[: at + 1] + struct.pack("<i", max(-(2**31), min(2**31 - 1, value))) + raw[at + 5 :]
    return raw[:at] + b"\x8a\x09" + struct.pack("<Qb", rng.choice(NUMBERS), rng.choice((0, -1))) + raw[at + 5 :]


def _entries(rng: random.Random, entries: Entries) -> None:
    at = rng.randrange(len(entries))
    name, raw = entries[at]
    what = rng.randrange(5)
    if what == 0:
        del entries[at]
    elif what == 1:
        entries.append((name, raw[: rng.randrange(len(raw) or 1)]))
    elif what == 2:
        entries[at] = (rng.choice((*NAMES, rng.choice(entries)[0])), raw)
    elif what == 3:
        entries[at] = (name, raw[: rng.randrange(len(raw) or 1)])
    else:
        entries[at] = (name, raw + bytes(rng.choice((1, 64, 100_000))))


def _directory(rng: random.Random, data: bytes) -> bytes:
    """Fields of a directory entry, of a local header or of the end record set to anything."""
    records = [at for at in range(len(data) - 4) if data[at : at + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6")]
    bent = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.choice(records[-40:]) + rng.randrange(4, 46), rng.choice((2, 4))
        if at + size <= len(bent):
            near = int.from_bytes(bent[at : at + size], "little") + rng.choice((-1, 1, 8))
            value = rng.choice((near, rng.choice(NUMBERS))) % 2 ** (8 * size)
            bent[at : at + size] = value.to_bytes(size, "little")
    return bytes(bent)

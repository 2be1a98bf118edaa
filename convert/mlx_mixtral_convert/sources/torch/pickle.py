"""What the pickle inside a torch file says about its tensors, without running it.

A pickle is a program for a stack machine that can import and call anything. Here its operations are decoded by the standard
library and stepped through by an interpreter that knows the few such files need and builds descriptions: there is nothing
in it that could import or call what the file names.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from mlx_mixtral.weights.safetensors import MAX_AXES, is_count

__all__ = ["PickleError", "TensorDescription", "TorchStorage", "describe", "read_pickle", "tensors_of"]

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
# Of torch before 0.4, with the first four arguments.
_OLD_TENSOR = "torch._utils._rebuild_tensor"
_DICT = "collections.OrderedDict"
_ALLOWED = {_TENSOR, _OLD_TENSOR, _PARAMETER, _DICT, *(f"torch.{name}" for name in _STORAGES)}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class TorchStorage:
    """``numel`` values of a safetensors dtype under the name ``key``."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorDescription:
    """A view of a storage; ``offset`` and ``strides`` count values."""

    storage: TorchStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PickleError(Exception):
    """Why a pickle is refused, in words that follow the file's name."""


_MARK = object()


def describe(data: bytes) -> dict[str, TensorDescription]:
    """The tensors of a pickled dictionary by name.

    Raises:
        PickleError: it asks for anything but tensors, or is damaged.
    """
    return tensors_of(read_pickle(io.BytesIO(data)))


def tensors_of(value: Any) -> dict[str, TensorDescription]:
    """What ``read_pickle`` gave, if it is a dictionary of tensors. Raises PickleError."""
    return dict(_tensors(value))


def read_pickle(stream: BinaryIO, storages: dict[str, TorchStorage] | None = None) -> Any:
    """The next pickle of a stream, which then stands behind it; ``storages`` gathers those it refers to, by key.

    Raises:
        PickleError: it asks for anything but tensors, or is damaged.
    """
    try:
        # Python warns of odd escapes in the text of a pickle; that is no news to a user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _interpret(stream, {} if storages is None else storages)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PickleError("the pickle that describes the tensors is damaged") from error


def _tensors(value: Any) -> Iterator[tuple[str, TensorDescription]]:
    if not isinstance(value, dict):
        raise PickleError(f"it holds a {type(value).__name__}, not a dictionary of tensors")
    for name, tensor in value.items():
        if not isinstance(tensor, TensorDescription):
            raise PickleError(f"entry {name[:200]!r} is a {type(tensor).__name__}, not a tensor")
        yield name, tensor


def _interpret(stream: BinaryIO, storages: dict[str, TorchStorage]) -> Any:
    """The value the pickle builds, of dictionaries, lists, tuples, numbers, text and descriptions of tensors."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(stream):
        kind = operation.name
        if kind in ("PROTO", "FRAME"):
            continue
        if kind == "STOP":
            return stack.pop()
        if kind in _CONSTANTS:
            stack.append(_CONSTANTS[kind])
        elif kind in _LITERALS:
            stack.append(argument)
        elif kind in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if kind == "EMPTY_DICT" else [])
        elif kind in _TUPLES:
            stack.append(tuple(_pop(stack, _TUPLES[kind])))
        elif kind == "MARK":
            stack.append(_MARK)
        elif kind == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif kind in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if kind == "MEMOIZE" else argument] = stack[-1]
        elif kind in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ") if kind == "GLOBAL" else _pop(stack, 2)
            stack.append(_global(".".join(parts)))
        elif kind == "BINPERSID":
            held = _storage(stack.pop())
            if storages.setdefault(held.key, held) != held:
                raise PickleError(f"the pickle describes storage {held.key[:200]!r} in two ways")
            stack.append(held)
        elif kind == "REDUCE":
            called, arguments = _pop(stack, 2)
            stack.append(_build(called, arguments))
        elif kind == "BUILD":  # attributes of a state dictionary: versions of its modules
            stack.pop()
        elif kind in ("SETITEM", "SETITEMS"):
            items = _pop(stack, 2) if kind == "SETITEM" else _pop_to_mark(stack)
            _set_items(stack[-1], items)
        elif kind in ("APPEND", "APPENDS"):
            items = _pop(stack, 1) if kind == "APPEND" else _pop_to_mark(stack)
            stack[-1].extend(items)
        else:
            raise PickleError(f"the pickle uses operation {kind}, which no file of tensors needs; it is refused")
    raise PickleError("the pickle does not end")


def _pop(stack: list[Any], count: int) -> list[Any]:
    if count > len(stack):
        raise PickleError("the pickle pops more values than it pushed")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    taken = []
    while (value := stack.pop()) is not _MARK:
        taken.append(value)
    return taken[::-1]


def _set_items(into: Any, items: list[Any]) -> None:
    if not isinstance(into, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
        raise PickleError("the pickle sets named items of something that is not a dictionary")
    into.update(zip(items[::2], items[1::2], strict=True))


def _global(name: str) -> _Global:
    if name not in _ALLOWED:
        # Without quotes, but with control characters escaped.
        raise PickleError(f"the pickle asks for {repr(name[:200])[1:-1]}, which is not part of a tensor; it is refused")
    return _Global(name)


def _storage(value: Any) -> TorchStorage:
    # Files before torch 1.6 say with a sixth whether it is a part of another storage, which it never is.
    word, kind, key, _, numel, *view = value
    dtype = _STORAGES.get(kind.name.removeprefix("torch.")) if isinstance(kind, _Global) else None
    if (
        word != "storage"
        or dtype is None
        or not isinstance(key, str)
        or not is_count(numel)
        or view not in ([], [None])
    ):
        raise PickleError("the pickle describes a malformed storage")
    return TorchStorage(dtype, key, numel)


def _build(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Global) or not isinstance(arguments, tuple):
        raise PickleError("the pickle calls something that is not a function")
    if called.name == _DICT and not arguments:
        return {}
    if called.name == _PARAMETER and isinstance(arguments[0], TensorDescription):
        return arguments[0]
    if called.name in (_TENSOR, _OLD_TENSOR):
        storage, offset, shape, strides, *_ = arguments
        counts = (offset, *shape, *strides)
        if isinstance(storage, TorchStorage) and len(shape) == len(strides) <= MAX_AXES and all(map(is_count, counts)):
            return TensorDescription(storage, offset, tuple(shape), tuple(strides))
    raise PickleError(f"the pickle calls {called.name} with arguments that are not a tensor's")

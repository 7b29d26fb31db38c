"""What a pickle's names and calls may become: tensors, plain values made by hand, inert placeholders.

Each maker is bounded: what it makes is counted by the unpickler's `spend`, in proportion to the file.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

MAX_KEY_LETTERS = 4096
MAX_NAME_LETTERS = 200
MAX_EXPANDED = 1 << 28
"""Elements of a tensor that repeats its storage (`expand`)."""
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))
_NUMBERS = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1|c8|c16)")


class Refused(pickle.UnpicklingError):
    """The file is malformed or does something that no checkpoint does."""


class Placeholder:
    """Stands where a file names a class or function: keeps what it was given, does nothing."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: Any = ()) -> None:
        self.name, self.args, self.state, self.items = name, args, None, []  # type: ignore[var-annotated]

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


class NumpyArray(Placeholder):
    """A NumPy array of the file; `tensor` is set where its elements are numbers."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        super().__init__("numpy.ndarray")
        self.tensor: torch.Tensor | None = None


class NumpyType:
    """A NumPy dtype of the file, by its short name: "f4"."""

    __slots__ = ("name", "order")

    def __init__(self, name: str) -> None:
        self.name, self.order = name, "<"

    def __repr__(self) -> str:
        return f"<numpy.dtype {self.name[:20]}, not loaded>"


@dataclasses.dataclass(frozen=True)
class Global:
    """A name in the file. Only a name: never the thing itself."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where a tensor's elements lie."""

    data: torch.UntypedStorage | None  # None while only looking through
    dtype: torch.dtype
    numel: int


def plain_key(key: Any) -> Any:
    """Only short plain values and tuples of them are hashed: a tuple nested a million deep ends the process,
    and a key is written out wherever it is named."""
    if isinstance(key, tuple):
        if len(key) > 16 or not all(isinstance(k, _PLAIN_KEYS) for k in key):
            raise Refused("a tuple as a key that no checkpoint has")
        for part in key:
            plain_key(part)
        return key
    if isinstance(key, (Placeholder, Global)):
        return repr(key)
    if not isinstance(key, _PLAIN_KEYS):
        raise Refused(f"a {type(key).__name__} as a key")
    if isinstance(key, (str, bytes)) and len(key) > MAX_KEY_LETTERS:
        raise Refused(f"a key of {len(key)} letters")
    if isinstance(key, int) and key.bit_length() > 128:
        raise Refused("a number of more than 128 bits as a key")
    return key


def pair(item: Any) -> tuple[Any, Any]:
    """Key and value, the key checked by `plain_key`. Raises Refused for what is no pair."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise Refused("not a pair of key and value")
    return plain_key(item[0]), item[1]


Spend = Callable[[int], None]


class LookedAt:
    """A tensor seen while only looking through the file: its sizes were checked, nothing was made."""

    __slots__ = ()


# ------------------------------------------------------------------ tensors


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor | LookedAt:
    """A view of `storage`; its extent must lie inside, so that `set_` never grows it."""
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        raise Refused("a tensor whose size and stride do not match")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Refused("a tensor with a size that is no number")
    elements, distinct, last = 1, 1, offset
    for n, step in zip(size, stride):
        elements *= n
        distinct *= n if step else 1
        last += (n - 1) * step
    beyond = distinct > storage.numel or last >= storage.numel
    if elements and (beyond or elements > max(storage.numel, MAX_EXPANDED)):
        raise Refused(f"a tensor of size {size} in a storage of {storage.numel} elements")
    if storage.data is None:
        return LookedAt()
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, size, stride)  # type: ignore[call-overload]


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, (torch.Tensor, LookedAt)):
        raise Refused("a parameter without a tensor")
    return data


REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}

# ------------------------------------------------------------------ plain values, made here by hand


def _mapping(spend: Spend, *args: Any) -> Any:
    if not args or isinstance(args[0], Global):  # defaultdict's factory
        return OrderedDict()
    if len(args) == 1 and isinstance(args[0], (list, dict)):
        spend(100 * len(args[0]))
        pairs = args[0].items() if isinstance(args[0], dict) else args[0]
        return OrderedDict(pair(item) for item in pairs)
    return None


def _set(spend: Spend, *args: Any) -> Any:
    if len(args) != 1 or not isinstance(args[0], (list, tuple)):
        return None if args else set()
    spend(100 * len(args[0]))
    return {plain_key(item) for item in args[0]}


def _size(spend: Spend, *args: Any) -> Any:
    if len(args) != 1 or not isinstance(args[0], (list, tuple)):
        return None
    spend(8 * len(args[0]))
    return tuple(args[0])


def _device(_: Spend, *args: Any) -> Any:
    return ":".join(str(a)[:20] for a in args) if all(isinstance(a, (str, int)) for a in args) else None


def _encode(spend: Spend, *args: Any) -> Any:
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        return None
    spend(len(args[0]))
    return args[0].encode("latin1")


def _bytes(_: Spend, *args: Any) -> Any:
    return None if args else b""


def _numpy_type(_: Spend, *args: Any) -> Any:
    return NumpyType(args[0]) if args and isinstance(args[0], str) else None


def _numpy_empty(*_: Any) -> NumpyArray:
    return NumpyArray()


def _numpy_scalar(spend: Spend, *args: Any) -> Any:
    if len(args) != 2 or not isinstance(args[0], NumpyType):
        return None
    array = NumpyArray()
    fill(spend, array, (1, (), args[0], False, args[1]))
    return None if array.tensor is None else array.tensor.item()


def _numpy_buffer(spend: Spend, *args: Any) -> Any:
    if len(args) != 4:
        return None
    array = NumpyArray()
    fill(spend, array, (1, args[2], args[1], args[3] == "F", args[0]))
    return array


MAKE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping, "collections.defaultdict": _mapping, "builtins.dict": _mapping,
    "collections.Counter": _mapping, "builtins.set": _set, "builtins.frozenset": _set,
    "__builtin__.set": _set, "builtins.bytes": _bytes,
    "__builtin__.bytes": _bytes, "torch.Size": _size, "torch.device": _device, "_codecs.encode": _encode,
    "numpy.dtype": _numpy_type, "numpy._core.multiarray._reconstruct": _numpy_empty,
    "numpy._core.multiarray.scalar": _numpy_scalar, "numpy._core.numeric._frombuffer": _numpy_buffer,
}  # fmt: skip
"""Name -> what makes its value from `spend` and the arguments, or None where it cannot."""


def fill(spend: Spend, array: NumpyArray, state: Any) -> None:
    """Give `array` the elements of a NumPy state (version, shape, dtype, Fortran order, bytes).

    Arrays of anything but numbers (objects, strings, records) stay placeholders: only numbers are read.
    """
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise Refused("an array whose description has another form")
    shape, dtype, fortran, raw = state[-4:]
    if not isinstance(dtype, NumpyType) or not _NUMBERS.fullmatch(dtype.name):
        return
    if isinstance(raw, str):  # Python 2 wrote bytes as text
        spend(len(raw))
        raw = raw.encode("latin1")
    if not isinstance(raw, (bytes, bytearray)) or not isinstance(shape, tuple):
        raise Refused("an array without its elements")
    if any(type(n) is not int or n < 0 for n in shape) or dtype.order not in ("<", ">", "=", "|"):
        raise Refused("an array with a size that is no number")
    order = ">" if dtype.order == ">" or dtype.name[0] == ">" else "<"
    kind = np.dtype(order + dtype.name.lstrip("<>=|"))
    count = 1
    for n in shape:
        count *= n
    if count * kind.itemsize != len(raw):
        raise Refused(f"an array of size {shape} in {len(raw)} bytes")
    flat = np.frombuffer(raw, kind) if count else np.empty(0, kind)
    values = flat.reshape(shape, order="F" if fortran else "C")
    if order == ">":
        spend(len(raw))
        values = values.astype(kind.newbyteorder("<"))
    if kind.name not in _TORCH_KINDS:
        spend(2 * len(raw))
        values = values.astype(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bytes cannot be written to; nor does anything
        array.tensor = torch.from_numpy(values)


_TORCH_KINDS = {
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64",
    "complex128",
}  # fmt: skip


def with_tensors(value: Any) -> Any:
    """`value` with every NumPy array of numbers replaced by its tensor, in place of dicts and lists."""
    top = [value]
    pending: list[Any] = [top]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        entries: Any = item.items() if isinstance(item, dict) else enumerate(item)
        for key, held in list(entries):
            if isinstance(held, NumpyArray) and held.tensor is not None:
                item[key] = held.tensor
            elif isinstance(held, tuple) and any(isinstance(part, NumpyArray) for part in held):
                item[key] = tuple(
                    part.tensor if isinstance(part, NumpyArray) and part.tensor is not None else part
                    for part in held
                )
            elif isinstance(held, (dict, list)):
                pending.append(held)
            elif isinstance(held, tuple):
                pending += [part for part in held if isinstance(part, (dict, list))]
    return top[0]

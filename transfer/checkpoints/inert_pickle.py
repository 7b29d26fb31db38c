"""An unpickler for strangers' files: tensors and plain values, everything else inert; nothing is imported or
called.

Every opcode that could import or call is replaced. What a file can make is bounded in proportion to its size:
objects made by calls, names, keys.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from transfer.checkpoints.inert_values import (
    MAKE,
    MAX_NAME_LETTERS,
    REBUILD,
    Global,
    LookedAt,
    NumpyArray,
    NumpyType,
    Placeholder,
    Refused,
    Storage,
    fill,
    pair,
    plain_key,
)

MAX_NAMES = 1000

FindStorage = Callable[[Any], Storage]


class InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's own unpickler in which every opcode that could import or call is replaced.

    `find_storage(persistent_id)` gives a tensor's storage; `size`, the pickle's length in bytes, bounds what
    may be made from it. `placeholders` collects the names not followed.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    def __init__(self, file: Any, find_storage: FindStorage, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self._find_storage = find_storage
        self._size = size
        self._left = 64 * size + (1 << 24)
        self.placeholders: set[str] = set()

    def spend(self, size: int) -> None:
        """Count `size` bytes made by a call. Raises Refused when the file makes far more than it holds."""
        self._left -= size
        if self._left < 0:
            raise Refused("the file would take far more memory than its size")

    def find_class(self, module: str, name: str) -> Global:
        """The name alone; nothing is imported."""
        found = f"{module[:MAX_NAME_LETTERS]}.{name[:MAX_NAME_LETTERS]}"
        self.spend(100 + len(found))
        return Global(found)

    def persistent_load(self, pid: Any) -> Storage | Global:
        """A tensor's storage, or the class that old files name with its source."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module" and isinstance(pid[1], Global):
            return pid[1]  # PyTorch before 1.6 wrote a module's class and its source like this
        return self._find_storage(pid)

    def _named(self, name: str, args: Any) -> Placeholder:
        self._note(name)
        return Placeholder(name, args)

    def _note(self, name: str) -> None:
        if len(self.placeholders) < MAX_NAMES:
            self.placeholders.add(name)

    def _call(self, target: Any, args: Any) -> Any:
        if not isinstance(target, Global) or not isinstance(args, tuple):
            if isinstance(target, Placeholder):
                return Placeholder(target.name if target.name.endswith("()") else f"{target.name}()", args)
            raise Refused(f"the file calls a {type(target).__name__}")
        self.spend(200)
        if target.name == "torch._tensor._rebuild_from_type_v2" and len(args) == 4:
            return self._call(args[0], args[2])
        rebuild = REBUILD.get(target.name)
        if rebuild is not None:
            return rebuild(*args)
        made = MAKE.get(re.sub(r"^numpy\.core\.", "numpy._core.", target.name))
        value = made(self.spend, *args) if made else None
        return self._named(target.name, args) if value is None else value

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _load_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], (*args, kwargs))

    def _load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii", "replace") for _ in range(2))
        self.append(self._call(self.find_class(module, name), tuple(self.pop_mark())))

    def _load_obj(self) -> None:
        target, *args = self.pop_mark()
        self.append(self._call(target, tuple(args)))

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, NumpyArray):
            fill(self.spend, target, state)
            if target.tensor is None:
                self._note(target.name)
        elif isinstance(target, NumpyType):
            if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], str):
                target.order = state[1][:1]
        elif isinstance(target, Placeholder):
            target.state = state
        elif not isinstance(target, (OrderedDict, torch.Tensor, LookedAt)):  # their attributes are not needed
            raise Refused(f"the file sets attributes of a {type(target).__name__}")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, Placeholder)):
            raise Refused(f"the file appends to a {type(target).__name__}")
        (target.items if isinstance(target, Placeholder) else target).extend(items)

    def _load_append(self) -> None:
        self._extend([self.stack.pop()])

    def _load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _update(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if len(flat) % 2:
            raise Refused("a key without a value")
        pairs = list(zip(flat[::2], flat[1::2]))
        if isinstance(target, Placeholder):
            target.items.extend(pairs)
        elif type(target) in (dict, OrderedDict):
            target.update(pair(item) for item in pairs)
        else:
            raise Refused(f"the file sets items of a {type(target).__name__}")

    def _load_setitem(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _load_setitems(self) -> None:
        self._update(self.pop_mark())

    def _load_dict(self) -> None:
        flat = self.pop_mark()
        self.append({})
        self._update(flat)

    def _load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise Refused(f"the file adds to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(plain_key(item) for item in items)

    def _load_frozenset(self) -> None:
        self.append(frozenset(plain_key(item) for item in self.pop_mark()))

    def _load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        if length > self._size:
            raise Refused("bytes beyond the end of the file")
        self.append(self.read(length))

    def _load_refused(self) -> None:
        raise Refused("the file uses a part of pickle that no checkpoint needs")

    for _opcode, _method in (
        (pickle.REDUCE, _load_reduce), (pickle.NEWOBJ, _load_reduce), (pickle.NEWOBJ_EX, _load_newobj_ex),
        (pickle.INST, _load_inst), (pickle.OBJ, _load_obj), (pickle.BUILD, _load_build),
        (pickle.APPEND, _load_append), (pickle.APPENDS, _load_appends), (pickle.DICT, _load_dict),
        (pickle.SETITEM, _load_setitem), (pickle.SETITEMS, _load_setitems),
        (pickle.ADDITEMS, _load_additems), (pickle.FROZENSET, _load_frozenset),
        (pickle.EXT1, _load_refused), (pickle.EXT2, _load_refused), (pickle.EXT4, _load_refused),
        (pickle.BYTEARRAY8, _load_bytearray8), (pickle.NEXT_BUFFER, _load_refused),
        (pickle.READONLY_BUFFER, _load_refused),
    ):  # fmt: skip
        dispatch[_opcode[0]] = _method

"""Read the pickles that other projects publish, without running them.

A pickle is a program. This unpickler knows only the names that its caller lists, and gives for each what the caller
says: a stub, which stores its arguments and does nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

_ALLOWED_CODES = frozenset(
    (
        pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.NONE, pickle.NEWTRUE,
        pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
        pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE,
        pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
        pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.LIST,
        pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS, pickle.PUT,
        pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET,
        pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD,
        pickle.BINPERSID,
    )
)  # fmt: skip
"""Pickle's codes for lists, text, numbers, and the calls and references that make arrays and tensors."""
_KEY_BITS = 64


class PickledStub:
    """Stands for an object that is not made."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class PickledDict(dict[Any, Any]):
    """Stands for a dict with attributes, which are dropped."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()  # items given as arguments are not taken: their keys are not checked

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with few codes; the one in C allocates as much memory as a pickle claims to need.

    Keys of dicts must be texts or numbers of some digits, as hashing nested tuples can take for ever, and writing a
    number of a million digits fails.
    """

    stack: list[Any]
    names: Mapping[str, Any]
    reference: Callable[[Any], Any] | None

    def find_class(self, module: str, name: str) -> Any:
        if (known := f"{module} {name}") in self.names:
            return self.names[known]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")

    def persistent_load(self, pid: Any) -> Any:
        if self.reference is None:
            raise pickle.UnpicklingError("it refers to something outside of it")
        return self.reference(pid)


def _with_plain_keys(load: Callable[[Any], None], keys: slice) -> Callable[[_Unpickler], None]:
    def checked(unpickler: _Unpickler) -> None:
        if not all(map(_is_plain, unpickler.stack[keys])):
            raise pickle.UnpicklingError("a key that is neither text nor a number")
        load(unpickler)

    return checked


def _is_plain(key: Any) -> bool:
    return isinstance(key, str | bytes) or (isinstance(key, int) and key.bit_length() <= _KEY_BITS)


def _build(unpickler: _Unpickler) -> None:
    """Pickle's BUILD, which else sets attributes also of functions among the names."""
    if not isinstance(unpickler.stack[-2], PickledStub | PickledDict):
        raise pickle.UnpicklingError("it sets attributes of something that is no object")
    _LOADS[pickle.BUILD[0]](unpickler)


_LOADS: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch
_Unpickler.dispatch = {code: load for code, load in _LOADS.items() if bytes([code]) in _ALLOWED_CODES} | {
    pickle.SETITEM[0]: _with_plain_keys(_LOADS[pickle.SETITEM[0]], slice(-2, -1)),
    pickle.SETITEMS[0]: _with_plain_keys(_LOADS[pickle.SETITEMS[0]], slice(0, None, 2)),
    pickle.DICT[0]: _with_plain_keys(_LOADS[pickle.DICT[0]], slice(0, None, 2)),
    pickle.BUILD[0]: _build,
}


def unpickled(
    data: bytes, names: Mapping[str, Any], *, encoding: str = "ASCII", reference: Callable[[Any], Any] | None = None
) -> Any:
    """The value of a pickle.

    Args:
        data: the pickle.
        names: `module name` → what stands for it, such as `PickledStub`; calling it must be harmless.
        encoding: of texts that Python 2 has written.
        reference: gives what a persistent id of the pickle refers to. Default: none may occur.

    Raises:
        Exception: of any kind; a damaged pickle can raise anything.
    """
    unpickler = _Unpickler(io.BytesIO(data), encoding=encoding)
    unpickler.names, unpickler.reference = names, reference
    return unpickler.load()

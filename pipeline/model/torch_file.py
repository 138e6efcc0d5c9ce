"""Read the files that `torch.save` writes, without running what is pickled in them.

Such a file is a zip archive: NAME/data.pkl holds the values, with a reference for each tensor, and NAME/data/0, 1, …
hold the elements. `torch.load(weights_only=True)` has run code and has read outside of its buffers in several
versions of torch; here every size is checked, and only the tensors that are asked for are read.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.restricted_unpickler import PickledDict, PickledStub, unpickled
from pipeline.storage import files
from pipeline.untrusted import MAX_COUNT, error_text, printable

_MAX_PICKLE = 1 << 24
_MAX_DIMENSIONS = 8
_READS = 4  # times the size of the file: tensors may share elements, but not without end
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # begins the files of torch before 1.6
_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_NAMES: dict[str, Any] = {
    "collections OrderedDict": PickledDict,
    "torch._utils _rebuild_tensor_v2": PickledStub,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    **{f"torch {name}Storage": dtype for name, dtype in _DTYPES.items()},
}
"""What the pickle may name: dicts, tensors and types of elements."""


class _Storage(NamedTuple):
    """The elements of one or more tensors, not yet read."""

    key: str
    dtype: torch.dtype


class TorchFile(AbstractContextManager["TorchFile"]):
    """An open file of `torch.save`.

    Args:
        url: the file.

    Attributes:
        content: the pickled value; in place of tensors it has stubs, for `tensors`.

    Raises:
        DataError: the file is something else, damaged, or asks for something that is no tensor.
    """

    def __init__(self, url: str) -> None:
        self._url, self._file = url, files.open_read(url)
        try:
            self._left = _READS * files.size(url)
            self._archive, self._prefix = self._opened()
            self._check_byte_order()
            self.content = self._content()
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def tensors(self, values: Mapping[Any, Any]) -> dict[str, Tensor]:
        """Read the tensors of a dict: name → float32.

        Raises:
            DataError: a value is no tensor, or a tensor's elements are not there.
        """
        return {printable(str(name), 200): self._tensor(str(name), value) for name, value in values.items()}

    def _opened(self) -> tuple[zipfile.ZipFile, str]:
        try:
            archive = zipfile.ZipFile(self._file)
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise ValueError("it has no data.pkl")
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError, struct.error) as error:
            raise self._damage(error) from None
        return archive, pickles[0].removesuffix("data.pkl")

    def _check_byte_order(self) -> None:
        name = "byteorder"
        if self._prefix + name in self._archive.NameToInfo and self._record(name, len(b"little")) != b"little":
            raise DataError(f"{self._url}: its byte order is not little-endian: save it on another machine")

    def _damage(self, error: Exception) -> DataError:
        self._file.seek(0)
        if self._file.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
            return DataError(
                f"{self._url} has the format of torch before 1.6: save it again with torch.save(torch.load("
                f"{self._url!r}, weights_only=True), NEW_FILE)"
            )
        return DataError(f"{self._url} is not a file of torch.save ({error_text(error)}): give one, or copy it again")

    def _content(self) -> Any:
        data = self._record("data.pkl", _MAX_PICKLE)
        try:
            return unpickled(data, _NAMES, reference=_storage)
        except DataError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise DataError(
                f"{self._url} holds more than tensors, or is damaged ({error_text(error)}): save its state_dict alone"
            ) from None

    def _record(self, name: str, most: int) -> bytes:
        try:
            entry = self._archive.getinfo(self._prefix + name)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
                raise ValueError(f"{name} has {entry.file_size} bytes, the limit is {most}")
            return self._archive.read(entry)
        except (
            KeyError,
            ValueError,
            OSError,
            EOFError,
            NotImplementedError,
            RuntimeError,
            struct.error,
            zipfile.BadZipFile,
        ) as error:
            raise DataError(f"{self._url} is damaged or cut short ({error_text(error)}): copy it again") from None

    def _tensor(self, name: str, value: Any) -> Tensor:
        match value:
            case PickledStub(arguments=(_Storage(key, dtype), int(offset), tuple(shape), tuple(strides), *_)):
                sizes = (offset, *shape, *strides)
                if (
                    all(type(size) is int and 0 <= size <= MAX_COUNT for size in sizes)
                    and len(shape) == len(strides) <= _MAX_DIMENSIONS
                    # Also without elements, as torch multiplies the sides.
                    and math.prod(side or 1 for side in shape) * dtype.itemsize <= self._left
                ):
                    return self._read(name, key, dtype, offset, shape, strides)
        raise DataError(
            f"{self._url}: {printable(name, 200)} is a tensor that does not fit into the file: copy it again"
        )

    def _read(
        self, name: str, key: str, dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Tensor:
        end = offset + sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1 if all(shape) else 0
        if not end:
            return torch.zeros(shape)
        data = bytearray(self._record(f"data/{key}", self._left))
        self._left -= max(len(data), math.prod(shape) * dtype.itemsize)
        if end * dtype.itemsize > len(data):
            raise DataError(f"{self._url}: {printable(name, 200)} has more elements than are stored: copy it again")
        stored = torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
        return stored.as_strided(shape, strides, offset).to(torch.float32, copy=True)


def _storage(reference: Any) -> _Storage:
    """What a persistent id of the pickle stands for: ("storage", type, key, device, number of elements)."""
    match reference:
        case ("storage", torch.dtype() as dtype, str(key), *_) if key.isdecimal():
            return _Storage(key, dtype)
    # It is not shown: lists that share lists can be far longer as text than the file is.
    raise ValueError("a reference to something that is no storage of a tensor")

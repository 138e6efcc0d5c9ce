"""A host buffer with the bytes of a safetensors file, into which tensors are copied.

Training waits only for the copy from the device. `safetensors.torch.save` would copy all tensors once more and hold
Python's interpreter lock; hashing and writing a buffer does neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order of safetensors, widest first, so that each tensor is aligned to its width."""
_ALIGNMENT = 8


class TensorFile:
    """The bytes of a safetensors file for tensors of fixed names, types and shapes.

    The bytes equal those of `safetensors.torch.save`: tensors are ordered by type, then by name.

    Args:
        tensors: give the names, types and shapes; their values are not copied.
        pin: allocate page-locked memory, for copies from a GPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, pin: bool = False) -> None:
        types = list(_NAMES)
        ordered = sorted(tensors.items(), key=lambda item: (types.index(item[1].dtype), item[0]))
        entries, end = {}, 0
        for name, tensor in ordered:
            start, end = end, end + tensor.numel() * tensor.element_size()
            entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        self._views = {
            name: self._buffer[slice(*entries[name]["data_offsets"])].view(tensor.dtype).view(tensor.shape)
            for name, tensor in ordered
            if prod(tensor.shape)
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors into the buffer. Copies from a GPU are asynchronous: synchronize before `pieces`."""
        for name, view in self._views.items():
            view.copy_(tensors[name], non_blocking=True)

    def as_float16(self) -> list[bytes | memoryview]:
        """The content of a file with the same tensors in float16, in order."""
        halves = {name: view.half() for name, view in self._views.items()}
        file = TensorFile(halves)
        file.fill(halves)
        return file.pieces()

    def pieces(self) -> list[bytes | memoryview]:
        """The file's content, in order."""
        return [self._header, self._buffer.numpy().data]

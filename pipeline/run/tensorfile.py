"""Tensors on their way to a safetensors file: one host buffer that is the file's payload, byte for byte.

The copy from the device is the only thing a running step waits for. Serialising afterwards would copy everything once
more and hold Python's lock meanwhile; hashing and writing a buffer does neither.
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
"""In the order of the library's own files, so that a tensor is aligned to its width."""
_ALIGNMENT = 8


class TensorFile:
    """The bytes of a safetensors file for tensors of these names, types and shapes.

    The same bytes as `safetensors.torch.save` gives: by type, widest first, then by name.

    Args:
        tensors: like those to come.
        pin: keep the buffer in page-locked memory, for copies from a GPU.
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
        """Copy the tensors in; copies from a GPU are still under way when this returns."""
        for name, view in self._views.items():
            view.copy_(tensors[name], non_blocking=True)

    def pieces(self) -> list[bytes | memoryview]:
        """The file's content, in order."""
        return [self._header, self._buffer.numpy().data]

"""The bytes of a safetensors file, against the library that defines them."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.checkpoints.safetensors_buffer import TensorFile

TYPES = [torch.float64, torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.uint8, torch.bool]


def written(tensors: dict[str, Tensor]) -> bytes:
    file = TensorFile(tensors)
    file.fill(tensors)
    return b"".join(file.pieces())


def like(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 100).to(dtype)


SETS: dict[str, dict[str, Tensor]] = {
    "of every type": {f"{chr(97 + 7 * i % 8)}.{dtype}": like(dtype, 3, i + 1) for i, dtype in enumerate(TYPES)},
    "of types of one width": {
        name: like(dtype, 2) for name, dtype in zip("abcdef", [TYPES[i] for i in (0, 1, 0, 3, 2, 3)])
    },
    "of half precision": {name: like(dtype, 2) for name, dtype in zip("abc", [TYPES[i] for i in (5, 4, 5)])},
    "with scalars": {"step": torch.tensor(7.0), "count": torch.tensor(2**40), "initted": torch.tensor(True)},
    "with empty ones": {"none": torch.zeros(0), "some": like(torch.float32, 2), "flat": torch.zeros(3, 0, 2)},
    "all empty": {"none": torch.zeros(0)},
    "none": {},
    "channels-last and views": {
        "conv": like(torch.float32, 4, 3, 2, 2).to(memory_format=torch.channels_last),
        "turned": like(torch.bfloat16, 5, 2).T,
        "strided": like(torch.int32, 9)[::2],
        "learnt": like(torch.float32, 3).requires_grad_(),
    },
    "of odd names": {
        name: torch.tensor([float(i)])
        for i, name in enumerate(
            [
                "",
                " ",
                "ünïcode.重み",
                "Z",
                "a",
                "\U0001f600",
                "\uffff",
                'quo"te',
                "back\\slash",
                "tab\tline\n\x01\x7f",
                "a/b",
            ]
        )
    },
    "of odd lengths": {
        "bytes": like(torch.uint8, 5),
        "halves": like(torch.bfloat16, 3),
        "words": like(torch.float32, 1),
    },
}


@pytest.mark.parametrize("name", SETS)
def test_the_bytes_are_those_of_safetensors(name: str) -> None:
    tensors = SETS[name]
    theirs = safetensors.torch.save({key: value.detach().contiguous() for key, value in tensors.items()})
    assert written(tensors) == theirs


def test_each_filling_replaces_the_one_before_and_copies() -> None:
    live = {"weight": torch.zeros(3), "count": torch.tensor(0)}
    file = TensorFile(live)
    for step in (1, 2):
        live["weight"].fill_(step)
        live["count"].fill_(step)
        file.fill(live)
        live["weight"].fill_(-1)  # the next step goes on with them
        got = safetensors.torch.load(b"".join(file.pieces()))
        assert got["weight"].tolist() == [step] * 3 and int(got["count"]) == step


def test_the_bits_of_nan_and_infinity_are_unchanged() -> None:
    bits = torch.tensor([0x7FC00001, 0xFF800000 - 2**32, 0x80000000 - 2**32, 1], dtype=torch.int32).view(torch.float32)
    got = safetensors.torch.load(written({"odd": bits}))["odd"]
    assert got.view(torch.int32).tolist() == bits.view(torch.int32).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu_give_the_same_bytes_through_pinned_memory() -> None:
    host = {"a": like(torch.float32, 64, 3, 3, 3), "b": like(torch.bfloat16, 7), "n": torch.tensor(3.0)}
    device = {name: tensor.cuda() for name, tensor in host.items() if name != "n"} | {"n": host["n"]}
    file = TensorFile(device, pin=True)
    file.fill(device)
    torch.cuda.synchronize()
    assert b"".join(file.pieces()) == written(host)


def test_a_type_without_a_name_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="complex64"):
        TensorFile({"z": torch.zeros(1, dtype=torch.complex64)})

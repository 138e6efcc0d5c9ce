"""Files of torch.save are read without running what is in them, and no size that they claim is believed."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import DataError
from pipeline.model.torch_file import TorchFile


def read(path: Path) -> dict[str, torch.Tensor]:
    with TorchFile(str(path)) as file:
        return file.tensors(file.content)


def refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def repacked(path: Path, method: int = zipfile.ZIP_STORED, **records: bytes) -> None:
    """Replace records of the archive, by the last part of their names, and store them as `method` says."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            record = name.rpartition("/")[2].replace(".", "_")
            archive.writestr(name, records.get(record, data), method if record in records else None)


def test_tensors_of_all_kinds_are_read(tmp_path: Path) -> None:
    whole = torch.randn(6, 5)
    values = OrderedDict(plain=whole, turned=whole.T, part=whole[2:4, ::2], half=whole.half(), bf16=whole.bfloat16())
    values |= {"double": whole.double(), "number": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    values |= {"counts": torch.arange(5), "parameter": nn.Parameter(whole)}
    torch.save(values, tmp_path / "a.pt")
    got = read(tmp_path / "a.pt")
    assert got.keys() == values.keys() and {tensor.dtype for tensor in got.values()} == {torch.float32}
    assert all(torch.equal(got[name], value.detach().float()) for name, value in values.items())


def test_what_else_a_training_script_saves_does_not_matter(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save({"w": layer.state_dict(), "optim": optimizer.state_dict(), "sched": schedule.state_dict(), "step": 7},
               tmp_path / "a.pt")  # fmt: skip
    with TorchFile(str(tmp_path / "a.pt")) as file:
        assert file.content["step"] == 7
        assert torch.equal(file.tensors(file.content["w"])["weight"], layer.weight.detach())


class Harm:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)

    def __init__(self, proof: Path) -> None:
        self.proof = proof


def test_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"x": Harm(tmp_path / "proof")}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"holds more than tensors, or is damaged \(it asks for posix.system, which is not run\)")
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "it asks for torch.nn.modules.linear.Linear, which is not run")
    assert not (tmp_path / "proof").exists()


def test_the_format_before_1_6_is_told(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.pt", "has the format of torch before 1.6: save it again")


def test_what_is_no_such_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes(b"hello")
    refused(file, "is not a file of torch.save")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b", "c")
    refused(file, r"is not a file of torch.save \(it has no data.pkl\)")
    torch.save({"x": 3}, file)
    refused(file, "x is a tensor that does not fit into the file")
    torch.save({"x": torch.ones(300)}, file)
    file.write_bytes(file.read_bytes()[:900])
    refused(file, "is not a file of torch.save")
    torch.save({"x": torch.ones(3)}, file)
    repacked(file, byteorder=b"big")
    refused(file, "byte order")
    torch.save({"x": torch.ones(3)}, file)
    repacked(file, zipfile.ZIP_DEFLATED, byteorder=b"little")  # may unpack to a thousand times the size of the file
    refused(file, "is damaged or cut short")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5,), (1,)), (1, (4,), (1,)), (0, (1 << 40,), (0,)), (0, (3, 3), (1, 1)), (0, (2,), (-1,)),
        (-1, (2,), (1,)), (0, (2, 2), (1,)), (0, (1 << 62, 1 << 62), (0, 0)), (0, (True,), (1,)),
        (0, (1,) * 9, (1,) * 9), (0, (0, 1 << 70), (1, 1)), (0, (0, 1 << 47, 1 << 47), (1, 1, 1)),
        (0, (1,), (1 << 70,)),
    ],
)  # fmt: skip
def test_claims_of_size_are_checked(offset: int, shape: Any, strides: Any, tmp_path: Path) -> None:
    class Claims:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Reference(), offset, shape, strides, False, OrderedDict())

    class Reference:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Reference) else None

    file = tmp_path / "a.pt"
    torch.save({"x": torch.ones(4)}, file)
    with (tmp_path / "pickle").open("wb") as stream:
        Pickler(stream, protocol=2).dump({"x": Claims()})
    repacked(file, data_pkl=(tmp_path / "pickle").read_bytes())
    refused(file, "is a tensor that does not fit|has more elements than are stored")


def test_many_tensors_of_the_same_elements_do_not_fill_the_memory(tmp_path: Path) -> None:
    elements = torch.zeros(100_000)
    torch.save({str(i): elements for i in range(50)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "that does not fit into the file|the limit is")

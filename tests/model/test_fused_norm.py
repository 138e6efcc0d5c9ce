"""The fused norm: the same results as torch's operations, on a CPU in Triton's interpreter, and code for real GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import ModelSection
from pipeline.errors import ConfigError
from pipeline.model.unet import UNet

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install -c constraints.txt -e '.[dev]'"
)
CASES = Path(__file__).with_name("fused_norm_cases.py")


def run_cases(device: str, **environment: str) -> str:
    """In a process of their own, because Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--tb=short", str(CASES)]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "TRITON_INTERPRET"}
    result = subprocess.run(
        command, env=variables | {"DEVICE": device, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    out = run_cases("cpu", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in", out, re.MULTILINE), out  # and none skipped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_on_a_gpu() -> None:
    run_cases("cuda")


SIGNATURES: dict[str, tuple[str, str]] = {
    "_tile_statistics": ("x f f", "i i"),
    "_group_statistics": ("f f f f", "i i i e i"),
    "_normalize": ("x f f f i f i x", "i i i"),
    "_tile_gradients": ("x x f f f i f i f f", "i i i"),
    "_group_gradients": ("f f f i f f f f", "i i i i"),
    "_input_gradient": ("x x f f f i f i f f x", "i i i"),
}
"""Arguments, before the constants: x the features, f float32 pointers, i int32, e float32."""


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "ones"), [("bf16", False), ("fp32", False), ("bf16", True)], ids=["bf16", "fp32", "one pixel"]
)
def test_every_kernel_compiles_without_a_gpu(
    dtype: str, ones: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ones`: Triton makes a constant of each integer argument that is 1, such as the pixels of a 1×1 image."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton, fused_norm = (importlib.import_module(name) for name in ("triton", "pipeline.model.fused_norm"))
    types = {"x": f"*{dtype}", "f": "*fp32", "i": "i32", "e": "fp32"}
    for kernel, parts in SIGNATURES.items():
        function = getattr(fused_norm, kernel)
        kinds = dict(zip(function.arg_names, " ".join(parts).split()))
        constants: dict[str, Any] = {name: 64 if "tile" in name else 16 for name in function.arg_names[len(kinds) :]}
        constants |= {name: 1 for name, kind in kinds.items() if ones and kind == "i"}
        signature = {name: types[kind] for name, kind in kinds.items()} | dict.fromkeys(constants, "constexpr")
        compiled = triton.compile(
            triton.compiler.ASTSource(
                function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}
            ),
            target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        )
        assert f".target sm_{capability}" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 1000
        # Atomic sums would have no fixed order.
        assert "atom." not in compiled.asm["ptx"] and "red.global" not in compiled.asm["ptx"]


def network() -> UNet:
    return UNet(ModelSection(base_channels=8, channel_mults=(1, 2), blocks_per_level=1), channels=3, size=(8, 8))


def test_on_a_cpu_one_line_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device, but the device is cpu: set "):
        network().fuse_norms()


def test_without_triton_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network().to("meta")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "pipeline.model.fused_norm", None)
    with pytest.raises(ConfigError, match="needs the package triton, which torch's CUDA builds bring on Linux"):
        made.fuse_norms()

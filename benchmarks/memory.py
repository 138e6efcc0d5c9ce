"""What does a training step keep, and take at its peak, against diffusers and the reference article's network?

    python benchmarks/memory.py [--only NAME ...]

For each network and checkpointing policy, in bf16 (the article's in float32, as it was): bytes that the forward pass
leaves to the backward pass, operations of both as a multiple of those with nothing computed twice, and the peak. All
are counted on fake tensors, so batch 128 at 128 px costs nothing; those of ours are what `ddpm plan` says. With a GPU,
steps are taken, and the peak that its allocator saw stands beside. diffusers has the same network, without and with
its gradient checkpointing; its peaks and the article's are of forward and backward pass, without an optimizer.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import diffusers
import torch
from article import ArticleNet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from train_step import CONFIGS, ours_alone, same_in_diffusers
from turns import Turns

from pipeline import config_file
from pipeline.config import Config
from pipeline.training.memory_estimate import StorageTracker, trace

PAPERS = ("model.channel_mults=[1,2,2,2]", "model.attention_sizes=[16]", "model.head_channels=null")
NETWORKS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "32 px": ("cifar10.yaml", 128, ()),
    "64 px": ("64px.yaml", 128, ()),
    "128 px": ("128px.yaml", 128, ()),
    "128 px, the paper's 32-px net": ("128px.yaml", 128, PAPERS),
    "256 px": ("celebahq256.yaml", 8, ()),
}
"""Configuration, batch, settings."""
GIB = 2**30
Step = Callable[[], object]


def config_of(name: str, checkpointing: str = "none") -> Config:
    file, batch, settings = NETWORKS[name]
    train = {"global_batch": batch, "micro_batch": batch, "checkpointing": checkpointing, "compile": "false"}
    settings += tuple(f"train.{key}={value}" for key, value in train.items())
    return config_file.load(str(CONFIGS / file), settings, lambda file: Path(file).read_text())


class Peer:
    """Forward and backward pass of another network.

    Args:
        make: builds it.
        config: the size of its images and of the batch.
        precision: bf16 for autocast, or fp32.
    """

    def __init__(self, make: Callable[[], nn.Module], config: Config, precision: str) -> None:
        self._make, self._precision = make, precision
        self._shape = (config.train.global_batch, config.data.channels, *config.data.height_width)

    def _prepared(self, device: str) -> tuple[nn.Module, Tensor, Tensor]:
        t = torch.zeros(self._shape[0], dtype=torch.int64, device=device)
        return self._make().train(), torch.zeros(self._shape, device=device), t

    def _loss(self, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            output = model(x, t)
        return (output if isinstance(output, Tensor) else output.sample).float().square().mean()

    def count(self) -> tuple[int, int, int]:
        """Bytes kept for the backward pass, operations, bytes at the peak."""
        with FakeTensorMode():
            model, x, t = self._prepared("cpu")
            for module in model.modules():
                if isinstance(module, nn.GroupNorm):  # autocast of CUDA makes it float32, in and out; a CPU's does not
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            with StorageTracker([*model.parameters(), x, t]) as ledger:
                before = ledger.live
                loss = self._loss(model, x, t)
                kept = ledger.live - before
                torch.autograd.backward(loss)
        return kept, ledger.flops, max(ledger.timeline)

    def step(self) -> Step:
        """To be measured."""
        model, x, t = self._prepared("cuda")
        model.to("cuda")
        return lambda: self._loss(model, x, t).backward()


def checkpointed(config: Config) -> nn.Module:
    model = same_in_diffusers(config)
    model.enable_gradient_checkpointing()
    return model


def measured(make: Callable[[], Step]) -> str:
    """GiB that the allocator of a GPU gave out at most, in the second of two steps."""
    if not torch.cuda.is_available():
        return ""
    try:
        step = make()
        step()  # makes what stays: gradients, moments
        torch.cuda.reset_peak_memory_stats()
        step()
        text = f"{torch.cuda.max_memory_allocated() / GIB:.2f}"
    except torch.OutOfMemoryError:
        text = "too large"
    return text


def rows(name: str) -> Iterator[tuple[str, int, float, int, str]]:
    """What, bytes kept, operations as a multiple, bytes at the peak, what a GPU says of it."""
    config = config_of(name)
    batch, footprints = config.train.global_batch, trace(config)
    for policy, found in footprints.items():
        same = config_of(name, policy)
        peak = measured(partial(ours_alone, same))
        ratio = found.flops / footprints["none"].flops
        yield f"ours, {policy}", found.saved_bytes(batch), ratio, found.peak_bytes(batch, accumulating=False), peak
        gc.collect()
    diffusers_flops = None
    for what, make in {"diffusers": same_in_diffusers, "diffusers, checkpointed": checkpointed}.items():
        peer = Peer(partial(make, config), config, "bf16")
        kept, flops, most = peer.count()
        diffusers_flops = diffusers_flops or flops
        yield what, kept, flops / diffusers_flops, most, measured(peer.step)
        gc.collect()
    peer = Peer(ArticleNet, config, "fp32")
    kept, _, most = peer.count()
    yield "the article's, fp32", kept, 1.0, most, measured(peer.step)
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = f"{'GiB kept':>10}{'x FLOPs':>10}{'GiB peak':>10}" + f"{'measured':>10}" * torch.cuda.is_available()
    print("counted as on a GPU; peaks of ours are of whole steps")
    for name in options.only:
        print(f"{f'{name}, batch {NETWORKS[name][1]}':38}{head}")
        for what, kept, ratio, peak, seen in rows(name):
            print(f"  {what:36}{kept / GIB:>10.2f}{ratio:>10.3f}{peak / GIB:>10.2f}{seen:>10}", flush=True)
    print(f"{Turns(device).where()}, diffusers {diffusers.__version__}")


if __name__ == "__main__":
    main()

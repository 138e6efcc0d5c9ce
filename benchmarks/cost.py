"""What does a step cost over image size and batch, against the same networks in diffusers?

    python benchmarks/cost.py [--batches N ...] [--configs NAME ...] [--rounds N] [--threads N]

For each configuration, in bf16: operations of the forward pass, bytes that it keeps for the backward pass with nothing
and with blocks computed twice (both counted for one more picture, on fake tensors), and the time of whole training
steps. diffusers has the same network in the step of its unconditional example, without and with its gradient
checkpointing.
"""

from __future__ import annotations

import argparse
from functools import partial

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from train_step import config_of, of_diffusers, ours_alone, same_in_diffusers
from turns import Turns

from pipeline.config import Config
from pipeline.footprint import Ledger, trace


def kept_by_diffusers(config: Config, *, checkpointing: bool) -> int:
    """Bytes that a forward pass of one more picture leaves to the backward pass."""
    kept = []
    with FakeTensorMode():
        model = same_in_diffusers(config)
        if checkpointing:
            model.enable_gradient_checkpointing()
        for batch in (2, 3):
            x, t = torch.empty(batch, config.data.channels, *config.data.height_width), torch.zeros(batch)
            with Ledger([*model.parameters(), x, t]) as ledger, torch.autocast("cpu", torch.bfloat16):
                before = ledger.live
                output = model(x, t.long()).sample
            kept.append(ledger.live - before)
            del output
    return kept[1] - kept[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[], help="default: 32 and 128 on a GPU, 1 and 4 else")
    parser.add_argument("--configs", nargs="*", default=["cifar10.yaml", "64px.yaml", "128px.yaml"])
    parser.add_argument("--rounds", type=int, default=0, help="default: 10 on a GPU, 2 on a CPU")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: all cores")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batches, rounds = options.batches or ([32, 128] if cuda else [1, 4]), options.rounds or (10 if cuda else 2)
    print("one picture:")
    print(f"{'':14}{'':8}{'':>12}{'forward':>10}{'MiB kept,':>12}{'blocks':>9}{'diffusers':>11}{'check-':>9}")
    print(f"{'':14}{'px':>8}{'parameters':>12}{'GFLOP':>10}{'none twice':>12}{'twice':>9}{'keeps':>11}{'pointed':>9}")
    gigaflops = {}
    for name in options.configs:
        config = config_of(name, 2, "bf16")
        footprints = trace(config)
        kept = [footprints[policy].saved_bytes(3) - footprints[policy].saved_bytes(2) for policy in ("none", "blocks")]
        kept += [kept_by_diffusers(config, checkpointing=checkpointing) for checkpointing in (False, True)]
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in same_in_diffusers(config).parameters())
        gigaflops[name] = footprints["none"].forward_flops / 1e9
        none, blocks, theirs, pointed = (value / 2**20 for value in kept)
        sizes = f"{config.data.height_width[0]:>8}{parameters / 1e6:>10.1f} M{gigaflops[name]:>10.1f}"
        print(f"{name:14}{sizes}{none:>12.1f}{blocks:>9.1f}{theirs:>11.1f}{pointed:>9.1f}")
    print("\nsteps in bf16, nothing computed twice:")
    print(f"{'':14}{'batch':>8}{'ms':>10}{'images/s':>10}{'TFLOP/s':>10}{'diffusers, ms':>15}{'x diffusers':>13}")
    for name in options.configs:
        for batch in batches:
            turns, config = Turns(device, options.threads), config_of(name, batch, "bf16")
            turns.take_apart({"ours": partial(ours_alone, config), "diffusers": partial(of_diffusers, config)}, rounds)
            seconds, theirs = turns.median("ours"), turns.median("diffusers")
            speed = (
                f"{seconds * 1e3:>10.1f}{batch / seconds:>10.2f}{3 * gigaflops[name] * batch / seconds / 1e3:>10.3f}"
            )
            print(f"{name:14}{batch:>8}{speed}{theirs * 1e3:>15.1f}{turns.faster('ours', 'diffusers'):>13.2f}")
    print(f"{turns.where()}, diffusers {diffusers.__version__}; medians of {rounds} rounds")


if __name__ == "__main__":
    main()

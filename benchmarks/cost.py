"""What does a step cost over image size and batch, against the same networks in diffusers?

    python benchmarks/cost.py [--batches N ...] [--configs NAME ...] [--checkpointing POLICY ...] [--compile]
                              [--rounds N] [--threads N]

For each configuration, in bf16: operations of the forward pass, bytes that it keeps for the backward pass with nothing
and with blocks computed twice (both counted for one more image, on fake tensors), and the time of whole training
steps, with their use of the machine: model FLOPs, without what is computed twice, of the peak measured in the same run.
diffusers has the same network in the step of its unconditional example, without and with its gradient checkpointing.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product

import diffusers
import torch
from roofline import extremes
from torch._subclasses.fake_tensor import FakeTensorMode
from train_step import config_of, of_diffusers, ours_alone, same_in_diffusers
from turns import Turns

from pipeline.config import Config
from pipeline.training.memory_estimate import StorageTracker, trace


def kept_by_diffusers(config: Config, *, checkpointing: bool) -> int:
    """Bytes that a forward pass of one more image leaves to the backward pass."""
    kept = []
    with FakeTensorMode():
        model = same_in_diffusers(config)
        if checkpointing:
            model.enable_gradient_checkpointing()
        for batch in (2, 3):
            x, t = torch.empty(batch, config.data.channels, *config.data.height_width), torch.zeros(batch)
            with StorageTracker([*model.parameters(), x, t]) as ledger, torch.autocast("cpu", torch.bfloat16):
                before = ledger.live
                output = model(x, t.long()).sample
            kept.append(ledger.live - before)
            del output
    return kept[1] - kept[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[], help="default: 32 and 128 on a GPU, 1 and 4 else")
    parser.add_argument("--configs", nargs="*", default=["cifar10.yaml", "64px.yaml", "128px.yaml"])
    parser.add_argument("--checkpointing", nargs="*", default=["none"], help="policies of train.checkpointing")
    parser.add_argument("--compile", action="store_true", help="both")
    parser.add_argument("--rounds", type=int, default=0, help="default: 10 on a GPU, 2 on a CPU")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: all cores")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batches, rounds = options.batches or ([32, 128] if cuda else [1, 4]), options.rounds or (10 if cuda else 2)
    print("one image:")
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
    fastest = Turns(device, options.threads)
    most = {name: work for name, work in extremes(device, torch.bfloat16).items() if name in ("product", "convolution")}
    fastest.take({name: work for name, (work, _) in most.items()}, 5)
    peak = max(amount / min(fastest.seconds[name]) for name, (_, amount) in most.items()) / 1e12
    print(f"\nsteps in bf16; the most that large products and convolutions reach here is {peak:.3f} TFLOP/s:")
    print(
        f"{'':14}{'twice':>10}{'batch':>7}{'ms':>10}{'images/s':>10}{'TFLOP/s':>10}{'of peak':>9}{'diffusers, ms':>15}"
        f"{'x diffusers':>13}"
    )
    for name, policy, batch in product(options.configs, options.checkpointing, batches):
        turns = Turns(device, options.threads)
        config = config_of(name, batch, "bf16", compiled=options.compile, checkpointing=policy)
        turns.take_apart({"ours": partial(ours_alone, config), "diffusers": partial(of_diffusers, config)}, rounds)
        seconds, theirs = turns.median("ours"), turns.median("diffusers")
        rate = 3 * gigaflops[name] * batch / seconds / 1e3
        speed = f"{seconds * 1e3:>10.1f}{batch / seconds:>10.2f}{rate:>10.3f}{rate / peak:>9.0%}"
        against = f"{theirs * 1e3:>15.1f}{turns.faster('ours', 'diffusers'):>13.2f}"
        print(f"{name:14}{policy:>10}{batch:>7}{speed}{against}", flush=True)
    how = "compiled" if options.compile else "not compiled"
    print(f"{turns.where()}, diffusers {diffusers.__version__}, {how}; medians of {rounds} rounds")


if __name__ == "__main__":
    main()

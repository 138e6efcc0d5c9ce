"""How fast are images drawn, against diffusers' DDIMPipeline with the same weights?

    python benchmarks/sampling.py [--batch N] [--steps N] [--rounds N] [--threads N] [--compile]

DDIM with η = 0 through the paper's 32-px network, one batch a turn, from seeds to uint8 images. In the same precision
diffusers runs as it is used: its pipeline under autocast for bf16, or with the whole network cast to bf16, the steps of
the sampler and their images included (which loses quality, and which ours never does). As shipped it is float32, not
compiled, and on a GPU with TF32 convolutions, which for the others is off. Its progress bar is off.

Then classifier-free guidance, as ours draws it, in one pass of twice the batch, and in two passes.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from functools import partial

import diffusers
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from turns import Turns, autocast

from pipeline import keyed_random
from pipeline.config import Config, SamplingOptions
from pipeline.diffusion import samplers
from pipeline.diffusion.process import DiffusionProcess
from pipeline.keyed_random import Use
from pipeline.model import interchange
from pipeline.model.denoiser import Denoiser
from pipeline.model.unet import UNet
from pipeline.sampling.generator import Generator

SHIPPED = "diffusers, as shipped"
ONE_PASS, TWO_PASSES = "guided, one pass", "guided, two passes"
Draw = Callable[[], object]


def generator(classes: int = 0) -> Generator:
    """The network of configs/cifar10.yaml, with weights that are not near zero anywhere."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    config = Config.model_validate({"data": {"size": 32}, "model": {"num_classes": classes}})
    torch.manual_seed(0)
    network = UNet(config.model, channels=3, size=(32, 32))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    network.to(device, memory_format=torch.channels_last)
    return Generator(config, network, DiffusionProcess.of(config.diffusion).to(device), device)


def ours(options: SamplingOptions, classes: int = 0) -> Draw:
    ready = generator(classes)
    return lambda: deque(ready.images(range(options.batch), options), maxlen=0)


def of_diffusers(options: SamplingOptions, precision: str, *, all_bf16: bool = False, tf32: bool = False) -> Draw:
    """Its pipeline under autocast to a precision, or with everything in bf16.

    With TF32 as torch ships: cuDNN takes its first choice of an algorithm, too.
    """
    ready = generator()
    model = UNet2DModel.from_config(interchange.diffusers_config(ready.config.model, 3, (32, 32)))
    model.load_state_dict(interchange.to_diffusers(ready.networks("fp32")[0].state_dict()))
    model = model.to(ready.device).eval()
    model = model.bfloat16() if all_bf16 else model
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, not tf32
    if options.compile:
        model.compile()
    pipeline = DDIMPipeline(model, DDIMScheduler(timestep_spacing="linspace"))
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> None:
        with autocast(ready.device, precision):
            drawn = pipeline(batch_size=options.batch, num_inference_steps=options.steps, output_type="pt").images
        (drawn.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    return draw


def guided_in_two(options: SamplingOptions) -> Draw:
    """The plain way; one pass is what a Generator does."""
    ready = generator(classes=10)
    (network,) = ready.networks("bf16", compiled=options.compile)
    called, seeds = Denoiser(network, "bf16", 10), torch.arange(options.batch, device=ready.device)
    process, labels = DiffusionProcess.of(ready.config.diffusion).to(ready.device), seeds % 10

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        null = called(x, t, torch.full_like(labels, 10))
        return null + 3.0 * (called(x, t, labels) - null)

    @torch.inference_mode()
    def draw() -> None:
        start = keyed_random.normals(0, seeds, Use.SAMPLE_START, (3, 32, 32))
        steps = samplers.sample(denoise, start, process, options, lambda t: torch.empty(0))
        samplers.to_uint8(deque(steps, maxlen=1)[0].x).cpu()

    return draw


def makers(options: SamplingOptions) -> dict[str, Callable[[], Draw]]:
    found: dict[str, Callable[[], Draw]] = {}
    for precision in ("fp32", "bf16"):
        found[f"ours, {precision}"] = partial(ours, options.model_copy(update={"precision": precision}))
        found[f"diffusers, {precision}"] = partial(of_diffusers, options, precision)
    found["all of diffusers in bf16"] = partial(of_diffusers, options, "fp32", all_bf16=True)
    if options.compile or torch.cuda.is_available():
        plain = options.model_copy(update={"compile": False})
        found[SHIPPED] = partial(of_diffusers, plain, "fp32", tf32=True)
    guided = options.model_copy(update={"guidance": 3.0, "precision": "bf16"})
    found |= {ONE_PASS: partial(ours, guided, 10), TWO_PASSES: partial(guided_in_two, options)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=0, help="default: 256 on a GPU, 16 on a CPU")
    parser.add_argument("--steps", type=int, default=0, help="default: 50 on a GPU, 2 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: all cores")
    parser.add_argument("--compile", action="store_true", help="ours as sample.compile does, diffusers as a whole")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    batch, steps = options.batch or (256 if cuda else 16), options.steps or (50 if cuda else 2)
    sampling = SamplingOptions(sampler="ddim", steps=steps, spacing="uniform", batch=batch, compile=options.compile)
    turns = Turns(torch.device("cuda" if cuda else "cpu"), options.threads)
    draws = makers(sampling)
    turns.take_apart(draws, options.rounds)
    default = SHIPPED if SHIPPED in draws else "diffusers, fp32"
    print(f"{'':28}{'images/s':>10}{'ms a step':>11}{'x diffusers':>13}{'x as shipped':>14}")
    for name in draws:
        seconds, peer = turns.median(name), f"diffusers, {name[-4:]}"
        same = f"{turns.faster(name, peer):.2f}" if peer in draws else ""
        against = f"{turns.faster(name, default):.2f}" if name not in (ONE_PASS, TWO_PASSES) else ""
        print(f"{name:28}{batch / seconds:10.2f}{seconds / steps * 1e3:11.1f}{same:>13}{against:>14}")
    print(f"guidance in one pass is {turns.faster(ONE_PASS, TWO_PASSES):.2f} times as fast as in two")
    how = "compiled" if options.compile else "not compiled"
    what = f"DDIM, {steps} steps, batch {batch}, {how}"
    print(f"{turns.where()}, diffusers {diffusers.__version__}, {what}; medians of {options.rounds} rounds")


if __name__ == "__main__":
    main()

"""How fast are pictures drawn, against diffusers' DDIMPipeline with the same weights?

    python benchmarks/sampling.py [--batch N] [--steps N] [--rounds N] [--threads N] [--compile]

DDIM with η = 0 through the paper's 32-px network, one batch a turn, from seeds to uint8 pictures. In the same precision
diffusers runs as it is used: its pipeline under autocast for bf16, or with the whole network cast to bf16, the steps of
the sampler and their pictures included (which loses quality, and which ours never does). As shipped it is float32, not
compiled, and on a GPU with TF32 convolutions, which for the others is off. Its progress bar is off.

Then classifier-free guidance, as ours draws it, in one pass of twice the batch, and in two passes.
"""

from __future__ import annotations

import argparse
import copy
from collections import deque
from collections.abc import Callable
from functools import partial

import diffusers
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from turns import Turns

from pipeline import noise
from pipeline.config import Config, SampleSection
from pipeline.diffusion import samplers
from pipeline.diffusion.schedule import make_schedule
from pipeline.generator import Generator, Manner, autocast
from pipeline.model import interchange
from pipeline.model.unet import UNet
from pipeline.noise import Use

SHIPPED = "diffusers, as shipped"
Draw = Callable[[], object]


def generator_of(device: torch.device, classes: int = 0) -> Generator:
    """The network of configs/cifar10.yaml, with weights that are not near zero anywhere."""
    config = Config.model_validate({"data": {"size": 32}, "model": {"num_classes": classes}})
    torch.manual_seed(0)
    network = UNet(config.model, channels=3, size=(32, 32))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    network.to(device, memory_format=torch.channels_last)
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps).to(device)
    return Generator(config, network, schedule, device)


def drawn(generator: Generator, manner: Manner) -> None:
    deque(generator.pictures(range(manner.settings.batch), manner), maxlen=0)


def of_diffusers(generator: Generator, *, compiled: bool) -> DDIMPipeline:
    model = UNet2DModel.from_config(interchange.diffusers_config(generator.config.model, 3, (32, 32)))
    model.load_state_dict(interchange.to_diffusers(generator.network("fp32").state_dict()))
    if compiled:
        model.compile()
    pipeline = DDIMPipeline(model.to(generator.device).eval(), DDIMScheduler(timestep_spacing="linspace"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_diffusers(pipeline: DDIMPipeline, settings: SampleSection, precision: str, tf32: bool) -> None:
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=not tf32, deterministic=False, allow_tf32=tf32),
        autocast(pipeline.device, precision),
    ):
        pictures = pipeline(batch_size=settings.batch, num_inference_steps=settings.steps, output_type="pt").images
    (pictures.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def contestants(device: torch.device, settings: SampleSection, compiled: bool) -> dict[str, Draw]:
    generator, found = generator_of(device), {}
    for precision in ("fp32", "bf16"):
        if compiled:
            generator.network(precision).compile()
        found[f"ours, {precision}"] = partial(drawn, generator, Manner(settings, precision))
        peer = of_diffusers(generator, compiled=compiled)
        found[f"diffusers, {precision}"] = partial(drawn_by_diffusers, peer, settings, precision, False)
        if precision == "bf16":
            cast = copy.copy(peer)
            cast.register_modules(unet=copy.deepcopy(peer.unet).to(torch.bfloat16), scheduler=peer.scheduler)
            found["all of diffusers in bf16"] = partial(drawn_by_diffusers, cast, settings, "fp32", False)
    if compiled or device.type == "cuda":
        peer = of_diffusers(generator, compiled=False)
        found[SHIPPED] = partial(drawn_by_diffusers, peer, settings, "fp32", True)
    return found


def guidance(device: torch.device, settings: SampleSection) -> dict[str, Draw]:
    """One pass is what a Generator does; two are the plain way."""
    generator = generator_of(device, classes=10)
    manner = Manner(settings.model_copy(update={"guidance": 3.0}), "bf16")
    network, batch = generator.network("bf16"), settings.batch
    schedule = make_schedule("linear", 1000).to(device)
    seeds = torch.arange(batch, device=device)
    labels = seeds % 10

    def called(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with autocast(device, "bf16"):
            return network(x.contiguous(memory_format=torch.channels_last), t, labels)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        null = called(x, t, torch.full_like(labels, 10))
        return null + 3.0 * (called(x, t, labels) - null)

    @torch.inference_mode()
    def in_two() -> None:
        start = noise.normals(0, seeds, Use.SAMPLE_START, (3, 32, 32))
        steps = samplers.sample(
            denoise, start, schedule, generator.sampler(settings), lambda t: torch.empty(0), "epsilon"
        )
        samplers.to_uint8(deque(steps, maxlen=1)[0].x).cpu()

    return {"guided, one pass": partial(drawn, generator, manner), "guided, two passes": in_two}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=0, help="default: 256 on a GPU, 4 on a CPU")
    parser.add_argument("--steps", type=int, default=0, help="default: 50 on a GPU, 3 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: all cores")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    batch, steps = options.batch or (256 if cuda else 4), options.steps or (50 if cuda else 3)
    settings = SampleSection(sampler="ddim", steps=steps, batch=batch)
    turns = Turns(device, options.threads)
    draws = contestants(device, settings, options.compile)
    turns.take(draws, options.rounds)
    guided = guidance(device, settings)
    turns.take(guided, options.rounds)
    default = SHIPPED if SHIPPED in draws else "diffusers, fp32"
    print(f"{'':28}{'images/s':>10}{'ms a step':>11}{'x diffusers':>13}{'x as shipped':>14}")
    for name in draws:
        seconds, peer = turns.median(name), f"diffusers, {name[-4:]}"
        same = f"{turns.faster(name, peer):.2f}" if peer in draws else ""
        speed = f"{batch / seconds:10.2f}{seconds / steps * 1e3:11.1f}{same:>13}{turns.faster(name, default):>14.2f}"
        print(f"{name:28}{speed}")
    one, two = guided
    for name in guided:
        print(f"{name:28}{batch / turns.median(name):10.2f}{turns.median(name) / steps * 1e3:11.1f}")
    print(f"guidance in one pass is {turns.faster(one, two):.2f} times as fast as in two")
    how = "compiled" if options.compile else "not compiled"
    what = f"DDIM, {steps} steps, batch {batch}, {how}"
    print(f"{turns.where()}, diffusers {diffusers.__version__}, {what}; medians of {options.rounds} rounds")


if __name__ == "__main__":
    main()

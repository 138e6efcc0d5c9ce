"""How fast is a training step, against diffusers, denoising-diffusion-pytorch and the reference article's network?

    python benchmarks/train_step.py [--batch N] [--rounds N] [--threads N] [--compile] [--profile] [--only NAME ...]

A step is forward and backward pass, clipping, optimizer and moving average. Ours is the Trainer's, with the paper's
32-px network of configs/cifar10.yaml; it also turns uint8 into floats and draws noise that is keyed by sample. The
step of diffusers is that of its unconditional example, with the same network: AdamW, EMAModel, mixed precision as
accelerate enters it, images that are floats already. The other two have Adam and networks of their own, as large but
with fewer operations, so compare how many of them they do in a second: denoising-diffusion-pytorch (here by its
author's name, lucidrains), and the article's, which has no moving average. All are compiled with --compile. As shipped,
diffusers is float32, not compiled; on a GPU torch then rounds convolutions to TF32, which for the others is off.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F  # noqa: N812  the field's name
from accelerate import Accelerator
from article import ArticleNet
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from turns import Turns, autocast

from pipeline import config_file
from pipeline.cluster.world import World
from pipeline.config import Config
from pipeline.data.loading.batches import Batch
from pipeline.model import interchange
from pipeline.monitoring.flops import flops_of
from pipeline.training.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = "diffusers, as shipped"
Step = Callable[[], object]
Maker = Callable[[], Step]

KINDS = {
    "convolution": ("conv",),
    "GroupNorm": ("group_norm",),
    "attention": ("scaled_dot_product", "attention"),
    "matrix products": ("mm", "linear"),
    "dropout": ("bernoulli", "dropout"),
    "SiLU, sums, products": ("silu", "aten::add", "aten::mul", "aten::div", "sigmoid", "aten::sum"),
    "optimizer, average, clipping": ("_foreach", "_fused", "adam", "lerp", "norm", "addcdiv", "addcmul", "sqrt"),
    "copies, casts, joins": ("copy", "cat", "clone", "zero", "fill", "to_copy"),
    "compiled": ("triton", "graph_", "Compiled"),
}
"""Parts of the names of operations; the first kind that fits counts."""


def config_of(name: str, batch: int, precision: str, *, compiled: bool = False, **train: str) -> Config:
    """One of the configurations, for steps of one micro-batch; all activations are kept, if nothing else is said."""
    train = {"checkpointing": "none"} | train
    train |= {"global_batch": str(batch), "micro_batch": "auto", "precision": precision}
    settings = [f"train.{key}={value}" for key, value in (train | {"compile": str(compiled).lower()}).items()]
    return config_file.load(str(CONFIGS / name), tuple(settings), lambda file: Path(file).read_text())


def random_images(config: Config, count: int) -> Tensor:
    """Noise as uint8, (count, C, H, W)."""
    return torch.randint(0, 256, (count, config.data.channels, *config.data.height_width), dtype=torch.uint8)


def alone(*, as_torch_ships: bool = False) -> World:
    """One process, on a GPU if there is one.

    As torch ships, convolutions are in TF32 and cuDNN takes its first choice of an algorithm.
    """
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = as_torch_ships, not as_torch_ships
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return World(accelerator, 0, 1, accelerator.device)


def ours(config: Config, images: Tensor, world: World) -> Step:
    """The Trainer's step on a rank's share of the global batch."""
    count = len(images)
    trainer = Trainer(config, world)
    trainer.state.micro_batch = count
    trainer.choose_micro_batch()
    trainer.model.train()

    def step() -> None:
        places = torch.arange(count) + trainer.state.samples + world.rank * count
        trainer.finish_step(trainer.gradient(Batch(images, torch.full((count,), -1), places)))

    return step


def ours_alone(config: Config) -> Step:
    return ours(config, random_images(config, config.train.global_batch), alone())


def same_in_diffusers(config: Config) -> UNet2DModel:
    """The network of a configuration as diffusers builds it."""
    words = interchange.diffusers_config(config.model, config.data.channels, config.data.height_width)
    return UNet2DModel.from_config(words)


def of_diffusers(config: Config, *, as_torch_ships: bool = False) -> Step:
    """The loop of diffusers' examples/unconditional_image_generation/train_unconditional.py."""
    device, precision = alone(as_torch_ships=as_torch_ships).device, config.train.precision
    model = same_in_diffusers(config).to(device).train()
    if config.train.checkpointing != "none":
        model.enable_gradient_checkpointing()
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4,
                   model_cls=UNet2DModel, model_config=model.config)  # fmt: skip
    ema.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    loaded, dtype = loaded_floats(config), torch.bfloat16 if precision == "bf16" else torch.float32
    network = torch.compile(model) if config.train.compile else model

    def step() -> None:
        clean = loaded.to(device).to(dtype)
        noise = torch.randn(clean.shape, dtype=dtype, device=device)
        t = torch.randint(0, 1000, (len(clean),), device=device).long()
        noisy = scheduler.add_noise(clean, noise, t)
        with autocast(device, precision):
            output = network(noisy, t).sample
        F.mse_loss(output.float(), noise.float()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    return step


def loaded_floats(config: Config) -> Tensor:
    """Images in [-1, 1] as a peer's loader gives them."""
    return random_images(config, config.train.global_batch) / 127.5 - 1


def of_the_article(config: Config) -> Step:
    device = alone().device
    model = ArticleNet().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-4)
    bars = (1 - torch.linspace(1e-4, 0.02, 1000, device=device)).cumprod(0)
    loaded, network = loaded_floats(config), torch.compile(model) if config.train.compile else model

    def step() -> None:
        clean = loaded.to(device)
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),), device=device)
        bar = bars[t][:, None, None, None]
        with autocast(device, config.train.precision):
            output = network(bar.sqrt() * clean + (1 - bar).sqrt() * noise, t)
        F.mse_loss(output.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_lucidrains(config: Config) -> Step:
    """The loop of denoising-diffusion-pytorch's Trainer, with the settings of its README."""
    from denoising_diffusion_pytorch import GaussianDiffusion  # noqa: PLC0415  needs torchvision
    from ema_pytorch import EMA  # noqa: PLC0415

    device = alone().device
    diffusion = GaussianDiffusion(lucidrains_net(), image_size=32, timesteps=1000).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    loaded, loss_of = loaded_floats(config) / 2 + 0.5, torch.compile(diffusion) if config.train.compile else diffusion

    def step() -> None:
        with autocast(device, config.train.precision):
            loss = loss_of(loaded.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


def lucidrains_net() -> nn.Module:
    from denoising_diffusion_pytorch import Unet  # noqa: PLC0415  needs torchvision

    net: nn.Module = Unet(dim=64, dim_mults=(1, 2, 4, 8))
    return net


@cache
def forward_gflop(make: Callable[[], nn.Module]) -> float:
    """Of one image of 32 px."""
    with FakeTensorMode():
        network, x, t = make(), torch.empty(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
        return flops_of(lambda: network(x, t)) / 1e9


def makers(batch: int, *, compiled: bool) -> dict[str, Maker]:
    found: dict[str, Maker] = {}
    for precision in ("fp32", "bf16"):
        config = config_of("cifar10.yaml", batch, precision, compiled=compiled)
        found[f"ours, {precision}"] = partial(ours_alone, config)
        found[f"diffusers, {precision}"] = partial(of_diffusers, config)
        found[f"article, {precision}"] = partial(of_the_article, config)
        if importlib.util.find_spec("denoising_diffusion_pytorch") and importlib.util.find_spec("torchvision"):
            found[f"lucidrains, {precision}"] = partial(of_lucidrains, config)
    if compiled or torch.cuda.is_available():  # else the same as in float32
        plain = config_of("cifar10.yaml", batch, "fp32")
        found[SHIPPED] = partial(of_diffusers, plain, as_torch_ships=True)
    return found


def where_the_time_goes(steps: dict[str, Step], device: torch.device) -> None:
    """Milliseconds of a step by kind of operation; of a CPU they are the clock's, so let nobody else use it."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    table: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()
        with profile(activities=activities) as profiler:
            step()
        spent = dict.fromkeys([*KINDS, "rest"], 0.0)
        for event in profiler.key_averages():
            if cuda and event.device_type == DeviceType.CUDA:
                continue  # kernels, which count for the operation that started them
            kind = next((k for k, parts in KINDS.items() if any(part in event.key for part in parts)), "rest")
            spent[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        table[name] = spent
    print("\nms of one step, with the profiler's own time:")
    print(f"{'':32}" + "".join(f"{name:>18}" for name in table))
    for kind in [*KINDS, "rest"]:
        print(f"{kind:32}" + "".join(f"{spent[kind]:18.1f}" for spent in table.values()))
    print(f"{'sum':32}" + "".join(f"{sum(spent.values()):18.1f}" for spent in table.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=0, help="default: 128 on a GPU, 16 on a CPU")
    parser.add_argument("--rounds", type=int, default=0, help="default: 20 on a GPU, 6 on a CPU")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: all cores")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also: where the time of a step goes")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="beginnings of names, such as ours")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batch, rounds = options.batch or (128 if cuda else 16), options.rounds or (20 if cuda else 6)
    turns = Turns(device, options.threads)
    steps = makers(batch, compiled=options.compile)
    if options.only:
        steps = {name: maker for name, maker in steps.items() if name.startswith(tuple(options.only))}
    turns.take_apart(steps, rounds)
    default = SHIPPED if SHIPPED in steps else "diffusers, fp32"
    own = {"article": ArticleNet, "lucidrains": lucidrains_net}
    same_net = partial(same_in_diffusers, config_of("cifar10.yaml", batch, "fp32"))
    print(f"{'':24}{'ms':>9}{'images/s':>10}{'GFLOP/s':>10}{'x diffusers':>13}{'x as shipped':>14}")
    for name in steps:
        seconds, peer = turns.median(name), f"diffusers, {name[-4:]}"
        same = f"{turns.faster(name, peer):.2f}" if peer in steps else ""
        against = f"{turns.faster(name, default):.2f}" if default in steps else ""
        rate = 3 * forward_gflop(own.get(name.partition(",")[0], same_net)) * batch / seconds
        print(f"{name:24}{seconds * 1e3:9.1f}{batch / seconds:10.2f}{rate:10.0f}{same:>13}{against:>14}")
    if not any(name.startswith("lucidrains") for name in steps):
        print("denoising-diffusion-pytorch: left out, it is not here with the torchvision that it needs")
    how = "compiled" if options.compile else "not compiled"
    print(f"{turns.where()}, diffusers {diffusers.__version__}, batch {batch}, {how}; medians of {rounds} rounds")
    if options.profile:
        comparable = [name for name in steps if name.startswith(("ours", "diffusers")) and name != SHIPPED]
        where_the_time_goes({name: steps[name]() for name in comparable}, device)


if __name__ == "__main__":
    main()

"""What runs on a GPU, rehearsed on a fake one: devices, waits of the host, layouts, types and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from pipeline import config_file
from pipeline.checkpoints.checkpoint import newest_checkpoint
from pipeline.cluster import world
from pipeline.cluster.device import own_device
from pipeline.config import Config, SamplingOptions
from pipeline.data.loading.batches import Batch
from pipeline.diffusion.process import DiffusionProcess
from pipeline.doctor import recommend
from pipeline.evaluation.features import Extractor, _CifarResnet
from pipeline.model.unet import Checkpointing, UNet
from pipeline.monitoring import machine
from pipeline.monitoring.environment import environment
from pipeline.monitoring.flops import peak_flop_per_s
from pipeline.plan import SPARE_BYTES, SPARE_SHARE, on_a_gpu
from pipeline.sample import sample
from pipeline.sampling.generator import Generator
from pipeline.sampling.options import SamplingRequest
from pipeline.solvers import SAMPLERS
from pipeline.train import train
from pipeline.training import memory_estimate
from pipeline.training.memory_estimate import POLICIES
from pipeline.training.trainer import Trainer
from tests.rehearsal import branches, fake_cuda
from tests.rehearsal.fake_gpu import FakeGpu, Op, Wait

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))

BRANCHES, RAN = branches.lines(), set[branches.Line]()
VOTE = Wait("world.PendingVote.read", "event")
HOST_AVERAGE = Wait("ema.Average.flush", "event")
MEANT = {
    "world.PendingVote.read": "the vote of a step, once; and whether weights are sound, before a save",
    "ema.Average.flush": "with the average on the host, the weights of the step before, long after they were sent",
    "trainer.Trainer.is_sound": "an average on the host is copied to the device, before a save",
    "ema.Average.network": "as before, for validation and previews",
    "samplers.sample": "the noise levels of the visited timesteps, once a batch",
    "spacing.timesteps": "as before",
    "schedule.Schedule.respaced": "as before",
    "generator._to_numpy": "the images of a batch",
    "generator.Generator._denoised": "the classes of a batch",
    "generator.Generator.between": "the two seeds",
    "features.Extractor.__call__": "the images of a batch, and their features",
    "features._CifarResnet.forward": "two rows of numbers, once a batch",
    "meter.Meter.read": "the curves, every run.log_every steps",
    "train._report": "as before",
    "trainer.Trainer.preview": "images",
    "async_save.Saver.save": "a copy of all tensors, before the next step changes them",
    "checkpoint.Checkpoint.restore": "the weights, at the start",
    "generator._network": "as before",
    "ema._host_copy": "an average on the host, at the start",
    "schedule.Schedule.to": "tables, at the start",
    "trainer.Trainer.__init__": "weights, at the start",
    "trainer.Trainer.validation_loss": "the mean, once, and its images, which are not prefetched",
}
"""Where the host may wait for the device, and when: everything else is a fault."""


@pytest.fixture(scope="module", autouse=True)
def _note_lines() -> Iterator[None]:
    with branches.recorded(BRANCHES, RAN):
        yield


@contextmanager
def rehearsal(memory_bytes: int = fake_cuda.MEMORY_BYTES) -> Iterator[FakeGpu]:
    _forget_accelerators()
    with FakeGpu(memory_bytes) as gpu:
        yield gpu
    _forget_accelerators()


def _forget_accelerators() -> None:
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()


def read(name: str, *settings: str) -> Config:
    return config_file.load(str(ROOT / f"{name}.yaml"), settings, lambda path: Path(path).read_text())


def load(name: str, *settings: str) -> Config:
    return read(name, *settings).in_steps(50_000)


def blank(config: Config, images: int) -> Batch:
    data = config.data
    labels = torch.zeros(images, dtype=torch.int64)
    return Batch(
        torch.zeros(images, data.channels, *data.height_width, dtype=torch.uint8), labels, torch.arange(images)
    )


def ready(config: Config, micro_batch: int | None = None) -> Trainer:
    trainer = Trainer(config, world.init_distributed("cuda", 60))
    trainer.state.micro_batch = micro_batch or 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.trainer.flops_of", lambda work: 0)  # a pass more, that the jobs take anyway
        trainer.choose_micro_batch()
    trainer.warm_up()
    return trainer


def step(trainer: Trainer, gpu: FakeGpu, images: int) -> None:
    """A step, which may wait for its vote alone; and, with the average on the host, for the last step's weights."""
    batch, start = blank(trainer.config, images), len(gpu.waits)
    gradient = trainer.gradient(batch)
    assert gpu.waits[start:] == []
    assert trainer.finish_step(gradient) == (0, 0, 0)
    waits_for_weights = trainer.config.train.ema_device == "cpu" and trainer.state.step > 1
    assert gpu.waits[start:] == [HOST_AVERAGE] * waits_for_weights + [VOTE]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_each_configuration(name: str) -> None:
    config = load(f"configs/{name}", "train.checkpointing=none")
    with rehearsal() as gpu:
        trainer = ready(config, 8)
        gpu.records_ops = True
        step(trainer, gpu, 8)
        assert (trainer.state.step, trainer.state.ema_updates) == (1, 1)
        check_types(gpu, config)
        for part, tensors in trainer.tensors().items():
            assert {(tensor.device.type, tensor.dtype) for tensor in tensors.values()} == {("cuda", torch.float32)}, (
                part
            )


def check_types(gpu: FakeGpu, config: Config) -> None:
    """Operations have the types and layouts that are meant.

    Convolutions and attention have the precision of the run. Their weights and results are channels-last, and so are
    their inputs but for those that follow a norm, which CUDA computes channels-first. What embeds time and class, the
    loss, the optimizer and the averages are float32.
    """
    narrow = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    ops: dict[str, list[Op]] = {}
    for op in gpu.ops:
        ops.setdefault(op.name, []).append(op)
    for op in ops["convolution"]:
        assert {tensor.dtype for tensor in (*op.inputs, *op.outputs)} == {narrow}
        has_layout = op.inputs[1].shape[1] > 1  # one channel has both
        assert not has_layout or all(tensor.is_channels_last for tensor in (op.inputs[1], op.outputs[0])), op
        assert op.inputs[0].is_channels_last or op.inputs[0].is_channels_first
    after_norm = sum(not op.inputs[0].is_channels_last for op in ops["convolution"])
    assert after_norm <= len(ops["native_group_norm"])
    for op in ops["native_group_norm"]:
        assert op.inputs[0].dtype == narrow and op.inputs[0].is_channels_first
    attention = [op for name in ops for op in ops[name] if name.startswith("_scaled_dot_product")]
    assert attention and {tensor.dtype for op in attention for tensor in op.inputs[:3]} == {narrow}
    of_time = [op for op in ops["addmm"] if op.inputs[1].shape[0] == 8]  # rows: images, not tokens
    assert of_time and {tensor.dtype for op in of_time for tensor in (*op.inputs, *op.outputs)} == {torch.float32}
    for name in ("_fused_adam_", "_foreach_norm", "_foreach_copy_", "copy_"):
        wide = {tensor.dtype for op in ops.get(name, ()) for tensor in op.inputs}
        assert wide <= {torch.float32, *([torch.int64, narrow] if name == "copy_" else [])}, name


@pytest.mark.parametrize("settings", [
    (), ("train.precision=bf16", "train.ema_device=cpu"),
    ("train.precision=bf16", "model.learned_variance=true", "model.scale_shift=true", "model.resample_blocks=true"),
    ("model.num_classes=0", "model.head_channels=4", "diffusion.loss_weighting=min_snr",
     "diffusion.prediction_type=v_prediction"),
    ("train.precision=bf16", "train.fused_norm=true", "model.scale_shift=true"),
])  # fmt: skip
def test_steps_of_each_checkpointing_policy(settings: tuple[str, ...]) -> None:
    """The last one of two micro-batches; from the second step on, the average moves instead of being copied."""
    config = load("tests/tiny", "model.dropout=0.3", "model.label_dropout=0.5", "train.device=cuda", *settings)
    with rehearsal() as gpu:
        trainer = ready(config, 2)
        for policy in POLICIES:
            trainer.model.checkpointing = policy
            step(trainer, gpu, 4 if policy == POLICIES[-1] else 2)
        if config.train.ema_device == "cpu":
            assert trainer.is_sound() and trainer.validation_loss(blank(config, 2)) == 1
        assert {wait.site for wait in gpu.waits} <= MEANT.keys()


def with_policy(config: Config, policy: str) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"checkpointing": policy})})


@pytest.mark.parametrize(("name", "precision", "policies", "micro_batch"), [
    ("cifar10", "bf16", ("none", "full"), 64),
    ("trial", "fp32", ("attention", "blocks"), 8),
])  # fmt: skip
def test_the_memory_of_a_step_is_what_plan_says(
    name: str, precision: str, policies: tuple[Checkpointing, ...], micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a thousandth: plan leaves out what a step has beside images, such as their positions."""
    config = load(f"configs/{name}", f"train.precision={precision}")
    monkeypatch.setattr(memory_estimate, "POLICIES", policies)
    footprints = memory_estimate.trace(config)
    with rehearsal() as gpu:
        trainer = ready(with_policy(config, "none"), micro_batch)
        for policy in policies:
            trainer.model.checkpointing = policy
            for micro_batches in (1, 2):
                gpu.reset_peak()
                step(trainer, gpu, micro_batches * micro_batch)
                told = footprints[policy].peak_bytes(micro_batch, accumulating=micro_batches > 1)
                assert gpu.peak == pytest.approx(told, rel=0.001), (policy, micro_batches)


def test_64_ranks() -> None:
    """Rank 0 of 64, with what the ranks exchange left unchanged; two micro-batches in the second step."""
    with rehearsal() as gpu, fake_cuda.ranks(64):
        trainer = ready(load("configs/cifar10"), 2)
        gpu.waits.clear()
        gradient = trainer.gradient(blank(trainer.config, 2))
        assert {wait.site for wait in gpu.waits} <= {"denoiser.Denoiser.__call__"}  # DDP tells its buckets once
        trainer.finish_step(gradient)
        trainer.state.micro_batch = 1
        gpu.records_ops = True
        step(trainer, gpu, 2)
        reduced = [op.inputs[0] for op in gpu.ops if op.name == "allreduce_"]
        weights = sum(parameter.numel() for parameter in trainer.model.parameters())
        assert sum(math.prod(tensor.shape) for tensor in reduced) == weights + 3  # and the vote, once a step
        assert {tensor.dtype for tensor in reduced} == {torch.float32, torch.int32}


def test_auto_takes_what_plan_says() -> None:
    config = load("configs/trial", "train.checkpointing=auto")
    peaks = {policy: footprint.peak_bytes for policy, footprint in memory_estimate.trace(config).items()}
    memory_bytes = peaks["none"](8, accumulating=True) - (1 << 20)
    plan = on_a_gpu(config, memory_bytes=int(memory_bytes * (1 + SPARE_SHARE)) + SPARE_BYTES)
    with rehearsal(memory_bytes):
        trainer = ready(config)
    assert plan["auto"] == {"checkpointing": trainer.state.checkpointing, "micro_batch": trainer.state.micro_batch}
    assert trainer.state.checkpointing != "none"


def test_the_jobs_from_data_to_samples(digits: Path, tmp_path: Path) -> None:
    """Train, validate, preview, save, resume, draw: the bytes of a checkpoint are those of the fake device."""
    run, samples = str(tmp_path / "run"), str(tmp_path / "samples")
    settings = (f"data.shards={digits}", f"data.val_shards={digits}", f"run.dir={run}", "data.workers=0",
                "train.device=cuda", "train.micro_batch=12", "run.preview_every=2", "run.preview_samples=4",
                "run.preview_steps=1",
                "run.val_every=2", "run.val_samples=6")  # fmt: skip
    options = {"sampler": "ddim", "steps": 2, "precision": "bf16", "guidance": 2.0, "batch": 2}
    with rehearsal() as gpu:
        for steps in (2, 3):
            train(read("tests/tiny", *settings, f"train.steps={steps}"), quiet=True)
            checkpoint, _ = newest_checkpoint(run)
            assert checkpoint and checkpoint.step == steps
        assert sample(SamplingRequest(run, (range(2),), options, out=samples), quiet=True)["complete"]
    assert {wait.site for wait in gpu.waits} <= MEANT.keys()
    assert "pin_memory" in gpu.calls and "set_device cuda:0" in gpu.calls
    assert {float(value) for value in checkpoint.tensors("model")["conv_in.bias"]} == {1.0}


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_samplers_wait_at_the_ends_of_a_batch_only(sampler: str) -> None:
    config = load("tests/tiny", "model.learned_variance=true", "diffusion.timesteps=21", "train.lr_schedule=constant")
    with rehearsal() as gpu:
        device = own_device()
        process = DiffusionProcess.of(config.diffusion, variance="learned").to(device)
        with gpu.fake:
            network, guide = (UNet(config.model, channels=1, size=(8, 8)) for _ in range(2))
        network, guide = (each.to(device, memory_format=torch.channels_last) for each in (network, guide))
        options = SamplingOptions(sampler=sampler, steps=3, guidance=2.0, batch=2, precision="bf16")
        for generator in (Generator(config, network, process, device),
                          Generator(config, network, process, device, guide=guide)):  # fmt: skip
            gpu.waits.clear()
            ((_, image), _) = generator.images(range(2), options)
            assert image.shape == (8, 8, 1)
            sites = [wait.site for wait in gpu.waits]
            assert set(sites) <= MEANT.keys() and len(sites) <= 12, sites  # not more with more steps
        assert len(list(generator.between(0, 1, options, 2))) == 2
        if sampler == "ddpm":
            bound = generator.bits_per_dimension(blank(config, 2).images, torch.zeros(2).long(), torch.arange(2))
            assert bound.terms.shape == (2, 21) and bound.total.device.type == "cuda"


def test_features_are_computed_on_the_device() -> None:
    """TorchScript has its own way to devices: it is loaded where CUDA is, or not at all."""
    with rehearsal() as gpu:
        network = _CifarResnet(4, [1, 1, 1], 3).to(own_device()).eval()
        extractor = Extractor("net.npz", "", "", own_device(), network)
        gpu.waits.clear()
        found = extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
        assert (found.features.shape, found.features.device.type) == ((2, 16), "cpu")
        assert {wait.site for wait in gpu.waits} <= MEANT.keys()


def test_the_machine_is_described() -> None:
    with rehearsal():
        _, gpus = machine._gpus()
        assert [gpu.name for gpu in gpus] == [fake_cuda.NAME]
        assert environment(own_device())["device"] == fake_cuda.NAME and peak_flop_per_s(own_device()) == 989e12
        assert recommend(replace(machine.inspect_machine(), gpus=gpus))["device"] == "cuda"


@pytest.mark.parametrize("fault", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x.tolist(),
    lambda x: torch.ones(2).to(x.device), lambda x: torch.tensor(1.0, device=x.device), lambda x: x[torch.tensor([0])],
    lambda x: bool(x[0]), lambda x: torch.equal(x, x), lambda x: torch.cuda.synchronize(),
])  # fmt: skip
def test_a_wait_is_noticed(fault: Callable[[Tensor], object]) -> None:
    with rehearsal() as gpu:
        x = torch.ones(2, device="cuda")
        x * 2 + torch.tensor(1.0)  # a number of the host is an argument of the kernel
        x.to("cpu", non_blocking=True)
        torch.ones(2).to("cuda", non_blocking=True)
        assert gpu.waits == []
        with suppress(UnsupportedFakeTensorException, DynamicOutputShapeException, DataDependentOutputException):
            fault(x)
        assert [wait.site for wait in gpu.waits[:1]] == ["test"]


def test_a_tensor_of_the_host_is_refused() -> None:
    with rehearsal(), pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        torch.ones(2, device="cuda") + torch.ones(2)


def test_torch_is_as_before() -> None:
    with rehearsal():
        pass
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")


def test_every_line_for_cuda_is_rehearsed() -> None:
    """A new line fails here until some test above runs it, or the name of a test on a GPU stands for its function."""
    missing = {f"{BRANCHES[line]}, line {line.number}" for line in BRANCHES if line not in RAN}
    assert missing == set()

"""Every command of README and docs/ is run as it stands there, in a small form: `SMALL` says what is made smaller.

All run in one directory, in which the files that they name lie, page after page: what one command writes, later ones
read. Commands that cannot run here are in `ELSEWHERE`, with the test that covers them.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import warm
from tests.evaluation.test_features import npz, resnet_weights
from tests.launch import command
from tests.warm import ENVIRONMENT

ROOT = Path(__file__).parents[2]
FIRST = ["README.md", "docs/tutorial.md"]  # they make the sets, runs and samples that other pages use
PAGES = [*FIRST, *sorted({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - set(FIRST))]
SMALL = [
    (r"0-\d{2,}", "0-3"),
    (r"\binception\b", "resnet.npz"),  # a file of 91 MB
    (r"--size 64\b", "--size 8 --workers 1"),
    (r"^ddpm train …", "ddpm train --config configs/64px.yaml data.shards=shards/mine run.dir=runs/mine train.steps=4"),
    (r"evaluate_every=\d+", "evaluate_every=2"),
    (r"evaluate_samples=\d+", "evaluate_samples=4"),
    (r"\b(C|FILE)\.yaml", "configs/64px.yaml"),
    (r"\bRUN --seeds", "runs/mine --seeds"),
    (r"(--from .*)SAMPLES", r"\1samples/from"),
    (r"\bSAMPLES\b", "samples/other"),
    (r"(--best .*)samples/mine", r"\1samples/best"),
    (r"^(ddpm plan .*)", r"\1 train.precision=bf16"),
    (r"--interpolate 8", "--interpolate 2"),
    (r"^accelerate launch -m pipeline\.", "ddpm "),  # one process: the options of accelerate are in test_docs.py
]
"""What is replaced in a command: pattern and replacement."""
ELSEWHERE = {
    r"^make (demo|quick|test|bench|soak)": "tests/test_end_to_end.py",
    r"^source |^python3 -m venv|^pip install": "tests/container/test_image.py",
    r"^(pip wheel|pipx) ": "tests/repo/test_wheel.py",  # with pip in place of pipx
    r"^tensorboard ": "tests/monitoring/test_telemetry.py",
    r"^ddpm index 'https": "tests/remote/test_index_remote.py",
    r"^accelerate launch .*(multi_node|one_node)": "tests/multiprocess/test_world_size.py",
    r"^sbatch .*train\.sbatch": "tests/slurm/test_train.py",
    r"^sbatch .*(sample|shard|evaluate)\.sbatch": "tests/slurm/test_arrays.py",
    r"^(kubectl|sky) ": "tests/repo/test_kubernetes.py",  # its files alone
    r"^docker ": "tests/container/test_image.py",
    r"^(apptainer|enroot|CONTAINER|cat >|environ|mounts|rc\(|EOF)": "tests/repo/test_launch.py",  # its syntax alone
    r"hf://|s3://": "tests/remote/test_remote_run.py",
    r"^wandb ": "",  # not tested, as the page says
    r"^ddpm import (ckpt|ema_)": "tests/test_import_model.py",
    r"--ema-length": "tests/sampling/test_ema_length.py",
}
"""Commands that are not run here, and the test that covers them."""
TINY = """
data: {shards: shards/mine, size: 8, workers: 0}
model: {base_channels: 8, channel_mults: [1, 2], attention_sizes: [4], blocks_per_level: 1}
diffusion: {timesteps: 30}
train: {steps: 2, global_batch: 4, warmup_steps: 1, precision: fp32, device: cpu}
sample: {sampler: ddim, steps: 2, batch: 4}
run: {checkpoint_every: 1, log_every: 1, preview_every: 0, val_every: 1}
"""


def shown(page: str) -> Iterator[str]:
    """The commands of a page: the lines of its shell blocks, and inline code that is a whole command."""
    text = (ROOT / page).read_text()
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from (line for line in re.sub(r"\\\n", " ", block).splitlines() if line)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (code for code in re.findall(r"`(ddpm [^`\n]+)`", rest) if "--seeds " in code or "--config " in code)


COMMANDS = list(dict.fromkeys((page, re.split(r"\s#\s", line)[0].strip()) for page in PAGES for line in shown(page)))


def elsewhere(line: str) -> str | None:
    """The rule of `ELSEWHERE` for a command."""
    return next((rule for rule in ELSEWHERE if re.search(rule, line)), None)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that the commands name and do not make themselves."""
    house = tmp_path_factory.mktemp("house")
    pixels = np.random.default_rng(0).integers(256, size=(24, 9, 9, 3), dtype=np.uint8)
    for part in ("IMAGES", "photos/train", "photos/val"):
        for i, image in enumerate(pixels):
            (house / part / ("dark", "light")[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(house / part / ("dark", "light")[i % 2] / f"{i}.png")
    shutil.copy(house / "IMAGES" / "dark" / "0.png", house / "photo.jpg")
    (house / "configs").mkdir()
    for name in ("64px", "trial"):
        (house / "configs" / f"{name}.yaml").write_text(TINY)
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    (house / "cats.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```", tutorial, re.MULTILINE | re.DOTALL)[0])
    npz(house / "resnet.npz", resnet_weights())
    for link, target in {"shards/held-out": "mine", "shards/new": "mine", "models/theirs": "cats"}.items():
        (house / link).parent.mkdir(exist_ok=True)
        (house / link).symlink_to(target)
    return house


def test_every_command_runs(house: Path) -> None:
    done, failed = set(), []
    for page, line in COMMANDS:
        if elsewhere(line):
            continue
        small = line
        for pattern, replacement in SMALL:
            small = re.sub(pattern, replacement, small)
        if small in done:
            continue
        done.add(small)
        program, job, *arguments = shlex.split(small)
        assert program == "ddpm", f"{page}: {line}: neither a command of ddpm nor in ELSEWHERE"
        ended = warm.run(command(job, *arguments), env=ENVIRONMENT, cwd=house, timeout_s=120)
        if ended.returncode != 0 and not (job == "doctor" and ended.returncode == 3):  # this machine may lack something
            failed.append(f"{page}: {line}\n  as {small}\n  exit code {ended.returncode}: {ended.stderr[-500:]}")
    assert len(done) >= 20 and not failed, "\n".join(failed)


def test_what_is_not_run_is_covered_by_a_test_that_exists() -> None:
    used = {elsewhere(line) for _, line in COMMANDS}
    for rule, test in ELSEWHERE.items():
        assert rule in used, f"no command is {rule}: remove it"
        assert (ROOT / test).exists(), test

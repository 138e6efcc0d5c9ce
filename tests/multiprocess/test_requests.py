"""A start of many ranks asks the storage for as much as a start of few: rank 0 reads for all."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.evaluation.test_features import npz, resnet_weights
from tests.launch import TINY, ended, start

NOT_COUNTED = re.compile(
    r"/run/control(/lease-.*|/stop|/nodes/.*)?"  # polled or written now and then: the time decides
    r"|.*\.(npy|tar)"  # the data, which the ranks share
    r"|.*/ddpm-start-.*"  # the memory of the node
)


def operations(ranks: int, place: Path, *arguments: object) -> Counter[tuple[str, str]]:
    """Function and path of each request of so many ranks in a start, without those for the data and those by time."""
    noted, log = place / "operations", place / "log"
    noted.unlink(missing_ok=True)
    launcher = start(ranks, "counted", *TINY, f"run.dir={place / 'run'}", *arguments, package="tests.multiprocess",
                     log=log, OPERATIONS=str(noted))  # fmt: skip
    assert ended(launcher, log) == 0, log.read_text()
    lines = (line.split() for line in noted.read_text().splitlines())
    return Counter(
        (function, path)
        for _, function, full in lines
        for path in [full.replace(str(place), "")]
        if not NOT_COUNTED.fullmatch(path)
    )


def test_the_number_of_ranks_does_not_change_what_a_start_asks_the_storage_for(
    digits: Path, tiny_run: Path, tmp_path: Path
) -> None:
    network = npz(tmp_path / "resnet.npz", resnet_weights())
    settings = (
        f"data.shards={digits}", f"data.val_shards={digits}", "run.val_every=2", "run.val_samples=8", "data.workers=0",
        "train.global_batch=24", "train.micro_batch=3", f"train.init_from={tiny_run}", "run.evaluate_every=2",
        "run.evaluate_samples=8", f"run.evaluate_features={network}",
    )  # fmt: skip
    asked = []
    for ranks in (2, 8):
        place = tmp_path / str(ranks)
        place.mkdir()
        asked.append([operations(ranks, place, *settings, f"train.steps={steps}") for steps in (2, 4)])
    for few, many in zip(*asked):  # a new run that starts from a model, then a run that resumes
        config = ("open_read", TINY[1])
        assert (few.pop(config), many.pop(config)) == (2, 8)  # before the ranks know each other
        assert many == few, {key: (few[key], many[key]) for key in few | many if few[key] != many[key]}
        assert few["open_read", network] == 1

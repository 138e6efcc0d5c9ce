"""The names in a run directory are part of the format: other programs and older runs have them."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoints.run_dir import RunDir, step_of


def test_the_names_of_a_run_directory_do_not_change() -> None:
    run = RunDir("s3://bucket/run/")
    paths = [run.config, run.done, run.failed, run.log, run.tensorboard, run.checkpoint(12000), run.preview(500),
             run.stop, run.stopped, run.node_heartbeats(8), run.lease(3), run.requeues, run.starts]  # fmt: skip
    assert [path.removeprefix("s3://bucket/run/") for path in paths] == [
        "config.yaml", "DONE", "FAILED.json", "log.jsonl", "tensorboard", "checkpoints/step_00012000",
        "previews/step_00000500.png", "control/stop", "control/stopped.json", "control/nodes/00008.json",
        "control/lease-000003.json", "control/requeues.jsonl", "control/starts.jsonl",
    ]  # fmt: skip


def test_numbers_are_read_from_names_and_other_names_are_ignored(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    assert run.lease_generations() == run.checkpoint_steps() == []
    for name in ("lease-000002.json", "lease-1000000.json", "lease-3.json", ".lease-000004.json.0a1b2c3d.tmp", "stop"):
        (tmp_path / "control").mkdir(exist_ok=True)
        (tmp_path / "control" / name).touch()
    assert run.lease_generations() == [2, 1_000_000]
    assert (step_of(run.checkpoint(7) + "/"), step_of("exported")) == (7, None)

"""FAILED.json: the first rank that failed, not the last; what ends a run well is no failure."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import failure, heartbeat, node_directory
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.errors import ConfigError, DataError, NoCheckpoint, PipelineError, RankLost, RunHeld, Stopped
from pipeline.storage import files


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(heartbeat, "WRITE_S", 0.05)
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(node_directory, "MEMORY", str(tmp_path / "memory"))


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def at(run: str, rank: int, step: int, phase: str) -> Heartbeat:
    beat = Heartbeat(run, rank, 2, start="s", patience_s=1e6, on_stall=lambda: None)
    beat.begin_phase(step, phase)
    return beat


def fail(run: str, beat: Heartbeat, error: BaseException, *, lost: bool = False) -> None:
    with failure.record_errors(run, beat, lambda _: lost):
        raise error


def recorded(run: str) -> dict[str, Any]:
    return dict(json.loads(Path(run, "FAILED.json").read_text()))


def test_an_error_is_recorded_with_rank_place_and_trace(run: str) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(run, at(run, 3, 812, "data"), ZeroDivisionError("by zero"))
    content = recorded(run)
    assert "in fail\n    raise error" in content.pop("trace")
    assert content == {
        "rank": 3, "host": socket.gethostname(), "step": 812, "phase": "data", "error": "ZeroDivisionError: by zero",
        "exit_code": 1,
    }  # fmt: skip
    assert failure.read(run) == recorded(run)


@pytest.mark.parametrize("error", [ConfigError("a key"), DataError("a shard"), NoCheckpoint("none")])
def test_an_explained_error_keeps_its_line_and_its_exit_code(run: str, error: PipelineError) -> None:
    with pytest.raises(type(error)):
        fail(run, at(run, 0, 1, "saving"), error)
    assert (recorded(run)["error"], recorded(run)["exit_code"]) == (str(error), error.exit_code)


def test_the_first_failing_rank_stays(run: str) -> None:
    for rank in (2, 0, 1):
        with pytest.raises(RuntimeError):
            fail(run, at(run, rank, 5, "gradient"), RuntimeError(f"of rank {rank}"))
    assert (recorded(run)["rank"], recorded(run)["error"]) == (2, "RuntimeError: of rank 2")
    assert [path.name for path in Path(run).iterdir()] == ["FAILED.json"]


@pytest.mark.parametrize("error", [Stopped("on request"), RunHeld("another job"), KeyboardInterrupt()])
def test_stops_and_interrupts_are_not_recorded(run: str, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(run, at(run, 0, 1, "saving"), error)
    assert failure.read(run) is None


def test_a_rank_that_loses_contact_names_the_rank_that_failed_first(run: str) -> None:
    with pytest.raises(MemoryError):
        fail(run, at(run, 1, 7, "gradient"), MemoryError("of the GPU"))
    before = recorded(run)
    with pytest.raises(RankLost) as caught:
        fail(run, at(run, 0, 7, "update"), RuntimeError("gloo: connection closed by peer"), lost=True)
    assert str(caught.value) == (
        f"lost contact at step 7 in update: rank 1 on {socket.gethostname()} failed first, at step 7 in gradient: "
        f"MemoryError: of the GPU; see {run}/FAILED.json"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert recorded(run) == before


def test_a_rank_that_loses_contact_names_the_last_phase_of_a_killed_rank(run: str) -> None:
    killed = at(run, 1, 6, "update")
    killed._beat()
    with at(run, 0, 7, "update") as mine:
        mine.begin_phase(7, "update")
        with pytest.raises(RankLost, match=r"lost contact at step 7 in update: rank 1 \(process .*\), silent, last "
                           "seen in update at step 6; the same command resumes from the last checkpoint"):  # fmt: skip
            fail(run, mine, RuntimeError("gloo"), lost=True)
    content = recorded(run)
    assert (content["rank"], content["exit_code"]) == (0, 1)
    assert "silent, last seen in update at step 6" in content["error"] and "RuntimeError: gloo" in content["trace"]


def test_ranks_of_a_node_that_lose_contact_together_diagnose_once_and_read_the_record_once(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counter[str]()
    for module, name in ((Heartbeat, "diagnose"), (failure, "read")):
        original = getattr(module, name)

        def counted(*arguments: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)
    told: list[str] = []

    def lose_contact(rank: int) -> None:
        with pytest.raises(RankLost) as caught:
            fail(run, at(run, rank, 7, "update"), RuntimeError("gloo"), lost=True)
        told.append(str(caught.value))

    threads = [threading.Thread(target=lose_contact, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 8 and all("has not started" in line for line in told)
    assert counts == {"diagnose": 1, "read": 2}  # before the diagnosis, and to replace the record of a stall


def test_a_rank_awaits_what_another_node_finds_and_diagnoses_itself_if_that_node_dies(run: str) -> None:
    files.write_bytes(f"{run}/control/diagnosing.json", b"of another node")
    with pytest.raises(RankLost, match="lost contact at step 7 in update: rank 0 has not started"):
        fail(run, at(run, 1, 7, "update"), RuntimeError("gloo"), lost=True)


def test_an_error_that_all_ranks_of_a_node_have_is_written_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    create = files.create
    monkeypatch.setattr(files, "create", lambda url, data: asked.append(url) or create(url, data))
    for rank in range(8):
        with pytest.raises(DataError):
            fail(run, at(run, rank, 5, "saving"), DataError("no space left"))
    assert asked == [f"{run}/FAILED.json"] and recorded(run)["rank"] == 0


def test_a_stall_is_told_by_one_node_of_those_that_wait_and_again_at_a_later_step(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, step, told in ((0, 5, 1), (1, 5, 0), (1, 6, 1)):
        failure.report_stall(run, at(run, rank, step, "update"))
        assert capsys.readouterr().err.count(f"rank {rank} makes no progress: ") == told
        assert recorded(run)["step"] == step
    assert recorded(run)["error"].startswith("no progress: rank 0 (process ")


def test_a_stall_that_passes_while_it_is_diagnosed_is_not_told(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = at(run, 0, 5, "saving")
    monkeypatch.setattr(beat, "diagnose", lambda: beat.begin_phase(5, "data"))
    failure.report_stall(run, beat)
    assert failure.read(run) is None


def test_a_stall_is_recorded_though_the_process_may_be_killed_before_it_fails(run: str) -> None:
    failure.record_stall(run, at(run, 0, 3, "update"), "rank 1 is behind")
    content = recorded(run)
    assert (content["error"], content["trace"], content["exit_code"]) == ("no progress: rank 1 is behind", None, 1)


def test_a_recorded_stall_is_replaced_by_an_error_and_explains_lost_contact(run: str) -> None:
    """A stall that passed, or that was slow storage, must not hide the failure hours later."""
    failure.record_stall(run, at(run, 0, 3, "update"), "rank 1 is behind")
    failure.record_stall(run, at(run, 1, 4, "update"), "rank 2 is behind")
    with pytest.raises(RankLost, match="lost contact at step 5 in update: no progress: rank 2 is behind; the same"):
        fail(run, at(run, 1, 5, "update"), RuntimeError("gloo"), lost=True)
    with pytest.raises(ZeroDivisionError):
        fail(run, at(run, 0, 9, "data"), ZeroDivisionError())
    assert (recorded(run)["rank"], recorded(run)["step"]) == (1, 5)


def test_a_record_is_cleared_and_a_damaged_one_is_none(run: str) -> None:
    failure.clear(run)
    files.write_bytes(f"{run}/FAILED.json", b'{"rank": 1, "ho')
    assert failure.read(run) is None
    failure.clear(run)
    assert list(Path(run).iterdir()) == []


def test_where_nothing_can_be_written_the_error_itself_is_seen(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZeroDivisionError):
        fail(f"{tmp_path}/file/run", at(str(tmp_path), 0, 1, "data"), ZeroDivisionError())

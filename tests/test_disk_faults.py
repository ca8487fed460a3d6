"""A disk that is full, read-only or failing costs a run what cannot be written, and no more; it is told, once.

pytest tests/test_disk_faults.py

The disks are real: small file systems in memory that are filled while a run trains, and folders that are made
read-only. The programs run in forks of a process that has imported everything (faulty.py). A step is two batches; a
validation and a checkpoint come after each.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import both, failing, forked, without_roots_rights

from lorafit.embedded import MODEL, TRAIN
from lorafit.supervisor import Roll

COMMAND = (
    *("task.generate_examples=1", "task.samples=0", "task.eval_examples=4", "task.retention_path=general.txt"),
    *("callbacks.progress=false", "trainer.accelerator=cpu", "rank=2", "data.path=rows.jsonl", "dropout=0.1"),
    *("data.eval_path=held.jsonl", "data.batch_size=3", "trainer.max_steps=4", "trainer.accumulate_grad_batches=2"),
)
STEP = "lorafit.module:FinetuneModule.training_step"
AGAIN = "To complete the run, free space and give resume="


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data and the undisturbed run `whole`; files that are rescued go to `rescued` in it."""
    folder = tmp_path_factory.mktemp("home")
    lines = Path(TRAIN).read_text().splitlines(keepends=True)[:34]
    (folder / "rows.jsonl").write_text("".join(lines[:26]))
    (folder / "held.jsonl").write_text("".join(lines[26:]))
    (folder / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    (folder / "rescued").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TMPDIR", str(folder / "rescued"))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        assert train("hydra.run.dir=whole")[0] == 0
        yield folder


@pytest.fixture
def run(home: Path) -> Iterator[str]:
    """The name of a run folder that is not there yet."""
    yield "run"
    subprocess.run(["chmod", "-R", "u+w", "run"], stderr=subprocess.DEVNULL)
    shutil.rmtree("run", ignore_errors=True)


@pytest.fixture
def disk(home: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of a size ("64k") in memory; skips where that is not allowed."""
    folder = home / "disk"
    folder.mkdir(exist_ok=True)

    def mounted(size: str) -> Path:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if made.returncode:
            pytest.skip("no file system can be mounted here")
        return folder

    yield mounted
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def train(*arguments: str, before: Any = None, logger: str = "none") -> tuple[int, str, str]:
    code, out, err = forked([*COMMAND, f"logger={logger}", *arguments], before).wait(60)
    require_plain(out, err)
    return code, out, err


def go_on(run: object) -> None:
    code, out, err = forked([f"resume={run}"]).wait(60)
    require_plain(out, err)
    assert code == 0, err


def require_plain(out: str, err: str) -> None:
    assert "Traceback" not in out + err and "Logging error" not in err and "Exception ignored" not in err, err


def adapter_of(run: object) -> bytes:
    return (Path(str(run)) / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics_of(run: object) -> dict[str, Any]:
    return json.loads((Path(str(run)) / "metrics.json").read_text())


def rescued_in(err: str) -> Path:
    """The run folder elsewhere that the message names; it holds an adapter that loads, and what was measured."""
    from lorafit.adapter import load_adapter
    from lorafit.loading import load_base_model

    [place] = [word.rstrip(".") for word in err.split() if word.startswith(f"{os.environ['TMPDIR']}/lorafit-")]
    adapter = Path(place)
    assert len(load_adapter(load_base_model(MODEL), adapter)) == 28
    assert metrics_of(adapter.parent)["after"] == metrics_of("whole")["after"]
    assert (adapter.parent / "samples.jsonl").read_bytes() == Path("whole/samples.jsonl").read_bytes()
    return adapter.parent


# ---------------------------------------------------------------------------------- what befalls a run at a batch


def at_batch(number: int, what: Callable[[], object]) -> Callable[[], None]:
    """A `before` that does something just before this batch of training."""
    return functools.partial(_at_batch, number, what)


def _at_batch(number: int, what: Callable[[], object]) -> None:
    from lorafit.module import FinetuneModule

    inner, calls = FinetuneModule.training_step, 0

    def step(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            what()
        return inner(*args)

    FinetuneModule.training_step = step  # type: ignore[method-assign, assignment]


def fill(disk: Path) -> None:
    """Leave no room on a disk, nor in the last page of a log on it."""
    for path in disk.glob("*/train.log"):
        with path.open("ab") as file:
            file.write(b"." * (-path.stat().st_size % 4096))
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (65536, 1):
            with contextlib.suppress(OSError):
                while file.write(b"." * size) == size:
                    pass


def make_read_only(folder: str) -> None:
    for path in (Path(folder), *Path(folder).rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def kill_service() -> None:
    """Kill the process in which W&B writes."""
    from wandb.sdk import wandb_setup

    connection: Any = wandb_setup.singleton()._connection
    connection._proc._process.kill()


# ------------------------------------------------------------------------------------------------- while it trains


@pytest.mark.parametrize("logger", ["none", "csv", "wandb"])
def test_a_run_whose_disk_is_full_trains_on_saves_elsewhere_and_goes_on_to_the_same_adapter(
    disk: Callable[[str], Path], logger: str
) -> None:
    full = disk("4m")
    code, _, err = train(f"hydra.run.dir={full}/run", before=at_batch(5, functools.partial(fill, full)), logger=logger)
    assert code == 5, err
    assert err.count("cannot be written to") == 1 and "the checkpoint of step 3 cannot be written" in err
    assert err.count("the last checkpoint is not written: step 4") == 1
    assert err.count("csv cannot be written") == (logger == "csv")
    assert f"{AGAIN}{full}/run" in err and not list(full.rglob("*.draft"))
    assert adapter_of(rescued_in(err)) == adapter_of("whole")
    assert metrics_of(full / "run")["status"] == "interrupted"
    (full / "filler").unlink()
    go_on(full / "run")
    assert adapter_of(full / "run") == adapter_of("whole")
    assert (full / "run" / "history.jsonl").read_text().count("\n") == Path("whole/history.jsonl").read_text().count(
        "\n"
    )


def test_a_run_of_which_only_the_checkpoints_do_not_fit_has_done_what_it_was_to_do(
    disk: Callable[[str], Path],
) -> None:
    small = disk("250k")
    code, _, err = train(f"hydra.run.dir={small}/run")
    assert code == 0 and err.count("cannot be written") == 1 and "and there is none before it" in err
    assert "the last checkpoint is not written: step 4" in err
    assert adapter_of(small / "run") == adapter_of("whole") and metrics_of(small / "run")["status"] == "completed"


def test_a_run_whose_folder_becomes_read_only_is_saved_elsewhere_and_goes_on_to_the_same_adapter(run: str) -> None:
    locked = at_batch(5, functools.partial(make_read_only, run))
    code, _, err = train(f"hydra.run.dir={run}", before=both(without_roots_rights, locked))
    assert code == 5 and "put that right and give resume=" in err, err
    assert err.count("history.jsonl cannot be written (Permission denied)") == 1
    assert adapter_of(rescued_in(err)) == adapter_of("whole")
    subprocess.run(["chmod", "-R", "u+w", run], check=True)
    go_on(run)
    assert adapter_of(run) == adapter_of("whole")


def lock_out(folder: str) -> None:
    """Nobody may look into it any more, as into the folder of a network disk that is gone."""
    Path(folder).chmod(0)


def test_a_run_whose_folder_cannot_be_looked_into_any_more_is_saved_elsewhere(run: str) -> None:
    gone = at_batch(5, functools.partial(lock_out, run))
    code, _, err = train(f"hydra.run.dir={run}", before=both(without_roots_rights, gone))
    assert code == 5 and err.count("cannot be written to") == 1, err
    Path(run).chmod(0o755)
    assert adapter_of(rescued_in(err)) == adapter_of("whole")
    go_on(run)
    assert adapter_of(run) == adapter_of("whole")


def _unable_to_complete() -> None:
    import lorafit.train as program

    write = program.write_metrics

    def refusing(folder: Path, metrics: dict[str, Any]) -> None:
        if metrics["status"] == "completed":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        write(folder, metrics)

    program.write_metrics = refusing


def test_a_run_whose_metrics_alone_cannot_be_written_is_not_saved_until_it_is_completed(run: str) -> None:
    code, _, err = train(f"hydra.run.dir={run}", before=_unable_to_complete)
    assert code == 5 and f"give resume={Path(run).resolve()}\n" in err and "Disk quota exceeded" in err
    assert metrics_of(run)["status"] == "interrupted"
    go_on(run)
    assert adapter_of(run) == adapter_of("whole") and metrics_of(run)["after"] == metrics_of("whole")["after"]


def test_an_adapter_that_no_disk_takes_is_said_to_be_lost(run: str) -> None:
    code, _, err = train(f"hydra.run.dir={run}", before=failing("lorafit.adapter:save_adapter", errno.EIO))
    assert code == 5 and "nor does" in err and "it is lost" in err and metrics_of(run)["status"] == "failed"


def test_an_adapter_that_an_earlier_run_has_left_read_only_is_replaced(run: str) -> None:
    shutil.copytree("whole", run)
    make_read_only(f"{run}/adapter")
    (Path(run) / "adapter").chmod(0o755)
    (Path(run) / "adapter" / "adapter_model.safetensors").write_bytes(b"another")
    make_read_only(f"{run}/adapter")
    code, _, err = train(f"hydra.run.dir={run}", before=without_roots_rights)
    assert code == 0, err
    assert adapter_of(run) == adapter_of("whole")


# ------------------------------------------------------------------------------------------------------ at the start


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("place", ["file", "file/below", "locked/below", "locked", "disk/run"])
def test_a_run_folder_that_cannot_be_made_is_refused_in_one_line(
    home: Path, disk: Callable[[str], Path], place: str, sweep: bool
) -> None:
    (home / "file").write_text("")
    (home / "locked").mkdir(mode=0o555, exist_ok=True)
    if place.startswith("disk"):
        fill(disk("16k"))
    given = ["-m", "rank=2,3", f"hydra.sweep.dir={place}"] if sweep else [f"hydra.run.dir={place}"]
    code, out, err = train(*given, before=without_roots_rights)
    assert code == 2 and out == "" and err.count("\n") == 1 and "cannot be written to" in err, err


def _in_this_process() -> None:
    os.environ["LORAFIT_IN_PROCESS"] = "1"


def test_a_sweep_says_which_job_has_no_folder_and_how_it_goes_on(home: Path) -> None:
    (home / "sweep").mkdir()
    (home / "sweep" / "rank=3").write_text("")
    swept = ("-m", "rank=2,3", "hydra.sweep.dir=sweep", "trainer.max_steps=1")
    code, _, err = train(*swept, before=_in_this_process)
    assert code == 2 and "sweep/rank=3 (File exists)" in err and "The sweep goes on with:" in err
    assert metrics_of("sweep/rank=2")["status"] == "completed"


def test_the_roll_of_a_sweep_keeps_what_the_disk_does_not_take(disk: Callable[[str], Path]) -> None:
    full = disk("64k")
    roll = Roll.begin(full)
    roll.write(0, 0, {"name": "a", "ended": False})
    fill(full)
    roll.write(0, 0, {"name": "a", "ended": True, "objective": 1.5})
    fill(full)  # the room of the old entry
    roll.write(0, 1, {"name": "b", "ended": False})
    assert roll.entries(0) == {
        (0, 0): {"name": "a", "ended": True, "objective": 1.5},
        (0, 1): {"name": "b", "ended": False},
    }
    assert Roll(roll.folder).unfinished() == {}  # or who watches would take the first for a job that was killed
    (full / "filler").unlink()
    roll.write(0, 1, {"name": "b", "ended": True})
    assert Roll(roll.folder).entries() == {(0, 1): {"name": "b", "ended": True}}


# ---------------------------------------------------------------------------------------------------- history.jsonl


def test_points_wait_for_a_full_disk_and_are_written_in_their_order(
    disk: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    from lorafit.callbacks import History, history_rows

    full = disk("64k")
    history = History(full)
    expected = []

    def log_points(count: int) -> None:
        for _ in range(count):
            expected.append({"step": len(expected), "train/loss": 0.25 * len(expected)})
            history.log_metrics({"train/loss": expected[-1]["train/loss"]}, step=expected[-1]["step"])

    log_points(10)
    fill(full)
    log_points(300)  # beyond the page that the file has
    (size,) = {(full / "history.jsonl").stat().st_size}
    assert size % 4096 == 0 and not (full / "history.jsonl").read_bytes().endswith(b"\n")  # half a line
    before = history_rows(full, 10**9)
    assert 10 < len(before) < 310 and before == expected[: len(before)]
    (full / "filler").unlink()
    log_points(5)
    assert history_rows(full, 10**9) == expected
    assert [record.message.partition("(")[0] for record in caplog.records] == [
        f"{full}/history.jsonl cannot be written ",
        f"{full}/history.jsonl is written again",
    ]


def test_of_more_points_than_are_kept_the_oldest_are_lost_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import lorafit.callbacks.history as module

    monkeypatch.setattr(module, "KEPT", 4)
    (tmp_path / "history.jsonl").mkdir()
    history = module.History(tmp_path)
    for step in range(7):
        history.log_metrics({"a": 1.0}, step=step)
    history.finalize("success")
    assert caplog.records[-1].message.endswith("lacks 7 points that could not be written")
    (tmp_path / "history.jsonl").rmdir()
    history.finalize("success")
    assert [row["step"] for row in module.history_rows(tmp_path, 10)] == [3, 4, 5, 6]
    assert caplog.records[-1].message.endswith("lacks 3 points that could not be written")


# ---------------------------------------------------------------------------------------------------------- loggers


def test_a_logger_that_raises_is_told_of_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    from lorafit.trainer import log_to_all, still_logging

    class Bad:
        def log_metrics(self, *_: object, **__: object) -> None:
            raise RuntimeError("gone")

    class Good:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def log_metrics(self, numbers: object, step: int) -> None:
            self.seen.append((step, numbers))

    bad, good = Bad(), Good()
    trainer: Any = SimpleNamespace(loggers=[bad, good], global_step=3)
    log_to_all(trainer, {"a": 1.0})
    log_to_all(trainer, {"a": 2.0})
    with still_logging(bad):
        bad.log_metrics()
    assert trainer.loggers == [good] and good.seen == [(3, {"a": 1.0}), (3, {"a": 2.0})]
    assert [record.message for record in caplog.records] == ["Bad fails (gone): the run goes on without it"]


def test_a_run_whose_w_and_b_service_is_killed_ends_well_and_says_so(run: str) -> None:
    killed = at_batch(3, kill_service)
    code, _, err = train(f"hydra.run.dir={run}", before=killed, logger="wandb")
    assert code == 0, err
    told = [err.count("WandbLogger fails"), err.count("W&B cannot finish its run")]
    assert max(told) == 1, err  # when a pipe to it breaks is up to the system, but nothing is said twice
    assert adapter_of(run) == adapter_of("whole") and metrics_of(run)["status"] == "completed"
    assert (Path(run) / "history.jsonl").read_text().count("eval/loss") == 4


@pytest.mark.parametrize("failing", ["init", "folder"])
def test_a_run_goes_on_without_w_and_b_where_it_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    import wandb

    from lorafit.callbacks.wandb import wandb_logger

    def refused(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "init":
        monkeypatch.setattr(wandb, "init", refused)
    else:
        (tmp_path / "wandb").write_text("")
    with wandb_logger(tmp_path, config={}) as logger:
        assert logger is None
    [record] = caplog.records
    assert "W&B cannot be opened" in record.message and record.message.endswith("the run goes on without it")


def test_a_w_and_b_that_does_not_finish_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import lorafit.callbacks.wandb as module

    class Run:
        summary: dict[str, object] = {}  # noqa: RUF012

        def finish(self, exit_code: int) -> None:
            threading.Event().wait()

    monkeypatch.setattr(module, "FINISH_SECONDS", {False: 0.5, True: 60.0})
    monkeypatch.setattr(module, "_end_service", lambda: None)
    began = time.monotonic()
    assert not module._finish(Run(), 0, "offline")
    assert 0.5 <= time.monotonic() - began < 5
    assert "no answer in 0.5 s" in caplog.text and caplog.records[0].levelno == logging.WARNING


# ---------------------------------------------------------------------------------------------------------- stdout


def _nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = open(1, "w", closefd=False)


def _full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)


@pytest.mark.parametrize("stdout", [_nobody_reads, _full])
def test_a_run_whose_output_nobody_takes_is_a_run_all_the_same(run: str, stdout: Callable[[], None]) -> None:
    code, _, err = train(f"hydra.run.dir={run}", before=stdout)
    assert code == 0, err
    assert adapter_of(run) == adapter_of("whole")

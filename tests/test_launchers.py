"""Sweeps whose jobs run elsewhere: side by side (joblib), as jobs of a cluster (submitit), on several devices.

pytest tests/test_launchers.py

submitit is tried with its local executor, which runs jobs as SLURM would, on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

from lorafit.checkpoint import load_checkpoint
from lorafit.errors import GroupFailed, MemoryExhausted, Stopped
from lorafit.group import _failure, _is_left_alone

TINY = (
    *("trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "data.batch_size=4", "task.generate_examples=4"),
    *("task.eval_examples=8", "task.max_new_tokens=4", "task.samples=0", "task.retention_path=general.txt"),
    *("callbacks=none", "logger=none", "hydra.sweep.dir=all", "data.limit=300"),
)


def needs(package: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(f"hydra_plugins.{package}") if importlib.util.find_spec("hydra_plugins") else None
    return pytest.mark.skipif(there is None, reason=f"{package} is not installed")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # jobs side by side, the same in all
    Path("general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lorafit.train", *TINY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def program(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m lorafit.train`."""
    process = start(*arguments)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def metrics_of(job: str | Path) -> dict[str, Any]:
    path = Path(job) / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


def statuses() -> dict[str, str]:
    return {path.parent.name: metrics_of(path.parent)["status"] for path in Path("all").glob("*/metrics.json")}


def steps_of(job: str | Path) -> int:
    path = Path(job) / "history.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def same_adapters(one: str | Path, other: str | Path) -> bool:
    mine, theirs = (safetensors.torch.load_file(Path(f) / "adapter/adapter_model.safetensors") for f in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@needs("hydra_joblib_launcher")
def test_jobs_side_by_side_are_recorded_and_the_one_that_fails_is_named() -> None:
    command = ("trainer.max_steps=3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    code, out, err = program("-m", "target_modules=[q_porj],[q_proj]", *command)
    assert code == 2 and "Traceback" not in out + err
    summary = err.partition("lorafit train: ")[2].splitlines()
    assert summary[0] == "1 of 2 jobs failed:" and "'q_porj' matches no linear layer" in summary[1]
    assert statuses() == {"target_modules=q_porj": "failed", "target_modules=q_proj": "completed"}
    assert not list(Path("all").glob(".roll-*"))

    code, _, err = program("target_modules=[q_proj]", "trainer.max_steps=3", "hydra.run.dir=alone")
    assert code == 0, err
    assert same_adapters("all/target_modules=q_proj", "alone")


@needs("hydra_submitit_launcher")
def test_a_job_of_a_cluster_that_is_killed_does_not_stop_the_others() -> None:
    process = start(
        *("-m", "target_modules=[q_porj],[q_proj],[v_proj]", "trainer.max_steps=60", "hydra/launcher=submitit_local")
    )
    killed, other = Path("all/target_modules=q_proj"), Path("all/target_modules=v_proj")
    try:
        wait_for(lambda: steps_of(killed) >= 2 or process.poll() is not None)
        owner(killed).kill()
        out, err = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in out + err, err
    assert "the launcher gave up" in err and "target_modules=q_proj: it has not ended, or still runs" in err
    assert "'q_porj' matches no linear layer" in err
    assert "The sweep goes on with: python -m lorafit.train " in err
    assert (
        metrics_of(killed)["status"] == "interrupted" and metrics_of("all/target_modules=q_porj")["status"] == "failed"
    )
    wait_for(lambda: metrics_of(other).get("status") == "completed")
    wait_for(lambda: not owners(other))
    assert "Traceback" not in (other / "train.log").read_text()


def owners(job: Path) -> list[psutil.Process]:
    """The processes that hold the lock of a job open."""
    lock, found = str((job / ".lock").resolve()), []
    for process in psutil.process_iter():
        try:
            if any(file.path == lock for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def owner(job: Path) -> psutil.Process:
    [process] = owners(job)
    return process


def wait_for(true: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_jobs_on_two_devices_follow_one_another_also_where_one_of_them_diverges() -> None:
    """Both processes of the first end by themselves: the watch over the group would end the sweep."""
    settings = ("rank=2", "trainer.devices=2", "trainer.max_skipped_steps=0", "trainer.max_steps=2")
    code, out, err = program("-m", "optimizer.lr=1e30,1e-3", *settings)
    assert code == 3 and "Traceback" not in out + err, out + err
    diverged, trained = "optimizer.lr=1e+30", "optimizer.lr=0.001"
    assert {path.name for path in Path("all").iterdir()} == {diverged, trained, "multirun.yaml", "sweep.json"}
    assert statuses() == {diverged: "diverged", trained: "completed"}
    assert "cannot be taken: its loss is nan" in metrics_of(f"all/{diverged}")["error"]
    metrics = metrics_of(f"all/{trained}")
    assert metrics["speed"]["steps"] == 2 and metrics["lora"]["rank"] == 2
    assert "rank=2" in Path(f"all/{trained}/.hydra/overrides.yaml").read_text()
    assert [json.loads(line)["step"] for line in Path(f"all/{trained}/history.jsonl").open()].count(1) >= 1
    assert out.count("\njob ") == 2 and not Path("multirun").exists() and not Path("outputs").exists()


PLANTED = """
import os
if os.environ.get("LOCAL_RANK") == "1":
    import torch
    from lorafit.training import Run
    def fail(self, signals):
        raise torch.OutOfMemoryError("planted")
    Run.train = fail
"""


def test_a_run_of_which_one_process_alone_runs_out_of_memory_ends_with_4(tmp_path: Path) -> None:
    """The first process waits for the other, which never joins the group, and cannot be told."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    command = (*TINY, "trainer.devices=2", "trainer.max_steps=4", "hydra.run.dir=run")
    ended = subprocess.run(
        [sys.executable, "-m", "lorafit.train", *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 4 and "Traceback" not in ended.stderr, ended.stderr
    assert "out of memory while measuring (planted). It held" in ended.stderr
    assert "lorafit train: another process of the group has run out of memory" in ended.stderr
    assert metrics_of("run")["status"] == "out_of_memory"


@pytest.mark.parametrize(
    ("code", "kind", "exit_code", "status"),
    [
        (4, MemoryExhausted, 4, "out_of_memory"),
        (-9, GroupFailed, 4, "interrupted"),
        (137, GroupFailed, 4, "interrupted"),
        (143, Stopped, 143, "interrupted"),
        (-2, Stopped, 130, "interrupted"),
        (2, GroupFailed, 2, "failed"),
        (1, GroupFailed, 1, "failed"),
        (-11, GroupFailed, 1, "failed"),
        (-40, GroupFailed, 1, "failed"),  # a signal without a name
    ],
)
def test_a_process_that_ends_alone_gives_the_group_its_exit_code(
    code: int, kind: type[BaseException], exit_code: int, status: str
) -> None:
    failed = _failure(code)
    assert type(failed) is kind and (failed.exit_code, failed.status) == (exit_code, status)


def test_only_what_a_collective_says_is_taken_for_the_end_of_another() -> None:
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert _is_left_alone(gloo) and _is_left_alone(torch.distributed.DistBackendError("NCCL error"))
    for own in (RuntimeError("a bug"), ValueError("socket"), KeyError("optimizer_states")):
        assert not _is_left_alone(own)


def test_a_run_on_two_devices_goes_on_bit_for_bit_when_one_is_killed_and_when_only_one_is_told_to_end() -> None:
    """Each process draws dropout masks of its own, and a signal reaches one of them."""
    command = ("trainer.devices=2", "dropout=0.1", "rank=2", "trainer.max_steps=20")
    command += ("trainer.checkpoint_every_n_steps=1",)
    code, out, err = program(*command, "hydra.run.dir=whole")
    assert code == 0, out + err

    def step() -> int:
        return load_checkpoint("run/checkpoints/last.ckpt")["global_step"]

    process = start(*command, "hydra.run.dir=run")
    try:
        wait_for(Path("run/checkpoints/last.ckpt").exists)
        [other] = psutil.Process(process.pid).children()
        other.kill()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 4 and "Traceback" not in err, err
    assert "another process of the group was killed" in err
    assert metrics_of("run")["status"] == "interrupted"

    reached = step()
    process = start("resume=run")
    try:
        wait_for(lambda: step() > reached)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    finally:
        process.kill()
    assert reached < step() < 20
    code, out, err = program("resume=run")
    assert code == 0, out + err
    files = [Path(run, "adapter", "adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert files[0] == files[1]

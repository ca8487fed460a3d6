"""A signal ends a program at any moment with its exit code and nothing lost; a second and a third do not wait.

pytest tests/test_signals.py

The programs run in forks of a process that has imported everything (faulty.py). They stop at a place, get a signal
there, and go on. An epoch is nine batches and a step two of them; each validation comes after two steps.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import Child, both, forked, pause, pausing, tell

from lorafit.embedded import TRAIN

COMMAND = (
    *("task.generate_examples=1", "task.samples=0", "task.eval_examples=8", "task.retention_path=general.txt"),
    *("callbacks.progress=false", "trainer.accelerator=cpu", "rank=2", "data.path=rows.jsonl", "dropout=0.1"),
    *("data.eval_path=held.jsonl", "data.batch_size=3", "trainer.max_steps=8", "trainer.accumulate_grad_batches=2"),
)
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
STEP = "lorafit.module:FinetuneModule.training_step"
# where it stands: what pauses there, and how many steps its checkpoint has then (None: it has none yet)
PHASES = {
    "reading the command": (pausing("lorafit.launch:prepare", "here"), None),
    "importing": (pausing("lorafit.train:fine_tune", "here"), None),
    "reading data": (pausing("lorafit.sweep:build_data", "here"), None),
    "measuring the base": (pausing("lorafit.training:measure", "here"), None),
    "in a step": (pausing(STEP, "here", (6,)), 3),
    "in an accumulation": (pausing(STEP, "here", (5,)), 3),
    "validating": (pausing("lorafit.module:FinetuneModule.validation_step", "here", (3,)), 2),
    "writing a checkpoint": (pausing("lorafit.checkpoint:torch.save", "here", (2,)), 4),
    "measuring the adapter": (pausing("lorafit.training:measure", "here", (2,)), 8),
    "saving the adapter": (pausing("lorafit.adapter:replace_folder", "here"), 8),
    "after it is saved": (pausing("lorafit.training:log_results", "here"), 8),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data and the undisturbed run `whole`."""
    folder = tmp_path_factory.mktemp("home")
    lines = Path(TRAIN).read_text().splitlines(keepends=True)[:40]
    (folder / "rows.jsonl").write_text("".join(lines[:26]))
    (folder / "held.jsonl").write_text("".join(lines[26:]))
    (folder / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, _, err = forked([*COMMAND, "logger=none", "hydra.run.dir=whole"]).wait()
        assert code == 0, err
        yield folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a run folder that is not there yet."""
    monkeypatch.chdir(home)
    yield "run"
    shutil.rmtree(home / "run", ignore_errors=True)


def start(run: str, before: object = None, *arguments: str, logger: str = "none") -> Child:
    return forked([*COMMAND, f"logger={logger}", f"hydra.run.dir={run}", *arguments], before)  # type: ignore[arg-type]


def metrics_of(run: str) -> dict[str, object]:
    return json.loads((Path(run) / "metrics.json").read_text())


def adapter_of(run: str) -> bytes:
    return (Path(run) / "adapter" / "adapter_model.safetensors").read_bytes()


def require_quiet(child: Child, out: str, err: str) -> None:
    assert "Traceback" not in out + err and "Exception ignored" not in err, err
    assert child.left_behind() == []


def steps_of(run: str) -> int | None:
    path = Path(run) / "checkpoints" / "last.ckpt"
    if not path.exists():
        return None
    from lorafit.checkpoint import load_checkpoint

    return int(load_checkpoint(path)["global_step"])


@pytest.mark.parametrize(("phase", "signum"), zip(PHASES, itertools.cycle(CODES)))
def test_a_signal_ends_the_program_with_its_code_wherever_it_stands(run: str, phase: str, signum: int) -> None:
    before, steps = PHASES[phase]
    child = start(run, before)
    child.until("here")
    os.kill(child.pid, signum)
    child.go()
    code, out, err = child.wait(30)
    require_quiet(child, out, err)
    assert code == CODES[signal.Signals(signum)], err
    assert err.endswith(f"lorafit train: stopped by {signal.Signals(signum).name}\n")
    assert steps_of(run) == steps
    assert phase == "reading the command" or metrics_of(run)["status"] == "interrupted"


@pytest.mark.parametrize("phase", ["measuring the base", "validating"])
def test_a_run_that_was_stopped_goes_on_to_the_adapter_of_the_undisturbed_one(run: str, phase: str) -> None:
    child = start(run, PHASES[phase][0])
    child.until("here")
    os.kill(child.pid, signal.SIGTERM)
    child.go()
    assert child.wait(30)[0] == 143
    code, _, err = forked([f"resume={run}"]).wait()
    assert code == 0, err
    assert adapter_of(run) == adapter_of("whole") and metrics_of(run)["after"] == metrics_of("whole")["after"]
    assert losses(run) == losses("whole")


def losses(run: str) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (Path(run) / "history.jsonl").read_text().splitlines()]
    return [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]


# --------------------------------------------------------------------------------------- a second one, and a third


def _slow_to_clean_up() -> None:
    """A checkpoint that takes for ever, and a cleaning up after it that does, too."""
    import lorafit.checkpoint as checkpoint

    def save(*_: object) -> None:
        pause("saving")
        try:
            time.sleep(60)
        finally:
            tell("cleaning")
            time.sleep(60)

    checkpoint.torch.save = save


def test_a_second_signal_does_not_wait_for_the_step_and_what_there_is_goes_on(run: str) -> None:
    child = start(run, both(pausing(STEP, "first", (6,)), pausing("lorafit.checkpoint:torch.save", "saving", (2,))))
    child.until("first")
    os.kill(child.pid, signal.SIGTERM)
    child.go()
    child.until("saving")
    os.kill(child.pid, signal.SIGINT)
    child.go()
    code, out, err = child.wait(30)
    require_quiet(child, out, err)
    assert code == 130 and metrics_of(run)["status"] == "interrupted"
    assert steps_of(run) == 2 and not list(Path(run).rglob(".last*"))  # that of the validation; no draft is left
    assert forked([f"resume={run}"]).wait()[0] == 0
    assert adapter_of(run) == adapter_of("whole")


@pytest.mark.parametrize(("third", "least", "most"), [(False, 4.0, 12.0), (True, 0.0, 3.0)])
def test_cleaning_up_after_a_second_signal_has_five_seconds_and_none_after_a_third(
    run: str, third: bool, least: float, most: float
) -> None:
    child = start(run, _slow_to_clean_up)
    child.until("saving")
    os.kill(child.pid, signal.SIGTERM)
    child.go()
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    child.until("cleaning")
    if third:
        os.kill(child.pid, signal.SIGINT)
    code, out, err = child.wait(30)
    assert code == (130 if third else 143) and "Traceback" not in out + err
    assert least < time.monotonic() - began < most


def _under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_signal_that_was_ignored_at_the_start_stays_so(run: str) -> None:
    child = start(run, both(_under_nohup, pausing(STEP, "here", (3,))))
    child.until("here")
    os.kill(child.pid, signal.SIGHUP)
    child.go()
    code, _, err = child.wait()
    assert code == 0, err
    assert adapter_of(run) == adapter_of("whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_ends_the_workers_of_a_loader_without_a_word(run: str, signum: int) -> None:
    """As Ctrl-C at a terminal, a scheduler, or a terminal that is closed."""
    child = start(run, pausing(STEP, "here", (5,)), "data.num_workers=2")
    child.until("here")
    assert len(child.left_behind()) == 3  # the program and its workers
    os.killpg(child.pid, signum)
    child.go()
    code, out, err = child.wait(30)
    require_quiet(child, out, err)
    assert code == CODES[signum] and steps_of(run) == 3


def test_a_signal_while_w_and_b_finishes_ends_the_program_with_its_code(run: str) -> None:
    child = start(run, pausing("lorafit.callbacks.wandb:_finish", "here"), logger="wandb")
    child.until("here")
    os.kill(child.pid, signal.SIGINT)
    child.go()
    code, out, err = child.wait(40)
    require_quiet(child, out, err)
    assert code == 130 and metrics_of(run)["status"] == "interrupted"
    assert forked([f"resume={run}"]).wait()[0] == 0
    assert adapter_of(run) == adapter_of("whole")


def test_a_signal_to_a_program_that_has_just_begun_ends_it_with_its_code(run: str) -> None:
    """As its command runs it: from the first line of its own on, while the heavy libraries are still to come."""
    text = (
        "import os, signal, runpy, sys, lorafit.launch\n"
        "real = lorafit.launch.get_args_parser\n"
        "lorafit.launch.get_args_parser = lambda: os.kill(os.getpid(), signal.SIGINT) or real()\n"
        "sys.argv[1:] = ['trainer.max_steps=1']\n"
        "runpy.run_module('lorafit.train', run_name='__main__', alter_sys=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 130 and ended.stderr == "lorafit train: stopped by SIGINT\n"

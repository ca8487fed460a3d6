"""What a night brings: is anything lost, and does each fault end as it is said to?

    python scripts/faults.py                     everything, about a quarter of an hour on two cores
    python scripts/faults.py kills --kills 200   SIGKILL at random moments, and while a checkpoint is being written
    python scripts/faults.py faults              numbers that are not finite, memory, disk, damaged checkpoints, signals
    python scripts/faults.py hostile             generated bad configurations, adapters and checkpoints
    python scripts/faults.py alarms              a planted fault for each alarm, and healthy runs

Every run is the program itself, `python -m lorafit.train`, in a process of its own that is forked from one that
has imported the libraries. Prints tables, writes faults.json into the folder, and ends with exit code 1 where
something is not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kill_sweep import differing

from lorafit.terminal import say

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import planted  # noqa: E402
from faulty import Child, forked  # noqa: E402

SMALL = (
    *("task.generate_examples=1", "task.samples=0", "task.eval_examples=8", "task.retention_path=general.txt"),
    *("callbacks.progress=false", "trainer.accelerator=cpu", "logger=none"),
)
TIME_LIMIT = 120.0  # seconds: a run that takes longer hangs


def start(folder: Path, *arguments: str, before: Callable[[], object] | None = None) -> Child:
    """`python -m lorafit.train arguments` in `folder`. before: called in the new process first, to plant a fault."""
    with contextlib.chdir(folder):
        return forked(arguments, before)


def run(folder: Path, *arguments: str, before: Callable[[], object] | None = None) -> tuple[int, str]:
    """(exit code, all that it printed) of a run; TimeoutError for one that hangs."""
    code, out, err = start(folder, *arguments, before=before).wait(TIME_LIMIT)
    return code, out + err


def prepare(folder: Path, rows: int = 40) -> Path:
    """A folder with a little data, in which runs are started."""
    from lorafit.embedded import TRAIN

    folder.mkdir(parents=True, exist_ok=True)
    lines = Path(TRAIN).read_text().splitlines()[:rows]
    (folder / "rows.jsonl").write_text("\n".join(lines[: -rows // 4]) + "\n")
    (folder / "held.jsonl").write_text("\n".join(lines[-rows // 4 :]) + "\n")
    (folder / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    return folder


DATA = ("data.path=rows.jsonl", "data.eval_path=held.jsonl", "data.batch_size=3")


# ------------------------------------------------------------------------------------------------ kills


@dataclass(frozen=True)
class Case:
    """The settings of a run that is killed."""

    quant: str
    optimizer: str
    workers: int
    accumulation: int
    packing: bool

    def command(self) -> list[str]:
        # at rank 32 the state of every matrix is large enough to be held in 8 bits
        return [
            *(*SMALL, *DATA, "rank=32", "dropout=0.1", "data.max_length=96"),
            *("trainer.max_steps=14", "trainer.checkpoint_every_n_steps=1", "trainer.val_check_interval=4"),
            *(f"quant={self.quant}", f"optimizer={self.optimizer}", f"data.num_workers={self.workers}"),
            *(f"trainer.accumulate_grad_batches={self.accumulation}", f"data.packing={str(self.packing).lower()}"),
        ]

    def __str__(self) -> str:
        packed = ", packed" if self.packing else ""
        return f"{self.quant} {self.optimizer} workers {self.workers} accumulation {self.accumulation}{packed}"


CASES = [
    Case(quant, optimizer, workers, accumulation, packing=number % 3 == 2)
    for number, (quant, optimizer, workers, accumulation) in enumerate(
        itertools.product(("none", "nf4"), ("adamw", "adamw_8bit", "paged_adamw_8bit"), (0, 2), (1, 3))
    )
]


def unreadable(run_folder: Path) -> list[str]:
    """The files of a run that a kill has left so that they cannot be read."""
    from lorafit.checkpoint import newest_checkpoint
    from lorafit.errors import InputError

    found = []
    try:
        newest = newest_checkpoint(run_folder / "checkpoints")
        found += [str(path.name) for path in newest.damaged] if newest is not None else []
    except InputError as error:
        found.append(str(error))
    for path in (run_folder / "metrics.json", run_folder / "adapter" / "adapter_config.json"):
        try:
            json.loads(path.read_text())
        except FileNotFoundError:
            pass
        except ValueError:
            found.append(path.name)
    return found


def kill_once(folder: Path, command: Sequence[str], rng: random.Random, seconds: float, writing: bool) -> str | None:
    """Start a run and kill it: at a random moment, or in the middle of the writing of a checkpoint. Says when; None
    where it had ended by then."""
    began = time.monotonic()
    child = start(folder, *command)
    at = began + rng.uniform(0, seconds * (0.7 if writing else 1))
    drafts = folder / "killed" / "checkpoints"
    while time.monotonic() < began + TIME_LIMIT and _runs(child.pid):
        if time.monotonic() > at and (not writing or any(drafts.glob(".*.draft"))):
            break
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    code, _, _ = child.wait()
    moment = f"{time.monotonic() - began:.2f} s{', writing' if writing else ''}"
    return moment if code == -signal.SIGKILL else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kills(home: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Kill runs of every case, `count` times in all, and resume them to their ends. A row for each run."""
    rng, rows = random.Random(seed), []
    each = [count // len(CASES) + (number < count % len(CASES)) for number in range(len(CASES))]
    for number, (case, times) in enumerate(zip(CASES, each, strict=True)):
        if not times:
            continue
        folder = prepare(home / f"case{number}")
        began = time.monotonic()
        code, said = run(folder, *case.command(), "hydra.run.dir=calm")
        seconds = time.monotonic() - began
        if code:
            raise RuntimeError(f"the undisturbed run of {case} ended with exit code {code}:\n{said}")
        row: dict[str, Any] = {"case": str(case), "kills": [], "unreadable": []}
        again = [*case.command(), "hydra.run.dir=killed", "resume=auto"]
        command = again
        while len(row["kills"]) < times:
            moment = kill_once(folder, command, rng, seconds, writing=(number + len(row["kills"])) % 3 == 0)
            if moment is None:  # it came to its end before
                shutil.rmtree(folder / "killed")
                command = again
                continue
            row["kills"].append(moment)
            row["unreadable"] += unreadable(folder / "killed")
            # both ways to go on; before there is a run to name, the command itself is given again
            there = (folder / "killed" / ".hydra" / "overrides.yaml").is_file()
            command = ["resume=killed"] if there and rng.random() < 0.5 else again
        code, said = run(folder, *command)
        row["exit_code"] = code
        row["differs"] = differing(folder / "calm", folder / "killed") if code == 0 else [said[-500:]]
        rows.append(row)
        good = not row["differs"] and not row["unreadable"]
        say(f"{'ok ' if good else 'NOT'} {case}: killed after {', '.join(row['kills'])}")
        if good:
            shutil.rmtree(folder)
    return rows


# ------------------------------------------------------------------------------------------------ faults, one by one


RUN = (
    *(*SMALL, *DATA, "rank=2", "trainer.max_steps=12", "trainer.checkpoint_every_n_steps=1", "trainer.on_oom=stop"),
    *("trainer.log_every_n_steps=1", "hydra.run.dir=run"),
)


@dataclass(frozen=True)
class Fault:
    """A fault, what plants it, and what is promised of the run: its exit code, texts that it says, its status, and
    which files it leaves ("adapter"), or not ("!adapter")."""

    name: str
    plant: Callable[[], object] | None
    code: int
    says: tuple[str, ...] = ()
    status: str | None = None
    files: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    then: Callable[[Path], list[str]] | None = None  # what else has to be true of the folder of the run


def good_checkpoint(most: int) -> Callable[[Path], list[str]]:
    """last.ckpt can be read, is of a step up to `most`, and holds finite numbers."""

    def look(folder: Path) -> list[str]:
        import torch

        from lorafit.checkpoint import load_checkpoint

        state = load_checkpoint(folder / "checkpoints" / "last.ckpt")
        finite = all(torch.isfinite(tensor).all() for tensor in state["state_dict"].values())
        problems = [] if finite else ["last.ckpt is not finite"]
        return problems + ([f"last.ckpt is of step {state['global_step']}"] if state["global_step"] > most else [])

    return look


def counted(key: str, least: int, most: int) -> Callable[[Path], list[str]]:
    """What metrics.json counts in `speed`."""

    def look(folder: Path) -> list[str]:
        found = json.loads((folder / "metrics.json").read_text())["speed"][key]
        return [] if least <= found <= most else [f"speed.{key} is {found}"]

    return look


LOST = ("!adapter/adapter_config.json",)
KEPT = ("adapter/adapter_config.json", "samples.jsonl", "history.jsonl", "checkpoints/last.ckpt")
FAULTS = [
    Fault("a NaN in a weight of the base", planted.nan_weight, 3, (planted.LAYER,), "diverged", LOST),
    Fault(
        "weights that diverge at step 7",
        partial(planted.diverge, 7),
        3,
        (planted.LAYER, "last good checkpoint"),
        "diverged",
        LOST,
        then=good_checkpoint(5),
    ),
    Fault(
        "a learning rate that diverges",
        None,
        3,
        ("optimizer.lr",),
        "diverged",
        LOST,
        ("optimizer.lr=1e30", "trainer.gradient_clip_val=null"),
    ),
    Fault(
        "a batch whose loss is NaN",
        partial(planted.nan_batch, 5),
        0,
        ("step 5 was skipped",),
        "completed",
        KEPT,
        then=counted("skipped_steps", 1, 1),
    ),
    Fault(
        "one of three batches of a step, max_skipped_steps=0",
        partial(planted.nan_batch, 5),
        3,
        (),
        "diverged",
        LOST,
        ("trainer.accumulate_grad_batches=3", "trainer.max_skipped_steps=0"),
        then=counted("skipped_steps", 1, 1),
    ),
    Fault(
        "memory runs out",
        partial(planted.out_of_memory, 1),
        4,
        ("data.batch_size=1", "trainer.on_oom=halve"),
        "out_of_memory",
        LOST,
    ),
    Fault(
        "memory runs out, on_oom=halve",
        partial(planted.out_of_memory, 1),
        0,
        (),
        "completed",
        KEPT,
        ("trainer.on_oom=halve",),
        then=counted("halved_batches", 1, 99),
    ),
    Fault(
        "one row does not fit, on_oom=halve",
        partial(planted.out_of_memory, 0),
        4,
        ("single example",),
        "out_of_memory",
        LOST,
        ("trainer.on_oom=halve",),
    ),
    Fault(
        "a data worker is killed",
        planted.killed_worker,
        4,
        ("data.num_workers=0",),
        "out_of_memory",
        LOST,
        ("data.num_workers=2",),
    ),
    Fault("a number of the adapter is lost at the end", planted.nan_at_the_end, 3, (planted.LAYER,), "diverged", LOST),
]
ALARMS = [
    Fault("a B that somebody has frozen", planted.frozen_factor, 3, (planted.LAYER,), "failed", LOST),
    Fault("a layer that no gradient comes to", planted.detached_layer, 3, (planted.LAYER,), "failed", LOST),
    Fault(
        "a learning rate of nothing",
        None,
        3,
        ("has not moved", "optimizer.lr"),
        "failed",
        LOST,
        ("optimizer.lr=1e-300",),
    ),
    Fault(
        "a bit of the base that flips",
        partial(planted.changed_base, 4),
        3,
        ("the frozen base has changed", planted.LAYER),
        "failed",
        LOST,
    ),
    Fault(
        "a bit of an NF4 base that flips",
        partial(planted.changed_base, 4),
        3,
        ("the frozen base has changed", planted.LAYER),
        "failed",
        LOST,
        ("quant=nf4",),
    ),
    Fault(
        "a bit of the base that flips after the first look",
        partial(planted.changed_base, 11),
        3,
        ("the frozen base has changed", planted.LAYER),
        "failed",
        LOST,
    ),
    *(
        Fault(f"none: {' '.join(settings)}", None, 0, (), "completed", KEPT, settings)
        for settings in (
            ("quant=none",),
            ("quant=nf4", "model.checkpointing=selective"),
            ("quant=int8", "model.checkpointing=full"),
            ("data.packing=true", "data.max_length=96", "lora/adapter_dtype=nf4"),
            ("bias=all", "model.dtype=float32"),
            ("modules_to_save=[lm_head]", "target_modules=[q_proj]", "model.fused=off"),
        )
    ),
]


def judge(fault: Fault, folder: Path, code: int, said: str) -> list[str]:
    """What of a fault's promises was not kept."""
    run_folder = folder / "run"
    found = [] if code == fault.code else [f"exit code {code}, promised {fault.code}"]
    found += [f"does not say {text!r}" for text in fault.says if text not in said]
    if "Traceback" in said:
        found.append("a traceback")
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((run_folder / "metrics.json").read_text())["status"]
        if fault.status not in (None, status):
            found.append(f"status {status}")
    for name in fault.files:
        if (run_folder / name.lstrip("!")).exists() == name.startswith("!"):
            found.append(f"{name.lstrip('!')} {'is there' if name.startswith('!') else 'is missing'}")
    if fault.then is not None and not found:
        found += fault.then(run_folder)
    return found + unreadable(run_folder)


def try_fault(fault: Fault, folder: Path) -> dict[str, Any]:
    """Run with the fault; a row of the table."""
    prepare(folder)
    began = time.monotonic()
    try:
        code, said = run(folder, *RUN, *fault.settings, before=fault.plant)
        problems = judge(fault, folder, code, said)
    except TimeoutError as error:
        code, said, problems = -1, str(error), ["it hangs"]
    if problems:
        (folder / "said.txt").write_text(said)
    return {"fault": fault.name, "exit_code": code, "seconds": round(time.monotonic() - began, 1), "problems": problems}


def disk_faults() -> list[Fault]:
    """Those of the disk: real file systems that are full or cannot be written."""
    return [
        Fault("a flipped bit in last.ckpt", None, 0, ("checksums", "previous.ckpt"), "completed", KEPT, ("resume=run",)),
        Fault("last.ckpt cut off", None, 0, ("cut off or damaged",), "completed", KEPT, ("resume=run",)),
        Fault("no checkpoint can be read", None, 2, ("cannot be read as a checkpoint",), None, (), ("resume=run",)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["kills"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    home = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    if "kills" in arguments.parts:
        kills(home, arguments.kills, arguments.seed)
    if "faults" in arguments.parts:
        for number, fault in enumerate([*FAULTS, *ALARMS][int(os.environ.get("FROM","0")):int(os.environ.get("TO","99"))]):
            print(try_fault(fault, home / f"fault{number}"), flush=True)


if __name__ == "__main__":
    main()

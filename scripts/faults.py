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
from pathlib import Path
from typing import Any

from kill_sweep import differing

from lorafit.terminal import say

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

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
        if time.monotonic() > at and (not writing or any(drafts.glob(".*ckpt-*"))):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["kills"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    home = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    kills(home, arguments.kills, arguments.seed)


if __name__ == "__main__":
    main()

"""What a night brings: is anything lost, and does each fault end as it is said to?

    python scripts/faults.py                     everything, about a quarter of an hour on two cores
    python scripts/faults.py kills --kills 200   SIGKILL at random moments, and while a checkpoint is being written
    python scripts/faults.py faults              numbers that are not finite, memory, disk, damaged checkpoints
    python scripts/faults.py signals             each signal at each phase of a run, which then goes on
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
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kill_sweep import differing

from lorafit.terminal import say

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import planted  # noqa: E402
from faulty import Child, forked, without_roots_rights  # noqa: E402

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
        row |= {"fault": f"{case}: killed after {', '.join(row['kills'])}"}
        row["problems"] = [*row["differs"], *row["unreadable"]]
        tell(row)
        if not row["problems"]:
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
    first: Callable[[Path], object] | None = None  # called with the folder before the run
    after: Callable[[Path], object] | None = None  # and after it


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
            ("target_modules=[q_proj,embed_tokens]", "optimizer=adamw_8bit"),
            ("modules_to_save=[lm_head]", "target_modules=[q_proj]", "model.fused=off"),
        )
    ),
]


def stop_a_run(folder: Path) -> None:
    """The run `run` of the folder, stopped after six steps, and the undisturbed one, `calm`."""
    for name, plant in (("calm", None), ("run", partial(planted.signalled, 6, signal.SIGTERM))):
        code, said = run(folder, *RUN, f"hydra.run.dir={name}", before=plant)
        if code != (0 if plant is None else 143):
            raise RuntimeError(said)


def damage(*names: str, cut: bool = False) -> Callable[[Path], None]:
    """Stop a run and damage its checkpoints: cut in half, or one bit of each flipped."""

    def first(folder: Path) -> None:
        stop_a_run(folder)
        for name in names:
            path = folder / "run" / "checkpoints" / f"{name}.ckpt"
            content = bytearray(path.read_bytes())
            if cut:
                del content[len(content) // 2 :]
            else:
                content[in_the_largest_part(path, content)] ^= 1
            path.write_bytes(content)

    return first


def in_the_largest_part(path: Path, content: bytes) -> int:
    """Where the middle of the largest tensor of a checkpoint lies in its file: between parts there is padding."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    header = part.header_offset
    names = sum(int.from_bytes(content[header + at : header + at + 2], "little") for at in (26, 28))
    return header + 30 + names + part.file_size // 2


def as_calm(folder: Path) -> list[str]:
    """The run ended as the undisturbed one."""
    return differing(folder.parent / "calm", folder)


def mount(size: str) -> Callable[[Path], None]:
    """The run folder is a small disk of its own."""

    def first(folder: Path) -> None:
        (folder / "run").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder / "run"], check=True)

    return first


def unmount(folder: Path) -> None:
    subprocess.run(["umount", folder / "run"], check=True)


def allow(folder: Path) -> None:
    for path in (folder, folder / "run", folder / "run" / "checkpoints"):
        if path.exists():
            path.chmod(0o755)


RESUME = ("resume=run",)
FILES = [
    Fault("a bit of last.ckpt flips", None, 0, ("previous.ckpt",), "completed", KEPT, RESUME, as_calm, damage("last")),
    Fault("last.ckpt is cut off", None, 0, ("previous.ckpt",), "completed", KEPT, RESUME, as_calm, damage("last", cut=True)),  # noqa: E501
    Fault(
        "last and previous are damaged", None, 0, ("best.ckpt",), "completed", KEPT, RESUME, as_calm,
        damage("last", "previous"),
    ),
    Fault(
        "all checkpoints are damaged", None, 2, ("remove it to begin anew",), "interrupted", LOST, RESUME,
        first=damage("last", "previous", "best"),
    ),
    Fault(
        "a disk of 400 KB that is full at once", None, 5, ("No space left", "It is saved"), None, LOST,
        first=mount("400k"), after=unmount,
    ),
    Fault(
        "a disk of 900 KB that checkpoints fill", None, 0, ("No space left",), "completed",
        ("adapter/adapter_config.json",), ("rank=12",), first=mount("900k"), after=unmount,
    ),
    Fault(
        "a run folder that becomes read-only", partial(planted.unwritable, 5), 5, ("Permission denied", "It is saved"),
        None, LOST, after=allow,
    ),
    Fault(
        "a place that is read-only from the start", without_roots_rights, 2, ("cannot be written",), None, LOST,
        ("hydra.run.dir=closed/run",), first=lambda folder: (folder / "closed").mkdir(0o555),
    ),
]  # fmt: skip


def signals(home: Path) -> list[dict[str, Any]]:
    """Each signal at each phase: its exit code, and a run that goes on to the end of the undisturbed one."""
    from test_signals import CODES, PHASES

    prepare(home)
    command = (*SMALL, *DATA, "rank=2", "dropout=0.1", "trainer.max_steps=8", "trainer.accumulate_grad_batches=2")
    code, said = run(home, *command, "hydra.run.dir=calm")
    if code:
        raise RuntimeError(said)
    rows = []
    for number, (phase, (before, _)) in enumerate(PHASES.items()):
        for signum, promised in CODES.items():
            folder, problems = home / f"run{number}-{signum}", []
            try:
                child = start(home, *command, f"hydra.run.dir={folder.name}", before=before)
                child.until("here")
                os.kill(child.pid, signum)
                child.go()
                code, out, err = child.wait(TIME_LIMIT)
                problems = [] if code == promised else [f"exit code {code}, promised {promised}"]
                problems += ["a traceback"] if "Traceback" in out + err else []
                again, said = run(home, *command, f"hydra.run.dir={folder.name}", "resume=auto")
                problems += [f"resumed: {again} {said[-300:]}"] if again else differing(home / "calm", folder)
            except TimeoutError as error:
                problems.append(f"it hangs: {error}")
            rows.append({"fault": f"{signal.Signals(signum).name} {phase}", "exit_code": code, "problems": problems})
            tell(rows[-1])
    return rows


def hostile(home: Path, count: int) -> list[dict[str, Any]]:
    """Generated bad configurations, adapters and checkpoints; how many of each, and how they ended."""
    from hostile import AdapterLab, bad_adapters, bad_configs, try_config
    from hostile_checkpoints import CheckpointLab, bad_checkpoints

    home.mkdir(parents=True, exist_ok=True)
    (home / "adapters").mkdir()
    (home / "checkpoints").mkdir()
    checkpoints = CheckpointLab(home / "checkpoints")
    adapters = AdapterLab(home / "adapters", checkpoints.model)
    rows = []
    with contextlib.chdir(home):
        for kind, cases, attempt in (
            ("configurations", bad_configs(seed=1, count=count), try_config),
            ("adapters", bad_adapters(seed=1, count=count), adapters.try_adapter),
            ("checkpoints", bad_checkpoints(seed=1, count=count), checkpoints.try_checkpoint),
        ):
            outcomes: Counter[str] = Counter()
            problems = []
            for case in cases:
                try:
                    outcomes[attempt(case)] += 1  # type: ignore[operator]
                except Exception as error:
                    problems.append(f"{case}: {type(error).__name__}: {error}"[:300])
            rows.append(
                {"fault": f"{outcomes.total()} bad {kind}: {dict(outcomes)}", "exit_code": "", "problems": problems}
            )
            tell(rows[-1])
    return rows


def tell(row: dict[str, Any]) -> None:
    """A line of the table."""
    ended = "; ".join(row["problems"]) or "as promised"
    say(f"{'ok ' if not row['problems'] else 'NOT'} {row['fault']:62} {row['exit_code']!s:>4}  {ended}")


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
    return found if fault.code == 2 else found + unreadable(run_folder)


def try_fault(fault: Fault, folder: Path) -> dict[str, Any]:
    """Run with the fault; a row of the table."""
    prepare(folder)
    if fault.first is not None:
        fault.first(folder)
    began = time.monotonic()
    try:
        command = fault.settings if fault.settings == RESUME else (*RUN, *fault.settings)
        code, said = run(folder, *command, before=fault.plant)
        problems = judge(fault, folder, code, said)
    except TimeoutError as error:
        code, said, problems = -1, str(error), ["it hangs"]
    finally:
        if fault.after is not None:
            fault.after(folder)
    if problems:
        (folder / "said.txt").write_text(said)
    return {"fault": fault.name, "exit_code": code, "seconds": round(time.monotonic() - began, 1), "problems": problems}


def main() -> None:
    parts = ("kills", "faults", "signals", "alarms", "hostile")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=parts, help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--hostile", type=int, default=500, help="bad files of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="where the runs go; default: a new temporary folder")
    arguments = parser.parse_args()
    home = (arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    home.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for part in arguments.parts:
        say(f"\n{part}")
        if part == "kills":
            found[part] = kills(home, arguments.kills, arguments.seed)
            say(f"{sum(len(row['kills']) for row in found[part])} kills of {len(found[part])} runs")
        elif part == "signals":
            found[part] = signals(home / "signals")
        elif part == "hostile":
            found[part] = hostile(home / "hostile", arguments.hostile)
        else:
            found[part] = []
            for number, fault in enumerate([*FAULTS, *FILES] if part == "faults" else ALARMS):
                found[part].append(try_fault(fault, home / f"{part}{number}"))
                tell(found[part][-1])
    bad = [row["fault"] for rows in found.values() for row in rows if row["problems"]]
    total = sum(map(len, found.values()))
    machine = {"cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0]}
    (home / "faults.json").write_text(json.dumps({"machine": machine, "bad": bad} | found, indent=2) + "\n")
    say(f"\n{total - len(bad)} of {total} rows as promised ({home / 'faults.json'})")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

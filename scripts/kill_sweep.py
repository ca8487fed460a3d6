"""Does a sweep survive being killed? The same sweep twice: once left alone, once killed again and again.

    python scripts/kill_sweep.py                           ranks 1, 2, 4, 8, 16 over none and nf4, five kills
    python scripts/kill_sweep.py --kills 20 --ranks 2,4 --folder /tmp/kills trainer.max_steps=30

The second sweep gets SIGKILL at random moments and is called again with the same folder each time. Then the final
metrics (all but time and memory), the adapters, byte for byte, and the histories must be those of the first, and no job
that had ended may have been touched again. Prints a table, writes kill_sweep.json, and ends with exit code 1 where
something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lorafit.sweep import flat, read_metrics

# what depends on when and where a run was, not on what it computed
TIMES = ("speed", "memory")
TIMED_POINTS = ("per_second", "train/seconds", "memory/")


def sweep_command(folder: Path, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "lorafit.train", "-m", "sweep=rank", *overrides, f"hydra.sweep.dir={folder}"]


def run(command: Sequence[str], log: Path, seconds: float | None = None) -> tuple[int, float]:
    """(exit code, seconds) of a command; killed with SIGKILL after so many seconds."""
    began = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    return code, time.monotonic() - began


def differing(one: Path, other: Path) -> list[str]:
    """What is not the same in two run folders, times and memory aside."""
    mine, theirs = (
        flat({key: value for key, value in read_metrics(job).items() if key not in TIMES}) for job in (one, other)
    )
    found = [f"metrics.json: {key}" for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
    if read_metrics(one).get("speed", {}).get("steps") != read_metrics(other).get("speed", {}).get("steps"):
        found.append("metrics.json: speed.steps")
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        files = [job / name for job in (one, other)]
        if files[0].is_file() != files[1].is_file() or (
            files[0].is_file() and files[0].read_bytes() != files[1].read_bytes()
        ):
            found.append(name)
    if curve(one) != curve(other):
        found.append("history.jsonl")
    return found


def curve(job: Path) -> dict[tuple[int, str], float]:
    """Every logged number by (step, name), those of time and of the process's memory aside."""
    path = job / "history.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {
        (row["step"], key): value
        for row in rows
        for key, value in row.items()
        if key != "step" and not any(word in key for word in TIMED_POINTS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--ranks", default="1,2,4,8,16")
    parser.add_argument("--quants", default="none,nf4")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="where both sweeps go; default: a new temporary folder")
    parser.add_argument("overrides", nargs="*", help="for both sweeps, such as trainer.max_steps=30")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kill_sweep-"))
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"rank={arguments.ranks}", f"quant={arguments.quants}", *arguments.overrides]
    calm, killed = folder / "calm", folder / "killed"

    code, seconds = run(sweep_command(calm, overrides), folder / "calm.log")
    print(f"left alone: exit code {code} in {seconds:.0f} s", flush=True)
    rng, finished, touched = random.Random(arguments.seed), dict[Path, int](), list[str]()
    moments, total = [], seconds
    for number in range(arguments.kills + 1):
        until = rng.uniform(0.5, 2 * total / (arguments.kills + 1)) if number < arguments.kills else None
        code, seconds = run(sweep_command(killed, overrides), folder / "killed.log", until)
        for path, stamp in finished.items():
            if path.stat().st_mtime_ns != stamp:
                touched.append(path.parent.name)
        done = [
            path for path in killed.glob("*/metrics.json") if read_metrics(path.parent).get("status") == "completed"
        ]
        finished |= {path: path.stat().st_mtime_ns for path in done if path not in finished}
        moments.append({"seconds": round(seconds, 1), "exit_code": code, "completed": len(finished)})
        print(f"call {number + 1}: exit code {code} after {seconds:.1f} s, {len(finished)} jobs complete", flush=True)

    jobs = sorted(path.parent for path in calm.glob("*/metrics.json"))
    rows = [{"job": job.name, "differs": differing(job, killed / job.name)} for job in jobs]
    for row in rows:
        print(f"{row['job']:28} {'the same' if not row['differs'] else ', '.join(row['differs'])}")
    for name in touched:
        print(f"{name} had ended and was run again")
    whole = bool(jobs) and code == 0 and not touched and not any(row["differs"] for row in rows)
    result = {"calls": moments, "jobs": rows, "run_twice": touched, "same": whole, "cores": os.cpu_count()}
    (folder / "kill_sweep.json").write_text(json.dumps(result, indent=2) + "\n")
    print("the killed sweep ended as the other one" if whole else "the sweeps differ", f"({folder})")
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()

"""Do all paths train to the same result, and which is fastest?   .venv/bin/python scripts/compare_paths.py [seeds…]

The default run (the embedded model, NF4, rank 16, 250 steps) by each path, one run after another in processes of their
own, for each seed: held-out loss, exact match, seconds of training. What differs between paths is rounding; what
rounding does to a run is seen by the side of what another seed does to it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PATHS = {
    "as written": ["model.fused=off"],
    "fast": [],
    "fast, selective": ["model.checkpointing=selective"],
    "fast, full": ["model.checkpointing=full"],
}


def main() -> None:
    seeds = [int(word) for word in sys.argv[1:]] or [42, 1, 2]
    found: dict[str, list[dict]] = {name: [] for name in PATHS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for index, (name, options) in enumerate(PATHS.items()):
                run = Path(folder) / f"{seed}_{index}"
                command = [sys.executable, "-m", "lorafit.train", "rank=16", "quant=nf4", f"seed={seed}", *options]
                subprocess.run([*command, f"hydra.run.dir={run}"], check=True, stdout=subprocess.DEVNULL)
                metrics = json.loads((run / "metrics.json").read_text())
                found[name].append(metrics)
                after, speed = metrics["after"], metrics["speed"]
                print(
                    f"seed {seed:3}  {name:16} loss {after['loss']:.5f}  exact match {after['exact_match']:.3f}  "
                    f"{speed['train_seconds']:.1f} s",
                    flush=True,
                )
    for name, runs in found.items():
        losses = [run["after"]["loss"] for run in runs]
        seconds = [run["speed"]["train_seconds"] for run in runs]
        print(
            f"{name:16} loss {statistics.mean(losses):.5f} (from {min(losses):.5f} to {max(losses):.5f}), "
            f"median {statistics.median(seconds):.1f} s of training"
        )


if __name__ == "__main__":
    main()

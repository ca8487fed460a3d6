"""What it takes to load a model into 4 bits: a random Llama of 1 GB, by transformers and by us, a process for each.

    python scripts/bench_load.py                         1 GB, 3 rounds
    python scripts/bench_load.py --gigabytes 2 --rounds 5 --json load.json

    transformers   from_pretrained with BitsAndBytesConfig: NF4, double quantization, bfloat16
    cold           load_base_model, nothing kept from before
    warm           load_base_model(cache=True), the second time

The three take turns, so that a machine that changes its speed changes it for all. Timed is the call alone, after the
imports and with the file in the page cache. Memory is the peak of the process (VmHWM, set back just before the call)
above what it had then. Mapped pages of a file count once they are looked at, so that `used`, after a first forward
pass, says what is needed to go on from what was kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

VOCABULARY, HIDDEN, INNER = 32000, 2048, 5632
SYSTEMS = ("transformers", "cold", "warm")
MAKE = f"""
import sys, torch
from pathlib import Path
from transformers import LlamaConfig
from lorafit.merging.files import write_shards
from lorafit.merging.skeleton import skeleton
from lorafit.weights import Planned

folder, layers = Path(sys.argv[1]), int(sys.argv[2])
config = LlamaConfig(
    vocab_size={VOCABULARY}, hidden_size={HIDDEN}, intermediate_size={INNER}, num_hidden_layers=layers,
    num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    dtype="bfloat16", bos_token_id=0, eos_token_id=1, pad_token_id=2,
)
config.save_pretrained(folder)

def made(shape):
    kind = dict(dtype=torch.bfloat16)
    return lambda: torch.randn(shape, **kind) * 0.02 if len(shape) > 1 else torch.ones(shape, **kind)

state = skeleton(config, torch.bfloat16).state_dict()
tensors = {{name: Planned(torch.bfloat16, tuple(p.shape), made(tuple(p.shape))) for name, p in state.items()}}
print(write_shards(folder, tensors, 10**10))
"""
LOAD = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging
from lorafit.loading import load_base_model
from lorafit.quant import base_report, disarm_repacking

logging.disable_progress_bar()
system, folder = sys.argv[1:]

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def load():
    if system == "transformers":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    return load_base_model(folder, quant="nf4", device="cpu", cache=system == "warm")

open("/proc/self/clear_refs", "w").write("5")
before, started = memory("VmRSS"), time.perf_counter()
model = load()
seconds = time.perf_counter() - started
peak, kept = memory("VmHWM") - before, memory("VmRSS") - before
report = base_report(model)
disarm_repacking(model)
ids = torch.arange(1, 33).view(1, -1)
with torch.no_grad():
    loss = float(model(input_ids=ids, labels=ids).loss)
used = memory("VmRSS") - before
print(json.dumps({
    "seconds": seconds, "peak": peak, "kept": kept, "used": used, "loss": loss,
    "copy": bool(report and report.copy), "whole": report and report.whole, "threads": torch.get_num_threads(),
}))
"""


def child(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ | environment
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout.splitlines()[-1]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the model in 16 bits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    per_layer = 2 * (2 * HIDDEN**2 + HIDDEN**2 // 2 + 3 * HIDDEN * INNER)
    layers = max(1, round((options.gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer))
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        model, cache = Path(folder, "model"), str(Path(folder, "cache"))
        model.mkdir()
        size = int(child(MAKE, str(model), str(layers)))
        child(LOAD, "warm", str(model), LORAFIT_CACHE=cache)  # makes the copy
        for _ in range(options.rounds):
            for system in SYSTEMS:
                runs[system].append(json.loads(child(LOAD, system, str(model), LORAFIT_CACHE=cache)))
    assert all(run["copy"] for run in runs["warm"]) and not any(run["copy"] for run in runs["cold"])
    medians = {
        system: {key: statistics.median(run[key] for run in found) for key in ("seconds", "peak", "kept", "used")}
        for system, found in runs.items()
    }
    rows = []
    print(f"{size / 1e9:.2f} GB in 16 bits, NF4 with double quantization, medians of {options.rounds}")
    print(
        f"{'':14}{'seconds':>9}{'peak MB':>9}{'kept MB':>9}{'used MB':>9}{'time':>7}{'memory':>8}   loss of 32 tokens"
    )
    for system, median in medians.items():
        ratios = {key: median[key] / medians["transformers"][key] for key in ("seconds", "peak")}
        rows.append({"system": system, **median, "ratios": ratios, "runs": runs[system]})
        print(
            f"{system:14}{median['seconds']:9.2f}{median['peak'] / 1e6:9.0f}{median['kept'] / 1e6:9.0f}"
            f"{median['used'] / 1e6:9.0f}"
            f"{ratios['seconds']:7.2f}{ratios['peak']:8.2f}   {runs[system][0]['loss']:.6f}"
        )
    if options.json:
        machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()}
        machine["versions"] = {name: version(name) for name in ("torch", "transformers", "bitsandbytes")}
        options.json.write_text(json.dumps({"bytes": size, "rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()

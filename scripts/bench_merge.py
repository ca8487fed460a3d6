"""What a merge of a large model takes: a random Llama of about 1 GB, merged by the program in its own process.

    python scripts/bench_merge.py                        16 bits and nf4, 1 GB
    python scripts/bench_merge.py --gigabytes 2 --quant nf4 --rows 16

Prints the time, the peak memory of the whole process, and that of a process that only imports what the program does.
The model is written a tensor at a time into a temporary folder, and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCABULARY, HIDDEN, INNER = 32000, 2048, 5632
MAKE = f"""
import json, shutil, sys, torch
from pathlib import Path
from transformers import LlamaConfig
from lorafit.adapter import save_adapter
from lorafit.embedded import MODEL
from lorafit.fingerprint import fingerprint_of
from lorafit.inject import inject_lora, lora_layers
from lorafit.merging.base import _sampled
from lorafit.merging.files import write_shards
from lorafit.weights import FileWeights, Planned
from lorafit.merging.skeleton import lend_weights, skeleton
from lorafit.quant import BaseReport

folder, adapter, layers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = LlamaConfig(
    vocab_size={VOCABULARY}, hidden_size={HIDDEN}, intermediate_size={INNER}, num_hidden_layers=layers,
    num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    dtype="bfloat16", bos_token_id=0, eos_token_id=1, pad_token_id=2,
)
config.save_pretrained(folder)
model = skeleton(config, torch.bfloat16)

def made(shape):
    kind = dict(dtype=torch.bfloat16)
    return lambda: torch.randn(shape, **kind) * 0.02 if len(shape) > 1 else torch.ones(shape, **kind)

tensors = {{n: Planned(torch.bfloat16, tuple(p.shape), made(tuple(p.shape))) for n, p in model.state_dict().items()}}
print(write_shards(folder, tensors, 5 * 10**8))
for path in MODEL.glob("tokenizer*"):
    shutil.copy(path, folder)
weights = FileWeights(folder)
lend_weights(model, weights)
model.lorafit_base = BaseReport(str(folder), None, fingerprint_of(_sampled(model, weights, {{}}, torch.bfloat16)))
inject_lora(model, rank=16, alpha=32)
for layer in lora_layers(model).values():
    torch.nn.init.normal_(layer.lora_B.weight, std=0.002)
save_adapter(model, adapter)
"""
# a process says itself what it used at most, at its end
PROGRAM = """
import atexit, re, resource, sys

def peak():
    status = open("/proc/self/status").read()
    high = re.search(r"VmHWM:\\s+(\\d+)", status)[1]
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, high, file=sys.stderr)

atexit.register(peak)
sys.argv = ["lorafit.merge", *sys.argv[1:]]
import lorafit.merge
if sys.argv[1:]:
    lorafit.merge.main()
else:
    import lorafit.adapter, lorafit.datamodule, lorafit.merging, lorafit.tables, lorafit.trainer
"""


def child(code: str, *arguments: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout, done.stderr


def peak(errors: str) -> tuple[float, float]:
    """(ru_maxrss, VmHWM) in MB from what a child said."""
    words = next(line for line in errors.splitlines() if line.startswith("peak ")).split()
    return int(words[1]) * 1024 / 1e6, int(words[2]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the model in 16 bits")
    parser.add_argument("--quant", nargs="*", default=["none", "nf4"])
    parser.add_argument("--rows", type=int, default=8, help="held-out rows to measure on")
    options = parser.parse_args()
    per_layer = 2 * (2 * HIDDEN**2 + HIDDEN**2 // 2 + 3 * HIDDEN * INNER)
    layers = max(1, round((options.gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer))
    print(f"imports alone: {peak(child(PROGRAM)[1])[0]:.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = Path(folder, "model"), Path(folder, "adapter")
        model.mkdir()
        size = int(child(MAKE, str(model), str(adapter), str(layers))[0].split()[-1])
        for quant in options.quant:
            out, run = Path(folder, f"out-{quant}"), Path(folder, f"run-{quant}")
            started = time.perf_counter()
            _, errors = child(
                PROGRAM,
                f"adapter={adapter}",
                f"model.name={model}",
                f"quant={quant}",
                f"out={out}",
                f"task.eval_examples={options.rows}",
                "data.batch_size=4",
                "max_kl=100",
                "logger=none",
                f"hydra.run.dir={run}",
            )
            seconds = time.perf_counter() - started
            most, high = peak(errors)
            found = json.loads((run / "merge.json").read_text())
            undo = os.path.getsize(out / "undo.lorafit") if (out / "undo.lorafit").exists() else 0
            print(
                f"quant={quant}: {size / 1e9:.2f} GB of weights, {found['tokens']} tokens, {seconds:.0f} s, "
                f"ru_maxrss {most:.0f} MB, VmHWM {high:.0f} MB, {found['chosen']} taken, {undo / 1e6:.0f} MB to undo"
            )


if __name__ == "__main__":
    main()

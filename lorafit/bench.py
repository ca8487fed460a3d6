"""Step time and step memory of lorafit and its peers, measured in one run on one machine.

    python -m lorafit.bench                                        a small Llama: peft, TRL and litgpt, where installed
    python -m lorafit.bench bench.shape=big bench.seconds=300      8 layers and a vocabulary of 32,000
    python -m lorafit.bench bench.shape=FOLDER rank=8              your model and rank
    python -m lorafit.bench 'bench.settings=[nf4]' 'bench.systems=[lorafit,peft]' model.compile=off

For every setting, on the same weights, batch, A and B:

1. What each system computes is compared with plain differentiation in float32. A loss or a gradient that is off by
   more than bench.tolerance makes it "differs", and it gets no ratio. How much a step recomputes is counted in a step.
2. Time: all systems in one process, a step of each in turn, so that a machine that slows down does so for all. Medians
   and quartiles; a round in which somebody took three times as long as usual is dropped for everybody, and told.
3. Memory: each system in a process of its own: the peak of two steps above what lies idle between steps (weights,
   adapters, optimizer state).

Ratios refer to the faster of peft's two (adapters in float32, its default, or in bfloat16). The settings: bf16, nf4,
the same with checkpointing, nf4_vs_bf16 (lorafit against itself) and head_loss (the output head and the loss alone,
half of the tokens not trained, against transformers). litgpt takes part in bf16 alone; unsloth on CUDA alone and in
its own process. What a step must compute is told as a share of the rate of a plain matrix product, measured beside it.

Models of more than 10⁹ weights are drawn on the device layer by layer, compared in their first two layers, and timed
each in a process of its own.

Leaves bench.json. A system that is not installed, fails or differs is named with its reason.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.bench_table import SETTINGS, add_ratios, add_speed, bench_tables, comparisons, make_rows
from lorafit.build import device_name, refuse_foreign, require_accelerator, require_no_adapter
from lorafit.config import Config
from lorafit.errors import InputError, reason
from lorafit.launch import start
from lorafit.schema import BENCH_SYSTEMS

if TYPE_CHECKING:
    from lorafit.peers import Case, Source, Trainee


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


SHAPES = {
    "tiny": _llama(128, 256, 2, 4, 512, 4),
    "small": _llama(1024, 2816, 4, 16, 16000, 16),
    "big": _llama(1024, 2816, 8, 16, 32000, 16),
    "llama-7b": _llama(4096, 11008, 32, 32, 32000, 32),
    "llama-13b": _llama(5120, 13824, 40, 40, 32000, 40),
    "llama-70b": _llama(8192, 28672, 80, 64, 32000, 8),
}
WRITTEN = 10**9  # a shape of more weights is drawn on the device, not written into a folder first
_CHILD = "from lorafit.bench import child; child()"


def main() -> None:
    start("bench", run)


def run(config: Config, folder: Path) -> None:
    """One benchmark: measures setting by setting, prints, writes bench.json after each."""
    import torch

    from lorafit.files import write_json
    from lorafit.machine import describe_machine, memory_bandwidth
    from lorafit.peers import installed
    from lorafit.terminal import console
    from lorafit.trainer import quiet_libraries

    check_request(config)
    quiet_libraries()
    terminal, bench = console(), config.bench
    device = torch.device(device_name(config))
    machine = describe_machine(device) | {"memory_bytes_per_second": memory_bandwidth(device)}
    found: dict[str, Any] = {"rows": [], "comparisons": [], "machine": machine}
    systems = list(BENCH_SYSTEMS) if bench.systems == "auto" else list(bench.systems)
    with tempfile.TemporaryDirectory(prefix="lorafit-bench-") as place:
        source = make_source(bench.shape, bench.length, config.seed, Path(place))
        found["model"] = {"shape": bench.shape, **describe_model(source.model_config())}
        found["batch"] = {"batch_size": bench.batch_size, "length": bench.length}
        for name in bench.settings:
            wanted = cases(name, systems, config.model.compile, config.rank, config.alpha)
            missing = {case.label: absence(case, device.type, installed(case.system)) for case in wanted}
            ready = [case for case in wanted if missing[case.label] is None]
            labels = ", ".join(case.label for case in ready) or "nothing to measure"
            terminal.print(f"{SETTINGS[name].title}: {labels} …")
            request = {
                "source": dataclasses.asdict(source),
                "device": str(device),
                "batch": {
                    "rows": bench.batch_size,
                    "length": bench.length,
                    "masked": masked(bench.masked, name),
                    "seed": config.seed,
                },
                "warmup": bench.warmup,
                "rounds": bench.steps,
                "seconds": bench.seconds,
                "reference": str(Path(place) / f"{name}.safetensors"),
            }
            timed, alone = measure_setting(ready, source, request, bench.memory)
            rows = make_rows(name, wanted, missing, timed, alone, bench.tolerance)
            for row in rows:
                add_speed(row, found["model"], bench.batch_size * bench.length, bench.length)
            add_ratios(rows, SETTINGS[name].against)
            found["rows"] += rows
            found["comparisons"] += comparisons(rows)
            if rates := timed.get("matmul_rates"):
                machine.setdefault("matmul_flops_per_second", {})[name] = rates
            write_json(folder / "bench.json", found)
    for part in bench_tables(found):
        terminal.print(part)


def masked(share: float, setting: str) -> float:
    """The share of the tokens that is not trained; to leave them out is what the loss alone is about."""
    return share or (0.5 if setting == "head_loss" else 0.0)


def measure_setting(
    ready: Sequence[Case], source: Source, request: Mapping[str, Any], memory: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the answer of the process in which all are, the answers by label of those in which each is alone)."""
    # models that cannot lie side by side are compared in their first layers, and timed each by itself
    large = source.folder is None
    few = {"source": dataclasses.asdict(first_layers(source)), "rounds": 0, "reference": ""} if large else {}
    together = [dataclasses.asdict(case) for case in ready if case.system != "unsloth"]
    timed = run_child({**request, "do": "together", "cases": together, **few}) if together else {}
    alone: dict[str, Any] = {}
    for case in ready:
        by_itself = large or case.system == "unsloth"
        if memory or by_itself:
            one = {**request, "do": "alone", "cases": [dataclasses.asdict(case)]}
            alone[case.label] = run_child(one if by_itself else one | {"rounds": 0})
    return timed, alone


def check_request(config: Config) -> None:
    """Raise InputError where the command says something that a comparison cannot take up."""
    require_no_adapter(config)
    refuse_foreign(config, "bench")
    require_accelerator(config.trainer.accelerator)
    for wrong, text in (
        (config.quant is not None, "quant: bench.settings says which weights are quantized (nf4, nf4_checkpointing)"),
        (config.model.checkpointing != "none", "model.checkpointing: bench.settings says what is checkpointed"),
        (config.model.name != "embedded", "model.name: bench.shape says which model, a named shape or a folder"),
        (config.dropout > 0, f"dropout must be 0 where gradients are compared, got {config.dropout!r}"),
        (config.target_modules != "all_linear", "target_modules must be all_linear: every system adapts all layers"),
        (config.variant != "lora", f"variant must be lora, which every system knows, got {config.variant!r}"),
    ):
        if wrong:
            raise InputError(text)


# ------------------------------------------------------------------------------------------------ what is compared


def cases(setting: str, systems: Sequence[str], compile: str, rank: int, alpha: float) -> list[Case]:
    """The rows of a setting, in order. compile=auto gives lorafit with compiled parts, and where nothing is recomputed
    also without."""
    from lorafit.peers import Case

    compiled = {"auto": ("on", "off"), "on": ("on",), "off": ("off",)}[compile]
    this = SETTINGS[setting]
    full = "full" if this.checkpointing else "none"

    def case(system: str, label: str, **options: Any) -> Case:
        return Case(system, label, **({"quant": this.quant, "rank": rank, "alpha": alpha} | options))

    def ours(**options: Any) -> list[Case]:
        names = {"on": "lorafit", "off": "lorafit compile=off"}
        return [case("lorafit", names[kind], compile=kind, **options) for kind in compiled]

    if setting == "nf4_vs_bf16":
        kinds = (("lorafit bf16", False), ("lorafit nf4", True)) if "lorafit" in systems else ()
        return [case("lorafit", label, quant=quant, compile=compiled[0]) for label, quant in kinds]
    if setting == "head_loss":
        found = ours(part="head") if "lorafit" in systems else []
        return found + [case("transformers", "transformers", part="head")] * ("transformers" in systems)
    found = []
    if "lorafit" in systems and this.checkpointing:
        for kind in ("selective", "full"):
            found.append(case("lorafit", f"lorafit {kind}", checkpointing=kind, compile=compiled[0]))
    elif "lorafit" in systems:
        found += ours()
    if "peft" in systems:
        found.append(case("peft", "peft", checkpointing=full))
        found.append(case("peft", "peft bfloat16 adapters", checkpointing=full, adapters="bfloat16"))
    for name in ("trl", "unsloth"):
        if name in systems:
            found.append(case(name, name, checkpointing=full))
    if "litgpt" in systems and setting == "bf16":
        found.append(case("litgpt", "litgpt", adapters="bfloat16"))
    return found


def absence(case: Case, device: str, installed: bool) -> tuple[str, str] | None:
    """(status, reason) of a case that cannot be measured on this machine, or None."""
    if not installed:
        return "not installed", f"{case.system} is not installed here"
    if case.system == "unsloth" and device != "cuda":
        return "not here", "unsloth needs a CUDA device"
    return None


def make_source(shape: str, length: int, seed: int, folder: Path) -> Source:
    """The weights of a shape: written into `folder` with random values, drawn later where they are too many to write,
    or those of the model folder that `shape` is."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lorafit.peers import Source

    if shape not in SHAPES:
        source = Source(folder=str(Path(shape).expanduser()), seed=seed)
        describe_model(source.model_config())  # or raise
        return source
    options = shape_options(shape, length)
    if describe_model(LlamaConfig(**options))["parameters"] > WRITTEN:
        return Source(config=options, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**options), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    return Source(folder=str(folder / "model"), seed=seed)


def first_layers(source: Source, layers: int = 2) -> Source:
    """A source that is drawn, with so many layers alone: gradients that need float32 fit there."""
    return dataclasses.replace(source, config=dict(source.config or {}) | {"num_hidden_layers": layers})


def shape_options(shape: str, length: int) -> dict[str, Any]:
    """A named shape as the arguments of LlamaConfig, for rows of `length` tokens."""
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return SHAPES[shape] | tokens | {"max_position_embeddings": max(2048, length), "tie_word_embeddings": False}


def describe_model(config: Any) -> dict[str, int]:
    """The sizes that decide how much work a step is. InputError for a model that is not made like a Llama."""
    from lorafit.peers import base_weights

    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if lacking := [name for name in needed if not isinstance(getattr(config, name, None), int)]:
        raise InputError(
            f"bench.shape: a {config.model_type} model cannot be compared, its config has no {', '.join(lacking)}. "
            "Give a model that is made like a Llama"
        )
    base, head = base_weights(config), config.vocab_size * config.hidden_size
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {name: getattr(config, name) for name in needed} | {
        "base": base,
        "head": head,
        "parameters": base + 2 * head,
        "attention_width": config.num_attention_heads * head_size,
    }


# ------------------------------------------------------------------------------------------------ the child processes


def run_child(
    request: Mapping[str, Any], timeout: float | None = None, command: Sequence[str] = ("-c", _CHILD)
) -> dict[str, Any]:
    """What a fresh process finds out for `request`. Where it dies or takes longer than `timeout` seconds there is
    "failed" with the reason, beside what it had written until then. command: what Python is told to run."""
    # one threshold for all: by default the C library moves it with what a program frees, so that peaks would hang on
    # the order of sizes. The processes that measure time keep the default, as users have it
    alone = {"MALLOC_MMAP_THRESHOLD_": str(2**20)} if request["do"] == "alone" else {}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    with tempfile.TemporaryDirectory(prefix="lorafit-bench-") as folder:
        answer = Path(folder) / "answer.json"
        failed = {}
        try:
            done = subprocess.run(
                [sys.executable, *command],
                input=json.dumps(dict(request) | {"answer": str(answer)}),
                env=os.environ | quiet | alone,
                text=True,
                capture_output=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            failed = {"failed": f"took longer than {timeout:.0f} seconds"}
        else:
            if done.returncode or not answer.exists():
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                code = done.returncode
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                failed = {"failed": f"{how}: {lines[-1]}" if lines else how}
        written = json.loads(answer.read_text()) if answer.exists() else {}
        return written | failed


def child() -> None:
    """The body of a child process: a request on stdin, the answer into the file that it names."""
    request = json.loads(sys.stdin.read())
    if request["cases"][0]["system"] == "unsloth":
        importlib.import_module("unsloth")  # before transformers is: it rewrites the classes there
    write_answer(request, {"together": measure_together, "alone": measure_alone}[request["do"]](request))


def write_answer(request: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Put what was measured where `run_child` looks for it; it is there whole or not at all."""
    draft = Path(request["answer"] + ".draft")
    draft.write_text(json.dumps(measured))
    draft.replace(request["answer"])


def _read(request: Mapping[str, Any]) -> tuple[list[Case], Source, Any]:
    import torch

    from lorafit.peers import Case, Source, make_batch

    source = Source(**request["source"])
    sizes = request["batch"]
    batch = make_batch(
        source.model_config().vocab_size,
        sizes["rows"],
        sizes["length"],
        sizes["masked"],
        sizes["seed"],
        torch.device(request["device"]),
    )
    return [Case(**case) for case in request["cases"]], source, batch


def measure_together(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compare, then time all cases in this process. {"cases": {label: what was found}, "seconds": {label: […]} with a
    number for each round, "matmul_rates": [before, after] in operations a second, "supervised_tokens"}."""
    import torch

    from lorafit.machine import matmul_rate, synchronize
    from lorafit.peers import reference, supervised

    given, source, batch = _read(request)
    device = batch["input_ids"].device
    right = {case.quant: reference(case, source, batch) for case in {case.quant: case for case in given}.values()}
    if request["reference"]:
        save_reference(Path(request["reference"]), right[given[0].quant])
    found: dict[str, Any] = {}
    ready: dict[str, Trainee] = {}
    for case in given:
        trainee, found[case.label] = prepare(case, source, batch, right[case.quant])
        if trainee is not None:
            ready[case.label] = trainee
    result = {"cases": found, "seconds": {}, "supervised_tokens": supervised(batch)}
    if not ready or not request["rounds"]:
        return result
    del right
    gc.collect()
    before = matmul_rate(device, torch.bfloat16)
    steps = {label: _timed_step(trainee, batch, lambda: synchronize(device)) for label, trainee in ready.items()}
    for _ in range(request["warmup"]):
        for step in steps.values():
            step()
    seconds = interleave(steps, request["rounds"], request["seconds"])
    return result | {"seconds": seconds, "matmul_rates": [before, matmul_rate(device, torch.bfloat16)]}


def prepare(case: Case, source: Source, batch: Any, right: Any) -> tuple[Trainee | None, dict[str, Any]]:
    """(the trainee, or None where it failed; {"loss", "loss_error", "gradient_errors", "recomputed_share",
    "adapter_weights"} or {"failed": reason}). right: the reference, or None where there is none to compare with."""
    from lorafit.peers import adapter_weights, build, gradient_errors, recomputed_share, require_checkpointing

    try:
        trainee = build(case, source, batch)
        found: dict[str, Any] = {"adapter_weights": adapter_weights(trainee), "recomputed_share": None}
        if right is not None:
            loss = trainee.backward(batch).item()
            found |= {"loss": loss, "loss_error": abs(loss - right.loss) / right.loss}
            gradients = {name: part.gradient() for name, part in trainee.parts.items()}
            found["gradient_errors"] = gradient_errors(gradients, right.gradients)
            trainee.clear()
        if case.part == "step":
            found["recomputed_share"] = recomputed_share(trainee, batch, source.model_config(), case.rank)
            require_checkpointing(case, found["recomputed_share"])
            trainee.clear()
    except Exception as error:  # whatever a peer raises is its own row's concern
        return None, {"failed": f"{type(error).__name__}: {reason(error)}"}
    return trainee, found


def _timed_step(trainee: Trainee, batch: Any, synchronize: Callable[[], None]) -> Callable[[], float]:
    def step() -> float:
        synchronize()
        began = time.perf_counter()
        trainee.step(batch)
        synchronize()
        return time.perf_counter() - began

    return step


def interleave(steps: Mapping[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """The seconds of each step, A B C A B C …: `rounds` of each, or as many as `seconds` hold, but three at least."""
    taken: dict[str, list[float]] = {label: [] for label in steps}
    began = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - began > seconds:
            break
        for label, step in steps.items():
            taken[label].append(step())
    return taken


def measure_alone(request: Mapping[str, Any]) -> dict[str, Any]:
    """One case in this process: {"peak_bytes", "idle_bytes"} as `step_memory` gives them; with request["rounds"] also
    {"seconds": […], "matmul_rates"} and what `prepare` found."""
    from lorafit.peers import build, supervised

    (case,), source, batch = _read(request)
    result: dict[str, Any] = {"supervised_tokens": supervised(batch)}
    if not request["rounds"]:
        return result | step_memory(build(case, source, batch), batch, request["warmup"])
    trainee, found = prepare(case, source, batch, load_reference(Path(request["reference"])))
    if trainee is None:
        return found
    memory = step_memory(trainee, batch, request["warmup"])
    return result | found | memory | step_times(trainee, batch, request["rounds"], request["seconds"])


def step_memory(trainee: Trainee, batch: Any, warmup: int) -> dict[str, int]:
    """{"peak_bytes", "idle_bytes"}: the most that two steps need on top of what lies idle between steps, and that, on
    the CUDA device or in the whole process. There is one warm-up step at least."""
    from lorafit.machine import resident_bytes, return_free_memory, synchronize
    from lorafit.memory import peak_bytes, reset_peak

    device = batch["input_ids"].device
    for _ in range(max(1, warmup)):  # optimizer state is made, and what is compiled is compiled
        trainee.step(batch)
    synchronize(device)
    gc.collect()
    return_free_memory()
    reset_peak(device)
    idle = resident_bytes(device)
    for _ in range(2):
        trainee.step(batch)
    synchronize(device)
    return {"peak_bytes": peak_bytes(device) - idle, "idle_bytes": idle}


def step_times(trainee: Trainee, batch: Any, rounds: int, seconds: float) -> dict[str, Any]:
    """{"seconds": […], "matmul_rates": [before, after]} of a trainee that has this process to itself."""
    import torch

    from lorafit.machine import matmul_rate, synchronize

    device = batch["input_ids"].device
    before = matmul_rate(device, torch.bfloat16)
    step = _timed_step(trainee, batch, lambda: synchronize(device))
    taken = interleave({"": step}, rounds, seconds)[""]
    return {"seconds": taken, "matmul_rates": [before, matmul_rate(device, torch.bfloat16)]}


def save_reference(path: Path, right: Any) -> None:
    """Keep a reference for a system that has to be alone in its process."""
    import torch
    from safetensors.torch import save_file

    save_file(dict(right.gradients) | {"": torch.tensor(right.loss)}, path)


def load_reference(path: Path) -> Any:
    """What `save_reference` kept, or None where there is nothing."""
    from safetensors.torch import load_file

    from lorafit.peers import Reference

    if not path.is_file():
        return None
    gradients = load_file(path)
    return Reference(gradients.pop("").item(), gradients)


if __name__ == "__main__":
    main()

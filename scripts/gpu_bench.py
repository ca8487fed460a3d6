"""lorafit on one CUDA GPU against peft and unsloth, at the sizes of Llama 7B, 13B and 70B. NOT MEASURED: written with
care by people who had no GPU, and tried by `--rehearse` alone.

    python scripts/gpu_bench.py                        everything, in less than ten minutes; gpu_bench.json
    python scripts/gpu_bench.py --only 'llama-7b.*nf4'    the cases whose name matches
    python scripts/gpu_bench.py --rehearse             the same code on the CPU with tiny sizes

In this order, as far as the time reaches: the tests that need a GPU; an optimizer whose paged state is pushed out of
the device; for each size a model of two layers, whose loss and gradients are compared with float32; each size with LoRA
and QLoRA and rows of 512, 2048 and 8192 tokens. The weights are random, made on the device layer by layer (70B
parameters are never there in 16 bits; unsloth reads a folder, and is measured at 7B alone). All systems recompute: what
is cheap in a block ("selective"), or the whole block ("full").

Every case has a process and a time limit of its own: what fails, runs out of memory or out of time is recorded as that,
and the rest goes on. Without a CUDA device the script ends with exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lorafit.bench import (
    SHAPES,
    describe_model,
    first_layers,
    prepare,
    run_child,
    shape_options,
    step_memory,
    step_times,
    write_answer,
)
from lorafit.bench_table import add_speed
from lorafit.errors import reason
from lorafit.files import write_json
from lorafit.machine import describe_machine, memory_bandwidth, synchronize
from lorafit.memory import memory_by_part
from lorafit.module import find_optimizer
from lorafit.peers import Case, Source, installed, make_batch, random_model, supervised
from lorafit.terminal import human

ROOT = Path(__file__).resolve().parent.parent
HERE = (str(Path(__file__).resolve()), "--child")


@dataclass(frozen=True)
class Plan:
    """What is measured where. tokens: of a step, in rows of each of the lengths (one row at least)."""

    device: str
    shapes: tuple[tuple[str, bool], ...]  # (shape, NF4), the most telling first
    lengths: tuple[int, ...]
    tokens: int
    verified_length: int
    paged_elements: int
    tests: tuple[str, ...]
    compile: str
    rounds: int = 10
    seconds: float = 6.0
    limit: float = 100.0  # seconds for a case


REAL = Plan(
    device="cuda",
    shapes=(
        *(("llama-7b", True), ("llama-7b", False), ("llama-70b", True)),
        *(("llama-13b", True), ("llama-13b", False)),
    ),
    lengths=(512, 2048, 8192),
    tokens=2048,
    verified_length=256,
    paged_elements=2**28,
    tests=("-m", "gpu"),
    compile="on",
)
REHEARSAL = Plan(
    device="cpu",
    shapes=(("tiny", True), ("tiny", False)),
    lengths=(40, 80),
    tokens=80,
    verified_length=40,
    paged_elements=2**17,
    tests=("-m", "gpu", "tests/test_gpu.py"),
    compile="off",
    rounds=3,
)


def cases(plan: Plan) -> dict[str, tuple[str, Case]]:
    """(shape, case) by name. 70B parameters are tried in 4 bits alone."""
    found = {}
    for shape, quant in plan.shapes:
        kind = "nf4" if quant else "bf16"
        for system, checkpointing, compile in (
            *(("lorafit", "selective", plan.compile), ("lorafit", "full", plan.compile)),
            *(("peft", "full", "off"), ("unsloth", "full", "off")),
        ):
            # unsloth loads a folder, which is written for the smallest alone
            if installed(system) and (system != "unsloth" or shape == "llama-7b"):
                name = f"{shape} {kind} {system} {checkpointing}"
                found[name] = (
                    shape,
                    Case(system, name, quant=quant, checkpointing=checkpointing, compile=compile, adapters="bfloat16"),
                )
    return found


def source_of(shape: str, length: int) -> Source:
    return Source(config=shape_options(shape, length))


# ------------------------------------------------------------------------------------------------ in a child process


def child() -> None:
    """A request on stdin: a case at all of its lengths, a folder of weights, or the paged optimizer."""
    request = json.loads(sys.stdin.read())
    if request["what"] == "paging":
        write_answer(request, paging(torch.device(request["device"]), request["elements"]))
    elif request["what"] == "write":
        random_model(Source(**request["source"]), False, torch.device(request["device"])).save_pretrained(
            request["folder"]
        )
        write_answer(request, {})
    else:
        measure_lengths(request)


def measure_lengths(request: Mapping[str, Any]) -> None:
    """One model, rows of each length in turn. Written after each, so that a death later loses nothing."""
    case, source, device = Case(**request["case"]), Source(**request["source"]), torch.device(request["device"])
    vocabulary = source.model_config().vocab_size
    rows: list[dict[str, Any]] = []
    trainee = None
    for length in request["lengths"]:
        number = max(1, request["tokens"] // length)
        row: dict[str, Any] = {"length": length, "batch_size": number}
        rows.append(row)
        batch = make_batch(vocabulary, number, length, 0.0, 0, device)
        row["supervised_tokens"] = supervised(batch)
        try:
            if trainee is None:
                trainee, found = prepare(case, source, batch, None)
                if trainee is None:
                    row |= found
                    continue
                kept = found
            row |= kept | step_memory(trainee, batch, 2)
            row |= step_times(trainee, batch, request["rounds"], request["seconds"])
        except torch.OutOfMemoryError as error:
            row["failed"] = f"out of memory: {reason(error)}"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {reason(error)}"
        if trainee is not None:
            trainee.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write_answer(request, {"rows": rows})
    write_answer(request, {"rows": rows})


def paging(device: torch.device, elements: int) -> dict[str, Any]:
    """Whether paged optimizer state leaves the device when it is needed for something else.

    One step of bitsandbytes' PagedAdamW32bit over a parameter of `elements`; then so much of the device is filled that
    half of the state cannot stay; then one step more. "pushed_out_bytes": what the device gave out beyond what it had.
    """
    parameter = torch.nn.Parameter(torch.zeros(elements, device=device, dtype=torch.bfloat16))
    optimizer = find_optimizer("bitsandbytes.optim.PagedAdamW32bit")([parameter], lr=1e-3)
    parameter.grad = torch.ones_like(parameter)

    def step() -> float:
        synchronize(device)
        began = time.perf_counter()
        optimizer.step()
        synchronize(device)
        return time.perf_counter() - began

    step()
    parts = memory_by_part(torch.nn.ParameterList([parameter]), optimizer)
    found: dict[str, Any] = {"state_bytes": parts["optimizer"], "paged_bytes": parts["optimizer_paged"]}
    found["step_seconds"] = step()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        wanted = free + parts["optimizer_paged"] // 2
        found |= {"free_bytes": free, "filled_bytes": wanted}
        try:
            filled = torch.zeros(wanted, device=device, dtype=torch.uint8)  # zeros: touched, so it is really there
        except torch.OutOfMemoryError as error:
            return found | {"failed": f"the paged state did not make room: {reason(error)}"}
        found["pushed_out_bytes"] = wanted - free
        found["step_seconds_with_the_device_full"] = step()
        del filled
        found["finite_afterwards"] = bool(torch.isfinite(parameter).all())
    return found


# ------------------------------------------------------------------------------------------------ the whole


class Clock:
    """What is left of the time for everything; each part is given the smaller of its own limit and that."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def limit(self, seconds: float) -> float:
        return max(0.0, min(seconds, self.end - time.monotonic()))


def run_tests(plan: Plan, clock: Clock) -> dict[str, Any]:
    """What `pytest -m gpu` says, in its last line."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", *plan.tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=clock.limit(150),
        )
    except subprocess.TimeoutExpired:
        return {"failed": "took too long"}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {"exit_code": done.returncode, "said": lines[-1] if lines else ""}


def verify(plan: Plan, shape: str, clock: Clock, chosen: re.Pattern[str]) -> dict[str, Any]:
    """Two layers of a shape: the errors of each system against float32, in one process. Unsloth cannot be in it, since
    it rewrites what the others are made of."""
    wanted = [
        case
        for name, (own, case) in cases(plan).items()
        if own == shape and case.system != "unsloth"
        if chosen.search(name)
    ]
    request = {
        "do": "together",
        "cases": [dataclasses.asdict(case) for case in wanted],
        "source": dataclasses.asdict(first_layers(source_of(shape, plan.verified_length))),
        "device": plan.device,
        "batch": {"rows": 1, "length": plan.verified_length, "masked": 0.3, "seed": 0},
        "warmup": 0,
        "rounds": 0,
        "seconds": 0,
        "reference": "",
    }
    found = run_child(request, clock.limit(plan.limit))
    return found.get("cases", {}) | ({"failed": found["failed"]} if "failed" in found else {})


def unsloth_lengths(request: Mapping[str, Any], folder: Path, clock: Clock, limit: float) -> dict[str, Any]:
    """As `measure_lengths`, each length in a process of its own that imports unsloth before anything else."""
    if not folder.exists():
        written = run_child(request | {"what": "write", "folder": str(folder)}, clock.limit(limit), command=HERE)
        if "failed" in written:
            return written
    rows = []
    for length in request["lengths"]:
        number = max(1, request["tokens"] // length)
        one = {
            "do": "alone",
            "cases": [request["case"]],
            "source": {"folder": str(folder)},
            "batch": {"rows": number, "length": length, "masked": 0.0, "seed": 0},
            "warmup": 2,
            "reference": "",
        }
        rows.append({"length": length, "batch_size": number} | run_child(request | one, max(5.0, clock.limit(limit))))
    return {"rows": rows}


def measure(plan: Plan, name: str, shape: str, case: Case, clock: Clock, folder: Path) -> list[dict[str, Any]]:
    """The rows of a case, one for each length; what could not be measured has a "failed" with the reason."""
    source = source_of(shape, max(plan.lengths))
    request = {
        "do": "alone",
        "what": "lengths",
        "case": dataclasses.asdict(case),
        "source": dataclasses.asdict(source),
        "device": plan.device,
        "lengths": plan.lengths,
        "tokens": plan.tokens,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
    }
    left = clock.limit(plan.limit)
    if left < 5:
        answer: dict[str, Any] = {"failed": "no time left"}
    elif case.system == "unsloth":
        answer = unsloth_lengths(request, folder, clock, plan.limit)
    else:
        answer = run_child(request, left, command=HERE)
    rows = {row["length"]: row for row in answer.get("rows", [])}
    model = describe_model(source.model_config())
    result = []
    for length in plan.lengths:
        row = rows.get(length, {"length": length, "failed": answer.get("failed", "nothing was written")})
        row |= {"name": name, "shape": shape, "system": case.system, "part": "step"}
        row |= {"quant": "nf4" if case.quant else None, "checkpointing": case.checkpointing}
        row["rounds"] = row.pop("seconds", None)
        if row["rounds"]:
            add_speed(row, model, row["batch_size"] * length, length)
        result.append(row)
    return result


def show(found: Mapping[str, Any], terminal: Console) -> None:
    """The rows as a table, ratios to peft at the same shape, kind and length."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("case", "rows x length", "tokens/s", "speed", "idle", "step memory", "memory", "of rate", ""):
        table.add_column(head, overflow="fold", justify="left" if head in ("case", "") else "right")
    peers = {(row["shape"], row["quant"], row["length"]): row for row in found["rows"] if row["system"] == "peft"}
    for row in found["rows"]:
        if "tokens_per_second" not in row:
            table.add_row(row["name"], f"x {row['length']}", *["–"] * 6, row.get("failed", ""))
            continue
        peer = peers.get((row["shape"], row["quant"], row["length"]), {})
        speed = row["tokens_per_second"] / peer["tokens_per_second"] if "tokens_per_second" in peer else None
        memory = row["peak_bytes"] / peer["peak_bytes"] if peer.get("peak_bytes") else None
        row |= {"speed_ratio": speed, "memory_ratio": memory}
        table.add_row(
            row["name"],
            f"{row['batch_size']} x {row['length']}",
            f"{row['tokens_per_second']:,.0f}",
            "–" if speed is None else f"{speed:.2f}x",
            human(row["idle_bytes"]),
            human(row["peak_bytes"]),
            "–" if memory is None else f"{memory:.2f}x",
            f"{row['share_of_matmul_rate']:.0%}",
            "",
        )
    terminal.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_bench.json"))
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--only", default="", help="a regular expression for the names of cases")
    parser.add_argument("--no-tests", action="store_true", help="leave pytest -m gpu out")
    parser.add_argument("--rehearse", action="store_true", help="the same on the CPU, with tiny sizes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child()
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_bench: there is no CUDA device here. --rehearse tries the script on the CPU", file=sys.stderr)
        return 2
    plan, clock = REHEARSAL if options.rehearse else REAL, Clock(options.minutes)
    assert all(shape in SHAPES for shape, _ in plan.shapes)
    terminal, device, chosen = Console(width=150), torch.device(plan.device), re.compile(options.only)
    found: dict[str, Any] = {
        "machine": describe_machine(device) | {"memory_bytes_per_second": memory_bandwidth(device)},
        "rehearsal": options.rehearse,
        "tests": None,
        "compared": {},
        "rows": [],
        "paging": None,
    }
    if not options.no_tests:
        terminal.print("pytest -m gpu …")
        found["tests"] = run_tests(plan, clock)
        terminal.print(json.dumps(found["tests"]))
    terminal.print("a paged optimizer …")
    request = {"do": "paging", "what": "paging", "device": plan.device, "elements": plan.paged_elements}
    found["paging"] = run_child(request, clock.limit(60), command=HERE)
    terminal.print(json.dumps(found["paging"]))
    wanted = {name: entry for name, entry in cases(plan).items() if chosen.search(name)}
    for shape in dict.fromkeys(shape for shape, _ in wanted.values()):
        terminal.print(f"{shape}: loss and gradients of two layers …")
        found["compared"][shape] = verify(plan, shape, clock, chosen)
        terminal.print(json.dumps(found["compared"][shape]))
        write_json(options.out, found)
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as place:
        for name, (shape, case) in wanted.items():
            terminal.print(f"{name} …")
            found["rows"] += measure(plan, name, shape, case, clock, Path(place) / shape)
            write_json(options.out, found)
    show(found, terminal)
    write_json(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

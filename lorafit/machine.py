"""What the machine can do: its rate of matrix products, its memory bandwidth, and how much work a training step is.

A time in seconds says little about a program as long as nobody says what the machine gives. So the rate of a plain
2048 x 2048 x 2048 product is measured beside every benchmark, before and after (a shared machine changes under one's
hands), and a step is told as a share of that limit: the floating point operations that the step cannot do without,
over what the machine could have done in the time.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# of a CPU, those that decide how fast it multiplies
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
_PACKAGES = ("torch", "transformers", "bitsandbytes", "lightning", "peft", "trl", "litgpt", "unsloth", "triton")


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given to do; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median time of a call, over at least three calls and about `seconds`."""
    work()
    synchronize(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int = 2048, seconds: float = 0.3) -> float:
    """Floating point operations a second of [size, size] @ [size, size] in `dtype`, by the median of the calls."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, a, out=out), device, seconds)


def memory_bandwidth(device: torch.device, *, nbytes: int = 2**28, seconds: float = 0.5) -> float:
    """Bytes a second that a copy of `nbytes` moves, read and written counted, by the median of the calls."""
    source = torch.zeros(nbytes, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * nbytes / _median_seconds(lambda: target.copy_(source), device, seconds)


def step_flops(
    *,
    base: int,
    head: int,
    adapter: int,
    layers: int,
    attention_width: int,
    tokens: int,
    supervised_tokens: int,
    length: int,
) -> dict[str, int]:
    """The operations that a step of LoRA cannot do without: {"base", "head", "adapter", "attention"}.

    base, head, adapter: weights of the adapted layers, of the output head, and of all A and B. A frozen weight is
    multiplied with in the forward pass and for the gradient of its input, 2 operations a weight and token each: 4NT in
    all; one that is trained once more, 6NT. The head is needed for supervised tokens alone. Causal attention of length
    tokens looks at half of all pairs: 2·T·length·attention_width forward (attention_width = heads x head size), and
    twice that backward. Nothing is counted twice, whatever a checkpointed step computes again.
    """
    return {
        "base": 4 * base * tokens,
        "head": 4 * head * supervised_tokens,
        "adapter": 6 * adapter * tokens,
        "attention": 6 * layers * tokens * length * attention_width,
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that are compared, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_machine(device: torch.device) -> dict[str, Any]:
    """{"cpu", "flags", "threads", "load", "gpu", "gpu_bytes", "system", "versions", "date"}; gpu is None on a CPU.

    load: how many processes wanted the CPU in the minute before. Near nought, or the times are not this machine's.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "flags": [flag for flag in _FLAGS if flags and flag in flags[1].split()],
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": gpu.name if gpu else None,
        "gpu_bytes": gpu.total_memory if gpu else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def return_free_memory() -> None:
    """Give back to the system what the C library holds in reserve, so that the resident set is what is in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library: then the idle memory is told too high and a step's too low


def resident_bytes(device: torch.device) -> int:
    """Bytes in use now: of the CUDA device's allocator, or of this whole process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096

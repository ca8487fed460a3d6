"""Bytes by part: what the weights, their scales, the adapter, its gradients and the optimizer occupy, and the peak.

The parts are counted from the tensors themselves, each storage once. Optimizer state that bitsandbytes pages lies in
managed memory, which the driver moves out of the device when room is short; it is counted apart. bitsandbytes
pages only tensors of 100,000 elements or more, and only on CUDA: below hidden size 4096 and rank 25 a "paged" optimizer
has little or nothing paged, and saying so is the point of counting.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit.quant import quant_state_tensors


def _bytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Bytes of the tensors' storages, each storage once."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if tensor.device.type == "meta":
            total += tensor.numel() * tensor.element_size()
        elif key not in seen:
            seen.add(key)
            total += storage.nbytes()
    return total


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def optimizer_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Every tensor of an optimizer's state, lists and nested values included."""
    return tensors_in(dict(optimizer.state))


def memory_by_part(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, int]:
    """Bytes of {"weights", "quant_state", "adapter", "gradient", "optimizer", "optimizer_paged"}.

    weights: the frozen parameters and buffers; optimizer: resident and paged state together, optimizer_paged: the
    part in managed memory. Gradients are those that stand at the moment.
    """
    parameters = list(model.parameters())
    seen: set[int] = set()
    state = list(optimizer_tensors(optimizer)) if optimizer is not None else []
    return {
        "weights": _bytes([p for p in parameters if not p.requires_grad] + list(model.buffers()), seen),
        "quant_state": _bytes(quant_state_tensors(model), seen),
        "adapter": _bytes([p for p in parameters if p.requires_grad], seen),
        "gradient": _bytes([p.grad for p in parameters if p.grad is not None], seen),
        "optimizer": _bytes(state),
        "optimizer_paged": _bytes([tensor for tensor in state if getattr(tensor, "is_paged", False)]),
    }


def reset_peak(device: torch.device) -> None:
    """Begin a new peak: of the device's allocator, and of the process where the kernel allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak of the process counts from its start


def peak_bytes(device: torch.device) -> int:
    """The most that was in use since `reset_peak`: on the CUDA device, or else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
_OF_LIBRARIES = "_status_alloc_failed"  # cuBLAS and cuDNN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, which it does under several names."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in said for words in (*_OUT_OF_MEMORY, _OF_LIBRARIES)
    )


def page_again(optimizer: Any) -> None:
    """Move the state of a paged optimizer that was restored from a checkpoint back into pageable memory.

    bitsandbytes pages state when it makes it, and leaves what is loaded on the device: a resumed run would need memory
    that the first one did not. Only tensors that it would have paged are moved (CUDA, 100,000 elements or more).
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            tensor = state.get(key)
            if not isinstance(tensor, Tensor) or parameter.device.type != "cuda" or parameter.numel() < 100_000:
                continue
            if not getattr(tensor, "is_paged", False):
                state[key] = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)
                state[key].copy_(tensor)

"""What is kept of the forward pass: everything, the products alone, or the inputs of the blocks, here or on the host.

`none` keeps what a gradient needs. `full` keeps the input of each block and computes the block again in the backward
pass (arXiv:1604.06174): least memory, a third more work. `offload` is the same with those inputs in the host's pinned
memory, copied on a stream of their own while the next block computes. `selective` recomputes what is cheap, norms and
activations, and keeps the matrix products; on the fast path that is in the steps themselves (fused.py), and
`keep_products` does it for models whose blocks cannot take that path, through PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lorafit.errors import InputError

CHECKPOINTING = ("none", "selective", "full", "offload")
# Smaller tensors are not worth a copy.
SMALLEST_OFFLOADED = 2**20


def recompute_blocks(model: nn.Module, *, offload: bool = False) -> None:
    """Keep the input of each block alone. offload: keep it on the host, where the model is on a CUDA device."""
    # non-reentrant: gradients reach the adapters although the embeddings below are frozen
    run: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)
    if offload:
        run = functools.partial(_offloaded, run, HostCopies())
    _through(model, run)


def keep_products(model: nn.Module) -> None:
    """Keep the matrix products and attention of each block, and compute the rest again."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    _through(model, functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))


def _through(model: Any, run: Callable[..., Any]) -> None:
    """Have the blocks of a model of transformers called through `run`."""
    try:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its older name
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot compute its blocks again: choose model.checkpointing=none"
        ) from error
    # transformers has the embeddings need a gradient, and then everything down to them is computed
    model.disable_input_require_grads()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = run


_aten = torch.ops.aten
_MATRICES = {_aten.mm.default, _aten.addmm.default}
_PRODUCTS = {
    *(*_MATRICES, _aten.bmm.default, _aten.baddbmm.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(_: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    # the product with B sums over the rank alone: it costs little, and what it gives is as large as the base's output
    thin = operation in _MATRICES and args[-2].shape[-1] * 8 < args[-1].shape[-1]
    keep = operation in _PRODUCTS and not thin
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class HostCopies:
    """Hooks that move what autograd saves into pinned memory of the host, and back when it is asked for."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def pack(self, tensor: Tensor) -> Any:
        if tensor.device.type != "cuda" or tensor.nbytes < SMALLEST_OFFLOADED or isinstance(tensor, nn.Parameter):
            return tensor
        stream = self._stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away before the copy is done
        return host, tensor.device

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        host, device = packed
        stream, current = self._stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):  # after the copy to the host, which is on this stream
            tensor = host.to(device, non_blocking=True)
        current.wait_stream(stream)
        tensor.record_stream(current)
        return tensor

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _offloaded(run: Callable[..., Any], copies: HostCopies, function: Callable[..., Any], *args: Any) -> Any:
    # what is saved within the block belongs to the checkpoint; what reaches these hooks is the block's input
    with saved_tensors_hooks(copies.pack, copies.unpack):
        return run(function, *args)

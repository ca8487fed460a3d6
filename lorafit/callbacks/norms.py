"""AdapterNorms: how large A, B and the update B·A of every layer are, while they grow.

B starts at zero, so that its norm shows which layers learn, and whether any does; a norm that runs away is seen before
the loss is.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lorafit.inject import lora_layers
from lorafit.module import FinetuneModule
from lorafit.trainer import log_to_all


class AdapterNorms(L.Callback):
    """Logs `norm/A/<layer>`, `norm/B/<layer>` and `norm/update/<layer>` after the first step and every `every_n_steps`
    steps: Frobenius norms of the factors as they multiply, and of scaling · B·A. None: never.
    """

    def __init__(self, every_n_steps: int | None = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if self.every_n_steps is None or not pl_module.stepped or not trainer.loggers:
            return
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == 1:
            assert pl_module.model is not None
            log_to_all(trainer, adapter_norms(pl_module.model))


@torch.no_grad()
def adapter_norms(model: torch.nn.Module) -> dict[str, float]:
    """The norms of every LoRA layer by kind and name, taken from the device in one transfer."""
    names, norms = [], []
    for name, layer in lora_layers(model).items():
        a, b = (factor.value().float() for factor in (layer.lora_A, layer.lora_B))
        names += [f"norm/A/{name}", f"norm/B/{name}", f"norm/update/{name}"]
        norms += [torch.linalg.vector_norm(a), torch.linalg.vector_norm(b), product_norm(b, a) * layer.scaling]
    return dict(zip(names, torch.stack(norms).tolist(), strict=True)) if norms else {}


def product_norm(b: Tensor, a: Tensor) -> Tensor:
    """|B A|_F of B [out, rank] and A [rank, in], without the product: the square is trace(BᵀB · AAᵀ)."""
    return (b.T @ b).mul_(a @ a.T).sum().clamp_(min=0).sqrt()

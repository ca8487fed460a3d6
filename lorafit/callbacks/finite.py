"""Stop at the first loss or gradient that is not finite, before the optimizer carries it into the weights."""

from __future__ import annotations

import lightning as L
import torch
from torch.optim import Optimizer

from lorafit.errors import DivergedError
from lorafit.module import FinetuneModule


class StopOnNonFinite(L.Callback):
    """Raises DivergedError naming the step and the first layers whose gradient is not finite; the step is not taken."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, FinetuneModule)
        parameters = dict(pl_module.named_parameters())
        gradients = {name: p.grad for name, p in parameters.items() if p.requires_grad and p.grad is not None}
        norms = torch._foreach_norm(list(gradients.values()))
        total = torch.stack(norms).sum()
        # one transfer from the device for both
        loss, gradient = torch.stack((pl_module.step_loss, total.to(pl_module.step_loss))).tolist()
        step = trainer.global_step + 1
        advice = "Lower optimizer.lr, lengthen scheduler.warmup, or set trainer.gradient_clip_val."
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise DivergedError(f"the loss of step {step} is {loss}. {advice}")
        if gradient != gradient or gradient == float("inf"):
            bad = [name for name, norm in zip(gradients, norms, strict=True) if not torch.isfinite(norm)]
            raise DivergedError(f"the gradient of step {step} is not finite in {', '.join(bad[:3])}. {advice}")

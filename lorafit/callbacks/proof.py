"""ProveLearning: proof that a run does what it is taken for: every layer learns, and nothing else changes.

What fails in silence otherwise: a layer that the optimizer does not have, a learning rate so small that nothing moves,
a module that no row reaches, a library that writes into the frozen weights. The loss looks well in all of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit.errors import NotLearning
from lorafit.inject import adapter_modules
from lorafit.lora import LoRAEmbedding, LoRALinear, TrainedCopy
from lorafit.module import FinetuneModule
from lorafit.quant import quant_state_tensors


class ProveLearning(L.Callback):
    """Raises NotLearning, naming the modules, unless after `after` optimizer steps, or at the end of a shorter run,

    - the factor of every LoRA layer that began at zero is no longer zero, and every module trained whole has moved;
    - every LoRA layer, and every module trained whole, has had a gradient that is not zero;
    - every frozen parameter and scale is what it was when training began, by a checksum of all of its bytes; this once
      more at the end.

    Single biases are left out: that of keys has no effect on attention, and a gradient of nothing but rounding.
    """

    def __init__(self, after: int = 10) -> None:
        self.after = after
        self.taken = 0  # steps, those that were skipped left out
        self.proven = False
        self._seen: set[str] = set()  # the trainable parameters that have had a gradient
        self._norms: dict[str, Tensor] = {}  # of the gradients since, not asked for yet
        self._frozen: dict[str, int] = {}
        self._whole: dict[str, int] = {}
        self._stepping = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = _model(pl_module)
        self._frozen, self._whole = checksums(_frozen(model)), checksums(_trained_whole(model))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        gradients = {name: p.grad for name, p in _model(pl_module).named_parameters() if p.grad is not None}
        self._stepping = bool(gradients)  # a step that is skipped has none
        if self.proven or not gradients:
            return
        norms = torch._foreach_norm(list(gradients.values()))
        for name, norm in zip(gradients, norms, strict=True):
            self._norms[name] = self._norms[name] + norm if name in self._norms else norm

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if pl_module.stepped and self._stepping:
            self._stepping = False
            self.taken += 1
            if self.taken == self.after:
                self.prove(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.taken >= 2 or self.proven:  # at the first step A has no gradient, since B is zero
            self.prove(pl_module)

    def prove(self, pl_module: L.LightningModule) -> None:
        """Look now. Raises NotLearning."""
        model = _model(pl_module)
        said = []
        if not self.proven:
            self._note_gradients()
            cut_off = [name for name in adapter_modules(model) if not any(_is_in(key, name) for key in self._seen)]
            still = [name for name in self._unmoved(model) if name not in cut_off]
            if cut_off:
                said.append(
                    f"no gradient has come to {_listed(cut_off)}: no row of the data reaches it, or something cuts it "
                    "off. Leave it out of target_modules"
                )
            if still:
                said.append(
                    f"{_listed(still)} has not moved from where it began: the optimizer does not have it, or "
                    "optimizer.lr is too small"
                )
        now = checksums(_frozen(model))
        changed = [name for name in self._frozen.keys() | now.keys() if self._frozen.get(name) != now.get(name)]
        if changed:
            said.append(
                f"the frozen base has changed in {_listed(sorted(changed))}: what was trained would belong to a model "
                "that is nowhere"
            )
        if said:
            raise NotLearning(
                f"after {self.taken} steps: {'; '.join(said)}. callbacks.prove_after_n_steps=null does not look at it"
            )
        self.proven = True

    def _unmoved(self, model: nn.Module) -> list[str]:
        whole = checksums(_trained_whole(model))
        unmoved = []
        for name, module in adapter_modules(model).items():
            if isinstance(module, TrainedCopy):
                if all(self._whole[key] == now for key, now in whole.items() if _is_in(key, name)):
                    unmoved.append(name)
            elif not _began_at_zero(module).any():
                unmoved.append(name)
        return unmoved

    def _note_gradients(self) -> None:
        """Ask for the norms that were kept, in one transfer."""
        if self._norms:
            sums = torch.stack([norm.float() for norm in self._norms.values()]).tolist()
            self._seen |= {name for name, total in zip(self._norms, sums, strict=True) if total > 0}
        self._norms = {}

    def state_dict(self) -> dict[str, Any]:
        self._note_gradients()
        return {"taken": self.taken, "proven": self.proven, "seen": sorted(self._seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken, self.proven, self._seen = state_dict["taken"], state_dict["proven"], set(state_dict["seen"])


def _model(pl_module: L.LightningModule) -> nn.Module:
    assert isinstance(pl_module, FinetuneModule) and pl_module.model is not None
    return pl_module.model


def _began_at_zero(layer: LoRALinear | LoRAEmbedding) -> Tensor:
    """B, so that the update begins at zero; of an embedding A, as in peft."""
    return (layer.lora_A if isinstance(layer, LoRAEmbedding) else layer.lora_B).weight.detach()


def _frozen(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """What must not change: frozen parameters, and the scales that go with quantized ones."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.detach()
    for number, tensor in enumerate(quant_state_tensors(model)):
        yield f"scales {number + 1}", tensor


def _trained_whole(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, module in adapter_modules(model).items():
        if isinstance(module, TrainedCopy):
            for key, parameter in module.trained.named_parameters():
                yield f"{name}.trained.{key}", parameter.detach()


def _is_in(parameter: str, module: str) -> bool:
    return parameter.startswith(f"{module}.")


def _listed(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """A checksum of all bytes of each tensor, by its name, at the speed of memory and without a copy: the sum of its
    64-bit words, and of the bytes after the last whole word."""
    names, sums = [], []
    for name, tensor in tensors:
        if tensor.is_meta:
            continue
        names.append(name)
        sums.append(_sum_of_words(tensor))
    return dict(zip(names, (int(total) for total in sums), strict=True))


def _sum_of_words(tensor: Tensor) -> Tensor:
    data = tensor.data.reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    words, rest = data[:whole], data[whole:]
    if words.storage_offset() % 8 == 0 and words.data_ptr() % 8 == 0:
        words = words.view(torch.int64)
    return words.sum(dtype=torch.int64) + rest.sum(dtype=torch.int64)

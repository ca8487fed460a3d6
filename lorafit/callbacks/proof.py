"""ProveLearning: proof that a run does what it is taken for: every layer learns, and nothing else changes.

What fails in silence otherwise: a layer that the optimizer does not have, a learning rate so small that nothing moves,
a module that no row reaches, a library that writes into the frozen weights. The loss looks well in all of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit.errors import NotLearning
from lorafit.inject import adapter_modules
from lorafit.lora import LoRAEmbedding, LoRALinear, TrainedCopy
from lorafit.module import FinetuneModule
from lorafit.quant import is_quantized, quant_state_tensors

_ROW = 1024  # 64-bit words
_CHUNK = 8192 * _ROW * 8  # bytes: what is summed up at a time


class ProveLearning(L.Callback):
    """Raises NotLearning, naming the modules, unless after `after` optimizer steps, or at the end of a shorter run,

    - every factor, and every parameter of a module trained whole, is set to be trained;
    - every LoRA layer, and every module trained whole, has had a gradient that is not zero;
    - the factor of every LoRA layer that began at zero is no longer zero, and every module trained whole has moved;
    - every frozen parameter and scale is what it was when training began, by a checksum of all of its bytes; this once
      more at the end, before the last checkpoint is written: one that is resumed from it would not look again.

    Single biases are left out: that of keys has no effect on attention, and a gradient of nothing but rounding.
    """

    def __init__(self, after: int = 10) -> None:
        self.after = after
        self.taken = 0  # steps, those that were skipped left out
        self.proven = False
        self._seen: set[str] = set()  # the trainable parameters that have had a gradient
        self._largest: dict[str, Tensor] = {}  # of each gradient since, not asked for yet
        self._frozen: dict[str, int] = {}
        self._sound = 0  # the last step after which the base was what it is
        self._whole: dict[str, int] = {}  # as they were when the run, not this part of it, began
        self._stepping = False
        self._looked_at = -1  # the step after which it was looked last

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = _model(pl_module)
        self._frozen, self._sound = checksums(_frozen(model)), trainer.global_step
        if not self._whole:
            self._whole = checksums(_trained_whole(model))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        gradients = {name: p.grad for name, p in _model(pl_module).named_parameters() if p.grad is not None}
        self._stepping = bool(gradients)  # a step that is skipped has none
        if self.proven or not gradients:
            return
        # the largest value, since the squares of small ones are zero
        largest = torch._foreach_norm(list(gradients.values()), torch.inf)
        for name, value in zip(gradients, largest, strict=True):
            self._largest[name] = torch.maximum(self._largest[name], value) if name in self._largest else value

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, FinetuneModule)
        if not pl_module.stepped:
            return
        self.taken += self._stepping
        self._stepping = False
        last = trainer.global_step >= trainer.max_steps > 0
        if (self.taken >= self.after and not self.proven) or last:
            self._prove(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prove(trainer, pl_module)

    def _prove(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        enough = self.taken >= 2 or self.proven  # at the first step A has no gradient, since B is zero
        if enough and self._looked_at != trainer.global_step:
            self.prove(trainer, pl_module)
            self._looked_at = trainer.global_step

    def prove(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look now. Raises NotLearning, in all processes where one has found something."""
        model = _model(pl_module)
        said = [] if self.proven else self._not_learning(model)
        now = checksums(_frozen(model))
        changed = [name for name, before in self._frozen.items() if now.get(name) != before]
        if changed:
            said.append(
                f"the frozen base has changed in {_listed(changed)}: what was trained would belong to a model that is "
                "nowhere"
            )
        # one that raised alone would leave the others waiting for it
        if trainer.strategy.reduce_boolean_decision(bool(said), all=False):
            what = "; ".join(said) or "another process has found what it says"
            error = NotLearning(
                f"after {self.taken} steps: {what}. callbacks.prove_after_n_steps=null does not look at it"
            )
            error.sound = self._sound if changed else None
            raise error
        self.proven, self._sound = True, trainer.global_step

    def _not_learning(self, model: nn.Module) -> list[str]:
        """What is wrong with the parts of the adapter, each of them named once, by what explains it best."""
        self._note_gradients()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        whole = checksums(_trained_whole(model))
        frozen, cut_off, still = [], [], []
        for name, module in _adapters(model):
            own = {names[id(parameter)]: parameter for parameter in _trained(module)}
            fixed = [key for key, parameter in own.items() if not parameter.requires_grad]
            if fixed:
                frozen += fixed
            elif not self._seen & own.keys():
                cut_off.append(name)
            elif isinstance(module, TrainedCopy):
                if all(self._whole.get(key) == whole[key] for key in own):
                    still.append(name)
            elif not _began_at_zero(module).any():
                still.append(name)
        said = []
        if frozen:
            said.append(f"{_listed(frozen)} is not trained: something has set its requires_grad to False")
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
        return said

    def _note_gradients(self) -> None:
        """Ask for what was kept of the gradients, in one transfer."""
        if self._largest:
            values = torch.stack([value.float() for value in self._largest.values()]).tolist()
            self._seen |= {name for name, value in zip(self._largest, values, strict=True) if value > 0}
        self._largest = {}

    def state_dict(self) -> dict[str, Any]:
        self._note_gradients()
        return {"taken": self.taken, "proven": self.proven, "seen": sorted(self._seen), "whole": dict(self._whole)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken, self.proven = state_dict["taken"], state_dict["proven"]
        self._seen, self._whole = {str(name) for name in state_dict["seen"]}, dict(state_dict["whole"])


def _model(pl_module: L.LightningModule) -> nn.Module:
    assert isinstance(pl_module, FinetuneModule) and pl_module.model is not None
    return pl_module.model


def _adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAEmbedding | TrainedCopy]]:
    """Every part of the adapter, a shared one under its first name."""
    seen: set[int] = set()
    for name, module in adapter_modules(model).items():
        if id(module) not in seen:
            seen.add(id(module))
            yield name, module


def _trained(module: LoRALinear | LoRAEmbedding | TrainedCopy) -> list[nn.Parameter]:
    parts = [module.trained] if isinstance(module, TrainedCopy) else [module.lora_A, module.lora_B]
    return [parameter for part in parts for parameter in part.parameters()]


def _began_at_zero(layer: LoRALinear | LoRAEmbedding) -> Tensor:
    """B, so that the update begins at zero; of an embedding A, as in peft."""
    return (layer.lora_A if isinstance(layer, LoRAEmbedding) else layer.lora_B).weight.detach()


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What must not change, by its name in the base: frozen parameters, and the scales of quantized ones."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name.replace(".base_layer.", "."), parameter
    for name, module in model.named_modules():
        if is_quantized(module):
            for tensor in quant_state_tensors(module):
                yield f"{name.removesuffix('.base_layer')}.scales", tensor


def _trained_whole(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    copies = [module for _, module in _adapters(model) if isinstance(module, TrainedCopy)]
    own = {id(parameter) for module in copies for parameter in _trained(module)}
    return ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own)


def _listed(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """A checksum of all bytes of the tensors of each name, at the speed of memory and without a copy.

    The 64-bit words of a tensor, laid out in rows, are summed up along the rows and along the columns where they are;
    what leaves the device and is hashed is those sums, a thousandth of it. A word that changes alone changes two sums,
    and two that change places change the sums of their columns or of their rows.
    """
    hashes: dict[str, Any] = {}
    for name, tensor in tensors:
        digest = hashes.setdefault(name, hashlib.blake2b(digest_size=7))
        flat = tensor.data.reshape(-1)
        if flat.stride(0) != 1:  # which bytes cannot be read from
            flat = flat.clone(memory_format=torch.contiguous_format)
        data = flat.view(torch.uint8)
        for start in range(0, len(data), _CHUNK):
            digest.update(_sums(data[start : start + _CHUNK]).cpu().numpy())
    return {name: int.from_bytes(digest.digest(), "big") for name, digest in hashes.items()}


def _sums(data: Tensor) -> Tensor:
    """The sums of rows and columns of bytes, as bytes; what is less than a row as it is."""
    whole = len(data) // (8 * _ROW) * 8 * _ROW
    words, rest = data[:whole], data[whole:]
    if words.storage_offset() % 8 or words.data_ptr() % 8:
        words = words.clone()
    words = words.view(torch.int64).view(-1, _ROW)
    return torch.cat((words.sum(dim=0).view(torch.uint8), words.sum(dim=1).view(torch.uint8), rest))

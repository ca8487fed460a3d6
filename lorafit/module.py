"""The LightningModule: a frozen base with LoRA layers, its loss, its optimizer, its state.

    FinetuneModule(model="embedded", rank=16, alpha=32, quant={"type": "nf4"})

Three of Lightning's habits are answered here:

- it averages the means of micro-batches, which is wrong when they differ in supervised tokens. Here each
  micro-batch gives the sum over its tokens, and the accumulated gradient is divided by the number of tokens just before
  the optimizer steps: exactly the gradient of one large batch.
- its checkpoints hold the whole model. Here `state_dict` is the adapter alone; the base is loaded anew from its source.
- it keeps no random state. Here the checkpoint carries it, and a resumed run draws the same dropout masks.

Precision is in the model, not in the trainer ("32-true"): adapters and optimizer state in float32, products in the
base's compute dtype (see lora.py).
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lorafit.checkpoint import (
    Unfit,
    device_random_state,
    random_state,
    require_counts,
    require_like,
    set_device_random_state,
    set_random_state,
)
from lorafit.checkpointing import CHECKPOINTING, keep_products, recompute_blocks
from lorafit.data.loader import Batch
from lorafit.elementwise import EAGER, WORTH_COMPILING, ops_without_compiling, require_compiled
from lorafit.errors import InputError, MemoryExhausted, did_you_mean, reason
from lorafit.fastpath import BLOCK, PLAIN, leave_fast_path, recomputes, take_fast_path, use_ops
from lorafit.inject import (
    count_parameters,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
    trained_biases,
)
from lorafit.loading import load_base_model
from lorafit.loss import supervised_loss
from lorafit.memory import is_out_of_memory, page_again
from lorafit.optimizers import go_to_step, restore_optimizer
from lorafit.splitting import halves

log = logging.getLogger(__name__)

FUSED = ("auto", "off")
COMPILE = ("auto", "on", "off")
ON_OOM = ("stop", "halve")
SCHEDULES = ("cosine", "linear", "constant")
# Optimizers come by dotted path; only these two libraries are looked into.
OPTIMIZER_HOMES = ("torch.optim.", "bitsandbytes.optim.")


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied with at a step: a linear rise over the warm-up, then the schedule to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if schedule == "linear" else 1.0


def find_optimizer(path: str) -> Callable[..., Optimizer]:
    """The optimizer class at a dotted path inside torch.optim or bitsandbytes.optim."""
    if not path.startswith(OPTIMIZER_HOMES):
        raise InputError(f"optimizer {path!r} must lie in {' or '.join(home + '*' for home in OPTIMIZER_HOMES)}")
    home, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(home)
        found = getattr(module, name)
    except (ImportError, AttributeError):
        names = dir(importlib.import_module(".".join(home.split(".")[:2])))
        raise InputError(f"there is no optimizer {path!r}.{did_you_mean(name, names)}") from None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise InputError(f"optimizer {path!r} is no class of optimizers: give one such as torch.optim.AdamW")
    return found


class FinetuneModule(L.LightningModule):
    """A language model with LoRA layers, trained on the supervised tokens of its batches.

    model: a hub id, a folder, "embedded", or a model in memory (then quant, dtype, init and the like have no say).
    rank, alpha and what else says which layers learn how: see `inject_lora`. quant, dtype, device, init, attention: see
    `load_base_model`. checkpointing: "full" recomputes each block in the backward pass.
    optimizer: a dotted path, with its keyword arguments beside it (at least `lr`). warmup: a number of steps, or a
    fraction of all steps. gradient_clip_val: the largest norm of the whole gradient, or None. on_oom: "halve" computes
    a batch that does not fit into memory in halves, with the same gradient; on one device only.
    Everything is built in `configure_model`, so that the object itself costs nothing.
    """

    def __init__(
        self,
        model: str | nn.Module = "embedded",
        *,
        rank: int = 16,
        alpha: float = 32.0,
        target_modules: str | Sequence[str] = "all_linear",
        dropout: float = 0.0,
        variant: str = "lora",
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        bias: str = "none",
        modules_to_save: Sequence[str] = (),
        adapter_dtype: str = "float32",
        quant: Mapping[str, Any] | str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        init: str = "pretrained",
        attention: str | None = None,
        checkpointing: str = "none",
        fused: str = "auto",
        compile: str = "auto",
        cache: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        optimizer: str = "torch.optim.AdamW",
        optimizer_args: Mapping[str, Any] | None = None,
        scheduler: str = "cosine",
        warmup: float = 0.05,
        gradient_clip_val: float | None = 1.0,
        on_oom: str = "stop",
        seed: int = 42,
    ) -> None:
        super().__init__()
        for key, value, choices in (
            ("checkpointing", checkpointing, CHECKPOINTING),
            ("fused", fused, FUSED),
            ("compile", compile, COMPILE),
            ("scheduler", scheduler, SCHEDULES),
            ("on_oom", on_oom, ON_OOM),
        ):
            if value not in choices:
                raise InputError(
                    f"{key} must be one of {', '.join(choices)}, got {value!r}.{did_you_mean(value, choices)}"
                )
        self.optimizer_class = find_optimizer(optimizer)
        self.save_hyperparameters(ignore=["model"], logger=False)
        self._source = (model,)  # in a tuple, since a module given here is to be registered once, as `model`
        self.model: nn.Module | None = None
        self.wrapped: list[str] = []
        self.paths: dict[str, str] = {}  # by which path each LoRA layer runs, and why
        self.ops = EAGER
        # of the optimizer step under way: sum of losses, supervised tokens; of the last one: gradient norm, rate
        self.step_loss = self.step_tokens = self.gradient_norm = torch.zeros(())
        self.used_learning_rate = 0.0
        self.stepped = True  # whether the optimizer has stepped since the last micro-batch was added
        self.halved = 0  # micro-batches that were computed in halves
        self._too_large: int | None = None  # so many tokens, padding included, did not fit
        self._postponed: Batch | None = None  # a micro-batch whose forward pass did not fit
        self._current: tuple[Batch, Tensor] | None = None  # the one under way, and the generators before it
        self.began = False  # whether training has come to its first step, all that a checkpoint holds being restored
        self._resumed: dict[str, Any] | None = None

    @property
    def options(self) -> Any:
        """The arguments of the constructor, as checkpoints keep them."""
        return self.hparams

    def configure_model(self) -> None:
        """Load the base and inject the layers; a second call does nothing."""
        if self.model is not None:
            return
        h = self.options
        with torch.random.fork_rng():
            torch.manual_seed(h.seed)
            (model,) = self._source
            if isinstance(model, str):
                model = load_base_model(
                    model,
                    quant=h.quant,
                    dtype=h.dtype,
                    device=h.device,
                    init=h.init,
                    attention=h.attention,
                    trust_remote_code=h.trust_remote_code,
                    revision=h.revision,
                    cache=h.cache,
                )
            torch.manual_seed(h.seed)  # the same A for the same seed, whatever the base has drawn
            self.wrapped = inject_lora(
                model,
                rank=h.rank,
                alpha=h.alpha,
                target_modules=h.target_modules,
                dropout=h.dropout,
                variant=h.variant,
                rank_pattern=h.rank_pattern,
                alpha_pattern=h.alpha_pattern,
                bias=h.bias,
                modules_to_save=h.modules_to_save,
                adapter_dtype=h.adapter_dtype,
            )
        mark_only_lora_as_trainable(model)
        for name, (parameter, _) in trained_biases(model).items():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise InputError(
                    f"bias={h.bias}: {name} is held in {dtype}, which rounds most steps of training away. "
                    "Give model.dtype=float32 as well"
                )
        self._choose_paths(model)
        self.model = model.train()

    def _choose_paths(self, model: nn.Module) -> None:
        """Give the layers their fast path, and say what is kept for the backward pass."""
        h, device = self.options, next(model.parameters()).device
        if device.type == "cpu" and getattr(model.config, "_attn_implementation", None) == "flex_attention":
            raise InputError("model.attention=flex_attention cannot be trained on a CPU: choose sdpa")
        self.ops = require_compiled(device) if h.compile == "on" else ops_without_compiling(device)
        if h.fused == "auto":
            self.paths = take_fast_path(model, ops=self.ops, recompute=h.checkpointing == "selective")
        else:
            self.paths = dict.fromkeys(lora_layers(model), f"{PLAIN}fused=off")
        if h.checkpointing in ("full", "offload"):
            recompute_blocks(model, offload=h.checkpointing == "offload")
        elif h.checkpointing == "selective" and not (recomputes(model) and BLOCK in self.paths.values()):
            # blocks that are not on the fast path as a whole: the products are kept by PyTorch's own means, which do
            # not take steps that write in place
            leave_fast_path(model)
            self.paths = dict.fromkeys(self.paths, f"{PLAIN}its block keeps products alone (checkpointing=selective)")
            keep_products(model)

    def decide_compilation(self, tokens: int) -> str:
        """Whether to compile for a run over so many tokens; gives the reason. compile="on" and "off" have decided.

        It is decided by the work that the run is, not by a clock, so that a run that is resumed decides alike; one that
        is made longer as well may decide otherwise.
        """
        assert self.model is not None
        choice = self.options.compile
        if choice != "auto":
            return f"compile={choice}"
        if not any(not path.startswith(PLAIN) for path in self.paths.values()):
            return "nothing is on the fast path"
        device = next(self.model.parameters()).device
        work, least = 4.0 * count_parameters(self.model)[1] * tokens, WORTH_COMPILING.get(device.type, math.inf)
        if work < least:
            return f"the run is short: {work:.1g} operations, it pays from {least:.0g} on"
        try:
            self.ops = require_compiled(device)
        except InputError as error:
            return str(error)
        use_ops(self.model, self.ops)
        return f"the run is long: {work:.1g} operations"

    # ---------------------------------------------------------------------------------------------- the step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.model is not None
        if self.options.on_oom == "halve":
            self._current = (batch, self._generators())
            found = None if self._is_too_large(batch) else self._forward_if_it_fits(batch)
            if found is None:  # `backward` computes it, in halves
                self._postponed = batch
                return torch.zeros((), device=self.device, requires_grad=True)
        else:
            found = supervised_loss(self.model, batch, self.ops)
        loss, tokens = found
        self._count(loss.detach(), tokens)
        # Lightning divides by the number of micro-batches, and DDP by that of processes: both are taken back here
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _count(self, loss: Tensor, tokens: Tensor) -> None:
        """Add the sums of a micro-batch, or of a part of one, to those of the step under way."""
        if self.stepped:  # the first of a step
            self.step_loss = self.step_tokens = torch.zeros((), device=loss.device)
            self.stepped = False
        self.step_loss = self.step_loss + loss
        self.step_tokens = self.step_tokens + tokens

    # ---------------------------------------------------------------------------------------------- in halves

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's backward pass of a micro-batch; with on_oom="halve" in halves where it does not fit."""
        if self._current is None:
            loss.backward(*args, **kwargs)
            return
        (batch, generators), self._current = self._current, None
        counted, self._postponed = self._postponed is None, None
        if counted:
            kept: list[Tensor | None] = []
            if _fits(partial(self._backward_whole, loss, kept, *args, **kwargs)):
                return
            self._restore(kept)
        loss.detach_()  # Lightning holds it: what the forward pass has kept would stay beside the halves
        set_device_random_state(generators, self.device)
        self._note_too_large(batch)
        self.halved += 1
        self._in_halves(batch, count=not counted)

    def _in_halves(self, batch: Batch, count: bool) -> None:
        """Forward and backward pass of both halves of a batch. Raises MemoryExhausted for a single example."""
        parts = halves(batch)
        if parts is None:
            raise MemoryExhausted(
                f"out of memory: a single example of {batch['input_ids'].numel()} tokens does not fit, and "
                "trainer.on_oom=halve has nothing left to halve"
            )
        for part in parts:
            if self._is_too_large(part):
                self._in_halves(part, count)
                continue
            generators = self._generators()
            kept: list[Tensor | None] = []
            sums: list[tuple[Tensor, Tensor]] = []
            if _fits(partial(self._forward_and_backward, part, kept, sums)):
                if count:
                    self._count(*sums[0])
                continue
            self._restore(kept)
            set_device_random_state(generators, self.device)
            self._note_too_large(part)
            self._in_halves(part, count)

    def _backward_whole(self, loss: Tensor, kept: list[Tensor | None], *args: Any, **kwargs: Any) -> None:
        kept += self._gradients()
        loss.backward(*args, **kwargs)

    def _forward_and_backward(self, batch: Batch, kept: list[Tensor | None], sums: list[tuple[Tensor, Tensor]]) -> None:
        assert self.model is not None
        kept += self._gradients()
        loss, tokens = supervised_loss(self.model, batch, self.ops)
        loss.backward()
        sums.append((loss.detach(), tokens))

    def _forward_if_it_fits(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        found: list[tuple[Tensor, Tensor]] = []
        model = self.model
        assert model is not None
        return found[0] if _fits(lambda: found.append(supervised_loss(model, batch, self.ops))) else None

    def _generators(self) -> Tensor:
        """The state of the generators that dropout draws from, the base's own as well: a second try draws the same."""
        return device_random_state(self.device)

    def _gradients(self) -> list[Tensor | None]:
        """Copies of the gradients so far, for a backward pass may fail when it has written some."""
        return [None if p.grad is None else p.grad.clone() for p in self.trainable_parameters()]

    def _restore(self, gradients: list[Tensor | None]) -> None:
        """Put copies back. There are none where memory ran out while they were made: then nothing was written yet."""
        if not gradients:
            return
        for parameter, gradient in zip(self.trainable_parameters(), gradients, strict=True):
            parameter.grad = gradient

    def _is_too_large(self, batch: Batch) -> bool:
        large = self._too_large is not None and batch["input_ids"].numel() >= self._too_large
        return large and halves(batch) is not None  # a single example is tried in any case

    def _note_too_large(self, batch: Batch) -> None:
        """Where memory has run out in a batch: let go of it, which takes half a second, and try none that is as large
        any more."""
        rows, length = batch["input_ids"].shape
        if self._too_large is not None and rows * length >= self._too_large:
            return
        if self._too_large is None:
            log.warning(
                f"memory ran out in a batch of {rows} x {length} tokens: it, and those that are as large, are computed "
                "in halves from here on (trainer.on_oom=halve)"
            )
        self._too_large = rows * length
        _let_go(self.device)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.trainer.world_size > 1:
            self.step_loss, self.step_tokens = self.trainer.strategy.reduce(
                torch.stack((self.step_loss, self.step_tokens)), reduce_op="sum"
            ).unbind()
        gradients = [parameter.grad for parameter in self.trainable_parameters() if parameter.grad is not None]
        if gradients:  # a step that is skipped has none
            torch._foreach_div_(gradients, self.step_tokens.clamp(min=1).to(gradients[0].dtype))
        self.used_learning_rate = optimizer.param_groups[0]["lr"]
        self.stepped = True

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        # the norm is wanted whether or not it is clipped, and is computed once
        clip = self.options.gradient_clip_val
        self.gradient_norm = nn.utils.clip_grad_norm_(self.trainable_parameters(), math.inf if clip is None else clip)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.model is not None
        loss, tokens = supervised_loss(self.model, batch)
        self._validation.append(torch.stack((loss.double(), tokens.double())))

    def on_validation_epoch_start(self) -> None:
        self._validation: list[Tensor] = []

    def on_validation_epoch_end(self) -> None:
        total = torch.stack(self._validation).sum(dim=0)
        if self.trainer.world_size > 1:
            total = self.trainer.strategy.reduce(total, reduce_op="sum")
        # not by Lightning to the loggers, which would count this step one too low: StepMetrics does
        self.log("eval/loss", (total[0] / total[1]).float(), rank_zero_only=True, logger=False)

    # ---------------------------------------------------------------------------------------------- the optimizer

    def trainable_parameters(self) -> list[nn.Parameter]:
        """A and B of every layer, and what else of the adapter is trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def not_finite(self) -> list[str]:
        """The names of what is trained and holds a number that is not finite, by one transfer from the device."""
        trained = {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}
        if not trained:
            return []
        norms = torch._foreach_norm(list(trained.values()), torch.inf)
        good = torch.isfinite(torch.stack([norm.float() for norm in norms])).tolist()
        return [name.removeprefix("model.") for name, finite in zip(trained, good, strict=True) if not finite]

    def _make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return self.optimizer_class(parameters, **dict(self.options.optimizer_args or {}))

    def configure_optimizers(self) -> Any:
        arguments = dict(self.options.optimizer_args or {})
        try:
            optimizer = self._make_optimizer(self.trainable_parameters())
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer {self.options.optimizer} does not take {arguments}: {error}") from error
        total = int(self.trainer.estimated_stepping_batches)
        warmup = self.options.warmup
        warmup_steps = round(warmup * total) if isinstance(warmup, float) and warmup < 1 else int(warmup)

        def factor(step: int) -> float:
            return learning_rate_factor(
                step, schedule=self.options.scheduler, warmup_steps=warmup_steps, total_steps=total
            )

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    # ---------------------------------------------------------------------------------------------- the state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapter alone."""
        return lora_state_dict(self.model) if self.model is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill the adapter; every tensor must be there and fit."""
        self.configure_model()
        assert self.model is not None
        load_lora_state_dict(self.model, dict(state_dict))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = random_state()
        if self.trainer.world_size > 1:
            states = self.all_gather(device_random_state(self.device).to(self.device))
            assert isinstance(states, Tensor)
            checkpoint["random_states"] = list(states.cpu())
        checkpoint["halving"] = {"too_large": self._too_large or 0, "halved": self.halved}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        _require_progress(checkpoint["loops"], self.trainer.fit_loop.state_dict())
        halving = checkpoint.get("halving", {"too_large": 0, "halved": 0})
        require_like(halving, {"too_large": 0, "halved": 0}, "halving")
        require_counts(halving, "halving")
        self._too_large, self.halved = halving["too_large"] or None, halving["halved"]
        # restored in on_train_start: by what this run is set to, not by what the checkpoint says of learning rates
        self._resumed = {"random_state": checkpoint["random_state"], "optimizer": checkpoint["optimizer_states"]}
        if self.trainer.world_size == len(checkpoint.get("random_states", ())) > 1:
            self._resumed["own_random_state"] = checkpoint["random_states"][self.global_rank]
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []

    def on_train_start(self) -> None:
        if self._resumed is not None:
            optimizer = self.trainer.optimizers[0]
            restore_optimizer(optimizer, self._resumed["optimizer"], self._make_optimizer)
            page_again(optimizer)

            for config in self.trainer.lr_scheduler_configs:
                go_to_step(config.scheduler, self.trainer.global_step)
            # last: what Lightning does between loading and the first step draws random numbers
            try:
                set_random_state(self._resumed["random_state"])
                if "own_random_state" in self._resumed:
                    set_device_random_state(self._resumed["own_random_state"], self.device)
            except RuntimeError as error:  # PyTorch's, of a state that is none
                raise Unfit(f"random_state: {reason(error)}") from error
            self._resumed = None
        self.began = True


def _fits(work: Callable[[], object]) -> bool:
    """Call `work`; False where memory has run out in it. Nothing of the error is kept, since its frames would keep what
    has to be let go."""
    try:
        work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _let_go(device: torch.device) -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _require_progress(loops: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise Unfit unless what a checkpoint says of Lightning's loops, and of the place in the data, is counts. own:
    what the loops say before they have begun."""
    fit = loops.get("fit_loop")
    if not isinstance(fit, dict):
        raise Unfit("loops has no fit_loop")
    found = {key: value for key, value in fit.items() if key != "state_dict"}
    require_like(found, {key: value for key, value in own.items() if key != "state_dict"}, "loops.fit_loop")
    require_counts(found, "loops.fit_loop")
    rest = fit.get("state_dict")
    loaders = rest.get("combined_loader", []) if isinstance(rest, dict) else None
    for loader in loaders if isinstance(loaders, list) else [None]:
        if not isinstance(loader, dict):
            raise Unfit("loops has no place in the data")
        place = {key: value for key, value in loader.items() if key != "report"}  # which is that of a stream
        require_like(place, {"epoch": 0, "position": 0}, "loops.fit_loop.combined_loader")
        require_counts(place, "loops.fit_loop.combined_loader")

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

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lorafit.checkpoint import Unfit, random_state, require_counts, require_like, set_random_state
from lorafit.checkpointing import CHECKPOINTING, keep_products, recompute_blocks
from lorafit.data.loader import Batch
from lorafit.elementwise import EAGER, WORTH_COMPILING, ops_without_compiling, require_compiled
from lorafit.errors import InputError, did_you_mean
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
from lorafit.optimizers import go_to_step, restore_optimizer

FUSED = ("auto", "off")
COMPILE = ("auto", "on", "off")
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
        return getattr(module, name)
    except (ImportError, AttributeError):
        names = dir(importlib.import_module(".".join(home.split(".")[:2])))
        raise InputError(f"there is no optimizer {path!r}.{did_you_mean(name, names)}") from None


class FinetuneModule(L.LightningModule):
    """A language model with LoRA layers, trained on the supervised tokens of its batches.

    model: a hub id, a folder, "embedded", or a model in memory (then quant, dtype, init and the like have no say).
    rank, alpha and what else says which layers learn how: see `inject_lora`. quant, dtype, device, init, attention: see
    `load_base_model`. checkpointing: "full" recomputes each block in the backward pass.
    optimizer: a dotted path, with its keyword arguments beside it (at least `lr`). warmup: a number of steps, or a
    fraction of all steps. gradient_clip_val: the largest norm of the whole gradient, or None.
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
        seed: int = 42,
    ) -> None:
        super().__init__()
        for key, value, choices in (
            ("checkpointing", checkpointing, CHECKPOINTING),
            ("fused", fused, FUSED),
            ("compile", compile, COMPILE),
            ("scheduler", scheduler, SCHEDULES),
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
        loss, tokens = supervised_loss(self.model, batch, self.ops)
        if self.stepped:  # the first micro-batch of a step
            self.step_loss = self.step_tokens = torch.zeros((), device=loss.device)
            self.stepped = False
        self.step_loss = self.step_loss + loss.detach()
        self.step_tokens = self.step_tokens + tokens
        # Lightning divides by the number of micro-batches, and DDP by that of processes: both are taken back here
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.trainer.world_size > 1:
            self.step_loss, self.step_tokens = self.trainer.strategy.reduce(
                torch.stack((self.step_loss, self.step_tokens)), reduce_op="sum"
            ).unbind()
        gradients = [parameter.grad for parameter in self.trainable_parameters() if parameter.grad is not None]
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        _require_progress(checkpoint["loops"], self.trainer.fit_loop.state_dict())
        # restored in on_train_start: by what this run is set to, not by what the checkpoint says of learning rates
        self._resumed = {"random_state": checkpoint["random_state"], "optimizer": checkpoint["optimizer_states"]}
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []

    def on_train_start(self) -> None:
        if self._resumed is not None:
            optimizer = self.trainer.optimizers[0]
            restore_optimizer(optimizer, self._resumed["optimizer"], self._make_optimizer)

            for config in self.trainer.lr_scheduler_configs:
                go_to_step(config.scheduler, self.trainer.global_step)
            # last: what Lightning does between loading and the first step draws random numbers
            set_random_state(self._resumed["random_state"])
            self._resumed = None
        self.began = True


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

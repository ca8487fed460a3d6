"""Optimizers and schedules as a resumed run finds them again.

From a checkpoint comes what the optimizer has learned of each parameter; its settings come from the run as it is
configured, so that a learning rate that was changed on purpose is the one that is used. The state must look like what
the optimizer itself makes of a parameter of that shape: a state of another shape would be read beyond its end by
kernels that do not check.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lorafit.checkpoint import Unfit
from lorafit.errors import reason

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


def restore_optimizer(optimizer: Optimizer, saved: object, make: Make) -> None:
    """Give an optimizer the state of one of its kind, as `state_dict()` gave it, in a list of one.

    make: makes an optimizer like it for other parameters. Raises Unfit where the state is not that of such an
    optimizer over such parameters.
    """
    one = saved[0] if isinstance(saved, list) and len(saved) == 1 else None
    state = one.get("state") if isinstance(one, dict) else None
    if not isinstance(state, dict):
        raise Unfit("optimizer_states is not the state of one optimizer")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own: dict[Any, Any] = {}
    for index, found in state.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(parameters):
            raise Unfit(f"optimizer_states has a state of parameter {index!r}, of {len(parameters)}")
        key = (parameters[index].shape, parameters[index].dtype)
        if key not in own:
            own[key] = _state_of(*key, make)
        if own[key] is not None and not _alike(found, own[key]):
            raise Unfit(
                f"optimizer_states: the state of parameter {index}, {tuple(key[0])}, is none of "
                f"{type(optimizer).__name__}"
            )
        if _has_nan(found):
            raise Unfit(f"optimizer_states: the state of parameter {index} holds numbers that are none (NaN)")
    groups = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except RuntimeError as error:  # where no state of its own was there to compare with
        raise Unfit(f"optimizer_states: {reason(error)}") from error


def _has_nan(found: Any) -> bool:
    """Whether a state, which may be nested, holds a NaN: no optimizer has written it, and none gets rid of it."""
    if isinstance(found, dict):
        return any(map(_has_nan, found.values()))
    return isinstance(found, torch.Tensor) and bool(found.isnan().any())


def _state_of(shape: torch.Size, dtype: torch.dtype, make: Make) -> Any:
    """The state that an optimizer has of a parameter after a step; None where it cannot step on a CPU."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    with contextlib.suppress(Exception):
        optimizer = make([parameter])
        optimizer.step()
        return optimizer.state_dict()["state"].get(0)
    return None


def _alike(found: Any, own: Any) -> bool:
    """Whether two states have the same keys, with numbers and tensors of one shape and dtype in the same places."""
    if isinstance(own, dict):
        return isinstance(found, dict) and found.keys() == own.keys() and all(_alike(found[k], own[k]) for k in own)
    if isinstance(own, Tensor):
        same = isinstance(found, Tensor) and found.shape == own.shape and found.dtype == own.dtype
        return same and (own.dim() > 0 or _is_count(found.item()))
    number = isinstance(own, int | float) and not isinstance(own, bool)
    return _is_count(found) if number else type(found) is type(own)


def _is_count(value: Any) -> bool:
    """Whether a value can be a number of steps: by one below zero an optimizer would divide by zero."""
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def go_to_step(scheduler: Any, step: int) -> None:
    """Put a LambdaLR to where it is after so many steps, and its optimizer to the learning rate of the next one."""
    assert isinstance(scheduler, LambdaLR)
    factors = [factor(step) for factor in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    scheduler.load_state_dict(
        {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates, "lr_lambdas": [None] * len(rates)}
    )
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate

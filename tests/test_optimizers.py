"""Optimizers and schedules as a resumed run finds them again.

pytest tests/test_optimizers.py
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lorafit.checkpoint import Unfit
from lorafit.module import learning_rate_factor
from lorafit.optimizers import go_to_step, restore_optimizer

KINDS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "Adamax": torch.optim.Adamax,
    "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
    "AdamW8bit": bnb.optim.AdamW8bit,
    "PagedAdamW8bit": bnb.optim.PagedAdamW8bit,
    "PagedAdamW32bit": bnb.optim.PagedAdamW32bit,
    "Lion8bit": bnb.optim.Lion8bit,
    "AdEMAMix8bit": bnb.optim.AdEMAMix8bit,
}
SHAPES = [(16, 4), (64, 80), (80, 64)]  # of these the last two are large enough for 8 bits


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(kind: str) -> None:
    make = lambda weights: KINDS[kind](weights, lr=0.01)  # noqa: E731
    weights = parameters()
    optimizer = make(weights)
    for seed in range(3):
        step(weights, optimizer, seed)
    saved, values = copy.deepcopy([optimizer.state_dict()]), [weight.detach().clone() for weight in weights]
    for seed in range(3, 6):
        step(weights, optimizer, seed)

    others = [nn.Parameter(value) for value in values]
    resumed = make(others)
    restore_optimizer(resumed, saved, make)
    for seed in range(3, 6):
        step(others, resumed, seed)
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_settings_are_those_of_the_run_and_not_of_the_checkpoint() -> None:
    weights = parameters()
    optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5)
    step(weights, optimizer, 0)
    other = torch.optim.AdamW(parameters(), lr=0.2, weight_decay=0.0, betas=(0.8, 0.9))
    restore_optimizer(other, [optimizer.state_dict()], lambda p: torch.optim.AdamW(p, lr=0.2))
    [group] = other.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.2, 0.0, (0.8, 0.9))
    for mine, theirs in zip(group["params"], weights, strict=True):
        assert torch.equal(other.state[mine]["exp_avg"], optimizer.state[theirs]["exp_avg"])


def broken(state: dict[str, Any], what: str) -> list[Any]:
    first = state["state"][1]
    inner = first.get("__bnb_optimizer_quant_state__", first)
    tensor = "state1" if "state1" in inner else "exp_avg"
    if what == "another shape":
        inner[tensor] = inner[tensor].flatten()[:-1]
    elif what == "another dtype":
        inner[tensor] = inner[tensor].to(torch.float64)
    elif what == "no tensor":
        inner[tensor] = 3
    elif what == "a key more":
        inner["more"] = torch.zeros(2)
    elif what == "a key less":
        del inner[tensor]
    elif what == "a NaN":
        (inner["absmax1"] if "absmax1" in inner else inner[tensor]).view(-1)[0] = float("nan")
    elif what == "steps below zero":
        first["step"] = first["step"] * 0 - 1
    elif what == "a parameter more":
        state["state"][len(SHAPES)] = first
    elif what == "a parameter by name":
        state["state"]["weight"] = first
    return {"no list": state, "two optimizers": [state, state], "no state": [{}]}.get(what, [state])  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
@pytest.mark.parametrize(
    "what",
    [
        *("another shape", "another dtype", "no tensor", "a key more", "a key less", "steps below zero", "a NaN"),
        *("a parameter more", "a parameter by name", "no list", "two optimizers", "no state"),
    ],
)
def test_a_state_that_is_not_one_of_the_optimizer_is_refused(kind: str, what: str) -> None:
    make = lambda weights: KINDS[kind](weights, lr=0.01)  # noqa: E731
    weights = parameters()
    optimizer = make(weights)
    step(weights, optimizer, 0)
    saved = broken(copy.deepcopy(optimizer.state_dict()), what)
    with pytest.raises(Unfit, match="optimizer_states"):
        restore_optimizer(make(parameters()), saved, make)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_schedule_put_to_a_step_is_the_one_that_went_there(schedule: str) -> None:
    def made() -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD(parameters(), lr=0.3)
        factor = lambda at: learning_rate_factor(at, schedule=schedule, warmup_steps=5, total_steps=40)  # noqa: E731
        return optimizer, LambdaLR(optimizer, factor)

    walked, walking = made()
    for at in range(40):
        put, putting = made()
        go_to_step(putting, at)
        assert put.param_groups[0]["lr"] == walked.param_groups[0]["lr"]
        for _ in range(3):
            put.step()
            putting.step()
        other, others = made()
        go_to_step(others, at + 3)
        assert put.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        walked.step()
        walking.step()

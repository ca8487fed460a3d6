"""Steps that are not finite: left out as if they had no gradient, counted, and traced to the module they come from.

pytest tests/test_finite.py
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from test_callbacks import Each, fit, module
from torch import nn
from transformers import LlamaForCausalLM

import lorafit.diagnosis
import lorafit.module
from lorafit.callbacks import Checkpoints, SkipNonFinite, StepMetrics
from lorafit.checkpoint import random_state
from lorafit.data.loader import collate
from lorafit.diagnosis import first_nonfinite_module
from lorafit.errors import DivergedError
from lorafit.inject import inject_lora
from lorafit.loading import load_base_model
from lorafit.module import FinetuneModule
from lorafit.trainer import quiet_libraries

LAYER = "model.layers.1.mlp.up_proj"
BATCH = collate([{"input_ids": [3, 5, 7, 11], "labels": [-100, 5, 7, 11]}], 0)
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


@pytest.fixture
def quantized(llama_folder: Path) -> Callable[..., Any]:
    def build(quant: Any) -> Any:
        model = load_base_model(str(llama_folder), quant=quant, device="cpu")
        inject_lora(model, rank=4, alpha=8)
        return model.train()

    return build


def bad_losses(patch: pytest.MonkeyPatch, *numbers: int, value: float = NAN) -> None:
    """The training losses of those micro-batches, counted from 1, are `value`."""
    real, seen = lorafit.module.supervised_loss, [0]

    def loss(model: Any, *arguments: Any) -> Any:
        total, tokens = real(model, *arguments)
        seen[0] += model.training
        return (total * value if model.training and seen[0] in numbers else total), tokens

    patch.setattr(lorafit.module, "supervised_loss", loss)


class NoGradient(L.Callback):
    """Takes the gradients of some steps away."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step + 1 in self.steps:
            for parameter in pl_module.parameters():
                parameter.grad = None


def state(made: FinetuneModule, trainer: L.Trainer) -> list[Any]:
    """All that a step changes: adapter, state of the optimizer, learning rate, generators."""
    optimizer = trainer.optimizers[0]
    return [
        made.state_dict(),
        optimizer.state_dict()["state"],
        optimizer.param_groups[0]["lr"],
        random_state()["torch"],
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


# ------------------------------------------------------------------------------------------------ where it comes from


def test_a_finite_model_is_found_to_be_so(quantized: Callable[..., Any]) -> None:
    for quant in (None, "nf4", "int8"):
        assert first_nonfinite_module(quantized(quant), [BATCH, BATCH]) is None


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("quant", [None, "nf4", {"type": "nf4", "double_quant": False}, "int8"], ids=str)
def test_a_bad_number_in_a_weight_of_the_base_is_traced_to_its_layer(
    quantized: Callable[..., Any], quant: Any, bad: float
) -> None:
    model = quantized(quant)
    base = model.get_submodule(LAYER).base_layer
    if quant is None:
        base.weight.data.view(-1)[70] = bad
    elif quant == "int8":
        base.weight.SCB[3] = bad
    else:
        scales = base.weight.quant_state
        (scales.state2 if scales.nested else scales).absmax[0] = bad
    found = first_nonfinite_module(model, [BATCH])
    assert found is not None and (found.module, found.weight, found.from_input) == (LAYER, "weight", False)
    assert str(found) == f"{LAYER}, whose weight holds a number that is not finite"


def test_an_infinite_factor_is_named(quantized: Callable[..., Any]) -> None:
    model = quantized(None)
    model.get_submodule(LAYER).lora_B.weight.data[5, 1] = INF
    found = first_nonfinite_module(model, [BATCH])
    assert found is not None and (found.module, found.weight) == (f"{LAYER}.lora_B", "weight")


def test_an_infinite_factor_of_an_embedding_is_named(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    for factor in ("lora_A", "lora_B"):
        model = tiny_llama()
        inject_lora(model, rank=4, alpha=8, target_modules="embed_tokens")
        getattr(model.get_submodule("model.embed_tokens"), factor).weight.data.fill_(INF)
        found = first_nonfinite_module(model, [BATCH])
        assert found is not None and (found.module, found.weight) == (f"model.embed_tokens.{factor}", "weight")


def test_a_product_that_overflows_is_told_from_a_bad_input(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    weight = model.get_submodule(LAYER).weight
    weight.data.fill_(3e38)
    found = first_nonfinite_module(model, [BATCH])
    assert found is not None and (found.module, found.weight, found.from_input) == (LAYER, None, False)
    assert str(found) == LAYER


class Named(nn.Module):
    """Passes a number that it makes itself on to a layer, which is given it by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.layer = Scaled()

    def forward(self, x: torch.Tensor) -> Any:
        return {"all": (1, [self.layer(scale=x / 0)])}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return scale * self.weight


def test_inputs_by_keyword_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lorafit.diagnosis, "supervised_loss", lambda model, batch: model(batch))
    found = first_nonfinite_module(Named(), [torch.ones(2)])
    assert str(found) == "layer, whose input is not finite either"


def test_outputs_in_outputs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner model's output is in a list in a tuple in a dict."""
    monkeypatch.setattr(lorafit.diagnosis, "supervised_loss", lambda model, batch: model(batch))
    model = nn.Sequential(Named())
    monkeypatch.setattr(Scaled, "forward", lambda self, scale: 1)  # which is nothing to look at
    monkeypatch.setattr(Named, "forward", lambda self, x: {"all": (1, [x / 0])})
    assert str(first_nonfinite_module(model, [torch.ones(2)])) == "0"


@pytest.mark.parametrize("found", [True, False])
def test_looking_leaves_nothing_behind(quantized: Callable[..., Any], found: bool) -> None:
    model = quantized("nf4")
    model.model.layers[0].eval()
    if found:
        model.get_submodule(LAYER).lora_B.weight.data.fill_(NAN)
    flags = {name: part.training for name, part in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    generators = torch.get_rng_state()
    assert (first_nonfinite_module(model, [BATCH]) is not None) == found
    assert {name: part.training for name, part in model.named_modules()} == flags
    assert not any(part._forward_hooks for part in model.modules())
    assert not any(part._forward_hooks_with_kwargs for part in model.modules())
    assert torch.equal(torch.get_rng_state(), generators)
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(value.nan_to_num(7.0), after[name].nan_to_num(7.0)) for name, value in before.items())


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpointing": "full"}, {"checkpointing": "selective"}, {"fused": "off"}, {"adapter_dtype": "nf4"}],
    ids=str,
)
def test_training_goes_on_bitwise_as_if_nobody_had_looked(options: dict[str, Any], tmp_path: Path) -> None:
    def look(_: L.Trainer, pl_module: Any) -> None:
        assert first_nonfinite_module(pl_module.model, [BATCH]) is None

    states = []
    for callbacks in ([], [Each(look)]):
        torch.manual_seed(1)
        made = module(dropout=0.3, **options)
        states.append(state(made, fit(made, tmp_path, *callbacks)))
    assert same(*states)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_so_it_does_over_a_quantized_base(quant: str, llama_folder: Path, tmp_path: Path) -> None:
    def look(_: L.Trainer, pl_module: Any) -> None:
        assert first_nonfinite_module(pl_module.model, [BATCH]) is None

    states = []
    for callbacks in ([], [Each(look)]):
        torch.manual_seed(1)
        made = FinetuneModule(
            str(llama_folder), quant=quant, rank=4, alpha=8, dropout=0.3, device="cpu", optimizer_args={"lr": 1e-2}
        )
        states.append(state(made, fit(made, tmp_path, *callbacks)))
    assert same(*states)


# ------------------------------------------------------------------------------------------------ the step left out


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit", "torch.optim.SGD"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_step_that_is_not_finite_is_the_step_that_has_no_gradient(
    optimizer: str,
    accumulate: int,
    bad: float,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four batches an epoch: by threes, the second step is a short one, of the fourth. One of the third step is bad."""
    options = {"accumulate_grad_batches": accumulate, "max_steps": 6}
    settings = {"optimizer": optimizer, "dropout": 0.3, "hidden": 256, "rank": 20}

    torch.manual_seed(1)
    expected = module(**settings)
    reference = state(expected, fit(expected, tmp_path, NoGradient(3), **options))

    finite, metrics = SkipNonFinite(max_skipped=1), StepMetrics(1)
    bad_losses(monkeypatch, 3 if accumulate == 1 else 6, value=bad)
    torch.manual_seed(1)
    made = module(**settings)
    with caplog.at_level(logging.WARNING, "lorafit"):
        trainer = fit(made, tmp_path, finite, metrics, **options)
    assert trainer.global_step == 6
    assert same(state(made, trainer), reference)
    assert (finite.skipped, finite.skipped_in_a_row, finite.first_of_row) == (1, 0, None)
    said = "Every module's output is finite: it is the loss alone (1 of at most 1)"
    assert caplog.messages == [f"step 3 was skipped: its loss is {bad}. {said}"]
    assert [step for step, loss in metrics.losses if not math.isfinite(loss)] == [3]
    assert metrics.totals()["steps"] == 6 and metrics.totals()["tokens_per_second"] > 0


def test_a_loss_that_is_finite_with_a_gradient_that_is_not_is_skipped_and_its_layers_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, finite = module(), SkipNonFinite(max_skipped=1)
    made.configure_model()
    calls = [0]

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return torch.full_like(gradient, INF) if calls[0] == 2 else gradient

    made.model.model.layers[0].mlp.up_proj.lora_B.weight.register_hook(overflow)
    with caplog.at_level(logging.WARNING, "lorafit"):
        fit(made, tmp_path, finite)
    assert caplog.messages == [
        "step 2 was skipped: its gradient is not finite. Every module's output is finite; the gradient is not in "
        "model.layers.0.mlp.up_proj.lora_B.weight (1 of at most 1)"
    ]
    assert finite.skipped == 1


def test_skips_in_a_row_are_counted_until_a_step_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    finite = SkipNonFinite(max_skipped=9)
    logged: list[tuple[int, float]] = []
    logger: Any = SimpleNamespace(
        log_metrics=lambda numbers, step: logged.append((step, numbers["train/skipped_steps"])),
        save=lambda: None,
        finalize=lambda _: None,
    )

    def note(trainer: L.Trainer, _: Any) -> None:
        trainer.loggers = [logger]
        seen.append((finite.skipped, finite.skipped_in_a_row, finite.first_of_row))

    bad_losses(monkeypatch, 2, 3, 6)
    with caplog.at_level(logging.WARNING, "lorafit"):
        fit(module(), tmp_path, Each(note), finite, max_steps=7)
    assert seen[1:] + [(finite.skipped, finite.skipped_in_a_row, finite.first_of_row)] == [
        *((1, 1, 2), (2, 2, 2), (2, 0, None), (2, 0, None), (3, 1, 6), (3, 0, None), (3, 0, None))
    ]
    assert logged == [(2, 1.0), (3, 2.0), (6, 3.0)]
    first, second, third = caplog.messages
    assert "first" not in second and "finite" not in second  # a row is looked into once
    assert second == "step 3 was skipped: its loss is nan (2 of at most 9)"
    assert "Every module" in first and "Every module" in third


@pytest.mark.parametrize(("most", "last"), [(0, 2), (1, 4), (2, 5)])
def test_the_step_after_as_many_as_are_allowed_ends_the_run_with_the_weights_of_the_step_before(
    most: int, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, finite, states = module(), SkipNonFinite(max_skipped=most), []
    note = Each(lambda _, m: states.append({name: value.clone() for name, value in m.state_dict().items()}))
    bad_losses(monkeypatch, 2, 4, 5)
    with pytest.raises(DivergedError) as error:
        fit(made, tmp_path, finite, note, max_steps=8)
    assert len(states) == last - 1
    assert all(torch.equal(value, states[-1][name]) for name, value in made.state_dict().items())
    said = str(error.value)
    assert said.startswith(f"step {last} cannot be taken: its loss is nan. Every module's output is finite")
    assert (f", and {most} steps were skipped before it. Lower optimizer.lr" in said) == (most > 0)
    assert "scheduler.warmup" in said and "trainer.gradient_clip_val" in said and "lorafit.audit" in said
    assert finite.skipped == most + 1 and finite.first_of_row == {0: 2, 1: 4, 2: 4}[most]


def test_the_module_is_named_in_the_run_and_the_batches_are_let_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight of the base is no number from the third step on."""
    made, finite = module(fused="auto"), SkipNonFinite(max_skipped=1)
    made.configure_model()
    looked = []

    def poison(trainer: L.Trainer, pl_module: Any) -> None:
        looked.append(len(finite._batches))
        if trainer.global_step == 2:
            pl_module.model.model.layers[0].mlp.down_proj.base_layer.weight.data[0, 0] = NAN

    with (
        caplog.at_level(logging.WARNING, "lorafit"),
        pytest.raises(DivergedError, match=r"step 4 .*model\.layers\.0\.mlp\.down_proj, whose weight holds a number"),
    ):
        fit(made, tmp_path, finite, Each(poison), accumulate_grad_batches=2, max_steps=5)
    [said] = caplog.messages
    where = "The first module whose output is not finite is model.layers.0.mlp.down_proj, whose weight holds a number"
    assert said == f"step 3 was skipped: its loss is nan. {where} that is not finite (1 of at most 1)"
    assert looked == [1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("no such kernel")])
def test_what_goes_wrong_while_looking_does_not_end_the_run(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    bad_losses(monkeypatch, 2)
    monkeypatch.setattr(lorafit.diagnosis, "supervised_loss", fail)
    made = module()
    with caplog.at_level(logging.WARNING, "lorafit"):
        assert fit(made, tmp_path, SkipNonFinite(max_skipped=1)).global_step == 4
    [said] = caplog.messages
    assert f"Which module it begins in could not be found out ({error})" in said
    assert not any(part._forward_hooks for part in made.modules())


def test_a_resumed_run_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        bad_losses(patch, 2, 3)
        fit(module(), tmp_path, SkipNonFinite(max_skipped=2), Checkpoints(tmp_path), max_steps=4)
    finite = SkipNonFinite(max_skipped=2)
    with monkeypatch.context() as patch:
        bad_losses(patch, 2)
        with pytest.raises(DivergedError, match="step 6 cannot be taken.* and 2 steps were skipped before it"):
            fit(module(), tmp_path, finite, Checkpoints(tmp_path / "b"), resume=tmp_path / "last.ckpt", max_steps=8)
    assert finite.skipped == 3


def test_several_processes_decide_by_the_sum_of_what_they_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process's loss is not finite; here everything is."""
    asked = []

    def reduce(self: Any, tensor: torch.Tensor, *_: Any, reduce_op: str = "mean", **__: Any) -> torch.Tensor:
        asked.append((tensor.clone(), reduce_op))
        return tensor + torch.tensor([INF if len(asked) == 2 else 1.0, 0.0])

    made, finite = module(), SkipNonFinite(max_skipped=0)
    made.configure_model()
    trainer: Any = SimpleNamespace(
        world_size=2, global_step=0, strategy=SimpleNamespace(reduce=lambda *a, **k: reduce(None, *a, **k))
    )
    parameter = next(p for p in made.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(type(made), "trainer", property(lambda _: trainer))
    finite.on_before_optimizer_step(trainer, made, None)  # type: ignore[arg-type]
    assert parameter.grad is not None and finite.skipped == 0
    with pytest.raises(DivergedError, match="its loss is inf.*finite in this process: .*another process's batch"):
        finite.on_before_optimizer_step(trainer, made, None)  # type: ignore[arg-type]
    assert [operation for _, operation in asked] == ["sum", "sum"]

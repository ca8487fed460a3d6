"""The module in a real Trainer: exact gradients, small checkpoints, and runs that nothing from outside bends.

pytest tests/test_module.py
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit.callbacks import Checkpoints, SkipNonFinite, StepMetrics, StopOnSignal
from lorafit.checkpoint import load_checkpoint, random_state
from lorafit.config import CONF
from lorafit.data import IGNORE, ResumableLoader, collate
from lorafit.datamodule import FinetuneDataModule
from lorafit.errors import InputError, Stopped
from lorafit.loss import supervised_loss
from lorafit.module import FinetuneModule, find_optimizer, learning_rate_factor
from lorafit.trainer import build_trainer, quiet_libraries, total_steps, validation_interval

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


def module(**options: Any) -> FinetuneModule:
    made = FinetuneModule(tiny(), **{"rank": 4, "alpha": 8, "optimizer_args": {"lr": 1e-2}} | options)
    made.configure_model()
    for name, parameter in made.named_parameters():
        if "lora_B" in name:  # zero at first, and then A would have no gradient
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return made


def uneven(count: int) -> list[dict[str, list[int]]]:
    """Sequences of 3 to 17 tokens, of which between one and all are trained."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for index in range(count):
        ids = torch.randint(0, 97, (3 + 5 * index % 15,), generator=generator).tolist()
        masked = (7 * index) % (len(ids) - 1)
        made.append({"input_ids": ids, "labels": [IGNORE] * masked + ids[masked:]})
    return made


class Gradients(L.Callback):
    """The gradients that each step used: they stand until the next step begins."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.stepped:
            self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def train(
    made: FinetuneModule, sequences: list[Any], folder: Path, *, batch_size: int, accumulate: int = 1, **options: Any
) -> StepMetrics:
    loader = ResumableLoader(sequences, batch_size, pad_id=0)
    metrics = StepMetrics()
    callbacks = [metrics, *options.pop("callbacks", [])]
    trainer = build_trainer(
        folder,
        batches=len(loader),
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        callbacks=callbacks,
        **options,
    )
    trainer.fit(made, loader)
    return metrics


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "steps"), [(8, 1), (6, 1), (14, 2)])
def test_uneven_micro_batches_give_the_gradient_of_one_batch_also_where_an_epoch_ends_early(
    tmp_path: Path, rows: int, steps: int
) -> None:
    """8 rows are four micro-batches; 6 are three, and the step comes early; 14 are a whole step and a short one."""
    sequences, recorded = uneven(rows), Gradients()
    made = module(optimizer="torch.optim.SGD", optimizer_args={"lr": 0.0}, gradient_clip_val=None)
    metrics = train(made, sequences, tmp_path, batch_size=2, accumulate=4, callbacks=[recorded])
    assert len(recorded.steps) == steps == len(metrics.losses)
    for index, found in enumerate(recorded.steps):
        rows_of_step = sequences[8 * index : 8 * index + 8]
        model = copy.deepcopy(made.model).double()  # one batch in float32 has rounding of its own
        loss, count = supervised_loss(model, collate(rows_of_step, 0))
        parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        exact = torch.autograd.grad(loss / count, [parameters[name] for name in found])
        gradient, reference = (torch.cat([part.flatten() for part in parts]) for parts in (found.values(), exact))
        assert (gradient - reference).norm() <= 1e-6 * reference.norm()
        assert metrics.losses[index][1] == pytest.approx((loss / count).item(), rel=1e-6)
    supervised = sum(sum(label != IGNORE for label in s["labels"][1:]) for s in sequences)
    assert metrics.supervised_tokens == supervised
    assert metrics.tokens == sum(len(s["input_ids"]) for s in sequences)


def test_the_norm_is_that_of_the_gradient_before_it_is_clipped_and_clipping_holds(tmp_path: Path) -> None:
    norms, clipped = [], []
    for clip in (None, 0.01):
        recorded = Gradients()
        made = module(optimizer="torch.optim.SGD", optimizer_args={"lr": 0.0}, gradient_clip_val=clip)
        metrics = train(made, uneven(4), tmp_path, batch_size=4, callbacks=[recorded])
        norms.append(metrics.recent["train/gradient_norm"])
        clipped.append(math.sqrt(sum(float(g.square().sum()) for g in recorded.steps[0].values())))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) == pytest.approx(clipped[0], rel=1e-5)
    assert norms[0] > 0.01 >= clipped[1] * (1 - 1e-4)


def test_checkpointing_changes_memory_and_not_the_gradient(tmp_path: Path) -> None:
    found, recomputed = [], []
    for checkpointing in ("none", "full"):
        made, recorded, calls = module(checkpointing=checkpointing, dropout=0.2), Gradients(), []
        made.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        train(made, uneven(4), tmp_path, batch_size=4, callbacks=[recorded])
        found.append(recorded.steps[0])
        recomputed.append(len(calls))
    assert recomputed == [1, 2]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-9)


# --- learning -------------------------------------------------------------------------------------


def test_the_loss_falls_within_twenty_steps(tmp_path: Path) -> None:
    data = FinetuneDataModule(limit=64, eval_limit=4)
    data.setup()
    made = FinetuneModule(rank=8, alpha=16, device="cpu", optimizer_args={"lr": 3e-3})
    losses = [loss for _, loss in train(made, data.train_sequences, tmp_path, batch_size=16, max_steps=20).losses]
    assert len(losses) == 20 and losses[-1] < 0.6 * losses[0]


def test_the_base_stays_as_it_was_bit_for_bit(tmp_path: Path) -> None:
    made, reference = module(), tiny().state_dict()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    train(made, uneven(4), tmp_path, batch_size=2, max_steps=4)
    for name, value in made.model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, reference[name.replace(".base_layer", "")])
    assert all(not torch.equal(value, before[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("path", sorted((CONF / "optimizer").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_optimizer_of_the_configuration_trains_the_embedded_model(path: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(path.read_text()) | {"lr": 3e-3}
    made = FinetuneModule("embedded", device="cpu", optimizer=settings.pop("_target_"), optimizer_args=settings)
    made.configure_model()
    metrics = train(made, uneven(4), tmp_path, batch_size=4, max_steps=6)
    assert metrics.losses[-1][1] < metrics.losses[0][1]
    assert all(torch.isfinite(value).all() for value in made.state_dict().values())


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("torch.optim.AdamV", "there is no optimizer 'torch.optim.AdamV'. Did you mean 'Adam'"),
        ("bitsandbytes.optim.AdamW8bits", "Did you mean 'AdamW8bit'"),
        ("torch.optim.nowhere.Adam", "there is no optimizer"),
        ("os.system", "must lie in torch.optim.* or bitsandbytes.optim.*"),
        ("", "must lie in"),
    ],
)
def test_an_optimizer_that_is_none_is_refused(path: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        FinetuneModule("embedded", optimizer=path)
    assert said in str(caught.value)
    assert find_optimizer("torch.optim.AdamW") is torch.optim.AdamW


@pytest.mark.parametrize(("key", "value"), [("checkpointing", "ful"), ("scheduler", "cosin")])
def test_a_wrong_choice_is_told_the_nearest(key: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{key} must be one of .*Did you mean"):
        FinetuneModule("embedded", **{key: value})


@pytest.mark.parametrize(
    ("schedule", "closed_form"),
    [
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("linear", lambda p: 1 - p),
        ("constant", lambda p: 1.0),
    ],
)
def test_the_learning_rate_rises_and_follows_its_schedule(schedule: str, closed_form: Any, tmp_path: Path) -> None:
    factors = [learning_rate_factor(s, schedule=schedule, warmup_steps=4, total_steps=20) for s in range(21)]
    assert factors[:4] == [0.2, 0.4, 0.6, 0.8]
    assert factors[4:] == pytest.approx([closed_form(step / 16) for step in range(17)])
    assert max(factors) == factors[4] == 1.0 and min(factors) >= 0

    class Rates(L.Callback):
        seen: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            self.seen.append(pl_module.used_learning_rate)

    rates = Rates()
    rates.seen = []
    made = module(scheduler=schedule, warmup=0.2)
    train(made, uneven(4), tmp_path, batch_size=4, max_steps=20, callbacks=[rates])
    assert rates.seen == pytest.approx([1e-2 * factor for factor in factors[:20]])


def test_a_run_takes_the_steps_that_its_limits_give() -> None:
    assert total_steps(7, 3, None, None) == 3  # one epoch; its last step is a short one
    assert total_steps(7, 3, None, 2) == total_steps(7, 3, -1, 2) == 6
    assert total_steps(7, 3, 4, 2) == 4 and total_steps(7, 3, 100, 2) == 6 and total_steps(7, 3, 100, -1) == 100
    assert validation_interval(5, batches=7, accumulate=3, steps=9) == 15
    assert validation_interval(0.5, batches=8, accumulate=3, steps=9) == 4
    assert validation_interval(None, batches=7, accumulate=3, steps=9) == 6


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_is_plain_data_and_holds_the_adapter_alone(tmp_path: Path) -> None:
    made = module()
    train(made, uneven(4), tmp_path, batch_size=2, max_steps=2, callbacks=[Checkpoints(tmp_path)])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {
        f"model.layers.{i}.{part}.lora_{factor}.weight"
        for i in range(2)
        for part in [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        for factor in "AB"
    }

    def tensors(value: Any) -> Iterator[Tensor]:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            if isinstance(item, Tensor):
                yield item
            yield from tensors(item)

    base = {tuple(p.shape) for n, p in made.model.named_parameters() if "lora" not in n and p.dim() == 2}
    assert not base & {tuple(tensor.shape) for tensor in tensors(saved)}
    other = FinetuneModule(tiny(), rank=4, alpha=8)
    other.load_state_dict(saved["state_dict"])
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in other.state_dict().items())


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = module().state_dict()
    with pytest.raises(InputError, match="does not fit the model: .* is "):
        FinetuneModule(tiny(), rank=8, alpha=8).load_state_dict(state)
    first = next(iter(state))
    with pytest.raises(InputError, match=f"missing {first}"):
        module().load_state_dict({name: value for name, value in state.items() if name != first})


def test_the_same_seed_gives_the_same_adapter_whatever_was_drawn_before() -> None:
    def fresh(seed: int) -> dict[str, Tensor]:
        made = FinetuneModule(tiny(), rank=4, alpha=8, seed=seed)
        torch.rand(int(torch.randint(1, 9, ())))
        drawn = torch.get_rng_state()
        made.configure_model()
        made.configure_model()  # a second call does nothing
        assert torch.equal(torch.get_rng_state(), drawn)
        return made.state_dict()

    first, same, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# --- what must not bend a run ---------------------------------------------------------------------


class Watch(L.Callback):
    """Asks for an end after a step or after a validation, and keeps the held-out losses."""

    def __init__(self, signals: StopOnSignal, step: int | None, where: str) -> None:
        self.signals, self.step, self.where = signals, step, where
        self.held_out: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.where == "step":
            self.signals.stopping.asked.append(15)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.held_out.append((trainer.global_step, float(trainer.callback_metrics["eval/loss"])))
        if trainer.global_step == self.step and self.where == "validation":
            self.signals.stopping.asked.append(15)


def embedded_run(
    folder: Path,
    *,
    quant: str | None = None,
    optimizer: str = "torch.optim.AdamW",
    accumulate: int = 1,
    rows: int = 40,
    validate: int | None = None,
    stop: int | None = None,
    stop_at: str = "step",
    resume: Path | None = None,
    workers: int = 0,
) -> tuple[list[tuple[int, float]], dict[str, Tensor], list[tuple[int, float]]]:
    """Twelve steps of the embedded model with dropout: (losses, adapter, held-out losses)."""
    torch.manual_seed(123 if resume is None else 321)  # what a resumed run drew before is not what the first one drew
    data = FinetuneDataModule(batch_size=2, limit=rows, eval_limit=4, num_workers=workers)
    made = FinetuneModule(
        rank=4, alpha=8, dropout=0.1, quant=quant, device="cpu", optimizer=optimizer, optimizer_args={"lr": 1e-2}
    )
    checkpoints, metrics = Checkpoints(folder), StepMetrics()
    signals = StopOnSignal(checkpoints)
    watch = Watch(signals, stop, stop_at)
    trainer = build_trainer(
        folder,
        batches=rows // 2,
        max_steps=12,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate if validate is not None else 1000,
        accelerator="cpu",
        callbacks=[SkipNonFinite(), metrics, watch, checkpoints, signals],
    )
    try:
        trainer.fit(made, data, ckpt_path=str(resume) if resume else None)
        assert stop is None
    except Stopped:
        assert stop is not None
    return metrics.losses, {name: value.clone() for name, value in made.state_dict().items()}, watch.held_out


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_validation_in_the_middle_changes_no_later_loss(tmp_path: Path, quant: str | None) -> None:
    without, plain, _ = embedded_run(tmp_path / "a", quant=quant)
    among, looked_at, held_out = embedded_run(tmp_path / "b", quant=quant, validate=2)
    assert [step for step, _ in held_out] == [2, 4, 6, 8, 10, 12]
    assert len({loss for _, loss in held_out}) == 6
    assert among == without
    assert all(torch.equal(looked_at[name], plain[name]) for name in plain)


ADAMW, ADAMW_8BIT = "torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit"


@pytest.mark.parametrize(
    ("options", "stop", "stop_at"),
    [
        ({}, 5, "step"),  # in the middle of an epoch of 20 steps
        ({"rows": 10}, 5, "step"),  # at the end of an epoch
        ({"rows": 8, "validate": 2}, 4, "validation"),  # at the end of an epoch, after its validation
        ({"rows": 8, "validate": 3}, 7, "step"),
        ({"accumulate": 3, "workers": 1}, 5, "step"),
        ({"accumulate": 3, "rows": 14}, 5, "step"),  # the epoch's third step has one micro-batch only
        ({"accumulate": 3, "rows": 14, "validate": 2}, 6, "step"),
        ({"quant": "nf4", "optimizer": ADAMW_8BIT}, 5, "step"),
        ({"quant": "nf4", "accumulate": 3, "rows": 14, "validate": 1}, 5, "step"),
        ({"optimizer": ADAMW_8BIT, "accumulate": 3, "rows": 10}, 4, "step"),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    tmp_path: Path, options: dict[str, Any], stop: int, stop_at: str
) -> None:
    losses, adapter, held_out = embedded_run(tmp_path / "whole", **options)
    began, _, seen = embedded_run(tmp_path / "first", stop=stop, stop_at=stop_at, **options)
    ended, resumed, rest = embedded_run(tmp_path / "second", resume=tmp_path / "first" / "last.ckpt", **options)
    assert (len(began), len(losses)) == (stop, 12)
    assert began + ended == losses
    assert all(torch.equal(resumed[name], adapter[name]) for name in adapter)
    # a validation that was due at the very step that was stopped is left out, and no other
    assert seen + rest == [pair for pair in held_out if pair[0] != stop or stop_at == "validation"]


def test_a_run_can_be_stopped_and_resumed_again_and_again(tmp_path: Path) -> None:
    losses, adapter, _ = embedded_run(tmp_path / "whole", accumulate=2, rows=10)
    parts: list[tuple[int, float]] = []
    resume = None
    for stop in (2, 3, 7, None):
        part, state, _ = embedded_run(tmp_path / str(stop), accumulate=2, rows=10, stop=stop, resume=resume)
        parts, resume = parts + part, tmp_path / str(stop) / "last.ckpt"
    assert parts == losses and all(torch.equal(state[name], adapter[name]) for name in adapter)


def test_dropout_is_what_makes_a_resume_need_the_random_state(tmp_path: Path) -> None:
    """Without it the comparison above would hold for a checkpoint that forgot the generators."""
    losses, _, _ = embedded_run(tmp_path / "whole")
    embedded_run(tmp_path / "first", stop=5)
    path = tmp_path / "first" / "last.ckpt"
    saved = load_checkpoint(path)
    torch.manual_seed(1)
    saved["random_state"] = random_state()
    torch.save(saved, path)
    ended, _, _ = embedded_run(tmp_path / "second", resume=path)
    assert [step for step, _ in ended] == [6, 7, 8, 9, 10, 11, 12] and ended != losses[5:]

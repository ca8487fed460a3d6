"""The callbacks in a real Trainer: bytes that closed forms give, a clock that measures training, an end that is clean.

pytest tests/test_callbacks.py
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit.callbacks import (
    Checkpoints,
    PagedOptimizerMemory,
    SkipNonFinite,
    StepMetrics,
    StopOnSignal,
    TrainingProgress,
)
from lorafit.callbacks.progress import clock
from lorafit.checkpoint import load_checkpoint
from lorafit.data import ResumableLoader
from lorafit.errors import DivergedError, Stopped
from lorafit.memory import memory_by_part
from lorafit.module import FinetuneModule
from lorafit.terminal import human
from lorafit.trainer import build_trainer, quiet_libraries

SEQUENCES = [{"input_ids": [3 + i, 5, 7, 11], "labels": [-100, 5, 7, 11]} for i in range(8)]


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


def module(hidden: int = 64, rank: int = 4, **options: Any) -> FinetuneModule:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return FinetuneModule(
        LlamaForCausalLM(config), **{"rank": rank, "alpha": 8, "optimizer_args": {"lr": 1e-2}} | options
    )


class Each(L.Callback):
    """Calls a function after each step, or after each validation."""

    def __init__(self, step: Any = None, validation: Any = None) -> None:
        self.step, self.validation = step, validation

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.step:
            self.step(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.validation:
            self.validation(trainer, pl_module)


def fit(
    made: FinetuneModule, folder: Path, *callbacks: L.Callback, resume: Path | None = None, **options: Any
) -> L.Trainer:
    loader, held_out = (ResumableLoader(SEQUENCES, 2, pad_id=0) for _ in range(2))
    options = {"max_steps": 4, "val_check_interval": 100} | options
    trainer = build_trainer(folder, batches=4, accelerator="cpu", callbacks=list(callbacks), **options)
    trainer.fit(made, loader, held_out, ckpt_path=str(resume) if resume else None)
    return trainer


# --- memory ---------------------------------------------------------------------------------------


def state_of_8bit(parameters: list[int], states: int) -> int:
    """bitsandbytes: a byte per element, a float scale per block of 256, two tables; small tensors stay in float32."""
    large = [count for count in parameters if count >= 4096]
    small = [count for count in parameters if count < 4096]
    scales = sum(4 * math.ceil(count / 256) for count in large)
    return states * (sum(large) + scales + 4 * sum(small))


@pytest.mark.parametrize(
    ("optimizer", "closed_form"),
    [
        # two float32 averages, and a float32 step per tensor
        ("torch.optim.AdamW", lambda counts: 8 * sum(counts) + 4 * len(counts)),
        ("bitsandbytes.optim.PagedAdamW32bit", lambda counts: 8 * sum(counts)),
        ("bitsandbytes.optim.AdamW8bit", lambda counts: state_of_8bit(counts, states=2)),
        ("bitsandbytes.optim.PagedAdamW8bit", lambda counts: state_of_8bit(counts, states=2)),
        ("bitsandbytes.optim.Lion8bit", lambda counts: state_of_8bit(counts, states=1)),
        ("torch.optim.SGD", lambda counts: 0),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
def test_optimizer_bytes_are_those_of_the_closed_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, optimizer: str, closed_form: Any
) -> None:
    memory = PagedOptimizerMemory(every_n_steps=2)
    made = module(hidden=256, rank=20, optimizer=optimizer)
    with caplog.at_level(logging.INFO, "lorafit.callbacks.memory"):
        fit(made, tmp_path, memory)
    counts = [parameter.numel() for parameter in made.trainable_parameters()]
    assert max(counts) >= 4096
    tables = 4 * 256 * 2 if "8bit" in optimizer else 0  # the maps from codes to values, shared by all tensors
    assert closed_form(counts) <= memory.parts["optimizer"] <= closed_form(counts) + tables
    assert memory.parts["adapter"] == memory.parts["gradient"] == 4 * sum(counts)
    assert memory.parts["optimizer_paged"] == 0
    [sentence] = caplog.messages
    assert "Nothing is paged: there is no CUDA device." in sentence
    assert human(memory.parts["optimizer"]) in sentence and optimizer.rpartition(".")[2] in sentence
    assert memory.peak > sum(memory.parts.values())


@pytest.mark.parametrize(("quant", "bytes_per_weight"), [(None, 4), ("nf4", 0.5), ("int8", 1)])
def test_weights_and_scales_are_counted_apart_and_each_storage_once(quant: str | None, bytes_per_weight: float) -> None:
    made = FinetuneModule(rank=4, alpha=8, quant=quant, dtype="float32", device="cpu")
    made.configure_model()
    config = made.model.config
    linear = 4 * (4 * 128 * 128 + 3 * 128 * 384)
    rest = config.vocab_size * 128 + 9 * 128  # tied embeddings, norms
    blocks = linear // 64
    parts = memory_by_part(made)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in made.buffers())
    assert parts["weights"] == linear * bytes_per_weight + 4 * rest + buffers
    rows = 4 * (4 * 128 + 2 * 384 + 128)
    if quant == "nf4":  # a byte per block, a float per 256 blocks, and in each of 28 layers tables of 16 and 256 floats
        assert blocks + 4 * blocks // 256 <= parts["quant_state"] <= blocks + 4 * (blocks // 256 + 28) + 28 * 4 * (273)
    else:
        assert parts["quant_state"] == (4 * rows if quant == "int8" else 0)
    assert (parts["gradient"], parts["optimizer"], parts["optimizer_paged"]) == (0, 0, 0)


def test_state_in_managed_memory_is_counted_apart() -> None:
    resident, paged = torch.zeros(100), torch.zeros(1000, dtype=torch.uint8)
    paged.is_paged = True  # type: ignore[attr-defined]
    optimizer: Any = SimpleNamespace(state={torch.zeros(1): {"state1": paged, "state2": [resident, (resident, 3)]}})
    parts = memory_by_part(torch.nn.Linear(2, 2), optimizer)
    assert (parts["optimizer"], parts["optimizer_paged"]) == (1400, 1000)

    memory = PagedOptimizerMemory()
    memory.parts = {"optimizer": 1400, "optimizer_paged": 1000}
    for is_paged, said in ((True, "1000 B paged, 400 B resident"), (False, "all of it resident: it is no paged")):
        optimizer.is_paged = is_paged
        trainer: Any = SimpleNamespace(
            optimizers=[optimizer], strategy=SimpleNamespace(root_device=torch.device("cuda"))
        )
        assert said in memory.sentence(trainer)


def test_memory_is_counted_at_the_end_even_when_nothing_is_measured_on_the_way(tmp_path: Path) -> None:
    memory = PagedOptimizerMemory(every_n_steps=None)
    fit(module(), tmp_path, memory)
    assert memory.parts["optimizer"] > 0 and memory.parts["gradient"] > 0


def test_bytes_read_as_a_person_says_them() -> None:
    assert [human(n) for n in (0, 1023, 1024, 1.5 * 2**30, 2**50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "1024.0 TiB",
    ]


# --- speed ----------------------------------------------------------------------------------------


def test_the_clock_stands_still_while_validating_and_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lorafit.callbacks.speed.time.perf_counter", lambda: now[0])

    def passes(seconds: float) -> Any:
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    class Saving(Checkpoints):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.save(trainer)
            passes(1000)()

    made = module()
    made.configure_model()
    made.model.register_forward_pre_hook(lambda model, _: passes(1 if model.training else 100)())
    metrics = StepMetrics(every_n_steps=2)
    fit(made, tmp_path, metrics, Saving(tmp_path), val_check_interval=2)
    # each of four steps is a second; held-out batches take 100 and each checkpoint 1000
    assert metrics.seconds == 4.0
    assert metrics.totals() == {
        "steps": 4,
        "train_seconds": 4.0,
        "tokens_per_second": 8.0,
        "supervised_tokens_per_second": 6.0,
    }
    assert now[0] >= 4 + 4 * 1000 + 8 * 100


def test_what_is_logged_is_loss_rate_norm_and_speed(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="", version="")
    metrics = StepMetrics(every_n_steps=2)
    fit(module(), tmp_path, metrics, logger=logger, max_steps=5)
    logger.save()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [int(line.split(",")[lines[0].split(",").index("step")]) for line in lines[1:]] == [1, 2, 4]
    assert [step for step, _ in metrics.losses] == [1, 2, 3, 4, 5]
    for key in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "supervised_tokens_per_second"):
        assert f"train/{key}" in lines[0]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_how_far_it_is_and_what_the_losses_are(tmp_path: Path, terminal: bool) -> None:
    with (tmp_path / "said").open("w") as said:
        metrics = StepMetrics()
        console = Console(file=said, force_terminal=terminal, width=150)
        fit(module(), tmp_path, metrics, TrainingProgress(metrics, console, line_every_seconds=0), val_check_interval=2)
    text = (tmp_path / "said").read_text()
    assert ("4/4" if terminal else "step 4/4") in text
    smoothed = metrics.losses[0][1]
    for _, loss in metrics.losses[1:]:
        smoothed = 0.9 * smoothed + 0.1 * loss
    assert f"loss {smoothed:.3f}  held-out " in text and "supervised tokens/s  0:00 left" in text
    assert [clock(s) for s in (0, 75, 3600, 36061)] == ["0:00", "1:15", "1:00:00", "10:01:01"]


# --- divergence -----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(tmp_path: Path) -> None:
    made, states = module(), []

    def poison(trainer: L.Trainer, pl_module: FinetuneModule) -> None:
        states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        if trainer.global_step == 2:
            pl_module.model.model.norm.weight.data.fill_(math.nan)

    with pytest.raises(DivergedError, match=r"step 3 cannot be taken: its loss is nan\. .* model\.norm, whose"):
        fit(made, tmp_path, SkipNonFinite(), Each(poison), Checkpoints(tmp_path))
    assert len(states) == 2
    assert all(torch.equal(value, states[-1][name]) for name, value in made.state_dict().items())


def test_a_gradient_that_is_not_finite_is_told_by_its_layers(tmp_path: Path) -> None:
    made = module()
    made.configure_model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    bad = made.model.model.layers[0].mlp.up_proj.lora_B.weight
    bad.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    with pytest.raises(DivergedError, match=r"step 1 .*: its gradient is not finite\. .*up_proj\.lora_B\.weight\. "):
        fit(made, tmp_path, SkipNonFinite())
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


# --- checkpoints ----------------------------------------------------------------------------------


def scripted(losses: list[float]) -> Any:
    """A callback under which validation finds these losses, one after the other."""
    remaining = iter(losses)

    class Scripted(L.Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            loss = next(remaining)
            pl_module._validation = [torch.tensor([loss, 1.0], dtype=torch.float64)]

    return Scripted()


def test_the_best_checkpoint_is_the_one_with_the_lowest_held_out_loss(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    fit(module(), tmp_path, scripted([3.0, 1.0, 2.0, math.nan]), checkpoints, val_check_interval=1)
    assert load_checkpoint(checkpoints.best)["global_step"] == 2
    assert load_checkpoint(checkpoints.last)["global_step"] == 4
    assert checkpoints.best_loss == 1.0
    assert not list(tmp_path.glob(".*"))  # no drafts are left


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_run_knows_the_best_loss_and_has_its_checkpoint(tmp_path: Path, same_folder: bool) -> None:
    first = Checkpoints(tmp_path / "a", every_n_steps=1)  # written in the step, and again with what validation found
    fit(module(), tmp_path, scripted([3.0, 1.0]), first, max_steps=2, val_check_interval=1)
    second = Checkpoints(tmp_path / ("a" if same_folder else "b"))
    fit(module(), tmp_path, scripted([2.0, 1.5]), second, val_check_interval=1, resume=first.last)
    assert second.best_loss == 1.0 and load_checkpoint(second.best)["global_step"] == 2
    assert load_checkpoint(second.last)["global_step"] == 4


def test_a_best_checkpoint_that_is_gone_is_not_compared_with(tmp_path: Path) -> None:
    first, second = Checkpoints(tmp_path / "a"), Checkpoints(tmp_path / "b")
    fit(module(), tmp_path, scripted([1.0, 9.0]), first, max_steps=2, val_check_interval=1)
    first.best.unlink()
    fit(module(), tmp_path, scripted([2.0, 2.5]), second, val_check_interval=1, resume=first.last)
    assert second.best_loss == 2.0 and load_checkpoint(second.best)["global_step"] == 3


def test_a_best_checkpoint_that_a_killed_run_had_no_time_to_copy_is_copied_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    copy = Checkpoints._copy_to_best
    with monkeypatch.context() as patch:
        patch.setattr(
            Checkpoints, "_copy_to_best", lambda self, path: None if self.best_loss == 1.0 else copy(self, path)
        )
        fit(module(), tmp_path, scripted([3.0, 1.0]), first, max_steps=2, val_check_interval=1)
    assert load_checkpoint(first.best)["global_step"] == 1
    fit(module(), tmp_path, scripted([1.2, 1.1]), second, val_check_interval=1, resume=first.last)
    assert second.best_loss == 1.0 and load_checkpoint(second.best)["global_step"] == 2


def test_a_best_checkpoint_from_beyond_the_place_where_a_run_goes_on_is_none(tmp_path: Path) -> None:
    """The run has diverged there, and goes on from the checkpoint before."""
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    fit(module(), tmp_path, scripted([3.0, 2.0, 1.0]), first, max_steps=3, val_check_interval=1)
    fit(module(), tmp_path, scripted([2.5, 2.2]), second, max_steps=4, val_check_interval=1, resume=first.previous)
    assert second.best_loss == 2.0 and load_checkpoint(second.best)["global_step"] == 2


@pytest.mark.parametrize("same_folder", [True, False])
def test_what_was_best_at_the_end_of_a_run_stays_so_however_often_it_goes_on(tmp_path: Path, same_folder: bool) -> None:
    """It was measured after the last checkpoint was written, which says so all the same."""
    parts = [Checkpoints(tmp_path / ("a" if same_folder else name), every_n_steps=1) for name in "abc"]
    fit(module(), tmp_path, scripted([2.0]), parts[0], max_steps=3, val_check_interval=2)
    parts[0].keep_best(1.0)
    fit(module(), tmp_path, scripted([3.0]), parts[1], max_steps=5, val_check_interval=2, resume=parts[0].last)
    fit(module(), tmp_path, scripted([4.0]), parts[2], max_steps=7, val_check_interval=2, resume=parts[1].last)
    assert parts[2].best_loss == 1.0 and load_checkpoint(parts[2].best)["global_step"] == 3


def test_the_best_by_other_held_out_rows_is_not_compared_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    second.held_out = "other rows"
    fit(module(), tmp_path, scripted([1.0, 9.0]), first, max_steps=2, val_check_interval=1)
    with caplog.at_level(logging.WARNING, "lorafit"):
        fit(module(), tmp_path, scripted([5.0, 6.0]), second, val_check_interval=1, resume=first.last)
    assert second.best_loss == 5.0 and load_checkpoint(second.best)["global_step"] == 3
    assert "judged by other held-out rows" in caplog.text


def test_checkpoints_are_written_on_steps_alone(tmp_path: Path) -> None:
    seen = []

    class Recording(Checkpoints):
        def save(self, trainer: L.Trainer) -> None:
            seen.append((trainer.global_step, trainer.lightning_module.stepped))
            super().save(trainer)

    fit(
        module(),
        tmp_path,
        Recording(tmp_path, every_n_steps=2),
        accumulate_grad_batches=3,  # four batches an epoch: every second step is a short one
        val_check_interval=0.5,  # every second batch: also in the middle of an accumulation
        max_steps=6,
    )
    assert {2, 4, 6} <= {step for step, _ in seen} and all(stepped for _, stepped in seen)


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, every_n_steps=1)

    def break_the_next(trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 2:
            monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half") and 1 / 0)

    with pytest.raises(ZeroDivisionError):
        fit(module(), tmp_path, checkpoints, Each(break_the_next))
    assert load_checkpoint(checkpoints.last)["global_step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_on_a_step_with_a_checkpoint(tmp_path: Path, signum: int, code: int) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    made, checkpoints = module(), Checkpoints(tmp_path)
    made.configure_model()
    batches = []

    def strike(*_: Any) -> None:
        batches.append(1)
        if len(batches) == 5:  # the second of three micro-batches of the second step
            os.kill(os.getpid(), signum)

    made.model.register_forward_pre_hook(strike)
    with StopOnSignal(checkpoints) as signals, pytest.raises(Stopped) as stopped:
        fit(made, tmp_path, checkpoints, signals, accumulate_grad_batches=2, max_steps=9)
    assert stopped.value.exit_code == code and signal.Signals(signum).name in str(stopped.value)
    assert len(batches) == 6 and load_checkpoint(checkpoints.last)["global_step"] == 3
    assert all(torch.equal(v, load_checkpoint(checkpoints.last)["state_dict"][k]) for k, v in made.state_dict().items())
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_signal_during_validation_ends_with_the_checkpoint_of_the_step_before_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    strike = Each(validation=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with StopOnSignal(checkpoints) as signals, pytest.raises(Stopped):
        fit(module(), tmp_path, strike, checkpoints, signals, val_check_interval=2)
    assert load_checkpoint(checkpoints.last)["global_step"] == 2 and checkpoints.best_loss == math.inf


def test_a_second_signal_and_one_outside_of_training_do_not_wait(tmp_path: Path) -> None:
    with StopOnSignal(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    with StopOnSignal() as signals:

        def twice(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

        with pytest.raises(Stopped) as stopped:
            fit(module(), tmp_path, Each(twice), signals)
        assert stopped.value.exit_code == 130


def test_a_signal_in_the_last_step_still_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)

    def strike(trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with StopOnSignal(checkpoints) as signals, pytest.raises(Stopped):
        fit(module(), tmp_path, checkpoints, signals, Each(strike))
    assert load_checkpoint(checkpoints.last)["global_step"] == 4

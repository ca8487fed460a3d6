"""A batch that does not fit is computed in halves, and the gradient is the same.

pytest tests/test_splitting.py
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program
from test_callbacks import fit, module
from transformers import LlamaForCausalLM

from lorafit import train
from lorafit.callbacks import Checkpoints
from lorafit.checkpoint import load_checkpoint
from lorafit.data.loader import collate, collate_packed
from lorafit.errors import InputError, MemoryExhausted
from lorafit.inject import inject_lora, mark_only_lora_as_trainable
from lorafit.loss import supervised_loss
from lorafit.module import FinetuneModule
from lorafit.splitting import halves, trimmed
from lorafit.trainer import quiet_libraries

LENGTHS = [9, 4, 12, 7, 5]


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


def sequences(lengths: list[int] = LENGTHS) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 90, (length,), generator=generator).tolist() for length in lengths]
    # a prompt of two tokens, and one more at the end that is not trained either
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:-1], -100]} for ids in rows]


BATCHES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "padded": lambda: collate(sequences(), 0),
    "packed": lambda: collate_packed([sequences()[:2], sequences()[2:4], sequences()[4:]], 0),
    "padding-free": lambda: collate_packed([sequences()], 0),
}


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> Any:
    made = tiny_llama().double()
    inject_lora(made, rank=4, alpha=8)
    mark_only_lora_as_trainable(made)
    for name, parameter in made.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter.data.double(), std=0.1)
            parameter.data = parameter.data.double()
    return made.train()


def gradient(model: Any, batches: list[Any]) -> tuple[torch.Tensor, float, int]:
    model.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for batch in batches:
        loss, tokens = supervised_loss(model, batch)
        loss.backward()
        total, count = total + float(loss), count + int(tokens)
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(gradients), total, count


def parts(batch: Any, depth: int) -> list[Any]:
    both = halves(batch) if depth else None
    return [batch] if both is None else [part for half in both for part in parts(half, depth - 1)]


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_gradients_of_the_parts_add_up_to_that_of_the_batch(model: Any, kind: str, depth: int) -> None:
    batch = BATCHES[kind]()
    whole, loss, tokens = gradient(model, [batch])
    cut = parts(batch, depth)
    assert 1 < len(cut) <= 2**depth and (depth < 5 or len(cut) == len(LENGTHS))
    split, same_loss, same_tokens = gradient(model, cut)
    assert tokens == same_tokens and loss == pytest.approx(same_loss, rel=1e-12)
    assert torch.allclose(whole, split, rtol=0, atol=1e-10 * float(whole.abs().max()))


def test_halves_are_smaller_and_hold_no_padding_that_all_rows_share() -> None:
    for make in BATCHES.values():
        batch = make()
        both = halves(batch)
        assert both is not None
        assert max(part["input_ids"].numel() for part in both) < batch["input_ids"].numel()
        for part in both:
            assert (part["labels"][:, -1] != -100).any() and part["input_ids"].shape == part["labels"].shape
    short = collate(sequences([4, 4, 12]), 0)
    assert [part["input_ids"].shape[1] for part in halves(short) or ()] == [3, 11]
    assert trimmed(short)["input_ids"].shape == (3, 11)


def test_a_single_example_has_no_halves() -> None:
    assert halves(collate(sequences([8]), 0)) is None
    assert halves(collate_packed([sequences([8])], 0)) is None
    assert halves(collate_packed([sequences([8, 5])], 0)) is not None


# ------------------------------------------------------------------------------------------------ in the module


class Shortage:
    """Memory that runs out: forward passes of more than `rows` rows fail, or the backward passes of these."""

    def __init__(self, patch: pytest.MonkeyPatch, rows: int, where: str) -> None:
        import lorafit.module

        self.failed = 0
        real = lorafit.module.supervised_loss

        def loss(model: Any, batch: Any, *arguments: Any) -> Any:
            total, tokens = real(model, batch, *arguments)
            if model.training and len(batch["input_ids"]) > rows:
                if where == "forward":
                    self._fail()
                total = _FailInBackward.apply(total, self._fail)
            return total, tokens

        patch.setattr(lorafit.module, "supervised_loss", loss)

    def _fail(self) -> None:
        self.failed += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


class _FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, fail: Callable[[], None]) -> torch.Tensor:
        ctx.fail = fail
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        ctx.fail()
        return None, None


def losses_and_state(made: FinetuneModule, folder: Path, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    from lorafit.callbacks import StepMetrics

    metrics = StepMetrics(1)
    fit(made, folder, metrics, **options)
    return [loss for _, loss in metrics.losses], {name: value.clone() for name, value in made.state_dict().items()}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_in_halves_is_the_run_in_whole_batches(
    where: str, accumulate: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"accumulate_grad_batches": accumulate, "max_steps": 3}
    whole, state = losses_and_state(module(on_oom="halve"), tmp_path, **options)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "lorafit"):
        shortage = Shortage(patch, rows=1, where=where)
        made = module(on_oom="halve")
        halved, same = losses_and_state(made, tmp_path, **options)
    # tried once, and known from then on: all batches of these rows are of one size
    assert shortage.failed == 1 and made.halved == {1: 3, 3: 3 + 1 + 3}[accumulate]
    assert caplog.text.count("are computed in halves from here on") == 1
    assert halved == pytest.approx(whole, rel=1e-5)
    assert all(torch.allclose(state[name], same[name], rtol=1e-3, atol=1e-5) for name in state)


def test_what_a_failed_backward_pass_has_written_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails when some gradients are there already: at the lowest layer."""
    options = {"accumulate_grad_batches": 3, "max_steps": 2}
    _, state = losses_and_state(module(on_oom="halve", fused="off"), tmp_path, **options)
    made = module(on_oom="halve", fused="off")
    made.configure_model()
    calls = [0]

    def fail(gradient: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == 2:
            assert any(p.grad is not None and p.grad.any() for p in made.trainable_parameters())
            raise torch.OutOfMemoryError("CUDA out of memory.")

    made.model.model.layers[0].self_attn.q_proj.lora_A.weight.register_hook(fail)
    _, same = losses_and_state(made, tmp_path, **options)
    assert made.halved > 0
    assert all(torch.allclose(state[name], same[name], rtol=1e-3, atol=1e-5) for name in state)


def test_a_backward_pass_that_failed_keeps_nothing_beside_the_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the forward pass of the whole has kept is gone when the halves are computed."""
    import weakref

    import lorafit.module

    kept: list[weakref.ref[torch.Tensor]] = []
    real_loss, real_halves = lorafit.module.supervised_loss, lorafit.module.halves

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(activations := torch.zeros(3))
            kept.append(weakref.ref(activations))
            ctx.activations = activations
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            if len(kept) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return gradient

    def loss(*arguments: Any) -> Any:
        total, tokens = real_loss(*arguments)
        return Keep.apply(total), tokens

    def halves_then(batch: Any) -> Any:
        assert kept[0]() is None
        return real_halves(batch)

    monkeypatch.setattr(lorafit.module, "supervised_loss", loss)
    made = module(on_oom="halve")
    monkeypatch.setattr(lorafit.module, "halves", halves_then)
    fit(made, tmp_path, max_steps=1)
    assert made.halved == 1


def test_dropout_does_not_depend_on_how_far_the_failed_try_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for where in ("forward", "backward"):
        with monkeypatch.context() as patch:
            Shortage(patch, rows=1, where=where)
            torch.manual_seed(1)
            states.append(losses_and_state(module(on_oom="halve", dropout=0.3), tmp_path)[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_memory_is_let_go_only_where_it_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To collect garbage takes longer than a small step."""
    import lorafit.module

    let_go: list[Any] = []
    monkeypatch.setattr(lorafit.module, "_let_go", let_go.append)
    shortage = Shortage(monkeypatch, rows=1, where="forward")
    made = module(on_oom="halve")
    fit(made, tmp_path, max_steps=3)
    assert made.halved == 3 and len(let_go) == shortage.failed == 1


def test_without_halving_nothing_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Shortage(monkeypatch, rows=1, where="forward")
    with pytest.raises(torch.OutOfMemoryError):
        losses_and_state(module(), tmp_path)


def test_a_single_example_that_does_not_fit_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Shortage(monkeypatch, rows=0, where="backward")
    with pytest.raises(MemoryExhausted, match="a single example of 4 tokens does not fit"):
        losses_and_state(module(on_oom="halve"), tmp_path)


def test_a_resumed_run_knows_what_did_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Shortage(patch, rows=1, where="forward")
        fit(module(on_oom="halve"), tmp_path, Checkpoints(tmp_path), max_steps=2)
    assert load_checkpoint(tmp_path / "last.ckpt")["halving"] == {"too_large": 8, "halved": 2}
    made = module(on_oom="halve")
    fit(made, tmp_path, Checkpoints(tmp_path / "again"), resume=tmp_path / "last.ckpt", max_steps=4)
    assert made.halved == 4  # though memory was there


def test_on_several_devices_it_is_refused() -> None:
    code, _, err = run_program(train, "trainer.on_oom=halve", "trainer.devices=2", "trainer.accelerator=cpu")
    assert code == 2 and "trainer.on_oom=halve needs one device" in err
    with pytest.raises(InputError, match="Did you mean 'halve'"):
        FinetuneModule(on_oom="half")


def test_the_program_says_how_many_batches_were_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("general.txt").write_text("Bees tell each other where flowers are.")
    Shortage(monkeypatch, rows=2, where="forward")
    small = ("task.generate_examples=1", "task.eval_examples=8", "task.retention_path=general.txt", "logger=none")
    code, _, err = run_program(
        train, *small, "data.batch_size=4", "trainer.max_steps=3", "trainer.on_oom=halve", "hydra.run.dir=run"
    )
    assert code == 0, err
    assert 1 <= json.loads(Path("run/metrics.json").read_text())["speed"]["halved_batches"] <= 3

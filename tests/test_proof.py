"""The alarms: each planted fault raises one that names it, and healthy runs raise none.

pytest tests/test_proof.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_callbacks import Each, fit, module
from test_finite import bad_losses
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit.callbacks import Checkpoints, ProveLearning, SkipNonFinite
from lorafit.callbacks.proof import _ROW, checksums
from lorafit.checkpoint import load_checkpoint
from lorafit.data.loader import collate_packed
from lorafit.errors import NotLearning
from lorafit.module import FinetuneModule
from lorafit.trainer import quiet_libraries

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


@pytest.fixture
def over(llama_folder: Path) -> Callable[..., FinetuneModule]:
    """A module over a base that is loaded, and may be quantized."""

    def build(quant: Any = None, **options: Any) -> FinetuneModule:
        made = FinetuneModule(
            str(llama_folder),
            **{"quant": quant, "rank": 4, "alpha": 8, "device": "cpu", "optimizer_args": {"lr": 1e-2}} | options,
        )
        made.configure_model()
        return made

    return build


def after_step(step: int, act: Callable[[Any], object]) -> Each:
    return Each(lambda trainer, made: act(made.model) if trainer.global_step == step else None)


def alarm(made: FinetuneModule, folder: Path, *callbacks: L.Callback, after: int = 3, **options: Any) -> str:
    with pytest.raises(NotLearning) as error:
        fit(made, folder, *callbacks, ProveLearning(after), **options)
    assert error.value.exit_code == 3 and "callbacks.prove_after_n_steps=null" in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ planted faults


def test_a_frozen_factor_is_named(over: Callable[..., FinetuneModule], tmp_path: Path) -> None:
    for factor in ("lora_A", "lora_B"):
        made = over()
        getattr(made.model.get_submodule(LAYER), factor).weight.requires_grad_(False)
        said = alarm(made, tmp_path)
        assert said.startswith(f"after 3 steps: {LAYER}.{factor}.weight is not trained: something has set its requires")
        assert said.count(LAYER) == 1


def test_a_layer_that_is_cut_off_is_named(over: Callable[..., FinetuneModule], tmp_path: Path) -> None:
    made = over(fused="off")
    layer = made.model.get_submodule(LAYER)
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    made.model.get_submodule(LAYER.replace("up", "gate")).requires_grad_(True)  # another way for the gradient
    said = alarm(made, tmp_path)
    assert f"no gradient has come to {LAYER}: no row of the data reaches it" in said and "target_modules" in said
    assert "has not moved" not in said


def test_layers_are_listed_up_to_five(over: Callable[..., FinetuneModule], tmp_path: Path) -> None:
    made = over(optimizer_args={"lr": 1e-300})
    said = alarm(made, tmp_path)
    assert "and 9 more has not moved from where it began: the optimizer does not have it, or optimizer.lr" in said
    assert said.count("model.layers.0.") == 5 and "model.layers.1." not in said and "no gradient" not in said


def test_a_layer_that_the_optimizer_does_not_have_is_named(over: Callable[..., FinetuneModule], tmp_path: Path) -> None:
    made = over(modules_to_save=["model.norm"])
    lost = {id(p) for name in (LAYER, "model.norm") for p in made.model.get_submodule(name).parameters()}
    real = made._make_optimizer
    made._make_optimizer = lambda parameters: real([p for p in parameters if id(p) not in lost])  # type: ignore
    assert f": {LAYER}, model.norm has not moved from where it began" in alarm(made, tmp_path)


def flip_a_bit(tensor: torch.Tensor) -> None:
    data = tensor.data.view(torch.uint8).view(-1)
    data[len(data) // 3] ^= 1


def swap_words(tensor: torch.Tensor) -> None:
    """Two numbers that differ change places, so that their sum stays."""
    data = tensor.data.view(-1)
    other = int((data != data[0]).nonzero()[0])
    data[0], data[other] = data[other].clone(), data[0].clone()


CHANGES: dict[str, tuple[Any, Callable[[Any], object], str]] = {
    "a bit of a weight": (None, lambda layer: flip_a_bit(layer.weight), "weight"),
    "two words of a weight": (None, lambda layer: swap_words(layer.weight), "weight"),
    "a bit of an nf4 weight": ("nf4", lambda layer: flip_a_bit(layer.weight), "weight"),
    "two bytes of an nf4 weight": ("nf4", lambda layer: swap_words(layer.weight), "weight"),
    "a scale of nf4": ("nf4", lambda layer: flip_a_bit(layer.weight.quant_state.absmax), "scales"),
    "two scales of nf4": ("nf4", lambda layer: swap_words(layer.weight.quant_state.absmax), "scales"),
    "a scale of scales": ("nf4", lambda layer: flip_a_bit(layer.weight.quant_state.state2.absmax), "scales"),
    "the code book": ("nf4", lambda layer: flip_a_bit(layer.weight.quant_state.code), "scales"),
    "the offset": ("nf4", lambda layer: layer.weight.quant_state.offset.add_(1e-3), "scales"),
    "a scale of int8": ("int8", lambda layer: flip_a_bit(layer.state.SCB), "scales"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_frozen_base_is_named(change: str, over: Callable[..., FinetuneModule], tmp_path: Path) -> None:
    quant, act, part = CHANGES[change]
    for step, after in ((2, 3), (3, 2)):  # before the proof, and between it and the end
        made = over(quant)
        strike = after_step(step, lambda model: act(model.get_submodule(LAYER).base_layer))
        said = alarm(made, tmp_path, strike, after=after)
        taken = 3 if after == 3 else 4
        assert said.startswith(f"after {taken} steps: the frozen base has changed in {LAYER}.{part}: what was trained")


def test_a_change_of_what_is_not_adapted_is_named(over: Callable[..., FinetuneModule], tmp_path: Path) -> None:
    made = over(modules_to_save=["lm_head"], bias="none")
    said = alarm(made, tmp_path, after_step(1, lambda model: flip_a_bit(model.model.norm.weight)))
    assert "has changed in model.norm.weight:" in said
    made = over(modules_to_save=["lm_head"])
    said = alarm(made, tmp_path, after_step(1, lambda model: flip_a_bit(model.lm_head.base_layer.weight)))
    assert "has changed in lm_head.weight:" in said


# ------------------------------------------------------------------------------------------------ the checksum


@pytest.mark.parametrize("count", [0, 1, 7, 4 * _ROW, 4 * _ROW - 1, 3 * 4 * _ROW + 9, 40 * 4 * _ROW + 2])
def test_the_checksum_is_of_the_content_and_of_nothing_else(count: int) -> None:
    tensor = torch.randn(count).to(torch.bfloat16)
    for kind in (tensor, tensor.clone(), torch.cat((tensor[:0].new_ones(3), tensor))[3:], torch.nn.Parameter(tensor)):
        assert checksums([("a", kind)]) == checksums([("a", tensor)])
    strided = torch.stack((tensor, tensor), dim=1)[:, 0]
    assert checksums([("a", strided)]) == checksums([("a", tensor)])


def test_every_changed_bit_and_every_swapped_pair_changes_the_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of rows and columns; a chunk is two rows."""
    monkeypatch.setattr("lorafit.callbacks.proof._ROW", 4)
    monkeypatch.setattr("lorafit.callbacks.proof._CHUNK", 2 * 4 * 8)
    tensor = torch.arange(1, 4 * 7 * 4 + 3).to(torch.int16)  # seven rows of four words of four numbers, and two more
    seen = set()
    count = len(tensor)
    for place in range(count):
        for bit in (0, 7, 15):
            changed = tensor.clone()
            changed[place] ^= (1 << bit) if bit < 15 else -(1 << 15)
            seen.add(checksums([("a", changed)])["a"])
    for one in range(count):
        for other in range(one):
            changed = tensor.clone()
            changed[one], changed[other] = tensor[other], tensor[one]
            seen.add(checksums([("a", changed)])["a"])
    assert len(seen) > 5000 and checksums([("a", tensor)])["a"] not in seen


def test_tensors_of_one_name_are_told_apart() -> None:
    one, other = torch.zeros(3), torch.ones(3)
    assert checksums([("a", one), ("a", other)]) != checksums([("a", other), ("a", one)])


# ------------------------------------------------------------------------------------------------ healthy runs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quant": "nf4"},
        {"quant": "int8"},
        {"dtype": "bfloat16"},
        {"fused": "off"},
        {"checkpointing": "full"},
        {"checkpointing": "selective"},
        {"checkpointing": "selective", "quant": "nf4"},
        {"adapter_dtype": "int8"},
        {"adapter_dtype": "nf4", "dropout": 0.1},
        {"modules_to_save": ["lm_head", "model.norm"], "quant": "nf4"},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens"], "adapter_dtype": "int8"},
        {"target_modules": ["lm_head", "down_proj"]},
        {"optimizer": "bitsandbytes.optim.AdamW8bit", "rank": 64},
        {"optimizer": "torch.optim.SGD", "optimizer_args": {"lr": 1e-9}},
    ],
    ids=str,
)
def test_a_healthy_run_raises_no_alarm(
    options: dict[str, Any], over: Callable[..., FinetuneModule], tmp_path: Path
) -> None:
    proof = ProveLearning(3)
    fit(over(**options), tmp_path, proof, max_steps=4)
    assert proof.proven and proof.taken == 4
    assert proof._frozen and len(proof._whole) == len(options.get("modules_to_save", []))


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["embed_tokens", "v_proj"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_head_that_is_tied_raises_no_alarm(options: dict[str, Any], tmp_path: Path) -> None:
    made, proof = module(**options), ProveLearning(2)
    assert made._source[0].lm_head.weight is made._source[0].model.embed_tokens.weight
    fit(made, tmp_path, proof)
    assert proof.proven


def test_a_layer_of_two_names_raises_no_alarm_and_is_named_once(tmp_path: Path) -> None:
    def shared(**options: Any) -> FinetuneModule:
        made = module(target_modules=["k_proj", "v_proj"], **options)
        attention = made._source[0].model.layers[0].self_attn
        attention.k_proj = attention.v_proj
        return made

    proof = ProveLearning(2)
    fit(shared(), tmp_path, proof)
    assert proof.proven
    said = alarm(shared(optimizer_args={"lr": 1e-300}), tmp_path)
    assert "k_proj has not moved" in said and "v_proj" not in said


def biased(**options: Any) -> FinetuneModule:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        use_cache=False,
        attention_bias=True,
        mlp_bias=True,
    )
    return FinetuneModule(LlamaForCausalLM(config), rank=4, alpha=8, optimizer_args={"lr": 1e-2}, **options)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_raise_no_alarm(bias: str, tmp_path: Path) -> None:
    made, proof = biased(bias=bias), ProveLearning(3)
    fit(made, tmp_path, proof)
    assert proof.proven and not any(name.endswith("bias") for name in proof._frozen)


def test_packed_batches_raise_no_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.data.loader.collate", lambda rows, *_: collate_packed([rows], 0))
    made, proof = module(), ProveLearning(2)
    fit(made, tmp_path, proof)
    assert proof.proven


# ------------------------------------------------------------------------------------------------ when


@pytest.mark.parametrize(("steps", "proven"), [(1, False), (2, True), (3, True)])
def test_a_run_that_is_shorter_is_looked_at_at_its_end(steps: int, proven: bool, tmp_path: Path) -> None:
    proof = ProveLearning(10)
    fit(module(), tmp_path, proof, max_steps=steps)
    assert (proof.proven, proof.taken) == (proven, steps)
    if proven:
        said = alarm(module(optimizer_args={"lr": 1e-300}), tmp_path, after=10, max_steps=steps)
        assert said.startswith(f"after {steps} steps: ")


@pytest.mark.parametrize("changes", ["a layer does not move", "the base changes"])
def test_a_run_that_fails_its_last_proof_has_no_checkpoint_with_which_it_would_be_complete(
    changes: str, tmp_path: Path
) -> None:
    options = {"optimizer_args": {"lr": 1e-300}} if changes == "a layer does not move" else {}
    planted = after_step(4, lambda model: flip_a_bit(model.model.norm.weight))
    planted = Each() if options else planted
    checkpoints = Checkpoints(tmp_path, every_n_steps=1)
    alarm_of = {"max_steps": 4, "val_check_interval": 4}
    with pytest.raises(NotLearning):
        fit(module(**options), tmp_path, planted, ProveLearning(10), checkpoints, **alarm_of)
    assert load_checkpoint(checkpoints.last)["global_step"] == 3


def test_micro_batches_and_skipped_steps_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof, looked = ProveLearning(3), []
    real = proof.prove
    monkeypatch.setattr(proof, "prove", lambda trainer, made: (looked.append(trainer.global_step), real(trainer, made)))
    bad_losses(monkeypatch, 1, 5, 6)  # of the first and the third step
    fit(module(), tmp_path, SkipNonFinite(9), proof, accumulate_grad_batches=2, max_steps=6)
    assert looked == [5, 6] and proof.taken == 4 and proof.proven


def test_what_was_proven_stays_proven_in_a_resumed_run(tmp_path: Path) -> None:
    options = {"optimizer_args": {"lr": 1e-300}}
    fit(module(), tmp_path, ProveLearning(2), Checkpoints(tmp_path), max_steps=3)
    proof = ProveLearning(2)
    fit(module(**options), tmp_path, proof, Checkpoints(tmp_path / "b"), resume=tmp_path / "last.ckpt", max_steps=6)
    assert proof.proven and proof.taken == 6
    said = alarm(  # but the base is looked at
        module(),
        tmp_path,
        Checkpoints(tmp_path / "c"),
        after_step(5, lambda model: flip_a_bit(model.model.norm.weight)),
        resume=tmp_path / "last.ckpt",
        max_steps=6,
    )
    assert said.startswith("after 6 steps: the frozen base has changed in model.norm.weight")


def test_after_a_change_of_the_base_it_is_known_until_when_it_was_what_it_is(tmp_path: Path) -> None:
    flip = after_step(4, lambda model: flip_a_bit(model.model.norm.weight))
    for proof, sound in ((ProveLearning(3), 3), (ProveLearning(5), 0)):
        with pytest.raises(NotLearning) as error:
            fit(module(), tmp_path, proof, flip, max_steps=6)
        assert error.value.sound == sound
    with pytest.raises(NotLearning) as error:
        fit(module(optimizer_args={"lr": 1e-300}), tmp_path, ProveLearning(3), max_steps=6)
    assert error.value.sound is None


def test_a_run_that_is_resumed_before_its_proof_raises_no_alarm_for_what_moved_before(tmp_path: Path) -> None:
    """It goes on with a learning rate with which nothing moves any more."""
    options = {"modules_to_save": ["model.norm", "lm_head"], "target_modules": ["q_proj"]}
    first = ProveLearning(6)
    fit(module(**options), tmp_path, first, Checkpoints(tmp_path), max_steps=1)
    assert not first.proven
    state = load_checkpoint(tmp_path / "last.ckpt")["callbacks"]["ProveLearning"]
    assert state["taken"] == 1 and not state["proven"] and state["whole"] == first._whole
    still = options | {"optimizer_args": {"lr": 1e-300}}
    second = ProveLearning(3)
    made = module(**still)
    fit(made, tmp_path, second, Checkpoints(tmp_path / "b"), resume=tmp_path / "last.ckpt", max_steps=4)
    assert second.proven and second.taken == 4 and second._whole == first._whole
    said = alarm(module(**still), tmp_path)  # which a run that begins so does
    assert "self_attn.q_proj, model.norm, lm_head has not moved" in said


def test_the_gradients_of_a_run_that_is_resumed_before_its_proof_count(tmp_path: Path) -> None:
    first = ProveLearning(4)
    fit(module(), tmp_path, first, Checkpoints(tmp_path), max_steps=2)
    second = ProveLearning(4)
    made = module(fused="off")
    made.configure_model()
    for parameter in made.trainable_parameters():
        parameter.register_hook(lambda gradient: gradient * 0)
    fit(made, tmp_path, second, Checkpoints(tmp_path / "b"), resume=tmp_path / "last.ckpt", max_steps=4)
    assert second.proven


def test_an_alarm_of_one_process_is_one_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is any process's; what the others say stays theirs."""
    asked = []

    def decide(self: Any, decision: bool, all: bool = True) -> bool:
        asked.append((decision, all))
        return True

    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", decide)
    assert "after 3 steps: another process has found what it says" in alarm(module(), tmp_path)
    assert "has not moved" in alarm(module(optimizer_args={"lr": 1e-300}), tmp_path)
    assert asked == [(False, False), (True, False)]


def test_small_gradients_are_gradients(tmp_path: Path) -> None:
    """Their squares are zero in float32."""
    made = module()
    made.configure_model()
    for parameter in made.trainable_parameters():
        parameter.register_hook(lambda gradient: gradient * 1e-30)
    proof = ProveLearning(2)
    fit(made, tmp_path, proof)
    assert proof.proven


def test_proving_changes_nothing_of_the_run(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [ProveLearning(2)]):
        torch.manual_seed(1)
        made = module(dropout=0.3)
        fit(made, tmp_path, *callbacks)
        states.append(made.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

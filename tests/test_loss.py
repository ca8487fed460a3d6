"""The loss: it is the model's own, as a sum over the supervised tokens, and it makes no difference that it is made in
chunks; the head does no other work.

pytest tests/test_loss.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from lorafit.data import IGNORE, collate, collate_packed
from lorafit.data.loader import collate_rows
from lorafit.data.packing import best_fit
from lorafit.errors import InputError
from lorafit.inject import adapters_off, inject_lora, lora_layers, mark_only_lora_as_trainable
from lorafit.lora import LoRALinear, TrainedCopy
from lorafit.loss import (
    AfterHead,
    after_head,
    chunk_rows,
    head_sees,
    linear_cross_entropy,
    supervised_logits,
    supervised_loss,
)
from lorafit.quant import BaseReport, Quantization, is_quantized, quantize_model

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {
    "llama": LlamaConfig(**WIDE),
    # a cap that these logits feel: without it the loss is another one
    "gemma2": Gemma2Config(**WIDE, final_logit_softcapping=0.5, attn_implementation="eager"),
    "gpt2": GPT2Config(**SIZES, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    model.config.use_cache = False
    inject_lora(model, rank=4, alpha=8)
    mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then A would have no gradient
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(*, masked: bool = False) -> dict[str, Tensor]:
    """Two rows, the first padded by three; their prompts of 4 and 6 tokens are not trained."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (2, 12), generator=generator)
    attention = torch.ones_like(ids)
    labels = ids.clone()
    labels[0, :4] = labels[1, :6] = labels[0, 9:] = -100
    attention[0, 9:] = 0
    if masked:
        labels[:] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def test_it_is_the_models_own_loss_times_the_number_of_tokens(model: PreTrainedModel) -> None:
    loss, count = supervised_loss(model, batch())
    own = model(**batch()).loss
    assert count == 5 + 6
    torch.testing.assert_close(loss, own * count, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, loss), gradients(model, own * count)
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


def test_it_is_the_cross_entropy_of_the_full_logits(model: PreTrainedModel) -> None:
    inputs = batch()
    full = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    reference = torch.zeros(())
    for row in range(2):
        for place in range(11):
            if (target := inputs["labels"][row, place + 1]) != -100:
                reference = reference - F.log_softmax(full[row, place].float(), dim=-1)[target]
    loss, _ = supervised_loss(model, inputs)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, loss), gradients(model, reference)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


def test_the_head_sees_the_supervised_rows_alone_and_all_rows_again_afterwards(model: PreTrainedModel) -> None:
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape, output.shape)))
    logits, targets = supervised_logits(model, batch())
    model(batch()["input_ids"])
    handle.remove()
    assert seen == [((1, 11, 64), (1, 11, 97)), ((2, 12, 64), (2, 12, 97))]
    assert logits.shape == (11, 97)
    assert torch.equal(targets, torch.cat([batch()["labels"][0, 4:9], batch()["labels"][1, 6:]]))


def test_without_a_supervised_token_the_loss_and_its_gradient_are_zero(model: PreTrainedModel) -> None:
    loss, count = supervised_loss(model, batch(masked=True))
    assert (loss.item(), count.item()) == (0.0, 0)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_label_of_the_first_token_counts_for_nothing(model: PreTrainedModel) -> None:
    inputs = batch(masked=True)
    inputs["labels"][:, 0] = 5  # there is no place before it to predict it from
    assert supervised_loss(model, inputs)[1] == 0


def test_the_sum_is_float32_whatever_the_model_computes_in(model: PreTrainedModel) -> None:
    exact, _ = supervised_loss(model, batch())
    rounded, _ = supervised_loss(model.bfloat16(), batch())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)


def test_the_soft_cap_of_the_model_is_kept() -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gemma2"])
    nn.init.normal_(model.get_output_embeddings().weight)
    logits, _ = supervised_logits(model, batch())
    assert 0.45 < logits.abs().max() <= 0.5


def test_the_hook_is_gone_even_after_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(ZeroDivisionError), head_sees(model, torch.ones(2, 12, dtype=torch.bool)):
        raise ZeroDivisionError
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_without_an_output_head_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no output head"):
        supervised_loss(nn.Linear(2, 2), batch())


# --- head and loss, chunk by chunk ----------------------------------------------------------------

ROWS, WIDTH, VOCABULARY = 37, 64, 101


def hidden_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    return hidden.requires_grad_(), torch.randint(0, VOCABULARY, (ROWS,), generator=generator)


def linear(*, bias: bool = False) -> nn.Linear:
    torch.manual_seed(4)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(False)


def quantized(kind: str) -> nn.Module:
    holder = nn.ModuleDict({"head": linear()})
    # products in float32: what is compared is the order of work, and not the rounding of bfloat16
    quantize_model(
        holder, Quantization.of({"type": kind, "compute_dtype": "float32"}), torch.device("cpu"), BaseReport("", None)
    )
    assert is_quantized(holder["head"])
    return holder["head"]


def adapted(base: nn.Module, **options: Any) -> LoRALinear:
    layer = LoRALinear(base, rank=4, alpha=8, **options)
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    return layer


HEADS = {
    "plain": linear,
    "with a bias": lambda: linear(bias=True),
    "trained itself": lambda: linear(bias=True).requires_grad_(True),
    "nf4": lambda: quantized("nf4"),
    "int8": lambda: quantized("int8"),
    "adapted": lambda: adapted(linear(bias=True)),
    "adapted nf4": lambda: adapted(quantized("nf4")),
    "adapter rounded to int8": lambda: adapted(linear(), adapter_dtype="int8"),
    "a trained copy": lambda: TrainedCopy(linear(bias=True)),
    "one that reads its logits again": lambda: nn.Sequential(linear(bias=True), nn.Tanh()),
    "Conv1D": lambda: Conv1D(VOCABULARY, WIDTH).requires_grad_(False),
}


def full_logits_loss(hidden: Tensor, head: nn.Module, targets: Tensor, change: AfterHead | None = None) -> Tensor:
    """What is to be reproduced: all logits at once, and PyTorch's own gradient."""
    logits = head(hidden)
    return F.cross_entropy((change(logits) if change else logits).float(), targets, reduction="sum")


def wanted(hidden: Tensor, head: nn.Module) -> list[Tensor]:
    return [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("rows", [1, 5, ROWS, 1000, None])
@pytest.mark.parametrize("kind", HEADS)
def test_any_head_in_chunks_has_the_loss_and_the_gradients_of_all_logits_at_once(kind: str, rows: int | None) -> None:
    (hidden, targets), head = hidden_and_targets(), HEADS[kind]()
    reference = full_logits_loss(hidden, head, targets)
    loss = linear_cross_entropy(hidden, head, targets, rows=rows)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    # the factor shows that the backward pass multiplies by what comes in
    ours, theirs = (torch.autograd.grad(1.5 * value, wanted(hidden, head)) for value in (loss, reference))
    for gradient, exact in zip(ours, theirs, strict=True):
        # int8: bitsandbytes rounds its activations to float16, with other rows in other places of the last bit
        tolerance = 2e-3 if kind == "int8" else 1e-5
        assert exact.norm() > 0
        assert (gradient - exact).norm() <= tolerance * exact.norm()
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, head, targets, rows=rows)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, reference.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "change", [AfterHead("cap", 0.7), AfterHead("times", 3.0), AfterHead("over", 3.0), AfterHead("cap", 0.7, True)]
)
@pytest.mark.parametrize("kind", ["plain", "adapted nf4"])
def test_what_comes_after_the_head_is_part_of_loss_and_gradient(kind: str, change: AfterHead) -> None:
    (hidden, targets), head = hidden_and_targets(), HEADS[kind]()
    reference = full_logits_loss(hidden, head, targets, change)
    assert abs(reference - full_logits_loss(hidden, head, targets)) > 1e-2 * reference
    loss = linear_cross_entropy(hidden, head, targets, change, rows=8)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, wanted(hidden, head)) for x in (loss, reference)), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("change", [None, AfterHead("cap", 0.7)])
@pytest.mark.parametrize("trained", [False, True])
def test_its_gradient_is_the_slope_of_its_loss_in_float64(trained: bool, change: AfterHead | None) -> None:
    torch.manual_seed(5)
    head, hidden = nn.Linear(6, 11).double().requires_grad_(trained), torch.randn(5, 6, dtype=torch.float64)
    targets = torch.randint(0, 11, (5,))
    assert torch.autograd.gradcheck(
        lambda x, *_: linear_cross_entropy(x, head, targets, change, rows=2),
        (hidden.requires_grad_(), *(head.parameters() if trained else ())),
    )


def test_a_target_of_no_probability_has_a_finite_loss_and_its_gradient() -> None:
    head = nn.Linear(2, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[500.0, 0.0], [0.0, 0.0]]))
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)  # logits 500 and 0: exp(-500) is 0 in float32
    loss = linear_cross_entropy(hidden, head, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 500.0
    assert hidden.grad is not None and hidden.grad.tolist() == [[500.0, 0.0]]  # (1, -1) through the weight


def test_gradients_of_a_head_over_bfloat16_are_summed_in_float32() -> None:
    """Summed in bfloat16, 256 contributions of one size stop at 256 times 2^-8 of what is there."""
    head = nn.Linear(1, 2, bias=False).bfloat16()
    nn.init.zeros_(head.weight)
    rows = 1024
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    linear_cross_entropy(hidden, head, torch.zeros(rows, dtype=torch.long), rows=1).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.flatten().tolist() == [-rows / 2, rows / 2]


def test_dropout_in_an_adapted_head_has_one_mask_for_loss_and_gradient() -> None:
    (hidden, targets), head = hidden_and_targets(), adapted(linear(), dropout=0.5).train()
    torch.manual_seed(6)
    loss = linear_cross_entropy(hidden, head, targets, rows=ROWS)
    torch.manual_seed(6)
    reference = full_logits_loss(hidden, head, targets)
    torch.testing.assert_close(loss, reference)
    for ours, theirs in zip(*(torch.autograd.grad(x, wanted(hidden, head)) for x in (loss, reference)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_row_at_all_gives_zeros() -> None:
    for kind in ("plain", "adapted"):
        (hidden, targets), head = hidden_and_targets(), HEADS[kind]()
        loss = linear_cross_entropy(hidden[:0], head, targets[:0])
        loss.backward()
        assert loss == 0
        assert all(x.grad is not None and not x.grad.any() for x in wanted(hidden, head))


def test_a_chunk_is_smaller_the_larger_the_vocabulary() -> None:
    cpu = torch.device("cpu")
    assert [chunk_rows(size, cpu) for size in (97, 8192, 32_000, 49_152, 256_000)] == [1024, 1024, 256, 128, 128]
    assert chunk_rows(32_000, torch.device("cuda")) == 1024


def test_bfloat16_costs_no_more_than_with_all_logits_at_once() -> None:
    """Against float32 on the same bfloat16 numbers; 1.1 is the promise."""
    torch.manual_seed(7)
    head = nn.Linear(64, 3000, bias=False).bfloat16().requires_grad_(False)
    nn.init.normal_(head.weight, std=0.1)
    hidden, targets = torch.randn(300, 64, dtype=torch.bfloat16), torch.randint(0, 3000, (300,))

    def gradient(compute: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        x = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad(compute(x, copy.deepcopy(head).to(dtype), targets), x)[0].float()

    exact = gradient(full_logits_loss, torch.float32)
    ours = (gradient(linear_cross_entropy, torch.bfloat16) - exact).norm()
    theirs = (gradient(full_logits_loss, torch.bfloat16) - exact).norm()
    assert 0 < ours <= 1.1 * theirs < 0.01 * exact.norm()


# --- what a model does after its head -------------------------------------------------------------

TIED = WIDE | {"tie_word_embeddings": True}
AFTER = {
    "tied": (LlamaConfig(**TIED), AfterHead()),
    "gemma2": (CONFIGS["gemma2"], AfterHead("cap", 0.5)),
    "gemma3": (Gemma3TextConfig(**WIDE, final_logit_softcapping=0.7), AfterHead("cap", 0.7)),
    "granite": (GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=0.3), AfterHead("over", 0.3)),
    "cohere": (CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=2.5), AfterHead("times", 2.5)),
}


def made_of(config: PreTrainedConfig, adapt_head: bool = False) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    inject_lora(model, rank=4, alpha=8, target_modules=["q_proj", "lm_head"] if adapt_head else "all_linear")
    mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def agrees_with_all_logits_at_once(model: PreTrainedModel) -> None:
    loss, count = supervised_loss(model, batch())
    own = model(**batch()).loss * count
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-5)
    theirs = gradients(model, own)
    for name, gradient in gradients(model, loss).items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


@pytest.mark.parametrize("adapt_head", [False, True])
@pytest.mark.parametrize("name", AFTER)
def test_what_a_model_does_after_its_head_is_found_and_done(name: str, adapt_head: bool) -> None:
    config, expected = AFTER[name]
    model = made_of(config, adapt_head)
    # twice: found out in one pass, known in the next
    for _ in range(2):
        agrees_with_all_logits_at_once(model)
        assert after_head(model) == expected


def test_it_is_found_in_bfloat16_and_in_float32_alike() -> None:
    for name, (config, expected) in AFTER.items():
        model = made_of(config).bfloat16()
        supervised_loss(model, batch())
        assert after_head(model) == expected, name


class Shifted(LlamaForCausalLM):
    """A model that does something of its own to its logits."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        output = super().forward(*inputs, **{key: value for key, value in named.items() if key != "labels"})
        output.logits = output.logits + torch.linspace(-1, 1, output.logits.shape[-1])
        if named.get("labels") is not None:
            output.loss = self.loss_function(output.logits, named["labels"], vocab_size=97)
        return output


def test_a_model_that_does_something_else_computes_its_own_logits() -> None:
    torch.manual_seed(0)
    model = Shifted(CONFIGS["llama"])
    for _ in range(2):
        agrees_with_all_logits_at_once(model)
        assert after_head(model) is None


class CappedInFloat32(LlamaForCausalLM):
    def forward(self, *inputs: Any, **named: Any) -> Any:
        named.pop("labels", None)
        output = super().forward(*inputs, **named)
        cap = self.config.own_cap
        output.logits = torch.tanh(output.logits.float() / cap) * cap
        return output


def test_a_cap_in_float32_over_bfloat16_logits_is_told_from_one_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, inputs = CappedInFloat32(LlamaConfig(**WIDE, own_cap=0.7)).bfloat16(), batch()
    nn.init.normal_(model.lm_head.weight, std=0.3)
    logits, targets = supervised_logits(model, inputs)
    reference = F.cross_entropy(logits, targets, reduction="sum")
    loss, _ = supervised_loss(model, inputs)
    assert after_head(model) == AfterHead("cap", 0.7, upcast=True)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)  # rounded to bfloat16 it would differ


class Unheard(LlamaForCausalLM):
    """A model that reads its head's weight and never calls it."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        named.pop("labels", None)
        output = super().forward(*inputs, **named, logits_to_keep=1)
        hidden = self.model(*inputs, **named).last_hidden_state
        output.logits = F.linear(hidden, self.lm_head.weight)
        return output


class Flat(LlamaForCausalLM):
    """A model that gives its head all places in one row."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        hidden = self.model(*inputs, **named).last_hidden_state
        logits = self.lm_head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        return CausalLMOutputWithPast(logits=logits)


class Twice(LlamaForCausalLM):
    """A model that asks its head twice."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        named.pop("labels", None)
        hidden = self.model(*inputs, **named).last_hidden_state
        return CausalLMOutputWithPast(logits=(self.lm_head(hidden) + self.lm_head(hidden.tanh())) / 2)


def test_a_model_that_asks_its_head_twice_computes_its_own_logits() -> None:
    torch.manual_seed(0)
    model, inputs = Twice(CONFIGS["llama"]), batch()
    full = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    reference = F.cross_entropy(full[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")
    for _ in range(2):
        torch.testing.assert_close(supervised_loss(model, inputs)[0], reference)


@pytest.mark.parametrize("kind", [Unheard, Flat])
def test_a_head_that_is_called_in_another_way_has_its_rows_taken_afterwards(kind: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    model, usual = kind(CONFIGS["llama"]), LlamaForCausalLM(CONFIGS["llama"])
    usual.load_state_dict(model.state_dict())
    for _ in range(2):
        torch.testing.assert_close(supervised_loss(model, batch()), supervised_loss(usual, batch()))
    torch.testing.assert_close(supervised_logits(model, batch()), supervised_logits(usual, batch()))


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Shifted])
def test_finding_out_draws_no_random_number(kind: type[LlamaForCausalLM]) -> None:
    """A run that goes on after a kill finds out anew, and has to draw what the first one drew."""
    torch.manual_seed(0)
    model = kind(LlamaConfig(**WIDE, attention_dropout=0.3, attn_implementation="eager")).train()
    inject_lora(model, rank=4, alpha=8, dropout=0.5, target_modules=["q_proj", "lm_head"])
    mark_only_lora_as_trainable(model)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    found = []
    for _ in range(2):
        torch.manual_seed(8)
        found.append((supervised_loss(model, batch())[0].item(), torch.get_rng_state()))
    torch.manual_seed(9)
    assert supervised_loss(model, batch())[0].item() != found[0][0]
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_an_adapter_over_the_head_may_come_and_go() -> None:
    model = made_of(AFTER["cohere"][0], adapt_head=True)
    agrees_with_all_logits_at_once(model)
    with adapters_off(model), torch.no_grad():
        off, count = supervised_loss(model, batch())
        torch.testing.assert_close(off, model(**batch()).loss * count, rtol=1e-5, atol=1e-5)
    agrees_with_all_logits_at_once(model)


def test_the_head_is_itself_again_even_after_an_error(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            supervised_loss(model, batch())
    assert "forward" not in vars(head)
    handle.remove()
    assert model(batch()["input_ids"]).logits.shape == (2, 12, 97)


def test_what_somebody_put_in_place_of_the_heads_forward_is_used_and_stays() -> None:
    """As libraries do that move a layer's weights to where they are needed."""
    model = made_of(AFTER["tied"][0])
    head = model.get_output_embeddings()
    usual, plain = head.forward, supervised_loss(model, batch())[0]
    head.forward = other = lambda x: 3 * usual(x)
    agrees_with_all_logits_at_once(model)
    assert head.forward is other
    assert supervised_loss(model, batch())[0] > 1.1 * plain


def test_whoever_watches_the_head_sees_every_row_once() -> None:
    model = made_of(AFTER["tied"][0])
    supervised_loss(model, batch())
    seen: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1]))
    loss, _ = supervised_loss(model, batch())
    handle.remove()
    assert sum(seen) == 11
    torch.testing.assert_close(loss, supervised_loss(model, batch())[0])


# --- packed and unpacked --------------------------------------------------------------------------

# with the cache on, as models come: it is what makes packed examples see each other
PACKABLE = {
    "llama": LlamaConfig(**WIDE),
    "mistral": MistralConfig(**WIDE, sliding_window=5),
    "qwen3": Qwen3Config(**WIDE),
    "phi3": Phi3Config(**{key: value for key, value in WIDE.items() if key != "head_dim"}, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=128),
    "gpt2": GPT2Config(**SIZES, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}


def examples(train_on: str) -> list[dict[str, list[int]]]:
    """Of 1 to 13 tokens. Under "all" every token is trained, the first of an example too, which nothing predicts."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for index, length in enumerate((13, 4, 7, 1, 9, 3, 11, 2, 6)):
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        masked = 0 if train_on == "all" else index % 3 + 1
        made.append({"input_ids": ids, "labels": [IGNORE] * min(masked, length) + ids[masked:]})
    return made


@pytest.mark.parametrize("train_on", ["completion", "all"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKABLE)
def test_packed_examples_give_the_gradient_of_the_same_examples_unpacked(
    name: str, attention: str, train_on: str
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PACKABLE[name], attn_implementation=attention).train()
    assert model.config.use_cache
    inject_lora(model, rank=4, alpha=8)
    mark_only_lora_as_trainable(model)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    made = examples(train_on)
    reference, tokens = supervised_loss(model, collate(made, 0))
    exact = gradients(model, reference)
    rows = [[made[index] for index in row] for row in best_fit(np.array([len(e["input_ids"]) for e in made]), 17)]
    assert 1 < len(rows) < len(made) and len({sum(len(e["input_ids"]) for e in row) for row in rows}) > 1  # with filler
    for batch in (collate_packed(rows, 0), collate_rows(rows, 0, packed=False, padding_free=True)):
        loss, count = supervised_loss(model, batch)
        assert count == tokens == sum(label != IGNORE for example in made for label in example["labels"][1:])
        assert abs(loss - reference) <= 1e-5 * reference
        for parameter_name, gradient in gradients(model, loss).items():
            difference = (gradient - exact[parameter_name]).norm()
            assert exact[parameter_name].norm() > 0
            assert difference <= 1e-5 * exact[parameter_name].norm(), parameter_name


def test_with_the_cache_or_without_position_ids_packed_examples_would_give_another_gradient() -> None:
    """The comparison above would not hold for packing that parts nothing."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PACKABLE["llama"])
    packed, exact = collate_packed([examples("all")], 0), collate(examples("all"), 0)
    one_text = {key: value for key, value in packed.items() if key != "position_ids"}
    inputs = {key: packed[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        cached, alone = (model(**inputs, use_cache=use_cache).logits for use_cache in (True, False))
    assert (cached - alone).norm() > 1e-2 * alone.norm()
    reference = supervised_loss(model, exact)[0]
    assert abs(supervised_loss(model, one_text)[0] - reference) > 1e-4 * reference

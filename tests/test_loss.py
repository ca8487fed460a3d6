"""The loss: it is the model's own, as a sum over the supervised tokens, and the head does no other work.

pytest tests/test_loss.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from lorafit.data import IGNORE, collate, collate_packed
from lorafit.data.loader import collate_rows
from lorafit.data.packing import best_fit
from lorafit.errors import InputError
from lorafit.inject import inject_lora, mark_only_lora_as_trainable
from lorafit.loss import head_sees, supervised_logits, supervised_loss

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

"""Held-out numbers: right, and without a trace in the model.

pytest tests/test_evaluation.py
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorafit.data import Encoder, Example, ResumableLoader, load_tokenizer
from lorafit.errors import InputError
from lorafit.evaluation import evaluate_loss, evaluating, exact_match, generate, perplexity
from lorafit.inject import adapters_off, inject_lora, lora_layers
from lorafit.loading import load_base_model
from lorafit.retention import measure_retention


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def adapted(quant: str | None = None, strength: float = 0.02, dropout: float = 0.5):
    """The embedded model with an adapter that does something."""
    model = load_base_model("embedded", quant=quant, device="cpu")
    torch.manual_seed(0)
    inject_lora(model, rank=4, alpha=8, dropout=dropout)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=strength)
    return model


@pytest.fixture(scope="module")
def model():
    return adapted()


@pytest.fixture(scope="module")
def sequences(tokenizer):
    rows = [Example.of(f"What is {word}?", word * (1 + i)) for i, word in enumerate(["a cat ", "a dog ", "tin "])]
    return [Encoder(tokenizer).encode(row).sequence() for row in rows * 3]


def test_every_token_weighs_the_same_however_the_rows_are_batched(model, sequences) -> None:
    losses = [evaluate_loss(model, ResumableLoader(sequences, size, pad_id=2)) for size in (1, 2, 9)]
    total, count = 0.0, 0
    with evaluating(model):
        for sequence in sequences:
            logits = model(torch.tensor(sequence["input_ids"]).unsqueeze(0)).logits[0, :-1].float()
            labels = torch.tensor(sequence["labels"][1:])
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    for result in losses:
        assert result["tokens"] == count
        assert result["loss"] == pytest.approx(total / count, rel=5e-3)  # bfloat16, in other shapes
        assert result["perplexity"] == math.exp(result["loss"])


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_measuring_leaves_no_trace_in_the_model_or_the_generator(sequences, quant) -> None:
    model = adapted(quant)
    batches = ResumableLoader(sequences, 4, pad_id=2)
    model.model.layers[0].eval()  # a mode that was chosen by hand
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    drawn = torch.get_rng_state()

    first = evaluate_loss(model, batches)
    generate(model, [[5, 6], [7]], max_new_tokens=3, end_ids=[1], pad_id=2)
    measure_retention(model, [list(range(20, 60))], window=16)

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.is_grad_enabled()
    assert evaluate_loss(model, batches) == first  # dropout is off, and a second look sees the same


def test_the_mode_comes_back_after_an_error(model) -> None:
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training
        raise ZeroDivisionError
    assert model.training and model.model.layers[0].training


def test_a_generated_answer_is_the_greedy_one_token_by_token(model, tokenizer) -> None:
    prompts = [tokenizer(text).input_ids for text in ("The capital of", "What is a turtle?\n", "The plural of cat is")]
    batched = generate(model, prompts, max_new_tokens=8, end_ids=[1], pad_id=2)
    for prompt, answer in zip(prompts, batched, strict=True):
        ids = list(prompt)
        with evaluating(model):
            for _ in range(8):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 1:
                    ids.pop()
                    break
        assert answer == ids[len(prompt) :]


def test_answers_come_back_in_the_order_of_their_prompts(model) -> None:
    prompts = [[5] * length for length in (9, 2, 7, 1, 4)]
    one_by_one = [generate(model, [p], max_new_tokens=5, end_ids=[1], pad_id=2)[0] for p in prompts]
    assert generate(model, prompts, max_new_tokens=5, end_ids=[1], pad_id=2, batch_size=2) == one_by_one
    assert generate(model, [], max_new_tokens=5, end_ids=[1], pad_id=2) == []


def test_an_empty_prompt_is_answered_as_a_new_text_is(model) -> None:
    assert generate(model, [[]], max_new_tokens=4, end_ids=[1], pad_id=2) == generate(
        model, [[1]], max_new_tokens=4, end_ids=[1], pad_id=2
    )


def test_an_answer_stops_before_its_end_token(model) -> None:
    [[first, *_]] = generate(model, [[5, 6]], max_new_tokens=4, end_ids=[1], pad_id=2)
    assert generate(model, [[5, 6]], max_new_tokens=4, end_ids=[first], pad_id=2) == [[]]


def test_exact_match_is_the_share_of_equal_answers() -> None:
    assert exact_match([" cat\n", "Cat", "dog", "x"], ["cat", "cat", "dog ", "y"]) == 0.5
    assert math.isnan(exact_match([], []))


def test_perplexity_is_infinite_rather_than_an_overflow() -> None:
    assert perplexity(math.log(3)) == pytest.approx(3)
    assert perplexity(1e9) == math.inf and math.isnan(perplexity(math.nan))


def test_no_batches_give_no_number_rather_than_zero(model) -> None:
    assert math.isnan(evaluate_loss(model, [])["loss"])


# --- retention ------------------------------------------------------------------------------------


def test_retention_is_perplexity_and_kl_by_their_definitions(model) -> None:
    text = torch.randint(3, 1500, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    numbers = measure_retention(model, [text], window=64)
    ids = torch.tensor([text])
    with evaluating(model):
        on = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        with adapters_off(model):
            off = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
    places = torch.arange(39)
    assert numbers["perplexity_adapter_on"] == pytest.approx(math.exp(-on[places, ids[0, 1:]].mean()), rel=1e-4)
    assert numbers["perplexity_adapter_off"] == pytest.approx(math.exp(-off[places, ids[0, 1:]].mean()), rel=1e-4)
    assert numbers["kl"] == pytest.approx(float((off.exp() * (off - on)).sum(-1).mean()), rel=1e-3)
    assert numbers["kl"] > 0.01


def test_an_adapter_that_does_nothing_changes_nothing() -> None:
    numbers = measure_retention(adapted(strength=0.0), [list(range(20, 50))])
    assert numbers["kl"] == 0.0
    assert numbers["perplexity_adapter_on"] == numbers["perplexity_adapter_off"]


def test_windows_predict_every_token_but_the_first_once(model) -> None:
    text = list(range(20, 61))
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    measure_retention(model, [text, [5]], window=16)
    handle.remove()
    assert seen[::2] == seen[1::2] == [text[:16], text[16:32], text[32:40]]  # adapter on, adapter off


def test_text_too_short_to_measure_on_is_an_error(model) -> None:
    with pytest.raises(InputError, match="task.retention_path"):
        measure_retention(model, [[5], []])

"""With the same A and B our model and peft's are the same function, on each architecture, forward and backward.

pytest tests/test_peft_parity.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_inject import CAUSAL, DECODER
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorafit.inject import inject_lora, lora_layers, lora_state_dict, mark_only_lora_as_trainable
from lorafit.quant import BaseReport, Quantization, quantize_model

peft = pytest.importorskip("peft")

ENCODER = DECODER | {"intermediate_size": 128}
FAMILIES = [*CAUSAL, "bert", "roberta", "t5"]
IDS = torch.arange(4, 28).view(2, 12)


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "bert":
        return BertForMaskedLM(BertConfig(**ENCODER)).eval()
    if family == "roberta":
        return RobertaForMaskedLM(RobertaConfig(**ENCODER)).eval()
    if family == "t5":
        config = T5Config(vocab_size=96, d_model=64, d_kv=16, num_heads=4, num_layers=2, d_ff=128)
        return T5ForConditionalGeneration(config).eval()
    return AutoModelForCausalLM.from_config(CAUSAL[family][0]).eval()


def ours_and_peft(ours: nn.Module, theirs: nn.Module, variant: str = "lora", **options: Any) -> tuple[Any, Any]:
    """The two models adapted on all linear layers, with the same random A and B."""
    inject_lora(ours, rank=4, alpha=12, variant=variant)
    mark_only_lora_as_trainable(ours)
    for layer in lora_layers(ours).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", use_rslora=variant == "rslora", bias="none", **options
    )
    theirs = peft.get_peft_model(theirs, config)
    state = {f"base_model.model.{name}": tensor for name, tensor in lora_state_dict(ours).items()}
    found = peft.set_peft_model_state_dict(theirs, state)
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if "lora_" in name]
    return ours, theirs


def call(model: nn.Module) -> Tensor:
    inner = getattr(model, "base_model", model)
    encoder_decoder = getattr(getattr(inner, "config", None), "is_encoder_decoder", False) or hasattr(model, "decoder")
    return model(input_ids=IDS, **({"decoder_input_ids": IDS} if encoder_decoder else {})).logits


def wrapped_by_peft(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    return [name.removeprefix("base_model.model.") for name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_the_same_layers_and_the_logits_are_equal(family: str) -> None:
    ours, theirs = ours_and_peft(build(family), build(family))
    assert list(lora_layers(ours)) == wrapped_by_peft(theirs)
    with torch.no_grad():
        base, found, expected = call(build(family)), call(ours), call(theirs)
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rank_stabilized_lora_is_pefts(family: str) -> None:
    ours, theirs = ours_and_peft(build(family), build(family), variant="rslora")
    with torch.no_grad():
        torch.testing.assert_close(call(ours), call(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradients_of_A_and_B_are_pefts(family: str) -> None:
    ours, theirs = ours_and_peft(build(family), build(family))
    for model in (ours, theirs):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_over_a_quantized_base_the_logits_are_pefts(quant: str) -> None:
    models = []
    for _ in range(2):
        model = build("llama")
        recipe = Quantization.of({"type": quant, "compute_dtype": "float32"})
        assert recipe is not None
        quantize_model(model, recipe, torch.device("cpu"), BaseReport("test", recipe))
        # how peft tells the two kinds apart
        setattr(model, "is_loaded_in_4bit" if quant == "nf4" else "is_loaded_in_8bit", True)
        models.append(model)
    ours, theirs = ours_and_peft(*models)
    assert list(lora_layers(ours)) == wrapped_by_peft(theirs)
    with torch.no_grad():
        found, expected = call(ours), call(theirs)
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()

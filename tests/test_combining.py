"""One adapter out of several: the sums that are promised, held against float64 and against peft.

pytest tests/test_combining.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_inject import CAUSAL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorafit.adapter import load_adapter, save_adapter
from lorafit.combining import combine
from lorafit.errors import InputError
from lorafit.inject import Adapter, adapter_modules, attach_adapter, detach_adapter, inject_lora
from lorafit.loading import load_base_model

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 45).view(3, 14) % 96
WEIGHTS = {"two": [0.7, 0.4], "a negative one": [1.0, -0.5]}


def build(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CAUSAL[family][0]).eval()


def made(model: nn.Module, seed: int, **options: Any) -> Adapter:
    """An adapter of the model with values that are not small."""
    torch.manual_seed(seed)
    inject_lora(model, **({"rank": 4, "alpha": 12} | options))
    with torch.no_grad():
        for module in adapter_modules(model).values():
            for name, parameter in module.named_parameters():
                if "base_layer" not in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
    return detach_adapter(model)


def delta(layer: Any) -> Tensor:
    """The update in float64 by its definition."""
    return layer.scaling * (layer.lora_B.weight.double() @ layer.lora_A.weight.double())


def wanted(adapters: list[Adapter], weights: list[float], place: str) -> Tensor:
    return sum(  # type: ignore[return-value]
        weight * delta(adapter.modules[place])
        for adapter, weight in zip(adapters, weights, strict=True)
        if place in adapter.modules
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def with_adapter(model: nn.Module, adapter: Adapter) -> Tensor:
    attach_adapter(model, adapter)
    found = logits(model)
    detach_adapter(model)
    return found


# --- against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cat_is_the_weighted_sum_of_the_updates(family: str, weights: list[float]) -> None:
    model = build(family)
    adapters = [made(model, 1), made(model, 2, rank=3, variant="rslora")]
    found = combine(adapters, weights, "cat")
    assert found.modules.keys() == adapters[0].modules.keys() and not found.biases
    for place, layer in found.modules.items():
        assert layer.rank == 7 and layer.scaling == 1.0
        assert layer.base_layer is model.get_submodule(place)
        torch.testing.assert_close(delta(layer), wanted(adapters, weights, place), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("rank", [1, 3, 6, 7, 50])
def test_svd_is_the_best_approximation_of_that_sum(weights: list[float], rank: int) -> None:
    model = build()
    adapters = [made(model, 1), made(model, 2, rank=3)]
    for place, layer in combine(adapters, weights, "svd", rank).modules.items():
        U, S, Vh = torch.linalg.svd(wanted(adapters, weights, place), full_matrices=False)
        assert layer.rank == min(rank, 7) and layer.scaling == 1.0
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(delta(layer), best, rtol=1e-4, atol=1e-5)


def test_without_a_rank_svd_takes_the_largest() -> None:
    model = build()
    adapters = [made(model, 1, rank=2), made(model, 2, rank=5), made(model, 3, rank=3)]
    assert {layer.rank for layer in combine(adapters, [1, 1, 1], "svd").modules.values()} == {5}


def test_a_layer_thinner_than_the_ranks_together_is_no_obstacle() -> None:
    model = build()
    adapters = [made(model, seed, rank=40, target_modules=["k_proj"]) for seed in (1, 2)]
    for method, rank in (("cat", None), ("svd", 32)):
        for place, layer in combine(adapters, [1.0, 2.0], method, rank).modules.items():
            torch.testing.assert_close(delta(layer), wanted(adapters, [1.0, 2.0], place), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_a_layer_that_only_one_adapter_has_counts_as_zero_in_the_other(method: str) -> None:
    model = build()
    adapters = [
        made(model, 1, target_modules=["q_proj", "v_proj"]),
        made(model, 2, target_modules=["v_proj", "up_proj"]),
    ]
    found = combine(adapters, [0.5, -2.0], method)
    assert found.modules.keys() == adapters[0].modules.keys() | adapters[1].modules.keys()
    for place, layer in found.modules.items():
        if "v_proj" not in place:
            torch.testing.assert_close(delta(layer), wanted(adapters, [0.5, -2.0], place), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_one_adapter_with_a_weight_is_that_adapter_stronger_or_weaker(method: str) -> None:
    model = build()
    adapter = made(model, 1)
    for place, layer in combine([adapter], [-0.25], method).modules.items():
        torch.testing.assert_close(delta(layer), -0.25 * delta(adapter.modules[place]), rtol=1e-4, atol=1e-6)


def test_an_adapter_minus_itself_is_nothing() -> None:
    model = build()
    base, adapter = logits(model), made(model, 1)
    for method in ("cat", "svd"):
        torch.testing.assert_close(with_adapter(model, combine([adapter, adapter], [1, -1], method)), base)


def test_embeddings_and_rounded_factors_are_combined_as_they_compute() -> None:
    model = build()
    options: dict[str, Any] = {"target_modules": ["embed_tokens", "q_proj"]}
    adapters = [made(model, 1, **options), made(model, 2, adapter_dtype="nf4", **options)]
    found = combine(adapters, [0.5, 0.5], "cat")
    for place, layer in found.modules.items():
        expected = sum(0.5 * adapter.modules[place].delta_weight() for adapter in adapters)
        torch.testing.assert_close(layer.delta_weight(), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_under_two_names_is_combined_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.other = self.one

    model = Twice()
    found = combine([made(model, 1), made(model, 2)], [1, 1], "cat").modules
    assert found["one"] is found["other"]


def test_the_adapters_themselves_and_the_base_stay_as_they_are() -> None:
    model = build()
    base, adapters = logits(model), [made(model, 1), made(model, 2)]
    before = [with_adapter(model, adapter) for adapter in adapters]
    for method in ("cat", "svd", "linear"):
        combine(adapters, [0.3, 0.3], method)
    assert all(torch.equal(with_adapter(model, a), b) for a, b in zip(adapters, before, strict=True))
    assert torch.equal(logits(model), base)


# --- against peft ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["embed_tokens", "v_proj"]], ids=["linear", "embedding"])
def test_the_logits_are_those_of_pefts_weighted_adapter(
    targets: list[str], method: str, weights: list[float], tmp_path: Path
) -> None:
    model = build()
    adapters = [made(model, seed, target_modules=targets) for seed in (1, 2)]
    for number, adapter in enumerate(adapters):
        attach_adapter(model, adapter)
        save_adapter(model, tmp_path / str(number))
        detach_adapter(model)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "0", adapter_name="0")
    theirs.load_adapter(tmp_path / "1", adapter_name="1")
    theirs.add_weighted_adapter(["0", "1"], weights, "sum", combination_type=method)
    theirs.set_adapter("sum")
    base = logits(model)
    found = with_adapter(model, combine(adapters, weights, method))
    assert (found - base).abs().max() > 1e-2
    torch.testing.assert_close(found, logits(theirs.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_a_combination_is_saved_and_opens_here_and_in_peft(method: str, tmp_path: Path) -> None:
    model = build()
    adapters = [made(model, 1), made(model, 2, target_modules=["q_proj", "up_proj"])]
    found = combine(adapters, [0.5, -0.5], method)
    attach_adapter(model, found)
    expected = logits(model)
    save_adapter(model, tmp_path / "sum")
    other = build()
    load_adapter(other, tmp_path / "sum")
    assert torch.equal(logits(other), expected)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)


def test_over_a_quantized_base_the_combination_is_over_the_same_layers() -> None:
    model = load_base_model("embedded", quant="nf4", device="cpu").eval()
    adapters = [made(model, 1, rank=2), made(model, 2, rank=2)]
    found = combine(adapters, [0.5, 0.5], "svd", 3)
    assert all(layer.base_layer is model.get_submodule(place) for place, layer in found.modules.items())
    assert {layer.rank for layer in found.modules.values()} == {3}


# --- what cannot be -------------------------------------------------------------------------------


def test_unequal_ranks_cannot_be_averaged_and_the_way_out_is_said() -> None:
    model = build()
    adapters = [made(model, 1), made(model, 2, rank=3)]
    with pytest.raises(InputError, match=r"q_proj has the ranks 4, 3.* not the sum of the updates.* take cat or svd"):
        combine(adapters, [0.5, 0.5], "linear")


def test_what_is_trained_whole_is_named() -> None:
    model = build("gpt2")
    with pytest.raises(InputError, match="only A and B can be combined: transformer.ln_f is trained whole"):
        combine([made(model, 1), made(model, 2, modules_to_save=["ln_f"])], [1, 1], "cat")
    with pytest.raises(InputError, match="transformer.h.0.ln_1.bias.* and .* more is trained whole"):
        combine([made(model, 1, bias="all"), made(model, 2)], [1, 1], "cat")


def test_adapters_of_two_models_are_not_combined() -> None:
    with pytest.raises(InputError, match="the adapters are not of one model: .*q_proj is another layer in each"):
        combine([made(build(), 1), made(build(), 2)], [1, 1], "cat")


@pytest.mark.parametrize(
    ("weights", "method", "rank", "said"),
    [
        ([1.0], "cat", None, "combine.weights must be one number for each adapter: 1 for 2"),
        ([1.0, float("nan")], "cat", None, "combine.weights must be finite numbers, got nan"),
        ([1.0, True], "cat", None, "combine.weights must be finite numbers, got True"),
        ([1.0, 1.0], "liner", None, "got 'liner'. Did you mean 'linear'?"),
        ([1.0, 1.0], "cat", 3, "combine.rank belongs to svd"),
        ([1.0, 1.0], "svd", 0, "combine.rank must be a positive integer, got 0"),
    ],
)
def test_impossible_values_are_said(weights: list[Any], method: str, rank: int | None, said: str) -> None:
    model = build()
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        combine([made(model, 1), made(model, 2)], weights, method, rank)

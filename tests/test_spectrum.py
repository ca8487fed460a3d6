"""The rank that an update uses, against dense singular values in float64; and smaller adapters that are the best ones.

pytest tests/test_spectrum.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lorafit.errors import InputError
from lorafit.inject import adapter_modules, inject_lora, lora_layers, lora_state_dict
from lorafit.lora import LoRAEmbedding, LoRALinear
from lorafit.spectrum import Trial, cut, effective_rank, energy, rank_for_energy, spectrum, truncated

TinyLlama = Callable[..., LlamaForCausalLM]
IDS = torch.arange(24).view(2, 12)


def filled(layer: Any) -> Any:
    """A layer whose factors are not alike in their directions."""
    with torch.no_grad():
        layer.lora_A.weight.normal_().mul_(torch.logspace(0, -1, layer.rank)[:, None])
        layer.lora_B.weight.normal_()
    return layer


LAYERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoRALinear(nn.Linear(40, 24), 8, 12),
    "rslora": lambda: LoRALinear(nn.Linear(40, 24), 8, 12, variant="rslora"),
    "transposed": lambda: LoRALinear(Conv1D(24, 40), 8, 12),
    "thinner than its rank": lambda: LoRALinear(nn.Linear(40, 5), 8, 12),
    "embedding": lambda: LoRAEmbedding(nn.Embedding(50, 16), 8, 12),
    "rslora embedding": lambda: LoRAEmbedding(nn.Embedding(50, 16), 8, 12, variant="rslora"),
    "int8": lambda: LoRALinear(nn.Linear(40, 24), 8, 12, adapter_dtype="int8"),
    "float64": lambda: LoRALinear(nn.Linear(40, 24), 8, 12, dtype=torch.float64),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def dense(layer: Any) -> Tensor:
    """The update [out, in] by definition, in float64."""
    factors = [factor.value().detach().double() for factor in (layer.lora_B, layer.lora_A)]
    return factors[0] @ factors[1] * layer.scaling


def adapted(model: nn.Module, **options: Any) -> Any:
    inject_lora(model, **({"rank": 8, "alpha": 16} | options))
    for layer in lora_layers(model).values():
        filled(layer)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@layers
def test_singular_values_are_those_of_the_dense_update(kind: str) -> None:
    layer = filled(LAYERS[kind]())
    expected = torch.linalg.svdvals(dense(layer))[: layer.rank]
    found = spectrum(layer)
    assert found.shape == (8,)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-10, atol=1e-12)
    assert not found[len(expected) :].any()


@layers
def test_energy_is_the_share_of_the_squared_norm_that_is_kept(kind: str) -> None:
    layer = filled(LAYERS[kind]())
    update = dense(layer)
    shares = energy(spectrum(layer))
    assert len(shares) == layer.rank
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0, abs=1e-12)
    U, S, Vh = torch.linalg.svd(update)
    for rank in (1, 3, 5):
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert shares[rank - 1] == pytest.approx(float(best.norm() ** 2 / update.norm() ** 2), rel=1e-9)


@layers
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncation_is_as_near_as_eckart_and_young_allow(kind: str, rank: int) -> None:
    layer = filled(LAYERS[kind]())
    A, B = truncated(layer, rank)
    assert (A.shape, B.shape) == ((rank, layer.lora_A.in_features), (layer.lora_B.out_features, rank))
    assert A.dtype == B.dtype == layer.lora_A.weight.dtype
    update = dense(layer)
    error = (B.double() @ A.double() * layer.scaling - update).norm()
    optimum = torch.linalg.svdvals(update)[rank:].norm()
    assert float(error) == pytest.approx(float(optimum), rel=1e-4, abs=1e-5 * float(update.norm()))
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # neither factor is the larger one


def test_a_planted_rank_is_found_and_small_directions_do_not_count() -> None:
    layer = LoRALinear(nn.Linear(64, 48), 16, 16)
    left, right = (torch.linalg.qr(torch.randn(size, 4)).Q for size in (48, 64))
    with torch.no_grad():
        layer.lora_B.weight.zero_()[:, 2:6] = left * torch.tensor([2.0, 1.0, 0.5, 0.019])
        layer.lora_A.weight[2:6] = right.T
    values = spectrum(layer)
    torch.testing.assert_close(values[:4].float(), torch.tensor([2.0, 1.0, 0.5, 0.019]), rtol=1e-5, atol=1e-6)
    assert effective_rank(values) == 3  # 0.019 is less than 1 % of 2
    total = 4 + 1 + 0.25 + 0.019**2
    assert energy(values)[:3] == pytest.approx([4 / total, 5 / total, 5.25 / total], rel=1e-5)
    shares = (0.5, 4 / total + 1e-4, 0.99, 1.0)
    assert [rank_for_energy(values, share) for share in shares] == [1, 2, 3, 4]


def test_an_update_of_zero_has_rank_zero_and_loses_nothing() -> None:
    values = spectrum(LoRALinear(nn.Linear(8, 8), 4, 4))
    assert effective_rank(values) == rank_for_energy(values, 0.9) == 0
    assert energy(values) == [1.0] * 4


def test_factors_that_are_not_finite_are_refused() -> None:
    layer = filled(LAYERS["lora"]())
    layer.lora_B.weight.data[3, 1] = math.nan
    with pytest.raises(InputError, match="not finite"):
        spectrum(layer)


@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan, "0.9", True])
def test_a_share_of_the_energy_that_cannot_be_kept_is_refused(share: Any) -> None:
    with pytest.raises(InputError, match=r"in \(0, 1\]"):
        rank_for_energy(torch.ones(3), share)


@pytest.mark.parametrize("rank", [0, 9, -1, 2.0, True])
def test_a_layer_is_cut_to_a_rank_that_it_has(rank: Any) -> None:
    with pytest.raises(InputError, match="rank of 1 to 8, not"):
        truncated(LAYERS["lora"](), rank)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_cutting_keeps_class_scaling_dropout_and_base_layer(tiny_llama: TinyLlama, variant: str) -> None:
    model = adapted(tiny_llama(), variant=variant, dropout=0.25)
    before = dict(lora_layers(model))
    kinds = {name: type(layer) for name, layer in before.items()}
    updates = {name: layer.delta_weight() for name, layer in before.items()}
    assert set(cut(model, rank=3).values()) == {3}
    after = lora_layers(model)
    assert list(after) == list(before)
    for name, layer in after.items():
        assert (type(layer), layer.rank, layer.variant) == (kinds[name], 3, variant)
        assert layer.scaling == pytest.approx(before[name].scaling)
        assert layer.alpha == pytest.approx(before[name].scaling * (3 if variant == "lora" else math.sqrt(3)))
        assert layer.base_layer is before[name].base_layer
        assert layer.dropout.p == 0.25
        assert not layer.training
        left = torch.linalg.svdvals(updates[name].double())[3:].norm()
        assert float((layer.delta_weight() - updates[name]).double().norm()) == pytest.approx(float(left), rel=1e-4)


def test_cutting_to_the_own_rank_changes_nothing(tiny_llama: TinyLlama) -> None:
    model = adapted(tiny_llama())
    before = lora_layers(model)
    assert set(cut(model, rank=8).values()) == {8}
    assert all(layer is before[name] for name, layer in lora_layers(model).items())


def test_energy_gives_each_layer_a_rank_of_its_own(tiny_llama: TinyLlama) -> None:
    model = adapted(tiny_llama())
    spectra = {name: spectrum(layer) for name, layer in lora_layers(model).items()}
    with torch.no_grad():
        lora_layers(model)["model.layers.0.mlp.up_proj"].lora_B.weight.zero_()
    ranks = cut(model, energy=0.9)
    assert ranks.pop("model.layers.0.mlp.up_proj") == 1
    assert len(set(ranks.values())) > 1
    for name, rank in ranks.items():
        assert lora_layers(model)[name].rank == rank
        shares = energy(spectra[name])
        assert shares[rank - 1] >= 0.9
        assert rank == 1 or shares[rank - 2] < 0.9


def test_layers_of_several_ranks_are_cut_to_the_common_one_and_thinner_ones_stay(tiny_llama: TinyLlama) -> None:
    model = adapted(tiny_llama(), rank_pattern={"q_proj": 2, "down_proj": 12})
    thin = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    ranks = cut(model, rank=4)
    assert {name.rpartition(".")[2]: rank for name, rank in ranks.items()} == {
        **dict.fromkeys(["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 4),
        "q_proj": 2,
    }
    assert lora_layers(model)["model.layers.0.self_attn.q_proj"] is thin


def test_a_layer_under_two_names_stays_one_layer() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"one": shared, "two": shared, "three": nn.Linear(16, 16)})
    adapted(model, target_modules=["one", "two", "three"])
    cut(model, rank=2)
    modules = adapter_modules(model)
    assert modules["one"] is modules["two"]
    assert modules["one"].rank == modules["three"].rank == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "one of rank and energy"),
        ({"rank": 2, "energy": 0.9}, "one of rank and energy"),
        ({"rank": 9}, "rank of 1 to 8, not 9"),
        ({"rank": 0}, "rank of 1 to 8, not 0"),
        ({"energy": 1.5}, "got 1.5"),
    ],
)
def test_a_cut_that_is_not_possible_changes_nothing(tiny_llama: TinyLlama, how: dict[str, Any], message: str) -> None:
    model = adapted(tiny_llama())
    before = lora_layers(model)
    with pytest.raises(InputError, match=message):
        cut(model, **how)
    assert all(layer is before[name] for name, layer in lora_layers(model).items())
    with pytest.raises(InputError, match="no LoRA layers"):
        cut(tiny_llama(), rank=2)


@pytest.mark.parametrize("options", [{}, {"adapter_dtype": "int8"}, {"adapter_dtype": "nf4"}, {"variant": "rslora"}])
@pytest.mark.parametrize("how", [{"rank": 3}, {"rank": 7}, {"energy": 0.8}])
def test_a_trial_computes_what_the_cut_adapter_will(
    tiny_llama: TinyLlama, options: dict[str, Any], how: dict[str, Any]
) -> None:
    model, other = (adapted(tiny_llama(), **options) for _ in range(2))
    with torch.no_grad():
        for name, tensor in lora_state_dict(model).items():
            lora_state_dict(other)[name].copy_(tensor)
    with Trial(model) as trial:
        trial.keep(rank=1)
        ranks = trial.keep(**how)
        tried = logits(model)
    assert ranks == cut(other, **how)
    torch.testing.assert_close(tried, logits(other), rtol=1e-5, atol=1e-5)


def test_after_a_trial_every_bit_is_as_it_was(tiny_llama: TinyLlama) -> None:
    model = adapted(tiny_llama())
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    answer = logits(model)
    with pytest.raises(ZeroDivisionError), Trial(model) as trial:
        assert trial.spectra.keys() == lora_layers(model).keys()
        for rank in (1, 2, 8, 3):
            trial.keep(rank=rank)
            assert torch.equal(logits(model), answer) is (rank == 8)
        raise ZeroDivisionError  # an interrupted measurement
    for name, parameter in model.named_parameters():
        assert parameters[name] == (parameter, parameter.data_ptr())
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state_dict(model).items())
    assert torch.equal(logits(model), answer)

"""Many adapters, one base: what is computed is what each computes alone, and nothing of the base is moved or copied.

pytest tests/test_serving.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_inject import CAUSAL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lorafit.adapter import save_adapter
from lorafit.errors import InputError
from lorafit.evaluation import generate
from lorafit.inject import Adapter, adapter_modules, detach_adapter, inject_lora, lora_layers
from lorafit.loading import load_base_model
from lorafit.quant import BaseReport, Quantization, quantize_model
from lorafit.serving import Adapters

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 45).view(3, 14) % 96


def build(family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = type(CAUSAL[family][0])(**(CAUSAL[family][0].to_dict() | options))
    return AutoModelForCausalLM.from_config(config).eval()


def made(model: nn.Module, seed: int, **options: Any) -> Adapter:
    """An adapter of the model that does something, outside of it."""
    torch.manual_seed(seed)
    inject_lora(model, **({"rank": 4, "alpha": 8} | options))
    with torch.no_grad():
        for module in adapter_modules(model).values():
            for name, parameter in module.named_parameters():
                if "base_layer" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return detach_adapter(model)


def of(model: nn.Module, *options: dict[str, Any]) -> Adapters:
    """Adapters "0", "1", … of the model, one for each set of options."""
    found = [made(model, seed, **more) for seed, more in enumerate(options)]
    adapters = Adapters(model)
    for number, adapter in enumerate(found):
        adapters.add(str(number), adapter)
    return adapters


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def each(adapters: Adapters, *names: str | None) -> list[Tensor]:
    found = []
    for name in names:
        adapters.use(name)
        found.append(logits(adapters.model))
    adapters.use(None)
    return found


def storages(model: nn.Module) -> dict[int, int]:
    """Every piece of memory that the model's tensors lie in, and its bytes."""
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


# --- switching ------------------------------------------------------------------------------------


def test_each_of_ten_adapters_computes_what_peft_computes_and_the_base_stays_where_it_is(tmp_path: Path) -> None:
    model = build()
    before, base = storages(model), logits(model)
    for number in range(10):
        adapter = made(build(), number, target_modules=["q_proj", "up_proj"] if number % 2 else "all_linear")
        other = build()
        for place, module in adapter.modules.items():
            other.set_submodule(place, module)
        save_adapter(other, tmp_path / str(number))
    adapters = Adapters(model)
    for number in range(10):
        adapters.load(str(number), tmp_path / str(number))
    assert storages(model) == before
    assert adapters.names == list("0123456789") and adapters.used is None

    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "0", adapter_name="0").eval()
    for number in range(1, 10):
        theirs.load_adapter(tmp_path / str(number), adapter_name=str(number))
    everything: dict[int, int] = {}
    for name in (*adapters.names, "3", "7", "3"):
        adapters.use(name)
        theirs.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
        assert before.items() <= storages(model).items()
        everything |= storages(model)
    factors = sum(
        parameter.numel() * 4
        for name in adapters.names
        for module in adapters.remove(name).modules.values()
        for parameter in (module.lora_A.weight, module.lora_B.weight)
    )
    assert sum(everything.values()) == sum(before.values()) + factors
    assert torch.equal(logits(model), base) and not adapters.names


def test_to_switch_reads_no_file_and_makes_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = of(build(), {}, {"rank": 2})
    adapters.use("0")
    layers = {name: id(layer) for name, layer in lora_layers(adapters.model).items()}
    monkeypatch.setattr(nn.Module, "__init__", lambda *_: pytest.fail("a module is made"))
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("a file is read"))
    adapters.use("1")
    assert {layer.rank for layer in lora_layers(adapters.model).values()} == {2}
    adapters.use("0")
    assert {name: id(layer) for name, layer in lora_layers(adapters.model).items()} == layers


def test_trained_biases_and_modules_come_and_go_with_their_adapter() -> None:
    adapters = of(build("gpt2"), {"bias": "all", "modules_to_save": ["ln_f"]}, {})
    base, first, second, again, off = each(adapters, None, "0", "1", "0", None)
    assert torch.equal(base, off) and torch.equal(first, again)
    assert not torch.equal(first, base) and not torch.equal(second, first)


def test_biases_that_are_trained_while_in_use_are_kept() -> None:
    model = build("gpt2")
    adapters = of(model, {"bias": "all"})
    adapters.use("0")
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(3.0)
    adapters.use(None)
    assert not (model.transformer.ln_f.bias == 3.0).any()
    adapters.use("0")
    assert (model.transformer.ln_f.bias == 3.0).all()


def test_an_adapter_has_the_mode_of_the_model_it_is_put_into() -> None:
    adapters = of(build(), {"dropout": 0.5})
    adapters.model.train()
    adapters.use("0")
    assert all(layer.dropout.training for layer in lora_layers(adapters.model).values())
    adapters.use(None)
    adapters.model.eval()
    adapters.use("0")
    assert torch.equal(logits(adapters.model), logits(adapters.model))


def test_loading_keeps_what_is_in_use_and_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    model = build()
    inject_lora(model, rank=2, alpha=4)
    save_adapter(model, tmp_path / "a")
    detach_adapter(model)
    adapters = of(model, {})
    adapters.use("0")
    expected = logits(model)
    adapters.load("new", tmp_path / "a")
    with pytest.raises(InputError, match="has no adapter_config.json"):
        adapters.load("none", tmp_path)
    assert adapters.used == "0" and adapters.names == ["0", "new"]
    assert torch.equal(logits(model), expected)


# --- names ----------------------------------------------------------------------------------------


def test_a_name_that_is_not_there_is_named_with_the_nearest() -> None:
    adapters = Adapters(build())
    with pytest.raises(InputError, match="no adapter 'law'. None is loaded."):
        adapters.use("law")
    adapters.add("lawyer", made(adapters.model, 0))
    adapters.use("lawyer")
    for call in (lambda: adapters.use("lawyr"), lambda: adapters.remove("lawyr")):
        with pytest.raises(InputError, match="no adapter 'lawyr'. There is lawyer. Did you mean 'lawyer'?"):
            call()
    with pytest.raises(InputError, match="Did you mean 'lawyer'?"), adapters.mixed([None, "lawyr"]):
        pass
    assert adapters.used == "lawyer"
    with pytest.raises(InputError, match="there is an adapter 'lawyer' already"):
        adapters.add("lawyer", Adapter())


def test_an_adapter_of_another_model_and_a_model_that_carries_one_are_refused() -> None:
    adapters = Adapters(build())
    with pytest.raises(InputError, match="adapter 'x' is not one of this model: .* is another layer"):
        adapters.add("x", made(build(), 0))
    assert adapters.names == []
    model = build()
    inject_lora(model, rank=2, alpha=4)
    with pytest.raises(InputError, match="carries an adapter already"):
        Adapters(model)


def test_what_is_removed_is_out_of_the_model_and_can_come_back() -> None:
    adapters = of(build(), {})
    base, expected = each(adapters, None, "0")
    adapters.use("0")
    adapter = adapters.remove("0")
    assert adapters.names == [] and torch.equal(logits(adapters.model), base)
    adapters.add("again", adapter)
    assert torch.equal(each(adapters, "again")[0], expected)


# --- mixed rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gpt_neox", "falcon", "phi3", "qwen3"])
def test_a_row_of_a_mixed_batch_is_to_the_bit_what_it_is_when_the_batch_has_one_adapter(family: str) -> None:
    adapters = of(build(family), {}, {"rank": 2, "variant": "rslora"})
    first, base, second = each(adapters, "0", None, "1")
    with adapters.mixed(["0", None, "1"]):
        found = logits(adapters.model)
    assert torch.equal(found, torch.stack([first[0], base[1], second[2]]))
    assert not torch.equal(first[0], base[0]) and not torch.equal(first[2], second[2])
    assert torch.equal(each(adapters, None)[0], base)


OTHERS = {
    "different layers": ({"target_modules": ["q_proj"]}, {"target_modules": ["down_proj", "q_proj"]}),
    "embeddings": ({"target_modules": ["embed_tokens", "v_proj"]}, {"target_modules": ["embed_tokens"]}),
    "a head trained whole": ({"modules_to_save": ["lm_head"]}, {}),
    "a norm trained whole": ({"modules_to_save": ["norm"]}, {"modules_to_save": ["norm"]}),
    "a block around a layer": (
        {"modules_to_save": ["layers.0.mlp"], "target_modules": ["q_proj"]},
        {"target_modules": ["up_proj"]},
    ),
    "rounded factors": ({"adapter_dtype": "nf4"}, {"adapter_dtype": "int8"}),
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS.keys())
def test_adapters_of_every_kind_can_share_a_batch(options: tuple[dict[str, Any], ...]) -> None:
    adapters = of(build(), *options)
    before = {name: id(module) for name, module in adapters.model.named_modules()}
    first, second, base = each(adapters, "0", "1", None)
    with adapters.mixed(["1", "0", None]):
        found = logits(adapters.model)
    assert torch.equal(found, torch.stack([second[0], first[1], base[2]]))
    assert {name: id(module) for name, module in adapters.model.named_modules()} == before


@torch.no_grad()
def test_a_layer_under_two_names_is_mixed_under_both_and_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x))

    model, x = Twice().eval(), torch.randn(2, 8)
    adapters = of(model, {}, {})
    rows = []
    for name in ("0", "1"):
        adapters.use(name)
        rows.append(model(x))
    with adapters.mixed(["0", "1"]):
        assert model.one is model.other
        assert torch.equal(model(x), torch.stack([rows[0][0], rows[1][1]]))
    adapters.use(None)
    assert model.one is model.other and type(model.one) is nn.Linear


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_over_a_quantized_base_a_mixed_row_is_the_same_to_the_bit(quant: str) -> None:
    model = load_base_model("embedded", quant=quant, device="cpu").eval()
    adapters = of(model, {}, {})
    ids = torch.arange(60).view(3, 20) + 5
    expected = []
    for name in ("0", "1", None):
        adapters.use(name)
        expected.append(logits(model, ids))
    with adapters.mixed(["0", "1", None]):
        found = logits(model, ids)
    assert torch.equal(found, torch.stack([expected[0][0], expected[1][1], expected[2][2]]))


def test_over_an_eight_bit_base_without_outliers_a_mixed_row_is_the_same() -> None:
    model = build()
    recipe = Quantization.of({"type": "int8", "compute_dtype": "float32"})
    assert recipe is not None
    quantize_model(model, recipe, torch.device("cpu"), BaseReport("test", recipe))
    adapters = of(model, {}, {})
    first, second, base = each(adapters, "0", "1", None)
    with adapters.mixed(["0", "1", None]):
        torch.testing.assert_close(logits(model), torch.stack([first[0], second[1], base[2]]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_row_padded_among_others_is_what_it_is_alone() -> None:
    adapters = of(build(), {}, {})
    model = adapters.model
    prompts = [[5, 6, 7, 8, 9], [11, 12], [40, 41, 42]]
    names = ["0", "1", None]
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with adapters.mixed(names):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        found = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    for prompt, name, row in zip(prompts, names, found, strict=True):
        adapters.use(name)
        torch.testing.assert_close(row[-len(prompt) :], logits(model, torch.tensor([prompt]))[0], rtol=0, atol=1e-5)


def test_what_a_mixed_batch_writes_is_what_each_row_writes_alone() -> None:
    adapters = of(build(), {}, {"target_modules": ["v_proj", "up_proj"]})
    prompts = [[5, 6, 7, 8, 9], [11, 12], [40, 41, 42], [11, 12], [7]]
    names = ["0", "1", None, "0", "1"]
    settings: dict[str, Any] = {"max_new_tokens": 12, "end_ids": [1], "pad_id": 0}
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        adapters.use(name)
        alone += generate(adapters.model, [prompt], **settings)
    adapters.use("1")
    for size in (5, 2):
        found = generate(
            adapters.model,
            prompts,
            batch_size=size,
            around=lambda rows: adapters.mixed([names[row] for row in rows]),
            **settings,
        )
        assert found == alone
    assert adapters.used == "1"
    assert alone[1] != alone[3]  # one prompt, two adapters


def test_a_batch_of_another_size_is_refused_by_name_and_leaves_the_base(tiny_llama: Callable[..., Any]) -> None:
    adapters = of(tiny_llama().eval(), {}, {})
    [base] = each(adapters, None)
    with pytest.raises(InputError, match=r"q_proj is given \[3, 14, 64\], and its adapters are mixed for 2 rows"):
        with adapters.mixed(["0", "1"]):
            logits(adapters.model)
    assert torch.equal(logits(adapters.model), base)
    with pytest.raises(InputError, match="for each of its rows"), adapters.mixed([]):
        pass


def test_a_model_that_puts_its_rows_together_is_refused_by_name() -> None:
    adapters = of(build("opt"), {}, {})
    with pytest.raises(InputError, match=r"fc1 is given \[42, 64\].*puts its rows together. Use one adapter at a time"):
        with adapters.mixed(["0", "1", None]):
            logits(adapters.model)


def test_trained_biases_cannot_be_mixed() -> None:
    adapters = of(build("gpt2"), {"bias": "all"}, {})
    with pytest.raises(InputError, match="adapter '0' has trained biases"), adapters.mixed(["0", "1"]):
        pass
    with adapters.mixed(["1", None]):
        logits(adapters.model, IDS[:2])


def test_while_a_batch_is_mixed_nothing_else_is_done(tmp_path: Path) -> None:
    adapters = of(build(), {})
    with adapters.mixed(["0"]):
        calls: list[Callable[[], Any]] = [
            lambda: adapters.use(None),
            lambda: adapters.remove("0"),
            lambda: adapters.load("x", tmp_path),
            lambda: adapters.add("x", Adapter()),
            lambda: adapters.mixed(["0"]).__enter__(),
        ]
        for call in calls:
            with pytest.raises(InputError, match="a mixed batch is being computed"):
                call()
        with pytest.raises(InputError, match="carries LoRA layers already"):
            inject_lora(adapters.model, rank=2, alpha=4)


def test_the_model_still_answers_what_it_is_asked_of_its_layers() -> None:
    model: LlamaForCausalLM = build()
    adapters = of(model, {"target_modules": ["embed_tokens", "q_proj"]})
    with adapters.mixed(["0"]):
        assert model.get_input_embeddings().num_embeddings == 96
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.weight is layer.base_layer.weight
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            _ = layer.nothing_of_the_kind

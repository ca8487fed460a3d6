"""Everything that lorafit trains goes through peft's folder and back: to peft, from peft, and to ourselves.

pytest tests/test_adapter_options.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_adapter import build, logits
from test_peft_parity import FAMILIES as PEFT_FAMILIES, build as build_any, call
from torch import nn

from lorafit.adapter import CARD, CONFIG, PROVENANCE, WEIGHTS, load_adapter, round_adapter, save_adapter
from lorafit.adapter.files import ROUNDED
from lorafit.errors import InputError
from lorafit.inject import (
    adapter_modules,
    adapters_off,
    attach_adapter,
    count_parameters,
    detach_adapter,
    inject_lora,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    trained_biases,
    unmerge_lora,
)
from lorafit.loading import load_base_model
from lorafit.lora import LoRAEmbedding
from lorafit.rounding import dequantize, quantize

peft = pytest.importorskip("peft")

ATTENTION = {"llama": "q_proj", "gpt2": "c_attn", "gpt_neox": "query_key_value", "opt": "q_proj", "phi3": "qkv_proj"}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "gpt_neox": "embed_in", "opt": "embed_tokens"}
HEAD = {"llama": "lm_head", "gpt2": "lm_head", "gpt_neox": "lm_head", "opt": "lm_head"}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rank_pattern": {"down_proj": 8, r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}),
    ("llama", {"rank_pattern": {"down_proj": 8}, "variant": "rslora"}),
    ("gpt2", {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"mlp.c_proj": 5}}),
    ("gpt2", {"bias": "all"}),
    ("gpt2", {"bias": "lora_only"}),
    ("opt", {"bias": "all", "target_modules": ["q_proj", "v_proj"]}),
    ("opt", {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    ("gpt_neox", {"bias": "lora_only", "target_modules": ["query_key_value"]}),
    *((family, {"modules_to_save": [head]}) for family, head in HEAD.items()),
    *((family, {"modules_to_save": [EMBEDDING[family]]}) for family in ("llama", "gpt_neox")),
    ("llama", {"modules_to_save": ["input_layernorm", "lm_head"]}),
    *((family, {"target_modules": [EMBEDDING[family], ATTENTION[family]]}) for family in EMBEDDING),
    ("llama", {"target_modules": ["embed_tokens"], "variant": "rslora"}),
    ("llama", {"target_modules": ["lm_head", "q_proj"]}),
]


def trained(model: nn.Module, **options: Any) -> Any:
    """An adapter whose every part differs from where it began."""
    inject_lora(model, **({"rank": 4, "alpha": 12} | options))
    mark_only_lora_as_trainable(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_peft_opens_what_we_trained_and_we_open_it_again(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, base = trained(build(family), **options), build(family)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-2
    save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    again = build(family)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), expected)
    found = lora_state_dict(again)
    assert found.keys() == lora_state_dict(model).keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in lora_state_dict(model).items())


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_we_open_what_peft_trained(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    words = {"target_modules": "all-linear", "bias": "none"} | options
    words["use_rslora"] = words.pop("variant", None) == "rslora"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(family), peft.LoraConfig(r=4, lora_alpha=12, **words)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.save_pretrained(tmp_path / "a")
    model = build(family)
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model.eval()), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PEFT_FAMILIES)
def test_every_architecture_goes_through_the_folder_both_ways(family: str, tmp_path: Path) -> None:
    model = trained(build_any(family))
    with torch.no_grad():
        expected = call(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build_any(family), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(call(theirs), expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = build_any(family)
    load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(call(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{"exclude_modules": ["down_proj"]}, {"layers_to_transform": [1]}])
def test_what_peft_leaves_out_by_name_or_by_layer_is_left_out(how: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **how)
    theirs = peft.get_peft_model(build("llama"), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    model = build("llama")
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_without_its_adapter_the_model_is_the_base_bit_for_bit(family: str, options: dict[str, Any]) -> None:
    model, base = trained(build(family), **options), logits(build(family))
    expected = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), base)
        assert not trained_biases(model)
    assert torch.equal(logits(model), expected)
    adapter = detach_adapter(model)
    assert torch.equal(logits(model), base)
    attach_adapter(model, adapter)
    assert torch.equal(logits(model), expected)
    with pytest.raises(InputError, match="carries an adapter already"):
        attach_adapter(model, adapter)


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_a_merged_model_is_plain_and_computes_the_same_also_when_it_is_saved(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(build(family), **options)
    expected = logits(model)
    kinds = {type(module) for module in build(family).modules()}
    merge_lora(model)
    assert {type(module) for module in model.modules()} == kinds
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m").eval()  # tied weights that have come apart stay apart
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_unmerging_is_exact(family: str, options: dict[str, Any]) -> None:
    model = trained(build(family), **options)
    before, expected = [(name, id(module)) for name, module in model.named_modules()], logits(model)
    tied = model.config.tie_word_embeddings
    for _ in range(2):
        merge_lora(model, keep=True)
        assert not adapter_modules(model)
        unmerge_lora(model)
        assert torch.equal(logits(model), expected)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert model.config.tie_word_embeddings == tied
    with pytest.raises(InputError, match="keep=True"):
        unmerge_lora(merge_lora(model))


def test_only_what_belongs_to_the_adapter_is_trained() -> None:
    model = build("gpt2")
    inject_lora(model, rank=4, alpha=8, target_modules=["c_attn", "wte"], bias="lora_only", modules_to_save=["ln_f"])
    mark_only_lora_as_trainable(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ends = {name.split(".h.")[-1].partition(".")[2] if ".h." in name else name for name in names}
    assert ends == {
        *("attn.c_attn.lora_A.weight", "attn.c_attn.lora_B.weight", "attn.c_attn.base_layer.bias"),
        *("transformer.wte.lora_A.weight", "transformer.wte.lora_B.weight"),
        *("transformer.ln_f.trained.weight", "transformer.ln_f.trained.bias"),
    }
    trainable, _ = count_parameters(model)
    assert trainable == sum(tensor.numel() for tensor in lora_state_dict(model).values())


def test_an_embedding_is_adapted_as_the_dense_update_says() -> None:
    model = trained(build("llama"), target_modules=["embed_tokens"])
    layer = model.get_input_embeddings()
    assert isinstance(layer, LoRAEmbedding)
    assert layer.delta_weight().shape == layer.base_layer.weight.shape
    expected = (layer.base_layer.weight + layer.delta_weight())[torch.tensor([3, 5, 3])]
    torch.testing.assert_close(layer(torch.tensor([3, 5, 3])), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern: 'q_porj' matches none of the adapted layers"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern: 'lm_head' matches none"),
        ({"rank_pattern": {"q_proj": 0}}, "rank must be a positive integer, got 0"),
        ({"rank_pattern": {"q_proj(": 2}}, "is no regular expression"),
        ({"bias": "all"}, "has no such bias to train"),
        ({"bias": "every"}, "bias must be one of none, all, lora_only"),
        ({"modules_to_save": ["lm_haed"]}, "'lm_haed' matches no module.*Did you mean 'lm_head'"),
        ({"modules_to_save": ["act_fn"]}, "has no parameters to train"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "matches no linear layer|no linear layer"),
    ],
)
def test_an_impossible_adapter_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = build("llama")
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(InputError, match=message):
        inject_lora(model, **({"rank": 4, "alpha": 8} | options))
    assert [(name, id(module)) for name, module in model.named_modules()] == before


# ------------------------------------------------------------------------------------------------ small on disk


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_a_small_file_reads_back_as_the_rounding_says_and_the_model_can_be_given_the_same(
    dtype: str, tmp_path: Path
) -> None:
    model = trained(build("llama"), modules_to_save=["lm_head"])
    state = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    save_adapter(model, tmp_path / "full")
    save_adapter(model, tmp_path / "small", dtype=dtype)
    again = build("llama")
    load_adapter(again, tmp_path / "small")
    for name, tensor in lora_state_dict(again).items():
        kind = dtype if ".lora_" in name else "bfloat16"
        assert torch.equal(tensor, dequantize(quantize(state[name], kind))), name
    round_adapter(model, dtype)
    assert torch.equal(logits(again), logits(model.eval()))
    record = json.loads((tmp_path / "small" / PROVENANCE).read_text())
    assert record["dtype"] == dtype
    file = ROUNDED.get(dtype, WEIGHTS)
    assert record["weights"]["file"] == file
    full = (tmp_path / "full" / WEIGHTS).stat().st_size
    assert (tmp_path / "small" / file).stat().st_size < full * (0.6 if dtype == "bfloat16" else 0.55)


def test_peft_refuses_codes_instead_of_taking_them_for_values(tmp_path: Path) -> None:
    save_adapter(trained(build("llama")), tmp_path / "a", dtype="nf4")
    with pytest.raises(Exception, match="adapter_model|Repo id"):  # it looks elsewhere for the weights
        peft.PeftModel.from_pretrained(build("llama"), str(tmp_path / "a"))
    assert "lorafit.load_adapter" in (tmp_path / "a" / CARD).read_text()


def test_saving_in_another_dtype_leaves_one_file_of_weights(tmp_path: Path) -> None:
    model = trained(build("llama"))
    save_adapter(model, tmp_path / "a", dtype="int8")
    save_adapter(model, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").glob("adapter_model*")] == [WEIGHTS]
    load_adapter(build("llama"), tmp_path / "a")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_trained_in_few_bits_is_saved_as_it_multiplied(kind: str, tmp_path: Path) -> None:
    model = build("llama")
    inject_lora(model, rank=4, alpha=8, target_modules=["q_proj", "embed_tokens"], adapter_dtype=kind)
    mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]  # the gradient reaches what is rounded
    model.eval()
    save_adapter(model, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").glob("adapter_model*")] == [ROUNDED[kind]]
    again = build("llama")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    layer = next(iter(lora_layers(model).values()))
    assert not torch.equal(layer.lora_A.weight, layer.lora_A.value())  # what is trained is finer than what is used


def test_any_bit_flipped_in_the_header_is_noticed(tmp_path: Path) -> None:
    save_adapter(trained(build("llama"), target_modules=["q_proj"]), tmp_path / "a")
    path = tmp_path / "a" / WEIGHTS
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    model = build("llama")
    for with_record in (True, False):
        if not with_record:
            (tmp_path / "a" / PROVENANCE).unlink()
        for place in range(header):
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            path.write_bytes(flipped)
            with pytest.raises(InputError) as caught:
                load_adapter(model, tmp_path / "a")
            assert "\n" not in str(caught.value)


def test_the_same_base_in_four_bits_is_the_same_base_and_another_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    model = load_base_model(str(llama_folder), quant="nf4", device="cpu")
    save_adapter(trained(model), tmp_path / "a")
    for quant, dtype in ((None, None), (None, "bfloat16"), ("int8", None), ("nf4", "float32")):
        load_adapter(load_base_model(str(llama_folder), quant=quant, dtype=dtype, device="cpu"), tmp_path / "a")
    other = build("llama")
    nn.init.normal_(other.lm_head.weight)
    with pytest.raises(InputError, match="another base.*allow_other_base=true"):
        load_adapter(load_base_model(_saved(other, tmp_path / "other"), device="cpu"), tmp_path / "a")
    load_adapter(
        load_base_model(_saved(other, tmp_path / "other"), device="cpu"), tmp_path / "a", allow_other_base=True
    )


def _saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_names_in_the_file_are_pefts(tmp_path: Path) -> None:
    model = trained(build("gpt2"), target_modules=["c_attn", "wte"], bias="lora_only", modules_to_save=["ln_f"])
    save_adapter(model, tmp_path / "a")
    names = {key.removeprefix("base_model.model.transformer.") for key in load_file(tmp_path / "a" / WEIGHTS)}
    assert {"wte.lora_embedding_A", "wte.lora_embedding_B", "h.0.attn.c_attn.base_layer.bias", "ln_f.weight"} <= names
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", ["transformer.ln_f"])

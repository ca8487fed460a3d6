"""What a stranger's adapter folder may not do, and what of peft's own folders is no fault.

pytest tests/test_adapter_strangers.py
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter import build, logits
from test_adapter_options import trained
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lorafit.adapter import CONFIG, PROVENANCE, WEIGHTS, load_adapter, save_adapter
from lorafit.errors import InputError
from lorafit.inject import inject_lora, lora_state_dict
from lorafit.loading import load_base_model
from lorafit.measuring import measure_rounding
from lorafit.module import FinetuneModule

peft = pytest.importorskip("peft")
TinyLlama = Callable[..., LlamaForCausalLM]
NESTED = "((?:[a-z0-9_.]+)+)+!"


def folder_of(tmp_path: Path, **options: Any) -> Path:
    """An adapter from elsewhere: peft's two files alone."""
    save_adapter(trained(build("llama"), **options), tmp_path / "a")
    (tmp_path / "a" / PROVENANCE).unlink()
    return tmp_path / "a"


def change(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | options
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "a{99999999999}"},
        {"target_modules": "(" * 3000 + ")" * 3000},
        {"target_modules": NESTED},
        {"exclude_modules": "q_proj("},
        {"rank_pattern": {"a{99999999999}": 2}},
        {"alpha_pattern": {"(": 2}},
        {"layers_pattern": ["("], "layers_to_transform": [0]},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e308},
        {"alpha_pattern": {"q_proj": 10**400}},
        {"r": 10**4000},
        {"invented\nTraceback (most recent call last):": 1},
        {"invented": "x" * 100_000},
        {"use_dora": "\x1b[31m\n"},
        {"peft_type": "a\nb"},
    ],
)
def test_a_configuration_of_any_kind_is_one_short_line(options: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    change(folder, **options)
    with pytest.raises(InputError) as caught:
        load_adapter(build("llama"), folder)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 1000 + len(str(folder))


def metadata(entry: str) -> Callable[[dict[str, Tensor]], dict[str, str]]:
    return lambda tensors: {"format": "pt", "lorafit.rounding": entry}


def entry(shape: list[int]) -> str:
    return json.dumps({"block": 64, "tensors": {FIRST: {"kind": "nf4", "shape": shape}}})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.update({"a\nb\x1b[31m": torch.zeros(1)}),
        lambda t: t.update({FIRST: t[FIRST].to(torch.float8_e4m3fn)}),
        lambda t: t.update({FIRST.removeprefix("base_model.model."): t[FIRST] * 100}),
        lambda t: t.pop(FIRST),
        metadata(entry([0, 10**30])),
        metadata(entry([1] * 100_000)),
        metadata(entry([10**400] * 100)),
        metadata("[" * 100_000),
        metadata("{}"),
    ],
)
def test_tensors_of_any_kind_are_read_or_refused_in_one_line(damage: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    found = damage(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=found if isinstance(found, dict) else {"format": "pt"})
    model = build("llama")
    if tensors[FIRST].dtype == torch.float8_e4m3fn if FIRST in tensors else False:
        load_adapter(model, folder)  # a small kind of number, but a number
        return
    with pytest.raises(InputError) as caught:
        load_adapter(model, folder)
    assert str(caught.value).isprintable()
    assert not any("lora" in name for name, _ in model.named_modules())


def test_what_is_missing_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, target_modules=["q_proj"])
    change(folder, target_modules="all-linear", modules_to_save=["lm_head"])
    monkeypatch.setattr("lorafit.adapter.inject_lora", lambda *_, **__: pytest.fail("something was made"))
    with pytest.raises(InputError, match="missing lm_head.weight"):
        load_adapter(build("llama"), folder)


@pytest.mark.parametrize("options", [{"adapter_dtype": "fp4"}, {"dropout": 2.0}])
def test_a_refusal_leaves_what_is_trainable(options: dict[str, Any]) -> None:
    model = build("llama")
    with pytest.raises(InputError):
        inject_lora(model, rank=4, alpha=8, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------ what peft writes


def from_peft(model: nn.Module, folder: Path, **options: Any) -> Any:
    keep = {key: options.pop(key) for key in ("save_embedding_layers",) if key in options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, **options)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.save_pretrained(folder, **keep)
    return theirs


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "save_embedding_layers": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["(x)?layers"]},
        {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["o_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["score"], "rank_pattern": {r".*\.0\..*": 2}},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_corners_of_pefts_own_folders_open(
    options: dict[str, Any], tied: bool, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    def make() -> Any:
        return tiny_llama(num_hidden_layers=11, tie_word_embeddings=tied, attention_bias="bias" in options).eval()

    if "score" in options.get("modules_to_save", []):
        options = {key: value for key, value in options.items() if key != "modules_to_save"}
    theirs = from_peft(make(), tmp_path / "a", **dict(options))
    model = make()
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model.eval()), logits(theirs), rtol=1e-5, atol=1e-5)


def test_an_embedding_adapted_in_float32_opens_over_the_base_in_bfloat16(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    from_peft(tiny_llama(), tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    load_adapter(tiny_llama().to(torch.bfloat16), tmp_path / "a")
    changed = tiny_llama()
    nn.init.normal_(changed.model.embed_tokens.weight)
    with pytest.raises(InputError, match="is not the base's own weight"):
        load_adapter(changed, tmp_path / "a")


@pytest.mark.parametrize("quant", [{"type": "nf4", "compute_dtype": "float16"}, None])
def test_float16_is_no_other_base(quant: Any, llama_folder: Path, tmp_path: Path) -> None:
    model = load_base_model(str(llama_folder), quant="nf4", device="cpu")
    save_adapter(trained(model), tmp_path / "a")
    load_adapter(load_base_model(str(llama_folder), quant=quant, dtype="float16", device="cpu"), tmp_path / "a")


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("stored", [None, "float32"])
def test_what_was_trained_rounded_is_saved_as_it_multiplied_in_any_file(stored: str | None, tmp_path: Path) -> None:
    model = trained(build("llama"), adapter_dtype="nf4")
    save_adapter(model, tmp_path / "a", dtype=stored)
    again = build("llama")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def test_what_storing_costs_is_what_reading_back_gives(tmp_path: Path) -> None:
    model = trained(build("llama"))
    ids = torch.arange(24).view(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    found = measure_rounding(model, [batch], "nf4")
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state_dict(model).items())
    save_adapter(model, tmp_path / "a", dtype="nf4")
    again = build("llama")
    load_adapter(again, tmp_path / "a")
    full, read = (logits(one)[:, :-1].double().log_softmax(-1).reshape(22, -1) for one in (model, again))
    targets = ids[:, 1:].reshape(-1, 1)
    assert found["loss"] == pytest.approx(-read.gather(1, targets).mean().item(), rel=1e-5)
    assert found["loss_float32"] == pytest.approx(-full.gather(1, targets).mean().item(), rel=1e-5)
    assert found["kl"] == pytest.approx((full.exp() * (full - read)).sum(-1).mean().item(), rel=1e-3)
    assert found["kl"] > 0


def test_biases_in_sixteen_bits_are_not_trained(tmp_path: Path) -> None:
    copy.deepcopy(build("gpt2")).to(torch.bfloat16).save_pretrained(tmp_path / "base")  # which notes the dtype
    module = FinetuneModule(str(tmp_path / "base"), bias="all", device="cpu")
    with pytest.raises(InputError, match="held in bfloat16.*model.dtype=float32"):
        module.configure_model()
    FinetuneModule(str(tmp_path / "base"), bias="all", device="cpu", dtype="float32").configure_model()


@pytest.mark.parametrize("saved", ["model.layers.0.self_attn", "model.layers.1", "mlp"])
def test_a_whole_block_of_a_sixteen_bit_base_can_be_trained(saved: str) -> None:
    base = build("llama").to(torch.bfloat16)
    expected = logits(base)
    inject_lora(base, rank=4, alpha=8, target_modules=["q_proj"], modules_to_save=[saved])
    found = logits(base.eval())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)  # its products are finer

"""The adapter folder is peft's: theirs opens here, ours opens there, and nothing is left out in silence.

pytest tests/test_adapter.py
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_inject import CAUSAL, Nets
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lorafit import adapter, files
from lorafit.adapter import CARD, CONFIG, PROVENANCE, WEIGHTS, base_fingerprint, load_adapter, save_adapter
from lorafit.checkpoint import load_checkpoint, save_checkpoint
from lorafit.errors import InputError
from lorafit.files import write_atomically, write_json
from lorafit.inject import inject_lora, lora_layers, lora_state_dict, mark_only_lora_as_trainable, merge_lora
from lorafit.loading import load_base_model

peft = pytest.importorskip("peft")

TinyLlama = Callable[..., LlamaForCausalLM]
IDS = torch.arange(24).view(2, 12)
ADAPTER = {"rank": 4, "alpha": 12}
EVERY_FILE = {CONFIG, WEIGHTS, PROVENANCE, CARD}


def trained(model: nn.Module, **options: Any) -> nn.Module:
    inject_lora(model, **(ADAPTER | options))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    extra = {"decoder_input_ids": IDS} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=IDS, **extra).logits


def build(family: str) -> Any:
    torch.manual_seed(0)
    if family == "t5":
        config = T5Config(vocab_size=96, d_model=64, d_kv=16, num_heads=4, num_layers=2, d_ff=128)
        return T5ForConditionalGeneration(config).eval()
    return AutoModelForCausalLM.from_config(CAUSAL[family][0]).eval()


@pytest.fixture
def saved(tiny_llama: TinyLlama, tmp_path: Path) -> Path:
    save_adapter(trained(tiny_llama()), tmp_path / "adapter", base_model="tiny")
    return tmp_path / "adapter"


@pytest.mark.parametrize("options", [{}, {"variant": "rslora", "dropout": 0.1, "target_modules": ["q_proj"]}])
def test_what_is_saved_and_loaded_is_exactly_what_was_trained(
    tiny_llama: TinyLlama, tmp_path: Path, options: dict[str, Any]
) -> None:
    model, other = trained(tiny_llama(), **options), tiny_llama().eval()
    save_adapter(model, tmp_path / "a")
    assert load_adapter(other, tmp_path / "a") == list(lora_layers(model))
    expected, found = lora_state_dict(model), lora_state_dict(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert torch.equal(logits(other), logits(model))
    one, two = next(iter(lora_layers(model).values())), next(iter(lora_layers(other).values()))
    assert (one.rank, one.alpha, one.variant, one.scaling) == (two.rank, two.alpha, two.variant, two.scaling)
    assert repr(one.dropout) == repr(two.dropout)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"variant": "rslora"}),
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}),
        ("llama", {"target_modules": r".*layers\.0\..*_proj"}),
        ("gpt2", {}),
        ("gpt2", {"target_modules": ["attn.c_proj"]}),
        ("gpt2", {"target_modules": ["attn.c_proj"], "variant": "rslora"}),
        ("gpt_neox", {}),
        ("opt", {}),
        ("t5", {}),
    ],
)
def test_peft_opens_our_folder_with_equal_logits(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, base = trained(build(family), **options), build(family)
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["fan_in_fan_out"] is (family == "gpt2")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    wrapped = [name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert [name.removeprefix("base_model.model.") for name in wrapped] == list(lora_layers(model))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_peft_opens_our_folder_over_a_four_bit_base(llama_folder: Path, tmp_path: Path) -> None:
    quant = {"type": "nf4", "compute_dtype": "float32"}
    model, base = (load_base_model(str(llama_folder), quant=quant, device="cpu").eval() for _ in range(2))
    trained(model)
    save_adapter(model, tmp_path / "a")
    base.is_loaded_in_4bit = True
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-3, atol=1e-3)
    record = json.loads((tmp_path / "a" / PROVENANCE).read_text())
    assert record["quant"] == {"type": "nf4", "double_quant": True, "block_size": 64, "compute_dtype": "float32"}
    assert record["quantized_modules"] == list(lora_layers(model))
    assert record["base_model"] == str(llama_folder)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_dropout": 0.1}),
        ("llama", {"target_modules": r".*layers\.0\..*_proj"}),
        ("llama", {"target_modules": ["q_proj", "query_key_value"], "init_lora_weights": "gaussian"}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_we_open_a_folder_that_peft_saved_with_equal_logits(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = build(family)
    theirs = peft.get_peft_model(build(family), peft.LoraConfig(r=4, lora_alpha=12, **options)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    assert (expected - logits(base)).abs().max() > 1e-2
    load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)


def test_names_in_the_configuration_say_exactly_what_is_wrapped(tmp_path: Path) -> None:
    model = Nets()
    inject_lora(model, **ADAPTER, target_modules=["blocks.0.up", "down"])
    save_adapter(model, tmp_path / "partly")
    partly = json.loads((tmp_path / "partly" / CONFIG).read_text())
    assert partly["target_modules"] == ["blocks.0.down", "blocks.0.up", "blocks.1.down"]
    # a name that is also the end of another's, and that layer left out: only an expression can say so
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "inner": nn.ModuleDict({"up": nn.Linear(8, 8)})})
    inject_lora(model, **ADAPTER, target_modules="up(?!.)")
    names = list(lora_layers(model))
    assert names == ["up"]
    save_adapter(model, tmp_path / "one")
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    assert config["target_modules"] == "up"
    theirs = nn.ModuleDict({"up": nn.Linear(8, 8), "inner": nn.ModuleDict({"up": nn.Linear(8, 8)})})
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "one")
    wrapped = [name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert wrapped == ["base_model.model.up"]
    again = nn.ModuleDict({"up": nn.Linear(8, 8), "inner": nn.ModuleDict({"up": nn.Linear(8, 8)})})
    assert load_adapter(again, tmp_path / "one", allow_other_base=True) == ["up"]


class Runs:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/nonexistent/folder",)


def change_config(**change: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | change
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def without_record(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    """As an adapter from elsewhere, of which no hash is known."""

    def both(folder: Path) -> None:
        (folder / PROVENANCE).unlink()
        damage(folder)

    return both


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Runs()}, folder / "adapter_model.bin")


def link_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def other_base(folder: Path) -> None:
    record = json.loads((folder / PROVENANCE).read_text())
    (folder / PROVENANCE).write_text(json.dumps(record | {"base_fingerprint": "0" * 64}))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), f"has no {CONFIG}"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read"),
        (lambda folder: (folder / CONFIG).write_text("[1]"), "peft_type is 'list'"),
        (truncate, "is damaged"),
        (without_record(truncate), "cannot be read as safetensors"),
        (
            without_record(change_tensors(lambda t: t.pop(FIRST))),
            "missing model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        (without_record(change_tensors(lambda t: t.update(extra=torch.zeros(3)))), "unused extra"),
        (change_tensors(lambda t: t.update(extra=torch.zeros(3))), "its SHA-256 is not the one"),
        (
            without_record(change_tensors(lambda t: t[FIRST].mul_(torch.nan))),
            "q_proj.lora_A.weight holds values that are not",
        ),
        (
            without_record(change_tensors(lambda t: t.update({FIRST: torch.zeros(4, 65)}))),
            r"is \(4, 65\), not \(4, 64\)",
        ),
        (change_config(r=8), r"q_proj.lora_A.weight is \(4, 64\), not \(8, 64\)"),
        (change_config(r=1_000_000), r"q_proj.lora_A.weight is \(4, 64\), not \(1000000, 64\)"),
        (change_config(peft_type="IA3"), "peft_type is 'IA3', only LORA"),
        (change_config(use_dora=True), "cannot apply: use_dora=True"),
        (change_config(bias="all"), "bias=all: LlamaForCausalLM has no such bias"),
        (change_config(bias="some"), "bias must be one of none, all, lora_only, got 'some'"),
        (change_config(rank_pattern={"q_proj": 2}), r"q_proj.lora_A.weight is \(4, 64\), not \(2, 64\)"),
        (change_config(rank_pattern={"q_proj": "2"}), "rank_pattern must be {name: positive integer}"),
        (change_config(rank_pattern={"q_proj": 10**6}), r"is \(4, 64\), not \(1000000, 64\)"),
        (change_config(modules_to_save=["lm_head"]), "missing lm_head.weight"),
        (change_config(modules_to_save="lm_head"), "modules_to_save must be a list of texts"),
        (change_config(exclude_modules=["q_proj"]), "unused model.layers.0.self_attn.q_proj.lora_A.weight"),
        (change_config(layers_to_transform=[1]), "unused model.layers.0.mlp.down_proj.lora_A.weight"),
        (change_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (change_config(invented_later=3), "cannot apply: invented_later=3"),
        (change_config(r=None), "r is missing"),
        (change_config(target_modules=None), "target_modules is missing"),
        (change_config(target_modules=["q_porj"]), "match no layer of this model"),
        (change_config(target_modules="q_proj"), "match no layer of this model"),
        (change_config(target_modules="q_proj("), "is no regular expression"),
        (change_config(target_modules={"q_proj": 1}), "target_modules must be a text or a list of texts"),
        (change_config(r="four"), "r must be a positive integer, got 'four'"),
        (change_config(lora_alpha=float("inf")), "lora_alpha must be a positive number"),
        (change_config(lora_dropout=2), r"lora_dropout must be in \[0, 1\)"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda folder: (folder / PROVENANCE).write_text("[]"), "holds no record of an adapter"),
        (pickled, "adapter_model.bin is a pickle"),
        (link_out, "is a link out of the folder"),
        (other_base, "was trained on another base"),
    ],
)
def test_a_folder_that_does_not_fit_is_an_error_and_leaves_the_model_as_it_was(
    saved: Path, tiny_llama: TinyLlama, damage: Callable[[Path], object], message: str
) -> None:
    model = tiny_llama().eval()
    model.model.norm.requires_grad_(False)
    before = [(name, id(module)) for name, module in model.named_modules()]
    trainable = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    expected = logits(model)
    damage(saved)
    with pytest.raises(InputError, match=message):
        load_adapter(model, saved)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == trainable
    assert torch.equal(logits(model), expected)


def test_a_failed_load_restores_a_shared_layer_under_both_names(tmp_path: Path) -> None:
    model = Nets()
    inject_lora(model, **ADAPTER)
    save_adapter(model, tmp_path / "a")
    without_record(change_tensors(lambda tensors: tensors.update(extra=torch.zeros(3))))(tmp_path / "a")
    other = Nets()
    with pytest.raises(InputError, match="unused extra"):
        load_adapter(other, tmp_path / "a")
    assert type(other.first) is nn.Linear
    assert other.first is other.second


def test_a_model_without_an_adapter_cannot_be_saved(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no LoRA layers to save"):
        save_adapter(tiny_llama(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_the_fingerprint_knows_the_base_and_not_the_adapter(
    llama_folder: Path, tiny_llama: TinyLlama, tmp_path: Path, quant: str | None
) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")

    def load(folder: Path) -> nn.Module:
        return load_base_model(str(folder), quant=quant, device="cpu")

    model, before = load(llama_folder), base_fingerprint(load(llama_folder))
    assert base_fingerprint(model) == before
    trained(model)
    assert base_fingerprint(model) == before
    mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    logits(model.eval())
    assert base_fingerprint(model) == before
    assert base_fingerprint(load(tmp_path / "other")) != before
    merge_lora(model)
    assert base_fingerprint(model) != before


def test_the_folder_holds_four_files_that_others_may_read(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == EVERY_FILE
    assert stat.S_IMODE(saved.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()} == {0o644}
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("broken", ["write_json", "model_card", "replace_folder"])
def test_a_save_that_fails_leaves_what_was_there_and_nothing_else(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, exists: bool
) -> None:
    model, folder = trained(tiny_llama()), tmp_path / "a"
    if exists:
        save_adapter(model, folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*")}
    nn.init.ones_(next(iter(lora_layers(model).values())).lora_B.weight)

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if exists else [])


@pytest.mark.parametrize("one_step", [True, False])
def test_a_new_adapter_replaces_the_old_one_and_keeps_files_of_others(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_step: bool
) -> None:
    if not one_step:  # a system without renameat2
        monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    model, folder = trained(tiny_llama()), tmp_path / "a"
    save_adapter(model, folder)
    (folder / "tokenizer.json").write_text("mine")
    nn.init.ones_(next(iter(lora_layers(model).values())).lora_B.weight)
    save_adapter(model, folder)
    assert {path.name for path in folder.iterdir()} == EVERY_FILE | {"tokenizer.json"}
    assert (folder / "tokenizer.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    other = tiny_llama().eval()
    load_adapter(other, folder)
    assert torch.equal(logits(other), logits(model))


def test_without_the_one_step_swap_a_failure_in_between_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "folder", tmp_path / "draft"
    for path in (old, new):
        path.mkdir()
        (path / "file").write_text(path.name)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        files.replace_folder(new, old)
    assert (old / "file").read_text() == "folder"


def test_an_adapter_is_not_saved_over_a_file(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        save_adapter(trained(tiny_llama()), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_the_card_and_the_record_hold_the_numbers_given(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    provenance = {
        "data": {"path": "cases.jsonl", "train_examples": 417},
        "metrics": {
            "before": {"loss": 2.3456, "exact_match": 0.125},
            "after": {"loss": 0.4321, "exact_match": 0.875},
            "retention": {"perplexity_adapter_off": 11.25, "perplexity_adapter_on": 11.75, "kl": 0.0625},
        },
        "broken": float("nan"),
    }
    model = trained(tiny_llama(), target_modules=["q_proj", "o_proj"], variant="rslora")
    save_adapter(model, tmp_path / "a", base_model="someone/tiny", provenance=provenance)
    card = (tmp_path / "a" / CARD).read_text()
    for part in (
        'base_model: "someone/tiny"',
        "Rank 4, alpha 12 (rsLoRA), on o_proj, q_proj.",
        "`cases.jsonl`: 417 examples",
        "| loss | 2.346 | 0.4321 |",
        "| exact_match | 0.125 | 0.875 |",
        "from 11.25 to 11.75 (KL divergence 0.0625 nats per token)",
    ):
        assert part in card
    record = json.loads((tmp_path / "a" / PROVENANCE).read_text())
    assert record["metrics"] == provenance["metrics"]
    assert record["broken"] is None
    assert record["base_fingerprint"] == base_fingerprint(model)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "file.json", {"a": [1, float("inf")]})
    assert json.loads((tmp_path / "deep" / "file.json").read_text()) == {"a": [1, None]}

    def fail(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "deep" / "file.json", fail)
    assert json.loads((tmp_path / "deep" / "file.json").read_text()) == {"a": [1, None]}
    assert os.listdir(tmp_path / "deep") == ["file.json"]


def test_a_checkpoint_is_read_as_data_and_never_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "good.ckpt", {"step": 3, "tensor": torch.ones(2)})
    assert load_checkpoint(tmp_path / "good.ckpt")["step"] == 3
    torch.save({"step": Runs()}, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "bad.ckpt")

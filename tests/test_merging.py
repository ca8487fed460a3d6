"""A merge writes what it measured, transformers opens it, and it can be undone bit for bit.

pytest tests/test_merging.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM, OPTConfig

from lorafit.adapter import load_adapter, save_adapter
from lorafit.errors import InputError
from lorafit.inject import adapter_modules, inject_lora, lora_layers, merge_lora
from lorafit.loading import load_base_model
from lorafit.merging import (
    Base,
    candidates,
    make_candidate,
    measure_merge,
    merged,
    merged_model,
    open_base,
    require_new,
    size,
    unmerge_folder,
    write_merged,
)
from lorafit.merging.undo import UNDO, from_ordered, ordered
from lorafit.quant import base_report, disarm_repacking, is_quantized
from lorafit.weights import INDEX, FileWeights

TinyLlama = Callable[..., LlamaForCausalLM]
IDS = torch.arange(24).view(2, 12)
ADAPTER: dict[str, Any] = {"rank": 4, "alpha": 8}
QUANTS = [None, "nf4", "fp4", "int8"]
HASH = "of the adapter"


@pytest.fixture
def make_folder(tiny_llama: TinyLlama, tmp_path: Path) -> Callable[..., Path]:
    """A model folder in bfloat16, of one of three families."""

    def make(family: str = "llama", **options: Any) -> Path:
        torch.manual_seed(0)
        model: Any
        if family == "llama":
            model = tiny_llama(**options)
        elif family == "gpt2":
            model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4))
        else:
            sizes = {"vocab_size": 96, "hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
            model = AutoModelForCausalLM.from_config(OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
        model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def disturb(model: nn.Module) -> nn.Module:
    """Fill an adapter as if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_A.weight, std=0.1)
            nn.init.normal_(layer.lora_B.weight, std=0.1)
        for module in adapter_modules(model).values():
            if hasattr(module, "trained"):
                for parameter in module.trained.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        for parameter, _ in getattr(model, "lorafit_biases", {}).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_adapter(folder: Path, quant: Any = None, **options: Any) -> Path:
    model = load_base_model(str(folder), quant=quant, device="cpu")
    inject_lora(model, **(ADAPTER | options))
    save_adapter(disturb(model), folder.parent / "adapter")
    return folder.parent / "adapter"


def opened(folder: Path, quant: Any = None, adapter: Path | None = None) -> Base:
    base = open_base(
        str(folder),
        quant=quant,
        load_whole=lambda quantized: load_base_model(str(folder), quant=quant if quantized else None, device="cpu"),
    )
    if adapter is not None:
        load_adapter(base.model, adapter)
    base.model.eval()
    return base


def write(base: Base, name: str, out: Path, **options: Any) -> dict[str, int]:
    given: dict[str, Any] = {"source": base.folder, "record": {"adapter_sha256": HASH}, "max_shard_bytes": 10**9}
    return write_merged(make_candidate(base, name), out, adapted=adapter_modules(base.model), **(given | options))


@torch.no_grad()
def logits(model: Any, mode: bool = False) -> Tensor:
    return model.train(mode)(input_ids=IDS).logits


def reopen(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    disarm_repacking(model)
    return model.eval()


def batch() -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS.clone()}


@pytest.fixture(scope="module")
def merged_in_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a merged folder of three files, its adapter)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("merged") / "base"
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    model.to(torch.bfloat16).save_pretrained(folder)
    adapter = make_adapter(folder)
    write(opened(folder, None, adapter), "original", folder.parent / "out", max_shard_bytes=7000)
    assert (folder.parent / "out" / "model-00001-of-00003.safetensors").is_file()
    return folder.parent / "out", adapter


# ------------------------------------------------------------------------------------------------ the base


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
def test_a_base_that_is_read_piece_by_piece_is_the_whole_one_bit_for_bit(
    make_folder: Callable[..., Path], quant: str | None, options: dict[str, Any]
) -> None:
    folder = make_folder(**options)
    base, whole = opened(folder, quant), load_base_model(str(folder), quant=quant, device="cpu")
    assert base.whole is None
    assert torch.equal(logits(base.model), logits(whole))
    one, other = base_report(base.model), base_report(whole)
    assert one is not None and one == other and one.fingerprint is not None


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_other_families_are_read_piece_by_piece_too(
    make_folder: Callable[..., Path], family: str, quant: str | None
) -> None:
    folder = make_folder(family)
    base, whole = opened(folder, quant), load_base_model(str(folder), quant=quant, device="cpu")
    assert torch.equal(logits(base.model), logits(whole))
    assert base_report(base.model) == base_report(whole)


def test_what_is_lent_is_there_for_a_call_and_nan_outside_of_it(make_folder: Callable[..., Path]) -> None:
    layer = opened(make_folder()).model.model.layers[0].mlp.up_proj
    assert layer.weight.shape == (128, 64) and layer.weight.isnan().all()
    assert layer.weight.untyped_storage().nbytes() == 2
    assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).isfinite().all()
    assert layer.weight.isnan().all()
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 3, dtype=torch.bfloat16))
    assert layer.weight.isnan().all()  # a call that fails leaves nothing behind


def test_files_with_other_names_are_loaded_whole(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.rotary.inv_freq"] = torch.ones(8)
    save_file(tensors, path, metadata={"format": "pt"})
    base = opened(folder, adapter=make_adapter(folder))
    assert base.whole is not None and "model.rotary.inv_freq" in base.whole
    candidate = make_candidate(base, "original")
    assert torch.equal(logits(merged_model(base, candidate)), logits(merge_lora(base.model)))


def test_a_checkpoint_with_names_that_transformers_changes_is_known_as_one(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = GPTNeoXConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    head = "embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight"
    tensors["embed_out.weight"] = tensors.pop(head)
    save_file(tensors, path, metadata={"format": "pt"})
    base = opened(tmp_path / "base", adapter=make_adapter(tmp_path / "base"))
    assert base.renamed == ("embed_out.weight", "lm_head.weight")
    write(base, "original", tmp_path / "out")
    reopen(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ candidates

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "untied": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "rslora": ("llama", {}, {"variant": "rslora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    "embedding": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "saved": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["lm_head", "norm"]}),
    "saved-linear": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp.up_proj"]}),
    "gpt2": ("gpt2", {}, {}),
    "bias": ("opt", {}, {"bias": "all"}),
    "lora-only": ("llama", {"attention_bias": True}, {"bias": "lora_only"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_transformers_opens_what_was_measured(
    make_folder: Callable[..., Path], tmp_path: Path, kind: str, quant: str | None
) -> None:
    family, options, adapter = KINDS[kind]
    folder = make_folder(family, **options)
    base = opened(folder, quant, make_adapter(folder, quant, **adapter))
    live, bare = logits(base.model), logits(opened(folder, quant).model)
    for candidate in candidates(base):
        found = logits(merged_model(base, candidate))
        # far nearer to the live adapter than to the base, whatever the rounding
        limit = 0.5 if candidate.name == "requantized" else 0.6 if candidate.name == "original" and quant else 0.1
        assert (found - live).float().norm() < limit * (live - bare).float().norm(), candidate.name
        write(base, candidate.name, tmp_path / candidate.name)
        again = reopen(tmp_path / candidate.name)
        assert torch.equal(logits(again), found), candidate.name


@pytest.mark.parametrize("quant", ["fp4", "int8", {"type": "nf4", "double_quant": False, "block_size": 32}])
def test_any_recipe_is_quantized_again_and_opens(make_folder: Callable[..., Path], tmp_path: Path, quant: Any) -> None:
    folder = make_folder()
    base = opened(folder, quant, make_adapter(folder, quant))
    found = {candidate.name: logits(merged_model(base, candidate)) for candidate in candidates(base)}
    assert list(found) == ["original", "dequantized", "requantized"]
    for name, expected in found.items():
        write(base, name, tmp_path / name)
        assert torch.equal(logits(reopen(tmp_path / name)), expected), name
    assert any(is_quantized(module) for module in reopen(tmp_path / "requantized").modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_original_is_the_merge_into_the_16_bit_model(
    make_folder: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = make_folder(family)
    adapter = make_adapter(folder, "nf4")
    write(opened(folder, "nf4", adapter), "original", tmp_path / "out")
    plain = load_base_model(str(folder), device="cpu")
    load_adapter(plain, adapter)
    expected = merge_lora(plain).state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("forwards", [0, 2])
def test_dequantized_is_the_merge_of_the_live_model_whatever_it_computed_before(
    make_folder: Callable[..., Path], quant: str, forwards: int
) -> None:
    folder = make_folder()
    adapter = make_adapter(folder, quant)
    fresh, base = load_base_model(str(folder), quant=quant, device="cpu"), opened(folder, quant, adapter)
    load_adapter(fresh, adapter)
    expected = merge_lora(fresh)
    for _ in range(forwards):
        logits(base.model)
    tensors = make_candidate(base, "dequantized").tensors
    for name, _ in lora_layers(base.model).items():
        assert torch.equal(tensors[f"{name}.weight"].make(), expected.get_submodule(name).weight), name


def test_the_repacking_that_is_kept_off_would_spoil_a_merge(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    base = opened(folder, "nf4", make_adapter(folder, "nf4"))
    layer = base.model.model.layers[0].mlp.up_proj.base_layer
    from bitsandbytes.functional import dequantize_4bit, has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("the fault is that of CPUs with AVX512-BF16")
    before = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    layer.support_avx512bf16_for_cpu = True
    logits(base.model)
    after = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert (after.reshape(before.shape) - before).norm() > 0.5 * before.norm()


def test_an_embedding_changed_alone_unties_the_model_and_says_so(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(tie_word_embeddings=True)
    assert "lm_head.weight" not in FileWeights(folder)
    base = opened(folder, adapter=make_adapter(folder, target_modules=["embed_tokens"]))
    write(base, "original", tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_candidate_that_there_is_not_is_refused_with_those_that_there_are(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    base = opened(folder, adapter=make_adapter(folder))
    assert [candidate.name for candidate in candidates(base)] == ["original"]
    with pytest.raises(InputError, match="is not quantized, so there is only original"):
        list(candidates(base, "requantized"))


# ------------------------------------------------------------------------------------------------ measuring


def test_measuring_is_the_definition_over_all_tokens(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    base = opened(folder, "nf4", make_adapter(folder, "nf4"))
    model = merged_model(base, make_candidate(base, "original"))
    base.model.train()
    live, tokens, numbers = measure_merge(base.model, {"original": model}, [batch()])
    assert base.model.training and tokens == 22
    targets = IDS[:, 1:].flatten()
    p = logits(base.model)[:, :-1].flatten(0, 1).float().log_softmax(-1)
    q = logits(model)[:, :-1].flatten(0, 1).float().log_softmax(-1)
    assert live == pytest.approx(-p[torch.arange(22), targets].mean().item(), rel=1e-3)
    found = numbers["original"]
    assert found["loss"] == pytest.approx(-q[torch.arange(22), targets].mean().item(), rel=1e-3)
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=2e-2)
    assert found["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item(), abs=0.05)


def test_a_merge_is_not_measured_on_nothing(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    base = opened(folder, adapter=make_adapter(folder))
    with pytest.raises(InputError, match=r"data\.eval_path"):
        measure_merge(base.model, {}, [])


# ------------------------------------------------------------------------------------------------ files


def test_shards_hold_what_one_file_holds(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder()
    base = opened(folder, "nf4", make_adapter(folder, "nf4"))
    for name in ("original", "requantized"):
        write(base, name, tmp_path / name / "one")
        write(base, name, tmp_path / name / "many", max_shard_bytes=40_000)
        one = load_file(tmp_path / name / "one" / "model.safetensors")
        index = json.loads((tmp_path / name / "many" / INDEX).read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        many = {key: tensor for file in files for key, tensor in load_file(tmp_path / name / "many" / file).items()}
        assert one.keys() == many.keys() == index["weight_map"].keys()
        assert all(torch.equal(one[key], many[key]) for key in one)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
        assert torch.equal(logits(reopen(tmp_path / name / "many")), logits(reopen(tmp_path / name / "one")))


def test_names_order_and_dtypes_are_those_of_the_checkpoint(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder()
    write(opened(folder, adapter=make_adapter(folder)), "original", tmp_path / "out")
    before, after = FileWeights(folder), FileWeights(tmp_path / "out")
    assert list(after) == list(before)
    assert all(after[name].dtype == before[name].dtype for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_cache"] == json.loads((folder / "config.json").read_text())["use_cache"]


def test_tokenizer_files_are_copied_and_code_and_pickles_are_not(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder()
    wanted = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "merges.txt"]
    for file in (*wanted, "tokenizer.py", "modeling_x.py", "pytorch_model.bin", "tokenizer.pt", "notes.txt"):
        (folder / file).write_text("{}")
    write(opened(folder, adapter=make_adapter(folder)), "original", tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    own = {"config.json", "generation_config.json", "model.safetensors", "lorafit.json", "README.md", UNDO}
    assert there == own | set(wanted)


def test_what_fails_half_way_leaves_nothing(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    base = opened(folder, adapter=make_adapter(folder))

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lorafit.merging.folder.copy_tokenizer", full)
    with pytest.raises(OSError, match="no space"):
        write(base, "original", tmp_path / "there" / "out")
    assert not list((tmp_path / "there").iterdir())


def test_out_must_be_named_and_new(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="out is not set"):
        require_new(None)
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="exists and is not empty"):
            require_new(str(taken))
    (tmp_path / "empty").mkdir()
    assert require_new(str(tmp_path / "empty")) == (tmp_path / "empty").resolve()


def test_out_that_cannot_be_made_is_refused_before_anything_is_loaded_and_trying_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    bad = [tmp_path / "file" / "out", "/proc/foo", "/proc/foo/bar", "~nobody-of-this-name/x", tmp_path / ("x" * 300)]
    for out in (*bad, "a\0b", tmp_path / "loop" / "x"):
        with pytest.raises(InputError, match="cannot be made") as error:
            require_new(str(out))
        assert "\n" not in str(error.value)
    for out in ("", "  "):
        with pytest.raises(InputError, match="out is empty: name a new folder"):
            require_new(out)
    assert require_new(str(tmp_path / "a" / "b")) == (tmp_path / "a" / "b").resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_out_inside_of_what_is_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for out in (tmp_path / "adapter", tmp_path / "adapter" / "deep" / "out", tmp_path / "x" / ".." / "adapter" / "y"):
        with pytest.raises(InputError, match="lies inside"):
            require_new(str(out), [tmp_path / "adapter"])
    require_new(str(tmp_path / "adapter-merged"), [tmp_path / "adapter"])


def test_sizes() -> None:
    assert (size("5GB"), size("500 MB"), size("3B")) == (5 * 10**9, 5 * 10**8, 3)
    for text in ("5", "GB", "0GB", "-1GB", "5gb"):
        with pytest.raises(InputError, match="5GB"):
            size(text)


# ------------------------------------------------------------------------------------------------ and back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ordered_numbers_are_neighbours_and_come_back(dtype: torch.dtype) -> None:
    values = torch.tensor([-torch.inf, -2.0, -1.0, -1e-7, -0.0, 0.0, 1e-7, 1.0, 2.0, torch.inf]).to(dtype)
    whole = ordered(values)
    assert (whole.diff() >= 0).all() and whole[4] + 1 == whole[5]
    assert torch.equal(from_ordered(whole, dtype).view(torch.uint8), values.view(torch.uint8))
    assert ordered(torch.nextafter(values[7:8], values[8:9])) == whole[7] + 1
    if dtype != torch.float32:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        assert torch.equal(from_ordered(ordered(every), dtype).view(torch.int16), every.view(torch.int16))
        assert len(ordered(every).unique()) == 2**16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("quant", "name"), [(None, "original"), ("nf4", "original"), ("nf4", "dequantized")])
def test_a_merge_is_undone_bit_for_bit(
    make_folder: Callable[..., Path], tmp_path: Path, kind: str, quant: str | None, name: str
) -> None:
    family, options, given = KINDS[kind]
    folder = make_folder(family, **options)
    adapter = make_adapter(folder, quant, **given)
    base = opened(folder, quant, adapter)
    candidate = make_candidate(base, name)
    written = write(base, name, tmp_path / "out")
    assert written["undo_bytes"] == (tmp_path / "out" / UNDO).stat().st_size
    unmerge_folder(tmp_path / "out", adapter, HASH, tmp_path / "back", 10**9)
    after = load_file(tmp_path / "back" / "model.safetensors")
    if name == "original":
        before = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8)) for key in before)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").eval()
        assert torch.equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()))
    else:
        assert candidate.before.keys() - after.keys() <= set(candidate.added)
        assert all(torch.equal(after[key], candidate.before[key].make()) for key in candidate.before if key in after)


def test_what_cannot_be_undone_is_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder()
    adapter = make_adapter(folder, "nf4")
    base = opened(folder, "nf4", adapter)
    write(base, "requantized", tmp_path / "again")
    with pytest.raises(InputError, match=r"has no undo\.lorafit"):
        unmerge_folder(tmp_path / "again", adapter, HASH, tmp_path / "back", 10**9)
    write(base, "original", tmp_path / "out")
    with pytest.raises(InputError, match="is not the one in"):
        unmerge_folder(tmp_path / "out", adapter, "another", tmp_path / "back", 10**9)
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 64
    path.write_bytes(content)
    with pytest.raises(InputError, match="does not come back"):
        unmerge_folder(tmp_path / "out", adapter, HASH, tmp_path / "back", 10**9)
    with pytest.raises(InputError, match="no folder"):
        unmerge_folder(tmp_path / "nowhere", adapter, HASH, tmp_path / "back", 10**9)
    assert not (tmp_path / "back").exists()


def test_one_bit_in_any_tensor_is_found_also_in_those_that_the_merge_left_alone(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder()
    adapter = make_adapter(folder)
    write(opened(folder, None, adapter), "original", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    intact = path.read_bytes()
    start = 8 + int.from_bytes(intact[:8], "little")
    header = json.loads(intact[8:start])
    places = {name: header[name]["data_offsets"] for name in header if name != "__metadata__"}
    assert places.keys() == FileWeights(folder).keys()
    for name, (_, end) in places.items():
        content = bytearray(intact)
        content[start + end - 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} does not come back as it was") as error:
            unmerge_folder(tmp_path / "out", adapter, HASH, tmp_path / "back", 10**9)
        assert "\n" not in str(error.value)
        assert sorted(found.name for found in tmp_path.iterdir()) == ["adapter", "base", "out"]
    path.write_bytes(intact)
    unmerge_folder(tmp_path / "out", adapter, HASH, tmp_path / "back", 10**9)


def test_only_the_model_is_called_safetensors(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder()
    write(opened(folder, None, make_adapter(folder)), "original", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "weights.safetensors")
    assert FileWeights(tmp_path / "out").keys() == FileWeights(folder).keys()


@pytest.mark.parametrize("file", ["config.json", INDEX, UNDO, "lorafit.json", "model-00001-of-00003.safetensors"])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"{}", b"1", b'"x"', b'{"weight_map": [], "model_type": "nothing"}']
    + [b'{"weight_map": {"x": "../x"}, "model_type": "llama", "hidden_size": "x"}', b'{"weight_map": {"x": 1}}']
    + [b'{"weight_map": {"x": "gone.safetensors"}, "model_type": 3}', (2).to_bytes(8, "little") + b"[]"]
    + [b'{"model_type": "llama", "num_attention_heads": 0}', b'{"model_type": "bert"}', b"\xff"],
)
def test_a_damaged_merged_folder_is_refused_in_one_line(
    merged_in_shards: tuple[Path, Path], tmp_path: Path, file: str, content: bytes | None
) -> None:
    out, adapter = tmp_path / "out", merged_in_shards[1]
    shutil.copytree(merged_in_shards[0], out)
    (out / file).unlink()
    if content is not None:
        (out / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        unmerge_folder(out, adapter, HASH, tmp_path / "back", 10**9)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("quant", QUANTS)
def test_within_merged_the_model_is_plain_and_afterwards_as_before(
    make_folder: Callable[..., Path], quant: str | None
) -> None:
    folder = make_folder(tie_word_embeddings=True)
    model = load_base_model(str(folder), quant=quant, device="cpu")
    load_adapter(model, make_adapter(folder, quant, modules_to_save=["norm"]))
    modules, before = dict(model.named_modules()), logits(model)
    with merged(model):
        assert not adapter_modules(model)
        assert (logits(model) - before).abs().max() < 0.05 * before.abs().max()
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    with pytest.raises(InputError, match="no adapter"), merged(nn.Linear(2, 2)):
        pass


# ------------------------------------------------------------------------------------------------ memory

MEMORY = """
import re, sys
from pathlib import Path
import torch
from lorafit.adapter import load_adapter
from lorafit.inject import adapter_modules
from lorafit.merging import candidates, measure_merge, merged_model, open_base, write_merged

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

folder, adapter, out, quant = sys.argv[1:]
before = most()
base = open_base(folder, quant=None if quant == "none" else quant, load_whole=None)
load_adapter(base.model, adapter)
found = {c.name: c for c in candidates(base)}
ids = torch.arange(24).view(2, 12)
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
measure_merge(base.model, {name: merged_model(base, c) for name, c in found.items()}, [batch])
for name, c in found.items():
    write_merged(c, Path(out, name), adapted=adapter_modules(base.model), source=base.folder, record={},
                 max_shard_bytes=10**9)
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process used")
@pytest.mark.parametrize(("quant", "share"), [("none", 1.0), ("nf4", 1.5)])
def test_a_merge_takes_less_memory_than_the_model(
    make_folder: Callable[..., Path], tmp_path: Path, quant: str, share: float
) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 8, "vocab_size": 4096}
    folder = make_folder(**sizes)
    adapter = make_adapter(folder)
    weights = (folder / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEMORY, str(folder), str(adapter), str(tmp_path / "out"), quant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < share * weights

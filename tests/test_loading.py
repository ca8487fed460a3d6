"""A model that is read tensor by tensor, or from its quantized copy, is the one that transformers reads whole.

pytest tests/test_loading.py
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_inject import CAUSAL
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.modeling_utils import PreTrainedModel

from lorafit import copies, loading, weights
from lorafit.errors import InputError
from lorafit.fingerprint import fingerprint_of
from lorafit.loading import load_base_model
from lorafit.quant import (
    BaseReport,
    Quantization,
    base_report,
    disarm_repacking,
    is_quantized,
    linear_layers,
    quant_state_tensors,
    quantize_model,
)
from lorafit.weights import Ahead, FileWeights

TinyLlama = Callable[..., LlamaForCausalLM]
CPU = torch.device("cpu")


@pytest.fixture
def every_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of quantized copies, of models of any size."""
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(copies, "SMALLEST", 0)
    return tmp_path / "cache" / "models"


def whole(folder: str | Path, quant: Any, dtype: torch.dtype | None = None) -> Any:
    """The model as transformers loads it, quantized when it is there."""
    recipe = Quantization.of(quant)
    wanted = dtype or (recipe.compute_dtype if recipe else "auto")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
    model.requires_grad_(False)
    model.lorafit_base = BaseReport(str(folder), recipe, fingerprint_of(model.named_parameters()))
    if recipe is not None:
        quantize_model(model, recipe, CPU, model.lorafit_base)
    disarm_repacking(model)
    model.config.use_cache = False
    return model.train()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def attributes(module: nn.Module) -> set[str]:
    return {name for name in vars(module) if not name.startswith("__")}


def assert_same_model(found: Any, expected: Any) -> None:
    """Two models hold the same in the same places, to the bit, and know the same of themselves."""
    modules = dict(expected.named_modules())
    assert [name for name, _ in found.named_modules()] == list(modules)
    for name, module in found.named_modules():
        assert (type(module), module.training) == (type(modules[name]), modules[name].training), name
        assert attributes(module) == attributes(modules[name]), name
    for kind in ("named_parameters", "named_buffers"):
        own = dict(getattr(found, kind)(remove_duplicate=False))
        theirs = dict(getattr(expected, kind)(remove_duplicate=False))
        assert list(own) == list(theirs)
        for name, tensor in own.items():
            other = theirs[name]
            assert type(tensor) is type(other), name
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride()), name
            assert not tensor.requires_grad and vars(tensor).keys() == vars(other).keys(), name
            assert torch.equal(bits(tensor), bits(other)), name
        shared = [[a is b for b in own.values()] for a in own.values()]
        assert shared == [[a is b for b in theirs.values()] for a in theirs.values()]
    states = [list(quant_state_tensors(model)) for model in (found, expected)]
    assert len(states[0]) == len(states[1])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*states, strict=True))
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert (found.name_or_path, found.dtype) == (expected.name_or_path, expected.dtype)
    ours, report = base_report(found), base_report(expected)
    assert ours is not None and report is not None
    assert (ours.quantized, ours.left, ours.quant) == (report.quantized, report.left, report.quant)
    assert ours.fingerprint == report.fingerprint
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        assert torch.equal(found.eval()(input_ids=ids).logits, expected.eval()(input_ids=ids).logits)
    found.train(), expected.train()


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
@pytest.mark.parametrize("family", CAUSAL)
def test_each_architecture_is_the_same_read_piece_by_piece(
    family: str, quant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_MAPPED", 2**12)  # small and large tensors, in a small model
    AutoModelForCausalLM.from_config(CAUSAL[family][0]).save_pretrained(tmp_path)
    loaded = load_base_model(str(tmp_path), quant=quant, device="cpu")
    assert_same_model(loaded, whole(tmp_path, quant))
    report = base_report(loaded)
    assert report is not None and report.whole is None
    assert bool(report.quantized) == bool(quant)


@pytest.mark.parametrize("quant", [None, "nf4", "fp4", "int8"])
def test_the_embedded_model_is_the_same_read_piece_by_piece(quant: str | None) -> None:
    model = load_base_model("embedded", quant=quant, device="cpu")
    assert_same_model(model, whole(loading.resolve("embedded"), quant))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_not_quantized_has_the_dtype_that_was_asked_for(llama_folder: Path, dtype: str) -> None:
    found = load_base_model(str(llama_folder), quant="nf4", dtype=dtype, device="cpu")
    expected = whole(llama_folder, "nf4", getattr(torch, dtype))
    if dtype == "float16":  # the checkpoint has more than that
        expected.lorafit_base.fingerprint = None
    assert_same_model(found, expected)


def test_a_checkpoint_in_several_files_is_read_from_all_of_them(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_model(load_base_model(str(tmp_path), quant="nf4", device="cpu"), whole(tmp_path, "nf4"))


def test_what_stays_in_sixteen_bits_is_a_view_of_the_file_that_outlives_it(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(llama_folder, {"type": "nf4", "compute_dtype": "float32"})
    monkeypatch.setattr(loading, "_MAPPED", 0)
    model = load_base_model(str(llama_folder), quant={"type": "nf4", "compute_dtype": "float32"}, device="cpu")
    if Path("/proc/self/maps").is_file():
        assert str(llama_folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    model.lm_head.weight[0, 0] += 1  # the view's own, and not the file's
    assert torch.equal(load_file(llama_folder / "model.safetensors")["lm_head.weight"], expected.lm_head.weight)
    model.lm_head.weight[0, 0] -= 1
    (llama_folder / "model.safetensors").unlink()
    (llama_folder / "config.json").unlink()
    expected.lm_head.weight[0, 0] += 1
    expected.lm_head.weight[0, 0] -= 1
    assert_same_model(model, expected)


def without_prefix(folder: Path) -> None:
    """As the inner model alone is saved: names without `model.`, and no head of its own."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_are_those_of_the_files_where_transformers_renames_them(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    without_prefix(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in FileWeights(tmp_path)
    model = load_base_model(str(tmp_path), quant="nf4", device="cpu")
    assert_same_model(model, whole(tmp_path, "nf4"))
    assert len(base_report(model).quantized) == 14


def test_the_head_of_an_older_gpt_neox_is_found_under_its_older_name(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CAUSAL["gpt_neox"][0]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = next(name for name in tensors if name.startswith(("embed_out", "lm_head")))
    tensors["embed_out.weight"] = tensors.pop(head)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(load_base_model(str(tmp_path), quant="nf4", device="cpu"), whole(tmp_path, "nf4"))


def test_experts_that_are_put_together_while_loading_are_left_to_transformers(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = load_base_model(str(tmp_path), quant="nf4", device="cpu")
    assert_same_model(model, whole(tmp_path, "nf4"))
    report = base_report(model)
    assert report is not None
    assert report.whole is not None and "put together" in report.whole
    assert any("experts" in name for name in report.left)


def test_a_layer_that_cannot_be_quantized_keeps_its_weight(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_copy: Path
) -> None:
    from lorafit import quant

    tiny_llama().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(quant, "reads_back_right", lambda layer: layer.in_features != 128)
    expected = whole(tmp_path / "model", "nf4")
    assert "in/out" in base_report(expected).left["model.layers.0.mlp.down_proj"]
    for copied in (False, True):
        model = load_base_model(str(tmp_path / "model"), quant="nf4", device="cpu", cache=True)
        assert bool(base_report(model).copy) == copied
        assert_same_model(model, expected)


def live_bytes() -> int:
    """Bytes of all tensors' memory in this process, each counted once."""
    with torch.no_grad():
        storages = {}
        for each in gc.get_objects():
            if issubclass(type(each), Tensor) and not each.is_meta:
                with contextlib.suppress(RuntimeError):  # what torch.compile traces with has no memory
                    storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_the_model_is_never_whole_in_sixteen_bits(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    tiny_llama(num_hidden_layers=8, hidden_size=256, intermediate_size=512).bfloat16().save_pretrained(tmp_path)
    files = FileWeights(tmp_path)
    largest = max(planned.nbytes for planned in files.values())
    matrices = sum(planned.nbytes for planned in files.values() if planned.nbytes > 2 * 96 * 256)
    real, most, calls = loading.quantized_layer, 0, 0

    def watched(linear: nn.Module, *rest: Any) -> Any:
        nonlocal most, calls
        layer, calls = real(linear, *rest), calls + 1
        if calls in (7, 28, 54):  # to look at all that is in memory takes its time
            most = max(most, live_bytes() - before)
        return layer

    monkeypatch.setattr(loading, "quantized_layer", watched)
    before = live_bytes()
    model = load_base_model(str(tmp_path), quant=quant, device="cpu")
    kept = live_bytes() - before
    assert base_report(model).whole is None
    assert calls == 56
    assert most <= kept + 6 * largest, "two that are read, and what quantizing one takes"
    assert kept + 6 * largest < matrices, "the whole model would not have passed"


def test_another_way_of_loading_in_transformers_is_noticed_and_reported(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PreTrainedModel._load_pretrained_model
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(lambda *a, **k: real(*a, **k)))
    model = load_base_model(str(llama_folder), quant="nf4", device="cpu")
    assert "this version of transformers" in str(base_report(model).whole)
    monkeypatch.undo()
    assert_same_model(model, whole(llama_folder, "nf4"))


def test_files_that_we_cannot_read_are_left_to_transformers(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(weights.DTYPES, "F32")
    model = load_base_model(str(llama_folder), quant="nf4", device="cpu")
    assert "piece by piece" in str(base_report(model).whole)
    assert_same_model(model, whole(llama_folder, "nf4"))


def test_a_model_of_the_hub_is_read_from_where_the_hub_keeps_it(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_copy: Path
) -> None:
    """The folders of huggingface_hub's cache: a name for a commit, and links to files that are named by their hash."""
    place, commit = tmp_path / "hub" / "models--someone--tiny", "1" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "blobs").mkdir()
    (place / "snapshots" / commit).mkdir(parents=True)
    for number, path in enumerate(llama_folder.iterdir()):
        blob = place / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        (place / "snapshots" / commit / path.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for copied in (False, True):
        model = load_base_model("someone/tiny", quant="nf4", device="cpu", cache=True)
        report = base_report(model)
        assert report is not None and report.whole is None
        assert bool(report.copy) == copied
        assert model.name_or_path == "someone/tiny"
        expected = whole(llama_folder, "nf4")
        assert report.fingerprint == base_report(expected).fingerprint
        for name, tensor in expected.state_dict().items():
            assert torch.equal(bits(tensor), bits(model.state_dict()[name])), name


def test_loading_draws_no_more_random_numbers_than_transformers(llama_folder: Path, every_copy: Path) -> None:
    states = []
    for load in (whole, *[lambda folder, quant: load_base_model(str(folder), quant=quant, cache=True)] * 2):
        torch.manual_seed(0)
        load(llama_folder, "nf4")
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_transformers_is_itself_again_after_a_load_and_after_a_failure(llama_folder: Path) -> None:
    before = PreTrainedModel.__dict__["_load_pretrained_model"]
    load_base_model(str(llama_folder), quant="nf4", device="cpu")
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is before
    path = llama_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base_model(str(llama_folder), quant="nf4", device="cpu")
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is before


# ------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("quant", ["nf4", "int8", {"type": "fp4", "double_quant": False, "block_size": 32}])
def test_a_quantized_copy_is_the_model_that_was_copied(llama_folder: Path, every_copy: Path, quant: Any) -> None:
    expected = whole(llama_folder, quant)
    for copied in (False, True, True):
        model = load_base_model(str(llama_folder), quant=quant, device="cpu", cache=True)
        assert_same_model(model, expected)
        assert bool(base_report(model).copy) == copied
    assert len(list(every_copy.iterdir())) == 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "falcon"])
def test_a_quantized_copy_holds_biases_and_transposed_layers(family: str, tmp_path: Path, every_copy: Path) -> None:
    AutoModelForCausalLM.from_config(CAUSAL[family][0]).save_pretrained(tmp_path / "model")
    for copied in (False, True):
        model = load_base_model(str(tmp_path / "model"), quant="nf4", device="cpu", cache=True)
        assert bool(base_report(model).copy) == copied
    assert_same_model(model, whole(tmp_path / "model", "nf4"))


def test_a_copy_is_read_without_quantizing_anything(
    llama_folder: Path, every_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)
    monkeypatch.setattr(loading, "quantized_layer", lambda *_: pytest.fail("a layer was quantized"))
    load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)


def test_no_copy_is_kept_unless_it_is_asked_for_and_worth_it(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)
    monkeypatch.setattr(copies, "SMALLEST", 0)
    load_base_model(str(llama_folder), quant="nf4", device="cpu")
    load_base_model(str(llama_folder), quant=None, device="cpu", cache=True)
    assert not (tmp_path / "cache").exists()


def touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def change_a_weight(folder: Path) -> None:
    """In place, as large as before, at the same time."""
    path = folder / "model.safetensors"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


@pytest.mark.parametrize("change", [touch, change_a_weight, change_config])
def test_a_model_that_changed_has_no_copy(llama_folder: Path, every_copy: Path, change: Callable[[Path], None]) -> None:
    load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)
    change(llama_folder)
    model = load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)
    assert base_report(model).copy is None
    assert_same_model(model, whole(llama_folder, "nf4"))


def test_another_recipe_has_a_copy_of_its_own(llama_folder: Path, every_copy: Path) -> None:
    recipes: list[tuple[Any, str | None]] = [
        ("nf4", None),
        ("fp4", None),
        ("int8", None),
        ({"type": "nf4", "double_quant": False}, None),
        ({"type": "nf4", "block_size": 128}, None),
        ({"type": "nf4", "compute_dtype": "float32"}, None),
        ("nf4", "float32"),
    ]
    for quant, dtype in recipes:
        model = load_base_model(str(llama_folder), quant=quant, dtype=dtype, device="cpu", cache=True)
        assert base_report(model).copy is None
    assert len(list(every_copy.iterdir())) == len(recipes)


def cut(content: bytes) -> bytes:
    return content[:-1000]


def flip_a_weight(content: bytes) -> bytes:
    return content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:]


def zeros(content: bytes) -> bytes:
    return content[:-4096] + bytes(4096)


def other_fingerprint(content: bytes) -> bytes:
    place = content.index(b"fingerprint") + 20
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def other_shape(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name.endswith("up_proj/weight"))
    header[name]["shape"] = header[name]["shape"][::-1]
    text = json.dumps(header).encode().ljust(length)
    assert len(text) == length or pytest.skip("the header is laid out otherwise")
    return content[:8] + text + content[8 + length :]


def nothing(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip_a_weight, zeros, other_fingerprint, other_shape, nothing])
def test_a_damaged_copy_is_not_trusted_and_is_written_again(
    llama_folder: Path, every_copy: Path, damage: Callable[[bytes], bytes]
) -> None:
    load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)
    (path,) = every_copy.glob("*/*.safetensors")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    model = load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)
    assert_same_model(model, whole(llama_folder, "nf4"))
    assert path.read_bytes() == good
    assert base_report(load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)).copy


def test_an_entry_that_was_made_of_something_else_is_not_taken(
    tiny_llama: TinyLlama, tmp_path: Path, every_copy: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for seed, folder in enumerate(folders):
        tiny_llama(seed=seed).save_pretrained(folder)
        load_base_model(str(folder), quant="nf4", device="cpu", cache=True)
    one, other = every_copy.glob("*/*.safetensors")
    one.write_bytes(other.read_bytes())
    copied = []
    for folder in folders:
        model = load_base_model(str(folder), quant="nf4", device="cpu", cache=True)
        copied.append(bool(base_report(model).copy))
        assert_same_model(model, whole(folder, "nf4"))
    assert sorted(copied) == [False, True]


def test_a_disk_without_room_is_said_and_stops_nothing(
    llama_folder: Path, every_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _: full)
    with caplog.at_level(logging.WARNING, logger="lorafit"):
        model = load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)
    assert "no quantized copy is kept" in caplog.text
    assert not list(every_copy.iterdir())
    assert_same_model(model, whole(llama_folder, "nf4"))


def test_a_cache_that_is_no_folder_is_said_and_stops_nothing(
    llama_folder: Path, every_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    every_copy.parent.write_text("a file")
    with caplog.at_level(logging.WARNING, logger="lorafit"):
        load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)
    assert "no quantized copy is kept" in caplog.text


def test_the_copy_that_was_not_used_for_longest_goes_first(
    llama_folder: Path, every_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quant in ("nf4", "fp4"):
        load_base_model(str(llama_folder), quant=quant, device="cpu", cache=True)
    sizes = [path.stat().st_size for path in every_copy.glob("*/*")]
    for path in every_copy.iterdir():
        os.utime(path, (1, 1))
    load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)  # used
    monkeypatch.setattr(copies, "LIMIT", 2 * max(sizes) + max(sizes) // 2)
    load_base_model(str(llama_folder), quant={"type": "nf4", "double_quant": False}, device="cpu", cache=True)
    assert len(list(every_copy.iterdir())) == 2
    assert base_report(load_base_model(str(llama_folder), quant="nf4", device="cpu", cache=True)).copy
    assert not base_report(load_base_model(str(llama_folder), quant="fp4", device="cpu", cache=True)).copy


# ------------------------------------------------------------------------------------------------ reading ahead


def test_work_is_done_ahead_by_one_and_in_memory_that_is_not_in_use() -> None:
    memory, begun = [0, 0], []

    def job(number: int) -> Callable[[int], tuple[int, int]]:
        def work(slot: int) -> tuple[int, int]:
            begun.append(number)
            memory[slot] = number
            return number, slot

        return work

    with Ahead((number, job(number)) for number in range(9)) as ahead:
        for number in (0, 1, 2, 5, 6):
            found = ahead.get(number)
            assert found is not None
            assert found[0] == number == memory[found[1]]
        assert ahead.get(3) is None
        assert ahead.get("unknown") is None
        assert max(begun) <= 7
        assert ahead.get(8) == (8, 0)
        assert ahead.get(8) is None


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for() -> None:
    def fail(_: int) -> int:
        raise InputError("it is cut")

    with Ahead([("a", fail), ("b", lambda slot: slot), ("c", fail)]) as ahead:
        with pytest.raises(InputError, match="it is cut"):
            ahead.get("a")
        assert ahead.get("b") == 1


def test_linear_layers_are_the_quantized_ones_after_loading(llama_folder: Path) -> None:
    model = load_base_model(str(llama_folder), quant="nf4", device="cpu")
    assert [name for name, layer in linear_layers(model).items() if is_quantized(layer)] == base_report(model).quantized

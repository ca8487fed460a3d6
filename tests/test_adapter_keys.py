"""What `adapter=DIR` alone says: the base, the data and the seed of the run that made it, and nothing that runs code.

pytest tests/test_adapter_keys.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

from lorafit import audit, evaluate, generate, merge, ranks, train
from lorafit.adapter import PROVENANCE, load_adapter, save_adapter
from lorafit.build import adapter_folders, load_adapted
from lorafit.config import compose, settings_to_record
from lorafit.errors import InputError
from lorafit.inject import inject_lora, lora_layers
from lorafit.loading import load_base_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as a run leaves it, of settings that are not the defaults."""
    config = compose(
        ["quant=nf4", "quant.block_size=128", "data.max_length=77", "seed=7", "rank=3", "data.train_on=all"]
    )
    model = load_base_model("embedded", quant={"type": "nf4", "block_size": 128}, device="cpu")
    inject_lora(model, rank=3, alpha=6, target_modules=["q_proj"])
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(model, folder, provenance={"settings": settings_to_record(config)})
    return folder


def change(folder: Path, **settings: Any) -> None:
    record = json.loads((folder / PROVENANCE).read_text())
    record["settings"] |= settings
    (folder / PROVENANCE).write_text(json.dumps(record))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_the_settings_of_the_run_hold_where_the_command_says_nothing(folder: Path) -> None:
    config = compose([f"adapter={folder}"])
    assert config.model.name == "embedded"
    assert config.quant is not None and config.quant.block_size == 128
    assert (config.data.max_length, config.data.train_on, config.seed) == (77, "all", 7)
    assert (config.rank, config.alpha) == (None, None)  # the adapter's own
    config = compose([f"adapter={folder}", "quant=none", "data.max_length=99", "seed=1", "rank=2"])
    assert config.quant is None
    assert (config.data.max_length, config.data.train_on, config.seed, config.rank) == (99, "all", 1, 2)


def test_a_choice_of_a_model_is_the_commands(folder: Path) -> None:
    config = compose([f"adapter={folder}", "model=qwen3-0.6b"])
    assert config.model.name == "Qwen/Qwen3-0.6B"


def test_the_adapter_is_loaded_over_the_base_it_knows(folder: Path) -> None:
    model = load_adapted(compose([f"adapter={folder}"]))
    assert next(iter(lora_layers(model).values())).rank == 3
    assert not model.training


def test_several_adapters_have_names(folder: Path, copy: Path) -> None:
    assert list(adapter_folders(compose([f"adapter=[{folder},{copy}]"]))) == [folder.parent.name, "copy"]
    assert adapter_folders(compose([f"adapter={{a: {folder}, b: {copy}}}"])) == {"a": folder, "b": copy}
    with pytest.raises(InputError, match="given twice"):
        adapter_folders(compose([f"adapter=[{copy},{copy},{copy}]"]))
    with pytest.raises(InputError, match="given twice"):
        adapter_folders(compose([f"adapter=[{copy},{folder},{copy.parent}/./copy]"]))
    with pytest.raises(InputError, match="'base' is the word for no adapter"):
        adapter_folders(compose([f"adapter={{base: {folder}}}"]))
    with pytest.raises(InputError, match="adapter is not set: give adapter=DIR"):
        adapter_folders(compose([]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"name": "${oc.env:HOME}"}}, "hold an interpolation"),
        ({"data": {"path": "${new_folder:evil}"}}, "hold an interpolation"),
        ({"data": {"max_length": "long"}}, "data.max_length must be an integer"),
        ({"quant": {"type": "nf5", "double_quant": True, "block_size": 64, "compute_dtype": "bfloat16"}}, "quant.type"),
        ({"quant": {"invented": 1}}, "no config key 'quant.invented'"),
        ({"model": {"name": "no/such/folder"}}, "model.name: no file or folder"),
        ({"data": "everything"}, "not sections of keys and values"),
    ],
)
def test_a_strangers_settings_are_read_as_data(copy: Path, settings: dict[str, Any], message: str) -> None:
    change(copy, **settings)
    with pytest.raises(InputError, match=message):
        compose([f"adapter={copy}"])
    assert not Path("evil").exists()


def test_a_strangers_settings_cannot_ask_for_remote_code(copy: Path) -> None:
    change(copy, model={"name": "embedded", "trust_remote_code": True})
    assert compose([f"adapter={copy}"]).model.trust_remote_code is False


def test_an_adapter_that_is_not_there_is_named_with_the_nearest(folder: Path) -> None:
    with pytest.raises(InputError, match="no folder .*Did you mean .*adapter"):
        compose([f"adapter={folder.parent}/adaptor"])
    with pytest.raises(InputError, match="has no adapter_config.json"):
        load_adapter(load_base_model("embedded", device="cpu"), folder.parent)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_kl=-1"], "max_kl must be zero or a positive number"),
        (["energy=1.5"], r"energy must be in \(0, 1\]"),
        (["merge.max_shard_size=5 apples"], "merge.max_shard_size must be like 5GB"),
        (["merge.candidate=best"], "merge.candidate must be one of auto"),
        (["save.dtype=int4"], "save.dtype must be one of float32"),
        (["generate.top_p=0"], "generate.top_p must be in"),
        (["generate.temperature=-0.5"], "generate.temperature must be zero"),
        (["combine.method=average"], "combine.method must be one of linear, cat, svd"),
        (["combine.weights=[a]"], "combine.weights must be a list of numbers"),
        (["rank_pattern={q_proj: 0}"], "rank_pattern: of 'q_proj' must be a positive integer, got 0"),
        (["alpha_pattern=[1]"], "alpha_pattern must be like"),
        (["bias=some"], "bias must be one of none, all, lora_only"),
        (["lora/adapter_dtype=int4"], "no choice 'int4' in config group 'lora/adapter_dtype'"),
        (["adapter=3"], "adapter must be a folder"),
    ],
)
def test_a_wrong_value_of_the_adapter_programs_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)


def test_an_adapter_is_called_by_its_folder_however_that_is_spelled(
    folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert list(adapter_folders(compose(["adapter=."]))) == [folder.parent.name]
    monkeypatch.chdir(copy)
    assert list(adapter_folders(compose(["adapter=."]))) == ["copy"]
    for parent in ("one", "copy", "base"):
        shutil.copytree(copy, copy.parent / parent / "copy")
    shutil.copytree(copy, copy.parent / "base" / "adapter")
    monkeypatch.chdir(copy.parent)
    # no two have one name, and none is called as the model without an adapter is
    found = adapter_folders(compose(["adapter=[one/copy,copy,copy/copy,base/adapter]"]))
    assert list(found) == ["copy", str(copy.resolve()), "copy/copy", "base/adapter"]


@pytest.mark.parametrize(
    ("program", "setting", "said"),
    [
        (evaluate, "prompt=x", "prompt belongs to generate; evaluate does not take it"),
        (evaluate, "out=x", "out belongs to merge, generate and ranks; evaluate does not take it"),
        (evaluate, "rank=2", "rank belongs to ranks; evaluate does not take it"),
        (evaluate, "energy=0.9", "energy belongs to ranks; evaluate does not take it"),
        (generate, "rank=2", "rank belongs to ranks; generate does not take it"),
        (generate, "energy=0.9", "energy belongs to ranks; generate does not take it"),
        (merge, "prompt=x", "prompt belongs to generate; merge does not take it"),
        (merge, "rank=2", "rank belongs to ranks; merge does not take it"),
        (merge, "energy=0.9", "energy belongs to ranks; merge does not take it"),
        (ranks, "prompt=x", "prompt belongs to generate; ranks does not take it"),
    ],
)
def test_a_setting_of_another_program_is_refused(
    program: Any, setting: str, said: str, folder: Path, tmp_path: Path
) -> None:
    code, _, err = run_program(program, f"adapter={folder}", f"hydra.run.dir={tmp_path}", setting)
    assert code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("program", [train, audit])
def test_a_program_that_makes_adapters_is_given_none(program: Any, folder: Path, tmp_path: Path) -> None:
    code, _, err = run_program(program, f"adapter={folder}", f"hydra.run.dir={tmp_path}", "logger=none", "rank=4")
    assert code == 2
    assert "belongs to merge, evaluate, generate and ranks" in err

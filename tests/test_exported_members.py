"""The public surface is one sorted list, each name is there, documented, and costs nothing until it is used.

pytest tests/test_exported_members.py
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lorafit


def imported_for_type_checkers() -> dict[str, str]:
    """What the TYPE_CHECKING block of lorafit/__init__.py says: name -> module."""
    tree = ast.parse(Path(lorafit.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_public_names_are_sorted_and_the_same_wherever_they_are_listed() -> None:
    assert lorafit.__all__ == sorted(set(lorafit.__all__))
    assert lorafit.__all__ == dir(lorafit)
    homes = {name: f"lorafit.{home}" for name, home in lorafit._HOME.items()}
    assert homes == imported_for_type_checkers()
    assert sorted(homes) == lorafit.__all__


def test_the_names_that_commands_and_readers_rely_on_are_public() -> None:
    assert set(lorafit.__all__) >= {
        *("LoRALinear", "inject_lora", "mark_only_lora_as_trainable", "count_parameters", "lora_state_dict"),
        *("load_lora_state_dict", "merge_lora", "dequantize", "load_base_model", "save_adapter", "load_adapter"),
        *("FinetuneModule", "FinetuneDataModule", "PagedOptimizerMemory"),
    }


@pytest.mark.parametrize("name", lorafit.__all__)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    member = getattr(lorafit, name)
    assert member.__name__ == name
    assert member.__module__.startswith(f"lorafit.{lorafit._HOME[name]}")
    assert inspect.getdoc(member)
    # its own words, not those of a base class
    assert member.__doc__


@pytest.mark.parametrize("name", ["LoRALinear"])
def test_the_methods_of_a_public_class_are_documented(name: str) -> None:
    member = getattr(lorafit, name)
    methods = {key for key, value in vars(member).items() if inspect.isfunction(value) and not key.startswith("_")}
    assert {key for key in methods - {"forward", "extra_repr"} if not vars(member)[key].__doc__} == set()


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lorafit' has no attribute 'inject_'"):
        _ = lorafit.inject_


def test_import_lorafit_and_its_errors_import_no_torch() -> None:
    code = (
        "import sys, lorafit; lorafit.InputError; "
        "print(sorted({'torch', 'transformers', 'lightning', 'bitsandbytes', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

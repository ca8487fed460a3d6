"""The house stands: a file imports from its own floor or one below, and each outside library lives where it belongs.

pytest tests/test_floors.py
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lorafit

PACKAGE = Path(lorafit.__file__).parent
FLOORS = {
    0: (
        *("cache", "copies", "data", "elementwise", "embedded", "errors", "files", "fingerprint", "terminal"),
        *("stopping", "redact"),
        *("fourbit", "loading", "quant", "rounding", "weights"),
    ),
    1: ("lora", "loss", "fused", "checkpointing", "splitting"),
    2: ("inject", "fastpath"),
    3: (
        *("adapter", "checkpoint", "optimizers", "diagnosis", "memory", "machine", "retention", "evaluation"),
        *("isolation", "merging", "serving", "combining", "spectrum"),
    ),
    4: ("module", "datamodule", "trainer", "group"),
    5: ("callbacks",),
    6: (
        *(
            "train",
            "training",
            "results",
            "build",
            "measuring",
            "config",
            "launch",
            "explain",
            "schema",
            "tables",
            "audit_page",
            "__main__",
        ),
        *("jobs", "sweep", "supervisor", "resuming", "recorded", "rescue", "exhausted", "reporting"),
        *("merge", "evaluate", "generate", "plan", "audit", "ranks", "report", "bench", "bench_table", "peers"),
    ),
}
FLOOR = {part: floor for floor, parts in FLOORS.items() for part in parts}
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [module for module in FILES if module != "lorafit"]


def imports(module: str) -> set[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide the floor"
            assert node.module is not None
            # `from lorafit import config` imports a module, `from lorafit.config import Config` a name
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & FILES.keys() or {node.module}
    return found


def part(module: str) -> str:
    return module.split(".")[1]


def own(module: str) -> set[str]:
    """The parts of lorafit that a file imports."""
    return {part(name) for name in imports(module) if name.startswith("lorafit.")}


def outside(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_nothing_from_a_higher_floor(module: str) -> None:
    assert part(module) in FLOOR, f"{module} has no floor yet"
    higher = {name for name in own(module) if FLOOR[name] > FLOOR[part(module)]}
    assert not higher


def test_parts_of_one_floor_do_not_import_each_other_in_a_circle() -> None:
    below = {name: set[str]() for name in FLOOR}
    for module in MODULES:
        below[part(module)] |= own(module) - {part(module)}
    while below:
        free = {name for name, needed in below.items() if not needed & below.keys()}
        assert free, f"a circle among {sorted(below)}"
        below = {name: needed for name, needed in below.items() if name not in free}


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("hydra", {"lorafit.config", "lorafit.explain", "lorafit.jobs", "lorafit.launch"}),
        ("omegaconf", {"lorafit.config", "lorafit.explain", "lorafit.jobs", "lorafit.schema"}),
        ("wandb", {"lorafit.callbacks.wandb"}),
        ("bitsandbytes", {"lorafit.quant"}),
        ("peft", {"lorafit.peers"}),
        ("trl", {"lorafit.peers"}),
        ("litgpt", {"lorafit.peers"}),
        ("unsloth", {"lorafit.peers"}),
        ("plotly", {"lorafit.reporting.charts"}),
    ],
)
def test_a_library_lives_in_one_file(library: str, homes: set[str]) -> None:
    assert {module for module in FILES if library in outside(module)} == homes


def test_lightning_is_known_on_the_upper_floors_only() -> None:
    users = {module for module in MODULES if outside(module) & {"lightning", "pytorch_lightning"}}
    assert "lorafit.module" in users
    assert all(FLOOR[part(module)] >= 4 for module in users)


def test_nothing_opens_a_pickle() -> None:
    for module, path in FILES.items():
        assert not outside(module) & {"pickle", "dill", "joblib", "cloudpickle"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", f"{module}:{node.lineno}"

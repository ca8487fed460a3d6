"""The workspace of scripts/dashboard.py: W&B's own models take it, and each of its charts shows what runs do log.

pytest tests/test_dashboard.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import run_program
from test_wandb import Told, only
from wandb_server import WandbServer

import lorafit.train

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import dashboard  # noqa: E402

pytest.importorskip("wandb_workspaces")


def run_dashboard(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python scripts/dashboard.py arguments` of somebody without a key."""
    env = {key: value for key, value in os.environ.items() if key not in ("WANDB_API_KEY", "WANDB_MODE")}
    command = [sys.executable, str(SCRIPTS / "dashboard.py"), *arguments]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What --dry-run writes for a sweep."""
    file = tmp_path_factory.mktemp("dashboard") / "workspace.json"
    # a proxy that leads nowhere: whatever went to the network would fail
    done = run_dashboard("--entity", "me", "--group", "ranks", "--dry-run", str(file), HTTPS_PROXY="http://127.0.0.1:1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return json.loads(file.read_text())


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object in nested JSON."""
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(value)


def panels(written: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for part in written["spec"]["section"]["panelBankConfig"]["sections"] for panel in part["panels"]]


def titles(written: dict[str, Any], kind: str) -> list[str]:
    return [panel["config"].get("chartTitle") for panel in panels(written) if panel["viewType"] == kind]


def shown(written: dict[str, Any]) -> dict[str, set[str]]:
    """What the workspace shows, by where it is found in a run: config, summary, history (patterns too), tables."""
    found: dict[str, set[str]] = {
        "config": set(),
        "summary": set(),
        "history": set(),
        "patterns": set(),
        "tables": set(),
    }

    def add(accessor: str) -> None:
        kind, _, name = accessor.partition(":")
        if kind == "config":  # the value of rank is at rank.value, that of quant.type at quant.value.type
            found["config"].add(name.replace(".value", "", 1))
        elif kind == "summary":
            found["summary"].add(name)

    for panel in panels(written):
        config, curves = panel["config"], panel["viewType"] == "Run History Line Plot"
        for axis in ("xAxis", "yAxis"):
            found["history"].add(config[axis]) if curves and axis in config else add(config.get(axis, ""))
        found["history" if curves else "summary"].update(config.get("metrics", ()))
        if "groupBy" in config:
            add(f"config:{config['groupBy']}")
        if "metricRegex" in config:
            found["patterns"].add(config["metricRegex"])
        for column in config.get("columns", ()):
            add(column["accessor"])
        if panel["viewType"] == "Weave":
            keys = [node["key"]["val"] for node in nodes(config) if isinstance(node.get("key"), dict)]
            found["tables"].update(keys)
    [runs] = written["spec"]["section"]["runSets"]
    for column in runs["runFeed"]["columnPinned"]:
        add(column.replace("config:rank", "config:rank.value"))
    return found


def test_wandbs_own_models_take_it_and_give_it_back(written: dict[str, Any]) -> None:
    from wandb_workspaces.workspaces import Workspace, internal

    view = internal.View.model_validate(written)
    assert view.model_dump(mode="json", by_alias=True, exclude_none=True) == written
    again = dashboard.to_json(Workspace._from_model(view))
    assert titles(again, "Scatter Plot") == titles(written, "Scatter Plot") and shown(again) == shown(written)


def test_it_holds_the_charts_by_which_a_rank_is_chosen(written: dict[str, Any]) -> None:
    axes = {(p["config"]["xAxis"], p["config"]["yAxis"]) for p in panels(written) if p["viewType"] == "Scatter Plot"}
    for pair in (
        ("config:rank.value", "summary:after/loss"),
        ("summary:parameters_trainable", "summary:after/loss"),
        ("config:rank.value", "summary:memory/peak_bytes"),
    ):
        assert pair in axes
    kinds = [panel["viewType"] for panel in panels(written)]
    assert {"Run Comparer", "Parallel Coordinates Plot", "Bar Chart", "Weave"} < set(kinds)
    assert shown(written)["tables"] == {"samples", "labels"}
    [parallel] = [p["config"]["columns"] for p in panels(written) if p["viewType"] == "Parallel Coordinates Plot"]
    assert [column["displayName"] for column in parallel][:4] == ["rank", "alpha", "learning rate", "quant"]
    assert all(p["config"]["xAxis"] == "trainer/global_step" for p in panels(written) if "Line" in p["viewType"])


def test_it_shows_one_sweep_or_all_runs(written: dict[str, Any]) -> None:
    def filters(view: dict[str, Any]) -> str:
        return json.dumps(view["spec"]["section"]["runSets"][0]["filters"])

    assert '"ranks"' in filters(written) and written["displayName"] == "ranks"
    everything = dashboard.to_json(dashboard.build("lorafit", "me"))
    assert '"group"' not in filters(everything) and everything["displayName"] == "lorafit"


def test_every_chart_shows_what_a_run_has_logged(written: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    given = (f"task.retention_path={tmp_path / 'general.txt'}", f"hydra.run.dir={tmp_path / 'run'}")
    code, _, said = run_program(lorafit.train, "experiment=smoke", "quant=nf4", *given)
    assert code == 0, said
    told = only(tmp_path / "run")
    keys, expected = logged(told), shown(written)
    for kind in ("config", "summary", "history", "tables"):
        assert expected[kind] and expected[kind] <= keys[kind], f"{kind}: {expected[kind] - keys[kind]}"
    assert len(expected["patterns"]) == 3
    for pattern in expected["patterns"]:
        assert any(re.fullmatch(pattern, key) for key in keys["history"]), pattern


def logged(told: Told) -> dict[str, set[str]]:
    """The names in a run, as `shown` has them."""

    def dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in tree.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from dotted(value, f"{prefix}{key}.")

    history = {key for row in told.history for key in row}
    return {
        "config": set(dotted(told.config)),
        "summary": set(told.summary),
        "history": history,
        "tables": {key.removesuffix("._type") for key in history if key.endswith("._type")},
    }


def test_it_is_saved_with_a_key_and_its_address_is_printed() -> None:
    with WandbServer() as server:
        asked: list[dict[str, Any]] = []
        answer = server.answer

        def remembering(method: str, path: str, body: bytes) -> dict[str, Any]:
            request = json.loads(body) if path == "/graphql" else {}
            if "upsertView" in request.get("query", ""):
                asked.append(request["variables"])
                return {"data": {"upsertView": {"view": {"id": "id", "name": "nw-abc-v"}, "inserted": True}}}
            return answer(method, path, body)

        server.answer = remembering  # type: ignore[method-assign]
        command = [sys.executable, str(SCRIPTS / "dashboard.py"), "--entity", "someone", "--name", "My ranks"]
        env = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(server.url) and "someone/lorafit?nw=abc" in done.stdout
    [view] = asked
    assert (view["displayName"], view["projectName"]) == ("My ranks", "lorafit")
    spec = json.loads(view["spec"])
    assert len(panels({"spec": spec})) == len(panels(dashboard.to_json(dashboard.build("lorafit", "someone"))))


def test_without_a_key_it_says_how_to_get_on(tmp_path: Path) -> None:
    done = run_dashboard("--entity", "me", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dashboard: no W&B key is known here. Run `wandb login`, or use --dry-run\n"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit) as ended:
        dashboard.main(["--entity", "me", "--dry-run"])
    assert ended.value.code == 2
    assert "pip install 'lorafit[dashboard]'" in capsys.readouterr().err

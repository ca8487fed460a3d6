"""Runs of Weights & Biases, read back with W&B's own tools and synced to a server that keeps all it is sent.

pytest tests/test_wandb.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from lightning.pytorch.loggers import CSVLogger
from test_callbacks import fit, module
from wandb_server import WandbServer

from lorafit.adapter import save_adapter
from lorafit.callbacks import PagedOptimizerMemory, StepMetrics
from lorafit.callbacks.norms import AdapterNorms, adapter_norms
from lorafit.callbacks.wandb import artifact_name, log_adapter, log_summary, wandb_logger
from lorafit.errors import DivergedError, InputError, Paused
from lorafit.inject import inject_lora, lora_layers
from lorafit.trainer import quiet_libraries

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import sync_wandb  # noqa: E402

QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


@pytest.fixture(autouse=True, scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    quiet_libraries()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("NETRC", str(tmp_path_factory.mktemp("netrc") / "none"))
        patch.delenv("WANDB_MODE", raising=False)
        yield


# ---------------------------------------------------------------------------------------------------- reading back


class Told:
    """What `wandb leet inspect` tells of an offline run."""

    def __init__(self, place: Path) -> None:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(place)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **QUIET})
        self.records = [json.loads(line) for line in said.stdout.splitlines()]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def run(self) -> dict[str, Any]:
        return self.all("run")[0]

    @property
    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self.run["config"]["update"].items() if key != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        return [record["item"] for record in self.all("history")]

    @property
    def summary(self) -> dict[str, Any]:
        return {key: value for record in self.all("summary") for key, value in record["update"].items()}

    @property
    def exit_codes(self) -> list[int]:
        return [record["exit_code"] for record in self.all("exit")]

    def points(self, key: str) -> dict[int, float]:
        """{step: value}; a step that comes twice is a failure."""
        found = [(row["trainer/global_step"], row[key]) for row in self.history if key in row]
        assert len({step for step, _ in found}) == len(found), f"{key}: a step comes twice in {found}"
        return dict(found)


def offline(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def only(folder: Path) -> Told:
    [place] = offline(folder)
    return Told(place)


# ---------------------------------------------------------------------------------------------------- a small sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two trained jobs of a sweep, and what is known of each: `folder`, and by rank `jobs`, `losses`, `ids`."""
    folder = tmp_path_factory.mktemp("sweeps") / "ranks of today"
    made = SimpleNamespace(folder=folder, jobs={}, losses={}, ids={})
    for rank in (2, 4):
        job, metrics, net = folder / f"rank={rank},quant=none", StepMetrics(every_n_steps=1), module(rank=rank)
        config = {"rank": rank, "quant": None, "optimizer": {"lr": 0.01}}
        tags = [f"rank={rank}", "quant=none"]
        with wandb_logger(job, config=config, name=job.name, group="ranks", tags=tags, sweep=folder) as logger:
            watching = (metrics, AdapterNorms(2), PagedOptimizerMemory(2))
            fit(net, job, *watching, logger=logger, max_steps=7, val_check_interval=3)
            save_adapter(
                net.model, job / "adapter", base_model="tiny", provenance={"metrics": {"after": {"loss": 1.5}}}
            )
            logger.log_table("samples", columns=["prompt", "after"], data=[["Name it.", f"rank {rank}"], ["é", "…"]])
            log_adapter(logger, job / "adapter")
            recorded = {"status": "completed", "model": {"parameters_trainable": 100 * rank, "quant": {"type": "nf4"}}}
            log_summary(logger, recorded | {"after": {"loss": 1.5}, "ladder": {"losses": {"1": 2.5}}})
            made.ids[rank] = logger.experiment.id
        made.jobs[rank], made.losses[rank] = job, dict(metrics.losses)
    return made


def test_each_run_of_a_sweep_holds_its_own_config_every_step_and_its_tables(sweep: SimpleNamespace) -> None:
    assert sweep.ids[2] != sweep.ids[4]
    for rank, job in sweep.jobs.items():
        told = only(job)
        assert told.config == {"rank": rank, "quant": None, "optimizer": {"lr": 0.01}}
        expected = {"run_id": sweep.ids[rank], "run_group": "ranks", "job_type": "train", "display_name": job.name}
        assert expected.items() <= told.run.items() and told.run["tags"] == [f"rank={rank}", "quant=none"]
        assert told.points("train/loss") == pytest.approx(sweep.losses[rank]) and len(sweep.losses[rank]) == 7
        for key, steps in {
            "eval/loss": [3, 6],
            "norm/B/model.layers.0.mlp.up_proj": [1, 2, 4, 6],
            "train/gradient_norm": [1, 2, 3, 4, 5, 6, 7],
        }.items():
            assert list(told.points(key)) == steps
        assert list(told.points("memory/optimizer_bytes")) == [1, 2, 4, 6, 7]
        [table] = [row for row in told.history if "samples.path" in row]
        content = json.loads((offline(job)[0] / "files" / table["samples.path"]).read_text())
        assert content["columns"] == ["prompt", "after"] and content["data"] == [
            ["Name it.", f"rank {rank}"],
            ["é", "…"],
        ]
        assert told.exit_codes == [0]


def test_the_summary_says_how_a_run_ended_and_what_it_came_to(sweep: SimpleNamespace) -> None:
    summary = only(sweep.jobs[4]).summary
    expected = {"status": "completed", "exit_code": 0, "parameters_trainable": 400, "quant": "nf4"}
    assert expected.items() <= summary.items()
    assert (summary["after/loss"], summary["ladder/1"]) == (1.5, 2.5)
    held_out = only(sweep.jobs[4]).points("eval/loss")
    assert summary["eval/loss"] == {"min": min(held_out.values()), "last": held_out[6]}


def test_a_sweep_shows_the_runs_of_its_jobs_where_leet_looks_for_them(sweep: SimpleNamespace) -> None:
    links = offline(sweep.folder)
    assert all(link.is_symlink() and not Path(os.readlink(link)).is_absolute() for link in links)
    assert {link.resolve() for link in links} == {offline(job)[0].resolve() for job in sweep.jobs.values()}
    assert {Told(link).run["run_id"] for link in links} == set(sweep.ids.values())


def test_without_links_a_run_lies_in_its_own_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with wandb_logger(tmp_path / "job", config={}, sweep=tmp_path) as logger:
        logger.log_metrics({"a": 1.0}, step=1)
    assert only(tmp_path / "job").points("a") == {1: 1.0} and not offline(tmp_path)


# ---------------------------------------------------------------------------------------------------- syncing


def synced(server: WandbServer, home: Path, *command: str, said: int = 0) -> str:
    """What a command that syncs has printed."""
    folders = {name: str(home) for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    hidden = ("WANDB_SILENT", "WANDB_SERVICE")
    env = {key: value for key, value in os.environ.items() if key not in hidden} | folders
    env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == said, done.stdout + done.stderr
    return done.stdout + done.stderr


def check_arrived(server: WandbServer, sweep: SimpleNamespace) -> None:
    """The server holds all of the sweep's runs: nothing less, nothing twice."""
    assert not server.unknown and set(server.runs) == set(sweep.ids.values())
    artifacts = {artifact.name: artifact for artifact in server.artifacts.values()}
    assert len(artifacts) == len(server.artifacts) == 4
    for rank, job in sweep.jobs.items():
        run, told = server.runs[sweep.ids[rank]], Told(offline(job)[0])
        assert (run.project, run.group, run.job_type, run.name) == ("lorafit", "ranks", "train", job.name)
        assert run.tags == [f"rank={rank}", "quant=none"] and run.exit_code == 0
        assert run.config == {"rank": rank, "quant": None, "optimizer": {"lr": 0.01}}
        assert [row["_step"] for row in run.history] == list(range(len(told.history)))
        losses = {row["trainer/global_step"]: row["train/loss"] for row in run.history if "train/loss" in row}
        assert losses == told.points("train/loss")
        # what is logged without a step is drawn where the run stood
        assert [row["trainer/global_step"] for row in run.history if "samples" in row] == [7]
        assert run.summary["after/loss"] == 1.5 and run.summary["status"] == "completed"
        table = json.loads(run.files[run.summary["samples"]["path"]])
        assert table["data"] == [["Name it.", f"rank {rank}"], ["é", "…"]]
        adapter = artifacts[f"rank-{rank}-quant-none-{run.id}"]
        assert (adapter.type, adapter.run, adapter.committed) == ("model", run.id, True)
        assert adapter.metadata == {"base_model": "tiny", "rank": rank, "alpha": 8, "after/loss": 1.5}
        assert adapter.files == {path.name: path.read_bytes() for path in (job / "adapter").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "lorafit.json"} == set(adapter.files)
        assert set(adapter.manifest["contents"]) == set(adapter.files)
        [rows] = artifacts[f"run-{run.id}-samples"].files.values()
        assert json.loads(rows)["data"] == table["data"]


def test_wandb_sync_brings_all_of_a_sweep_to_the_server(sweep: SimpleNamespace, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sweep.folder, tmp_path / "copy", symlinks=True))  # syncing leaves marks
    with WandbServer() as server:
        synced(server, tmp_path / "home", "-m", "wandb", "sync", *map(str, offline(copy)))
    check_arrived(server, sweep)


def test_a_sweep_on_another_machine_loses_no_file_of_an_artifact(sweep: SimpleNamespace, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sweep.folder, tmp_path / "copy", symlinks=True))
    away = sweep.folder.rename(sweep.folder.with_name("away"))  # the paths that were noted are no more
    try:
        with WandbServer() as plain:  # that is how wandb is: should it ever say so, the script is not needed
            synced(plain, tmp_path / "home", "-m", "wandb", "sync", *map(str, offline(copy)))
        assert not any(artifact.files for artifact in plain.artifacts.values())
        for mark in copy.rglob("*.wandb.sync*"):
            mark.unlink()
        with WandbServer() as server:
            said = synced(server, tmp_path / "home", sync_wandb.__file__, str(copy))
    finally:
        away.rename(sweep.folder)
    check_arrived(server, sweep)
    assert said.count("Finished syncing") == 2


def test_a_run_whose_files_are_gone_is_not_synced_in_silence(sweep: SimpleNamespace, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sweep.folder, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in copy.rglob("run-*.wandb")}
    for path in copy.rglob("staging/*"):
        path.unlink()
    away = sweep.folder.rename(sweep.folder.with_name("away"))
    try:
        with WandbServer() as server:
            said = synced(server, tmp_path / "home", sync_wandb.__file__, str(copy), said=2)
    finally:
        away.rename(sweep.folder)
    assert "files of artifacts are gone" in said and str(sweep.folder) in said
    assert not server.runs and {path: path.read_bytes() for path in before} == before


def test_a_dry_run_names_each_run_once_and_sends_nothing(sweep: SimpleNamespace, tmp_path: Path) -> None:
    with WandbServer() as server:
        said = synced(server, tmp_path, sync_wandb.__file__, str(sweep.folder), "--dry-run")
        assert said.splitlines() == sorted(str(offline(job)[0].resolve()) for job in sweep.jobs.values())
        said = synced(server, tmp_path, sync_wandb.__file__, str(tmp_path), said=2)
        assert f"no offline run below {tmp_path}" in said and not server.runs


def test_a_run_that_lies_where_it_was_made_is_not_rewritten(sweep: SimpleNamespace) -> None:
    [place] = offline(sweep.jobs[2])
    before = sync_wandb.log_of(place).stat()
    sync_wandb.mend(place)
    assert sync_wandb.log_of(place).stat() == before


@pytest.mark.parametrize("sizes", [[0], [1, 0, 5], [32747], [32754], [32755, 1], [32760, 3, 40000], [100000, 7, 65536]])
def test_records_are_written_as_they_are_read(sizes: list[int]) -> None:
    raws = [bytes([number % 251 for number in range(size)]) for size in sizes]
    data = b":W&B\xbe\xe1\x00" + b"".join(sync_wandb.chunks(raws))
    assert list(sync_wandb.read_records(data)) == raws
    assert list(sync_wandb.read_records(data[:-1])) == raws[:-1]  # half of the last one


def test_the_file_of_a_run_is_what_is_written_of_its_records(sweep: SimpleNamespace) -> None:
    data = sync_wandb.log_of(offline(sweep.jobs[4])[0]).read_bytes()
    raws = list(sync_wandb.read_records(data))
    assert len(raws) == len(only(sweep.jobs[4]).records)
    assert data[:7] + b"".join(sync_wandb.chunks(raws)) == data


# ---------------------------------------------------------------------------------------------------- how runs end


def test_two_runs_in_one_process_are_two_runs_and_a_failure_is_recorded(tmp_path: Path) -> None:
    ids = set()
    for rank, error, code, status in (
        (4, None, 0, None),
        (8, KeyError("lost"), 1, "failed"),
        (16, DivergedError("the loss of step 3 is nan"), 3, "diverged"),
        (32, Paused(), 0, None),
    ):
        folder = tmp_path / str(rank)
        try:
            with wandb_logger(folder, config={"rank": rank}, group="sweep", tags=["nf4"]) as logger:
                logger.log_metrics({"train/loss": float(rank)}, step=1)
                if error is not None:
                    raise error
        except type(error) as raised:  # type: ignore[misc]
            assert raised is error
        told = only(folder)
        ids.add(told.run["run_id"])
        assert told.config == {"rank": rank} and told.run["run_group"] == "sweep" and told.run["tags"] == ["nf4"]
        assert told.points("train/loss") == {1: float(rank)}
        assert told.exit_codes == [code] and told.summary["exit_code"] == code
        assert told.summary.get("status") == status
    assert "step 3" in only(tmp_path / "16").summary["error"]
    assert len(ids) == 4


def test_a_resumed_run_goes_on_in_the_same_run_and_no_step_comes_twice(tmp_path: Path) -> None:
    job = tmp_path / "job"
    with pytest.raises(KeyError), wandb_logger(job, config={"rank": 4}, sweep=tmp_path) as logger:
        for step in (1, 2, 3):
            logger.log_metrics({"train/loss": float(step), "x": float("nan")}, step=step)
        raise KeyError
    before = only(job)
    history = [{"step": 1, "train/loss": 1.0, "x": None}, {"step": 2, "train/loss": 2.0}]  # up to the checkpoint
    with wandb_logger(job, config={"rank": 4}, sweep=tmp_path, history=history) as logger:
        for step in (3, 4):
            logger.log_metrics({"train/loss": 10.0 * step}, step=step)
    told = only(job)
    assert told.run["run_id"] == before.run["run_id"] and told.exit_codes == [0]
    assert told.points("train/loss") == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}
    assert told.points("x") == {1: "NaN"} == {1: before.points("x")[1]}
    assert [link.resolve() for link in offline(tmp_path)] == offline(job)
    assert not (job / "wandb" / "replaced").exists()


def test_what_begins_anew_replaces_a_run_that_was_cut_off_but_not_one_that_ended_well(tmp_path: Path) -> None:
    ids = []
    for value in (1.0, 2.0, 3.0):
        try:
            with wandb_logger(tmp_path, config={}) as logger:
                logger.log_metrics({"a": value}, step=1)
                ids.append(logger.experiment.id)
                if value == 1.0:
                    raise KeyError
        except KeyError:
            pass
    assert ids[0] == ids[1] != ids[2]
    assert sorted((told.run["run_id"], told.points("a")[1]) for told in map(Told, offline(tmp_path))) == sorted(
        [(ids[1], 2.0), (ids[2], 3.0)]
    )


KILLED = """
import os, signal, sys, time
from lorafit.callbacks.wandb import wandb_logger
with wandb_logger(sys.argv[1], config={"rank": 4}, sweep=sys.argv[2]) as logger:
    for step in range(1, 101):
        logger.log_metrics({"train/loss": 1 / step}, step=step)
        time.sleep(0.02)
    os.killpg(0, signal.SIGKILL)  # and W&B's own process, as when the machine stops
"""


def test_a_killed_run_loses_its_last_points_at_most_and_writes_nothing_elsewhere(tmp_path: Path) -> None:
    job, home, here = tmp_path / "sweep" / "job", tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "XDG_"))}
    env |= {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(job), str(tmp_path / "sweep")]
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == -signal.SIGKILL and done.stdout == done.stderr == ""
    told = only(job)
    kept = told.points("train/loss")
    assert list(kept) == list(range(1, len(kept) + 1)) and 90 <= len(kept) <= 100
    assert told.config == {"rank": 4} and told.exit_codes == []
    assert not list(home.rglob("*wandb*")) and not list(here.iterdir())

    history = [{"step": step, "train/loss": 1 / step} for step in range(1, 76)]
    with wandb_logger(job, config={"rank": 4}, sweep=tmp_path / "sweep", history=history) as logger:
        for step in range(76, 101):
            logger.log_metrics({"train/loss": 1 / step}, step=step)
    again = only(job)
    assert again.run["run_id"] == told.run["run_id"]
    assert again.points("train/loss") == {step: 1 / step for step in range(1, 101)}
    assert [link.resolve() for link in offline(tmp_path / "sweep")] == offline(job)


def test_the_environment_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_CACHE_DIR")
    monkeypatch.delenv("WANDB_SILENT")
    before = {key: value for key, value in os.environ.items() if key.startswith("WANDB_") and key != "WANDB_SERVICE"}
    for mode in ("offline", "disabled"):
        with wandb_logger(tmp_path, config={}, mode=mode):
            assert os.environ.get("WANDB_CACHE_DIR", "").startswith(str(tmp_path)) == (mode == "offline")
        now = {key: value for key, value in os.environ.items() if key.startswith("WANDB_") and key != "WANDB_SERVICE"}
        assert now == before


def test_online_without_a_key_is_an_error_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("getpass.getpass", asked)
    with pytest.raises(InputError, match="wandb login"), wandb_logger(tmp_path, config={}, mode="online"):
        pass
    assert not list(tmp_path.glob("wandb/*run-*"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server at which this process is logged in."""
    import wandb

    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()  # it has read these when it was first used
        yield server
        wandb.teardown()


def test_a_key_that_the_server_does_not_know_is_wrong_input(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "answer", lambda *_: {"data": {"viewer": None}})
    with (
        pytest.raises(InputError, match="did not recognize.*offline"),
        wandb_logger(tmp_path, config={}, mode="online"),
    ):
        pass


def test_online_a_resumed_run_goes_on_in_the_run_that_the_server_has(tmp_path: Path, server: WandbServer) -> None:
    for history in ([], [{"step": 1, "a": 1.0}]):
        with wandb_logger(tmp_path, config={"rank": 4}, mode="online", history=history) as logger:
            logger.log_metrics({"a": 1.0 + len(history)}, step=1 + len(history))
    [run] = server.runs.values()
    assert [(row["trainer/global_step"], row["a"]) for row in run.history] == [(1, 1.0), (2, 2.0)]
    assert not server.unknown and run.exit_code == 0


def test_online_a_run_that_began_offline_is_told_from_its_beginning(tmp_path: Path, server: WandbServer) -> None:
    with pytest.raises(KeyError), wandb_logger(tmp_path, config={}) as logger:
        logger.log_metrics({"a": 1.0}, step=1)
        raise KeyError
    with wandb_logger(tmp_path, config={}, mode="online", history=[{"step": 1, "a": 1.0}]) as logger:
        logger.log_metrics({"a": 2.0}, step=2)
    [run] = server.runs.values()
    assert [(row["trainer/global_step"], row["a"]) for row in run.history] == [(1, 1.0), (2, 2.0)]
    assert not offline(tmp_path)


def test_disabled_leaves_no_run(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "a", "r": 1, "lora_alpha": 2}'
    )
    with wandb_logger(tmp_path / "run", config={}, mode="disabled", sweep=tmp_path) as logger:
        logger.log_metrics({"a": 1.0}, step=1)
        log_adapter(logger, tmp_path / "adapter")
        log_summary(logger, {"status": "completed"})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "adapter" / "adapter_config.json"]


def test_other_loggers_are_told_nothing_of_artifacts(tmp_path: Path) -> None:
    for logger in (None, CSVLogger(tmp_path)):
        log_adapter(logger, tmp_path / "no adapter")
        log_summary(logger, {"after": {"loss": 1.0}})
    assert not list(tmp_path.iterdir())


@given(name=st.none() | st.text(max_size=200), run_id=st.from_regex(r"[0-9a-f]{8}", fullmatch=True))
@settings(deadline=None, max_examples=200)
def test_every_run_has_an_artifact_name_that_wandb_takes(name: str | None, run_id: str) -> None:
    import wandb

    assert wandb.Artifact(artifact_name(name, run_id), type="model").name.endswith(run_id)
    assert len(artifact_name(name, run_id)) <= 128


# ---------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("adapter_dtype", ["float32", "int8", "nf4"])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_norms_are_those_of_the_full_matrices(tiny_llama: Any, adapter_dtype: str, variant: str) -> None:
    net = tiny_llama()
    targets = ["q_proj", "down_proj", "embed_tokens"]
    inject_lora(net, rank=4, alpha=8, variant=variant, adapter_dtype=adapter_dtype, target_modules=targets)
    for layer in lora_layers(net).values():
        torch.nn.init.normal_(layer.lora_A.weight)
        torch.nn.init.normal_(layer.lora_B.weight)
    norms = adapter_norms(net)
    assert len(norms) == 3 * len(lora_layers(net)) == 3 * 5
    for name, layer in lora_layers(net).items():
        assert norms[f"norm/A/{name}"] == pytest.approx(torch.linalg.norm(layer.lora_A.value()).item(), rel=1e-5)
        assert norms[f"norm/B/{name}"] == pytest.approx(torch.linalg.norm(layer.lora_B.value()).item(), rel=1e-5)
        assert norms[f"norm/update/{name}"] == pytest.approx(torch.linalg.norm(layer.delta_weight()).item(), rel=1e-5)


def test_looking_at_norms_changes_nothing(tmp_path: Path) -> None:
    states = []
    for number, every in enumerate((1, None)):
        net, logger = module(dropout=0.2), CSVLogger(tmp_path / str(number), name="", version="")
        torch.manual_seed(1)
        fit(net, tmp_path, AdapterNorms(every), logger=logger, max_steps=3)
        states.append({name: value.clone() for name, value in net.state_dict().items()} | {"": torch.get_rng_state()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not (tmp_path / "1" / "metrics.csv").exists() or "norm/" not in (tmp_path / "1" / "metrics.csv").read_text()


def test_every_logger_is_told_the_norms_after_the_first_step_and_every_so_many(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / name, name="", version="") for name in ("a", "b")]
    fit(module(), tmp_path, AdapterNorms(3), logger=loggers, max_steps=7, accumulate_grad_batches=2)
    for logger in loggers:
        logger.save()
        head, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        place = head.split(",").index("norm/B/model.layers.0.self_attn.q_proj")
        told = {int(line.split(",")[head.split(",").index("step")]): line.split(",")[place] for line in lines}
        assert [step for step, value in told.items() if value] == [1, 3, 6]
        assert all(float(value) > 0 for value in told.values() if value)

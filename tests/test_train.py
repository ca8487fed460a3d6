"""The program: what a run leaves behind, how it ends, and what wrong input is told.

pytest tests/test_train.py

All but one of the runs are in this process: starting Python and torch takes longer than they do.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from programs import run_program

from lorafit import train
from lorafit.adapter import load_adapter
from lorafit.checkpoint import load_checkpoint
from lorafit.embedded import MODEL, TEST
from lorafit.loading import load_base_model

SMALL = (
    "task.generate_examples=4",
    "task.eval_examples=8",
    "task.retention_path=general.txt",
    "callbacks.progress=false",
    "trainer.accelerator=cpu",
)
QUIET = (*SMALL, "logger=none")


def program(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m lorafit.train`, in this process."""
    return run_program(train, *arguments)


def prepare(folder: Path) -> None:
    (folder / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)


def metrics_of(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "metrics.json").read_text())


def adapter_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


# --- what a run leaves behind ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Four runs: rank 4 and 8, over a plain and an NF4 base."""
    folder = tmp_path_factory.mktemp("sweep")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        code, _, err = program(
            "-m",
            "rank=4,8",
            "quant=none,nf4",
            "trainer.max_steps=2",
            "hydra.sweep.dir=all",
            "logger.group=ours",
            *SMALL,
        )
        assert code == 0, err
        yield folder / "all"


JOBS = [(rank, quant) for rank in (4, 8) for quant in ("none", "nf4")]


def test_a_sweep_leaves_one_folder_per_job_named_after_what_differs(sweep: Path) -> None:
    folders = {path.name for path in sweep.iterdir() if path.is_dir()}
    assert folders == {*(f"rank={r},quant={q}" for r, q in JOBS), "wandb"}  # wandb: links to the runs of all


@pytest.mark.parametrize(("rank", "quant"), JOBS)
def test_every_run_leaves_the_whole_folder(sweep: Path, rank: int, quant: str) -> None:
    folder = sweep / f"rank={rank},quant={quant}"
    for name in (
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "adapter/lorafit.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "metrics.json",
        "samples.jsonl",
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "train.log",
    ):
        assert (folder / name).is_file() and (name == "train.log" or (folder / name).stat().st_size > 0), name
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and all(set(s) == {"prompt", "before", "after", "reference"} for s in samples)
    rows = [json.loads(line) for line in TEST.read_text().splitlines()[:4]]
    assert [(s["prompt"], s["reference"]) for s in samples] == [(r["prompt"], r["completion"]) for r in rows]


@pytest.mark.parametrize(("rank", "quant"), JOBS)
def test_metrics_hold_every_number_of_the_contract(sweep: Path, rank: int, quant: str) -> None:
    metrics = metrics_of(sweep / f"rank={rank},quant={quant}")
    contract = {
        "model": ("name", "architecture", "parameters_total", "parameters_trainable", "trainable_percent", "quant"),
        "lora": ("rank", "alpha", "target_modules", "variant", "modules_wrapped"),
        "data": ("train_examples", "eval_examples", "train_tokens", "supervised_tokens", "truncated_examples"),
        "before": ("loss", "perplexity", "exact_match"),
        "after": ("loss", "perplexity", "exact_match"),
        "retention": ("perplexity_adapter_off", "perplexity_adapter_on", "kl"),
        "speed": ("steps", "train_seconds", "tokens_per_second", "supervised_tokens_per_second"),
        "memory": (
            *("peak_bytes", "predicted_peak_bytes", "weights_bytes", "quant_state_bytes", "adapter_bytes"),
            *("gradient_bytes", "optimizer_bytes", "optimizer_paged_bytes"),
        ),
    }
    for part, keys in contract.items():
        assert not set(keys) - set(metrics[part]), part
    assert {"status", "seed", "versions", "config_sha256"} <= set(metrics)
    assert metrics["status"] == "completed" and metrics["seed"] == 42 and metrics["speed"]["steps"] == 2

    trainable = 4 * rank * (4 * (128 + 128) + 3 * (128 + 384))  # rank * (in + out) of each of 28 layers
    base = 1536 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 384) + 9 * 128
    assert metrics["model"]["parameters_trainable"] == trainable
    assert metrics["model"]["parameters_total"] == base + trainable  # logical ones, also in 4 bits
    assert metrics["lora"] | {"variant": "lora"} == {
        "rank": rank,
        "alpha": 2 * rank,
        "target_modules": "all_linear",
        "variant": "lora",
        "modules_wrapped": 28,
    }
    assert metrics["memory"]["adapter_bytes"] == metrics["memory"]["gradient_bytes"] == 4 * trainable
    assert (metrics["model"]["quant"] is None) == (quant == "none") == (metrics["memory"]["quant_state_bytes"] == 0)
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["after"]["perplexity"] == pytest.approx(math.exp(metrics["after"]["loss"]))


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_adapter_of_a_run_is_the_trained_one(sweep: Path, quant: str) -> None:
    folder = sweep / f"rank=8,quant={quant}"
    model = load_base_model("embedded", quant=quant, device="cpu")
    assert len(load_adapter(model, folder / "adapter")) == 28
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 2
    saved = adapter_of(folder)
    assert all(
        torch.equal(saved[f"base_model.model.{name}"], value) for name, value in checkpoint["state_dict"].items()
    )
    assert all(value.any() for value in saved.values())


def test_every_job_of_a_sweep_is_a_wandb_run_of_its_own(sweep: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    seen = {}
    for rank, quant in JOBS:
        [file] = (sweep / f"rank={rank},quant={quant}").glob("wandb/offline-run-*/run-*.wandb")
        raw, place, whole, found = file.read_bytes(), 7, b"", []
        while place + 7 <= len(raw):
            if (room := 32768 - place % 32768) < 7:
                place += room
                continue
            _, length, kind = struct.unpack("<IHB", raw[place : place + 7])
            chunk = raw[place + 7 : place + 7 + length]
            whole, place = chunk if kind in (1, 2) else whole + chunk, place + 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                found.append(record)
        run = next(record.run for record in found if record.HasField("run"))
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        seen[run.run_id] = (config["rank"], config["quant"]["type"] if config["quant"] else "none")
        assert run.run_group == "ours"
        assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]
        logged = {i.key or ".".join(i.nested_key) for record in found for i in record.history.item}
        assert {"train/loss", "memory/optimizer_bytes", "after/loss", "retention/kl"} <= logged
        assert any(key.startswith("samples") for key in logged)
    assert len(seen) == 4 and set(seen.values()) == set(JOBS)


def test_two_runs_of_one_command_are_one_result(sweep: Path) -> None:
    code, _, err = program("rank=4", "trainer.max_steps=2", "hydra.run.dir=again", *QUIET)
    assert code == 0, err
    first, second = adapter_of(sweep / "rank=4,quant=none"), adapter_of("again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_over_8_bit_gradients_accumulated_and_checkpointed_says_what_it_does(tmp_path: Path) -> None:
    code, out, err = program(
        *("quant=int8", "optimizer=adamw_8bit", "model.checkpointing=full", "trainer.accumulate_grad_batches=2"),
        *("data.batch_size=4", "trainer.max_steps=2", "hydra.run.dir=run", *SMALL, "logger=csv"),
    )
    assert code == 0, err
    assert "int8" in out and "AdamW8bit" in out and "163,840" in out
    assert metrics_of("run")["speed"]["steps"] == 2
    assert "train/loss" in (tmp_path / "run" / "csv" / "metrics.csv").read_text()


# --- wrong input ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and model folders with something wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "good.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Question {i}", "completion": f"{i}"}) + "\n" for i in range(30))
    )
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    (folder / "fields.jsonl").write_text('{"query": "a", "reply": "b"}\n')
    (folder / "weightless").mkdir()
    shutil.copytree(MODEL, folder / "endless")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / "weightless")
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "endless" / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copytree(MODEL, folder / "narrow")
    config = json.loads((MODEL / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "narrow" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("rank=0", "rank must be a positive integer, got 0"),
        ("rank=abc", "rank must be a positive integer, got 'abc'"),
        ("alpha=-1", "alpha must be a positive number, got -1"),
        ("quantt=nf4", "no config group 'quantt'. Did you mean 'quant'?"),
        ("quant=nf5", "no choice 'nf5' in config group 'quant'"),
        ("model.namee=x", "no config key 'model.namee'. Did you mean 'model.name'?"),
        ("dropout=1", "dropout must be in [0, 1), got 1"),
        ("target_modules=[v_porj]", "'v_porj' matches no linear layer of LlamaForCausalLM"),
        ("data.path=gone.jsonl", "no file or folder 'gone.jsonl'. Did you mean"),
        ("data.path=empty.jsonl", "'empty.jsonl' is empty"),
        ("data.path=broken.jsonl", "broken.jsonl:2: the line is not JSON"),
        ("data.path=fields.jsonl", "fields.jsonl:1: no format fits the fields 'query', 'reply'"),
        (
            "data.path=fields.jsonl|data.columns={prompt: query, completion: repyl}",
            "the row has no field 'repyl'; it has 'query', 'reply'. Did you mean 'reply'?",
        ),
        ("data.path=good.jsonl|data.max_length=2", "has a token to train within data.max_length=2: raise it"),
        ("model.name=weightless", "has no *.safetensors weights"),
        ("model.name=endless", "has no end token"),
        ("model.name=narrow|model.init=random", "the model knows 300 tokens: they do not belong together"),
        ("optimizer._target_=torch.optim.AdamV", "there is no optimizer 'torch.optim.AdamV'. Did you mean"),
        ("logger=wandb|logger.mode=online", "no W&B key is known here"),
        ("resume=nowhere", "resume: no folder 'nowhere'"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2_and_leaves_nothing(
    wrong: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, said: str
) -> None:
    monkeypatch.chdir(wrong)
    monkeypatch.setenv("NETRC", str(wrong / "no-netrc"))
    shutil.rmtree("run", ignore_errors=True)
    prepare(wrong)
    code, out, err = program(*QUIET, "hydra.run.dir=run", "trainer.max_steps=1", "data.limit=40", *overrides.split("|"))
    assert code == 2, err
    message = err.partition("lorafit train: ")[2]
    assert said in message and message.count("\n") == 1
    assert "Traceback" not in out + err
    left = {path.name for path in Path("run").rglob("*") if path.is_file()}
    assert not left & {"metrics.json", "adapter_model.safetensors", "last.ckpt"}
    assert not Path("run/adapter").exists()


def test_a_job_of_a_sweep_with_wrong_input_leaves_the_others_whole() -> None:
    code, _, err = program(
        "-m", "target_modules=[q_proj],[q_porj]", "trainer.max_steps=1", "hydra.sweep.dir=all", *QUIET
    )
    assert code == 2 and "'q_porj' matches no linear layer" in err and "Traceback" not in err
    ended = {metrics_of(path.parent)["status"]: path.parent for path in Path("all").rglob("metrics.json")}
    assert set(ended) == {"completed", "failed"}
    assert "'q_porj' matches no linear layer" in metrics_of(ended["failed"])["error"]
    assert not (ended["failed"] / "adapter").exists()


# --- other ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_that_diverges_ends_with_3_and_says_so(steps: int) -> None:
    code, out, err = program("optimizer.lr=1e30", f"trainer.max_steps={steps}", "hydra.run.dir=run", *QUIET)
    assert code == 3 and "Traceback" not in out + err
    assert err.count("lorafit train: ") == 1 and "Lower optimizer.lr" in err
    metrics = metrics_of("run")
    assert metrics["status"] == "diverged" and "finite" in metrics["error"] or "nan" in metrics["error"]
    assert metrics["before"]["loss"] > 0 and metrics["speed"]["steps"] >= 1
    assert not Path("run/adapter").exists()


def test_weights_from_which_the_last_steps_were_skipped_are_not_gone_on_with() -> None:
    """No step ends the run, the held-out loss after it does: the first bad step is that of the skipped ones."""
    command = ("optimizer.lr=1e30", "trainer.max_skipped_steps=9", "trainer.checkpoint_every_n_steps=1")
    code, _, err = program(*command, "trainer.max_steps=4", "hydra.run.dir=run", *QUIET)
    assert code == 3 and "held-out loss after training is not finite" in err, err
    assert "no checkpoint from before that" in err
    assert not Path("run/checkpoints/last.ckpt").exists()
    assert load_checkpoint("run/checkpoints/diverged.ckpt")["global_step"] == 1


def test_memory_that_runs_out_ends_with_4_and_says_what_lowers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.module import FinetuneModule

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(FinetuneModule, "training_step", exhausted)
    code, _, err = program("trainer.max_steps=1", "hydra.run.dir=run", *QUIET)
    assert code == 4 and "data.batch_size" in err and "Traceback" not in err
    assert metrics_of("run")["status"] == "out_of_memory"


def test_a_bug_is_recorded_and_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.module import FinetuneModule

    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(FinetuneModule, "training_step", broken)
    with pytest.raises(KeyError, match="a bug"):
        program("trainer.max_steps=1", "hydra.run.dir=run", *QUIET)
    assert metrics_of("run")["status"] == "failed" and "KeyError" in metrics_of("run")["error"]


def test_a_terminated_run_can_be_resumed_and_ends_as_the_unbroken_one() -> None:
    arguments = (*QUIET, "data.batch_size=4", "trainer.max_steps=60", "dropout=0.1", "rank=4")
    checkpointing = "trainer.checkpoint_every_n_steps=1"
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafit.train", *arguments, checkpointing, "hydra.run.dir=run"],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        checkpoint = Path("run/checkpoints/last.ckpt")
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert err.endswith("lorafit train: stopped by SIGTERM\n") and "Traceback" not in out + err
    metrics = metrics_of("run")
    steps = load_checkpoint(checkpoint)["global_step"]
    assert metrics["status"] == "interrupted" and 1 <= metrics["speed"]["steps"] == steps < 60
    assert not Path("run/adapter").exists()

    code, _, err = program("resume=run")  # the overrides are those of the run, and so is the folder
    assert code == 0, err
    assert metrics_of("run")["status"] == "completed" and metrics_of("run")["speed"]["steps"] == 60

    code, _, err = program(*arguments, "hydra.run.dir=whole")
    assert code == 0, err
    whole, resumed = adapter_of("whole"), adapter_of("run")
    assert {name for name in whole if not torch.equal(whole[name], resumed[name])} == set(), f"stopped at {steps}"
    assert metrics_of("whole")["after"] == metrics_of("run")["after"]


def test_a_run_of_other_settings_is_not_resumed_by_accident(sweep: Path) -> None:
    code, _, err = program(f"resume={sweep}/rank=4,quant=none", "rank=8", "logger.mode=disabled", "hydra.run.dir=other")
    assert code == 2 and "rank is 4 there, 8 here" in err and "Traceback" not in err
    other = (f"resume={sweep}/rank=4,quant=none", "rank=8", "logger.mode=disabled", "hydra.run.dir=other")
    code, _, err = program(*other, "allow_changed=[all]", "trainer.max_steps=4")
    assert code == 2 and "the adapter does not fit the model" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.accelerator=cuda", "trainer.accelerator=cuda: there is none on this machine"),
        ("scheduler.warmup=1000 trainer.max_steps=null trainer.max_epochs=1", "scheduler.warmup must be shorter"),
    ],
)
def test_what_cannot_work_is_said_before_training(override: str, said: str, tmp_path: Path) -> None:
    if "cuda" in override and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, _, err = program("logger=none", f"hydra.run.dir={tmp_path / 'run'}", *override.split())
    assert code == 2 and said in err and "Traceback" not in err

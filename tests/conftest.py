"""What every test stands on: a seed, no network, no strangers' folders, and a Llama that is built in a moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:  # with more threads than processors each waits for the others, spinning
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


def pytest_configure(config: pytest.Config) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # which nohup and a shell's & have programs ignore
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    # what our own modules warn about is a fault; what the libraries below warn about is theirs
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore::FutureWarning")
    config.addinivalue_line("filterwarnings", r"error:::lorafit(\..*)?")


# files that take minutes; begun last, one of them would run alone while the other processes have nothing left
_LONG = ("resuming", "sweep", "launchers", "bench", "supervisor", "merging", "notebooks", "train", "faults", "hostile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long = {f"test_{name}": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: long.get(item.path.stem, len(long)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def folders_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """wandb and the cache of tokens write beside the tests' own files, whatever the user's settings are."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            patch.setenv(name, str(folder))
        patch.setenv("LORAFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """A factory of random Llamas: hidden 64 and 128, so that blocks of 64 weights divide every row."""

    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **options: Any) -> LlamaForCausalLM:
        sizes = {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "use_cache": False,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(sizes | options)))

    return build


@pytest.fixture
def llama_folder(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained leaves it."""
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    return folder

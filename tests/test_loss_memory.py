"""The memory of the loss: a chunk of logits and no more, whatever the rows and the vocabulary, trained or measured.

pytest tests/test_loss_memory.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, PreTrainedModel

from lorafit import loss as loss_module
from lorafit.evaluation import evaluating
from lorafit.inject import inject_lora, mark_only_lora_as_trainable
from lorafit.loss import supervised_logits, supervised_loss

WIDTH, VOCABULARY, CHUNK, LENGTH = 32, 4000, 16, 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, attn_implementation="eager"),
    "cohere": CohereConfig(**SIZES),
}


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes: exact, and the same on every machine.

    Views of what is there already are no tensors of their own; those of the model's weights are known beforehand.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


def made(name: str, *, adapt_head: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).bfloat16()
    targets = ["q_proj", "lm_head"] if adapt_head else ["q_proj"]
    inject_lora(model, rank=2, alpha=4, target_modules=targets)
    mark_only_lora_as_trainable(model)
    return model


def batch(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def largest(model: PreTrainedModel, rows: int, training: bool) -> int:
    """Of the second pass: in the first it is found out what the model does after its head."""
    supervised_loss(model, batch(1))
    with Largest(model) as seen:
        if training:
            supervised_loss(model, batch(rows))[0].backward()
        else:
            with evaluating(model):
                supervised_loss(model, batch(rows))
    return seen.nbytes


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("adapt_head", [False, True], ids=["plain head", "adapted head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_tensor_is_larger_than_a_chunk_of_logits_in_float32(
    name: str, adapt_head: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: CHUNK)
    model = made(name, adapt_head=adapt_head)
    seen = [largest(model, rows, training) for rows in (2, 8)]
    assert seen[0] == seen[1]  # it does not grow with the rows
    assert CHUNK * VOCABULARY * 2 <= seen[0] <= CHUNK * VOCABULARY * 4
    # neither all logits, in whichever dtype, nor the head in float32 would go unseen
    assert seen[0] < 2 * (LENGTH - 1) * VOCABULARY * 2
    assert seen[0] < WIDTH * VOCABULARY * 4


def test_all_logits_at_once_would_be_seen() -> None:
    model = made("llama")
    with Largest(model) as seen, torch.no_grad():
        supervised_logits(model, batch(8))
    assert seen.nbytes == 8 * (LENGTH - 1) * VOCABULARY * 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_is_kept_between_forward_and_backward_is_as_wide_as_the_hidden_states(training: bool) -> None:
    """Autograd saves the gradient of the hidden states, and no tensor as wide as the vocabulary."""
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    hidden = torch.randn(500, WIDTH, requires_grad=training)
    saved: list[tuple[int, ...]] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss_module.linear_cross_entropy(hidden, head, torch.zeros(500, dtype=torch.long))
    assert saved == ([(500, WIDTH)] if training else [])

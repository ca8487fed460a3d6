"""The proof that packed examples do not see each other: given where it is true, refused wherever it is not.

pytest tests/test_isolation.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from lorafit.data import collate_packed
from lorafit.datamodule import FinetuneDataModule
from lorafit.errors import InputError
from lorafit.inject import inject_lora
from lorafit.isolation import measure_isolation, require_isolation
from lorafit.loading import load_base_model

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2}
# all with the cache on, as models come, and with places for no more than the row that is run
ISOLATED = {
    "llama": LlamaConfig(**WIDE),
    "mistral": MistralConfig(**WIDE, head_dim=16, sliding_window=5),
    "mixtral": MixtralConfig(**WIDE, head_dim=16, num_local_experts=4),
    "qwen3": Qwen3Config(**WIDE, head_dim=16),
    "phi3": Phi3Config(**WIDE, pad_token_id=0),
    "gemma3": Gemma3TextConfig(**WIDE, head_dim=16, sliding_window=5),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=128),
    "gpt2": GPT2Config(**SIZES, n_positions=64),
}
SEEING = {
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),  # takes position ids, and masks without them
    "falcon": FalconConfig(**SIZES),
    "bloom": BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4),  # takes none, and drops what it is given
    "mamba": MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2),  # a state that runs through the row
}


def sequences(*lengths: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": ids})
    return made


EXAMPLES = sequences(9, 12, 5, 40)


def build(config: Any, attention: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)


def refusal(model: nn.Module, examples: Sequence[Any] = EXAMPLES, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        require_isolation(model, examples, 0, "data.packing", **options)
    message = str(caught.value)
    assert message.startswith("data.packing") and "Take data.packing=false" in message and "\n" not in message
    return message


# --- where it is true -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ISOLATED)
def test_families_that_respect_position_ids_are_proven(name: str, attention: str, dtype: torch.dtype) -> None:
    model = build(ISOLATED[name], attention, dtype)
    for rows in (1, 2):
        found = require_isolation(model, EXAMPLES, 0, "data.packing", rows=rows)
        # not a bit moves: what is measured is no matter of rounding
        assert found.leak == 0.0 == found.noise < found.contaminated
        assert found.error < (1e-5 if dtype == torch.float32 else 2e-2)
        assert found.examples == 4 and found.sentence().startswith("proven on 4 examples")


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_the_embedded_model_is_proven_over_every_base_and_stays_as_it_was(quant: str | None) -> None:
    data = FinetuneDataModule(limit=60, eval_limit=4)
    data.setup()
    model = load_base_model("embedded", quant=quant, device="cpu")
    inject_lora(model, rank=4, alpha=8, dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    found = require_isolation(model, data.sample_for_packing(), 0, "data.packing")
    assert found.contaminated > 5 * found.allowed_leak and found.error <= found.tolerance
    assert (found.leak == 0.0) == (quant != "int8")  # of int8 the columns with outliers are those of the whole batch
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


SMOLLM = Path.home() / ".cache/lorafit-models/smollm2-135m-instruct"


@pytest.mark.skipif(not SMOLLM.is_dir(), reason="the model is not there")
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_real_model_is_proven_in_bfloat16_and_in_four_bits(quant: str | None) -> None:
    model = load_base_model(str(SMOLLM), quant=quant, device="cpu")
    found = require_isolation(model, sequences(20, 20), 0, "data.packing")
    assert model.dtype == torch.bfloat16 and found.leak == 0.0 and found.contaminated > 0.1


@pytest.mark.parametrize("lengths", [(1, 1), (1, 30), (30, 1), (2, 3, 1, 1, 4)], ids=str)
def test_examples_of_a_single_token_are_no_trouble(lengths: tuple[int, ...]) -> None:
    assert measure_isolation(build(ISOLATED["llama"]), sequences(*lengths), 0).problem() is None


def test_of_long_examples_the_beginnings_are_enough() -> None:
    seen = []
    model = build(ISOLATED["llama"])
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True)
    require_isolation(model, sequences(5000, 5000), 0, "data.packing")
    assert max(seen) <= 2 * 256


# --- where it is not ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEEING)
def test_families_that_see_through_are_refused(name: str, dtype: torch.dtype) -> None:
    """Of such small random models the leak is far below what rounding would excuse in the logits as a whole."""
    message = refusal(build(SEEING[name], dtype=dtype))
    assert "a packed example sees those before it" in message


class Llama(LlamaForCausalLM):
    """A Llama of which a test bends the inputs."""

    bend: Callable[[dict[str, Any]], None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.bend(kwargs)
        return super().forward(*args, **kwargs)


def bent(bend: Callable[[dict[str, Any]], None], dtype: torch.dtype = torch.float32, **options: Any) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**WIDE | {"num_hidden_layers": 4} | options)).to(dtype)
    model.bend = bend
    return model


def unbent(_: dict[str, Any]) -> None: ...


def without_positions(kwargs: dict[str, Any]) -> None:
    kwargs.pop("position_ids", None)


def with_the_cache(kwargs: dict[str, Any]) -> None:
    kwargs["use_cache"] = True


def with_a_mask(kwargs: dict[str, Any]) -> None:
    kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bend", [without_positions, with_the_cache, with_a_mask])
def test_a_model_that_sees_through_is_refused(bend: Callable[[dict[str, Any]], None], dtype: torch.dtype) -> None:
    assert "a packed example sees those before it" in refusal(bent(bend, dtype))


def test_attention_that_parts_examples_in_a_single_row_alone_is_proven_for_a_single_row_alone() -> None:
    """As flash attention does: it takes position ids for packing only where the batch is one row."""

    def bend(kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[0] > 1:
            kwargs.pop("position_ids", None)

    assert "data.padding_free=true" in refusal(bent(bend))
    assert measure_isolation(bent(bend), EXAMPLES, 0, rows=1).leak == 0.0


def leaking(model: LlamaForCausalLM, layer: int, allowed: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let one layer see more than its own example: the places (query, key) for which `allowed` is true."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        length = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]
        mask = kwargs["attention_mask"]
        if mask is not None:
            places = torch.arange(length)
            more = allowed(places[:, None], places[None, :]) & (places[:, None] >= places[None, :])
            mask = mask | more if mask.dtype == torch.bool else mask.masked_fill(more, 0.0)
        return args, kwargs | {"attention_mask": mask}

    model.model.layers[layer].self_attn.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("what", ["one layer", "the last token before"])
def test_the_smallest_leak_is_refused(what: str, attention: str, dtype: torch.dtype) -> None:
    """One of four layers sees the whole row, or every place sees the one before it, which matters to the first token
    of an example alone."""
    model = bent(unbent, dtype, attn_implementation=attention)
    assert measure_isolation(model, EXAMPLES, 0).leak == 0.0
    leaking(model, 3, (lambda q, k: q >= k) if what == "one layer" else (lambda q, k: q == k + 1))
    assert "a packed example sees those before it" in refusal(model)


def test_a_leak_may_be_less_than_rounding_as_a_whole() -> None:
    """Why it is not enough to hold the logits packed against those alone."""
    found = measure_isolation(build(SEEING["bloom"], dtype=torch.bfloat16), EXAMPLES, 0)
    assert found.leak > 100 * found.allowed_leak and found.error <= found.tolerance


def test_examples_at_wrong_places_are_refused() -> None:
    """A model that knows places by number, and is told other ones: nothing is seen, and nothing is as alone."""

    class Shifted(type(build(ISOLATED["gpt2"]))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = (kwargs["position_ids"] + 7) % 64
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    assert "so they do not stand at the places they have alone" in refusal(Shifted(ISOLATED["gpt2"]), sequences(4, 4))


def test_a_model_that_takes_no_position_ids_is_refused() -> None:
    class Simple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(ISOLATED["llama"])

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    assert "Simple cannot run a packed row (" in (message := refusal(Simple())) and "position_ids" in message


def test_logits_that_are_no_numbers_are_no_proof() -> None:
    model = build(ISOLATED["llama"])
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    assert "not finite" in refusal(model)


def test_a_model_that_could_not_show_a_leak_is_refused() -> None:
    """Without attention each place is alone, and a leak elsewhere would not be seen."""
    model = build(ISOLATED["llama"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert "the same logits whether they see each other or not" in refusal(model)


def test_a_single_example_is_no_proof() -> None:
    with pytest.raises(InputError, match="data.padding_free cannot be proven with a single .* data.padding_free=false"):
        require_isolation(build(ISOLATED["llama"]), EXAMPLES[:1], 0, "data.padding_free", rows=1)


def test_what_is_measured_is_what_packed_training_runs() -> None:
    """The packed row of the proof is a batch of the loader's kind, without a mask and without a cache."""
    seen: list[dict[str, Any]] = []
    model = build(ISOLATED["llama"])
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(dict(inputs)), with_kwargs=True)
    require_isolation(model, EXAMPLES, 0, "data.packing")
    batch = collate_packed([EXAMPLES, EXAMPLES], 0)
    assert seen[0].keys() == {"input_ids", "position_ids", "use_cache"} <= batch.keys() | {"use_cache"}
    assert seen[0]["use_cache"] is False and seen[0]["input_ids"].shape[0] == 2

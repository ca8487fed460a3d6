"""A model whose large weights are lent to it: read or computed when a layer is called, and dropped after.

`skeleton` builds the modules of a model without its weights, and `lend_weights` gives it those of a `Weights`. What is
small is put there for good. A linear layer or an embedding holds a placeholder of the right shape, dtype and device
that takes two bytes and is NaN throughout, so that whatever looks at it outside of a call is heard; for the length
of a call it holds its weight. As the layer itself does the work, the results are those of the whole model, bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorafit.errors import InputError
from lorafit.quant import is_linear, is_quantized, linear_layers
from lorafit.weights import Planned, Weights


def skeleton(
    config: Any, dtype: torch.dtype | None, *, attention: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The causal language model of a configuration, on the meta device but for the buffers that are computed."""
    config = copy.deepcopy(config)
    options: dict[str, Any] = {} if attention in (None, "auto") else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or torch.float32, trust_remote_code=trust_remote_code, **options
        )
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False  # as load_base_model does: packed examples would see each other through it
    return model


def aliases(model: Any) -> dict[str, str]:
    """{name: first name} of the parameters and buffers that a model keeps under several names."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            found[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return found


def place_of(weights: Weights, name: str, tied: dict[str, str]) -> str | None:
    """The name under which weights hold what the model calls `name`, if they do."""
    root = tied.get(name, name)
    together = [name, root, *(other for other, of in tied.items() if of == root)]
    return next((each for each in together if each in weights), None)


def lend_weights(model: Any, weights: Weights, dtype: torch.dtype | None = None) -> None:
    """Give a skeleton its weights, as `dtype` where they are floating and it is given; large ones for each call only.

    Layers that are quantized already are left as they are. Raises InputError for a weight that is missing.
    """
    lendable = {id(module) for module in linear_layers(model).values()}
    lendable |= {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    tied, persistent = aliases(model), set(model.state_dict())
    lent: set[int] = set()
    for prefix, module in list(model.named_modules(remove_duplicate=False)):
        if is_quantized(module):
            continue
        for kind in (module._parameters, module._buffers):
            for leaf in list(kind):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if name not in persistent or kind[leaf] is None or (id(module), leaf) in lent:
                    continue
                place = place_of(weights, name, tied)
                if place is None:
                    raise InputError(f"the weights of {type(model).__name__} lack {name}")
                planned = weights[place]
                if planned.shape != tuple(kind[leaf].shape):
                    raise InputError(f"{place} is {planned.shape}, the model's is {tuple(kind[leaf].shape)}")
                if leaf == "weight" and id(module) in lendable:
                    _lend(module, as_dtype(planned, dtype))
                    lent.add((id(module), leaf))  # type: ignore[arg-type]
                else:
                    tensor = as_dtype(planned, dtype).make()
                    is_parameter = kind is module._parameters
                    kind[leaf] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def as_dtype(planned: Planned, dtype: torch.dtype | None) -> Planned:
    if dtype is None or not planned.dtype.is_floating_point or planned.dtype == dtype:
        return planned
    return Planned(dtype, planned.shape, lambda: planned.make().to(dtype))


def _lend(module: Any, planned: Planned) -> None:
    nothing = torch.full((1,), torch.nan, dtype=planned.dtype).expand(planned.shape)
    placeholder = nn.Parameter(nothing, requires_grad=False)
    module._parameters["weight"] = placeholder
    module.lent_weight = planned

    # a copy of the module keeps these hooks, but has a weight of its own
    def lend(called: Any, _: Any) -> None:
        if called is module:
            called._parameters["weight"] = nn.Parameter(planned.make(), requires_grad=False)

    def take_back(called: Any, *_: Any) -> None:
        if called is module:
            called._parameters["weight"] = placeholder

    module.register_forward_pre_hook(lend)
    module.register_forward_hook(take_back, always_call=True)


def only_multiplies(model: Any) -> bool:
    """Whether every linear layer has the forward of its kind, so that nothing looks at a weight before it is lent."""
    plain = (nn.Linear.forward, Conv1D.forward)
    return all(type(module).forward in plain for module in model.modules() if is_linear(module))

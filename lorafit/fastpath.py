"""Which modules of a model take the fast path of fused.py, and which run as they are written down, and why.

    paths = take_fast_path(model)         {name of a LoRA layer: "q/k/v together" | … | "plain: why"}
    leave_fast_path(model)

A module takes it by becoming an instance of a subclass of its own class that has another `forward`, as PyTorch's fully
sharded modules do: its parameters, names and place stay, `isinstance` holds, and a copy of it is a copy. No source is
rewritten and no library patched.

What a module computes is told by trying, not by its name: an attention, a feed-forward block or a norm is taken only
when the fast forward gives the module's own result on a small input. Where a call cannot take the fast path (another
dtype, hooks that want to see the base layer, autocast) the module's own forward runs; so it does without gradients,
so that what is measured is, to the last bit, what anybody measures who loads the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorafit import fused
from lorafit.elementwise import EAGER, Ops
from lorafit.lora import LoRALinear
from lorafit.quant import compute_dtype, is_linear, is_quantized, multiplies_only, plain_dtype

TOGETHER = "q/k/v together"
BLOCK = "SwiGLU block"
ALONE = "layer by layer"
PLAIN = "plain: "


# ------------------------------------------------------------------------------------------------ the fast forwards


class _Fast:
    """What all of them know. ops: which make of the elementwise functions; recompute: whether norms are kept or made
    anew in the backward pass."""

    fast_ops: Ops
    fast_recompute: bool
    fast_options: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles: the class is made when it is needed, and has no place in a module to be found at."""
        if isinstance(self, FastLoRALinear):
            return super().__reduce_ex__(protocol)
        mixin, own = type(self).__bases__
        return _new, (mixin, own), vars(self)


class FastLoRALinear(_Fast, LoRALinear):
    """LoRALinear in one step of automatic differentiation."""

    def forward(self, x: Tensor) -> Tensor:
        if not _ready(x, self):
            return super().forward(x)
        return fused.linears(self.fast_ops, (self,), x, _normed(x))[0]


class _FastAttention(_Fast):
    """Separate projections, norms of queries and keys where there are any, rotary positions, any attention function.

    fast_options: what the module's own forward tells the attention function besides (a window, a soft cap).
    """

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        x, positions = options.get("hidden_states"), options.get("position_embeddings")
        projections = (self.q_proj, self.k_proj, self.v_proj)
        cached = options.get("past_key_values") is not None
        if args or cached or x is None or positions is None or not _ready(x, *projections):
            return super().forward(*args, **options)  # type: ignore[misc]
        if positions[0].shape[-1] != self.head_dim:  # positions for a part of each head
            return super().forward(*args, **options)  # type: ignore[misc]
        options = dict(options)
        mask = options.pop("attention_mask", None)
        for name in ("hidden_states", "position_embeddings", "past_key_values"):
            options.pop(name, None)
        shape = x.shape[:-1]
        q, k, v = (y.view(*shape, -1, self.head_dim) for y in fused.linears(self.fast_ops, projections, x, _normed(x)))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (fused.rotate(self.fast_ops, each, *positions) for each in (q, k))
        options |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if _blockwise(self, q, self.fast_options | options) and (lengths := _lengths(mask, q)) is not False:
            y = fused.attention(self.fast_ops, q, k, v, self.scaling, lengths)
            return self.o_proj(y.reshape(*shape, -1)), None
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y, weights = attend(self, q, k, v, mask, **(self.fast_options | options))
        return self.o_proj(y.reshape(*shape, -1).contiguous()), weights


def _blockwise(module: Any, q: Tensor, options: dict[str, Any]) -> bool:
    """Whether PyTorch's own attention would be called, on the CPU, causal and without dropout: blocks do as well."""
    causal = options.get("is_causal")
    return (
        q.device.type == "cpu"
        and ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation] is sdpa_attention_forward
        and not options["dropout"]
        and (getattr(module, "is_causal", True) if causal is None else bool(causal))
        and q.shape[1] > 1
    )


def _lengths(mask: Tensor | None, q: Tensor) -> Any:
    """How many places of each row are there, where a mask says no more than that (and who comes later): a tensor, or
    None for all. False: it says more."""
    if mask is None:
        return None
    if not hasattr(mask, "lorafit_lengths"):  # all layers are given the same mask
        mask.lorafit_lengths = False  # type: ignore[attr-defined]
        if mask.dtype == torch.bool and mask.shape == (q.shape[0], 1, q.shape[1], q.shape[1]):
            lengths = mask[:, 0, -1].sum(-1)
            place = torch.arange(q.shape[1], device=mask.device)
            expected = (place <= place.unsqueeze(1)) & (place < lengths.view(-1, 1, 1))
            if torch.equal(mask[:, 0], expected) and bool((lengths > 0).all()):
                mask.lorafit_lengths = lengths  # type: ignore[attr-defined]
    return mask.lorafit_lengths  # type: ignore[attr-defined]


class _FastSwiGLU(_Fast):
    """down_proj(silu(gate_proj(x)) · up_proj(x))."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not _ready(x, *layers) or (isinstance(self.act_fn, nn.Module) and _watched(self.act_fn)):
            return super().forward(x)  # type: ignore[misc]
        return fused.swiglu(self.fast_ops, *layers, x, _normed(x))


class _FastNorm(_Fast):
    """weight · x / sqrt(mean(x²) + eps), the weight frozen."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        eps = self.variance_epsilon
        if (
            not torch.is_grad_enabled()
            or self.weight.requires_grad
            or x.dtype != self.weight.dtype
            or _watched(self)
            or not x.shape[0]
        ):
            return super().forward(x)  # type: ignore[misc]
        y = fused.rms_norm(self.fast_ops, x, self.weight, eps)
        if self.fast_recompute and y.requires_grad:
            # whoever reads y may keep this instead of it: x is kept by the norm itself, and for the sum after the block
            y.lorafit_normed = (y._version, fused.Normed(x.detach(), self.weight, eps))  # type: ignore[attr-defined]
        return y


def _normed(x: Tensor) -> fused.Normed | None:
    if not hasattr(x, "lorafit_normed"):
        return None
    version, normed = x.lorafit_normed
    return normed if x._version == version else None  # somebody has written into it since


def _watched(module: nn.Module) -> bool:
    """Whether somebody waits for the module's calls."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)  # or has put another forward in the place of its own


def _ready(x: Tensor, *layers: Any) -> bool:
    """Whether this input can go through the layers in one step: LoRA layers over bases that can be read from outside,
    or plain frozen ones beside at least one of those; all in the dtype of x."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    if not any(isinstance(layer, LoRALinear) for layer in layers):
        return False
    for layer in layers:
        base = layer
        if isinstance(layer, LoRALinear):
            base = layer.base_layer
            if any(_watched(part) for part in (base, layer.lora_A, layer.lora_B, layer.dropout)):
                return False
            if type(layer) is not FastLoRALinear:  # it has reasons of its own to run as it is written down
                return False
        elif type(layer) is not nn.Linear and not is_quantized(layer):
            return False
        if compute_dtype(base, x) != x.dtype or (base.weight.requires_grad and not is_quantized(base)):
            return False
        if len(layers) > 1 and _watched(layer):
            return False
    return True


# ------------------------------------------------------------------------------------------------ choosing


def take_fast_path(model: nn.Module, *, ops: Ops = EAGER, recompute: bool = False) -> dict[str, str]:
    """Give the modules of an adapted model their fast forward, where they can take it; say of each LoRA layer which.

    recompute: keep no norm and compute it again in the backward pass. What is chosen stays with the modules: an adapter
    that is detached takes its own along. Nothing is drawn from the random generators.
    """
    leave_fast_path(model)
    found: dict[str, str] = {}
    flowing = _flowing(model)
    tried: dict[Any, tuple[str | None, dict[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            why = _why_plain(module, flowing)
            found[name] = ALONE if why is None else PLAIN + why
            if why is None:
                _become(module, FastLoRALinear, ops, recompute)
    for name, module in model.named_modules():
        for mixin, needed, path, probe in _KINDS:
            if isinstance(module, mixin) or not all(hasattr(module, each) for each in needed):
                continue
            key = (mixin, type(module), _signature(module))
            if key not in tried:
                tried[key] = _try(module, mixin, probe)
            why, options = tried[key]
            if why is None:
                _become(module, mixin, ops, recompute, options)
            for layer in (f"{name}.{each}" for each in needed):
                if path and found.get(layer) == ALONE:
                    found[layer] = path if why is None else f"{ALONE} ({type(module).__name__}: {why[:60]})"
    return found


def leave_fast_path(model: nn.Module) -> None:
    """Every module runs as it is written down again."""
    for module in model.modules():
        if isinstance(module, _Fast):
            own = LoRALinear if isinstance(module, FastLoRALinear) else type(module).__bases__[1]
            _become_again(module, own)


def use_ops(model: nn.Module, ops: Ops) -> None:
    """Have the modules on the fast path use another make of the elementwise functions."""
    for module in model.modules():
        if isinstance(module, _Fast):
            module.fast_ops = ops


def recomputes(model: nn.Module) -> bool:
    """Whether any norm of the model is made anew in the backward pass."""
    return any(isinstance(module, _FastNorm) and module.fast_recompute for module in model.modules())


def _flowing(model: Any) -> torch.dtype | None:
    """The dtype of what flows through a model, which is that of its embedding; None where there is none to ask."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return None if embedding is None else getattr(embedding, "dtype", embedding.weight.dtype)


def _why_plain(layer: LoRALinear, flowing: torch.dtype | None) -> str | None:
    """Why a LoRA layer cannot go in one step, if it cannot; flowing: the dtype in which its input comes."""
    base = layer.base_layer
    if flowing is not None and (dtype := compute_dtype(base, torch.empty((), dtype=flowing))) != flowing:
        names = [str(each).removeprefix("torch.") for each in (dtype, flowing)]
        return f"it multiplies in {names[0]} what comes in {names[1]}"
    if not is_quantized(layer.base_layer) and not multiplies_only(layer.base_layer):
        return f"{type(layer.base_layer).__name__} computes more than x Wᵀ + b"
    if type(layer) is not LoRALinear:
        return f"{type(layer).__name__} has a forward of its own"
    return None


_PLAIN = (bool, int, float, str, type(None))
_CLASSES: dict[tuple[type, type], type] = {}


def _become(module: Any, mixin: type, ops: Ops, recompute: bool, options: dict[str, Any] | None = None) -> None:
    """Make a module one of a subclass of its class."""
    own = type(module)
    if issubclass(mixin, LoRALinear):
        module.__class__ = mixin
    elif not isinstance(module, mixin):
        module.__class__ = _fast_class(mixin, own)
    module.fast_ops, module.fast_recompute, module.fast_options = ops, recompute, dict(options or {})


def _fast_class(mixin: type, own: type) -> type:
    """The subclass of a module's class that has the fast forward of `mixin`, one for each."""
    key = (mixin, own)
    if key not in _CLASSES:
        # its name and place are those of the class it stands for: models look at them
        _CLASSES[key] = type(own.__name__, (mixin, own), {"__module__": own.__module__})
    return _CLASSES[key]


def _new(mixin: type, own: type) -> Any:
    return object.__new__(_fast_class(mixin, own))


def _become_again(module: Any, own: type) -> None:
    module.__class__ = own
    del module.fast_ops, module.fast_recompute, module.fast_options


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """What makes two modules of one class differ: their plain attributes, and the classes of their children."""
    values = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN) and key != "layer_idx"}
    children = {name: type(child).__name__ for name, child in module.named_children()}
    return tuple(sorted(map(repr, (values | children).items())))


def _try(module: Any, mixin: type, probe: Callable[[Any, float], Any]) -> tuple[str | None, dict[str, Any]]:
    """(None when the fast forward of a module gives what its own gives, else what is different; what the module's own
    forward tells its attention function).

    It is tried in evaluation on small numbers, and in training on large ones: some clip, and some drop out.
    """
    own, options = type(module), {}
    try:
        with _still(module), torch.enable_grad():  # without gradients no module takes it
            for training, size in ((False, 1.0), (True, 30.0)):
                inputs = probe(module, size)
                if inputs is None:
                    return "another layout", {}
                _set_training(module, training)
                with _overheard(module) as calls:
                    expected = module(*inputs[0], **inputs[1])
                if calls:
                    told = calls[0].told
                    options = {key: value for key, value in told.items() if key not in ("dropout", "scaling")}
                    if len(calls) > 1 or not all(isinstance(value, _PLAIN) for value in options.values()):
                        return "its attention is told more than numbers", {}
                _become(module, mixin, EAGER, False, options)
                try:
                    # the same answer to both: a softmax of large scores makes much of the last bit of a query
                    with _overheard(module, calls[0].answer if calls else None) as heard:
                        got = module(*inputs[0], **inputs[1])
                finally:
                    _become_again(module, own)
                if calls and (len(heard) != 1 or heard[0].told != calls[0].told):
                    return "its attention is told something else", {}
                pairs = [*zip(calls[0].asked, heard[0].asked, strict=True)] if calls else []
                pairs.append(tuple(value[0] if isinstance(value, tuple) else value for value in (expected, got)))
                if not all(_close(*pair) for pair in pairs):
                    return "another result", {}
    except Exception as error:  # whatever a module brings about that wants to be called in another way
        return f"{type(error).__name__}: {error}", {}
    return None, options


def _set_training(module: nn.Module, training: bool) -> None:
    """What the module itself does in training; its LoRA layers drop nothing, whose dropout is known."""
    module.train(training)
    for part in module.modules():
        if isinstance(part, LoRALinear):
            part.eval()


def _close(first: Any, second: Any) -> bool:
    if first is None or second is None:
        return first is second
    if not first.is_floating_point():  # a mask
        return torch.equal(first, second)
    tolerance = 4 * torch.finfo(first.dtype).eps
    first, second = first.detach().double(), second.detach().double()
    close = torch.allclose(first, second, rtol=tolerance, atol=tolerance * float(first.abs().max()))
    return close and bool(torch.isfinite(first).all())


@dataclass
class _Call:
    """A call of an attention function: queries, keys, values and mask; what else it was told; what it gave back."""

    asked: tuple[Tensor, Tensor, Tensor, Tensor | None]
    told: dict[str, Any]
    answer: Any


@contextlib.contextmanager
def _overheard(module: Any, answer: Any = None) -> Iterator[list[_Call]]:
    """Within the context: the calls of the attention function of a module, which gives `answer` where that is given.
    None for modules that are no attention."""
    calls: list[_Call] = []
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name not in ALL_ATTENTION_FUNCTIONS:
        yield calls
        return
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def listen(of: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **told: Any) -> Any:
        # nothing is dropped here: that it was told to is what counts
        given = attend(of, q, k, v, mask, **(told | {"dropout": 0.0})) if answer is None else answer
        calls.append(_Call((q, k, v, mask), told, given))
        return given

    ALL_ATTENTION_FUNCTIONS[name] = listen
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = attend


@contextlib.contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """The mode of each part and the state of the generators are afterwards what they were."""
    modes = {part: part.training for part in module.modules()}
    devices = {parameter.device.index for parameter in module.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng([index for index in devices if index is not None]):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _wave(*shape: int, size: float, like: Tensor) -> Tensor:
    """Numbers of both signs up to a size that are no pattern, drawn from no generator."""
    count = torch.Size(shape).numel()
    values = size * torch.sin(torch.arange(count, dtype=torch.float32) ** 1.3)
    return values.view(shape).to(device=like.device, dtype=like.dtype)


def _width(layer: Any) -> tuple[int, Tensor]:
    base = layer.base_layer if isinstance(layer, LoRALinear) else layer
    dtype = compute_dtype(base, torch.empty((), dtype=plain_dtype(base)))
    return int(base.in_features), torch.empty((), dtype=dtype, device=base.weight.device)


def _attention_probe(module: Any, size: float) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(is_linear(child) or isinstance(child, LoRALinear) for child in (getattr(module, n) for n in names)):
        return None
    if module.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:  # eager attention is each model's own
        return None
    rotary = getattr(module.config, "rope_parameters", None) or {}
    if rotary.get("partial_rotary_factor", getattr(module.config, "partial_rotary_factor", None)) not in (None, 1.0):
        return None
    width, like = _width(module.q_proj)
    x = _wave(1, 5, width, size=size, like=like)
    if not _ready(x, module.q_proj, module.k_proj, module.v_proj):
        return None
    angles = torch.arange(5, dtype=torch.float32).unsqueeze(1) * torch.linspace(1, 0.1, module.head_dim // 2)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(0).to(like.device)
    positions = (angles.cos().to(like.dtype), angles.sin().to(like.dtype))
    mask = None
    if size > 1 and module.config._attn_implementation == "sdpa":  # some do something with it
        mask = torch.ones(1, 1, 5, 5, dtype=torch.bool, device=like.device).tril()
        mask[..., 3:, 1] = False
    return (), {"hidden_states": x, "position_embeddings": positions, "attention_mask": mask}


def _swiglu_probe(module: Any, size: float) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    if not all(is_linear(layer) or isinstance(layer, LoRALinear) for layer in layers):
        return None
    numbers = torch.linspace(-8, 8, 64)  # near zero one activation is much like another
    if not torch.allclose(module.act_fn(numbers), nn.functional.silu(numbers)):
        return None
    width, like = _width(module.gate_proj)
    x = _wave(1, 5, width, size=size, like=like)
    return ((x,), {}) if _ready(x, *layers) else None


def _norm_probe(module: Any, size: float) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not isinstance(module.weight, nn.Parameter) or module.weight.dim() != 1 or module.weight.requires_grad:
        return None
    return (_wave(3, module.weight.numel(), size=size, like=module.weight),), {}


# (the class that gives the forward, the children or attributes it needs, how its LoRA layers are reported, the input)
_KINDS: tuple[tuple[type, tuple[str, ...], str | None, Callable[[Any, float], Any]], ...] = (
    (_FastNorm, ("weight", "variance_epsilon"), None, _norm_probe),
    (_FastAttention, ("q_proj", "k_proj", "v_proj", "head_dim", "scaling", "config"), TOGETHER, _attention_probe),
    (_FastSwiGLU, ("gate_proj", "up_proj", "down_proj", "act_fn"), BLOCK, _swiglu_probe),
)

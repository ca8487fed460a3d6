"""Matrices in 8 and 4 bits: what is read back, how far off it may be, and what a file of them has to hold.

pytest tests/test_rounding.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorafit.errors import InputError
from lorafit.rounding import (
    BLOCK,
    KINDS,
    METADATA,
    NF4,
    Packed,
    bytes_of,
    dequantize,
    from_metadata,
    from_tensors,
    quantize,
    round_to,
    straight_through,
    to_metadata,
    to_tensors,
)

CODED = ("int8", "nf4")
# every remainder of a block, magnitudes down to denormal and up to the largest of float32, and a block of zeros
SIZES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 640, 1001)
MAGNITUDES = (1e-45, 1e-44, 1e-40, 1e-20, 1.0, 1e20, 8e37)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


def samples() -> list[Tensor]:
    tensors = [torch.randn(size) * magnitude for size in SIZES for magnitude in MAGNITUDES]
    mixed = torch.randn(5, 100) * torch.logspace(-30, 30, 100)
    return [*tensors, mixed, torch.zeros(130), -torch.ones(70), torch.randn(3, 5, 7), torch.tensor(0.5)]


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_again_changes_no_bit(kind: str) -> None:
    for tensor in samples():
        rounded = round_to(tensor, kind)
        assert same_bits(round_to(rounded, kind), rounded)


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_sees_is_bit_for_bit_what_a_file_gives_back(kind: str) -> None:
    for tensor in samples():
        assert same_bits(dequantize(quantize(tensor, kind)), round_to(tensor, kind))


@pytest.mark.parametrize("kind", CODED)
def test_the_largest_value_of_a_block_comes_back_exactly_and_zeros_stay_zero(kind: str) -> None:
    blocks = torch.randn(50, BLOCK) * torch.logspace(-38, 38, 50)[:, None]
    blocks[7] = 0
    rounded = round_to(blocks, kind)
    largest = blocks.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(rounded.gather(1, largest), blocks.gather(1, largest))
    assert not rounded[7].any()
    assert not round_to(torch.zeros(9), kind).any()


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    blocks = torch.randn(200, BLOCK, dtype=torch.float32)
    scale = blocks.abs().amax(dim=1, keepdim=True).double()
    error = (round_to(blocks, "int8").double() - blocks).abs()
    assert bool((error <= scale / 254 * (1 + 1e-5)).all())
    assert float((error / scale).max()) > 0.99 / 254  # and the steps are no finer than said


def test_four_bits_give_the_nearest_of_the_sixteen_values() -> None:
    blocks = torch.randn(200, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    candidates = torch.tensor(NF4)[:, None, None] * scale
    nearest = (candidates - blocks).abs().amin(dim=0)
    torch.testing.assert_close((round_to(blocks, "nf4") - blocks).abs(), nearest, rtol=1e-5, atol=1e-7)


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(64, 128)  # some other widths bitsandbytes itself reads back wrongly
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    ours = quantize(weight, "nf4")
    assert torch.equal(ours.codes, codes.reshape(-1))
    assert torch.equal(ours.scales, state.absmax)
    torch.testing.assert_close(dequantize(ours), functional.dequantize_4bit(codes, state), rtol=1e-6, atol=0)


def test_nf4_has_sixteen_rising_values_with_a_zero() -> None:
    assert len(NF4) == 16
    assert list(NF4) == sorted(set(NF4))
    assert (NF4[0], NF4[7], NF4[15]) == (-1.0, 0.0, 1.0)


def test_two_codes_share_a_byte_the_first_one_high_and_an_odd_last_one_is_filled_up() -> None:
    packed = quantize(torch.tensor([-1.0, 1.0, NF4[3]]), "nf4")
    assert packed.codes.tolist() == [0x0F, 0x37]
    assert packed.scales.tolist() == [1.0]


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_shape_and_dtype_stay_and_rounding_stays_stable_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 70).to(dtype)
    for given in (tensor, tensor.T):
        rounded = round_to(given, kind)
        assert (rounded.shape, rounded.dtype) == (given.shape, dtype)
        assert torch.equal(round_to(rounded, kind), rounded)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_goes_through_as_if_nothing_were_rounded(kind: str) -> None:
    weight, x = torch.randn(5, 70, requires_grad=True), torch.randn(70, 3)
    value = straight_through(weight, kind)
    assert same_bits(value.detach(), round_to(weight.detach(), kind))
    ((value @ x) ** 2).sum().backward()
    expected = (2 * (value.detach() @ x)) @ x.T  # of the rounded weight, given to the exact one
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_refused_in_a_file_and_seen_in_training(kind: str, bad: float) -> None:
    tensor = torch.randn(3, BLOCK, dtype=torch.float64)
    tensor[1, 5] = bad
    with pytest.raises(InputError, match=rf"\(3, 64\).*not finite.*{kind}"):
        quantize(tensor, kind)
    if kind in CODED:
        rounded = round_to(tensor, kind)
        assert bool(rounded[1].isnan().any())
        assert bool(rounded[[0, 2]].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", SIZES)
def test_bytes_are_those_of_the_tensors_of_the_file(kind: str, count: int) -> None:
    tensors = to_tensors("w", quantize(torch.randn(count), kind))
    assert bytes_of(kind, count) == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_a_file_gives_back_the_packed_tensors(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(3, 70), "b.weight": torch.randn(7, 11), "c": torch.randn(4), "d": torch.zeros(0)}
    kinds = ("int8", "nf4", "bfloat16", "nf4")
    packed = {name: quantize(weights[name], kind) for name, kind in zip(weights, kinds, strict=True)}
    tensors = {key: tensor for name, item in packed.items() for key, tensor in to_tensors(name, item).items()}
    assert set(tensors) == {"a.weight", "a.weight.scales", "b.weight", "b.weight.scales", "c", "d", "d.scales"}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt", **to_metadata(packed)})
    with safe_open(tmp_path / "file", "pt") as file:
        entries = from_metadata(file.metadata())
        read = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert entries.keys() == packed.keys()
    for name, (kind, shape) in entries.items():
        assert same_bits(dequantize(from_tensors(name, read, kind, shape)), round_to(weights[name], packed[name].kind))


def test_a_file_without_the_entry_holds_plain_tensors() -> None:
    assert from_metadata(None) == {}
    assert from_metadata({"format": "pt"}) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "blocks of 64"),
        ('{"block": 32, "tensors": {}}', "blocks of 64"),
        ('{"block": 64}', "blocks of 64"),
        ('{"block": 64, "tensors": {"w": 3}}', "w: .*gives 3"),
        ('{"block": 64, "tensors": {"w": {"kind": "nf4"}}}', "w: .*kind and shape"),
        ('{"block": 64, "tensors": {"w": {"kind": "nf4", "shape": [true]}}}', "w: .*shape"),
        ('{"block": 64, "tensors": {"w": {"kind": "nf4", "shape": [-1]}}}', "w: .*shape"),
        ('{"block": 64, "tensors": {"w": {"kind": "nf5", "shape": [1]}}}', "Did you mean 'nf4'"),
    ],
)
def test_a_metadata_entry_that_was_not_written_here_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_metadata({METADATA: text})
    assert "\n" not in str(caught.value)


def test_the_entry_is_plain_json() -> None:
    entry = to_metadata({"w": quantize(torch.randn(2, 3), "int8")})
    assert json.loads(entry[METADATA]) == {"block": 64, "tensors": {"w": {"kind": "int8", "shape": [2, 3]}}}


def stored(kind: str) -> dict[str, Tensor]:
    return to_tensors("w", quantize(torch.randn(2, 50), kind))


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("w"), "w is missing"),
        (lambda tensors: tensors.pop("w.scales"), "w.scales is missing"),
        (lambda tensors: tensors.update(w=tensors["w"][:-1]), "w holds .* takes"),
        (lambda tensors: tensors.update(w=tensors["w"].float()), "w holds .* of float32"),
        (lambda tensors: tensors.update({"w.scales": tensors["w.scales"][:1]}), "w.scales holds 1 values"),
        (lambda tensors: tensors.update({"w.scales": tensors["w.scales"].double()}), "of float64"),
        (lambda tensors: tensors["w.scales"].fill_(float("nan")), "damaged"),
        (lambda tensors: tensors["w.scales"].fill_(-1.0), "damaged"),
    ],
)
def test_tensors_that_do_not_fit_what_the_file_says_are_refused(kind: str, change: Any, message: str) -> None:
    tensors = stored(kind)
    change(tensors)
    with pytest.raises(InputError, match=message) as caught:
        from_tensors("w", tensors, kind, (2, 50))
    assert "\n" not in str(caught.value)


def test_a_code_that_is_never_written_is_refused() -> None:
    tensors = stored("int8")
    tensors["w"][3] = -128
    with pytest.raises(InputError, match="-128"):
        from_tensors("w", tensors, "int8", (2, 50))


def test_a_shape_of_another_size_is_refused_and_a_plain_tensor_is_checked_too() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 51\) in nf4 takes 51"):
        from_tensors("w", stored("nf4"), "nf4", (2, 51))
    with pytest.raises(InputError, match="of bfloat16"):
        from_tensors("w", {"w": torch.zeros(6)}, "bfloat16", (2, 3))
    assert isinstance(from_tensors("w", {"w": torch.zeros(6)}, "float32", (2, 3)), Packed)


@pytest.mark.parametrize("use", [quantize, round_to, straight_through])
def test_an_unknown_kind_names_those_there_are(use: Any) -> None:
    with pytest.raises(InputError, match=r"float32, bfloat16, int8, nf4, not 'int4'\. Did you mean"):
        use(torch.zeros(2), "int4")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_reads_and_writes_the_same_bits(kind: str) -> None:
    for tensor in samples():
        assert same_bits(round_to(tensor.cuda(), kind).cpu(), round_to(tensor, kind))
        packed = quantize(tensor.cuda(), kind)
        assert torch.equal(packed.codes.cpu(), quantize(tensor, kind).codes)
        assert same_bits(dequantize(packed).cpu(), dequantize(quantize(tensor, kind)))

"""The order of batches, whole and resumed; what a batch holds; how sources share an epoch.

pytest tests/test_loader.py
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lorafit.data import IGNORE, ResumableLoader, collate, collate_packed
from lorafit.data.loader import Share, collate_rows, shares_of
from lorafit.data.packing import best_fit
from lorafit.errors import InputError

# --- what a batch holds ---------------------------------------------------------------------------

A = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
B = {"input_ids": [4, 5], "labels": [IGNORE, 5]}
C = {"input_ids": [6], "labels": [6]}


def test_an_unpacked_batch_worked_by_hand() -> None:
    batch = collate([A, B], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [IGNORE, 5, IGNORE]]
    assert batch["tokens"] == 5 and "position_ids" not in batch


def test_a_packed_batch_worked_by_hand() -> None:
    batch = collate_packed([[A, B], [C, B]], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 4, 5, 9, 9]]
    # places count anew in every example, and in what fills up the row
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 0, 1]]
    # before the first token of an example stands another example
    assert batch["labels"].tolist() == [[IGNORE, 2, 3, IGNORE, 5], [IGNORE, IGNORE, 5, IGNORE, IGNORE]]
    assert batch["tokens"] == 8 and "attention_mask" not in batch


def test_a_batch_without_padding_is_one_row() -> None:
    rows = [[A, B], [C]]
    batch = collate_rows(rows, 9, packed=True, padding_free=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["tokens"] == batch["input_ids"].numel()


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_packed_example_can_be_cut_out_again(lengths: list[list[int]]) -> None:
    generator = np.random.default_rng(sum(map(sum, lengths)))
    rows = [[{"input_ids": (ids := generator.integers(1, 99, n)), "labels": ids} for n in row] for row in lengths]
    batch = collate_packed(rows, pad_id=0)
    for number, row in enumerate(rows):
        starts = (batch["position_ids"][number] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], batch["input_ids"].shape[1]]
        found = [batch["input_ids"][number, start:end].tolist() for start, end in zip(starts, ends, strict=True)]
        assert found[: len(row)] == [sequence["input_ids"].tolist() for sequence in row]
        assert not any(map(any, found[len(row) :])) and len(found) <= len(row) + 1
    assert batch["tokens"] == sum(map(sum, lengths))


# --- the order ------------------------------------------------------------------------------------

SEQUENCES = [{"input_ids": [i] * (1 + i % 3), "labels": [i] * (1 + i % 3)} for i in range(11)]
PACKED = best_fit(np.array([len(s["input_ids"]) for s in SEQUENCES]), 4)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"rows": PACKED},
    "padding_free": {"padding_free": True},
    "packed, padding_free": {"rows": PACKED, "padding_free": True},
    "by length": {"group_by_length": True},
    "shares": {"shares": [Share(0, 4, 7), Share(4, 11, 3)]},
}


def loader(**options: Any) -> ResumableLoader:
    return ResumableLoader(SEQUENCES, 2, pad_id=99, **{"shuffle": True, "seed": 3} | options)


def rows_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_loader_goes_on_exactly_where_another_stood(options: dict[str, Any]) -> None:
    unbroken = loader(**options)
    expected = [list(unbroken) for _ in range(3)]
    assert not same(expected[0], expected[1]) and all(len(epoch) == len(unbroken) for epoch in expected)
    for position in range(len(unbroken) + 1):
        first = loader(**options)
        seen = list(itertools.islice(first, position))
        second = loader(**options)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        # a loader that stands at the end of an epoch begins the next
        ended = position == len(unbroken)
        assert same(seen + list(second), expected[0] + (expected[1] if ended else []))
        assert same(list(second), expected[2 if ended else 1])


def test_any_number_of_workers_hands_out_the_same_and_goes_on_from_any_other() -> None:
    whole = list(loader(rows=PACKED))
    for workers, others in ((2, 0), (0, 2)):
        first = loader(rows=PACKED, num_workers=workers)
        seen = list(itertools.islice(first, 2))
        second = loader(rows=PACKED, num_workers=others)
        second.load_state_dict(first.state_dict())
        assert same(seen + list(second), whole)


def test_every_epoch_has_all_rows_once_in_an_order_of_its_own() -> None:
    one = loader()
    epochs = [[row for batch in one for row in rows_of(batch)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))
    assert [rows_of(batch) for batch in loader()] != [rows_of(batch) for batch in loader(seed=4)]
    assert [row for batch in loader(shuffle=False) for row in rows_of(batch)] == list(range(11))


@pytest.mark.parametrize("options", [KINDS["packed"], KINDS["padding_free"]], ids=["packed", "padding_free"])
def test_every_token_comes_up_once_in_an_epoch_however_it_is_packed(options: dict[str, Any]) -> None:
    found = Counter(token for batch in loader(**options) for token in batch["input_ids"].flatten().tolist())
    del found[99]
    assert found == Counter(token for sequence in SEQUENCES for token in sequence["input_ids"])


@pytest.mark.parametrize("replicas", [2, 3, 6])
def test_replicas_share_out_the_batches_and_each_gets_as_many(replicas: int) -> None:
    shares = [[rows_of(batch) for batch in loader(replica=i, replicas=replicas)] for i in range(replicas)]
    whole = [rows_of(batch) for batch in loader()]
    assert {len(share) for share in shares} == {len(whole) // replicas}
    assert sorted(batch for share in shares for batch in share) == sorted(whole)


@pytest.mark.parametrize("replicas", [1, 2, 4, 5, 8])
def test_what_is_to_be_measured_whole_comes_up_once_with_any_number_of_replicas(replicas: int) -> None:
    shares = [list(loader(replica=i, replicas=replicas, whole=True, shuffle=False)) for i in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    measured = [row for batch in batches if (batch["labels"] != -100).any() for row in rows_of(batch)]
    assert sorted(measured) == list(range(11))


def test_more_replicas_than_batches_still_get_one_each() -> None:
    assert all(len(list(loader(replica=i, replicas=8))) == 1 for i in range(8))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_draws_nothing_from_the_global_generator(num_workers: int) -> None:
    before = torch.get_rng_state()
    assert len(list(loader(num_workers=num_workers))) == 6
    assert torch.equal(torch.get_rng_state(), before)


# --- by length ------------------------------------------------------------------------------------


def test_batches_by_length_hold_the_same_rows_and_far_less_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    sequences = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths.tolist())]

    def epoch(by_length: bool) -> tuple[list[list[int]], int]:
        one = ResumableLoader(sequences, 8, pad_id=-1, shuffle=True, group_by_length=by_length)
        batches = list(one)
        assert len(batches) == len(one) == 125
        return [rows_of(batch) for batch in batches], sum(int((b["input_ids"] == -1).sum()) for b in batches)

    (plain, padding), (grouped, less) = epoch(False), epoch(True)
    assert sorted(row for batch in grouped for row in batch) == list(range(1000)) and grouped != plain
    assert less < 0.1 * padding
    assert epoch(True) == (grouped, less)
    # what is long does not come first
    longest = [max(lengths[row] for row in batch) for batch in grouped]
    assert abs(np.corrcoef(longest, range(125))[0, 1]) < 0.3


# --- shares ---------------------------------------------------------------------------------------

SIZES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 10)), min_size=2, max_size=4)


@given(SIZES, st.integers(0, 9))
def test_each_source_has_its_share_of_every_epoch(sources: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    shares, total = shares_of(sizes, weights), sum(sizes)
    assert [share.stop - share.start for share in shares] == sizes and shares[0].start == 0
    # a source may be owed less than half a row, and has one
    assert abs(sum(share.count for share in shares) - total) <= len(sizes)
    sequences = [{"input_ids": [row], "labels": [row]} for row in range(total)]
    one = ResumableLoader(sequences, 4, 0, shuffle=True, shares=shares, seed=seed)
    for share, weight in zip(shares, weights, strict=True):
        assert share.count == max(1, round(total * weight / sum(weights)))
    epochs = [one.order(epoch).tolist() for epoch in range(4)]
    assert all(-(-len(epoch) // 4) == len(one) for epoch in epochs)
    for share in shares:
        size = share.stop - share.start
        drawn = [[row for row in epoch if share.start <= row < share.stop] for epoch in epochs]
        assert {len(rows) for rows in drawn} == {share.count}
        # no row has come up twice more than another, at the end of any epoch
        for count in range(1, 5):
            times = Counter(row for rows in drawn[:count] for row in rows)
            assert set(times.values()) <= {count * share.count // size, -(-count * share.count // size)}
            assert len(times) == min(size, count * share.count)


def test_of_a_source_with_twice_the_weight_there_are_twice_as_many_rows() -> None:
    assert shares_of([90, 30], [1, 2]) == [Share(0, 90, 40), Share(90, 120, 80)]
    assert shares_of([5], [0.3]) == [Share(0, 5, 5)]


def test_the_weight_of_a_source_that_has_no_rows_is_an_error_that_names_it() -> None:
    with pytest.raises(InputError, match="source 2 of 3 has a weight, and no row"):
        shares_of([4, 0, 2], [1, 1, 1])


def test_rows_are_mixed_and_not_one_source_after_the_other() -> None:
    sequences = [{"input_ids": [row], "labels": [row]} for row in range(200)]
    one = ResumableLoader(sequences, 1, 0, shuffle=True, shares=shares_of([100, 100], [1, 1]))
    first_half = one.order(0)[:100]
    assert 30 < int((first_half < 100).sum()) < 70

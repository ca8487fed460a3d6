"""Best-fit decreasing: every example once, no row too long, and no more rows than the plain algorithm has.

pytest tests/test_packing.py
"""

from __future__ import annotations

import math
import time

import numpy as np
from hypothesis import given, settings, strategies as st

from lorafit.data.packing import best_fit

CAPACITY = 60
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


def loads(rows: list[list[int]], lengths: list[int]) -> list[int]:
    return sorted(sum(lengths[index] for index in row) for row in rows)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The tokens of each row, by the definition: longest first, each where least room is left, in O(n^2)."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, load in enumerate(rows) if load + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda index: rows[index])] += length
        else:
            rows.append(length)
    return sorted(rows)


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """The smallest number of rows that hold all, by trying everything."""
    longest_first, best = sorted(lengths, reverse=True), len(lengths)

    def place(at: int, rows: tuple[int, ...]) -> None:
        nonlocal best
        if len(rows) >= best:
            return
        if at == len(longest_first):
            best = len(rows)
            return
        for index, load in enumerate(rows):
            if load + longest_first[at] <= capacity and load not in rows[:index]:
                place(at + 1, (*rows[:index], load + longest_first[at], *rows[index + 1 :]))
        place(at + 1, (*rows, longest_first[at]))

    place(0, ())
    return best


@given(LENGTHS)
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(loads(rows, lengths), default=0) <= CAPACITY
    assert all(row and row == sorted(row) for row in rows)
    assert math.ceil(sum(lengths) / CAPACITY) <= len(rows) <= len(lengths) or not lengths


@given(LENGTHS)
def test_the_rows_are_as_full_as_those_of_the_plain_algorithm(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), CAPACITY)
    assert loads(rows, lengths) == plain_best_fit(lengths, CAPACITY)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_there_are_at_most_eleven_ninths_of_the_fewest_rows_and_one(lengths: list[int]) -> None:
    fewest = fewest_rows(lengths, 20)
    assert fewest <= len(best_fit(np.array(lengths), 20)) <= 11 / 9 * fewest + 1


def test_a_case_worked_by_hand() -> None:
    # 7 and 6 open rows; 4 closes the second, 3 the first, 2 opens another
    assert best_fit(np.array([2, 3, 7, 4, 6]), 10) == [[1, 2], [3, 4], [0]]
    assert best_fit(np.array([], dtype=np.int64), 10) == []
    assert best_fit(np.array([10, 10]), 10) == [[0], [1]]


def test_the_same_lengths_give_the_same_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 5000)
    assert best_fit(lengths, 512) == best_fit(lengths.copy(), 512)


def test_a_hundred_thousand_examples_take_no_time_and_leave_hardly_a_place_empty() -> None:
    """The plain search looks through tens of thousands of rows for each of them, which takes minutes."""
    lengths = np.random.default_rng(0).integers(1, 513, 100_000)
    began = time.process_time()
    rows = best_fit(lengths, 512)
    assert time.process_time() - began < 5
    assert lengths.sum() / 512 <= len(rows) < 1.02 * lengths.sum() / 512

"""Packing: several short examples in one row, so that little of a batch is padding.

Best-fit decreasing (Johnson et al. 1974): the longest example first, each into the row that it leaves least room in.
A row is a list of example numbers. Which examples may see each other is not decided here: a packed row carries
position ids that begin anew with each example (see `lorafit.data.loader.collate_packed`), and `lorafit.isolation`
proves for the model at hand that they are respected.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens that hold every example once; each row in the order of the examples.

    lengths [examples]: tokens of each, none above capacity. O(n log n), and the same for the same lengths.
    """
    longest_first = np.argsort(-np.asarray(lengths), kind="stable")
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room -> rows with exactly that room
    rooms: list[int] = []  # the rooms there are, sorted
    for index in longest_first.tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(index)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(row)
    return [sorted(row) for row in rows]

"""Chunks of target rows: every pair is in exactly one piece, and no piece is too long."""

import hypothesis
import torch
from hypothesis import strategies

from speculators.ops.row_chunks import plan_chunks

STEPS = strategies.lists(
    strategies.lists(strategies.integers(0, 20), max_size=30), min_size=1, max_size=4
)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(steps=STEPS, chunk_rows=strategies.integers(1, 12))
def test_each_pair_is_in_one_piece(steps: list[list[int]], chunk_rows: int) -> None:
    plan = plan_chunks([torch.tensor(rows, dtype=torch.int64) for rows in steps], chunk_rows)
    targets = [row for chunk in plan for row in chunk.target_rows.tolist()]
    assert targets == sorted({row for rows in steps for row in rows})
    assert [len(chunk.target_rows) for chunk in plan[:-1]] == [chunk_rows] * (len(plan) - 1)
    pairs = []
    for chunk in plan:
        for piece in chunk.pieces:
            assert 1 <= len(piece.pairs) <= chunk_rows
            found = chunk.target_rows[piece.positions].tolist()
            pairs += [(piece.step, *pair) for pair in zip(piece.pairs.tolist(), found, strict=True)]
    expected = [
        (step, pair, row) for step, rows in enumerate(steps) for pair, row in enumerate(rows)
    ]
    assert sorted(pairs) == expected

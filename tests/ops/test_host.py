"""Packing documents: the compiled function, its Python twin, and a third, obvious
implementation.
"""

import random
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import strategies

from speculators.ops import host


def obvious(lengths: list[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every row for every document."""
    rows: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        room = [budget - sum(lengths[d] for d in row) for row in rows]
        fitting = [(left, row) for row, left in enumerate(room) if left >= lengths[document]]
        if fitting:
            rows[min(fitting)[1]].append(document)
        else:
            rows.append([document])
    return rows


def test_the_compiled_module_serves() -> None:
    assert host.report().startswith("_host: loaded: ")
    assert host._pack is not host.pack_documents_python


@hypothesis.given(
    budget=strategies.integers(1, 40),
    seeds=strategies.lists(strategies.integers(0, 10**6), max_size=60),
)
def test_all_three_agree(budget: int, seeds: list[int]) -> None:
    lengths = [seed % budget + 1 for seed in seeds]
    rows = host.pack_documents(lengths, budget)
    assert rows == host.pack_documents_python(lengths, budget)
    assert rows == obvious(lengths, budget)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in row) <= budget for row in rows)


def test_it_packs_tightly() -> None:
    """Pieces that fill rows exactly, shuffled: no row is wasted, where first come wastes many."""
    lengths = [60, 50, 50, 40] * 20
    random.Random(0).shuffle(lengths)
    assert len(host.pack_documents(lengths, 100)) == sum(lengths) // 100


@pytest.mark.parametrize("pack", [host.pack_documents, host.pack_documents_python])
@pytest.mark.parametrize(
    ("lengths", "budget", "message"),
    [
        ([1, 9], 8, "document 1 has 9 tokens, expected between 1 and the budget of 8"),
        ([0], 8, "document 0 has 0 tokens"),
        ([2, -1], 8, "document 1 has -1 tokens"),
        ([], 0, "budget is 0 tokens, expected at least 1"),
    ],
)
def test_wrong_lengths_are_named(
    pack: host._Pack, lengths: list[int], budget: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(lengths, budget)


def test_it_does_not_import_torch() -> None:
    program = (
        "import sys\n"
        "from speculators.ops import host\n"
        "assert host.pack_documents([1, 2], 3) == [[1, 0]]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

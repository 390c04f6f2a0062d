"""Work on the host: the compiled module and its Python twins agree, and say what they refuse.

Packing has a third, obvious implementation here; csrc/host/suffix_index_test.cc has the suffix
index's.
"""

import random
import subprocess
import sys
import threading
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from speculators.ops import host, suffix_index_python

COMPILED_LIMITS = host._limits_class


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
    assert host._index_class is not suffix_index_python.SuffixIndexPython


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
        "assert len(host.SuffixIndex()) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- the suffix index: the compiled one and its twin, through everything that can be asked of them


def both(monkeypatch: pytest.MonkeyPatch, *arguments: int) -> list[host.SuffixIndex]:
    compiled = host.SuffixIndex(*arguments)
    monkeypatch.setattr(host, "_index_class", suffix_index_python.SuffixIndexPython)
    return [compiled, host.SuffixIndex(*arguments)]


def proposed(
    index: host.SuffixIndex, monkeypatch: pytest.MonkeyPatch, tokens: int, options: dict[str, Any]
) -> tuple[list[Any], ...]:
    """A draft as lists, from an index of either kind."""
    compiled = not isinstance(index._index, suffix_index_python.SuffixIndexPython)
    kind = COMPILED_LIMITS if compiled else suffix_index_python.SuffixDraftLimits
    monkeypatch.setattr(host, "_limits_class", kind)
    draft = index.propose(tokens, **options)
    assert draft.tokens.dtype == draft.parents.dtype == np.int32
    assert draft.probabilities.dtype == np.float64
    assert draft.score == pytest.approx(draft.probabilities.sum())
    assert list(draft.probabilities) == sorted(draft.probabilities, reverse=True)
    return (
        draft.tokens.tolist(),
        draft.parents.tolist(),
        draft.probabilities.tolist(),
        [draft.score, draft.match_length],
    )


@pytest.mark.parametrize(
    ("alphabet", "capacity", "max_match", "most"),
    [(1, 7, 3, 99), (2, 30, 4, 99), (2, 500, 6, 9), (3, 500, 16, 99), (5, 1, 1, 99)],
)
def test_the_suffix_index_and_its_twin_agree(
    alphabet: int, capacity: int, max_match: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_ = random.Random(alphabet * capacity)

    def some(most: int) -> list[int]:
        return [random_.randrange(alphabet) for _ in range(random_.randrange(most))]

    indices = both(monkeypatch, capacity, max_match)
    drafted = 0
    for _ in range(60):
        new = some(14)
        for index in indices:
            index.extend(new)
        if random_.random() < 0.2:
            for index in indices:
                index.end_sequence()
        context = some(max_match + 3)
        options = {
            "context": random_.choice([None, context, np.array(context, np.int32)]),
            "factor": random_.choice([0.5, 1.0, 3.0]),
            "min_match": random_.choice([1, 2]),
            "min_probability": random_.choice([0.0, 0.3]),
            "doubt": random_.choice([0.0, 0.5]),
            "max_occurrences": most,
            "tree": random_.random() < 0.5,
        }
        first, second = (proposed(index, monkeypatch, 6, options) for index in indices)
        assert first == second
        drafted += len(first[0]) > 1
        assert indices[0].longest_match(context) == indices[1].longest_match(context)
        assert len(indices[0]) == len(indices[1]) <= capacity
        assert indices[0].max_bytes == indices[1].max_bytes >= indices[0].bytes
    assert drafted > 10 or capacity == 1


@pytest.mark.parametrize("kind", ["compiled", "twin"])
def test_what_the_suffix_index_refuses_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "twin":
        monkeypatch.setattr(host, "_index_class", suffix_index_python.SuffixIndexPython)
        monkeypatch.setattr(host, "_limits_class", suffix_index_python.SuffixDraftLimits)
    for arguments, message in (
        ((0, 3), "capacity is 0, expected between 1 and 536870912"),
        ((3, 2**16 + 1), "max_match is 65537, expected between 1 and 65536"),
    ):
        with pytest.raises(ValueError, match=message):
            host.SuffixIndex(*arguments)
    index = host.SuffixIndex(9, 3)
    index.extend([])
    wrong: Any
    for wrong, message in (
        ([1, -2], "token 1 is -2, expected an id between 0 and 2147483647"),
        (np.array([2**31]), "token 0 is 2147483648"),
        (np.zeros((2, 2), np.int64), "2 dimensions, expected 1"),
        (np.int64(3), "0 dimensions, expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            index.extend(wrong)
    with pytest.raises(TypeError, match="tokens of dtype float64; expected integers"):
        index.extend(np.array([1.0]))
    assert len(index) == 0
    options: dict[str, Any]
    for options, message in (
        ({"min_match": 0}, "min_match is 0"),
        ({"max_occurrences": 0}, "max_occurrences is 0"),
        ({"factor": 0.0}, "factor is 0.000000, expected more than 0"),
        ({"doubt": float("nan")}, "doubt is nan, expected at least 0"),
        ({"min_probability": -0.5}, "min_probability is -0.500000, expected between 0 and 1"),
        ({"context": [-1]}, "token 0 is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            index.propose(4, **options)
    with pytest.raises(ValueError, match="max_tokens is 0, expected between 1 and 65536"):
        index.propose(0)


def test_threads_can_share_a_suffix_index() -> None:
    """Each adds sequences of its own tokens, and asks for them while the others add theirs."""
    index = host.SuffixIndex(4000, 8)
    failures: list[str] = []

    def work(token: int) -> None:
        for _ in range(50):
            index.extend([token, token + 1, token + 2] * 4)
            draft = index.propose(2, context=[token, token + 1, token + 2])
            if len(draft.tokens) == 0:
                failures.append(f"nothing after {token}")

    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(index) == 4 * 50 * 12 <= 4000

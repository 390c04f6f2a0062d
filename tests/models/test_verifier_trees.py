"""Trees of tokens in one pass: each branch gets the logits that it has as a chain, path by path."""

from typing import Any

import pytest
import torch
from tests.models import verifier_models
from tests.models.verifier_models import LAYERS, MODELS
from torch import Tensor

from speculators.models.verifier.architecture import UnsupportedVerifierError
from speculators.models.verifier.tree import TokenTree
from speculators.models.verifier.verifier import Verifier

LENGTHS = [9, 3, 14]  # of the prompts; windows are 8 wide
# The second tree is smaller: its last nodes are padding.
PARENTS = [[-1, 0, 0, 1, 1, 2, 3, 5], [-1, 0, 0, 2, 3, -1, -1, -1], [-1, 0, 1, 2, 3, 4, 5, 6]]
PATHS = ([[0, 2, 5], [0, 2, 3], [0, 1, 2]], [[0, 1, 3, 6], [0], [0, 1, 2]])


def tree_of(parents: list[list[int]]) -> TokenTree:
    depths = torch.zeros(len(parents), len(parents[0]), dtype=torch.int64)
    sees = torch.eye(len(parents[0]), dtype=torch.bool).repeat(len(parents), 1, 1)
    for row, of_row in enumerate(parents):
        for node, parent in enumerate(of_row):
            if parent >= 0:
                depths[row, node] = depths[row, parent] + 1
                sees[row, node] |= sees[row, parent]
    return TokenTree(depths, sees)


def branch(parents: list[int], node: int) -> list[int]:
    nodes = [node]
    while parents[nodes[-1]] >= 0:
        nodes.append(parents[nodes[-1]])
    return nodes[::-1]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.fixture(params=[*MODELS, "llama eager"], scope="module")
def verifier(request: pytest.FixtureRequest) -> Verifier:
    name, _, attention = request.param.partition(" ")
    model = verifier_models.make(name)
    if attention:
        model.set_attn_implementation(attention)
    return Verifier(model)


@pytest.mark.parametrize("paths", PATHS)
def test_branches_are_what_they_are_alone(verifier: Verifier, paths: list[list[int]]) -> None:
    prompts = [verifier_models.tokens(1, n, seed=n)[0] for n in LENGTHS]
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - n for n in LENGTHS])
    state = verifier.prefill(ids, mask).state
    assert state is not None
    nodes = verifier_models.tokens(3, 8, seed=3)
    output = verifier.step(nodes, state, tree=tree_of(PARENTS), capture=[LAYERS - 1])
    assert output.logits is not None
    for row, parents in enumerate(PARENTS):
        for node in range(8 if row != 1 else 5):
            chain = nodes[row, branch(parents, node)]
            alone = verifier.prefill(torch.cat([prompts[row], chain])[None], capture=[LAYERS - 1])
            assert alone.logits is not None
            close(output.logits[row, node], alone.logits[0, -1])
            close(output.captured[LAYERS - 1][row, node], alone.captured[LAYERS - 1][0, -1])
    path = torch.tensor([kept + [0] * (4 - len(kept)) for kept in paths])
    verifier.keep_path(state, 8, path, [len(kept) for kept in paths])
    lengths = [n + len(kept) for n, kept in zip(LENGTHS, paths, strict=True)]
    assert state.lengths.tolist() == lengths
    assert state.slots == max(lengths)
    layer: Any = state.cache.layers[0]
    place = layer.keys.data_ptr()
    again = verifier.step(nodes[:, :3], state)
    assert layer.keys.data_ptr() == place  # what is kept is not copied again
    assert again.logits is not None
    for row, kept in enumerate(paths):
        whole = torch.cat([prompts[row], nodes[row, kept], nodes[row, :3]])[None]
        expected = verifier.prefill(whole, logits="all").logits
        assert expected is not None
        close(again.logits[row], expected[0, -3:])


def test_attention_in_chunks_is_refused() -> None:
    model = verifier_models.make("llama")
    verifier = Verifier(model)
    state = verifier.prefill(verifier_models.tokens(1, 4)).state
    assert state is not None
    verifier.check_trees()
    model.config.layer_types = ["chunked_attention"] * LAYERS
    with pytest.raises(UnsupportedVerifierError, match=r"chunked_attention.*draft chains instead"):
        verifier.step(verifier_models.tokens(1, 3), state, tree=tree_of([[-1, 0, 0]]))


def test_a_decoder_that_passes_over_the_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = verifier_models.make("llama")
    verifier = Verifier(model)
    decoder = model.get_decoder()
    forward = decoder.forward

    def deaf(**arguments: object) -> object:
        return forward(**arguments | {"attention_mask": None})

    monkeypatch.setattr(decoder, "forward", deaf)
    state = verifier.prefill(verifier_models.tokens(1, 4)).state
    assert state is not None
    for _ in range(2):  # what was found is remembered
        with pytest.raises(UnsupportedVerifierError, match="does not keep the branches"):
            verifier.step(verifier_models.tokens(1, 3), state, tree=tree_of([[-1, 0, 0]]))


def test_wrong_trees_and_paths() -> None:
    verifier = Verifier(verifier_models.make("llama"))
    state = verifier.prefill(verifier_models.tokens(1, 4)).state
    assert state is not None
    with pytest.raises(ValueError, match=r"depths \[1, 3\] .* tokens \[1, 2\]"):
        verifier.step(verifier_models.tokens(1, 2), state, tree=tree_of([[-1, 0, 0]]))
    verifier.step(verifier_models.tokens(1, 3), state, tree=tree_of([[-1, 0, 0]]))
    with pytest.raises(ValueError, match=r"path is \[2, 1\].*expected \[1, R\]"):
        verifier.keep_path(state, 3, torch.zeros(2, 1, dtype=torch.int64), [1, 1])
    with pytest.raises(ValueError, match=r"counts are \[2\]; expected 1 to 1"):
        verifier.keep_path(state, 3, torch.zeros(1, 1, dtype=torch.int64), [2])


def test_a_check_that_fails_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Verifier(verifier_models.make("llama"))

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(verifier, "step", fail)
        with pytest.raises(MemoryError):
            verifier.check_trees()
    monkeypatch.setattr(verifier, "_branches_are_separate", lambda: False)
    with pytest.raises(UnsupportedVerifierError, match="draft chains instead"):
        verifier.check_trees()

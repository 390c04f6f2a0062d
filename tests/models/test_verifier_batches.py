"""Batches: padding on the left and packed documents give each text what it gets alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tests.models import verifier_models
from tests.models.verifier_models import LAYERS, MODELS, WINDOW
from torch import Tensor

from speculators.models.verifier.architecture import UnsupportedVerifierError
from speculators.models.verifier.verifier import Verifier

# Transformers' gpt-oss does not separate packed documents; that it is refused is tested below.
PACKABLE = [name for name in MODELS if name != "gpt_oss"]
LENGTHS = [3, 3 * WINDOW, 1]


@pytest.fixture(params=list(MODELS), scope="module")
def verifier(request: pytest.FixtureRequest) -> Verifier:
    return Verifier(verifier_models.make(request.param))


@pytest.fixture(scope="module")
def documents() -> list[Tensor]:
    return [verifier_models.tokens(1, length, seed=length) for length in LENGTHS]


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def padded(documents: list[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    width = max(document.shape[1] for document in documents)
    rows = [torch.nn.functional.pad(d, (width - d.shape[1], 0), value=pad) for d in documents]
    real = [torch.nn.functional.pad(torch.ones_like(d), (width - d.shape[1], 0)) for d in documents]
    return torch.cat(rows), torch.cat(real)


def test_padding_on_the_left_changes_nothing(verifier: Verifier, documents: list[Tensor]) -> None:
    input_ids, mask = padded(documents, pad=7)
    output = verifier.prefill(input_ids, mask, capture=[0, 2, LAYERS], logits="all")
    new = verifier_models.tokens(len(documents), 4, seed=1)
    assert output.state is not None
    assert output.state.lengths.tolist() == LENGTHS
    stepped = verifier.step(new, output.state, capture=[2])
    assert output.logits is not None
    assert stepped.logits is not None
    for row, document in enumerate(documents):
        alone = verifier.prefill(document, capture=[0, 2, LAYERS], logits="all")
        length = document.shape[1]
        close(output.logits[row : row + 1, -length:], alone.logits)
        for k in (0, 2, LAYERS):
            close(output.captured[k][row : row + 1, -length:], alone.captured[k])
        assert alone.state is not None
        continued = verifier.step(new[row : row + 1], alone.state, capture=[2])
        close(stepped.logits[row : row + 1], continued.logits)
        close(stepped.captured[2][row : row + 1], continued.captured[2])


@pytest.mark.parametrize("verifier", PACKABLE, indirect=True)
def test_packed_documents_see_themselves_only(verifier: Verifier, documents: list[Tensor]) -> None:
    row = torch.cat(documents, 1)
    ends = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    output = verifier.prefill(row, cu_seqlens=torch.tensor(ends), capture=[2, LAYERS], logits="all")
    assert output.state is None
    assert output.logits is not None
    for document, begin, end in zip(documents, ends, ends[1:], strict=False):
        alone = verifier.prefill(document, capture=[2, LAYERS], logits="all")
        close(output.logits[:, begin:end], alone.logits)
        for k in (2, LAYERS):
            close(output.captured[k][:, begin:end], alone.captured[k])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_5_vl"])
def test_several_packed_rows_by_positions(name: str, attention: str) -> None:
    model = verifier_models.make(name)
    model.set_attn_implementation(attention)
    verifier = Verifier(model)
    rows = verifier_models.tokens(2, 12)
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    output = verifier.prefill(rows, position_ids=positions, logits="all")
    assert output.logits is not None
    for row, begin, end in [(0, 0, 5), (0, 5, 12), (1, 0, 12)]:
        alone = verifier.prefill(rows[row : row + 1, begin:end], logits="all")
        close(output.logits[row : row + 1, begin:end], alone.logits)


def test_padding_leaves_with_the_longest_row(verifier: Verifier, documents: list[Tensor]) -> None:
    input_ids, mask = padded(documents)
    state = verifier.prefill(input_ids, mask).state
    assert state is not None
    drafted = verifier_models.tokens(3, 5, seed=1)
    verifier.step(drafted[:, :3], state)
    for rows in ([2, 0], [1]):  # of the rows that are left
        state.select(rows)
        documents = [documents[row] for row in rows]
        drafted = drafted[rows]
        lengths = [document.shape[1] + 3 for document in documents]
        assert state.lengths.tolist() == state.host_lengths == lengths
        assert state.slots == max(lengths)
        assert state.padded == (len(rows) > 1)
        output = verifier.step(drafted[:, 3:], state)
        assert output.logits is not None
        for row, document in enumerate(documents):
            whole = torch.cat([document[0], drafted[row]])[None]
            alone = verifier.prefill(whole, logits="all").logits
            assert alone is not None
            close(output.logits[row], alone[0, -2:])
        verifier.crop(state, torch.tensor(lengths))


def test_what_an_uneven_crop_moved_is_not_copied_again() -> None:
    verifier = Verifier(verifier_models.make("llama"))
    state = verifier.prefill(verifier_models.tokens(3, 9)).state
    assert state is not None
    layers: Any = state.cache.layers

    def places() -> list[int]:
        return [tensor.data_ptr() for layer in layers for tensor in (layer.keys, layer.values)]

    for lengths in ([9, 12, 10], [13, 12, 11]):
        verifier.step(verifier_models.tokens(3, 4), state)
        verifier.crop(state, torch.tensor(lengths))
        moved = places()
        verifier.step(verifier_models.tokens(3, 4), state)
        assert places() == moved  # the new tokens are behind the old ones
        verifier.crop(state, torch.tensor(lengths))


@pytest.mark.parametrize("counts", [[1, 3, 2], [2, 2, 2]])
def test_to_drop_tokens_and_rows_waits_for_no_device(counts: list[int]) -> None:
    verifier = Verifier(verifier_models.make("llama"))
    state = verifier.prefill(verifier_models.tokens(3, 5)).state
    assert state is not None
    verifier.step(verifier_models.tokens(3, 4), state)
    layers: Any = state.cache.layers
    # A device from which nothing can be read.
    for layer in layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    state.lengths = state.lengths.to("meta")
    verifier.keep_path(state, 4, torch.tensor([[0, 1, 2]] * 3, device="meta"), counts)
    assert state.host_lengths == [5 + count for count in counts]
    verifier.crop(state, [6, 4 + counts[1], 6])
    state.select([2, 1])
    assert state.host_lengths == [6, 4 + counts[1]]
    assert [layer.values.shape[2] for layer in layers] == [4 + counts[1]] * LAYERS


def llama4_with_chunks() -> transformers.PreTrainedModel:
    config = transformers.Llama4TextConfig(
        **verifier_models.BASE,
        intermediate_size_mlp=48,
        head_dim=8,
        attention_chunk_size=WINDOW,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize("make", [llama4_with_chunks, lambda: verifier_models.make("gpt_oss")])
def test_packing_is_refused_where_documents_would_mix(
    make: Callable[[], transformers.PreTrainedModel],
) -> None:
    verifier = Verifier(make())
    for _ in range(2):
        with pytest.raises(UnsupportedVerifierError, match="does not separate packed documents"):
            verifier.prefill(
                verifier_models.tokens(1, 6), cu_seqlens=torch.tensor([0, 2, 6]), logits="all"
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "padding after a token"),
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "padding after a token"),
        ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "padding alone"),
        ({"attention_mask": torch.ones(2, 4)}, r"\[2, 4\]; expected \[2, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 3]), "logits": "all"}, "pack one row"),
        ({"position_ids": torch.tensor([[0, 1, 2]]), "logits": "all"}, r"expected \[2, 3\]"),
        ({"position_ids": torch.tensor([[0, 1, 2], [1, 2, 3]]), "logits": "all"}, "count up"),
        ({"position_ids": torch.tensor([[0, 1, 2], [0, 2, 3]]), "logits": "all"}, "count up"),
        ({"position_ids": torch.tensor([[0, 1, 2], [0, 1, 2]])}, "no last token"),
        ({"logits": "first"}, "'last', 'all' or 'none'"),
        ({"capture": [-1]}, r"layer id -1 is out of range; .* 4 \("),
        ({"capture": [5]}, "layer id 5"),
        ({"capture": [1.0]}, "layer id 1.0"),
        ({"capture": [1, 1]}, "repeat"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    verifier = Verifier(verifier_models.make("llama"))
    with pytest.raises(ValueError, match=message):
        verifier.prefill(verifier_models.tokens(2, 3), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("ends", [[0, 2], [1, 6], [0, 3, 3, 6], [0, 5, 2, 6]])
def test_wrong_document_ends(ends: list[int]) -> None:
    verifier = Verifier(verifier_models.make("llama"))
    with pytest.raises(ValueError, match="rise from 0 to the row's 6 tokens"):
        verifier.prefill(verifier_models.tokens(1, 6), cu_seqlens=torch.tensor(ends), logits="none")


def test_wrong_tokens_rows_and_lengths() -> None:
    verifier = Verifier(verifier_models.make("llama"))
    for wrong in (torch.zeros(3, dtype=torch.long), torch.zeros(1, 0).long(), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=r"expected integers \[B, T\]"):
            verifier.prefill(wrong)
    state = verifier.prefill(verifier_models.tokens(2, 5)).state
    assert state is not None
    with pytest.raises(ValueError, match="3 rows of tokens for a state of 2"):
        verifier.step(verifier_models.tokens(3, 1), state)
    for lengths in (6, 0, torch.tensor([5, 6])):
        with pytest.raises(ValueError, match=r"cannot crop rows of \[5, 5\]"):
            verifier.crop(state, lengths)
    for wrong in (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="expected one integer, or integers"):
            verifier.crop(state, wrong)
    verifier.crop(state, 5)
    assert state.slots == 5

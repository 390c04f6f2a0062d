"""The lossless loop: transformers' own greedy tokens, whatever drafts, wherever texts end."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.decoding.drafts import make_draft
from tests.decoding.scripted_drafter import ScriptedDrafter
from tests.models import verifier_models
from tests.models.verifier_models import LAYERS, VOCABULARY, WINDOW
from torch import Tensor

from speculators.decoding.combined_drafter import CombinedDrafter
from speculators.decoding.draft_models import Draft, Shaped, WithSuffix
from speculators.decoding.drafters import NgramDrafter
from speculators.decoding.generation import GenerationOutput, generate, generate_stream
from speculators.decoding.sampling import Sampling
from speculators.decoding.settings import GenerationSettings, pad_prompts
from speculators.decoding.suffix_drafter import SuffixDrafter, suffix_corpus
from speculators.models.verifier.verifier import Verifier

MODELS = ["llama", "qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3", "gpt_oss", "gemma4"]
PROMPTS = [verifier_models.tokens(n, seed=n).tolist() for n in (5, 2 * WINDOW, 1, 12)]
NEW = 2 * WINDOW
TINY = Path(__file__).parents[2] / "examples/tiny_verifier/model"


@dataclasses.dataclass
class Case:
    """A verifier, and what transformers' generate says."""

    verifier: Verifier
    expected: list[list[int]]


@pytest.fixture(params=MODELS, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module")
def llama() -> Case:
    return make_case("llama")


def make_case(name: str) -> Case:
    model = verifier_models.make(name)
    input_ids, mask = pad_prompts(PROMPTS)
    assert mask is not None
    output = model.generate(
        input_ids=input_ids, attention_mask=mask.long(), max_new_tokens=NEW, do_sample=False
    )
    eos = verifier_models.BASE["eos_token_id"]
    rows = [row[input_ids.shape[1] :] for row in output.tolist()]
    return Case(Verifier(model), [until(row, eos) for row in rows])


def until(tokens: list[int], last: int) -> list[int]:
    return tokens[: tokens.index(last) + 1] if last in tokens else tokens


def perfect(case: Case, capture: tuple[int, ...] = ()) -> ScriptedDrafter:
    return ScriptedDrafter(PROMPTS, case.expected, capture=capture)


def adversarial(case: Case) -> ScriptedDrafter:
    return ScriptedDrafter(PROMPTS, case.expected, lambda _r, _p, token: (token + 1) % VOCABULARY)


def sometimes_right(case: Case) -> ScriptedDrafter:
    def change(row: int, place: int, token: int) -> int:
        return token if (row * 7 + place * place) % 4 else 3

    return ScriptedDrafter(PROMPTS, case.expected, change, (2, LAYERS))


DRAFTS: dict[str, Callable[[Case], Draft]] = {
    "none": lambda _: None,
    "n-gram": lambda _: NgramDrafter(3, 1),
    "suffix": lambda _: SuffixDrafter(),
    "suffix with a corpus": lambda case: SuffixDrafter(
        suffix_corpus([row[::-1] for row in case.expected]), remember=True
    ),
    "perfect": perfect,
    "adversarial": adversarial,
    "sometimes right": sometimes_right,
    "eagle": lambda case: make_draft("eagle", case.verifier),
    "hass": lambda case: make_draft("hass", case.verifier),
    "eagle3": lambda case: make_draft("eagle3", case.verifier, draft_vocab_size=32),
    "eagle with suffix": lambda case: WithSuffix(make_draft("eagle", case.verifier)),
    "eagle3 with suffix": lambda case: WithSuffix(
        make_draft("eagle3", case.verifier, draft_vocab_size=32), SuffixDrafter(doubt=0.0)
    ),
}


@pytest.mark.parametrize("draft", list(DRAFTS))
def test_greedy_tokens_are_those_of_transformers(case: Case, draft: str) -> None:
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=4)
    output = generate(case.verifier, DRAFTS[draft](case), PROMPTS, settings)
    assert output.sequences == case.expected
    for tokens, trace, reason in zip(
        output.sequences, output.traces, output.finish_reasons, strict=True
    ):
        assert reason == ("eos" if tokens[-1] == verifier_models.BASE["eos_token_id"] else "length")
        # One token of the prompt's pass, then one and the accepted ones of each verification; the
        # end cuts off fewer than a whole verification emits.
        assert 0 <= 1 + len(trace) + sum(trace) - len(tokens) <= (trace[-1] if trace else 0)
    acceptance = output.acceptance
    assert acceptance.accepted == sum(map(sum, output.traces))
    assert acceptance.verifications == sum(map(len, output.traces))
    if draft == "perfect":
        longest = max(map(len, output.sequences))
        assert max(map(len, output.traces)) == -(-(longest - 1) // 5)
    if draft == "adversarial":
        assert acceptance.tau == 1.0
        assert acceptance.drafted == 4 * acceptance.verifications


def test_the_drafter_is_told_the_tokens_and_shown_their_states(case: Case) -> None:
    drafter = sometimes_right(case)
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=4)
    output = generate(case.verifier, drafter, PROMPTS, settings)
    assert output.acceptance.accepted > 0
    for row, prompt in enumerate(PROMPTS):
        whole = prompt + output.sequences[row]
        told = drafter.told[row]
        assert told == whole[: len(told)]
        if len(output.sequences[row]) == 1:
            continue  # it ended with the prompt's pass
        states = case.verifier.prefill(torch.tensor([told]), capture=(2, LAYERS)).captured
        for k in (2, LAYERS):
            shown = torch.cat([streams[k] for streams in drafter.shown[row]])
            assert len(shown) == len(told) - 1
            torch.testing.assert_close(shown, states[k][0, :-1], rtol=1e-4, atol=1e-4)


def test_nothing_is_read_twice(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    read = [0]
    step = llama.verifier.step

    def counted(input_ids: Tensor, *rest: Any, **options: Any) -> Any:
        read[0] += input_ids.numel()
        return step(input_ids, *rest, **options)

    monkeypatch.setattr(llama.verifier, "step", counted)
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=4)
    output = generate(llama.verifier, sometimes_right(llama), PROMPTS, settings)
    assert read[0] == output.acceptance.verifications + output.acceptance.drafted


def test_each_text_can_end_inside_of_an_accepted_block(llama: Case) -> None:
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=3)
    places = set()
    for token in {token for row in llama.expected for token in row}:
        ended = dataclasses.replace(settings, eos_token_ids=(token,))
        output = generate(llama.verifier, perfect(llama), PROMPTS, ended)
        assert output.sequences == [until(row, token) for row in llama.expected]
        for tokens, reason in zip(output.sequences, output.finish_reasons, strict=True):
            assert (reason == "eos") == (tokens[-1] == token)
            if reason == "eos":
                places.add((len(tokens) - 1) % 4)
    assert places == set(range(4))  # at every place of a block


@pytest.mark.parametrize("limit", [1, 2, 5, 6])
@pytest.mark.parametrize("draft", ["none", "perfect", "adversarial"])
def test_max_new_tokens(llama: Case, draft: str, limit: int) -> None:
    settings = GenerationSettings(max_new_tokens=limit, num_draft_tokens=4)
    output = generate(llama.verifier, DRAFTS[draft](llama), PROMPTS, settings)
    assert output.sequences == [row[:limit] for row in llama.expected]
    assert output.finish_reasons == ["length"] * len(PROMPTS)


@pytest.mark.parametrize("draft", ["none", "perfect", "adversarial", "eagle"])
def test_no_position_beyond_the_last_is_read(
    llama: Case, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = max(map(len, PROMPTS)) + 7
    step = llama.verifier.step

    def checked(input_ids: Tensor, state: Any, **options: Any) -> Any:
        # The last token that a sequence can have is not read, as nothing comes after it.
        assert int(state.lengths.max()) + input_ids.shape[1] <= limit - 1
        return step(input_ids, state, **options)

    monkeypatch.setattr(llama.verifier, "step", checked)
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=4, max_length=limit)
    output = generate(llama.verifier, DRAFTS[draft](llama), PROMPTS, settings)
    rooms = [min(NEW, limit - len(prompt)) for prompt in PROMPTS]
    expected = [row[:room] for row, room in zip(llama.expected, rooms, strict=True)]
    assert output.sequences == expected


@pytest.mark.parametrize("draft", ["none", "sometimes right"])
def test_the_longest_prompt_takes_its_padding_away(
    llama: Case, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = llama.verifier.step
    slots: list[int] = []

    def checked(input_ids: Tensor, state: Any, **options: Any) -> Any:
        assert state.slots == int(state.lengths.max())
        slots.append(state.slots)
        return step(input_ids, state, **options)

    monkeypatch.setattr(llama.verifier, "step", checked)
    limit = max(map(len, PROMPTS)) + 2
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=2, max_length=limit)
    generate(llama.verifier, DRAFTS[draft](llama), PROMPTS, settings)
    assert slots[0] == len(PROMPTS[1]) > slots[1]  # the others go on without it


def test_the_verifiers_own_positions_are_the_limit(llama: Case) -> None:
    positions = verifier_models.BASE["max_position_embeddings"]
    prompt = verifier_models.tokens(positions - 3).tolist()
    output = generate(llama.verifier, NgramDrafter(2, 1), [prompt])
    assert len(output.sequences[0]) == 3
    assert output.finish_reasons == ["length"]
    with pytest.raises(ValueError, match=f"{positions} tokens; expected fewer than {positions}"):
        generate(llama.verifier, None, [[*prompt, 5, 5, 5]])


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        ([[5] * 3, [5] * 9], None, "a prompt has 9 tokens; expected fewer than 9, .* shorten it"),
        ([[5], [5, 61]], None, "prompt 1 has token id 61; expected 0 to 60, .* tokenizer"),
        ([[5, -1]], None, "prompt 0 has token id -1; expected 0 to 60"),
        (torch.tensor([[5, 5], [-100, 5]]), torch.tensor([[1, 1], [0, 1]]), "prompt 1 .* id -100"),
        (torch.tensor([[5, 5]]), torch.tensor([[1, 0]]), "padding after a token"),
        (torch.tensor([5, 5]), None, r"int64 \[2\]; expected integers \[B, T\]"),
    ],
)
def test_nothing_is_read_of_prompts_that_cannot_be_continued(
    llama: Case, prompts: Any, mask: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the prompts were read")

    monkeypatch.setattr(llama.verifier, "prefill", never)
    settings = GenerationSettings(max_length=9)
    with pytest.raises(ValueError, match=message):
        generate(llama.verifier, None, prompts, settings, attention_mask=mask)


def test_the_mask_says_how_long_prompts_are(llama: Case) -> None:
    prompt = [0] * 6 + PROMPTS[0]
    mask = torch.tensor([[0] * 6 + [1] * len(PROMPTS[0])])
    settings = GenerationSettings(max_length=len(PROMPTS[0]) + 2)
    output = generate(llama.verifier, None, torch.tensor([prompt]), settings, attention_mask=mask)
    assert output.sequences == [llama.expected[0][:2]]


def test_streams_are_the_output_in_pieces(llama: Case) -> None:
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=4)
    called: list[list[list[int]]] = []
    generate(llama.verifier, perfect(llama), PROMPTS, settings, stream=called.append)
    yielded = list(generate_stream(llama.verifier, perfect(llama), PROMPTS, settings))
    assert called == yielded
    joined = [[t for piece in yielded for t in piece[row]] for row in range(len(PROMPTS))]
    assert joined == llama.expected
    assert max(len(piece[0]) for piece in yielded) == 5


@pytest.mark.parametrize("drafted", [False, True])
def test_stop_strings_end_a_text(drafted: bool) -> None:
    verifier = Verifier.from_pretrained(TINY, dtype=torch.float32)
    prompt = verifier.tokenizer("Once upon a time")["input_ids"]
    settings = GenerationSettings(max_new_tokens=24, eos_token_ids=(), num_draft_tokens=5)
    plain = generate(verifier, None, [prompt], settings).sequences[0]
    text = str(verifier.tokenizer.decode(plain))
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    end = next(n for n in range(25) if stop in verifier.tokenizer.decode(plain[:n]))
    draft = ScriptedDrafter([prompt], [plain]) if drafted else None
    stopped = dataclasses.replace(settings, stop_strings=("no such text", stop))
    output = generate(verifier, draft, [prompt], stopped)
    assert output.sequences == [plain[:end]]
    assert output.finish_reasons == ["stop"]


def test_a_tensor_of_prompts_is_the_same_as_lists(llama: Case) -> None:
    input_ids, mask = pad_prompts(PROMPTS)
    settings = GenerationSettings(max_new_tokens=NEW)
    output = generate(llama.verifier, NgramDrafter(), input_ids, settings, attention_mask=mask)
    assert output.sequences == llama.expected


@pytest.mark.parametrize("tokens", [2, 3])
def test_the_draft_says_how_many_tokens_it_drafts(llama: Case, tokens: int) -> None:
    draft = make_draft("eagle", llama.verifier, speculative_tokens=tokens)
    settings = GenerationSettings(max_new_tokens=9)
    output = generate(llama.verifier, draft, PROMPTS, settings)
    assert len(output.acceptance.drafted_by_position) == tokens
    output = generate(llama.verifier, WithSuffix(draft), PROMPTS, settings)
    assert len(output.acceptance.drafted_by_position) == tokens
    settings = dataclasses.replace(settings, num_draft_tokens=1)
    output = generate(llama.verifier, draft, PROMPTS, settings)
    assert len(output.acceptance.drafted_by_position) == 1


def sampled(case: Case, rows: list[int], generator: Any, draft: str = "eagle") -> GenerationOutput:
    settings = GenerationSettings(
        max_new_tokens=8, sampling=Sampling(2.0, top_k=30), num_draft_tokens=3
    )
    prompts = [PROMPTS[row] for row in rows]
    return generate(case.verifier, DRAFTS[draft](case), prompts, settings, generator=generator)


@pytest.mark.parametrize("draft", ["none", "eagle", "suffix", "eagle with suffix"])
def test_sampling_is_reproducible(llama: Case, draft: str) -> None:
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    rows = [0, 2, 3]
    first = sampled(llama, rows, seeded(0), draft).sequences
    assert sampled(llama, rows, seeded(0), draft).sequences == first
    assert sampled(llama, rows, seeded(1), draft).sequences != first
    # With a generator each, a sequence does not depend on its batch.
    batch = sampled(llama, rows, [seeded(row) for row in rows], draft).sequences
    for row, expected in zip(rows, batch, strict=True):
        assert sampled(llama, [row], [seeded(row)], draft).sequences == [expected]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one list of at least one token"),
        ([[1, 2], []], {}, r"prompts of \[2, 0\] tokens"),
        ([[1]], {"attention_mask": torch.ones(1, 1)}, "a mask for a tensor only"),
        ([[1], [2]], {"generator": [torch.Generator()]}, "1 generators for 2 sequences"),
    ],
)
def test_wrong_prompts(
    llama: Case, prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(llama.verifier, None, prompts, **options)


def test_what_is_no_draft_for_this_verifier(llama: Case) -> None:
    wrong: Any
    for wrong in ("ngram", 5, NgramDrafter):
        with pytest.raises(ValueError, match=r"the draft is .*; expected a draft model .* or None"):
            generate(llama.verifier, wrong, PROMPTS)
    draft = make_draft("eagle", llama.verifier)
    with pytest.raises(ValueError, match="num_draft_tokens is 0; expected at least 1, or None"):
        Shaped(draft, num_draft_tokens=0)
    for elsewhere in (draft.to("meta"), Shaped(draft), WithSuffix(draft)):
        with pytest.raises(ValueError, match="draft is on meta and its verifier on cpu; expected"):
            generate(llama.verifier, elsewhere, PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"max_length": -1}, "max_length is -1"),
        ({"draft_sampling": "both"}, "'sample' or 'greedy'"),
        ({"stop_strings": "END"}, "'END'; expected a tuple of strings"),
        ({"eos_token_ids": 2}, r"eos_token_ids is 2; expected a tuple of token ids: \(2,\)"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**arguments)


@pytest.mark.parametrize("together", [False, True])
def test_a_drafter_that_remembers_has_whole_texts(llama: Case, together: bool) -> None:
    """Also what the last verification of a text emitted."""
    corpus = suffix_corpus([])
    suffix = SuffixDrafter(corpus, remember=True)
    draft: Draft = suffix
    if together:
        draft = CombinedDrafter(perfect(llama), suffix)
    settings = GenerationSettings(max_new_tokens=NEW, num_draft_tokens=3)
    assert generate(llama.verifier, draft, PROMPTS, settings).sequences == llama.expected
    generate(llama.verifier, suffix, [[1]], GenerationSettings(max_new_tokens=2))
    # A text that ended with its first token never came to a drafter.
    told = [text for text in llama.expected if len(text) > 1]
    assert len(corpus) == len(suffix_corpus(told))
    for text in told:
        assert corpus.propose(1, context=text[:-1], min_match=8).tokens.tolist() == [text[-1]]

"""Tiny training runs: a random verifier, a store of texts that it wrote itself, a draft for it."""

import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from tests.models.verifier_models import LAYERS, VOCABULARY, make, tokens

from speculators.data.store import HiddenStateStore, StoreIndex, StoreWriter
from speculators.decoding import GenerationSettings, generate
from speculators.models import SpeculatorModel, VocabularyMapping, find_algorithm
from speculators.models.objective import ObjectiveSettings, StepwiseObjective
from speculators.models.verifier import Verifier
from speculators.training import TrainingReport, TrainingSettings, merge_settings, train

PROMPT = 4
STREAMS = (1, 2, 3, LAYERS)

# Quick, and without files of a tracker.
BASE: dict[str, Any] = {
    "epochs": 2,
    "row_tokens": 48,
    "rows_per_batch": 2,
    "accumulation": 2,
    "optimizer.learning_rate": 1e-2,
    "tracker.name": "none",
    "validation.documents": 3,
    "validation.prompts": 0,
    "validation.max_new_tokens": 12,
}


def make_verifier() -> Verifier:
    """A Llama of four layers, always the same, that is sure of what it says."""
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return Verifier(model)


def make_store(
    directory: pathlib.Path, verifier: Verifier, documents: int = 12, name: str = "tiny"
) -> HiddenStateStore:
    """Prompts of ``PROMPT`` tokens and what the verifier says to them, of different lengths."""
    index = StoreIndex(
        content_hash=f"store-{name}-{documents}",
        made_from={},
        verifier="tiny",
        layer_ids=list(STREAMS),
        hidden_size=verifier.hidden_size,
        dtype="float32",
        num_documents=documents,
    )
    writer = StoreWriter(directory, index)
    for number in range(documents):
        prompt = tokens(PROMPT, seed=number).tolist()
        settings = GenerationSettings(max_new_tokens=8 + 5 * number % 29, eos_token_ids=())
        text = torch.tensor(prompt + generate(verifier, None, [prompt], settings).sequences[0])
        streams = verifier.prefill(text[None], capture=STREAMS, logits="none").captured
        states = {layer: stream[0] for layer, stream in streams.items()}
        writer.add(number, text, torch.arange(len(text)) >= PROMPT, states)
    writer.write_shard()
    writer.finish()
    return HiddenStateStore.open(directory)


def make_draft(name: str, verifier: Verifier, seed: int = 1) -> Any:
    """A new draft, whose parts have no types; EAGLE-3's has a vocabulary of its own."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {}
    mapping = None
    if name == "eagle3":
        options = {"draft_vocab_size": 40, "aux_layer_ids": [1, 2, 3]}
        mapping = VocabularyMapping.from_counts(tokens(VOCABULARY), 40)
    config = find_algorithm(name).new_config(verifier.config, **options)
    return SpeculatorModel.from_config(config, verifier, vocabulary=mapping)


def make_objective(draft: SpeculatorModel, verifier: Verifier, **changes: Any) -> StepwiseObjective:
    """The objective of the draft's algorithm."""
    settings = ObjectiveSettings(**(draft.spec.objective_settings.model_dump() | changes))
    return draft.spec.objective(draft, verifier.head, settings)


def settings_of(changes: Mapping[str, Any] | None = None) -> TrainingSettings:
    """The quick settings, with changes by dotted name."""
    return merge_settings(TrainingSettings, BASE, changes or {})


def run(
    directory: pathlib.Path,
    store: HiddenStateStore,
    verifier: Verifier,
    changes: Mapping[str, Any] | None = None,
    *,
    draft: SpeculatorModel | None = None,
    drafting: bool = False,
    **options: Any,
) -> TrainingReport:
    """Trains a new HASS draft, or the one that is given, and validates by ``drafting`` or not."""
    draft = draft or make_draft("hass", verifier)
    objective = make_objective(draft, verifier)
    options["verifier"] = verifier if drafting else None
    return train(draft, objective, store, settings_of(changes), directory, **options)


def weights(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """The weights of a draft's directory."""
    return SpeculatorModel.from_pretrained(directory).state_dict()

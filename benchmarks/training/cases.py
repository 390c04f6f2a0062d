"""The cases T1 and T2, and what both libraries are given: a verifier, its states, a new draft.

Everything is random but for one thing: the verifier's head is scaled so that it is about as sure of
its next token as a trained one, for between flat distributions no loss would show a difference.
"""

import dataclasses
import json
import pathlib
from typing import Final

import torch
from benchmarks.training.driver import STEPS
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from speculators.models import SpeculatorModel, find_algorithm
from speculators.models.verifier import Verifier

VERIFIER, DRAFT, BATCHES, CASE = "verifier", "draft", "batches", "case.json"

LOGIT_SIZE: Final = 3.0
"""The standard deviation of the verifier's logits, about."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An EAGLE-3 draft of one Llama layer and its training data.

    Attributes:
        hidden: H, of verifier and draft.
        intermediate: of their MLPs.
        heads: of queries and of keys.
        vocabulary: V, the draft's as well.
        layers: of the verifier.
        streams: residual streams that the draft reads.
        document_tokens: of each document.
        documents: in a packed row; a batch is one row.
        row_tokens: of a row, the rest of which is padding.
        batches: different ones.
    """

    hidden: int
    intermediate: int
    heads: tuple[int, int]
    vocabulary: int
    layers: int
    streams: tuple[int, int, int]
    document_tokens: int
    documents: int
    row_tokens: int
    batches: int

    @property
    def tokens(self) -> int:
        """That a step learns from: the first of a document only says what the second follows."""
        return self.documents * (self.document_tokens - 1)


CASES: Final = {
    "T1": Case(256, 512, (8, 4), 2048, 4, (1, 2, 3), 256, 4, 1024, 90),
    "T2": Case(512, 1408, (8, 4), 8192, 8, (2, 4, 5), 512, 4, 2048, 22),
    "tiny": Case(64, 128, (4, 2), 256, 4, (1, 2, 3), 64, 2, 128, 4),
}


def write(case: Case, folder: pathlib.Path) -> None:
    """Writes verifier, draft and batches.

    ``batches/000.safetensors`` and so on have ``input_ids``, int64 ``[documents, L]``, and
    ``states``, bfloat16 ``[documents, L, 4, H]``: the streams that the draft reads, and the last.
    """
    torch.manual_seed(0)
    verifier = _verifier(case)
    verifier.model.save_pretrained(folder / VERIFIER)
    config = find_algorithm("eagle3").new_config(
        verifier.config,
        str(folder / VERIFIER),
        speculative_tokens=STEPS,
        aux_layer_ids=case.streams,
        draft_vocab_size=case.vocabulary,
        norm_before_residual=True,  # the peer's default
    )
    SpeculatorModel.from_config(config, verifier).save_pretrained(folder / DRAFT)
    (folder / BATCHES).mkdir()
    for number in range(case.batches):
        input_ids = torch.randint(case.vocabulary, (case.documents, case.document_tokens))
        streams = verifier.prefill(
            input_ids, capture=(*case.streams, case.layers), logits="none", use_cache=False
        ).captured
        states = torch.stack([streams[layer] for layer in (*case.streams, case.layers)], 2)
        tensors = {"input_ids": input_ids, "states": states.bfloat16().contiguous()}
        save_file(tensors, folder / BATCHES / f"{number:03}.safetensors")
    (folder / CASE).write_text(json.dumps(dataclasses.asdict(case)))


def _verifier(case: Case) -> Verifier:
    heads, key_heads = case.heads
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=case.hidden // heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=LOGIT_SIZE / case.hidden**0.5)
    return Verifier(model.eval())

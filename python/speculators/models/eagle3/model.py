"""EAGLE-3: a draft that reads several layers of the verifier (Li et al., 2025), with 3.1's options.

The first layer is twice as wide at its entrance: it takes the token's embedding and the state side
by side. The draft has a head, and may have a vocabulary, of its own; its states need not be the
verifier's, so it can be trained through its own steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from speculators.configs.model_config import SpeculatorModelConfig
from speculators.models.decoder import DecoderParts, run_layer
from speculators.models.draft_attention import DraftAttention
from speculators.models.speculator_model import DraftOutput, SpeculatorModel
from speculators.models.vocabulary import VocabularyMapping


class FirstLayer(nn.Module):
    """A decoder layer whose queries, keys and values come from embedding and state side by side.

    Args:
        parts: of the draft.
        norm_before_residual: whether the residual is the state after its norm.
    """

    def __init__(self, parts: DecoderParts, *, norm_before_residual: bool) -> None:
        super().__init__()
        layer: Any = parts.layer(0)  # its parts are modules by name only
        self.input_layernorm = layer.input_layernorm
        self.hidden_norm = parts.norm()
        self.self_attn = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(
                2 * narrow.in_features, narrow.out_features, bias=narrow.bias is not None
            )
            setattr(self.self_attn, name, wide)
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp
        self._norm_before_residual = norm_before_residual

    def forward(
        self,
        embeddings: Tensor,
        states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        draft_attention: DraftAttention,
    ) -> Tensor:
        """From embeddings and states, both ``[B, R, H]``, to states."""
        normed = self.hidden_norm(states)
        residual = normed if self._norm_before_residual else states
        attended, _ = self.self_attn(
            torch.cat([self.input_layernorm(embeddings), normed], -1),
            position_embeddings=position_embeddings,
            attention_mask=None,
            draft_attention=draft_attention,
        )
        states = residual + attended
        output: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return output


class Eagle3DraftModel(SpeculatorModel):
    """The draft of EAGLE-3.

    Args:
        config: of type ``eagle3``.
    """

    def __init__(self, config: SpeculatorModelConfig) -> None:
        super().__init__(config)
        width, streams = self.hidden_size, self.verifier_hidden_size
        self.num_aux_layers = num_aux_layers(config)
        self.embed_tokens = nn.Embedding(self.vocab_size, width)
        self.embed_tokens.requires_grad_(config.embed_requires_grad)
        if config.norm_before_fc:
            self.input_norm = self.parts.norm(self.num_aux_layers * streams)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                self.parts.norm(streams) for _ in range(self.num_aux_layers)
            )
        self.fc = nn.Linear(self.num_aux_layers * streams, width, bias=False)
        first = FirstLayer(self.parts, norm_before_residual=config.norm_before_residual)
        further = range(1, self.parts.config.num_hidden_layers)
        self.layers = nn.ModuleList([first, *(self.parts.layer(index) for index in further)])
        self.norm = self.parts.norm()
        self.lm_head = nn.Linear(width, self.draft_vocab_size, bias=False)
        if self.draft_vocab_size != self.vocab_size:
            mapping = VocabularyMapping.from_ids(
                torch.arange(self.draft_vocab_size, device="cpu"), self.vocab_size
            )
            device = self.fc.weight.device
            self.d2t = nn.Buffer(mapping.d2t.to(device))
            self.t2d = nn.Buffer(mapping.t2d.to(device))

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """Fuses the auxiliary streams, ``[..., n H]`` side by side, into ``[..., H]``."""
        if self.config.norm_before_fc:
            hidden_states = self.input_norm(hidden_states)
        if self.config.fc_norm:
            streams = hidden_states.chunk(self.num_aux_layers, -1)
            normed = [norm(stream) for norm, stream in zip(self.fc_norm, streams, strict=True)]
            hidden_states = torch.cat(normed, -1)
        fused: Tensor = self.fc(hidden_states)
        return fused

    def forward(
        self, input_ids: Tensor, states: Tensor, position_ids: Tensor, attention: DraftAttention
    ) -> DraftOutput:
        """One step; see :meth:`SpeculatorModel.forward`."""
        attention.begin(position_ids)
        embeddings = self.embed_tokens(input_ids).to(states.dtype)
        rotation = self.rotary_emb(states, position_ids)
        states = self.layers[0](embeddings, states, rotation, attention)
        for layer in self.layers[1:]:
            states = run_layer(layer, states, rotation, attention)
        normed = self.norm(states)
        return DraftOutput(normed if self.config.norm_output else states, normed)

    def logits(self, head_input: Tensor) -> Tensor:
        """The draft's logits ``[..., W]``, from its own head."""
        logits: Tensor = self.lm_head(head_input)
        return logits

    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """The head's."""
        return tuple(self.lm_head.parameters())

    @property
    def draft_vocab_size(self) -> int:
        """W, tokens that the draft can propose."""
        return int(self.config.draft_vocab_size)

    @property
    def verifier_hidden_size(self) -> int:
        """The width of the verifier's residual stream."""
        return int(self.config.target_hidden_size or self.hidden_size)

    @property
    def vocabulary(self) -> VocabularyMapping | None:
        """Which tokens the draft knows; None where it knows all."""
        if self.draft_vocab_size == self.vocab_size:
            return None
        return VocabularyMapping(self.d2t, self.t2d)

    def to_verifier_ids(self, draft_ids: Tensor) -> Tensor:
        """From ids of the draft's vocabulary, int64 of any shape, to the verifier's."""
        if self.draft_vocab_size == self.vocab_size:
            return draft_ids
        verifier_ids: Tensor = draft_ids + self.d2t[draft_ids]
        return verifier_ids

    def set_vocabulary(self, vocabulary: VocabularyMapping | None) -> None:
        """Takes a draft vocabulary, or keeps the lowest ids.

        Raises:
            ValueError: it is not of the configuration's sizes.
        """
        if vocabulary is None:
            return
        found = (len(vocabulary.d2t), len(vocabulary.t2d))
        if found != (self.draft_vocab_size, self.vocab_size) or self.vocabulary is None:
            raise ValueError(
                f"the vocabulary mapping is for {found[0]} of {found[1]} tokens; expected "
                f"{self.draft_vocab_size} of {self.vocab_size}, as the configuration has it"
                + (", which needs no mapping" if self.vocabulary is None else "")
            )
        self.d2t.copy_(vocabulary.d2t)
        self.t2d.copy_(vocabulary.t2d)

    @property
    def borrowable(self) -> tuple[str, ...]:
        """Embedding and head, where the verifier is as wide as the draft."""
        if self.verifier_hidden_size != self.hidden_size:
            return ()
        return ("embed_tokens.weight", "lm_head.weight")

    def borrow(self, name: str) -> Tensor:
        """The verifier's embedding, or the rows of its head for the draft vocabulary."""
        if name == "embed_tokens.weight":
            return self.verifier_parts.embedding
        weight = self.verifier_parts.head.lm_head.weight
        assert isinstance(weight, Tensor)  # noqa: S101 - for the type checker
        return weight if self.vocabulary is None else weight[self.vocabulary.draft_to_verifier]


def num_aux_layers(config: SpeculatorModelConfig) -> int:
    """How many streams the draft reads: those it names, else what its decoder says, else 3."""
    if config.aux_layer_ids:
        return len(config.aux_layer_ids)
    return int(getattr(config.transformer_layer_config, "num_aux_hidden_states", None) or 3)

"""EAGLE-1: one decoder layer that predicts the verifier's next state (Li et al., 2024, section 3).

The state that it predicts is the one after the verifier's final norm, so the verifier's head turns
it into logits as it stands. EAGLE-2 has the same weights and drafts a tree of them, and HASS trains
them otherwise.
"""

import torch
from torch import Tensor, nn

from speculators.configs.errors import ConfigError
from speculators.configs.model_config import SpeculatorModelConfig
from speculators.models.decoder import run_layer
from speculators.models.draft_attention import DraftAttention
from speculators.models.speculator_model import DraftOutput, SpeculatorModel


class EagleSpeculator(SpeculatorModel):
    """The draft of EAGLE-1, EAGLE-2 and HASS; embedding and head are the verifier's.

    Args:
        config: of type ``eagle`` or ``hass``.

    Raises:
        ConfigError: ``transformer_layer_architecture`` is not the layer of the configuration.
    """

    def __init__(self, config: SpeculatorModelConfig) -> None:
        super().__init__(config)
        found = config.transformer_layer_architecture
        if found not in {"auto", self.parts.layer_class}:
            raise ConfigError(
                f"transformer_layer_architecture: found {found!r}; expected 'auto' or "
                f"{self.parts.layer_class!r}, the layer of transformer_layer_config.model_type"
            )
        width = self.hidden_size
        self.fusion_fc = nn.Linear(2 * width, width, bias=config.fusion_bias)
        self.transformer = self.parts.layer(0)
        if config.layernorms:
            self.embedding_layernorm = self.parts.norm()
            self.pre_lm_head_layernorm = self.parts.norm()
        else:
            self.embedding_layernorm = self.pre_lm_head_layernorm = nn.Identity()
            # What the layer takes is a sum of states that the verifier has normed already.
            self.transformer.input_layernorm = nn.Identity()

    def forward(
        self, input_ids: Tensor, states: Tensor, position_ids: Tensor, attention: DraftAttention
    ) -> DraftOutput:
        """One step; see :meth:`SpeculatorModel.forward`. The states predict the verifier's."""
        attention.begin(position_ids)
        embeddings = self.embedding_layernorm(self.embed(input_ids, states.dtype))
        fused = self.fusion_fc(torch.cat([embeddings, states], -1))
        rotation = self.rotary_emb(fused, position_ids)
        states = run_layer(self.transformer, fused, rotation, attention)
        return DraftOutput(states, self.pre_lm_head_layernorm(states))

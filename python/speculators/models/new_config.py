"""The part of a new draft's configuration that all types fill alike: how it is used, for whom."""

from transformers import PreTrainedConfig

from speculators.configs.proposals import GreedyTokenProposalConfig
from speculators.configs.speculators_config import SpeculatorsConfig, VerifierConfig


def speculators_config(
    algorithm: str,
    verifier: PreTrainedConfig,
    name_or_path: str | None,
    speculative_tokens: int,
) -> SpeculatorsConfig:
    """The block ``speculators_config`` of a draft that proposes greedily.

    Args:
        algorithm: its name.
        verifier: the verifier's configuration.
        name_or_path: where the verifier is; by default where its configuration came from.
        speculative_tokens: drafted before each verification.
    """
    return SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=speculative_tokens)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_config(verifier, name_or_path),
    )

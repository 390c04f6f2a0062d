"""The proposal methods under the name that the format's documentation gives them."""

from speculators.configs.proposals import (
    DynamicTreeTokenProposalConfig,
    GreedyTokenProposalConfig,
    SamplingTokenProposalConfig,
    StaticTreeTokenProposalConfig,
    TokenProposalConfig,
)

__all__ = [
    "DynamicTreeTokenProposalConfig",
    "GreedyTokenProposalConfig",
    "SamplingTokenProposalConfig",
    "StaticTreeTokenProposalConfig",
    "TokenProposalConfig",
]

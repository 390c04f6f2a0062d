"""How a speculator proposes tokens: the entries of ``proposal_methods``.

``greedy`` is what servers use. The other three are those of the format's versions 0.1 and 0.2; they
are read, checked and written as they stand.
"""

from typing import Annotated, Any, Literal

import pydantic


class TokenProposalConfig(pydantic.BaseModel):
    """A proposal method; ``proposal_type`` tells which. Unknown keys are kept."""

    model_config = pydantic.ConfigDict(extra="allow", validate_assignment=True)

    proposal_type: str


class GreedyTokenProposalConfig(TokenProposalConfig):
    """A chain of the draft's most likely tokens.

    Attributes:
        speculative_tokens: tokens drafted before each verification, at least 1.
        verifier_accept_k: accept a token among the verifier's k most likely; 1 is lossless.
        accept_tolerance: accept within this distance of the verifier's best logit; 0 is lossless.
    """

    proposal_type: Literal["greedy"] = "greedy"
    speculative_tokens: int = pydantic.Field(default=5, ge=1)
    verifier_accept_k: int = pydantic.Field(default=1, ge=1)
    accept_tolerance: float = pydantic.Field(default=0.0, ge=0)


class SamplingTokenProposalConfig(TokenProposalConfig):
    """A chain of tokens sampled from the draft.

    Attributes:
        speculative_tokens: tokens drafted before each verification, at least 1.
        accept_lenience: factor on the acceptance probability; 1 is lossless.
    """

    proposal_type: Literal["sampling"] = "sampling"
    speculative_tokens: int = pydantic.Field(default=5, ge=1)
    accept_lenience: float = pydantic.Field(default=1.0, ge=0)


class StaticTreeTokenProposalConfig(TokenProposalConfig):
    """A tree of one shape for every verification.

    Attributes:
        initial_branching_factor: children of the root.
        branching_factor: children of every other node.
        depth: tokens on the longest path.
    """

    proposal_type: Literal["static_tree"] = "static_tree"
    initial_branching_factor: int = pydantic.Field(default=4, ge=1)
    branching_factor: int = pydantic.Field(default=2, ge=1)
    depth: int = pydantic.Field(default=5, ge=1)


class DynamicTreeTokenProposalConfig(TokenProposalConfig):
    """A tree of the most promising nodes, chosen anew for every verification (EAGLE-2).

    Attributes:
        speculative_tokens: nodes that are verified.
        expansion_factor: nodes that are expanded at each level.
        depth: levels.
    """

    proposal_type: Literal["dynamic_tree"] = "dynamic_tree"
    speculative_tokens: int = pydantic.Field(default=48, ge=1)
    expansion_factor: int = pydantic.Field(default=10, ge=1)
    depth: int = pydantic.Field(default=6, ge=1)


_TYPES: dict[str, type[TokenProposalConfig]] = {
    "greedy": GreedyTokenProposalConfig,
    "sampling": SamplingTokenProposalConfig,
    "static_tree": StaticTreeTokenProposalConfig,
    "dynamic_tree": DynamicTreeTokenProposalConfig,
}


def _by_type(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    found = value.get("proposal_type")
    if found not in _TYPES:
        raise ValueError(f"proposal_type is {found!r}, expected one of {', '.join(_TYPES)}")
    return _TYPES[found](**value)


# A proposal method of whichever type its ``proposal_type`` says.
AnyTokenProposalConfig = Annotated[
    pydantic.SerializeAsAny[TokenProposalConfig], pydantic.BeforeValidator(_by_type)
]

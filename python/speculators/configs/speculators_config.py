"""The block ``speculators_config``: how a draft is used, and which verifier it belongs to."""

import os
from typing import TYPE_CHECKING, Any, Self

import pydantic

from speculators.configs.proposals import AnyTokenProposalConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class VerifierConfig(pydantic.BaseModel):
    """The model whose output a draft predicts. Unknown keys are kept.

    Attributes:
        name_or_path: a Hub id or a folder; None where it is not known.
        architectures: its class names, as in its own ``config.json``.
    """

    model_config = pydantic.ConfigDict(extra="allow", validate_assignment=True)

    name_or_path: str | None = None
    architectures: list[str] = []

    @classmethod
    def from_config(cls, config: "PretrainedConfig", name_or_path: str | None = None) -> Self:
        """Takes what is needed from the verifier's own configuration.

        Args:
            config: the verifier's.
            name_or_path: where the verifier is; by default where ``config`` was loaded from.
        """
        found = name_or_path or getattr(config, "name_or_path", None) or None
        return cls(name_or_path=found, architectures=list(config.architectures or []))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Reads the verifier's configuration from a folder or the Hub.

        Args:
            name_or_path: a folder or a Hub id.
            **kwargs: as for ``AutoConfig.from_pretrained``: revision, token, cache_dir, ...

        Raises:
            OSError: there is no such configuration.
        """
        from transformers import AutoConfig

        return cls.from_config(
            AutoConfig.from_pretrained(name_or_path, **kwargs), str(name_or_path)
        )


class SpeculatorsConfig(pydantic.BaseModel):
    """How a draft proposes tokens, and for which verifier. Unknown keys are kept.

    Attributes:
        algorithm: the name of the algorithm, such as ``"eagle3"``.
        proposal_methods: the ways in which the draft can be used, at least one.
        default_proposal_method: the ``proposal_type`` of the one to use unless told otherwise.
        verifier: the model that the draft belongs to.
    """

    model_config = pydantic.ConfigDict(extra="allow", validate_assignment=True)

    algorithm: str
    proposal_methods: list[AnyTokenProposalConfig] = pydantic.Field(min_length=1)
    default_proposal_method: str
    verifier: VerifierConfig

    @pydantic.model_validator(mode="after")
    def _check_default(self) -> Self:
        names = [method.proposal_type for method in self.proposal_methods]
        if self.default_proposal_method not in names:
            raise ValueError(
                f"default_proposal_method is {self.default_proposal_method!r}, expected the "
                f"proposal_type of one of proposal_methods: {', '.join(names)}"
            )
        return self

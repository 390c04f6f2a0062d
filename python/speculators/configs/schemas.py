"""A speculator's whole ``config.json``, one pydantic model per type.

Defaults are those of the format's classes. Everything is always written, because readers disagree
on what a missing key means (vLLM takes a missing ``norm_before_residual`` for true). Keys that a
schema does not know are kept and written back.
"""

import importlib.metadata
from typing import Annotated, Any, Final, Literal, Self

import pydantic

from speculators.configs.speculators_config import SpeculatorsConfig
from speculators.version import __version__

# ``model_type`` of every speculator, by which transformers' AutoConfig finds the right class, and
# vLLM its own.
MODEL_TYPE: Final = "speculators"


def _transformers_version() -> str:
    return importlib.metadata.version("transformers")


def _has_model_type(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("model_type"), str):
        raise ValueError(
            "model_type is missing, expected the draft decoder's own Hugging Face configuration"
        )
    return value


# The draft decoder's Hugging Face configuration, as JSON.
LayerConfig = Annotated[dict[str, Any], pydantic.AfterValidator(_has_model_type)]


# Fields that a file may lack; they are None then, and not written.
_OPTIONAL = (
    "model_type",
    "transformers_version",
    "tie_word_embeddings",
    "dtype",
    "speculators_provenance",
)


class SpeculatorSchema(pydantic.BaseModel):
    """What every type has in common.

    Attributes:
        model_type: ``"speculators"``; None in a file that lacks it, as the peer's do.
        architectures: the draft's class name.
        speculators_model_type: which type this is.
        speculators_version: the version of this library, or of the one that wrote the file.
        transformers_version: the version of transformers that wrote the file.
        dtype: of the weights, such as ``"bfloat16"``; older files say ``torch_dtype``.
        tie_word_embeddings: whether the draft's head is its embedding; older files do not say.
        transformer_layer_config: the draft decoder's own Hugging Face configuration.
        speculators_config: how the draft is used, and for which verifier.
        speculators_provenance: what the weights were made from: hashes and settings.
    """

    model_config = pydantic.ConfigDict(extra="allow", validate_assignment=True)

    model_type: Literal["speculators"] | None = MODEL_TYPE
    architectures: list[str]
    speculators_model_type: str
    speculators_version: str = __version__
    transformers_version: str | None = pydantic.Field(default_factory=_transformers_version)
    dtype: str | None = None
    tie_word_embeddings: bool | None = False
    transformer_layer_config: LayerConfig
    speculators_config: SpeculatorsConfig
    speculators_provenance: dict[str, Any] | None = None

    @classmethod
    def read(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments that make the schema of a file: what it lacks stays lacking."""
        absent = dict.fromkeys(("model_type", "transformers_version", "tie_word_embeddings"))
        fields = {**absent, **data}
        if fields.get("auto_map") == {}:  # tells transformers nothing
            del fields["auto_map"]
        return fields

    def to_json_dict(self) -> dict[str, Any]:
        """The file's content: plain JSON types; what a file may lack is left out if it is None."""
        content: dict[str, Any] = self.model_dump(mode="json")
        return {k: v for k, v in content.items() if v is not None or k not in _OPTIONAL}


class EagleSchema(SpeculatorSchema):
    """EAGLE-1 and EAGLE-2 (the same weights, drafted as a tree).

    Attributes:
        transformer_layer_architecture: the decoder layer's class, or ``"auto"``.
        layernorms: norms on the embedding, on the fusion's output and before the head.
        fusion_bias: whether the fusion of embedding and hidden state has a bias.
    """

    architectures: list[str] = ["EagleSpeculator"]
    speculators_model_type: Literal["eagle"] = "eagle"
    transformer_layer_architecture: str = "auto"
    layernorms: bool = False
    fusion_bias: bool = False


class HassSchema(SpeculatorSchema):
    """HASS: EAGLE-1's architecture, trained harmonised. The fields are :class:`EagleSchema`'s."""

    architectures: list[str] = ["HassSpeculator"]
    speculators_model_type: Literal["hass"] = "hass"
    transformer_layer_architecture: str = "auto"
    layernorms: bool = False
    fusion_bias: bool = True


class Eagle3Schema(SpeculatorSchema):
    """EAGLE-3, with the options of 3.1.

    Attributes:
        draft_vocab_size: tokens that the draft can propose.
        target_hidden_size: the verifier's hidden size, where it is not the draft's.
        eagle_aux_hidden_state_layer_ids: the verifier's residual streams that the draft reads, as
            numbers of layers before them; increasing, because servers sort them.
        norm_before_residual: whether the residual is the normed hidden state.
        norm_before_fc: one norm over all the hidden states before they are fused.
        fc_norm: one norm for each of them instead.
        norm_output: whether the next step takes the normed state.
        embed_requires_grad: whether the embedding was trained.
    """

    architectures: list[str] = ["Eagle3DraftModel"]
    speculators_model_type: Literal["eagle3"] = "eagle3"
    draft_vocab_size: int = pydantic.Field(default=32000, ge=1)
    target_hidden_size: int | None = pydantic.Field(default=None, ge=1)
    eagle_aux_hidden_state_layer_ids: list[Annotated[int, pydantic.Field(ge=0)]] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    embed_requires_grad: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        ids = self.eagle_aux_hidden_state_layer_ids
        if ids is not None and ids != sorted(set(ids)):
            raise ValueError(
                f"eagle_aux_hidden_state_layer_ids is {ids}, expected increasing numbers: servers "
                f"read the layers in that order; sort them, and the columns of fc with them"
            )
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm are both true, expected at most one")
        return self

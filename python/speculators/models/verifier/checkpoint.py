"""The final norm, the head and the embedding of a checkpoint, read without the rest of the model.

The model is built on the meta device, which costs no memory, and only these modules get tensors.
Names in a checkpoint often differ from the names in the model (older multimodal checkpoints do), so
they are translated by transformers' own table, never by how a name ends.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file

from speculators.models.verifier.architecture import (
    Architecture,
    UnsupportedVerifierError,
    auto_class,
    find_architecture,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PartialCheckpoint:
    """A checkpoint from which single modules are read.

    Args:
        path_or_id: a directory or a model's name on the Hub.
        trust_remote_code: runs modelling code that comes with the checkpoint.
        revision: a branch, tag or commit on the Hub.
        local_files_only: never asks the Hub.

    Raises:
        UnsupportedVerifierError: the head or final norm is of an unknown kind.
        FileNotFoundError: there are no safetensors files.
    """

    def __init__(
        self,
        path_or_id: str | os.PathLike[str],
        *,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        self._path = path_or_id
        self._hub = {"revision": revision, "local_files_only": local_files_only}
        config = AutoConfig.from_pretrained(
            path_or_id, trust_remote_code=trust_remote_code, **self._hub
        )
        with torch.device("meta"):
            self._model = auto_class(config).from_config(
                config, trust_remote_code=trust_remote_code
            )
        self._parts = find_architecture(self._model)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._stored = _stored_names(self._model, _tensor_files(path_or_id, self._hub))

    def head(self) -> Architecture:
        """The parts of the model.

        Returns:
            The parts, with ``final_norm`` and ``lm_head`` on the CPU in the stored dtype,
            everything else on the meta device.

        Raises:
            UnsupportedVerifierError: the head is quantised.
            ValueError: a tensor is missing.
        """
        for module in (self._parts.final_norm, self._parts.lm_head):
            tensors = {
                name: self._tensor(f"{self._names[module]}.{name}", tensor.shape)
                for name, tensor in module.state_dict().items()
            }
            module.load_state_dict(tensors, assign=True)
            if any(buffer.is_meta for buffer in module.buffers()):
                raise UnsupportedVerifierError(
                    f"{type(module).__name__} has buffers that no checkpoint stores; load the "
                    "model and use VerifierHead.from_model"
                )
        return self._parts

    def embedding(self) -> Tensor:
        """The input embedding ``[V, H]``, on the CPU in the stored dtype.

        Raises:
            UnsupportedVerifierError: it is quantised.
            ValueError: it is missing.
        """
        module = self._model.get_input_embeddings()
        return self._tensor(f"{self._names[module]}.weight", module.weight.shape)

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        tied: dict[str, str] = self._model.all_tied_weights_keys
        # A head that is stored is read, tied or not: transformers ties only where both are equal.
        key = name if name in self._stored else tied.get(name, name)
        if key not in self._stored:
            raise ValueError(
                f"{self._path} has no tensor {name!r}"
                + (f", nor {key!r}, to which it is tied" if key != name else "")
                + "; expected the checkpoint of a whole, unquantised model. Where it is "
                "quantised, load the model and use VerifierHead.from_model"
            )
        source, file = self._stored[key]
        path = str(cached_file(self._path, file, **self._hub))
        with safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(source)
        if tensor.dtype not in DTYPES or tensor.shape != shape:
            raise UnsupportedVerifierError(
                f"tensor {source!r} of {self._path} is {tensor.dtype} {list(tensor.shape)}; "
                f"expected a floating-point tensor {list(shape)}. Where it is quantised, load the "
                "model and use VerifierHead.from_model"
            )
        return tensor


def _tensor_files(path_or_id: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, str]:
    """Each tensor's name in the checkpoint, and the name of the file that holds it."""
    missing_is_none = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(path_or_id, INDEX, **hub, **missing_is_none)
    if index is not None:
        files: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        return files
    single = cached_file(path_or_id, SINGLE, **hub, **missing_is_none)
    if single is None:
        raise FileNotFoundError(
            f"{path_or_id} has neither {INDEX} nor {SINGLE}; load the whole model and save it with "
            "save_pretrained, or use VerifierHead.from_model"
        )
    with safe_open(single, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), SINGLE)


def _stored_names(model: PreTrainedModel, files: dict[str, str]) -> dict[str, tuple[str, str]]:
    """For each parameter of the model: its name in the checkpoint, and the file that holds it."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    stored = {}
    for source, file in files.items():
        name, converted = rename_source_key(
            source, renamings, converters, model.base_model_prefix, parameters
        )
        if converted is None:
            stored[name] = (source, file)
    return stored

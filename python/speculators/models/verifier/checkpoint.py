"""The final norm and the head of a checkpoint, read without the rest of the model.

The model is built on the meta device, which costs no memory, and only the two modules get tensors.
Names in a checkpoint often differ from the names in the model (older multimodal checkpoints do), so
they are translated by transformers' own table, never by how a name ends.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
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


def load_head(
    path_or_id: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Architecture:
    """Finds the parts of a checkpoint's model and fills the final norm and the head, and only them.

    Args:
        path_or_id: a directory or a model's name on the Hub.
        trust_remote_code: runs modelling code that comes with the checkpoint.
        revision: a branch, tag or commit on the Hub.
        local_files_only: never asks the Hub.

    Returns:
        The parts, with ``final_norm`` and ``lm_head`` on the CPU in the stored dtype, everything
        else on the meta device.

    Raises:
        UnsupportedVerifierError: the head or final norm is of an unknown kind, or quantised.
        FileNotFoundError: there are no safetensors files.
        ValueError: a tensor that the head needs is missing.
    """
    hub = {"revision": revision, "local_files_only": local_files_only}
    config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=trust_remote_code, **hub)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    parts = find_architecture(model)
    names = {module: name for name, module in model.named_modules()}
    stored = _stored_names(model, _tensor_files(path_or_id, hub))
    for module in (parts.final_norm, parts.lm_head):
        _fill(module, names[module], stored, model, str(path_or_id), hub)
    return parts


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


def _fill(
    module: nn.Module,
    module_name: str,
    stored: dict[str, tuple[str, str]],
    model: PreTrainedModel,
    path: str,
    hub: dict[str, Any],
) -> None:
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = model.all_tied_weights_keys
    for name in module.state_dict():
        full = f"{module_name}.{name}"
        # A head that is stored is read, tied or not: transformers ties only where both are equal.
        key = full if full in stored else tied.get(full, full)
        if key not in stored:
            raise ValueError(
                f"{path} has no tensor {full!r}"
                + (f", nor {key!r}, to which it is tied" if key != full else "")
                + "; expected the checkpoint of a whole, unquantised head. Where the head is "
                "quantised, load the model and use VerifierHead.from_model"
            )
        source, file = stored[key]
        with safe_open(str(cached_file(path, file, **hub)), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(source)
        expected = module.state_dict()[name].shape
        if tensor.dtype not in DTYPES or tensor.shape != expected:
            raise UnsupportedVerifierError(
                f"tensor {source!r} of {path} is {tensor.dtype} {list(tensor.shape)}; expected a "
                f"floating-point tensor {list(expected)}. Where the head is quantised, load the "
                "model and use VerifierHead.from_model"
            )
        tensors[name] = tensor
    module.load_state_dict(tensors, assign=True)
    if any(buffer.is_meta for buffer in module.buffers()):
        raise UnsupportedVerifierError(
            f"{type(module).__name__} has buffers that no checkpoint stores; load the model and "
            "use VerifierHead.from_model"
        )

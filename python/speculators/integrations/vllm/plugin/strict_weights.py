"""What a draft's file must have, no more and no less.

vLLM's loader passes over a bias that it has no place for, and fills nothing that a file lacks. A
draft that is loaded so runs, and is hardly ever accepted, which nobody notices soon. So tensors are
compared, while vLLM reads them, with those of our own model: what one reads, the other does.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from speculators.configs.model_config import SpeculatorModelConfig
from speculators.models.algorithm import find_algorithm
from speculators.models.checkpoint_files import checkpoint_error

Shapes = Mapping[str, tuple[int, ...]]


def expected_shapes(config: SpeculatorModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a draft's file.

    Raises:
        ConfigError: there is no model for this configuration.
    """
    with torch.device("meta"):
        model = find_algorithm(config.speculators_model_type).model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class StrictWeights:
    """Passes a file's tensors on, and remembers what is wrong with them.

    Args:
        expected: name and shape of every tensor.
        source: the draft's directory or name; it begins the error's message.
    """

    def __init__(self, expected: Shapes, source: str) -> None:
        self._expected = dict(expected)
        self._source = source
        self._seen: set[str] = set()
        self._passed: set[str] = set()
        self._problems: list[str] = []

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Those of the tensors that are expected."""
        for name, tensor in weights:
            found, shape = list(tensor.shape), self._expected.get(name)
            if shape is None:
                self._problems.append(f"{name}: unexpected; found {tensor.dtype} {found}")
                continue
            self._seen.add(name)
            if found != list(shape):
                self._problems.append(f"{name}: found shape {found}; expected {list(shape)}")
            elif not tensor.is_floating_point():
                self._problems.append(f"{name}: found type {tensor.dtype}; expected float")
            else:
                self._passed.add(name)
                yield name, tensor

    def finish(self, places: Mapping[str, str], loaded: set[str]) -> None:
        """Checks that nothing was missing, and that all was taken.

        Args:
            places: name in the file to parameter of the model.
            loaded: parameters of the model that got something.

        Raises:
            CheckpointError: tensors were missing, unexpected, of another shape, or not taken; all
                of them are named.
        """
        for name, shape in self._expected.items():
            if name not in self._seen:
                self._problems.append(f"{name}: missing; expected float {list(shape)}")
            elif name in self._passed and places[name] not in loaded:
                self._problems.append(f"{name}: vLLM's layer has no such parameter")
        if self._problems:
            raise checkpoint_error(
                f"the weights of {self._source} do not fit the model; expected weights that were "
                "saved with its config.json",
                sorted(self._problems),
            )

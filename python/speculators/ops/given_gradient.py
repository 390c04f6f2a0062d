"""A number whose gradient was formed while it was computed, and what that needs to be right.

To form the gradient of a head inside a forward pass, the tensors that it uses must be known: the
gradient of one that is not named would be lost in silence. The head's own graph tells.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def with_gradient(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The value, differentiable (once) in the inputs, with the gradients given.

    Args:
        value: scalar, without gradient.
        inputs: tensors that require gradient; one may stand here twice, its gradients then add up.
        gradients: d value / d input, of the inputs' shapes and dtypes.
    """
    if not inputs:
        return value
    function: Any = _GivenGradient
    return cast("Tensor", function.apply(value, list(gradients), *inputs))


class _GivenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        del inputs  # autograd alone needs them
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * grad_value for gradient in ctx.saved_tensors)


def check_sources(output: Tensor, declared: Sequence[Tensor], what: str) -> None:
    """Refuses an output that depends on other tensors with gradient than those declared.

    Args:
        output: with its graph.
        declared: leaves, or tensors computed from others, where the graph then counts as ended.
        what: the name of the declared tensors, for the message.

    Raises:
        ValueError: the output depends on further leaves, or not on each of those declared.
    """
    leaves = {id(tensor) for tensor in declared if tensor.is_leaf}
    ends = {tensor.grad_fn for tensor in declared if not tensor.is_leaf}
    seen = {output.grad_fn}
    pending = list(seen)
    found: dict[int, Tensor] = {}
    while pending:
        node = pending.pop()
        if node is None or node in ends:
            continue
        variable = getattr(node, "variable", None)  # only the node of a leaf has one
        if variable is not None:
            found[id(variable)] = variable
        upstream = {function for function, _ in node.next_functions} - seen
        seen |= upstream
        pending += upstream
    further = [list(tensor.shape) for key, tensor in found.items() if key not in leaves]
    if further:
        raise ValueError(
            f"{what} lacks {len(further)} tensors of the shapes {further}, which the result "
            "depends on; declare them, or turn their gradient off"
        )
    unused = [
        list(tensor.shape)
        for tensor in declared
        if (id(tensor) not in found if tensor.is_leaf else tensor.grad_fn not in seen)
    ]
    if unused:
        raise ValueError(
            f"{what} has {len(unused)} tensors of the shapes {unused} that the result does not "
            "depend on; leave them out"
        )

"""Heads and loss over all drafting steps, in chunks of target rows.

At T = 16384 tokens, V = 128256 and seven steps, the verifier's logits in float32 are 8 GB, and the
draft's several times that. None of them is ever whole here. The draft's forward passes do not
depend on logits (in training the tokens are given), so the loss comes after all of them: the target
logits of a chunk are computed once, then for each step the draft rows that learn from them.

The gradient is formed in the same walk, chunk by chunk, and waits for ``backward``, which scales
it. Logits are computed once, not again in backward, and no graph outlives its chunk. Two things
follow: there is no second derivative; and under float16 autocast a gradient scaler's factor comes
too late to protect the heads' gradient. bfloat16 needs none.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from speculators.ops.distillation_loss import (
    RowLosses,
    check_losses,
    row_losses_and_gradient_,
)
from speculators.ops.given_gradient import check_sources, with_gradient
from speculators.ops.row_chunks import Piece, plan_chunks
from speculators.ops.target_distribution import (
    TargetDistribution,
    arithmetic_dtype,
    target_distribution,
)

Head = Callable[[Tensor], Tensor]

LOGITS_BYTES: Final = 64 * 2**20
"""About how large one float32 matrix of logits may get; five to ten of them exist at a time."""

ROW_MULTIPLE: Final = 32
"""Heads see a multiple of so many rows. For each new number of rows a matrix product is prepared
anew, which takes oneDNN some 10 ms in bfloat16, and the number of learnable rows always changes."""


@dataclasses.dataclass(frozen=True)
class DraftStep:
    """One drafting step: its head's input, and which of its rows learn from which targets.

    Attributes:
        head_input: ``[N, H]``, what ``draft_head`` takes, any float dtype.
        draft_rows: int64 ``[R]``, rows of ``head_input``. Rows that are not named cost nothing.
        target_rows: int64 ``[R]``, for each the row of ``target_states`` to learn from; repeats
            and any order are allowed, rising order reads memory best.
        weight: of the rows' losses in the sum: the step's weight over the number of rows, as one
            number or as a tensor ``[]`` or ``[R]`` (no gradient).
    """

    head_input: Tensor
    draft_rows: Tensor
    target_rows: Tensor
    weight: float | Tensor = 1.0


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """The loss, and for reports sums over each step's rows (float64 ``[K]``, no gradient).

    Attributes:
        loss: scalar, float32 or float64: the sum over steps and rows of weight times loss.
        loss_sum: of the rows' losses, without the steps' weights.
        alpha_sum: of the acceptance of a sampled draft.
        greedy_acceptance_sum: of the acceptance of the draft's most likely token.
        agreement_sum: how often verifier and draft have the same most likely token.
        in_vocabulary_sum: how often the draft's vocabulary has the verifier's most likely token.
        rows: how many rows; int64, like the others on the device.
    """

    loss: Tensor
    loss_sum: Tensor
    alpha_sum: Tensor
    greedy_acceptance_sum: Tensor
    agreement_sum: Tensor
    in_vocabulary_sum: Tensor
    rows: Tensor


def chunked_distillation(
    steps: Sequence[DraftStep],
    target_states: Tensor,
    *,
    draft_head: Head,
    target_head: Head,
    losses: Mapping[str, float],
    draft_parameters: Iterable[Tensor] = (),
    draft_to_verifier: Tensor | None = None,
    data_tokens: Tensor | None = None,
    top_k: int = 10,
    mask_out_of_vocabulary: bool = True,
    chunk_rows: int | None = None,
) -> ChunkedLoss:
    """Sums ``distillation_loss`` over the rows of all steps without ever holding all logits.

    Equal, up to the order of summation, to ``sum_k sum_r weight_k[r] loss(draft_head(head_input_k
    [draft_rows_k]), target_head(target_states[target_rows_k]))[r]``. Differentiable, once, in each
    ``head_input`` and in ``draft_parameters``. Deterministic on CPU; on CUDA as well if no step
    names a draft row twice, or under ``torch.use_deterministic_algorithms``. On CUDA the host waits
    for the device at the start only, to learn which rows fall into which chunk.

    Args:
        steps: the K steps.
        target_states: ``[T, H_v]``, what ``target_head`` takes.
        draft_head: ``[r, H] -> [r, W]``, each row by itself.
        target_head: ``[r, H_v] -> [r, V]``, run without gradient; also called with no rows at all.
        losses: name -> weight, see ``row_losses``.
        draft_parameters: the tensors with gradient that ``draft_head`` uses, all of them and no
            others; those without gradient are ignored. Empty for a frozen head.
        draft_to_verifier: int64 ``[W]``, the verifier's ids of the draft's tokens, or None.
        data_tokens: int64 ``[T]``, the data's token for each target row; for ``ce_data``.
        top_k: see ``row_losses``.
        mask_out_of_vocabulary: see ``row_losses``.
        chunk_rows: the most rows of logits at a time, but for copies that make their number a
            multiple of ``ROW_MULTIPLE``; by default 256 to 1024, fewer the larger V.

    Raises:
        ValueError: a shape is wrong, or a loss unknown, or ``draft_parameters`` are not those that
            ``draft_head`` uses: the gradient of the others would be lost.
        TypeError: a dtype is wrong.
        IndexError: a row is out of range (on CPU).
    """
    check_losses(losses, data_tokens, top_k)
    _check_inputs(steps, target_states, data_tokens)

    def target_logits(states: Tensor) -> Tensor:
        with torch.no_grad():
            return target_head(states)

    if chunk_rows is None:
        chunk_rows = default_chunk_rows(target_logits(target_states[:0]).shape[-1])
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")
    objective = functools.partial(
        row_losses_and_gradient_,
        losses=losses,
        top_k=top_k,
        mask_out_of_vocabulary=mask_out_of_vocabulary,
    )
    walk = _Walk(steps, draft_head, draft_parameters, objective)
    for chunk in plan_chunks([step.target_rows for step in steps], chunk_rows):
        states = target_states.index_select(0, _fill_up(chunk.target_rows))
        target = target_distribution(target_logits(states), draft_to_verifier)
        tokens = None if data_tokens is None else data_tokens[chunk.target_rows]
        for piece in chunk.pieces:
            walk.add(piece, target, None if tokens is None else tokens[piece.positions])
    return walk.result(arithmetic_dtype(target_states, *(step.head_input for step in steps)))


def default_chunk_rows(vocab_size: int) -> int:
    """How many rows of V logits fit into ``LOGITS_BYTES`` of float32; at least 256, at most 1024.

    Fewer rows would leave the heads' matrix products waiting for their weights.
    """
    return min(max(LOGITS_BYTES // (4 * vocab_size), 256), 1024)


class _Walk:
    """Draft head and loss piece by piece, and what they add up to."""

    def __init__(
        self,
        steps: Sequence[DraftStep],
        draft_head: Head,
        draft_parameters: Iterable[Tensor],
        objective: Callable[..., RowLosses],
    ) -> None:
        learning = torch.is_grad_enabled()
        self.steps = steps
        self.draft_head = draft_head
        self.objective = objective
        distinct = {id(tensor): tensor for tensor in draft_parameters}.values()
        self.parameters = [tensor for tensor in distinct if learning and tensor.requires_grad]
        # Many chunks add up: in float32, whatever the parameters are in.
        self.parameter_gradients = [
            torch.zeros_like(tensor, dtype=arithmetic_dtype(tensor)) for tensor in self.parameters
        ]
        self.input_gradients = {
            number: torch.zeros_like(step.head_input)
            for number, step in enumerate(steps)
            if learning and step.head_input.requires_grad
        }
        device = steps[0].head_input.device
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.sums_KN = torch.zeros(len(steps), 5, dtype=torch.float64, device=device)
        self.checked = False

    def add(self, piece: Piece, target: TargetDistribution, data_tokens: Tensor | None) -> None:
        """One step's rows of one chunk, filled up: what they lose, and the gradient of it."""
        step, count = self.steps[piece.step], len(piece.pairs)
        draft_rows = _fill_up(step.draft_rows[piece.pairs])
        head_input = step.head_input.detach().index_select(0, draft_rows)
        wanted = [*self.parameters]
        if piece.step in self.input_gradients:
            wanted.append(head_input.requires_grad_())
        with torch.set_grad_enabled(bool(wanted)):
            logits = self.draft_head(head_input)
        if wanted and not self.checked:
            check_sources(logits, wanted, "draft_parameters (with the head's input)")
            self.checked = True
        weights = _weight(step, piece)
        buffer = logits.detach()  # the same memory: the logits, and then their gradient
        result = self.objective(
            buffer[:count],
            target,
            positions=piece.positions,
            data_tokens=data_tokens,
            weights=weights,
        )
        self.loss += (result.loss * weights).sum()
        self.sums_KN[piece.step] += _sums(result)
        if not wanted:
            return
        buffer[count:].zero_()  # the copies that fill up learn nothing
        # Autocast is for forward passes; backward takes each operator's dtype from there.
        with torch.autocast(head_input.device.type, enabled=False):
            gradients = torch.autograd.grad(logits, wanted, buffer)
        for sofar, gradient in zip(self.parameter_gradients, gradients, strict=False):
            sofar.add_(gradient)
        if piece.step in self.input_gradients:
            gradient = gradients[-1][:count]
            self.input_gradients[piece.step].index_add_(0, draft_rows[:count], gradient)

    def result(self, dtype: torch.dtype) -> ChunkedLoss:
        """The loss in the given dtype, with the gradient, and the sums."""
        inputs = [*self.parameters, *(self.steps[k].head_input for k in self.input_gradients)]
        gradients = [*self.parameter_gradients, *self.input_gradients.values()]
        gradients = [g.to(tensor.dtype) for g, tensor in zip(gradients, inputs, strict=True)]
        # Filled on the device: a list that is copied there would wait for all that is enqueued.
        device = self.loss.device
        rows = [torch.full((), len(step.draft_rows), device=device) for step in self.steps]
        loss_sum, alpha_sum, greedy_sum, agreement_sum, in_vocabulary_sum = self.sums_KN.unbind(1)
        return ChunkedLoss(
            loss=with_gradient(self.loss.to(dtype), inputs, gradients),
            loss_sum=loss_sum,
            alpha_sum=alpha_sum,
            greedy_acceptance_sum=greedy_sum,
            agreement_sum=agreement_sum,
            in_vocabulary_sum=in_vocabulary_sum,
            rows=torch.stack(rows),
        )


def _fill_up(rows: Tensor) -> Tensor:
    """At least one row number ``[R]``, and copies of the first up to a multiple."""
    return torch.cat([rows, rows[:1].expand(-len(rows) % ROW_MULTIPLE)])


def _weight(step: DraftStep, piece: Piece) -> float | Tensor:
    if not isinstance(step.weight, Tensor):
        return step.weight
    weight = step.weight.detach()
    return weight if weight.dim() == 0 else weight[piece.pairs]


def _sums(result: RowLosses) -> Tensor:
    columns = (
        result.loss.detach(),
        result.alpha,
        result.greedy_acceptance,
        result.agreement,
        result.in_vocabulary,
    )
    return torch.stack([column.sum(dtype=torch.float64) for column in columns])


def _check_inputs(
    steps: Sequence[DraftStep], target_states: Tensor, data_tokens: Tensor | None
) -> None:
    if not steps:
        raise ValueError("steps is empty, expected at least one drafting step")
    if target_states.dim() != 2:
        raise ValueError(
            f"target_states has the shape {list(target_states.shape)}, expected [T, H]"
        )
    if data_tokens is not None and data_tokens.shape != target_states.shape[:1]:
        found, expected = list(data_tokens.shape), list(target_states.shape[:1])
        raise ValueError(f"data_tokens has the shape {found}, expected {expected} as target_states")
    for number, step in enumerate(steps):
        name = f"steps[{number}]"
        if step.head_input.dim() != 2:
            found = list(step.head_input.shape)
            raise ValueError(f"{name}.head_input has the shape {found}, expected [N, H]")
        for field in ("draft_rows", "target_rows"):
            rows = getattr(step, field)
            if rows.dtype != torch.int64:
                raise TypeError(f"{name}.{field} is {rows.dtype}, expected torch.int64")
            if rows.dim() != 1 or len(rows) != len(step.draft_rows):
                found, expected = list(rows.shape), list(step.draft_rows.shape)
                raise ValueError(
                    f"{name}.{field} has the shape {found}, expected [R] (draft_rows: {expected})"
                )
        if isinstance(step.weight, Tensor) and step.weight.shape not in {(), step.draft_rows.shape}:
            found = list(step.weight.shape)
            raise ValueError(f"{name}.weight has the shape {found}, expected [] or [R]")

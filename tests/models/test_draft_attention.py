"""Train-time test as a whole: all steps of several layers, against the reference in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from speculators.models import TrainTimeTestAttention
from speculators.ops import backend, packed_rows
from speculators.ops.backend import Backend

DOCUMENTS = torch.tensor([[0] * 7 + [1] * 4 + [-1] * 2, [0] * 1 + [1] * 12])
POSITIONS = torch.tensor([[*range(7), *range(4), 0, 0], [0, *range(12)]])
# The last rows of the documents; then what fills up, repeats and padding among it.
ROWS = torch.tensor([[3, 4, 5, 8, 9, 0, 0], [5, 6, 7, 8, 9, 10, 11]])


@dataclasses.dataclass
class Steps:
    """What the layers hand in at each step: [layers][steps] of q, k and v."""

    tensors: list[list[list[Tensor]]]
    rows: Tensor | None

    def run(self, window: int | None = None) -> list[Tensor]:
        """The outputs of all layers and steps, step by step as a model does it."""
        attention = TrainTimeTestAttention(DOCUMENTS)
        outputs, positions = [], POSITIONS
        for step in range(len(self.tensors[0])):
            if step == 1 and self.rows is not None:
                attention.select(self.rows)
                positions = POSITIONS.gather(1, self.rows)
            attention.begin(positions + step)
            for layer, steps in enumerate(self.tensors):
                q, k, v = steps[step]
                outputs.append(attention.attend(layer, q, k, v, 0.4, window))
        return outputs

    def to(self, *dtypes: torch.dtype) -> "Steps":
        """The same values as new leaves, q, k and v of these dtypes."""
        tensors = [
            [
                [t.detach().to(d).requires_grad_() for t, d in zip(step, dtypes, strict=True)]
                for step in layer
            ]
            for layer in self.tensors
        ]
        return Steps(tensors, self.rows)

    def leaves(self) -> list[Tensor]:
        """Layer by layer, step by step: q, k and v."""
        return [tensor for layer in self.tensors for step in layer for tensor in step]


def _steps(rows: Tensor | None, layers: int = 2, steps: int = 4) -> Steps:
    generator = torch.Generator().manual_seed(2)
    counts = [DOCUMENTS.shape[1]] + [(DOCUMENTS if rows is None else rows).shape[1]] * (steps - 1)

    def random(count: int, heads: int) -> Tensor:
        return torch.randn(2, count, heads, 16, generator=generator).transpose(1, 2)

    return Steps(
        [[[random(n, 4), random(n, 2), random(n, 2)] for n in counts] for _ in range(layers)], rows
    )


def _real(rows: Tensor | None, step: int) -> Tensor:
    documents = DOCUMENTS if rows is None or step == 0 else DOCUMENTS.gather(1, rows)
    return (documents >= 0)[..., None, None]


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all", "selected"])
@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_steps_equal_the_reference(
    rows: Tensor | None, window: int | None, dtype: torch.dtype
) -> None:
    single = _steps(rows).to(dtype, dtype, dtype)
    exact = single.to(torch.float64, torch.float64, torch.float64)
    assert backend.choose("cpu").backend is Backend.CPU
    found, expected = single.run(window), exact.run(window)
    grads = [torch.randn(output.shape) * _real(rows, i // 2) for i, output in enumerate(found)]
    gradients = torch.autograd.grad(found, single.leaves(), [g.to(dtype) for g in grads])
    exact_gradients = torch.autograd.grad(
        expected, exact.leaves(), [g.to(dtype).double() for g in grads]
    )
    tolerance = 2e-5 if dtype == torch.float32 else 6e-2
    for i, (output, other) in enumerate(zip(found, expected, strict=True)):
        real = _real(rows, i // 2)
        assert output.isfinite().all()
        torch.testing.assert_close(
            (output * real).double(), other * real, rtol=tolerance, atol=tolerance
        )
    for gradient, other in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(
            gradient.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max())
        )


def test_queries_and_keys_in_float32_meet_values_in_bfloat16() -> None:
    """So it is under autocast: the rotary embedding's tables are float32."""
    mixed = _steps(ROWS).to(torch.float32, torch.float32, torch.bfloat16)
    half = mixed.to(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    outputs, others = mixed.run(), half.run()
    for output, other in zip(outputs, others, strict=True):
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, other)
    gradients = torch.autograd.grad([output.float().sum() for output in outputs], mixed.leaves())
    assert [g.dtype for g in gradients[:3]] == [torch.float32, torch.float32, torch.bfloat16]


def test_what_a_batch_needs_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a further layer nor a further step asks where documents begin."""
    calls: list[int] = []
    split = packed_rows._split

    def counted(run: packed_rows._Run, reach: int | None) -> list[packed_rows.Piece]:
        calls.append(1)
        return split(run, reach)

    monkeypatch.setattr(packed_rows, "_split", counted)
    for layers, steps in ((1, 2), (3, 4)):
        calls.clear()
        _steps(ROWS, layers, steps).run()
        # 4 documents at step 0; of the selected rows 3 documents, and the rows that fill up.
        assert len(calls) == 8


def test_a_window_needs_positions_that_rise_as_rows_do() -> None:
    q, k, v = _steps(None, 1, 1).tensors[0][0]
    for step, positions in ((0, POSITIONS.flip(1)), (1, POSITIONS), (1, POSITIONS + 2)):
        attention = TrainTimeTestAttention(DOCUMENTS)
        for number in range(step):
            attention.begin(POSITIONS + number)
            attention.attend(0, q, k, v, 1.0, 5)
        attention.begin(positions)
        with pytest.raises(ValueError, match=f"position ids of step {step} do not rise by 1"):
            attention.attend(0, q, k, v, 1.0, 5)
    attention = TrainTimeTestAttention(DOCUMENTS)
    attention.begin(POSITIONS + 100)  # a document may begin anywhere
    attention.attend(0, q, k, v, 1.0, 5)

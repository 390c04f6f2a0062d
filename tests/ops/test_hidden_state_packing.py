"""gather: every back end against its definition, on every device there is."""

import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from speculators.ops import backend, hidden_state_packing
from speculators.ops.backend import Backend

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COMPILED = {"cpu": Backend.CPU, "cuda": Backend.CUDA}


def definition(hidden_states: list[Tensor], index: Tensor) -> Tensor:
    """The documented formula, row by row: no operator in common with what is tested."""
    rows = [torch.cat([layer[token] for layer in hidden_states]) for token in index.tolist()]
    width = sum(layer.shape[1] for layer in hidden_states)
    return torch.stack(rows) if rows else hidden_states[0].new_empty(0, width)


def random_layers(
    layers: int, tokens: int, width: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    return [torch.randn(tokens, width, device=device).to(dtype) for _ in range(layers)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_compiled_back_end_serves(device: str) -> None:
    assert backend.choose(device).backend is COMPILED[device], backend.report()


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layers", "tokens", "width", "rows"),
    [
        (1, 1, 1, 1),
        (3, 50, 64, 200),
        (2, 7, 33, 5),
        (70, 3, 8, 4),
        (4, 3, 5, 0),
        (2, 0, 8, 0),
        (2, 3, 0, 4),
    ],
)
def test_equals_the_definition(
    name: str, dtype: torch.dtype, layers: int, tokens: int, width: int, rows: int, device: str
) -> None:
    torch.manual_seed(0)
    hidden_states = random_layers(layers, tokens, width, dtype, device)
    index = torch.randint(max(tokens, 1), (rows,), device=device)
    with backend.forced(COMPILED[device] if name == "compiled" else Backend.REFERENCE):
        found = hidden_state_packing.gather(hidden_states, index)
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found, definition(hidden_states, index), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_columns_and_index(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    whole = torch.randn(12, 40, device=device).to(dtype)
    for hidden_states in (
        [whole[:, :16], whole[:, 16:32]],  # rows lie apart
        [whole[::3, 1:18], whole[1::3, 3:20]],  # and start at odd elements
        [whole.t(), whole.t()],  # elements of a row lie apart
        [whole[:1].expand(12, 40), whole],  # all rows are one
    ):
        index = torch.randint(hidden_states[0].shape[0], (20,), device=device)[::2]
        assert not index.is_contiguous()
        found = hidden_state_packing.gather(hidden_states, index)
        torch.testing.assert_close(found, definition(hidden_states, index), rtol=0, atol=0)


@hypothesis.given(
    layers=strategies.integers(1, 4),
    tokens=strategies.integers(1, 20),
    width=strategies.integers(1, 70),
    index=strategies.lists(strategies.integers(0, 10**6), max_size=60),
    dtype=strategies.sampled_from(DTYPES),
)
def test_any_shape(
    layers: int, tokens: int, width: int, index: list[int], dtype: torch.dtype
) -> None:
    hidden_states = random_layers(layers, tokens, width, dtype, "cpu")
    rows = torch.tensor([token % tokens for token in index], dtype=torch.int64)
    found = hidden_state_packing.gather(hidden_states, rows)
    torch.testing.assert_close(found, definition(hidden_states, rows), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype: torch.dtype, requires_grad: bool, device: str) -> None:
    hidden_states = random_layers(2, 6, 5, dtype, device)
    for layer in hidden_states:
        layer.requires_grad_(requires_grad)
    index = torch.tensor([5, 0, 0], device=device)
    operator = torch.ops.speculators.hidden_state_gather.default
    torch.library.opcheck(operator, (hidden_states, index))


def test_gradient_equals_that_of_float64(device: str) -> None:
    torch.manual_seed(0)
    index = torch.tensor([2, 0, 2, 2], device=device)
    weights = torch.randn(4, 6, device=device)
    exact = [
        torch.randn(3, 3, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2)
    ]
    single = [layer.detach().float().requires_grad_() for layer in exact]
    expected = (hidden_state_packing.gather_reference(exact, index) * weights).sum()
    found = (hidden_state_packing.gather(single, index) * weights).sum()
    for gradient, exact_gradient in zip(
        torch.autograd.grad(found, single), torch.autograd.grad(expected, exact), strict=True
    ):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=1e-6)


def test_one_graph_under_torch_compile(device: str) -> None:
    hidden_states = random_layers(2, 6, 5, torch.float32, device)
    index = torch.tensor([5, 0, 0], device=device)
    compiled = torch.compile(hidden_state_packing.gather, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden_states, index), definition(hidden_states, index))


LAYER = torch.zeros(4, 3)
INDEX = torch.tensor([0])


@pytest.mark.parametrize(
    ("hidden_states", "index", "error", "message"),
    [
        ([], INDEX, ValueError, "hidden_states is empty"),
        ([LAYER], INDEX.int(), TypeError, r"index is torch.int32, expected torch.int64"),
        ([LAYER], INDEX[None], ValueError, r"index has the shape \[1, 1\]"),
        ([LAYER.double()], INDEX, TypeError, r"hidden_states\[0\] is torch.float64"),
        ([LAYER[0]], INDEX, ValueError, r"hidden_states\[0\] has the shape \[3\]"),
        ([LAYER, LAYER.half()], INDEX, TypeError, r"hidden_states\[1\] is torch.float16"),
        ([LAYER, LAYER[:2]], INDEX, ValueError, r"hidden_states\[1\] has the shape \[2, 3\]"),
        ([LAYER, LAYER.to("meta")], INDEX, ValueError, r"hidden_states\[1\] is on meta"),
        ([LAYER], torch.tensor([0, 4]), IndexError, r"index\[1\] is 4, expected 0 <= index < 4"),
        ([LAYER], torch.tensor([0, 1, -1]), IndexError, r"index\[2\] is -1"),
        ([LAYER[:0]], INDEX, IndexError, r"index\[0\] is 0, expected 0 <= index < 0"),
    ],
)
@pytest.mark.parametrize("name", [Backend.CPU, Backend.REFERENCE])
def test_wrong_arguments_are_named(
    hidden_states: list[Tensor], index: Tensor, error: type[Exception], message: str, name: Backend
) -> None:
    with backend.forced(name), pytest.raises(error, match=message):
        hidden_state_packing.gather(hidden_states, index)


@pytest.mark.parametrize(
    ("hidden_states", "index", "message"),
    [
        ([], INDEX, "hidden_states is empty"),
        ([LAYER], INDEX.int(), "index must be an int64 tensor"),
        ([LAYER.double()], INDEX, "must be bfloat16, float16 or float32"),
        ([LAYER[0]], INDEX, "must have the shape"),
        ([LAYER, LAYER[:2]], INDEX, "one shape and one dtype"),
        ([LAYER], torch.tensor([0, 4]), r"index\[1\] is 4, expected 0 <= index < 4"),
        ([LAYER], torch.tensor([-1]), r"index\[0\] is -1"),
    ],
)
def test_the_bare_operator_protects_memory(
    hidden_states: list[Tensor], index: Tensor, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.speculators.hidden_state_gather(hidden_states, index)


@pytest.mark.parametrize("device_of_index", set(DEVICES) & {"cuda"})
def test_an_index_out_of_range_on_cuda_is_an_error(device_of_index: str) -> None:
    """In a process of its own: a device-side assertion ends the CUDA context."""
    program = (
        "import torch\n"
        "from speculators.ops import hidden_state_packing\n"
        f"layer = torch.zeros(4, 3, device={device_of_index!r})\n"
        "hidden_state_packing.gather([layer], torch.tensor([4], device=layer.device))\n"
        "torch.cuda.synchronize()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert "gather: index out of range" in process.stdout + process.stderr

"""pack and unpack: every back end against the definition, bit by bit, on every device there is."""

import subprocess
import sys
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from speculators.ops import backend
from speculators.ops.backend import Backend
from speculators.ops.hidden_state_packing import (
    PackedStates,
    gather,
    pack,
    pack_reference,
    unpack,
    unpack_into,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
SCALED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
COMPILED = {"cpu": Backend.CPU, "cuda": Backend.CUDA}
OPERATORS = torch.ops.speculators


def definition(hidden_states: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The documented formula, number by number, for finite rows: torch's rounding and no more."""
    codes, scales = [], []
    code = torch.tensor(SCALED[dtype])
    for row in range(hidden_states[0].shape[0]):
        for layer in hidden_states:
            values = layer[row].float().cpu()
            largest = torch.tensor(max((abs(x) for x in values.tolist()), default=0.0))
            scales.append(largest / code)
            inverse = code / largest if largest > 0 else torch.tensor(0.0)
            scaled = torch.stack([x * inverse for x in values]) if len(values) else values
            codes.append(scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype))
    shape = (hidden_states[0].shape[0], len(hidden_states))
    whole = torch.cat(codes) if codes else torch.empty(0, dtype=dtype)
    width = len(hidden_states) * hidden_states[0].shape[1]
    return whole.reshape(shape[0], width), torch.stack(scales).reshape(shape)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal, a NaN to a NaN."""
    if found.dtype == torch.float8_e4m3fn:
        found, expected = found.view(torch.uint8), expected.view(torch.uint8)
    if found.is_floating_point():
        both = found.isnan() & expected.cpu().to(found.device).isnan()
        return torch.equal(
            found.masked_fill(both, 0), expected.to(found.device).masked_fill(both, 0)
        )
    return torch.equal(found.cpu(), expected.cpu())


def random_layers(
    layers: int, tokens: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(layers * tokens + width)
    return [
        (
            torch.randn(tokens, width, generator=generator)
            * torch.exp2(torch.randint(-8, 9, (tokens, 1), generator=generator))
        ).to(device, dtype)
        for _ in range(layers)
    ]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["compiled", "reference"])
def forced(request: pytest.FixtureRequest, device: str) -> Backend:
    return COMPILED[device] if request.param == "compiled" else Backend.REFERENCE


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("from_dtype", FLOATS)
@pytest.mark.parametrize(
    ("layers", "tokens", "width"), [(1, 1, 1), (3, 20, 64), (2, 7, 33), (70, 2, 40), (2, 3, 8)]
)
def test_packing_is_the_formula(
    forced: Backend,
    dtype: torch.dtype,
    from_dtype: torch.dtype,
    layers: int,
    tokens: int,
    width: int,
    device: str,
) -> None:
    hidden_states = random_layers(layers, tokens, width, from_dtype, device)
    with backend.forced(forced):
        found = pack(hidden_states, dtype=dtype)
    assert found.scales is not None
    assert (found.data.dtype, found.scales.dtype) == (dtype, torch.float32)
    assert found.data.is_contiguous()
    codes, scales = definition(hidden_states, dtype)
    assert same_bits(found.data, codes)
    assert same_bits(found.scales, scales)


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("from_dtype", FLOATS)
def test_what_comes_back_is_near(
    forced: Backend, dtype: torch.dtype, from_dtype: torch.dtype, device: str
) -> None:
    hidden_states = random_layers(3, 9, 100, from_dtype, device)
    with backend.forced(forced):
        found = unpack(pack(hidden_states, dtype=dtype), 3, dtype=torch.float32)
    for layer, states in zip(hidden_states, found, strict=True):
        exact = layer.float()
        largest = exact.abs().amax(1, keepdim=True)
        # int8: half a step of largest / 127. e4m3: 3 bits of mantissa, or half a step near 0.
        near = largest / 254 if dtype == torch.int8 else (exact.abs() / 16).maximum(largest / 448e3)
        assert bool(((states - exact).abs() <= near * 1.0001 + largest * 1e-5).all())


@pytest.mark.parametrize("dtype", [*SCALED, *FLOATS])
def test_an_index_chooses_rows(forced: Backend, dtype: torch.dtype, device: str) -> None:
    hidden_states = random_layers(2, 12, 24, torch.bfloat16, device)
    index = torch.tensor([11, 0, 0, 5, 5, 1, 2, 3], device=device)[::2]
    with backend.forced(forced):
        found = pack(hidden_states, index, dtype=dtype)
        expected = pack([layer[index] for layer in hidden_states], dtype=dtype)
        assert same_bits(found.data, expected.data)
        assert (found.scales is None) == (expected.scales is None) == (dtype in FLOATS)
        if dtype in FLOATS:
            assert torch.equal(found.data, gather(hidden_states, index).to(dtype))


@pytest.mark.parametrize("dtype", SCALED)
def test_rows_that_are_no_numbers(forced: Backend, dtype: torch.dtype, device: str) -> None:
    layer = torch.ones(7, 40, dtype=torch.bfloat16, device=device)
    layer[0] = 0
    layer[1, 39] = torch.inf
    layer[2, 0] = -torch.inf
    layer[3, 20] = torch.nan
    layer[4] = 2.0**-101
    layer[5] = 2.0**-100
    layer[6, 3] = -(2.0**100)
    with backend.forced(forced):
        packed = pack([layer], dtype=dtype)
        (found,) = unpack(packed, 1, dtype=torch.bfloat16)
    assert packed.scales is not None
    scales = packed.scales[:, 0].cpu()
    code = SCALED[dtype]
    expected = torch.tensor([0, torch.nan, torch.nan, torch.nan, 0, 2.0**-100, 2.0**100])
    assert same_bits(scales, expected / torch.tensor(code))
    assert not packed.data[:4].float().any()
    assert bool(found[1:4].isnan().all())  # none of it is taken for a state
    assert not found[[0, 4]].any()
    assert torch.equal(found[5], layer[5])
    assert found[6, 3] == layer[6, 3]
    assert not found[6, 4:].any()


@pytest.mark.parametrize("from_dtype", FLOATS)
@pytest.mark.parametrize("dtype", SCALED)
def test_rows_may_lie_apart(
    forced: Backend, from_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    whole = random_layers(1, 12, 40, from_dtype, device)[0]
    for hidden_states in (
        [whole[:, :16], whole[:, 16:32]],
        [whole[::3, 1:18], whole[1::3, 3:20]],  # begin at odd entries
        [whole.t(), whole.t()],
        [whole[:1].expand(12, 40), whole],
    ):
        with backend.forced(forced):
            found = pack(hidden_states, dtype=dtype)
        expected = pack_reference([layer.contiguous() for layer in hidden_states], None, dtype)
        assert same_bits(found.data, expected[0])
        assert found.scales is not None
        assert same_bits(found.scales, expected[1])


@pytest.mark.parametrize("to_dtype", FLOATS)
@pytest.mark.parametrize("dtype", [*SCALED, *FLOATS])
@pytest.mark.parametrize("odd", [False, True])
def test_rows_go_to_their_places(
    forced: Backend, dtype: torch.dtype, to_dtype: torch.dtype, odd: bool, device: str
) -> None:
    """Straight into a packed batch, from a slice of a larger buffer, all else left as it is."""
    width = 33 if odd else 32
    packed = pack(random_layers(4, 6, width, torch.bfloat16, device), dtype=dtype)
    data = packed.data[1:5, width : 3 * width]
    part = PackedStates(data, None if packed.scales is None else packed.scales[1:5, 1:3])
    index = torch.tensor([17, 3, 0, 10], device=device)
    outputs = [torch.full((3, 6, width), 5.0, dtype=to_dtype, device=device) for _ in range(2)]
    with backend.forced(forced):
        unpack_into(outputs, part, index)
    scales = torch.ones(4, 2, device=device) if part.scales is None else part.scales
    for layer, output in enumerate(outputs):
        expected = torch.full((18, width), 5.0, dtype=to_dtype, device=device)
        values = data[:, layer * width : (layer + 1) * width].float() * scales[:, layer, None]
        expected[index] = values.to(to_dtype)
        assert torch.equal(output.view(18, width), expected)


def test_every_code_is_read(forced: Backend, device: str) -> None:
    every = torch.arange(256, dtype=torch.uint8, device=device)[None]
    scales = torch.tensor([[0.37]], device=device)
    for dtype in SCALED:
        for to_dtype in FLOATS:
            with backend.forced(forced):
                (found,) = unpack(PackedStates(every.view(dtype), scales), 1, dtype=to_dtype)
            expected = (every.view(dtype).float() * scales).to(to_dtype)
            assert same_bits(found, expected)
            assert int(found.isnan().sum()) == (2 if dtype == torch.float8_e4m3fn else 0)


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (3, 0), (0, 0)])
def test_nothing_to_pack(
    forced: Backend, dtype: torch.dtype, tokens: int, width: int, device: str
) -> None:
    hidden_states = [torch.zeros(tokens, width, device=device)] * 2
    outputs = [torch.ones(4, width, device=device) for _ in range(2)]
    with backend.forced(forced):
        packed = pack(hidden_states, dtype=dtype)
        assert packed.data.shape == (tokens, 2 * width)
        assert packed.scales is not None
        assert packed.scales.tolist() == [[0.0, 0.0]] * tokens
        unpack_into(outputs, packed)
        shapes = [list(layer.shape) for layer in unpack(packed, 2, dtype=torch.float16)]
    assert shapes == [[tokens, width]] * 2
    assert all(bool((output == 1).all()) for output in outputs)


@hypothesis.given(
    layers=strategies.integers(1, 4),
    tokens=strategies.integers(1, 20),
    width=strategies.integers(1, 70),
    from_dtype=strategies.sampled_from(FLOATS),
    dtype=strategies.sampled_from(list(SCALED)),
    seed=strategies.integers(0, 2**32),
)
def test_any_bits(
    layers: int, tokens: int, width: int, from_dtype: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    """Numbers of every size, infinities and NaN: the compiled and the reference give the same."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.int32 if from_dtype == torch.float32 else torch.int16
    bound = 2**31 if from_dtype == torch.float32 else 2**15
    # Half of the rows without the greatest exponents, so that most of those are finite.
    hidden_states = []
    for _ in range(layers):
        drawn = torch.randint(-bound, bound, (tokens, width), generator=generator)
        drawn[::2] &= ~(bound >> 2)
        hidden_states.append(drawn.to(bits).view(from_dtype))
    found = pack(hidden_states, dtype=dtype)
    codes, scales = pack_reference(hidden_states, None, dtype)
    assert found.scales is not None
    assert same_bits(found.data, codes)
    assert same_bits(found.scales, scales)
    states = unpack(found, layers, dtype=from_dtype)
    with backend.forced(Backend.REFERENCE):
        expected = unpack(found, layers, dtype=from_dtype)
    assert all(map(same_bits, states, expected))


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("from_dtype", FLOATS)
def test_opcheck(dtype: torch.dtype, from_dtype: torch.dtype, device: str) -> None:
    hidden_states = random_layers(2, 6, 5, from_dtype, device)
    index = torch.tensor([5, 0, 0], device=device)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if dtype == torch.int8:  # torch cannot compare two tensors of float8 in the check that is left
        checks.append("test_schema")

    def opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
        torch.library.opcheck(operator, arguments, test_utils=checks)

    for chosen in (index, None):
        opcheck(OPERATORS.hidden_state_pack.default, (hidden_states, chosen, dtype))
    packed = pack(hidden_states, index, dtype=dtype)
    outputs = [torch.zeros(8, 5, dtype=from_dtype, device=device) for _ in range(2)]
    places = torch.tensor([7, 0, 3], device=device)
    unpack_ = OPERATORS.hidden_state_unpack_.default
    for where in (places, None):
        opcheck(unpack_, (outputs, packed.data, packed.scales, where))
    opcheck(unpack_, (outputs, gather(hidden_states, index), None, places))


def test_one_graph_under_torch_compile(device: str) -> None:
    hidden_states = random_layers(2, 6, 5, torch.float32, device)
    index = torch.tensor([5, 0, 1], device=device)

    def there_and_back(layers: list[Tensor], index: Tensor, outputs: list[Tensor]) -> Tensor:
        packed = pack(layers, index, dtype=torch.int8)
        unpack_into(outputs, packed, index)
        return packed.data

    outputs = [torch.zeros(6, 5, device=device) for _ in range(2)]
    again = [torch.zeros(6, 5, device=device) for _ in range(2)]
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    found = compiled(hidden_states, index, outputs)
    assert torch.equal(found, there_and_back(hidden_states, index, again))
    assert all(map(torch.equal, outputs, again))
    assert bool(outputs[1][5].any())


def test_a_graph_that_needs_the_outputs_notices(forced: Backend, device: str) -> None:
    output = torch.ones(4, 3, device=device)
    factor = torch.ones(3, device=device, requires_grad=True)
    loss = (output * factor).sum()  # its gradient is computed from the output
    with backend.forced(forced):
        unpack_into([output], pack([output * 2], dtype=torch.int8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_outputs_that_require_gradient_need_no_grad(forced: Backend, device: str) -> None:
    output = torch.ones(4, 3, device=device, requires_grad=True)
    packed = pack([torch.full((4, 3), 2.0, device=device)], dtype=torch.int8)
    with backend.forced(forced):
        with pytest.raises(ValueError, match=r"outputs\[0\] requires gradient"):
            unpack_into([output], packed)
        with torch.no_grad():
            unpack_into([output], packed)
        assert bool((output == 2).all())
        with torch.inference_mode():
            assert bool((unpack(packed, 1, dtype=torch.float32)[0] == 2).all())


def test_memory_that_is_shared_until_it_is_written(forced: Backend, device: str) -> None:
    before = torch.zeros(4, 3, device=device)
    output = torch._lazy_clone(before)
    with backend.forced(forced):
        unpack_into([output], PackedStates(torch.ones(4, 3, device=device)))
    assert bool(output.all())
    assert not before.any()


@pytest.mark.parametrize("dtype", SCALED)
def test_the_same_every_time(dtype: torch.dtype, device: str) -> None:
    hidden_states = random_layers(3, 200, 65, torch.bfloat16, device)
    first, again = (pack(hidden_states, dtype=dtype) for _ in range(2))
    assert same_bits(first.data, again.data)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert same_bits(first.data, pack(hidden_states, dtype=dtype).data)
    finally:
        torch.set_num_threads(threads)


LAYER = torch.zeros(4, 3)
OUTPUTS = [torch.zeros(4, 3), torch.zeros(4, 3)]
INDEX = torch.tensor([0, 1])
CODES = torch.zeros(2, 6, dtype=torch.int8)
SCALES = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("hidden_states", "index", "dtype", "error", "message"),
    [
        ([], None, torch.int8, ValueError, "hidden_states is empty"),
        ([LAYER], None, torch.int16, TypeError, "dtype is torch.int16, expected one of torch.int8"),
        ([LAYER], INDEX.int(), torch.int8, TypeError, "index is torch.int32"),
        ([LAYER], INDEX[None], torch.int8, ValueError, r"index has the shape \[1, 2\]"),
        ([LAYER.double()], None, torch.int8, TypeError, r"hidden_states\[0\] is torch.float64"),
        ([LAYER[0]], None, torch.int8, ValueError, r"hidden_states\[0\] has the shape \[3\]"),
        ([LAYER, LAYER[:2]], None, torch.int8, ValueError, r"hidden_states\[1\] has the shape"),
        ([LAYER, LAYER.half()], INDEX, torch.int8, TypeError, r"\[1\] is torch.float16"),
        ([LAYER, LAYER.to("meta")], None, torch.int8, ValueError, "is on meta but the first is on"),
        ([LAYER], torch.tensor([4]), torch.int8, IndexError, r"is 4, expected 0 <= index < 4 \(T"),
        ([LAYER], torch.tensor([-1]), torch.int8, IndexError, r"index\[0\] is -1"),
    ],
)
@pytest.mark.parametrize("name", [Backend.CPU, Backend.REFERENCE])
def test_wrong_arguments_of_pack_are_named(
    hidden_states: list[Tensor],
    index: Tensor | None,
    dtype: torch.dtype,
    error: type[Exception],
    message: str,
    name: Backend,
) -> None:
    with backend.forced(name), pytest.raises(error, match=message):
        pack(hidden_states, index, dtype=dtype)


@pytest.mark.parametrize(
    ("outputs", "data", "scales", "index", "error", "message"),
    [
        ([], CODES, SCALES, INDEX, ValueError, "outputs is empty"),
        (OUTPUTS, CODES.short(), SCALES, INDEX, TypeError, "packed.data is torch.int16"),
        (OUTPUTS, CODES, None, INDEX, TypeError, "torch.int8 without scales; expected scales for"),
        (OUTPUTS, CODES.float(), SCALES, INDEX, TypeError, "torch.float32 with scales"),
        (OUTPUTS, CODES, SCALES.double(), INDEX, TypeError, "packed.scales is torch.float64"),
        (OUTPUTS, CODES, SCALES[:1], INDEX, ValueError, r"packed.scales has the shape \[1, 2\]"),
        (OUTPUTS, CODES, SCALES.to("meta"), INDEX, ValueError, "packed.scales is on meta"),
        (OUTPUTS, CODES.to("meta"), SCALES, INDEX, ValueError, "packed.data is on meta"),
        (OUTPUTS, CODES[:, :5], SCALES, INDEX, ValueError, r"\[2, 5\], expected \[rows, 6\]"),
        (OUTPUTS, CODES, SCALES, INDEX.to("meta"), ValueError, "index is on meta"),
        (OUTPUTS, CODES, SCALES, INDEX[:1], ValueError, "1 entries, expected one for each of 2"),
        (OUTPUTS, CODES, SCALES, INDEX + 3, IndexError, r"index\[1\] is 4, .* \(rows of the out"),
        ([o[:1] for o in OUTPUTS], CODES, SCALES, None, ValueError, "has 2 rows, .* outputs 1"),
        ([o[0] for o in OUTPUTS], CODES, SCALES, None, ValueError, r"contiguous tensor \[N, H\]"),
        ([LAYER.t(), LAYER.t()], CODES, SCALES, None, ValueError, r"strides \(1, 3\)"),
        ([LAYER.int()] * 2, CODES, SCALES, None, TypeError, r"outputs\[0\] is torch.int32"),
        ([LAYER, LAYER.half()], CODES, SCALES, None, TypeError, r"outputs\[1\] is torch.float16"),
    ],
)
@pytest.mark.parametrize("name", [Backend.CPU, Backend.REFERENCE])
def test_wrong_arguments_of_unpack_into_are_named(
    outputs: list[Tensor],
    data: Tensor,
    scales: Tensor | None,
    index: Tensor | None,
    error: type[Exception],
    message: str,
    name: Backend,
) -> None:
    with backend.forced(name), pytest.raises(error, match=message):
        unpack_into(outputs, PackedStates(data, scales), index)


def test_wrong_arguments_of_unpack_are_named() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch.float64, expected one of torch.bfloat16"):
        unpack(PackedStates(CODES, SCALES), 2, dtype=torch.float64)
    for layers in (0, 4):
        with pytest.raises(
            ValueError, match=rf"\[2, 6\], expected \[rows, L \* H\] of L = {layers}"
        ):
            unpack(PackedStates(CODES, SCALES), layers, dtype=torch.float32)


@pytest.mark.parametrize(
    ("hidden_states", "index", "dtype", "message"),
    [
        ([], INDEX, torch.int8, "there are no layers"),
        ([LAYER], INDEX.int(), torch.int8, "index must be an int64 tensor"),
        ([LAYER.double()], None, torch.int8, "a dtype is none of"),
        ([CODES], None, torch.int8, "layers must be bfloat16, float16 or float32"),
        ([LAYER[0]], None, torch.int8, "two dimensions"),
        ([LAYER, LAYER[:2]], None, torch.int8, "one shape, dtype and device"),
        ([LAYER], None, torch.float32, "packed must be int8 or float8_e4m3fn"),
        ([LAYER], torch.tensor([0, 4]), torch.int8, r"index\[1\] is 4, expected 0 <= index < 4"),
    ],
)
def test_the_bare_packing_protects_memory(
    hidden_states: list[Tensor], index: Tensor | None, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.hidden_state_pack(hidden_states, index, dtype)


@pytest.mark.parametrize(
    ("outputs", "data", "scales", "index", "message"),
    [
        ([], CODES, SCALES, None, "there are no layers"),
        (OUTPUTS, CODES[:, :5], SCALES, None, "packed must have the shape"),
        (OUTPUTS, CODES[0], SCALES, None, "packed must have the shape"),
        (OUTPUTS, CODES.half(), None, None, "int8, float8_e4m3fn or of the outputs' dtype"),
        (OUTPUTS, CODES, None, None, "need scales, other dtypes none"),
        (OUTPUTS, CODES, SCALES[:1], None, "scales must be float32 of the shape"),
        (OUTPUTS, CODES, SCALES.double(), None, "scales must be float32 of the shape"),
        (OUTPUTS, CODES, SCALES, INDEX[:1], "one entry for each packed row"),
        (OUTPUTS, CODES, SCALES, INDEX - 1, r"index\[0\] is -1, expected 0 <= index < 4"),
        ([o[:1] for o in OUTPUTS], CODES, SCALES, None, "more packed rows than rows"),
        ([LAYER.t()[:, :3]] * 2, CODES[:1], SCALES[:1], None, "rows that are contiguous"),
        ([LAYER[:1].expand(4, 3)] * 2, CODES, SCALES, None, "do not overlap"),
    ],
)
def test_the_bare_unpacking_protects_memory(
    outputs: list[Tensor],
    data: Tensor,
    scales: Tensor | None,
    index: Tensor | None,
    message: str,
) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.hidden_state_unpack_(outputs, data, scales, index)


@pytest.mark.parametrize(
    "call", ["pack([layer], bad, dtype=torch.int8)", "unpack_into([layer], codes, bad)"]
)
@pytest.mark.parametrize("device_of_index", set(DEVICES) & {"cuda"})
def test_an_index_out_of_range_on_cuda_is_an_error(call: str, device_of_index: str) -> None:
    """In a process of its own: a device-side assertion ends the CUDA context."""
    program = (
        "import torch\n"
        "from speculators.ops.hidden_state_packing import pack, unpack_into\n"
        f"layer = torch.zeros(4, 3, device={device_of_index!r})\n"
        "codes = pack([layer[:1]], dtype=torch.int8)\n"
        f"bad = torch.tensor([4], device=layer.device)\n{call}\n"
        "torch.cuda.synchronize()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert "hidden_state_packing: index out of range" in process.stdout + process.stderr

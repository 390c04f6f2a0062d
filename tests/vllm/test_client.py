"""What all requests to a server have in common: its address, the key, streams, what went wrong."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.vllm import fake_server
from tests.vllm.fake_server import Fake

from speculators.integrations.vllm.bench.load import complete
from speculators.integrations.vllm.contract.check import ContractError
from speculators.integrations.vllm.contract.endpoint import Endpoint
from speculators.integrations.vllm.contract.trace_format import TraceCase, TraceRequest
from speculators.integrations.vllm.hidden_states.client import HiddenStatesError, HiddenStatesServer
from speculators.integrations.vllm.serving.client import AnswerError, Client
from speculators.integrations.vllm.serving.server import free_port

BODY = {"prompt": [3, 4], "max_tokens": 5}


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_address_is_taken_as_it_is_given(suffix: str) -> None:
    with fake_server.running(Fake()) as address:
        client = Client(address + suffix)
        assert (client.model, client.version) == (fake_server.MODEL, "9.9")
        assert client.complete(BODY)["choices"] == [{"token_ids": [7, 8, 9, 10, 11]}]
        client.close()


@pytest.mark.parametrize("address", ["localhost:8000", "http://", "", "ftp://h:1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(AnswerError, match="is no server's address; expected http://HOST:PORT"):
        Client(address)


def test_nobody_answers() -> None:
    client = Client(f"http://127.0.0.1:{free_port()}")
    assert not client.healthy()
    assert client.version is None
    with pytest.raises(AnswerError, match="does not answer") as caught:
        client.complete(BODY)
    assert caught.value.may_pass


def test_proxies_of_the_environment_are_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with fake_server.running(Fake()) as address:
        assert Client(address).model == fake_server.MODEL


def test_it_becomes_healthy() -> None:
    with fake_server.running(Fake()) as address:
        client = Client(address)
        assert [client.healthy(), client.healthy()] == [False, True]


def streamed(client: Client, body: Any) -> list[Any]:
    with client.stream(body) as events:
        return list(events)


@pytest.mark.parametrize(
    ("fault", "reason", "may_pass"),
    [
        ("400", r"/v1/completions refuses \(400\): not now$", False),
        ("503", r"refuses \(503\): not now$", True),
        ("hang up", r"does not answer \(\w+: .+\)", True),
    ],
)
@pytest.mark.parametrize("ask", [Client.complete, streamed])
def test_refusals(fault: str, reason: str, may_pass: bool, ask: Any) -> None:
    with fake_server.running(Fake({"7": [fault]})) as address:
        client = Client(address)
        with pytest.raises(AnswerError, match=reason) as caught:
            ask(client, BODY)
        assert caught.value.may_pass == may_pass
        assert client.complete(BODY)["choices"]  # and the client goes on


def test_a_stream_comes_in_pieces_and_may_be_left() -> None:
    with fake_server.running(Fake()) as address:
        client = Client(address)
        with client.stream(BODY) as events:
            found = [event["choices"][0]["token_ids"] for event in events]
        assert found == [[7], [8, 9], [10, 11]]
        with client.stream({**BODY, "max_tokens": 1000}) as events:
            assert next(events)["choices"]
        assert client.complete(BODY)["choices"]


# ---- the three that ask

PROMPT = [1, 2, 3]


def measure(address: str) -> None:
    complete(Client(address), PROMPT, 4, salt="")


def trace(address: str) -> None:
    case = TraceCase(name="draft", draft="folder")
    Endpoint(address)(TraceRequest(verifier="v", cases=[case], prompts=[PROMPT], max_new_tokens=4))


def read_states(address: str) -> None:
    server = HiddenStatesServer(address, (0, 2), fake_server.HIDDEN, "float32", command="")
    assert set(server.states(torch.tensor(PROMPT))) == {0, 2}


@pytest.mark.parametrize(
    ("ask", "error"),
    [(measure, AnswerError), (trace, ContractError), (read_states, HiddenStatesError)],
)
def test_a_key_is_taken_from_the_environment(
    ask: Callable[[str], Any],
    error: type[Exception],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Fake(
        key="secret",
        trace=lambda _: ([5, 6], [1]) if ask is trace else ([], []),
        connector=fake_server.Connector(tmp_path, (0, 2), "float32"),
    )
    with fake_server.running(fake) as address:
        for key in (None, "another"):
            if key is not None:
                monkeypatch.setenv("VLLM_API_KEY", key)
            with pytest.raises(error, match=r"refuses \(401\): .*Unauthorized.*VLLM_API_KEY"):
                ask(address)
        assert not fake.requests
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        ask(address)
    assert len(fake.requests) == 1

"""Drafts from and to the Hub: the real client, in a process of its own, against a fake Hub.

A process of its own, because huggingface_hub reads its settings when it is imported.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.fake_hub import TOKEN, FakeHub

from speculators.configs.model_config import SpeculatorModelConfig
from speculators.models.hub import local_directory
from speculators.models.model_card import model_card
from speculators.models.weights import write_tensors

GOLDEN = Path("tests/golden/eagle_plain")
CONFIG = (GOLDEN / "config.json").read_bytes()
WEIGHTS = (GOLDEN / "model.safetensors").read_bytes()
DRAFT = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "README.md": b"# a draft\n"}

# Reads [[module, attributes, arguments, keywords], ...] and prints what each call gives.
CLIENT = """\
import functools, importlib, json, sys
for module, attributes, arguments, keywords in json.load(sys.stdin):
    function = functools.reduce(getattr, attributes, importlib.import_module(module))
    try:
        print(json.dumps([str(function(*arguments, **keywords)), None]))
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        print(json.dumps([kinds, str(error)]))
"""


@dataclasses.dataclass
class Client:
    """Runs calls as a user of ``endpoint`` with a home, and so a cache, of its own."""

    endpoint: str
    home: Path

    def run(self, *calls: list[Any], **settings: str) -> list[Any]:
        """What each call gives: its result as a string and None, or error classes and message."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment = {k: v for k, v in ours.items() if not k.lower().endswith("_proxy")}
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), **settings}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "DO_NOT_TRACK": "1"}
        process = subprocess.run(
            [sys.executable, "-c", CLIENT],
            input=json.dumps(calls),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        return [json.loads(line) for line in process.stdout.splitlines()]

    def cached(self) -> set[str]:
        """The names of all files in the cache that are a repository's."""
        return {path.name for path in self.home.glob("hub/*/snapshots/**/*") if path.is_file()}


def call(name: str, *arguments: Any, **keywords: Any) -> list[Any]:
    return ["speculators.models.hub", [name], arguments, keywords]


def pull(*arguments: Any, **keywords: Any) -> list[Any]:
    return call("local_directory", *arguments, **keywords)


def content(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def refusal(answer: list[Any], kind: str, *words: str) -> None:
    kinds, message = answer
    assert kind in kinds, answer
    for word in words:
        assert word in message, message


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "organisation" / "draft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # a relative path that could be an id
    assert local_directory("organisation/draft") == Path("organisation/draft")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; expected a draft's directory"):
        local_directory(tmp_path / "file")
    for name in ("/no/such/folder", "../no/such", "a/b/c", "", "a b/c", "org/../x"):
        if name and not Path(name).exists():
            with pytest.raises(FileNotFoundError, match="no Hub id either"):
                local_directory(name)


def test_downloads_then_the_same_cache_without_the_hub(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    evil = f"open({str(marker)!r}, 'w')\n".encode()
    code = {"modeling_draft.py": evil, "config.py": evil, "folder/other.safetensors": b"-"}
    auto = json.loads(CONFIG) | {"auto_map": {"": "config.Evil", "AutoModel": "modeling_draft.A"}}
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tensors(shards, {f"t{i}": torch.ones(300) for i in range(3)}, max_shard_size=1300)
    sharded = {"config.json": CONFIG, **content(str(shards))}
    pickled = {"config.json": CONFIG, "pytorch_model.bin": b"old", "README.md": b"-"}
    with FakeHub() as server:
        old = server.add("org/draft", {**DRAFT, "model.safetensors": b"older weights"})
        server.add("org/draft", {**DRAFT, "pytorch_model.bin": b"-", **code}, "main")
        server.add("org/draft", {**DRAFT, "model.safetensors": b"of a branch"}, "next/try")
        server.add("org/sharded", sharded)
        server.add("org/pickled", pickled | code)
        server.add("org/auto", {"config.json": json.dumps(auto).encode(), **code})
        server.add("org/secret", DRAFT)
        server.repositories["org/secret"].private = True
        client = Client(server.endpoint, tmp_path / "home")
        calls = [
            pull("org/draft"),
            pull("org/draft", revision=old),
            pull("org/draft", revision="next/try"),
            pull("org/sharded"),
            pull("org/pickled", cache_dir=str(tmp_path / "other_cache")),
            pull("org/secret", token=TOKEN),
        ]
        answers = client.run(
            *calls,
            pull("org/nothing"),
            pull("org/draft", revision="nowhere"),
            pull("org/auto"),
            pull("org/draft", local_files_only=True),
            pull("org/auto", local_files_only=True, cache_dir=str(tmp_path / "empty")),
        )
        folders = [folder for folder, _ in answers[:6]]
        main = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
        assert content(folders[0]) == main
        assert content(folders[1]) == main | {"model.safetensors": b"older weights"}
        assert content(folders[2]) == main | {"model.safetensors": b"of a branch"}
        assert content(folders[3]) == sharded
        assert len(sharded) == 5  # three shards, their index and the configuration
        assert content(folders[4]) == {"config.json": CONFIG, "pytorch_model.bin": b"old"}
        assert content(folders[5]) == main
        refusal(answers[6], "FileNotFoundError", "org/nothing", server.endpoint, "token")
        refusal(answers[7], "FileNotFoundError", "org/draft has no revision 'nowhere'")
        refusal(answers[8], "FileNotFoundError", "org/auto has no weights", "config.json")
        assert answers[9][0] == folders[0]
        refusal(
            answers[10], "FileNotFoundError", "local_files_only is set", str(tmp_path / "empty")
        )
        assert not [request for request in server.requests if ".py" in request]
        assert not [name for name in client.cached() if name.endswith(".py")]

    for settings in ({"HF_HUB_OFFLINE": "1"}, {}):
        answers = client.run(*calls[:5], pull("org/nothing"), **settings)
        assert [folder for folder, _ in answers[:5]] == folders[:5]
        reason = "HF_HUB_OFFLINE is set" if settings else f"{client.endpoint} cannot be reached"
        refusal(answers[5], "FileNotFoundError", reason, "org/nothing", "give a directory")
    assert not marker.exists()


def test_an_interrupted_download_is_no_draft_offline(tmp_path: Path) -> None:
    with FakeHub() as server:
        server.add("org/draft", DRAFT)
        client = Client(server.endpoint, tmp_path)
        one = ["huggingface_hub", ["hf_hub_download"], ["org/draft", "config.json"], {}]
        assert client.run(one)[0][1] is None
        refusal(
            client.run(pull("org/draft"), HF_HUB_OFFLINE="1")[0], "FileNotFoundError", "in part"
        )
        weights = Path(client.run(pull("org/draft"))[0][0]) / "model.safetensors"
    weights.unlink()
    for answer in client.run(pull("org/draft"), pull("org/draft", local_files_only=True)):
        refusal(answer, "FileNotFoundError", "does not have all of org/draft")


def test_what_is_pushed_comes_back(tmp_path: Path) -> None:
    saved, resaved = tmp_path / "saved", tmp_path / "resaved"
    config = SpeculatorModelConfig.from_pretrained(GOLDEN)
    tensors = {f"t{i}": torch.randn(300) for i in range(3)}
    for folder, size in ((saved, "5GB"), (resaved, 1300)):
        folder.mkdir()
        config.save_pretrained(folder)
        write_tensors(folder, tensors, max_shard_size=size)
        (folder / "README.md").write_text(model_card(config))
    with FakeHub() as server:
        client = Client(server.endpoint, tmp_path / "home")
        by_user = {"token": TOKEN}
        urls = client.run(
            call("push", str(saved), "org/draft", private=True, commit_message="first", **by_user),
            call("push", str(resaved), "org/draft", revision="sharded", **by_user),
            call("push", str(saved), "org/draft", **by_user),  # nothing has changed
            pull("org/draft", **by_user),
            pull("org/draft", revision="sharded", **by_user),
            call("push", str(saved), "org/draft"),
            call("push", str(saved), "not an id", **by_user),
            call("push", str(tmp_path), "org/draft", **by_user),
        )
        repository = server.repositories["org/draft"]
        first, sharded = repository.branches["main"], repository.branches["sharded"]
        commits = [f"{server.endpoint}/org/draft/commit/{commit}" for commit in (first, sharded)]
        assert [url for url, _ in urls[:3]] == [*commits, commits[0]]
        assert repository.private
        assert repository.messages == ["initial commit", "first", "Upload draft model"]
        # The single file of the first push would be read before the new shards.
        assert server.files("org/draft", "sharded") == {".gitattributes": b""} | content(
            str(resaved)
        )
        for folder, (pulled, _) in zip((saved, resaved), urls[3:5], strict=True):
            expected = content(str(folder))
            del expected["README.md"]
            assert content(pulled) == expected
        refusal(urls[5], "OSError", "401")
        refusal(urls[6], "ValueError", "not an id")
        refusal(urls[7], "FileNotFoundError", "has no config.json", "save_pretrained")


def test_the_configurations_own_way_to_the_hub(tmp_path: Path) -> None:
    config = SpeculatorModelConfig.from_pretrained(GOLDEN)
    program = ["speculators", ["SpeculatorModelConfig", "from_pretrained"]]
    with FakeHub() as server:
        server.add("org/draft", DRAFT)
        client = Client(server.endpoint, tmp_path / "home")
        push = (
            "import speculators, sys; c = speculators.SpeculatorModelConfig.from_pretrained"
            f"('org/draft'); c.push_to_hub('org/copy', token={TOKEN!r})"
        )
        found, pushed, back = client.run(
            [*program, ["org/draft"], {}],
            ["builtins", ["exec"], [push], {}],
            [*program, ["org/copy"], {}],
        )
        expected = f"{type(config).__name__} {json.dumps(config.to_dict(), indent=2)}"
        assert found == [expected, None]
        assert pushed == ["None", None]
        assert back == [expected, None]
        files = server.files("org/copy")
        assert json.loads(files["config.json"]) == config.to_dict()
        assert set(files) == {".gitattributes", "README.md", "config.json"}

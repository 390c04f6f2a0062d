"""A Hub on 127.0.0.1: what huggingface_hub asks for when it downloads and uploads models.

Repositories live in memory: branches, commits and files. A missing repository is answered with 401,
as the real Hub answers who has no token; writing needs a token; every file is a regular git blob.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

TOKEN = "hf_of_the_fake_hub"  # noqa: S105 - it opens nothing else

Files = dict[str, bytes]

_NONE: dict[str, str] = {}


@dataclasses.dataclass
class Repository:
    """A model repository; the first commit holds what the Hub itself puts there."""

    private: bool = False
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b""}, "initial commit")

    def commit(self, branch: str, files: Files, message: str) -> str:
        """Sets a branch to these files, and returns the commit."""
        self.messages.append(message)
        commit = hashlib.sha1(repr((len(self.commits), files)).encode()).hexdigest()  # noqa: S324
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit of a branch or commit."""
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


class FakeHub:
    """The server; ``with FakeHub() as hub`` starts and stops it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            """Answers for this hub."""

            def answer(self, content: bytes) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                _Request(hub, self, content).answer()

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, files: Files, branch: str = "main") -> str:
        """Commits files to a repository, which is made if need be; returns the commit."""
        repository = self.repositories.setdefault(repo_id, Repository())
        return repository.commit(branch, {".gitattributes": b"", **files}, "by hand")

    def files(self, repo_id: str, branch: str = "main") -> Files:
        """The files at a branch's end."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches[branch]]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, content: bytes) -> None:
        """Answers the request."""

    def do_GET(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_HEAD = do_POST = do_GET  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing."""


class _Request:
    def __init__(self, hub: FakeHub, handler: _Handler, content: bytes) -> None:
        self.hub, self.handler, self.content = hub, handler, content
        self.may_write = handler.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self) -> None:
        path = urlsplit(self.handler.path).path
        name = r"(?P<repo>[^/]+/[^/]+)"
        routes: dict[str, Callable[..., None]] = {
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": self.validate_yaml,
            rf"GET /api/models/{name}(/revision/(?P<rev>[^/]+))?": self.information,
            rf"GET /api/models/{name}/tree/(?P<rev>[^/]+)": self.tree,
            rf"POST /api/models/{name}/branch/(?P<rev>[^/]+)": self.branch,
            rf"POST /api/models/{name}/preupload/(?P<rev>[^/]+)": self.preupload,
            rf"POST /api/models/{name}/commit/(?P<rev>[^/]+)": self.commit,
            rf"(GET|HEAD) /{name}/resolve/(?P<rev>[^/]+)/(?P<file>.+)": self.resolve,
        }
        for route, method in routes.items():
            if match := re.fullmatch(route, f"{self.handler.command} {path}"):
                if self.handler.command == "POST" and not self.may_write:
                    self.json({"error": "no token"}, 401)
                    return
                method(**{key: unquote(value) for key, value in match.groupdict("main").items()})
                return
        self.json({"error": f"the fake hub does not know {path}"}, 501)

    # ---- answers

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] = _NONE) -> None:
        self.handler.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.handler.send_header(key, value)
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(content)

    def json(self, content: Any, status: int = 200, headers: dict[str, str] = _NONE) -> None:
        self.send(json.dumps(content).encode(), status, headers)

    def repository(self, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.may_write):
            self.json({}, 404 if self.may_write else 401, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def at(self, repo: str, rev: str) -> tuple[str, Files] | None:
        repository = self.repository(repo)
        if repository is None:
            return None
        commit = repository.find(rev)
        if commit is None:
            self.json({}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repository.commits[commit]

    # ---- reading

    def information(self, repo: str, rev: str) -> None:
        if found := self.at(repo, rev):
            self.json({"id": repo, "sha": found[0]})

    def tree(self, repo: str, rev: str) -> None:
        if found := self.at(repo, rev):
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
                for path, content in found[1].items()
            ]
            self.json(entries)

    def resolve(self, repo: str, rev: str, file: str) -> None:
        if found := self.at(repo, rev):
            commit, files = found
            if file not in files:
                missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
                self.json({}, 404, missing)
            else:
                etag = f'"{_blob(files[file])}"'
                self.send(files[file], 200, {"ETag": etag, "X-Repo-Commit": commit})

    # ---- writing

    def create(self) -> None:
        wanted = json.loads(self.content)
        repo = f"{wanted['organization'] or 'user'}/{wanted['name']}"
        known = repo in self.hub.repositories
        private = wanted.get("visibility") == "private"
        self.hub.repositories.setdefault(repo, Repository(private=private))
        self.json({"url": f"{self.hub.endpoint}/{repo}"}, 409 if known else 200)

    def validate_yaml(self) -> None:
        try:
            errors = [] if ModelCard(json.loads(self.content)["content"]).data else ["none"]
        except Exception as error:  # whatever YAML makes of it
            errors = [str(error)]
        messages = [{"message": error} for error in errors]
        self.json({"errors": messages, "warnings": []}, 400 if errors else 200)

    def branch(self, repo: str, rev: str) -> None:
        if repository := self.repository(repo):
            known = rev in repository.branches
            repository.branches.setdefault(rev, repository.branches["main"])
            self.json({}, 409 if known else 200)

    def preupload(self, repo: str, rev: str) -> None:
        if found := self.at(repo, rev):
            files = [
                {
                    "path": (path := file["path"]),
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": _blob(found[1][path]) if path in found[1] else None,
                }
                for file in json.loads(self.content)["files"]
            ]
            self.json({"files": files})

    def commit(self, repo: str, rev: str) -> None:
        if found := self.at(repo, rev):
            files, message = dict(found[1]), ""
            for line in self.content.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    message = value["summary"]
                elif item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    self.json({"error": f"unknown operation {item['key']}"}, 400)
                    return
            commit = self.hub.repositories[repo].commit(rev, files, message)
            url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
            self.json({"commitUrl": url, "commitOid": commit})


def _blob(content: bytes) -> str:
    """A file's git object id, which is also its ETag."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324

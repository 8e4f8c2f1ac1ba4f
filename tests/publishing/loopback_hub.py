"""A small Hub on loopback, for the real client of huggingface_hub: repositories, commits, large files, and faults.

It keeps what is committed, checks what it is sent as the Hub does (tokens, hashes, the head of a card), and can fail at
any request, by a status or by breaking the connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

from attention_rl_trainer import hub as own_hub

OWNER, TOKEN, READ_TOKEN = "someone", "hf_loopbackwriter", "hf_loopbackreader"
LARGE = (".safetensors", ".png")
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LICENCES = {"apache-2.0", "mit", "cc-by-sa-4.0", "other"}


@dataclass
class Fault:
    """What goes wrong with requests that are asked for by method and path."""

    method: str
    path: str
    """A pattern, searched for."""
    what: int | Literal["reset", "html"]
    """A status; a connection that breaks in the middle of the body; or a page of something that is not a Hub."""
    times: int = 1000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    message: str
    revision: str
    paths: set[str]


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    is_private: bool = False

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class LoopbackHub(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_bytes: int | None = None
        """Size of the parts of a large file; ``None`` for one part."""
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, method: str, path: str, what: int | Literal["reset", "html"], **options: Any) -> None:
        self.faults.append(Fault(method, path, what, **options))

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id].files

    def fault_of(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that a client closed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written apart: the second must not wait for the first to be acknowledged.
    disable_nagle_algorithm = True
    server: LoopbackHub

    def log_message(self, *args: object) -> None:
        """Keep the output of the tests clean."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{method} {path}")
        fault = self.server.fault_of(method, path)
        if fault is not None and fault.what == "reset":
            self.rfile.read(min(7, int(self.headers.get("Content-Length", 0))))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        body = self._body()
        if fault is not None and fault.what == "html":
            self._send(200, b"<html>This is no Hub.</html>", {"Content-Type": "text/html"})
        elif fault is not None:
            message = {"error": f"status {fault.what} was asked for"}
            self._send(int(fault.what), json.dumps(message).encode(), fault.headers)
        else:
            self._route(method, path, body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, method: str, path: str, body: bytes) -> None:
        routes = {
            r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/[^/]+)?": self._info,
            r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/[^/]+": self._tree,
            r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)": self._resolve,
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": self._validate,
            r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/[^/]+": self._preupload,
            r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"PUT /blobs/(?P<oid>\w+)(/(?P<part>\d+))?": self._put,
            r"POST /blobs/(?P<oid>\w+)/(verify|complete)": self._check,
            r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)": self._commit,
            r"(HEAD|GET) /": lambda body: self._json({}),
        }
        for route, handle in routes.items():
            if found := re.fullmatch(route, f"{method} {path}"):
                if route.startswith("POST /api/models") or "git" in route or "create" in route:
                    token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                    if token != TOKEN:
                        self._json({"error": "Invalid username or password."}, 403 if token == READ_TOKEN else 401)
                        return
                repo_id = found.groupdict().get("repo")
                if repo_id is not None and repo_id not in self.server.repositories:
                    self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                    return
                handle(body, **{name: value for name, value in found.groupdict().items() if value is not None})
                return
        self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- Writing ----

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or OWNER}/{asked['name']}"
        answer = {"url": f"{self.server.endpoint}/{repo_id}"}
        if repo_id in self.server.repositories:
            self._json({"error": "You already created this model repo", **answer}, 409)
            return
        self.server.repositories[repo_id] = Repository(is_private=asked.get("visibility") == "private")
        self._json(answer)

    def _validate(self, body: bytes) -> None:
        _, head, _ = json.loads(body)["content"].split("---\n", 2)
        data = yaml.safe_load(head)
        names = [data.get("base_model"), *(data.get("datasets") or [])]
        wrong = [name for name in names if name is not None and _REPO_ID.fullmatch(str(name)) is None]
        if data.get("license", "other") not in _LICENCES:
            wrong.append(data["license"])
        errors = [{"message": f"{name!r} is not a valid name"} for name in wrong]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, body: bytes, repo: str) -> None:
        paths = [item["path"] for item in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        self._json({"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False, "oid": None} for p in paths]})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            href = f"{self.server.endpoint}/blobs/{item['oid']}"
            upload: dict[str, Any] = {"href": href}
            if size := self.server.part_bytes:
                count = -(-item["size"] // size)
                parts = {str(number): f"{href}/{number}" for number in range(1, count + 1)}
                upload = {"href": f"{href}/complete", "header": {"chunk_size": str(size), **parts}}
            item = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.blobs:
                item["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            objects.append(item)
        self._json({"transfer": "multipart" if self.server.part_bytes else "basic", "objects": objects})

    def _put(self, body: bytes, oid: str, part: str = "1") -> None:
        self.server.parts.setdefault(oid, {})[int(part)] = body
        self._send(200, b"", {"ETag": f'"{part}"'})

    def _check(self, body: bytes, oid: str) -> None:
        content = b"".join(part for _, part in sorted(self.server.parts.get(oid, {}).items()))
        if hashlib.sha256(content).hexdigest() != oid:
            self._json({"error": "The content is not that of its hash"}, 400)
            return
        self.server.blobs[oid] = content
        self._json({})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        header, *changes = [json.loads(line) for line in body.splitlines()]
        repository, new = self.server.repositories[repo], dict[str, bytes]()
        for change in changes:
            value = change["value"]
            content = (
                self.server.blobs[value["oid"]] if change["key"] == "lfsFile" else base64.b64decode(value["content"])
            )
            new[value["path"]] = content
        repository.files.update(new)
        repository.commits.append(Commit(header["value"]["summary"], revision, set(new)))
        self._json({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{repository.sha}", "commitOid": repository.sha})

    # ---- Reading ----

    def _info(self, body: bytes, repo: str) -> None:
        repository = self.server.repositories[repo]
        siblings = [{"rfilename": name} for name in repository.files]
        self._json({"id": repo, "sha": repository.sha, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, body: bytes, repo: str) -> None:
        files = self.server.files(repo)
        self._json([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()])

    def _resolve(self, body: bytes, repo: str, file: str) -> None:
        repository = self.server.repositories[repo]
        if file not in repository.files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.files[file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, {"ETag": etag, "X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes"})


@contextmanager
def loopback_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Serve a Hub, and have this process's client use it, with an empty cache, a token, and short waits."""
    with LoopbackHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        patch.setattr(constants, "ENDPOINT", server.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", re.sub(r"^https?://[^/]+", server.endpoint, template))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        # Its storage is not of HTTP alone.
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        quick = partial(http_backoff, base_wait_time=0.01, max_wait_time=0.02)
        for module in ("_commit_api", "lfs"):
            patch.setattr(f"huggingface_hub.{module}.http_backoff", quick)
        huggingface_hub.close_session()
        own_hub.forget_hub_answer()
        yield server
        server.shutdown()
        thread.join()
    huggingface_hub.close_session()
    own_hub.forget_hub_answer()

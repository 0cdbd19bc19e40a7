"""A Hub on 127.0.0.1: models at commits, files in parts, faults on demand, commits taken.

After the HTTP API as huggingface_hub speaks it: resolve, models, tree, preupload, commit, LFS.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

RANGES = True
"""Whether it sends parts of files."""

LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Model:
    """A repository: files by commit, and what its branches mean."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(
            repr(sorted((k, hashlib.sha1(v).digest()) for k, v in files.items())).encode()
        )
        digest.update(str(len(self.commits)).encode())
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


Fault = Callable[["Handler", bytes], bool]
"""Called before part of a file is sent; true when it has answered itself."""


class FakeHub(ThreadingHTTPServer):
    """The server; `models` is what it holds, `requests` what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, Model] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.sent: dict[str, int] = defaultdict(int)
        self.blobs: dict[str, bytes] = {}
        self.delay_s = 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, repo: str, folder: Path, **options: object) -> Model:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        model = self.models.setdefault(repo, Model(**options))  # type: ignore[arg-type]
        model.commit(files)
        return model

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""

    def asked(self, text: str) -> list[tuple[str, str, str | None]]:
        return [request for request in self.requests if text in request[1]]


def status(code: int, headers: dict[str, str] | None = None) -> Fault:
    """Answer with an error."""

    def fault(handler: "Handler", body: bytes) -> bool:
        handler.answer(code, b"{}", headers or {})
        return True

    return fault


def drop_after(nbytes: int) -> Fault:
    """Close the connection in the middle of the body."""

    def fault(handler: "Handler", body: bytes) -> bool:
        handler.start(206 if handler.headers.get("Range") else 200, len(body))
        handler.wfile.write(body[:nbytes])
        handler.wfile.flush()
        handler.count(nbytes)
        handler.close_connection = True
        handler.connection.close()
        return True

    return fault


def hold_after(nbytes: int, release: threading.Event) -> Fault:
    """Send the beginning, and then nothing."""

    def fault(handler: "Handler", body: bytes) -> bool:
        handler.start(206 if handler.headers.get("Range") else 200, len(body))
        handler.wfile.write(body[:nbytes])
        handler.wfile.flush()
        handler.count(nbytes)
        release.wait(120)
        handler.close_connection = True
        return True

    return fault


def damage(handler: "Handler", body: bytes) -> bool:
    """Send as many bytes as asked for, one of them another."""
    body = bytes([body[0] ^ 1]) + body[1:]
    handler.start(206 if handler.headers.get("Range") else 200, len(body))
    handler.wfile.write(body)
    return True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub
    _extra: dict[str, str]
    _file: str

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, document: object, code: int = 200) -> None:
        self.answer(code, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def start(self, code: int, nbytes: int) -> None:
        self.send_response(code)
        for name, value in self._extra.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(nbytes))
        self.end_headers()

    def count(self, nbytes: int) -> None:
        self.server.sent[self._file] += nbytes

    # ---- who asks for what ---------------------------------------------------------------------

    def model(self, repo: str) -> Model | None:
        """Return a model, after refusing what must be refused."""
        model = self.server.models.get(repo)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if model is None or (model.token and token != model.token and not model.gated):
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.answer(401 if not token else 404, b"{}", headers)
            return None
        return model

    def revision(self, model: Model, revision: str) -> str | None:
        sha = model.branches.get(revision, revision)
        if sha in model.commits:
            return sha
        self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self._tree(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path):
            self._resolve(*found.groups())
        else:
            self.json({"error": "unknown"}, 404)

    def _faulty(self, key: str, body: bytes = b"") -> bool:
        self._extra = {}
        waiting = self.server.faults.get(key)
        return waiting.pop(0)(self, body) if waiting else False

    def _info(self, repo: str, revision: str) -> None:
        if self._faulty("info"):
            return
        model = self.model(repo)
        sha = model and self.revision(model, revision)
        if model is None or not sha:
            return
        siblings = []
        for name, content in model.commits[sha].items():
            entry = {"rfilename": name, "size": len(content), "blobId": _sha1(content)}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {
                    "sha256": _sha256(content),
                    "size": len(content),
                    "pointerSize": 130,
                }
            siblings.append(entry)
        self.json({"id": repo, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, repo: str, revision: str) -> None:
        model = self.model(repo)
        sha = model and self.revision(model, revision)
        if model is None or not sha:
            return
        entries = []
        for name, content in model.commits[sha].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": _sha1(content)}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.json(entries)

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        model = self.model(repo)
        if model is None:
            return
        if model.gated and self.headers.get("Authorization") != f"Bearer {model.token}":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        sha = self.revision(model, revision)
        if model is None or not sha:
            return
        content = model.commits[sha].get(name)
        if content is None:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        large = name.endswith(LFS_SUFFIXES)
        etag = _sha256(content) if large else _sha1(content)
        self._file = name
        self._extra = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if large:
            self._extra |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        code, body = 200, content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.command == "GET" and RANGES:
            stop = min(int(asked[2]) + 1 if asked[2] else len(content), len(content))
            body = content[int(asked[1]) : stop]
            code = 206
            self._extra["Content-Range"] = f"bytes {asked[1]}-{stop - 1}/{len(content)}"
        extra = dict(self._extra)
        waiting = self.server.faults.get(name)
        if waiting and self.command == "GET" and waiting.pop(0)(self, body):
            return
        self._extra = extra
        self.start(code, len(body))
        if self.command == "GET":
            for at in range(0, len(body), 1 << 16):
                if self.server.delay_s:
                    time.sleep(self.server.delay_s)
                piece = body[at : at + (1 << 16)]
                self.wfile.write(piece)
                self.count(len(piece))

    # ---- uploads -------------------------------------------------------------------------------

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        query = urlsplit(self.path).query
        self.server.requests.append(("POST", path, query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._faulty("post"):
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            model = self.server.models[found[1]]
            known = found[2] in model.branches
            model.branches.setdefault(found[2], model.branches["main"])
            self.json({}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            self.json({"files": modes})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/put/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(found[1], found[2], body, create_pr="create_pr=1" in query)
        else:
            self.json({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        oid = urlsplit(self.path).path.removeprefix("/put/")
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b""
            while nbytes := int(self.rfile.readline(), 16):
                body += self.rfile.read(nbytes)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(("PUT", self.path, None))
        self.server.blobs[oid] = body
        self.answer(200, b"")

    def _create(self, about: dict[str, object]) -> None:
        repo = f"{about.get('organization') or 'me'}/{about['name']}"
        if repo in self.server.models:
            self.json({"error": "exists", "url": f"{self.server.url}/{repo}"}, 409)
            return
        self.server.models[repo] = model = Model()
        model.commit({})
        model.private = bool(about.get("private") or about.get("visibility") == "private")
        self.json({"url": f"{self.server.url}/{repo}", "name": repo})

    def _commit(self, repo: str, revision: str, body: bytes, *, create_pr: bool) -> None:
        model = self.model(repo)
        sha = model and self.revision(model, revision)
        if model is None or not sha:
            return
        files = dict(model.commits[sha])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        branch = "refs/pr/1" if create_pr else revision
        new = model.commit(files, branch)
        answer = {
            "success": True,
            "commitOid": new,
            "commitUrl": f"{self.server.url}/{repo}/commit/{new}",
        }
        if create_pr:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/1"
        self.json(answer)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

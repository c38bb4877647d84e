"""A small Hub on 127.0.0.1: real HTTP for the real huggingface_hub client. Repositories live in memory.

Faults are injected by the tests: `server.fail(status, times, path)` answers the next requests whose path matches with
an error, `server.before_commit` is called before a commit is taken (to let somebody else commit first).
"""

import base64
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import yaml

TOKEN = "hf_test"  # the one that is accepted


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        parent = self.branches.get(branch)
        oid = uuid.uuid4().hex + "0" * 8  # as long as git's, and never the same twice
        self.commits[oid] = Commit(oid, parent, title, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        commit, found = self.resolve(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent)
        return found


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.faults: list[list] = []  # [status, times, pattern]
        self.requests: list[tuple[str, str]] = []
        self.before_commit: Callable[[], None] = lambda: None
        self.hanging: re.Pattern | None = None  # requests that are never answered, until `release` is set
        self.release = threading.Event()
        self.lost_answers = 0  # commits that are taken, but answered with a time-out
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, status: int, times: int, pattern: str) -> None:
        self.faults.append([status, times, re.compile(pattern)])

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # no connection outlives a test
    server: HubServer

    def log_message(self, *args) -> None:
        """Keeps the output of the tests clean."""

    def answer(self, status: int, body=b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int, message: str, code: str | None = None) -> None:
        self.answer(
            status, {"error": message}, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        )

    def handle_any(self) -> None:
        parsed = urlparse(self.path)
        path, self.query = unquote(parsed.path), parse_qs(parsed.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.hanging is not None and self.server.hanging.search(f"{self.command} {path}"):
            self.server.release.wait()
            return None
        with self.server.lock:
            self.server.requests.append((self.command, path))
            for fault in self.server.faults:
                if fault[1] > 0 and fault[2].search(f"{self.command} {path}"):
                    fault[1] -= 1
                    return self.error(fault[0], "injected")
            for method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    return action(self, *match.groups())
        return self.error(404, f"no route for {self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def authorised(self, repo: Repo | None = None, write: bool = False) -> bool:
        accepted = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if accepted or (repo is not None and not repo.private and not write):
            return True
        self.error(401, "Invalid username or password.")
        return False

    def repo(self, name: str, write: bool = False) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None:
            self.error(404, f"Repository {name} not found", "RepoNotFound")
            return None
        return repo if self.authorised(repo, write) else None

    # ---- routes ----

    def create(self) -> None:
        if not self.authorised():
            return
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.server.repos else 200
        if status == 200:
            repo = self.server.repos[name] = Repo(
                private=bool(wanted.get("private")) or wanted.get("visibility") == "private"
            )
            repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(status, {"url": f"{self.server.url}/{name}", "error": "exists"})

    def whoami(self) -> None:
        if self.authorised():
            self.answer(200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_card(self) -> None:
        """As far as the real one goes that the tests need: metadata in YAML, a base model that is a repository."""
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        errors = [
            {"message": f'"{key}" is not valid'}
            for key, pattern in (("base_model", r"[\w.-]+(/[\w.-]+)?"), ("license", r"[a-z0-9.-]+"))
            if key in metadata and not re.fullmatch(pattern, str(metadata[key]))
        ]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        if not (repo := self.repo(name)):
            return
        if not (commit := repo.resolve(revision)):
            return self.error(404, f"Revision {revision} not found", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.answer(
            200, {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings}
        )

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        if not (repo := self.repo(name)):
            return
        commit = repo.resolve(revision)
        files = {path: data for path, data in commit.files.items() if not folder or path.startswith(f"{folder}/")}
        self.answer(200, [_entry(path, data) for path, data in sorted(files.items())])

    def paths_info(self, name: str, revision: str) -> None:
        if repo := self.repo(name):
            wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
            files = repo.resolve(revision).files
            self.answer(200, [_entry(path, files[path]) for path in wanted if path in files])

    def commits(self, name: str, revision: str) -> None:
        if repo := self.repo(name):
            self.answer(
                200,
                [
                    {"id": c.oid, "title": c.title, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
                    for c in repo.history(revision)
                ],
            )

    def refs(self, name: str) -> None:
        if repo := self.repo(name):
            named = {kind: getattr(repo, kind) for kind in ("branches", "tags")}
            self.answer(
                200,
                {
                    kind: [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in values.items()]
                    for kind, values in named.items()
                }
                | {"converts": []},
            )

    def preupload(self, name: str, revision: str) -> None:
        if self.repo(name, write=True):
            files = json.loads(self.body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self.answer(200, {"files": modes})

    def lfs_batch(self, name: str) -> None:
        if not self.repo(name, write=True):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = dict(wanted)
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/json"})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "the object does not have this sha256")
        self.server.objects[oid] = self.body
        self.answer(200)

    def commit(self, name: str, revision: str) -> None:
        if not (repo := self.repo(name, write=True)):
            return
        self.server.before_commit()
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = repo.branches[revision]
        if header.get("parentCommit") and not head.startswith(header["parentCommit"]):
            return self.error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self.error(400, "an LFS object was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = repo.commit(revision, header["summary"], files)
        if self.server.lost_answers > 0:
            self.server.lost_answers -= 1
            return self.error(504, "the answer was lost")
        self.answer(
            200,
            {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.server.url}/{name}/commit/{commit.oid}"},
        )

    def tag(self, name: str, revision: str) -> None:
        if repo := self.repo(name, write=True):
            tag = json.loads(self.body)["tag"]
            if tag in repo.tags:
                return self.error(409, "Tag exists")
            repo.tags[tag] = repo.resolve(revision).oid
            self.answer(200)

    def branch(self, name: str, branch: str) -> None:
        if repo := self.repo(name, write=True):
            if branch in repo.branches:
                return self.error(409, "Branch exists")
            repo.branches[branch] = repo.branches["main"]
            self.answer(200)

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self.repo(name)):
            return
        if not (commit := repo.resolve(revision)):
            return self.error(404, f"Revision {revision} not found", "RevisionNotFound")
        data = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if data is None:
            return self.answer(404, {"error": "no such file"}, headers | {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(data).hexdigest() if path.endswith(".safetensors") else _git_oid(data)
        self.answer(200, data, headers | {"ETag": f'"{etag}"', "Content-Length": str(len(data))})


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/?(.*)", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", rf"/api/models/{_NAME}/commits/([^/]+)", _Handler.commits),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_put),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_NAME}/tag/(.+)", _Handler.tag),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("GET|HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]

"""A small Hugging Face Hub on a loopback port, for the real `huggingface_hub` client to talk to.

    with LoopbackHub() as hub:
        hub.put("ann/words", {"words_val_000000.npy": data}, repo_type="dataset")
        subprocess.run(command, env={**os.environ, **hub.environment(tmp_path)})      # a script
        hub.patch(monkeypatch, tmp_path)                                              # or this process
        assert hub.repo("ann/words", "dataset").files["words_val_000000.npy"] == data

It speaks what the client of this project needs: whoami, the right to write, creating repositories, listing
files, tags and refs, preupload, LFS batch and upload, commits, and downloads with Range, LFS files by way of
a redirect as on the real Hub. `hub.fail(...)` makes requests go wrong.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_loopback"
LFS_SUFFIXES = (".npy", ".safetensors", ".pt", ".bin", ".parquet", ".gz", ".png")


@dataclass
class Repo:
    id: str
    type: str  # "model" or "dataset"
    private: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)  # (sha, title, files)
    tags: dict[str, str] = field(default_factory=dict)  # name -> sha

    def __post_init__(self) -> None:
        self.commit("initial commit", {})

    def commit(self, title: str, files: dict[str, bytes]) -> str:
        """A new commit that holds just these files. Returns its sha."""
        sha = hashlib.sha1(f"{self.type} {self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits.append((sha, title, files))
        return sha

    @property
    def sha(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        """Path -> contents, in the newest commit."""
        return self.commits[-1][2]

    @property
    def titles(self) -> list[str]:
        return [title for _, title, _ in self.commits]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(sha, files) of a branch, tag or commit; None where there is none of that name."""
        sha = self.sha if revision in ("main", "refs/heads/main") else self.tags.get(revision, revision)
        return next(((s, files) for s, _, files in self.commits if s == sha), None)


@dataclass
class Fault:
    method: str
    path: str  # regular expression, searched in the request's path
    times: int
    status: int
    headers: dict[str, str]
    break_after: int | None
    wrong_bytes: bool
    delay: float
    message: str


class LoopbackHub:
    """The server; its state may be looked at and changed from the test while it runs."""

    def __init__(self, user: str = "ann") -> None:
        self.user = user
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # (method, path with query, headers)
        self.faults: list[Fault] = []
        self.bytes_per_second: float | None = None  # of each download
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def put(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model", **kwargs: object) -> Repo:
        """Create the repository if it is not there, and add the files to it in one commit."""
        with self.lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_id, repo_type, **kwargs))
            for data in files.values():
                self.blobs[hashlib.sha256(data).hexdigest()] = data
            repo.commit("put", {**repo.files, **files})
        return repo

    def fail(
        self,
        path: str,
        status: int = 0,
        times: int = 1,
        method: str = "",
        headers: dict[str, str] | None = None,
        break_after: int | None = None,
        wrong_bytes: bool = False,
        delay: float = 0.0,
        message: str = "made to fail",
    ) -> None:
        """Make the next `times` requests whose path matches the regular expression go wrong.

        status: answer with it (401, 404, 409, 412, 429, 503). break_after: close the connection after so
        many bytes of the body. wrong_bytes: turn one bit of the body round. delay: seconds before answering.
        """
        fault = Fault(method, path, times, status, headers or {}, break_after, wrong_bytes, delay, message)
        with self.lock:
            self.faults.append(fault)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method in ("", method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables that send a script's client here, with settings and caches under `home`."""
        values = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        values |= {"HF_HOME": str(home / "hf_home"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        return values | {"HF_TOKEN": token or ""}

    def patch(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = TOKEN) -> None:
        """Send the client of this process here: it has read the environment already."""
        from huggingface_hub import close_session, constants

        close_session()  # which may have been made for another test's proxy
        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf_home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf_home" / "hub"))

    def downloads(self, name: str) -> list[str]:
        """The Range header of each download of the file's contents, "" where there was none."""
        with self.lock:
            return [h.get("range", "") for m, p, h in self.requests if m == "GET" and p.endswith(f"?{name}")]


class HubError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """One request. The routes are methods below, tried in the order of ROUTES."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        body = self.read_body()
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        with self.hub.lock:
            self.hub.requests.append(
                (self.command, unquote(self.path), {k.lower(): v for k, v in self.headers.items()})
            )
        self.fault = self.hub.take_fault(self.command, path)
        try:
            if self.fault and self.fault.delay:
                time.sleep(self.fault.delay)
            if self.fault and self.fault.status:
                raise HubError(self.fault.status, message=self.fault.message)
            authorization = self.headers.get("Authorization")
            self.known = authorization == f"Bearer {TOKEN}"
            if authorization and not self.known:
                raise HubError(401, message="Invalid username or password.")
            for methods, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    given = {name: value for name, value in match.groupdict().items() if value is not None}
                    return route(self, body, **given)
            raise HubError(404, message=f"no route {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            headers |= self.fault.headers if self.fault else {}
            self.json({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        fault = self.fault
        if fault and fault.wrong_bytes and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if fault and fault.break_after is not None:
                self.wfile.write(data[: fault.break_after])
                self.wfile.flush()
                self.close_connection = True
            elif self.hub.bytes_per_second:
                for begin in range(0, len(data), 2**14):
                    self.wfile.write(data[begin : begin + 2**14])
                    time.sleep(2**14 / self.hub.bytes_per_second)
            else:
                self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    # ------------------------------------------------------------ repositories

    def must_write(self) -> None:
        if not self.known:
            raise HubError(401, message="Invalid username or password.")

    def find(self, kind: str | None, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kind or "model", repo_id))
        if repo is None or (repo.private and not self.known):
            # The real Hub does not tell a stranger whether a private repository is there.
            raise HubError(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return repo

    def find_at(self, kind: str | None, repo_id: str, revision: str) -> tuple[Repo, str, dict[str, bytes]]:
        repo = self.find(kind, repo_id)
        found = repo.at(revision)
        if found is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, *found

    def whoami(self, body: bytes) -> None:
        self.must_write()
        token = {"accessToken": {"displayName": "loopback", "role": "write"}, "type": "access_token"}
        self.json({"type": "user", "id": "1", "name": self.hub.user, "orgs": [], "auth": token})

    def auth_check(self, body: bytes, kind: str, repo_id: str) -> None:
        self.must_write()
        self.find(kind, repo_id)
        if repo_id.split("/")[0] != self.hub.user:
            raise HubError(403, message="Forbidden: you must have write access to the repository content")
        self.json({})

    def create(self, body: bytes) -> None:
        self.must_write()
        wanted = json.loads(body)
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or self.hub.user
        repo_id = f"{owner}/{wanted['name']}"
        if owner != self.hub.user:
            raise HubError(403, message=f"You don't have the rights to create a {kind} under {owner}")
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.endpoint}/{prefix}{repo_id}", "name": repo_id}
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                return self.json({"error": "You already created this repo", **answer}, 409)
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repos[kind, repo_id] = Repo(repo_id, kind, private)
        self.json(answer)

    def info(self, body: bytes, kind: str, repo_id: str, revision: str = "main") -> None:
        repo, sha, files = self.find_at(kind, repo_id, revision)
        siblings = [
            {"rfilename": path, **(_metadata(path, files[path]) if self.query.get("blobs") else {})}
            for path in sorted(files)
        ]
        for sibling in siblings:
            sibling.pop("path", None)
            if "lfs" in sibling:
                sibling["lfs"] = {**sibling["lfs"], "sha256": sibling["lfs"]["oid"]}
            if "oid" in sibling:
                sibling["blobId"] = sibling.pop("oid")
        card = _card_data(files.get("README.md", b""))
        value = {"_id": "1", "id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}
        self.json({**value, "tags": [], "downloads": 0, "likes": 0, "disabled": False, "cardData": card})

    def tree(self, body: bytes, kind: str, repo_id: str, revision: str, folder: str = "") -> None:
        _, _, files = self.find_at(kind, repo_id, revision)
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        inside = sorted(path for path in files if path.startswith(prefix))
        if prefix and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        entries, folders = [], set()
        for path in inside:
            parts = path[len(prefix) :].split("/")
            folders |= {prefix + "/".join(parts[:n]) for n in range(1, len(parts))}
            if len(parts) == 1 or self.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
                entries.append({"type": "file", **_metadata(path, files[path])})
        entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        self.json(sorted(entries, key=lambda entry: entry["path"]))

    def paths_info(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        _, _, files = self.find_at(kind, repo_id, revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        found = [{"type": "file", **_metadata(path, files[path])} for path in paths if path in files]
        for path in paths:
            if path not in files and any(name.startswith(path + "/") for name in files):
                found.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        self.json(found)

    def refs(self, body: bytes, kind: str, repo_id: str) -> None:
        repo = self.find(kind, repo_id)
        ref = lambda name, path, sha: {"name": name, "ref": f"refs/{path}/{name}", "targetCommit": sha}  # noqa: E731
        tags = [ref(name, "tags", sha) for name, sha in repo.tags.items()]
        self.json({"branches": [ref("main", "heads", repo.sha)], "tags": tags, "converts": []})

    def tag(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        self.must_write()
        repo = self.find(kind, repo_id)
        if self.command == "DELETE":
            if repo.tags.pop(revision, None) is None:
                raise HubError(404, "RevisionNotFound", f"no tag {revision}")
            return self.json({})
        _, sha, _ = self.find_at(kind, repo_id, revision)
        name = json.loads(body)["tag"]
        if name in repo.tags:
            raise HubError(409, message=f"Tag reference exists already: {name}")
        repo.tags[name] = sha
        self.json({})

    # ------------------------------------------------------------ uploads

    def validate_yaml(self, body: bytes) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        self.must_write()
        _, sha, files = self.find_at(kind, repo_id, revision)
        answer = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > 10 * 2**20
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in files:
                held = _metadata(path, files[path])
                entry["oid"] = held["lfs"]["oid"] if lfs and "lfs" in held else held["oid"]
            answer.append(entry)
        self.json({"files": answer, "commitOid": sha})

    def lfs_batch(self, body: bytes, repo_id: str, kind: str | None = None) -> None:
        self.must_write()
        self.find(kind, repo_id)
        objects = []
        for wanted in json.loads(body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
                known["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs-verify"}}
            objects.append(known)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, message="the contents do not have the announced hash")
        self.hub.blobs[oid] = body
        self.send(200, b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        if len(self.hub.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, message="no such object")
        self.json({})

    def commit(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        self.must_write()
        header, *operations = [json.loads(line) for line in body.splitlines() if line]
        with self.hub.lock:
            repo, sha, files = self.find_at(kind, repo_id, revision)
            if header["value"].get("parentCommit", sha) != sha:
                raise HubError(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(files)
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        raise HubError(400, message=f"LFS object {value['oid']} was not uploaded")
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif operation["key"] == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                elif operation["key"] == "deletedFolder":
                    inside = [p for p in files if p.startswith(value["path"].rstrip("/") + "/")]
                    if not inside:
                        raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                    files = {p: d for p, d in files.items() if p not in inside}
            sha = repo.commit(header["value"]["summary"], files)
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.hub.endpoint}/{prefix}{repo_id}/commit/{sha}"
        self.json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # ------------------------------------------------------------ downloads

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str, kind: str | None = None) -> None:
        _, sha, files = self.find_at(kind, repo_id, revision)
        commit = {"X-Repo-Commit": sha}
        if path not in files:
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **commit}
            return self.json({"error": "Entry not found"}, 404, error)
        data, metadata = files[path], _metadata(path, files[path])
        if "lfs" not in metadata:
            return self.contents(data, {**commit, "ETag": f'"{metadata["oid"]}"'})
        oid = metadata["lfs"]["oid"]
        self.hub.blobs.setdefault(oid, data)
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"'}
        # Another host name, as on the real Hub: the client sends no token there.
        location = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{oid}?{path}"
        self.send(302, b"", {**commit, **linked, "ETag": f'"{oid}"', "Location": location})

    def cdn(self, body: bytes, oid: str) -> None:
        self.contents(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def contents(self, data: bytes, headers: dict[str, str]) -> None:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(200, data, headers)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if begin >= len(data):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        content_range = {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        self.send(206, data[begin:end], {**headers, **content_range})


REPO = r"(?P<repo_id>[\w.-]+(?:/[\w.-]+)?)"
API = rf"/api/(?P<kind>model|dataset)s/{REPO}"
PREFIX = r"/(?:(?P<kind>dataset)s/)?"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", API + r"/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.tree),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", Handler.commit),
    (("POST", "DELETE"), API + r"/tag/(?P<revision>[^/]+)", Handler.tag),
    ("GET", API + r"/refs", Handler.refs),
    ("GET", API + r"/auth-check/write", Handler.auth_check),
    ("GET", API + r"/revision/(?P<revision>.+)", Handler.info),
    ("GET", API, Handler.info),
    ("POST", PREFIX + REPO + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    ("POST", r"/lfs-verify", Handler.lfs_verify),
    (("GET", "HEAD"), r"/cdn/(?P<oid>[0-9a-f]{64})", Handler.cdn),
    (("GET", "HEAD"), PREFIX + REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


def _metadata(path: str, data: bytes) -> dict[str, object]:
    """Describe a file like the Hub: its git hash, and for an LFS file the sha256 of its contents."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    metadata: dict[str, object] = {"path": path, "size": len(data), "oid": oid}
    if path.endswith(LFS_SUFFIXES):
        digest = hashlib.sha256(data).hexdigest()
        metadata["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return metadata


def _card_data(readme: bytes) -> dict[str, object]:
    """The YAML block at the head of a README.md."""
    import yaml

    match = re.match(rb"---\n(.*?)\n---", readme, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}

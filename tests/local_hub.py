"""A stand-in for the Hugging Face hub on the loopback interface: the requests of a push to model repositories.

It stores commits with the bytes of all files, checks the token, and can fail. Paths, payloads and error headers are the
ones that huggingface_hub 2.4.0 uses with HF_HUB_DISABLE_XET:

    GET    /api/models/ORG/NAME[/revision/REV]         visibility and newest commit
    POST   /api/repos/create                           a new repository
    POST   /api/validate-yaml                          metadata of a model card
    POST   /api/models/ORG/NAME/preupload/main         whether a file is sent in the commit or before it (lfs)
    POST   /ORG/NAME.git/info/lfs/objects/batch        addresses for the uploads of large files
    PUT    /lfs/SHA256, POST /lfs/verify               the upload of a large file, and its check
    POST   /api/models/ORG/NAME/commit/main            a commit: lines of JSON
    GET    /api/models/ORG/NAME/tree/main              the files of the newest commit
    POST, DELETE /api/models/ORG/NAME/tag/REV          tags
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_StandInTokenForTests0123456789"
IGNORED_PATHS = ("/api/agent-harnesses",)
"""Paths that the library reads for its own statistics, at most once a day."""
LFS_SUFFIXES = (".safetensors", ".model")
"""Ends of the names of files that are uploaded before the commit."""


@dataclass
class Commit:
    """A commit: its message, and all files of the repository after it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    """Commit of each tag."""

    def __post_init__(self) -> None:
        self.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    @property
    def files(self) -> dict[str, bytes]:
        """Files of the newest commit."""
        return self.commits[-1].files

    def commit(self, message: str, files: dict[str, bytes]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]


class Failure(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class LocalHub:
    """A server in a thread of this process. Its attributes may be read and changed at any time."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        """Method and path of each request."""
        self.token = TOKEN
        """The only token that is accepted."""
        self.failures: list[int] = []
        """Statuses with which the next requests fail."""
        self.released = threading.Event()
        """While it is not set, requests are not answered."""
        self.released.set()
        self.uploads: dict[str, bytes] = {}
        """Contents of uploaded large files by SHA-256."""
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a command that uses the stand-in."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}

    def close(self) -> None:
        """Stop answering and refuse connections."""
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Any:
        """Return the JSON value that answers a request. Raises Failure."""
        if path in IGNORED_PATHS:
            raise Failure(404, "the stand-in does not have this")
        self.requests.append(f"{method} {path}")
        self.released.wait()
        with self.lock:
            if self.failures:
                raise Failure(self.failures.pop(0), "the request fails on purpose")
            if method == "PUT":  # the address of an upload is a secret, so there is no token
                return self.upload(path, body)
            if headers["Authorization"] != f"Bearer {self.token}":
                raise Failure(401, "Invalid credentials in Authorization header")
            for pattern, action in ROUTES.items():
                if match := re.fullmatch(pattern, f"{method} {path}"):
                    return action(self, *match.groups(), body)
            raise Failure(404, f"the stand-in does not know {method} {path}")

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Failure(404, "Repository not found", "RepoNotFound")
        return self.repositories[name]

    def info(self, name: str, body: bytes) -> Any:
        repository = self.repository(name)
        return {"id": name, "private": repository.private, "sha": repository.commits[-1].oid}

    def create(self, body: bytes) -> Any:
        values = json.loads(body)
        name = f"{values['organization']}/{values['name']}"
        if name in self.repositories:
            raise Failure(409, "You already created this model repo")
        self.repositories[name] = Repository(values.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{name}", "name": name}

    def validate(self, body: bytes) -> Any:
        metadata = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        return (
            {"errors": [], "warnings": []} if isinstance(metadata, dict) else {"errors": [{"message": "no metadata"}]}
        )

    def preupload(self, name: str, body: bytes) -> Any:
        stored = self.repository(name).files
        files = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = object_id(stored[path], mode) if path in stored else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, name: str, body: bytes) -> Any:
        self.repository(name)
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.uploads:
                entry["actions"] = {
                    "upload": {"href": f"{self.endpoint}/lfs/{entry['oid']}"},
                    "verify": {"href": f"{self.endpoint}/lfs/verify"},
                }
        return {"transfer": "basic", "objects": objects}

    def upload(self, path: str, body: bytes) -> Any:
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            raise Failure(400, "the content does not have this SHA-256")
        self.uploads[oid] = body
        return {}

    def verify(self, body: bytes) -> Any:
        values = json.loads(body)
        if len(self.uploads.get(values["oid"], b"")) != values["size"]:
            raise Failure(404, "not uploaded")
        return {}

    def commit(self, name: str, body: bytes) -> Any:
        repository = self.repository(name)
        files, message = dict(repository.files), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.uploads[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case key:
                    raise Failure(400, f"the stand-in does not know {key}")
        commit = repository.commit(message, files)
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{commit.oid}", "commitOid": commit.oid, "success": True}

    def tree(self, name: str, body: bytes) -> Any:
        files = self.repository(name).files
        return [
            {"type": "file", "path": path, "size": len(content), "oid": object_id(content, "regular")}
            for path, content in files.items()
        ]

    def tag(self, name: str, commit: str, body: bytes) -> Any:
        repository, tag = self.repository(name), json.loads(body)["tag"]
        if tag in repository.tags:
            raise Failure(409, f"Tag {tag} exists")
        assert commit in [existing.oid for existing in repository.commits]
        repository.tags[tag] = commit
        return {}

    def delete_tag(self, name: str, tag: str, body: bytes) -> Any:
        del self.repository(name).tags[unquote(tag)]
        return {}


NAME = r"([\w.-]+/[\w.-]+?)"
ROUTES = {
    rf"GET /api/models/{NAME}(?:/revision/main)?": LocalHub.info,
    r"POST /api/repos/create": LocalHub.create,
    r"POST /api/validate-yaml": LocalHub.validate,
    rf"POST /api/models/{NAME}/preupload/main": LocalHub.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": LocalHub.batch,
    r"POST /lfs/verify": LocalHub.verify,
    rf"POST /api/models/{NAME}/commit/main": LocalHub.commit,
    rf"GET /api/models/{NAME}/tree/main": LocalHub.tree,
    rf"POST /api/models/{NAME}/tag/(\w+)": LocalHub.tag,
    rf"DELETE /api/models/{NAME}/tag/([^/]+)": LocalHub.delete_tag,
}


def object_id(content: bytes, mode: str) -> str:
    """Return the id by which the hub recognises an unchanged file: SHA-256 for lfs, git's SHA-1 otherwise."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def respond(self) -> None:
        body = self.read_body()
        try:
            status, value, headers = (
                200,
                self.hub.answer(self.command, self.path.partition("?")[0], self.headers, body),
                {},
            )
        except Failure as failure:
            status, value = failure.status, {"error": failure.message}
            headers = {"X-Error-Message": failure.message} | ({"X-Error-Code": failure.code} if failure.code else {})
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = respond

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

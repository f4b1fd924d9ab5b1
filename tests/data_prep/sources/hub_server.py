"""A server with the part of the hub's API that `datasets` uses, and one data set, `owner/name`."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from http import HTTPStatus

Commits = dict[str, dict[str, bytes]]
"""The files of each commit, by name, without folders."""


class Hub(http.server.ThreadingHTTPServer):
    """HTTP server that holds the commits of the data set and the commit of each branch."""

    def __init__(self, commits: Commits, branches: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits, self.branches = commits, branches

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "datasets", "owner", "name"]:
            self._describe(*parts[4:])
        elif parts[:4] == ["datasets", "owner", "name", "resolve"]:
            self._send_file(parts[4], "/".join(parts[5:]))
        else:
            self._refuse("RepoNotFound")

    do_HEAD = do_GET

    def _commit(self, revision: str) -> str:
        return self.server.branches.get(revision, revision)

    def _describe(self, kind: str = "revision", revision: str = "main", *below: str) -> None:
        commit = self._commit(revision)
        if commit not in self.server.commits:
            return self._refuse("RevisionNotFound")
        names = list(self.server.commits[commit])
        if kind == "tree":
            return self._answer(
                [
                    {"type": "file", "path": name, "size": len(self.server.commits[commit][name]), "oid": "0" * 40}
                    for name in names
                    if name.startswith("/".join(below))
                ]
            )
        self._answer(
            {
                "id": "owner/name",
                "sha": commit,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in names],
            }
        )

    def _send_file(self, revision: str, name: str) -> None:
        commit = self._commit(revision)
        content = self.server.commits.get(commit, {}).get(name)
        if content is None:
            return self._refuse("EntryNotFound")
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end or len(content)) + 1]
        self._answer(
            part,
            HTTPStatus.PARTIAL_CONTENT if "Range" in self.headers else HTTPStatus.OK,
            {
                "ETag": f'"{commit}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
                "Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}",
            },
        )

    def _refuse(self, code: str) -> None:
        self._answer({"error": code}, HTTPStatus.NOT_FOUND, {"X-Error-Code": code})

    def _answer(self, body: object, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (
            {"Content-Length": str(len(content)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serve(commits: Commits, branches: dict[str, str]) -> Iterator[Hub]:
    """Serve the data set until the end of the block."""
    with Hub(commits, branches) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()

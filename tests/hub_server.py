"""A small Hugging Face hub on 127.0.0.1 for the tests: the endpoints our client calls, and ways to fail.

    HEAD, GET  /datasets/REPO/resolve/REVISION/PATH    metadata and bytes; large files answer 302 to the storage host
    POST       /api/datasets/REPO/paths-info/REVISION  size and hash of each path asked for
    GET        /PATH on the storage host               the bytes, with Range, as the hub's CDN serves them

The storage host is a second port, hence a second origin: a token that leaked to it would show in its requests.
"""

import hashlib
import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple
from urllib.parse import parse_qs

COMMIT = "c0ffee" + "0" * 34


class Request(NamedTuple):
    """One request as the server saw it: what the client asked for, and with which credentials."""

    method: str
    path: str
    range: str | None
    token: str | None


class HubServer:
    """What the hub lists (`files`), what it really sends where that differs (`sent_instead`), and how it breaks."""

    def __init__(self, repo: str, files: dict[str, bytes]):
        self.repo, self.files = repo, dict(files)
        self.commit_header = {
            "X-Repo-Commit": COMMIT
        }  # how a client knows a hub from any other web server
        self.sent_instead: dict[str, bytes] = {}
        self.status: dict[str, int] = {}  # path -> answer every request for it with this status
        self.listed_size: dict[str, int] = {}  # path -> a size to claim in paths-info
        self.cut: dict[str, int] = {}  # path -> close the next transfer after so many bytes
        self.status_after_cut = 0  # ... and from then on answer with this status, if any
        self.requests: list[Request] = []
        self.storage_requests: list[Request] = []
        self.bytes_sent: Counter[str] = Counter()  # path -> body bytes, over all requests

    def __enter__(self):
        handlers = [type(base.__name__, (base,), {"hub": self}) for base in (Hub, Storage)]
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in handlers]
        for server in self.servers:
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.endpoint, self.storage = (
            f"http://127.0.0.1:{server.server_port}" for server in self.servers
        )
        return self

    def __exit__(self, *exc):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def describe(self, path: str) -> dict:
        """The paths-info entry: git's hash for small files, an LFS record with sha256 for the rest."""
        data = self.files[path]
        size = self.listed_size.get(path, len(data))
        if is_small(path):
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return {"type": "file", "path": path, "size": size, "oid": oid}
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
        return {"type": "file", "path": path, "size": size, "oid": "0" * 40, "lfs": lfs}


def is_small(path: str) -> bool:
    return path.endswith((".json", ".vocab"))


class Handler(BaseHTTPRequestHandler):
    """What both hosts share: sending a body, or part of it, or a broken one."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Quiet: the tests read `requests` instead."""

    def seen(self) -> Request:
        return Request(
            self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization")
        )

    def answer(self, status: int, headers: dict | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path: str) -> None:
        if status := self.hub.status.get(path):
            return self.answer(status)
        data, start = self.hub.sent_instead.get(path, self.hub.files[path]), 0
        headers = {"ETag": '"tag"'}
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = kept = data[start:]
        if path in self.hub.cut:
            kept, self.hub.status[path] = body[: self.hub.cut.pop(path)], self.hub.status_after_cut
        self.hub.bytes_sent[path] += len(kept)
        self.answer(206 if asked else 200, headers | {"Content-Length": len(body)}, kept)
        self.close_connection = len(kept) < len(
            body
        )  # the client was promised more: a broken transfer


class Hub(Handler):
    def do_GET(self):
        self.hub.requests.append(self.seen())
        path = self.path.removeprefix(f"/datasets/{self.hub.repo}/resolve/").partition("/")[2]
        commit = self.hub.commit_header
        if path not in self.hub.files:
            self.answer(404, commit | {"X-Error-Code": "EntryNotFound"})
        elif not is_small(path):
            self.answer(302, commit | {"Location": f"{self.hub.storage}/{path}?signature=secret"})
        elif self.command == "HEAD" and path not in self.hub.status:
            self.answer(
                200, commit | {"ETag": '"tag"', "Content-Length": len(self.hub.files[path])}
            )
        else:
            self.send_file(path)

    do_HEAD = do_GET

    def do_POST(self):
        self.hub.requests.append(self.seen())
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        listed = [self.hub.describe(path) for path in form["paths"] if path in self.hub.files]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())


class Storage(Handler):
    def do_GET(self):
        self.hub.storage_requests.append(self.seen())
        self.send_file(self.path.removeprefix("/").partition("?")[0])

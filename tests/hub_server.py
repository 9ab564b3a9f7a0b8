"""A small Hugging Face hub on 127.0.0.1 for the tests: the endpoints our client calls, and ways to fail.

    HEAD   /datasets/REPO/resolve/REVISION/ROOT/NAME      metadata
    GET    /datasets/REPO/resolve/REVISION/ROOT/NAME      302 to the storage host
    GET    .../NAME?signature=secret                      the bytes, with Range, as the hub's CDN serves them
    POST   /api/datasets/REPO/paths-info/REVISION         size and hash of each path asked for

The storage host is the same server under another name, hence another origin: a token that leaked to it would show.
"""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs

COMMIT = "c0ffee" + "0" * 34


class Request(NamedTuple):
    """One request as the server saw it. The name is that of the file, beneath the root of the repo."""

    name: str
    url: str
    range: str | None
    token: str | None


class HubServer(ThreadingHTTPServer):
    """A hub with these files, and the ways in which it breaks."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files = files
        # How a client knows a hub from any other web server.
        self.commit_header = {"X-Repo-Commit": COMMIT}
        self.status = {}  # name -> the answer to every request for it
        self.claims = {}  # name -> what to list of it in place of the truth
        self.cut = {}  # name -> break its transfer after so many bytes, then answer 503
        self.requests = []  # to the hub
        self.downloads = []  # to the storage host


def describe(path: str, data: bytes) -> dict:
    """What a hub lists of a file: git's hash if it is small, an LFS record with sha256 otherwise."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
    if path.endswith((".json", ".vocab")):
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entry


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Quiet: the tests read `requests` instead."""

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        headers = {"Content-Length": len(body)} | headers
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def seen(self):
        name = self.path.partition("?")[0].split("/", 7)[-1]
        return Request(
            name, self.path, self.headers.get("Range"), self.headers.get("Authorization")
        )

    def do_HEAD(self):
        request = self.seen()
        self.server.requests.append(request)
        self.answer(self.server.status.get(request.name, 200), self.server.commit_header)

    def do_GET(self):
        request = self.seen()
        if "signature" in self.path:
            self.server.downloads.append(request)
            self.send_file(request)
        else:
            self.server.requests.append(request)
            storage = f"http://localhost:{self.server.server_port}{self.path}?signature=secret"
            self.answer(302, {"Location": storage})

    def send_file(self, request):
        """The file from where the client asks for it on, or a part of that, or an error."""
        hub = self.server
        name = request.name
        if name in hub.status:
            return self.answer(hub.status[name], {})
        data = hub.files[name]
        start = 0
        if request.range:
            start = int(request.range.removeprefix("bytes=").removesuffix("-"))
        body = data[start:]
        headers = {"Content-Length": len(body)}
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if name in hub.cut:
            body = body[: hub.cut.pop(name)]
            hub.status[name] = 503
            self.close_connection = True  # although more was promised: a broken transfer
        self.answer(206 if start else 200, headers, body)

    def do_POST(self):
        hub = self.server
        hub.requests.append(self.seen())
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        listed = []
        for path in form["paths"]:
            name = path.partition("/")[2]
            if name in hub.files:
                entry = describe(path, hub.files[name]) | hub.claims.get(name, {})
                listed.append(entry)
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())

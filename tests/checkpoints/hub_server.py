"""A local stand-in of the Hugging Face Hub's HTTP API: as much of it as an upload and a download go through."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
LARGE = (".safetensors", ".png")  # go through git LFS, as on the Hub


class HubServer:
    """Repositories in memory.

    Attributes:
        files: repository -> file -> content, as committed.
        objects: LFS objects by SHA-256, as uploaded.
        tokens: the Authorization headers that came with a request that writes.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.url = ""

    def create(self, _: str, body: bytes) -> dict:
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        self.files.setdefault(name, {})
        return {"url": f"{self.url}/{name}", "name": name}

    def preupload(self, repository: str, body: bytes) -> dict:
        modes = {f["path"]: "lfs" if f["path"].endswith(LARGE) else "regular" for f in json.loads(body)["files"]}
        return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}

    def lfs_batch(self, repository: str, body: bytes) -> dict:
        objects = json.loads(body)["objects"]
        actions = [{**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} for o in objects]
        return {"transfer": "basic", "objects": actions}

    def commit(self, repository: str, body: bytes) -> dict:
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                self.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.files[repository][value["path"]] = self.objects[value["oid"]]
        return {"commitUrl": f"{self.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "commitMessage": ""}

    def info(self, repository: str) -> dict:
        return {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": f} for f in self.files[repository]]}

    def tree(self, repository: str) -> list:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.files[repository].items()
        ]


REPOSITORY = r"([\w-]+/[\w.-]+)"
POSTS = [
    (r"/api/repos/create()", "create"),
    (rf"/api/models/{REPOSITORY}/preupload/main", "preupload"),
    (rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "lfs_batch"),
    (rf"/api/models/{REPOSITORY}/commit/main", "commit"),
]
GETS = [(rf"/api/models/{REPOSITORY}/tree/\w+", "tree"), (rf"/api/models/{REPOSITORY}(?:/revision/\w+)?", "info")]


class Handler(BaseHTTPRequestHandler):
    """Routes requests to `hub`, which `serve` sets."""

    hub: HubServer

    def answer(self, code: int, content: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def dispatch(self, routes: list[tuple[str, str]], *body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, method in routes:
            match = re.fullmatch(pattern, path)
            if match and (not match[1] or match[1] in self.hub.files):
                content = json.dumps(getattr(self.hub, method)(match[1], *body)).encode()
                return self.answer(200, content, Content_Type="application/json")
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.tokens.add(self.headers["Authorization"])
        if self.path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}', Content_Type="application/json")
        return self.dispatch(POSTS, body)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.objects[digest] = content
        self.answer(200, b"")

    def do_GET(self) -> None:
        match = re.fullmatch(rf"/{REPOSITORY}/resolve/\w+/(.+)", unquote(urlsplit(self.path).path))
        if match is None:
            return self.dispatch(GETS)
        content = self.hub.files.get(match[1], {}).get(match[2])
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing: the tests' output is theirs."""


@contextmanager
def serve() -> Iterator[HubServer]:
    """A stand-in on a free local port."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

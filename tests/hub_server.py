"""A stand-in on loopback for what the hubs' clients ask over HTTP: Hugging Face's and ModelScope's listings and files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")


@dataclass
class Repo:
    """A repository at one commit; `damaged` files are served that many times with a changed byte.

    Of the files in `lengths`, which says how large they are, `files` holds only the start. Where it is `dripping`, a file that was
    asked for in part comes byte by byte and without end; `said` is what it answers in place of a listing.
    """

    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    down: bool = False
    dripping: bool = False
    said: bytes | None = None
    damaged: dict[str, int] = field(default_factory=lambda: dict[str, int]())
    lengths: dict[str, int] = field(default_factory=lambda: dict[str, int]())

    def size(self, name: str) -> int:
        """Return how many bytes a file has."""
        return self.lengths.get(name, len(self.files[name]))

    def part(self, name: str, start: int, end: int) -> bytes:
        """Return a file's bytes from `start` up to `end`; where only its start is held, others that no two places share follow."""
        held = self.files[name][start:end]
        missing = range(start + len(held), min(end, self.size(name)))
        return held + b"".join(place.to_bytes(8, "little") for place in missing[::8])[: len(missing)]

    def listing(self) -> list[dict[str, Any]]:
        """Return the files as Hugging Face lists them."""
        return [
            {"rfilename": name, "size": self.size(name), "blobId": git_digest(data)}
            | ({"lfs": {"sha256": sha256(data), "size": self.size(name), "pointerSize": 134}} if name.endswith(LARGE) else {})
            for name, data in self.files.items()
        ]


@dataclass
class HubServer:
    """The running stand-in; `repos` by kind and id, `served` has each file that was sent, with its range."""

    endpoint: str
    repos: dict[tuple[str, str], Repo]
    served: list[tuple[str, str]]

    def names(self) -> list[str]:
        """Return the names of the files whose content was sent whole."""
        return [name for name, part in self.served if not part]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub_server() -> Generator[HubServer]:
    """Serve on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    state = HubServer(endpoint=f"http://127.0.0.1:{server.server_port}", repos={}, served=[])
    server.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def state(self) -> HubServer:
        return self.server.state  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        del format, args

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], {name: values[0] for name, values in parse_qs(url.query).items()})
        elif parts[0] == "api" and len(parts) != 6:
            self._refuse(404, "NotServedHere")
        elif parts[0] == "api":
            self._info(parts[1].removesuffix("s"), "/".join(parts[2:4]), parts[5])
        else:
            kind = "dataset" if parts[0] == "datasets" else "model"
            parts = parts[1:] if kind == "dataset" else parts
            self._resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _info(self, kind: str, name: str, revision: str) -> None:
        repo = self.state.repos.get((kind, name))
        if repo is None:
            self._refuse(404, "RepoNotFound")
        elif repo.down:
            self._refuse(503, "Overloaded")
        elif revision not in (*repo.revisions, repo.commit):
            self._refuse(404, "RevisionNotFound")
        elif repo.said is not None:
            self._send(200, repo.said, {"Content-Type": "application/json"})
        else:
            self._json({"id": name, "sha": repo.commit, "siblings": repo.listing(), "tags": [], "private": False})

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        repo = self.state.repos.get((kind, name))
        if repo is None:
            self._refuse(404, "RepoNotFound")
        elif repo.gated:
            self._refuse(403, "GatedRepo")
        elif revision != repo.commit:
            self._refuse(404, "RevisionNotFound")
        elif file not in repo.files:
            self._refuse(404, "EntryNotFound")
        else:
            data = repo.files[file]
            etag = sha256(data) if file.endswith(LARGE) else git_digest(data)
            self._file(repo, file, {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit})

    def _modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        repo = self.state.repos.get(("modelscope", "/".join(parts[1:3])))
        if repo is None or query.get("Revision", "master") not in repo.revisions:
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, status=404)
        elif repo.said is not None:
            self._send(200, repo.said, {"Content-Type": "application/json"})
        elif parts[3:] == ["repo", "files"]:
            rows = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": sha256(data)}
                for name, data in repo.files.items()
            ]
            self._json({"Code": 200, "Data": {"Files": rows}, "Success": True})
        else:
            self._file(repo, query["FilePath"], {})

    def _file(self, repo: Repo, name: str, headers: dict[str, str]) -> None:
        data, status = repo.files[name], 200
        part = self.headers.get("Range", "")
        if part:
            first, _, last = part.removeprefix("bytes=").partition("-")
            data, status = repo.part(name, int(first), int(last) + 1 if last else repo.size(name)), 206
            headers |= {"Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{repo.size(name)}"}
        if part and repo.dripping:
            self._drip()
            return
        if self.command == "GET":
            self.state.served.append((name, part))
            if repo.damaged.get(name, 0) > 0:
                repo.damaged[name] -= 1
                data = data[:-1] + bytes([data[-1] ^ 255])
        self._send(status, data, {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers})

    def _drip(self) -> None:
        self.send_response(206)
        self.send_header("Content-Length", str(1 << 30))
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):
            while True:  # until the client goes
                self.wfile.write(b"\0")
                threading.Event().wait(0.01)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

"""One exchange with a server: within a deadline, however its bytes trickle in, and within limits on what it sends.

httpx waits anew for each portion of bytes, and unpacks a portion whole: a server that sends a byte now and then would be waited for
without end, and one whose answer is packed a thousandfold would fill the memory. Here time and bytes are counted where they arrive,
below the protocol, so that its heads, trailers and the heads of its chunks count too.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import ssl
import threading
import time
import urllib.request
import weakref
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, cast

import httpcore
import httpx

from compress.errors import MissingError
from compress.limits import limits

CONNECT_SECONDS = 10.0
"""A machine that is there takes a connection in well under a second, wherever it is."""

_LARGE = 4_000_000
"""Bytes from which on only one answer is taken in at a time, so that many connections need no memory for as many large ones."""
_PACKED = {"gzip", "x-gzip", "deflate"}
_KEPT_SECONDS = 5.0
"""How long a connection that nobody uses is kept, as in httpx."""
_ALIKE = (
    httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError, httpcore.UnsupportedProtocol
)  # fmt: skip
_turn = threading.Lock()


class AnswerError(Exception):
    """An answer that is not taken, however often it comes: it is too large, or packed in a way that cannot be counted."""


@dataclass
class _Allowance:
    """Until when an exchange may go on, by `time.monotonic`, and how many bytes may still come."""

    until: float
    left: int

    @property
    def seconds(self) -> float:
        return self.until - time.monotonic()


_allowed: ContextVar[_Allowance | None] = ContextVar("allowed", default=None)


@dataclass(frozen=True)
class Response:
    """What came back: status, headers, and the body unpacked."""

    status: int
    headers: httpx.Headers
    content: bytes

    @property
    def text(self) -> str:
        """The body as text; what is no UTF-8 is replaced."""
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """Return the body's JSON; `read` it while the exchange is open.

        Raises:
            AnswerError: it holds too many values.
            ValueError, RecursionError: it is no JSON, or nests too deep.
        """
        values = sum(self.content.count(mark) for mark in (b",", b"[", b"{"))
        if values > limits().answer_values:
            raise AnswerError(f"its answer holds about {values:,} values ({limits().set_by('answer_values')})")
        return json.loads(self.content)


@contextmanager
def exchange(client: httpx.Client, method: str, path: str, seconds: float, content: bytes | None = None) -> Generator[Response]:
    """Send a request and give the whole answer; all of it, from connecting to the last byte, may take so many seconds.

    No redirect is followed. A large answer keeps others from being read until the context is left: read and drop it in there.

    Raises:
        AnswerError: more comes than the limits allow.
        httpx.HTTPError: there is no answer, none in time, or none in HTTP.
    """
    most = limits().answer_bytes
    headers = {"Content-Type": "application/json"} if content is not None else {}
    allowance = _Allowance(time.monotonic() + seconds, most + limits().head_bytes)
    with ExitStack() as held:
        mark = _allowed.set(allowance)
        try:
            with client.stream(method, path, content=content, headers=headers) as response:
                body = bytearray()
                for part in _unpacked(_in_time(response.iter_raw(), allowance), response.headers, most):
                    if len(body) <= _LARGE < len(body) + len(part):
                        _take_turn(held, allowance)
                    body += part
                    if len(body) > most:
                        raise AnswerError(_too_large(most))
                answer = Response(response.status_code, response.headers, bytes(body))
        finally:
            _allowed.reset(mark)
        yield answer


def models_of(content: object) -> list[dict[str, Any]]:
    """Return the rows of a server's list of models, each with its `id`.

    Raises:
        ValueError: it is no such list.
    """
    found = cast("dict[str, Any]", content).get("data") if isinstance(content, dict) else None
    rows = cast("list[Any]", found) if isinstance(found, list) else [None]
    if not all(isinstance(row, dict) and isinstance(cast("dict[str, Any]", row).get("id"), str) for row in rows):
        raise ValueError("it holds no list of models")
    return cast("list[dict[str, Any]]", rows)


def open_http(url: str, headers: dict[str, str], connections: int, *, trust_env: bool) -> httpx.Client:
    """Return a client whose exchanges keep their deadline; without `trust_env` no proxy of the environment stands between.

    It keeps no cookies.

    Raises:
        MissingError: the proxy is of a kind that needs another package.
    """
    proxy = _proxy(url) if trust_env else None
    context = httpx.create_ssl_context(trust_env=trust_env)
    pool: dict[str, Any] = {
        "ssl_context": context,
        "max_connections": connections,
        "max_keepalive_connections": connections,
        "keepalive_expiry": _KEPT_SECONDS,
        "network_backend": (network := _Network()),
    }
    connected = httpcore.ConnectionPool(**pool) if proxy is None else _proxied(proxy, pool)
    return httpx.Client(
        base_url=url,
        headers={"Accept-Encoding": "gzip, deflate", **headers},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        transport=_Transport(connected, network),
        trust_env=False,
        timeout=httpx.Timeout(None),
    )


def _proxy(url: str) -> httpx.Proxy | None:
    """Return the proxy that the environment names for a URL."""
    parts = httpx.URL(url)
    if urllib.request.proxy_bypass(parts.host):
        return None
    proxies = urllib.request.getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all")
    return None if not named else httpx.Proxy(named if "://" in named else f"http://{named}")


def _proxied(proxy: httpx.Proxy, pool: dict[str, Any]) -> httpcore.ConnectionPool:
    url = httpcore.URL(scheme=proxy.url.raw_scheme, host=proxy.url.raw_host, port=proxy.url.port, target=proxy.url.raw_path)
    if proxy.url.scheme.startswith("socks"):
        if importlib.util.find_spec("socksio") is None:
            raise MissingError(f"the proxy {proxy.url.host} speaks SOCKS; run pip install socksio, or name it in NO_PROXY")
        return httpcore.SOCKSProxy(url, proxy_auth=proxy.raw_auth, **pool)
    return httpcore.HTTPProxy(url, proxy_auth=proxy.raw_auth, proxy_headers=proxy.headers.raw, **pool)


def _take_turn(held: ExitStack, allowance: _Allowance) -> None:
    if not _turn.acquire(timeout=max(0.0, allowance.seconds)):
        raise httpx.ReadTimeout("another large answer was being read")
    held.callback(_turn.release)


def _in_time(parts: Iterator[bytes], allowance: _Allowance) -> Iterator[bytes]:
    for part in parts:
        yield part
        if allowance.seconds < 0:
            raise httpx.ReadTimeout("the answer did not end")


def _unpacked(parts: Iterable[bytes], headers: httpx.Headers, most: int) -> Iterator[bytes]:
    """Give the body as it is before it is packed for the way, never much more than `most` bytes of it at once."""
    packed = headers.get("Content-Encoding", "identity").strip().lower()
    if packed in ("identity", ""):
        yield from parts
        return
    if packed not in _PACKED:
        raise AnswerError(f"its answer is packed as {packed[:40]}, which was not asked for; have it sent plainly")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    for part in parts:
        rest = part
        while rest:
            try:
                yield unpacker.decompress(rest, min(most + 1, _LARGE))
            except zlib.error as error:
                raise httpx.DecodingError(f"its answer cannot be unpacked ({error})") from error
            rest = unpacker.unconsumed_tail


def _too_large(most: int) -> str:
    return f"its answer has more than {most:,} bytes ({limits().set_by('answer_bytes')})"


class _Stream(httpcore.NetworkStream):
    """A connection whose time and bytes count against the exchange that is under way in this thread."""

    def __init__(self, stream: httpcore.NetworkStream, network: _Network) -> None:
        self._stream = stream
        self._network = network
        network.add(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        content = self._stream.read(max_bytes, _within(timeout, httpcore.ReadTimeout))
        allowance = _allowed.get()
        if allowance is not None:
            allowance.left -= len(content)
            if allowance.left < 0:
                raise AnswerError(_too_large(limits().answer_bytes))
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _within(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, _within(timeout, httpcore.ConnectTimeout))
        return _Stream(secured, self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
    """Connects as httpcore does, to streams that count; closed, it ends them in whatever thread they are waited for."""

    def __init__(self) -> None:
        self._backend = httpcore.SyncBackend()
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._changing = threading.Lock()
        self._closed = False

    def add(self, stream: _Stream) -> None:
        """Take in a new stream.

        Raises:
            httpcore.ConnectError: the client was closed meanwhile.
        """
        with self._changing:
            self._streams.add(stream)
            closed = self._closed
        if closed:
            stream.close()
            raise httpcore.ConnectError("the client was closed")

    def close(self) -> None:
        """End every stream, also those that a thread is reading from, and those that come to be after this."""
        with self._changing:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            with suppress(OSError):  # it has ended already
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            stream.close()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        seconds = min(_within(timeout, httpcore.ConnectTimeout), CONNECT_SECONDS)
        return _Stream(self._backend.connect_tcp(host, port, seconds, local_address, socket_options), self)


def _within(timeout: float | None, late: type[Exception]) -> float:
    """Return how long to wait at most: what is asked for, and what is left of the exchange.

    Raises:
        Exception: of the type given: nothing is left.
    """
    allowance = _allowed.get()
    seconds = CONNECT_SECONDS if allowance is None else allowance.seconds
    if seconds <= 0:
        raise late("the answer did not end")
    return seconds if timeout is None else min(seconds, timeout)


class _Transport(httpx.BaseTransport):
    """httpx's own transport, on a pool of connections that is given: httpx has no place to give it one."""

    def __init__(self, pool: httpcore.ConnectionPool, network: _Network) -> None:
        self._pool = pool
        self._network = network

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        asked = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=request.url.raw_scheme, host=request.url.raw_host, port=request.url.port, target=request.url.raw_path
            ),
            headers=request.headers.raw,
            content=cast("httpx.SyncByteStream", request.stream),
            extensions=request.extensions,
        )
        with _as_httpx():
            response = self._pool.handle_request(asked)
        body = cast("Iterable[bytes]", response.stream)
        return httpx.Response(response.status, headers=response.headers, stream=_Body(body))

    def close(self) -> None:
        self._network.close()
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx():
            yield from self._parts

    def close(self) -> None:
        cast("Any", self._parts).close()


@contextmanager
def _as_httpx() -> Generator[None]:
    """Turn httpcore's errors into httpx's, which have the same names."""
    try:
        yield
    except _ALIKE as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error

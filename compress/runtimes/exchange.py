"""One HTTP exchange with a server, within a deadline for the whole response and a limit on its bytes.

httpx's read timeout starts anew with each chunk, and it decompresses a chunk at once: a server that sends a byte now and then would
be waited for forever, and a decompression bomb would fill the memory. Here time and bytes are counted at the network stream, below
the protocol, so that headers, trailers and chunk headers count too.
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
from compress.untrusted.limits import limits

CONNECT_SECONDS = 10.0
"""The connect timeout: a reachable machine accepts a connection in well under a second, anywhere."""

_LARGE_BYTES = 4_000_000
"""From this size on responses are read one at a time, so that many connections do not hold as many large bodies in memory."""

# What zlib alone can unpack in steps of a bounded size; brotli and zstd would need other libraries.
_COMPRESSIONS = {"gzip", "x-gzip", "deflate"}
_KEEPALIVE_SECONDS = 5.0
"""How long an idle connection is kept open: httpx's default."""

_MAPPED_ERRORS = (
    httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError, httpcore.UnsupportedProtocol
)  # fmt: skip
# One for the process: the memory that it bounds is the process's.
_large_lock = threading.Lock()


class AnswerError(Exception):
    """A response that no retry can make acceptable: it is too large, or in an unknown compression."""


@dataclass
class _Allowance:
    """What is left of an exchange's deadline and byte limit."""

    deadline: float
    """In seconds of `time.monotonic`."""

    bytes_left: int

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


_current_allowance: ContextVar[_Allowance | None] = ContextVar("allowed", default=None)


@dataclass(frozen=True)
class Response:
    """A response with its decompressed body."""

    status: int
    headers: httpx.Headers
    content: bytes

    @property
    def text(self) -> str:
        """The body as text; invalid UTF-8 is replaced."""
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """Return the body's JSON; call it while the exchange is open.

        Raises:
            AnswerError: it has too many values.
            ValueError, RecursionError: it is no JSON, or nests too deep.
        """
        # An upper bound of the values in one pass over the bytes: parsed, a list of empty lists takes many times its bytes.
        values = sum(self.content.count(mark) for mark in (b",", b"[", b"{"))
        if values > limits().answer_values:
            raise AnswerError(f"its answer holds about {values:,} values ({limits().set_by('answer_values')})")
        return json.loads(self.content)


@contextmanager
def exchange(client: httpx.Client, method: str, path: str, seconds: float, content: bytes | None = None) -> Generator[Response]:
    """Send a request and yield the whole response; `seconds` is the deadline from connecting to the last byte.

    No redirect is followed. A large response blocks other large ones until the context ends: parse and drop it inside.

    Raises:
        AnswerError: the response exceeds the limits.
        httpx.HTTPError: there is no response, it is late, or it is no HTTP.
    """
    limit = limits().answer_bytes
    headers = {"Content-Type": "application/json"} if content is not None else {}
    # Monotonic: a clock that is set must not end a request, or keep it waiting.
    allowance = _Allowance(time.monotonic() + seconds, limit + limits().head_bytes)
    with ExitStack() as stack:
        token = _current_allowance.set(allowance)
        try:
            with client.stream(method, path, content=content, headers=headers) as response:
                body = bytearray()
                # `iter_raw`: httpx's own decoders unpack a chunk as a whole, and 32 KB of gzip may become 33 MB.
                for chunk in _decompressed(_until_deadline(response.iter_raw(), allowance), response.headers, limit):
                    # Taken in the middle of a body, as Content-Length is the server's word and may be missing.
                    if len(body) <= _LARGE_BYTES < len(body) + len(chunk):
                        _lock_large(stack, allowance)
                    body += chunk
                    if len(body) > limit:
                        raise AnswerError(_too_large(limit))
                answer = Response(response.status_code, response.headers, bytes(body))
        finally:
            # Before the caller parses: the deadline is the network's alone.
            _current_allowance.reset(token)
        yield answer


def models_of(content: object) -> list[dict[str, Any]]:
    """Return the rows of a response from `/v1/models`, each with its `id`.

    Raises:
        ValueError: it is no list of models.
    """
    data = cast("dict[str, Any]", content).get("data") if isinstance(content, dict) else None
    rows = cast("list[Any]", data) if isinstance(data, list) else [None]
    if not all(isinstance(row, dict) and isinstance(cast("dict[str, Any]", row).get("id"), str) for row in rows):
        raise ValueError("it holds no list of models")
    return cast("list[dict[str, Any]]", rows)


def open_http(url: str, headers: dict[str, str], connections: int, *, trust_env: bool) -> httpx.Client:
    """Return a client for `exchange`, without cookies; without `trust_env` the environment's proxies are not used.

    Raises:
        MissingError: a SOCKS proxy, which needs another package.
    """
    proxy = _proxy(url) if trust_env else None
    context = httpx.create_ssl_context(trust_env=trust_env)
    pool: dict[str, Any] = {
        "ssl_context": context,
        "max_connections": connections,
        # httpx keeps 20 by default: with more threads than that, requests would open connections again and again.
        "max_keepalive_connections": connections,
        "keepalive_expiry": _KEEPALIVE_SECONDS,
        "network_backend": (network := _Network()),
    }
    connected = httpcore.ConnectionPool(**pool) if proxy is None else _proxy_pool(proxy, pool)
    return httpx.Client(
        base_url=url,
        headers={"Accept-Encoding": "gzip, deflate", **headers},
        # Requests must not depend on those before them, and a cookie would let a server answer by what it was asked.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        transport=_Transport(connected, network),
        # What is wanted of the environment, proxy and certificates, is in the pool already.
        trust_env=False,
        # The network backend below keeps the deadline.
        timeout=httpx.Timeout(None),
    )


def _proxy(url: str) -> httpx.Proxy | None:
    """Return the environment's proxy for a URL."""
    parsed = httpx.URL(url)
    # The standard library's reading of NO_PROXY and of system settings, rather than a second one.
    if urllib.request.proxy_bypass(parsed.host):
        return None
    proxies = urllib.request.getproxies()
    address = proxies.get(parsed.scheme) or proxies.get("all")
    return None if not address else httpx.Proxy(address if "://" in address else f"http://{address}")


def _proxy_pool(proxy: httpx.Proxy, pool: dict[str, Any]) -> httpcore.ConnectionPool:
    url = httpcore.URL(scheme=proxy.url.raw_scheme, host=proxy.url.raw_host, port=proxy.url.port, target=proxy.url.raw_path)
    if proxy.url.scheme.startswith("socks"):
        if importlib.util.find_spec("socksio") is None:
            raise MissingError(f"the proxy {proxy.url.host} speaks SOCKS; run pip install socksio, or name it in NO_PROXY")
        return httpcore.SOCKSProxy(url, proxy_auth=proxy.raw_auth, **pool)
    return httpcore.HTTPProxy(url, proxy_auth=proxy.raw_auth, proxy_headers=proxy.headers.raw, **pool)


def _lock_large(stack: ExitStack, allowance: _Allowance) -> None:
    if not _large_lock.acquire(timeout=max(0.0, allowance.seconds_left)):
        raise httpx.ReadTimeout("another large answer was being read")
    stack.callback(_large_lock.release)


def _until_deadline(chunks: Iterator[bytes], allowance: _Allowance) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        if allowance.seconds_left < 0:
            raise httpx.ReadTimeout("the answer did not end")


def _decompressed(chunks: Iterable[bytes], headers: httpx.Headers, limit: int) -> Iterator[bytes]:
    """Yield the decompressed body, hardly more than `limit` bytes of it at once."""
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        yield from chunks
        return
    if encoding not in _COMPRESSIONS:
        raise AnswerError(f"its answer is packed as {encoding[:40]}, which was not asked for; have it sent plainly")
    # | 32 tells gzip from zlib by their headers, whichever the server named.
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    for chunk in chunks:
        rest = chunk
        while rest:
            try:
                # One byte past the limit is enough to see that it is exceeded.
                yield decompressor.decompress(rest, min(limit + 1, _LARGE_BYTES))
            except zlib.error as error:
                raise httpx.DecodingError(f"its answer cannot be unpacked ({error})") from error
            rest = decompressor.unconsumed_tail


def _too_large(limit: int) -> str:
    return f"its answer has more than {limit:,} bytes ({limits().set_by('answer_bytes')})"


class _Stream(httpcore.NetworkStream):
    """A connection whose time and bytes count against the allowance of this thread's exchange."""

    def __init__(self, stream: httpcore.NetworkStream, network: _Network) -> None:
        self._stream = stream
        self._network = network
        network.add(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        content = self._stream.read(max_bytes, _within(timeout, httpcore.ReadTimeout))
        allowance = _current_allowance.get()
        if allowance is not None:
            # Below the protocol: endless headers or chunk extensions count too, which never reach the body.
            allowance.bytes_left -= len(content)
            if allowance.bytes_left < 0:
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
        # The TLS stream must count as well: it replaces this one.
        return _Stream(secured, self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
    """Opens counting streams; `close` ends them all, even while other threads wait for them."""

    def __init__(self) -> None:
        self._backend = httpcore.SyncBackend()
        # Weak: httpcore owns the streams, and closed ones must not pile up over a long evaluation.
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._changing = threading.Lock()
        self._closed = False

    def add(self, stream: _Stream) -> None:
        """Register a new stream.

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
        """End every stream: open ones, those that a thread is reading from, and those opened later."""
        with self._changing:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            with suppress(OSError):  # it is closed already
                # `close` alone does not wake a thread that is blocked in `recv` on the same socket; `shutdown` does.
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
    """Return the timeout of one operation: `timeout`, at most what is left of the exchange's deadline.

    Raises:
        Exception: of type `late`: the deadline is over.
    """
    allowance = _current_allowance.get()
    seconds = CONNECT_SECONDS if allowance is None else allowance.seconds_left
    if seconds <= 0:
        raise late("the answer did not end")
    return seconds if timeout is None else min(seconds, timeout)


class _Transport(httpx.BaseTransport):
    """httpx's transport on a given connection pool: `httpx.HTTPTransport` creates its own and accepts none."""

    def __init__(self, pool: httpcore.ConnectionPool, network: _Network) -> None:
        self._pool = pool
        self._network = network

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        core_request = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=request.url.raw_scheme, host=request.url.raw_host, port=request.url.port, target=request.url.raw_path
            ),
            headers=request.headers.raw,
            content=cast("httpx.SyncByteStream", request.stream),
            extensions=request.extensions,
        )
        with _as_httpx():
            response = self._pool.handle_request(core_request)
        body = cast("Iterable[bytes]", response.stream)
        return httpx.Response(response.status, headers=response.headers, stream=_Body(body))

    def close(self) -> None:
        self._network.close()
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx():
            yield from self._chunks

    def close(self) -> None:
        cast("Any", self._chunks).close()


@contextmanager
def _as_httpx() -> Generator[None]:
    """Raise httpcore's errors as httpx's, which have the same names."""
    try:
        yield
    except _MAPPED_ERRORS as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error

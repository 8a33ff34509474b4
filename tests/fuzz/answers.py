"""Ways in which a server may spoil a sound answer: on its way, as HTTP, and in itself, as JSON."""

from __future__ import annotations

import base64
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any, cast
from urllib.parse import quote

from tests.raw_server import Asked, drip, http

Reply = Callable[[Asked, bytes], Iterable[bytes]]
_LARGE = 1 << 16


@dataclass(frozen=True)
class Way:
    """How a sound body is sent instead; `sound` where the right result is due all the same, if a client takes `packed` answers."""

    name: str
    reply: Reply
    sound: bool = False
    packed: bool = False


def _head(*lines: str | bytes, status: str | bytes = "HTTP/1.1 200 OK") -> bytes:
    rows = (line if isinstance(line, bytes) else line.encode("latin-1", "replace") for line in (status, *lines))
    return b"\r\n".join(rows) + b"\r\n\r\n"


def _raw(name: str, *parts: bytes, sound: bool = False) -> Way:
    return Way(name, lambda asked, body: parts, sound)


def _with(name: str, *lines: str | bytes, sound: bool = False) -> Way:
    """Send the body whole with other lines in its head."""
    return Way(name, lambda asked, body: [_head(*lines, "Connection: close") + body], sound)


def _status(name: str, status: str | bytes) -> Way:
    return Way(name, lambda asked, body: [_head(f"Content-Length: {len(body)}", status=status) + body])


def _length(length: str | bytes) -> Way:
    return _with(f"length {length!r}", b"Content-Length: " + (length if isinstance(length, bytes) else length.encode()))


def _packed(name: str, pack: Callable[[bytes], bytes], coding: str = "gzip", *, sound: bool = False) -> Way:
    def reply(asked: Asked, body: bytes) -> Iterable[bytes]:
        del asked
        content = pack(body)
        return [_head(f"Content-Length: {len(content)}", f"Content-Encoding: {coding}", "Connection: close") + content]

    return Way(name, reply, sound, packed=True)


@cache
def _bomb(layers: int) -> bytes:
    """Return 300 MB of zeros packed, and packed again."""
    packer = zlib.compressobj(9, wbits=31)
    content = b"".join(packer.compress(bytes(1_000_000)) for _ in range(300)) + packer.flush()
    for _ in range(layers - 1):
        content = gzip.compress(content)
    return content


def _chunks(body: bytes, size: int = 16) -> bytes:
    parts = (body[place : place + size] for place in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def _chunked(name: str, make: Callable[[bytes], Iterable[bytes]], *, sound: bool = False) -> Way:
    def reply(asked: Asked, body: bytes) -> Iterable[bytes]:
        del asked
        yield _head("Transfer-Encoding: chunked", "Content-Type: application/json", "Connection: close")
        yield from make(body)

    return Way(name, reply, sound)


def _slow(name: str, first: bytes, then: bytes) -> Way:
    return Way(name, lambda asked, body: drip(asked, first, then))


def _mute(asked: Asked, body: bytes) -> Iterable[bytes]:
    del body
    asked.ended.wait(60)
    return []


def _endless(name: str, first: bytes, then: bytes) -> Way:
    def reply(asked: Asked, body: bytes) -> Iterable[bytes]:
        del asked, body
        yield first
        yield from repeat(then)

    return Way(name, reply)


def framing_ways(chance: random.Random, key: str, elsewhere: str) -> list[Way]:
    """Return ways to send a body otherwise, one kind of them; `elsewhere` is where redirects lead."""
    match chance.randrange(12):
        case 0 | 1:
            return _redirects(elsewhere, key)
        case 2:
            return _statuses(chance, key)
        case _:
            return chance.choice((_lines, _lengths, _chunkings, _packings, _heads, _slowness, _interim))(chance)


def _lines(chance: random.Random) -> list[Way]:
    noise = bytes(chance.randrange(256) for _ in range(200))
    rows = [
        *("HTTP/9.9 200 OK", "200", "HTTP/1.1 2000 OK", "HTTP/1.1 -1", "ICY 200 OK", "HTTP/1.1", "HTTP/1.1 999 ?", "http/1.1 200"),
        *(b"HTTP/1.1 200 \x1b[2J\x07", b"\x16\x03\x01\x02\x00", b"HTTP/1.1 \xd9\xa2\xd9\xa0\xd9\xa0 OK", b"HTTP/1.1  200  OK"),
    ]
    return [_status(f"status line {row!r}", row) for row in rows] + [
        _raw("noise", noise),
        _raw("HTTP/2", b"PRI * HTTP/2.0\r\n\r\n"),
    ]


def _lengths(chance: random.Random) -> list[Way]:
    digits = "9" * chance.choice((12, 19, 25, 5000))
    ways = [_length(value) for value in (digits, "-1", "1e3", "+5", "0x10", "5, 6", "", " ", "0", "3", b"\xd9\xa3", "1_0", "nan")]
    return [
        *ways,
        _with("two lengths", "Content-Length: 5", "Content-Length: 7"),
        _with("length and chunks", "Content-Length: 5", "Transfer-Encoding: chunked"),
        _with("no length", "Content-Type: application/json", sound=True),
        Way(
            "a length as it is", lambda asked, body: [_head(f"Content-Length: {len(body)}", "Connection: close"), body], sound=True
        ),
        Way("too long a length", lambda asked, body: [_head(f"Content-Length: {len(body) + 9}", "Connection: close") + body]),
        Way(
            "more than its length", lambda asked, body: [_head(f"Content-Length: {len(body)}") + body + http(b"[]") * 3], sound=True
        ),
    ]


def _chunkings(chance: random.Random) -> list[Way]:
    sizes = (b"-1", b"0x5", b"F" * 16, b"F" * 5000, b"zz", b"", b" 5", b"5 5", b"1_0", b"+5", b"\xd9\xa5", b"7fffffff")
    wrong = [
        _chunked(f"chunk size {size[:20]!r}", lambda body, size=size: [size + b"\r\n" + body + b"\r\n0\r\n\r\n"]) for size in sizes
    ]
    spare = chance.choice((1, 7, 1000))
    return [
        *wrong,
        _chunked("chunks", lambda body: [_chunks(body, spare), b"0\r\n\r\n"], sound=True),
        _chunked("chunks with extensions", lambda body: [_chunks(body).replace(b"\r\n", b";a=b\r\n", 1), b"0\r\n\r\n"], sound=True),
        _chunked("no last chunk", lambda body: [_chunks(body)]),
        _chunked("no end of a chunk", lambda body: [_chunks(body).replace(b"\r\n", b"", 2)]),
        _chunked("trailers", lambda body: [_chunks(body), b"0\r\n", *repeat(b"X-More: " + b"y" * _LARGE + b"\r\n", 100)]),
        _chunked("endless size", lambda body: repeat(b"0" * _LARGE, 2000)),
        _chunked("endless chunks", lambda body: repeat(_chunks(b" " * _LARGE, _LARGE), 2000)),
        _chunked("tiny chunks without end", lambda body: repeat(_chunks(b" " * 8000, 1), 4000)),
        _with("unknown coding", "Transfer-Encoding: rot13"),
        _with("two codings", "Transfer-Encoding: gzip, chunked"),
    ]


def _packings(chance: random.Random) -> list[Way]:
    cut = chance.choice((0, 5, 15))
    return [
        _packed("gzip", gzip.compress, sound=True),
        _packed("gzip in capitals", gzip.compress, " GZIP ", sound=True),
        _packed("deflate", zlib.compress, "deflate", sound=True),
        _packed("a bomb", lambda body: _bomb(1)),
        _packed("a bomb in a bomb", lambda body: _bomb(2)),
        _packed("a bomb, said twice", lambda body: _bomb(2), "gzip, gzip"),
        _packed("gzip cut off", lambda body: gzip.compress(body)[:cut]),
        _packed("no gzip", lambda body: body),
        _packed("brotli", lambda body: body, "br"),
        _packed("an unknown packing", lambda body: body, "x" * 5000),
        _packed("gzip and noise", lambda body: gzip.compress(body) + b"\xff" * 1000),
    ]


def _heads(chance: random.Random) -> list[Way]:
    many = chance.choice((50, 500, 5000))
    return [
        _with("many headers", *(f"X-{number}: y" for number in range(many))),
        _with("one large header", "X-Large: " + "y" * 1_000_000),
        _with("no colon", "what is this"),
        _with("control characters", b"X-Name: a\x00b\x1b[2J"),
        _with("a folded header", "X-Name: a\r\n b"),
        _with("a strange name", "X Name\t: a"),
        _with("cookies", *(f"Set-Cookie: c{number}=x; Domain=.com" for number in range(20)), sound=True),
        _with("another content type", "Content-Type: text/html; charset=utf-7", sound=True),
        _with("another charset", "Content-Type: application/json; charset=\x1b[2J"),
        _endless("endless headers", b"HTTP/1.1 200 OK\r\n", b"X-More: y\r\n" * 1000),
        _endless("an endless header", b"HTTP/1.1 200 OK\r\nX-More: ", b"y" * _LARGE),
        _endless("endless status line", b"HTTP/1.1 200 ", b"y" * _LARGE),
        _endless("endless body", _head("Content-Type: application/json"), b" " * _LARGE),
        _endless("endless lines", b"", b"\r\n" * 1000),
    ]


def _slowness(chance: random.Random) -> list[Way]:
    part = chance.choice((1, 3, 20))
    return [
        _slow("slow head", b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        _slow("slow body", _head("Content-Length: 100000"), b" "),
        _slow("slow chunks", _head("Transfer-Encoding: chunked"), b"1\r\n \r\n"),
        _slow("slow events", _head("Content-Type: text/event-stream"), b": still there\n\n"),
        _slow("slow status line", b"H", b"T"),
        Way("no answer", _mute),
        _raw("closed at once"),
        Way("closed in the head", lambda asked, body: [b"HTTP/1.1 200 OK\r\nContent-Le"]),
        Way("closed in the body", lambda asked, body: [http(body)[:-part]]),
        Way("in small parts", lambda asked, body: [http(body)[n : n + 40] for n in range(0, len(http(body)), 40)], sound=True),
    ]


def _statuses(chance: random.Random, key: str) -> list[Way]:
    said = chance.choice(
        (
            *(key, quote(key, safe=""), base64.b64encode(key.encode()).decode(), f"Bearer {key}", f"Authorization: Bearer {key}"),
            *("<html><h1>502 Bad Gateway</h1></html>", "", "\x1b[2J\x1b]0;owned\x07", "x" * 500_000, "[" * 20_000, '{"error": []}'),
        )
    )
    bodies = (said, json.dumps({"error": {"message": said}}), json.dumps({"error": said}), json.dumps({"error": [said, None]}))
    body = chance.choice(bodies).encode()
    codes = (204, 205, 304, 400, 401, 403, 404, 405, 408, 409, 413, 418, 422, 425, 500, 501, 502, 503, 504, 599)
    ways = [
        Way(
            f"status {code}, {body[:60]!r}", lambda asked, _, code=code: [http(body, f"{code} {said[:50]}", f"X-Echo: {said[:60]}")]
        )
        for code in codes
    ]
    pauses = ("999999999999", "-5", "nan", "1e9", "Fri, 31 Dec 9999 23:59:59 GMT", "inf", "\x1b[2J", "9" * 400, "0")
    ways += [
        Way(f"wait {pause[:40]!r}", lambda asked, _, pause=pause, code=code: [http(body, f"{code} Wait", f"Retry-After: {pause}")])
        for pause in pauses
        for code in (429, 503)
    ]
    return ways


def _interim(chance: random.Random) -> list[Way]:
    code = chance.choice((100, 102, 103, 199))
    said = _head(f"X-Interim: {chance.randrange(9)}", status=f"HTTP/1.1 {code} Go on")
    return [
        Way(f"one {code}", lambda asked, body: [said + http(body)], sound=True),
        Way(f"{code} and no more", lambda asked, body: [said]),
        _slow(f"{code} again and again", said, said),
        _endless(f"{code} without end", b"", said * 200),
        Way("upgrade", lambda asked, body: [_head("Upgrade: websocket", "Connection: upgrade", status="HTTP/1.1 101 Switching")]),
    ]


def _redirects(elsewhere: str, key: str) -> list[Way]:
    places = (elsewhere, "file:///etc/passwd", f"http://user:{key}@127.0.0.1:1/", "//127.0.0.1:1", "gopher://x", "", "/", "\x1b[2J")
    return [
        Way(
            f"{code} to {place[:30]!r}",
            lambda asked, body, code=code, place=place: [http(body, f"{code} Elsewhere", f"Location: {place}")],
        )
        for place in (*places, "x" * 5000)
        for code in (300, 301, 302, 303, 307, 308)
    ]


def body_ways(chance: random.Random, key: str) -> list[Way]:
    """Return ways to send something else than the body: its JSON with other values in it, or other bytes."""
    if chance.randrange(3):
        number = chance.randrange(1 << 30)
        return [Way(f"other values ({number})", lambda asked, body: [http(_mutated(body, random.Random(number), key))])]
    many = chance.choice((1_000, 100_000, 2_000_000))
    bodies = (
        *(
            b"",
            b"null",
            b"[]",
            b"{}",
            b"[1, 2]",
            b"NaN",
            b"-Infinity",
            b'"a"',
            b"7",
            b"9" * 5000,
            b"\xff\xfe{\x00}\x00",
            b"\x00" * 100,
        ),
        *(b"[" * many, b"[" + b"," * many + b"]", b'{"a":' * 2000 + b"1" + b"}" * 2000, b'{"choices": ' + b"9" * many + b"}"),
        *(b"[" + b"{}," * many + b"{}]", b'{"choices": [' + b"[]," * many + b"1]}", b'"' + b"x" * many + b'"', b" " * many),
        *(b'{"choices": [{"message": {"content": "\\ud800"}}]}', b'{"choices": [{"message": {"content": "\xed\xa0\x80"}}]}'),
        *(
            b"<html><script>x</script></html>",
            b'{"data": [{"id": "' + b"m" * many + b'"}]}',
            key.encode(),
            json.dumps(key).encode(),
        ),
        *(
            b"data: {}\n\n" * 1000,
            b"data: [DONE]\n\n",
            b'data: {"error": {"message": "' + key.encode() + b'"}}\n\n',
            b"data: " * 9000,
        ),
        *(b'{"error": {"message": "' + key.encode() + b'"}}', b'{"object": "list", "data": []}', b'{"version": ["0.1"]}'),
    )
    return [Way(f"body {body[:60]!r} ({len(body):,} bytes)", lambda asked, _, body=body: [http(body)]) for body in bodies]


def _mutated(body: bytes, chance: random.Random, key: str) -> bytes:
    """Return JSON, or events of it, in which one to three places hold something else, or are gone."""
    if body.startswith(b"data:"):
        events = body.split(b"\n\n")
        number = chance.randrange(len(events) - 2)
        events[number] = b"data: " + _mutated(events[number].removeprefix(b"data: "), chance, key)
        return b"\n\n".join(events)
    root = [json.loads(body)]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        container, place = chance.choice(_places(root))
        if chance.randrange(6) == 0 and container is not root:
            del container[place]
        else:
            container[place] = _value(chance, key)
    return json.dumps(root[0]).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    rows: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        rows = [(value, name) for name in cast("dict[str, Any]", value)]
    elif isinstance(value, list):
        rows = [(value, place) for place in range(len(cast("list[Any]", value)))]
    return rows + [found for container, place in rows for found in _places(container[place])]


def _value(chance: random.Random, key: str) -> Any:
    deep: Any = []
    for _ in range(chance.choice((3, 70, 500))):
        deep = [deep]
    values: list[Any] = [
        *(None, True, False, -1, 0, 7, 1.5, -0.0, 1e308, 10**30, -(10**30), 10**400, 2**31, 2**63),
        *(float("nan"), float("inf"), float("-inf"), 1e-320),
        *(
            "",
            " ",
            "7",
            "nan",
            "a" * 50_000,
            "\ud800",
            "\udfff\ud800",
            "\x00",
            "\x1b[2J\x1b]0;owned\x07",
            "\u202ename",
            "9" * 5000,
        ),
        *(
            key,
            f"sk {key} sk",
            quote(key, safe=""),
            base64.b64encode(key.encode()).decode(),
            key.upper(),
            key[:20],
            [key],
            {key: 1},
        ),
        *([], {}, [[]], [None], [1, "2", None], {"5": {"logprob": "x"}}, {"5": None}, {"\ud800": 1}, deep, [0] * 50_000),
        *({str(number): {"logprob": -1.0} for number in range(3000)}, {"-1": {"logprob": 0}, "5": {"logprob": float("nan")}}),
        *({"5": {"logprob": 1e9}}, {"5": {"logprob": float("-inf")}}, {"offset": -5, "length": 10**9}, "<html>", [{"id": 7}]),
    ]
    return chance.choice(values)

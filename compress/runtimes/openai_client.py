"""Concurrent requests to a server, with retries: a server that fails now and then, is slow, or restarts costs no item."""

from __future__ import annotations

import email.utils
import json
import os
import queue
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, cast

import httpx

from compress.errors import MissingError, ServerError
from compress.runtimes.exchange import AnswerError, Response, exchange, open_http
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact, remember_secret

_PROBE_SECONDS = 10
"""The timeout of a probe whether the server is back: it is asked for a list of models, which needs no computation."""

_POLL_SECONDS = 0.25
"""Seconds between two probes of a server that is away."""

_MAX_PAUSE = 30.0
"""Seconds at which the doubling pause between attempts ends."""

_MAX_TIMEOUTS = 2
"""How many requests of one item may time out: each costs `request_seconds`, and greedy decoding takes as long the next time."""

_MAX_OUTAGES = 3
"""During how many outages one item may be retried: an item that crashes the server each time must fail."""

_MESSAGE_CHARACTERS = 300
"""Characters of a server's text in a fault or an error message."""

_ERROR_BODY_CHARACTERS = 65_536
"""Characters of an error response that are parsed."""

_MIN_CONSECUTIVE_FAILURES = 16
"""From how many failed items in a row on the server is at fault, at low concurrency: so many bad items seldom follow each other."""

_DENIED = {401, 403}
_ABSENT = {404, 405, 501}
"""Statuses of a path that a server does not have; some proxies answer 405 or 501 for it."""

_REDIRECTS = {301, 302, 303, 307, 308}
_RETRIED = {408, 409, 425}
"""Client errors that may pass: request timeout, conflict, too early."""

_BUSY = 429
# A server error by its class, yet no retry can mend it.
_NOT_IMPLEMENTED = 501
_UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What parsing a malformed response raises."""

_AWAY = {502, 503, 504}
"""Statuses of a proxy whose server does not answer."""

# Nine digits at most: a header may say anything, and the pause is bounded by the policy besides.
_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]*)?")

Item = TypeVar("Item")
Result = TypeVar("Result")

RESUMES = "run the same command again: what has been answered is kept"


class ItemError(Exception):
    """One item failed though the server still answers; the message is short and holds no key."""


@dataclass(frozen=True)
class RetryPolicy:
    """When an item, or the server, is given up."""

    request_seconds: float
    """The timeout of one request."""

    away_seconds: float
    """How long a server that does not answer at all is waited for."""

    attempts: int = 5
    """How often an item is requested before it fails."""

    pause: float = 0.5
    """Seconds before the second attempt; doubled with each further one."""


@dataclass(frozen=True)
class Address:
    """A server's URL and API key; the key is not in the `repr`."""

    url: str
    key: str | None = None
    key_variable: str | None = None
    """The environment variable that the key comes from."""

    def __repr__(self) -> str:
        return f"Address({self.url})"


@dataclass(frozen=True)
class _Failure:
    message: str
    timed_out: bool = False
    away: bool = False
    busy: bool = False
    pause: float | None = None


def open_client(address: Address, connections: int, *, trust_env: bool = True) -> httpx.Client:
    """Return a client for a server; without `trust_env` the environment's proxies are not used."""
    headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
    url = address.url.rstrip("/").removesuffix("/v1")
    return open_http(url, headers, connections + 1, trust_env=trust_env)  # one more for the probe


def read_key(variable: str | None, url: str) -> str | None:
    """Return the key in an environment variable, None where no variable is named.

    Raises:
        MissingError: the variable is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise MissingError(f"the key for {url} is not there: set the environment variable {variable}")
    remember_secret(key)
    return key


class RetryingClient:
    """A client for one server that retries, used from several threads at once; see `RetryPolicy`.

    `check` raises ServerError if the server's process is known to have exited.
    """

    def __init__(self, client: httpx.Client, address: Address, policy: RetryPolicy, check: Callable[[], None]) -> None:
        self.client = client
        self._address = address
        self._policy = policy
        self._check = check
        self._closing = threading.Event()
        self._probing = threading.Lock()
        # Jitter, so that threads which failed together do not come back together; seeded, as all else here.
        self._jitter: Final = random.Random(0)  # noqa: S311 - no secret
        self._last_success = time.monotonic()
        self._outage_end = float("-inf")
        """When the last outage ended."""
        self._paused_until = 0.0
        """Until when the server asked for no requests (Retry-After)."""
        self._lost: str | None = None
        """The message of the error that ended the session for every thread."""

    def close(self) -> None:
        """Abort the requests that are waiting for an answer."""
        self._closing.set()

    def post(self, path: str, body: object, parse: Callable[[Any], Result]) -> Result:
        """Send a request; retry until `parse` accepts the response: on KeyError, IndexError, TypeError or ValueError it has not.

        Raises:
            ItemError: the server refuses the item, or every attempt failed.
            ServerError: the server exited, has stopped answering, or refuses the key.
        """
        content = json.dumps(body).encode()
        failed = timeouts = outages = 0
        while True:
            self._wait_for_pause()
            began = time.monotonic()
            outcome = self._send(path, content, parse)
            if not isinstance(outcome, _Failure):
                self._last_success = time.monotonic()
                return outcome
            if self._closing.is_set():
                raise ServerError(f"{self._address.url}: was not asked to the end; {RESUMES}")
            # 429 is flow control, not a failure: it must not use up an item's attempts.
            if outcome.busy:
                self._pause_all(outcome, failed)
                continue
            # An outage is the server's fault: the item is sent again without counting, except one that may be what crashes it.
            if outcome.away and self._was_away(began) and outages < _MAX_OUTAGES:
                outages += 1
                continue
            failed += 1
            timeouts += outcome.timed_out
            if failed >= self._policy.attempts or timeouts >= _MAX_TIMEOUTS:
                raise ItemError(outcome.message)
            self._closing.wait(self._next_pause(outcome, failed))

    def each(
        self,
        items: Sequence[Item],
        call: Callable[[Item], Result],
        on_failure: Callable[[Item, str], Result],
        concurrency: int,
        on_result: Callable[[Item, Result], None],
    ) -> list[Result]:
        """Call `call` for each item in `concurrency` threads; return the results in the items' order.

        `on_result` is called with each result as it arrives. An ItemError becomes what `on_failure` returns for its message.

        Raises:
            ServerError: the server is lost, or so many items in a row fail that the items are not at fault.
        """
        results: dict[int, Result] = {}
        # Twice the concurrency: one crash fails all requests that are in flight.
        limit = max(_MIN_CONSECUTIVE_FAILURES, 2 * concurrency)
        consecutive = 0
        workers = _Workers(items, call, min(concurrency, len(items)))
        try:
            for _ in items:
                index, outcome = workers.next()
                if isinstance(outcome, ItemError):
                    consecutive += 1
                    result = on_failure(items[index], str(outcome))
                    if consecutive >= limit:
                        raise ServerError(
                            f"{self._address.url}: {consecutive} items failed one after the other (the last: {outcome}); look into "
                            f"the server's log, and {RESUMES}"
                        ) from outcome
                else:
                    consecutive = 0
                    result = outcome
                results[index] = result
                on_result(items[index], result)
        finally:
            workers.stop()
        return [results[index] for index in range(len(items))]

    def _send(self, path: str, content: bytes, parse: Callable[[Any], Result]) -> Result | _Failure:
        try:
            with exchange(self.client, "POST", path, self._policy.request_seconds, content) as response:
                if not httpx.codes.is_success(response.status):
                    return self._refused(response)
                try:
                    return parse(response.json())
                except _UNREADABLE as error:
                    return _Failure(excerpt(f"its answer cannot be read ({type(error).__name__}: {error})"))
        except AnswerError as error:
            raise ItemError(excerpt(str(error))) from error
        except httpx.TimeoutException as error:
            # A server that does not accept connections is away; one that accepts and is slow has timed out on this item.
            connecting = isinstance(error, httpx.ConnectTimeout)
            return _Failure(f"no answer within {self._policy.request_seconds:g} seconds", timed_out=not connecting, away=connecting)
        except httpx.HTTPError as error:
            return _Failure(excerpt(f"{type(error).__name__}: {error}"), away=True)
        except RuntimeError as error:  # the client was closed meanwhile
            return _Failure(excerpt(str(error)))

    def _refused(self, response: Response) -> _Failure:
        """Return the failure that a status other than success means for the item.

        Raises:
            ItemError: the server refuses this item for good.
            ServerError: it demands a key, or another one; or it lacks the API.
        """
        status = response.status
        message = excerpt(f"{status}: {error_message(response)}")
        if status in _DENIED:
            raise ServerError(denied_message(self._address, message))
        # vLLM's words when its token endpoints are off: no item could ever be scored.
        if "scale-out" in message.lower():
            raise ServerError(f"{self._address.url}: {message}; start the server with --enable-scale-out")
        if (status < 500 and status != _BUSY and status not in _RETRIED) or status == _NOT_IMPLEMENTED:
            raise ItemError(message)
        return _Failure(message, away=status in _AWAY, busy=status == _BUSY, pause=_retry_after(response.headers))

    def _pause_all(self, outcome: _Failure, failed: int) -> None:
        """Pause the requests of all threads, as the server is busy; this does not count as an attempt.

        Raises:
            ServerError: the server has been busy for too long.
        """
        if time.monotonic() - self._last_success > self._policy.away_seconds:
            raise ServerError(
                f"{self._address.url}: has asked to wait for more than {self._policy.away_seconds:g} seconds "
                f"({outcome.message}); lower concurrency, and {RESUMES}"
            )
        self._paused_until = max(self._paused_until, time.monotonic() + self._next_pause(outcome, failed + 1))

    def _wait_for_pause(self) -> None:
        if (seconds := self._paused_until - time.monotonic()) > 0:
            self._closing.wait(seconds)

    def _was_away(self, began: float) -> bool:
        """Wait until the server answers again; return whether there was an outage since `began`.

        Raises:
            ServerError: its process exited, or it does not come back.
        """
        with self._probing:
            if self._lost is not None:
                raise ServerError(self._lost)
            # Another request succeeded since: the server is there, and only an outage that ended meanwhile explains this failure.
            if self._last_success > began:
                return self._outage_end > began
            deadline = time.monotonic() + self._policy.away_seconds
            away = False
            while not self._answers():
                away = True
                if time.monotonic() > deadline or self._closing.wait(_POLL_SECONDS):
                    self._lost = (
                        f"{self._address.url}: nothing has answered for {self._policy.away_seconds:g} seconds; start the server "
                        f"again, and {RESUMES}"
                    )
                    raise ServerError(self._lost)
            self._last_success = time.monotonic()
            if away:
                self._outage_end = self._last_success
            return away

    def _answers(self) -> bool:
        try:
            self._check()
        except ServerError as error:
            self._lost = f"{error}\nTo go on, {RESUMES}."
            raise ServerError(self._lost) from error
        try:
            with exchange(self.client, "GET", "/v1/models", _PROBE_SECONDS) as response:
                # Even a refusal shows that the server, and not only its proxy, answers.
                return response.status < 500
        except (httpx.HTTPError, AnswerError, RuntimeError):
            return False

    def _next_pause(self, outcome: _Failure, failed: int) -> float:
        """Return the seconds before the next attempt: the server's Retry-After, within limits, or a pause that doubles."""
        return self._pause(failed) if outcome.pause is None else min(outcome.pause, self._policy.away_seconds)

    def _pause(self, failed: int) -> float:
        longest = min(self._policy.pause * 2 ** (failed - 1), _MAX_PAUSE)
        with self._probing:
            return longest * self._jitter.uniform(0.5, 1.0)


class _Workers(Generic[Item]):
    """Daemon threads that take items from one queue: they end with the process even in the middle of a request."""

    def __init__(self, items: Sequence[Item], call: Callable[[Item], Any], count: int) -> None:
        self._items: Iterator[tuple[int, Item]] = iter(enumerate(items))
        self._call = call
        self._lock = threading.Lock()
        self._stopped = False
        self._outcomes: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for _ in range(count):
            # Daemons: an interrupted run must end although a thread waits in the middle of a request.
            threading.Thread(target=self._run, daemon=True).start()

    def next(self) -> tuple[int, Any]:
        """Return the index and the outcome, a result or an ItemError, of the next finished item.

        Raises:
            Exception: any other error of a call.
        """
        index, outcome = self._outcomes.get()
        if isinstance(outcome, BaseException) and not isinstance(outcome, ItemError):
            raise outcome
        return index, outcome

    def stop(self) -> None:
        """Start no further item."""
        self._stopped = True

    def _run(self) -> None:
        finished = False
        try:
            while (entry := self._take()) is not None:
                index, item = entry
                try:
                    outcome = self._call(item)
                except (ItemError, ServerError) as error:
                    outcome = error
                self._outcomes.put((index, outcome))
            finished = True
        finally:
            if not finished:
                # A fault of this program in a thread would otherwise leave `next` waiting for ever.
                self._outcomes.put((-1, sys.exception()))

    def _take(self) -> tuple[int, Item] | None:
        with self._lock:
            return None if self._stopped else next(self._items, None)


@dataclass(frozen=True)
class ServedModel:
    """A model on a server, and the client to reach it."""

    client: httpx.Client
    model: str
    """The served model's name."""

    check: Callable[[], None]
    """Raises ServerError if the server's process is known to have exited."""

    address: Address


def get_json(client: httpx.Client, address: Address, path: str, seconds: float) -> object:
    """Return the JSON that a server answers at a path, None where it has no such path.

    Raises:
        ServerError: it cannot be reached, is too slow, refuses the key, or fails.
    """
    try:
        with exchange(client, "GET", path, seconds) as response:
            if response.status in _DENIED:
                raise ServerError(denied_message(address, str(response.status)))
            if response.status in _ABSENT:
                return None
            if httpx.codes.is_success(response.status):
                return cast("object", response.json())
            reason = excerpt(f"{response.status}: {error_message(response)}")
    except httpx.TimeoutException as error:
        raise ServerError(
            f"{address.url}: did not answer within {seconds:g} seconds; raise request_seconds, or see what it is busy with"
        ) from error
    except httpx.HTTPError as error:
        raise ServerError(f"{address.url}: no server answers there ({excerpt(str(error))}); start it, or correct url") from error
    except (AnswerError, ValueError, RecursionError) as error:
        reason = excerpt(str(error))
    raise ServerError(f"{address.url}: {path} cannot be read ({reason}); give the URL of an OpenAI-compatible server")


def excerpt(text: str, limit: int = _MESSAGE_CHARACTERS) -> str:
    """Return text from a server on one line, cut to `limit` characters, and redacted: some servers repeat keys."""
    line = printable(" ".join(redact(text).split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def denied_message(address: Address, reason: str) -> str:
    """Return the error message for a server that demands a key, or another one."""
    if address.key_variable is None:
        remedy = "it needs a key: put it into an environment variable, and name that as key_variable"
    else:
        remedy = f"it refuses the key in the environment variable {address.key_variable}; correct it"
    return f"{address.url}: {reason}; {remedy}"


def error_message(response: Response) -> str:
    """Return the error message of a response (OpenAI's `error.message`, else its text), or the target of a redirect."""
    if response.status in _REDIRECTS:
        location = response.headers.get("Location", "another address")
        return f"it sends to {location}, which is not followed; name the server that answers"
    # Error pages of proxies can be large, and only a message of a few hundred characters is shown.
    text = response.text[:_ERROR_BODY_CHARACTERS]
    try:
        content: Any = json.loads(text)
        error: Any = cast("dict[str, Any]", content).get("error", content) if isinstance(content, dict) else content
        message = cast("dict[str, Any]", error).get("message", error) if isinstance(error, dict) else error
        return message if isinstance(message, str) else json.dumps(message)
    except (ValueError, RecursionError):
        return text


def _retry_after(headers: httpx.Headers) -> float | None:
    """Return a Retry-After header in seconds: it is a number, or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None

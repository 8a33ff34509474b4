"""Asking a server many things at once, so that one that fails now and then, is slow, or starts again costs no item."""

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
from compress.redaction import redact, remember_secret
from compress.runtimes.exchange import AnswerError, Response, exchange, open_http
from compress.untrusted import printable

_PROBE_SECONDS = 10
_INTERVAL = 0.25
"""Seconds between two looks whether a server is back."""
_LONGEST_PAUSE = 30.0
_TIMEOUTS = 2
"""How often one item may be waited for in vain: a third time would take as long again."""
_OUTAGES = 3
"""How many outages one item may fall into: a question that brings the server down each time must end."""
_WORDS = 300
_LONGEST_REFUSAL = 65_536
_LEAST_IN_A_ROW = 16
_DENIED = {401, 403}
_ELSEWHERE = {301, 302, 303, 307, 308}
_AGAIN = {408, 409, 425}
_BUSY = 429
_NOT_OFFERED = 501
_UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading an answer that is not as it should be raises."""
_AWAY = {502, 503, 504}
"""What a proxy answers where the server behind it does not."""

_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]*)?")

Item = TypeVar("Item")
Result = TypeVar("Result")

RESUMES = "run the same command again: what has been answered is kept"


class ItemError(Exception):
    """One item could not be had, though the server still serves; its words are short and hold no key."""


@dataclass(frozen=True)
class Patience:
    """How long, in seconds, and how often a server is asked before an item, or the whole server, is given up.

    A request may take `request_seconds`; an item that fails is asked for `attempts` times, after pauses that begin with `pause` and
    double; a server that does not answer at all is waited for `away_seconds`.
    """

    request_seconds: float
    away_seconds: float
    attempts: int = 5
    pause: float = 0.5


@dataclass(frozen=True)
class Address:
    """Where a server is asked; `key_variable` is the environment variable its key is from, `key` the key, kept out of all words."""

    url: str
    key: str | None = None
    key_variable: str | None = None

    def __repr__(self) -> str:
        return f"Address({self.url})"


@dataclass(frozen=True)
class _Failure:
    words: str
    timed_out: bool = False
    away: bool = False
    busy: bool = False
    pause: float | None = None


def open_client(address: Address, connections: int, *, trust_env: bool = True) -> httpx.Client:
    """Return a client for a server; without `trust_env` no proxy of the environment stands between."""
    headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
    url = address.url.rstrip("/").removesuffix("/v1")
    return open_http(url, headers, connections + 1, trust_env=trust_env)  # one more to look after it


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


class Asker:
    """Asks one server, from several threads at once; see `Patience`.

    `check` raises ServerError where the process that serves is known to have ended.
    """

    def __init__(self, client: httpx.Client, address: Address, patience: Patience, check: Callable[[], None]) -> None:
        self.client = client
        self._address = address
        self._patience = patience
        self._check = check
        self._ending = threading.Event()
        self._looking = threading.Lock()
        self._chance: Final = random.Random(0)  # noqa: S311 - no secret
        self._answered = time.monotonic()
        """When the server last answered as it should."""
        self._back = float("-inf")
        """When the last outage ended."""
        self._open_again = 0.0
        """Until when the server asked not to be asked."""
        self._lost: str | None = None

    def close(self) -> None:
        """Make what still waits for an answer give up."""
        self._ending.set()

    def post(self, path: str, body: object, read: Callable[[Any], Result]) -> Result:
        """Ask until there is an answer that `read` can use: it raises KeyError, IndexError, TypeError or ValueError otherwise.

        Raises:
            ItemError: the server refused the item, or failed again and again.
            ServerError: the server ended, does not answer any more, or refuses the key.
        """
        content = json.dumps(body).encode()
        failed = timeouts = outages = 0
        while True:
            self._hold()
            began = time.monotonic()
            outcome = self._once(path, content, read)
            if not isinstance(outcome, _Failure):
                self._answered = time.monotonic()
                return outcome
            if self._ending.is_set():
                raise ServerError(f"{self._address.url}: was not asked to the end; {RESUMES}")
            if outcome.busy:
                self._wait_as_told(outcome, failed)
                continue
            if outcome.away and self._was_away(began) and outages < _OUTAGES:
                outages += 1
                continue
            failed += 1
            timeouts += outcome.timed_out
            if failed >= self._patience.attempts or timeouts >= _TIMEOUTS:
                raise ItemError(outcome.words)
            self._ending.wait(self._told(outcome, failed))

    def each(
        self,
        items: Sequence[Item],
        call: Callable[[Item], Result],
        failed: Callable[[Item, str], Result],
        concurrency: int,
        told: Callable[[Item, Result], None],
    ) -> list[Result]:
        """Call for each item, `concurrency` at once, and return the results in the items' order; `told` hears of each as it comes.

        What `call` raises as ItemError becomes the result that `failed` makes of it.

        Raises:
            ServerError: the server is lost, or items fail one after the other, so that something else than an item is at fault.
        """
        results: dict[int, Result] = {}
        bound = max(_LEAST_IN_A_ROW, 2 * concurrency)
        in_a_row = 0
        outcomes = _Crew(items, call, min(concurrency, len(items)))
        try:
            for _ in items:
                place, outcome = outcomes.next()
                if isinstance(outcome, ItemError):
                    in_a_row += 1
                    result = failed(items[place], str(outcome))
                    if in_a_row >= bound:
                        raise ServerError(
                            f"{self._address.url}: {in_a_row} items failed one after the other (the last: {outcome}); look into "
                            f"the server's log, and {RESUMES}"
                        ) from outcome
                else:
                    in_a_row = 0
                    result = outcome
                results[place] = result
                told(items[place], result)
        finally:
            outcomes.stop()
        return [results[place] for place in range(len(items))]

    def _once(self, path: str, content: bytes, read: Callable[[Any], Result]) -> Result | _Failure:
        try:
            with exchange(self.client, "POST", path, self._patience.request_seconds, content) as answer:
                if not httpx.codes.is_success(answer.status):
                    return self._refused(answer)
                try:
                    return read(answer.json())
                except _UNREADABLE as error:
                    return _Failure(shown(f"its answer cannot be read ({type(error).__name__}: {error})"))
        except AnswerError as error:
            raise ItemError(shown(str(error))) from error
        except httpx.TimeoutException as error:
            connecting = isinstance(error, httpx.ConnectTimeout)
            return _Failure(
                f"no answer within {self._patience.request_seconds:g} seconds", timed_out=not connecting, away=connecting
            )
        except httpx.HTTPError as error:
            return _Failure(shown(f"{type(error).__name__}: {error}"), away=True)
        except RuntimeError as error:  # the client was closed meanwhile
            return _Failure(shown(str(error)))

    def _refused(self, answer: Response) -> _Failure:
        """Return what a status other than success means for the item.

        Raises:
            ItemError: the server will not answer this item, however often it is asked.
            ServerError: it wants a key, or another one; or it lacks what it is asked for.
        """
        status = answer.status
        words = shown(f"{status}: {refusal_of(answer)}")
        if status in _DENIED:
            raise ServerError(denied(self._address, words))
        if "scale-out" in words.lower():
            raise ServerError(f"{self._address.url}: {words}; start the server with --enable-scale-out")
        if (status < 500 and status != _BUSY and status not in _AGAIN) or status == _NOT_OFFERED:
            raise ItemError(words)
        return _Failure(words, away=status in _AWAY, busy=status == _BUSY, pause=_retry_after(answer.headers))

    def _wait_as_told(self, outcome: _Failure, failed: int) -> None:
        """Keep every thread from asking for a while; being asked to wait is no failure of an item.

        Raises:
            ServerError: the server has answered nothing else for too long.
        """
        if time.monotonic() - self._answered > self._patience.away_seconds:
            raise ServerError(
                f"{self._address.url}: has asked to wait for more than {self._patience.away_seconds:g} seconds ({outcome.words}); "
                f"lower concurrency, and {RESUMES}"
            )
        self._open_again = max(self._open_again, time.monotonic() + self._told(outcome, failed + 1))

    def _hold(self) -> None:
        if (left := self._open_again - time.monotonic()) > 0:
            self._ending.wait(left)

    def _was_away(self, began: float) -> bool:
        """Wait until the server answers again; return whether it had been away since `began`.

        Raises:
            ServerError: its process ended, or it does not come back.
        """
        with self._looking:
            if self._lost is not None:
                raise ServerError(self._lost)
            if self._answered > began:
                return self._back > began
            deadline = time.monotonic() + self._patience.away_seconds
            away = False
            while not self._is_there():
                away = True
                if time.monotonic() > deadline or self._ending.wait(_INTERVAL):
                    self._lost = (
                        f"{self._address.url}: nothing has answered for {self._patience.away_seconds:g} seconds; start the server "
                        f"again, and {RESUMES}"
                    )
                    raise ServerError(self._lost)
            self._answered = time.monotonic()
            if away:
                self._back = self._answered
            return away

    def _is_there(self) -> bool:
        try:
            self._check()
        except ServerError as error:
            self._lost = f"{error}\nTo go on, {RESUMES}."
            raise ServerError(self._lost) from error
        try:
            with exchange(self.client, "GET", "/v1/models", _PROBE_SECONDS) as answer:
                return answer.status < 500
        except (httpx.HTTPError, AnswerError, RuntimeError):
            return False

    def _told(self, outcome: _Failure, failed: int) -> float:
        """Return how long to wait: as the server says, within reason, or longer with each failure."""
        return self._pause(failed) if outcome.pause is None else min(outcome.pause, self._patience.away_seconds)

    def _pause(self, failed: int) -> float:
        longest = min(self._patience.pause * 2 ** (failed - 1), _LONGEST_PAUSE)
        with self._looking:
            return longest * self._chance.uniform(0.5, 1.0)


class _Crew(Generic[Item]):
    """Threads that call for one item after the other; they end with the process, whatever they wait for."""

    def __init__(self, items: Sequence[Item], call: Callable[[Item], Any], count: int) -> None:
        self._work: Iterator[tuple[int, Item]] = iter(enumerate(items))
        self._call = call
        self._taking = threading.Lock()
        self._stopped = False
        self._outcomes: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._labour, daemon=True).start()

    def next(self) -> tuple[int, Any]:
        """Return the place and the outcome, a result or an ItemError, of an item that is done.

        Raises:
            Exception: what else a call raised.
        """
        place, outcome = self._outcomes.get()
        if isinstance(outcome, BaseException) and not isinstance(outcome, ItemError):
            raise outcome
        return place, outcome

    def stop(self) -> None:
        """Begin no further item."""
        self._stopped = True

    def _labour(self) -> None:
        finished = False
        try:
            while (given := self._take()) is not None:
                place, item = given
                try:
                    outcome = self._call(item)
                except (ItemError, ServerError) as error:
                    outcome = error
                self._outcomes.put((place, outcome))
            finished = True
        finally:
            if not finished:
                self._outcomes.put((-1, sys.exception()))

    def _take(self) -> tuple[int, Item] | None:
        with self._taking:
            return None if self._stopped else next(self._work, None)


def shown(words: str, most: int = _WORDS) -> str:
    """Return words of a server's, or about it, on one line, cut, and without secrets, which some servers repeat."""
    flat = printable(" ".join(redact(words).split()))
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def denied(address: Address, words: str) -> str:
    """Return what to say where a server wants a key, or another one."""
    if address.key_variable is None:
        remedy = "it needs a key: put it into an environment variable, and name that as key_variable"
    else:
        remedy = f"it refuses the key in the environment variable {address.key_variable}; correct it"
    return f"{address.url}: {words}; {remedy}"


def refusal_of(answer: Response) -> str:
    """Return the server's own words on a failure, or where it sends who asks."""
    if answer.status in _ELSEWHERE:
        return (
            f"it sends to {answer.headers.get('Location', 'another address')}, which is not followed; name the server that answers"
        )
    text = answer.text[:_LONGEST_REFUSAL]
    try:
        content: Any = json.loads(text)
        error: Any = cast("dict[str, Any]", content).get("error", content) if isinstance(content, dict) else content
        told = cast("dict[str, Any]", error).get("message", error) if isinstance(error, dict) else error
        return told if isinstance(told, str) else json.dumps(told)
    except (ValueError, RecursionError):
        return text


def _retry_after(headers: httpx.Headers) -> float | None:
    """Return how many seconds a server asks to wait: a number, or until a date (RFC 9110, section 10.2.3)."""
    told = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(told):
        return float(told)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None

"""Secrets are kept out of whatever is written or shown: one function takes them out of a text, in the forms servers repeat them in.

Secret are the keys that were read for a server, the values of environment variables that by their names hold keys or tokens, the
token that the Hugging Face client keeps, and in any text the credentials of a URL or of an Authorization header.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

MARK = "…"
"""What stands in a secret's place."""
_SHORTEST = 4
"""Characters of the shortest key that counts: taking shorter ones out of a message would leave nothing of it."""
_SHORTEST_VALUE = 8
"""Of one that is taken out of answers too, and of one that only its variable's name gives away.

Servers without keys are given words such as EMPTY or none, and answers may hold those."""
_HEAD = 12
"""Characters by which a longer secret is known, so that one which a server cuts short is found too."""
# By the end of a name: TOKENIZERS_PARALLELISM and MAX_TOKENS hold no secret.
_NAMES = re.compile(
    r"(?:^|_)(?:(?:API|ACCESS|AUTH)_?TOKEN|(?:HUB|HF|GH|GITHUB|MODELSCOPE)_TOKEN|API_?KEY|SECRET|SECRET_(?:ACCESS_)?KEY|PASSWORD)$",
    re.IGNORECASE,
)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"<>]+@")
_AUTHORIZATION = re.compile(r"(authorization\W{1,6}(?:bearer|basic|token)\s+)[^\s'\"<>,;]+", re.IGNORECASE)
# Signed URLs of object stores carry their credentials as parameters.
_PARAMETERS = re.compile(
    r"([?&](?:api[-_]?key|key|token|access[-_]token|password|signature|sig|x-amz-(?:signature|credential|security-token))=)[^&\s'\"<>]+",
    re.IGNORECASE,
)

# A dict, which keeps the order of noting: the cache of compiled patterns is keyed by the tuple of secrets.
_noted: dict[str, None] = {}


def remember_secret(value: str) -> None:
    """Note a key, so that `redact` knows it from now on."""
    if len(value) >= _SHORTEST:
        _noted[value] = None


def secrets_known() -> tuple[str, ...]:
    """Return every secret that is known now."""
    named = (os.environ[name].strip() for name in os.environ if _NAMES.search(name))
    # huggingface_hub sends it with every request, so that an error message of a mirror may repeat it.
    stored = _stored_token()
    found = [*_noted, *(value for value in (*named, stored) if len(value) >= _SHORTEST_VALUE)]
    return tuple(dict.fromkeys(found))


def redact(text: str) -> str:
    """Return a text without secrets, as they are, percent-encoded, escaped, in hexadecimal or in base64, whole or cut short."""
    text = _replaced(text, secrets_known())
    text = _CREDENTIALS.sub(f"{MARK}@", text)
    text = _AUTHORIZATION.sub(rf"\g<1>{MARK}", text)
    return _PARAMETERS.sub(rf"\g<1>{MARK}", text)


def redact_answer(text: str) -> str:
    """Return a model's answer without secrets: what else it may hold that looks like one belongs to the answer."""
    return _replaced(text, tuple(secret for secret in secrets_known() if len(secret) >= _SHORTEST_VALUE))


def redact_value(value: Any) -> Any:
    """Return a value of JSON's kinds with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value)
        return {redact(key) if isinstance(key, str) else key: redact_value(part) for key, part in pairs.items()}
    if isinstance(value, (list, tuple)):
        return [redact_value(part) for part in cast("Iterable[object]", value)]
    return value


def forms(secret: str) -> tuple[str, ...]:
    """Return the texts in which a secret may stand, the longest first."""
    content = secret.encode("utf-8", "surrogateescape")
    # Servers repeat keys in JSON errors, in URLs, in HTML error pages and in Python tracebacks.
    found = {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], html.escape(secret), repr(secret)[1:-1]}
    if len(secret) >= _SHORTEST_VALUE:
        found |= {content.hex(), *_in_base64(content)}
    return tuple(sorted(found, key=len, reverse=True))


def _in_base64(content: bytes) -> set[str]:
    """Return what base64 makes of the bytes wherever among others they stand: only whole characters of theirs."""
    found: set[str] = set()
    # base64 encodes three bytes at a time: a secret within a longer text has one of three spellings (`user:key` of Basic, say).
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + content).decode()
        whole = encoded[-(-before * 4 // 3) : (before + len(content)) * 8 // 6]
        found |= {whole, whole.replace("+", "-").replace("/", "_")}
    return found


def _replaced(text: str, secrets: tuple[str, ...]) -> str:
    if not secrets:
        return text
    heads, whole = _heads(secrets)
    parts: list[str] = []
    place = 0
    for match in heads.finditer(text):
        if match.start() < place:
            continue
        parts += [text[place : match.start()], MARK]
        rests = (form for form in whole if form.casefold().startswith(match.group().casefold()))
        # Up to where the text still agrees with the secret: one that a server cut short leaves no remainder.
        place = max(match.start() + _shared(text, match.start(), form) for form in rests)
    return "".join([*parts, text[place:]]) if parts else text


@lru_cache(maxsize=8)
def _heads(secrets: tuple[str, ...]) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """Return what finds the beginning of each form of each secret, and the forms."""
    whole = tuple(form for secret in secrets for form in forms(secret))
    parts = sorted({form[:_HEAD] if len(form) >= _HEAD + 4 else form for form in whole}, key=len, reverse=True)
    long = [re.escape(part) for part in parts if len(part) >= _SHORTEST_VALUE]
    short = [re.escape(part) for part in parts if len(part) < _SHORTEST_VALUE]
    found = [f"(?i:{'|'.join(long)})"] if long else []
    found += [rf"(?<!\w)(?:{'|'.join(short)})(?!\w)"] if short else []  # in a word of its own, as it is written
    return re.compile("|".join(found)), whole


def _shared(text: str, start: int, form: str) -> int:
    """Return how many characters of a form stand in a text from `start` on."""
    count = 0
    while count < len(form) and text[start + count : start + count + 1].casefold() == form[count].casefold():
        count += 1
    return count


def _stored_token() -> str:
    """Return the token that the Hugging Face client keeps in a file, nothing where there is none."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    return _read_token(str(path))


@lru_cache(maxsize=8)
def _read_token(path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            return file.read(4096).decode("utf-8", "replace").strip()
    except (OSError, RuntimeError, ValueError):
        return ""

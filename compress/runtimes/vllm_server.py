"""Bringing up `vllm serve`, or reaching one at a URL."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx

from compress.checkpoint import read_config, read_json_object
from compress.errors import ServerError
from compress.families import family_at
from compress.runtimes.exchange import AnswerError, exchange, models_of
from compress.runtimes.openai_client import Address, open_client, read_key, refusal_of, shown
from compress.runtimes.runtime import OpenContext, Served
from compress.runtimes.vllm import Vllm
from compress.runtimes.vllm_session import ServedModel, Tokens, VllmSession
from compress.runtimes.vllm_start import start_server

_LONGEST = 60
"""Characters of a version that a server tells."""
_SHOWN = 5


@contextmanager
def open_session(runtime: Vllm, context: OpenContext) -> Generator[VllmSession]:
    """Bring up a server for the artifact, or reach the one at `url`.

    Raises:
        MissingError: vLLM is not installed, or the key's variable is not set.
        ServerError: the server did not come up, or nothing serves at `url`.
    """
    config = read_config(context.artifact)
    tokens = Tokens(stop_tokens(context.artifact), family_at(context.artifact, context.trust_remote_code).placeholders(config))
    if runtime.url is not None:
        address = _address(runtime)
        with open_client(address, runtime.concurrency) as client:
            endpoint = ServedModel(client, _remote_model(runtime, client, context.artifact), lambda: None, address)
            with closing(VllmSession(endpoint, runtime, tokens)) as session:
                yield session
        return
    with start_server(runtime, context) as started:
        served = started.served
        address = Address(served.url, served.key)
        # No proxy stands between this machine and itself.
        with open_client(address, runtime.concurrency, trust_env=False) as client:
            endpoint = ServedModel(client, served.model, started.server.check, address)
            with closing(VllmSession(endpoint, runtime, tokens)) as session:
                yield session


@contextmanager
def serve(runtime: Vllm, context: OpenContext) -> Generator[Served]:
    """Bring up a server for the artifact, or reach the one at `url`, for others to put load on.

    Raises:
        MissingError: vLLM is not installed, or the key's variable is not set.
        ServerError: the server did not come up, or nothing serves at `url`.
    """
    if runtime.url is None:
        with start_server(runtime, context) as started:
            yield started.served
        return
    address = _address(runtime)
    with open_client(address, 1) as client:
        model = _remote_model(runtime, client, context.artifact)
    yield Served(runtime.url.rstrip("/").removesuffix("/v1"), model, address.key)


def remote_version(runtime: Vllm) -> str:
    """Return the version that the server at `url` tells.

    Raises:
        MissingError: it does not answer, or is no vLLM server.
    """
    with open_client(_address(runtime), 1) as client:
        return shown(str(_get(client, runtime, "/version").get("version", "unknown")), _LONGEST)


def stop_tokens(artifact: Path) -> tuple[int, ...]:
    """Return the tokens that end an answer, as generation_config.json or config.json says; empty where neither does.

    Raises:
        CheckpointError: one of the two is no JSON object, or there is no config.json.
    """
    path = artifact / "generation_config.json"
    config = read_config(artifact)
    text = cast("dict[str, Any]", config.get("text_config") or {})
    places = (read_json_object(path) if path.is_file() else {}, text, config)
    named: Any = next((place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), ())
    return tuple(cast("list[int]", named)) if isinstance(named, (list, tuple)) else (int(named),)


def _get(client: httpx.Client, runtime: Vllm, path: str) -> dict[str, Any]:
    try:
        with exchange(client, "GET", path, runtime.request_seconds) as answer:
            content: object = answer.json() if httpx.codes.is_success(answer.status) else None
            words = shown(f"{answer.status}: {refusal_of(answer)}" if content is None else "no JSON object")
    except (httpx.HTTPError, AnswerError, ValueError, RecursionError) as error:
        content, words = None, shown(f"{type(error).__name__}: {error}")
    if isinstance(content, dict):
        return cast("dict[str, Any]", content)
    raise ServerError(f"{runtime.url}: no vLLM server answers there ({words}); start it, or correct url")


def _address(runtime: Vllm) -> Address:
    url = cast("str", runtime.url)
    return Address(url, read_key(runtime.key_variable, url), runtime.key_variable)


def _remote_model(runtime: Vllm, client: httpx.Client, artifact: Path) -> str:
    """Return the name under which the server at `url` serves the artifact.

    Raises:
        ServerError: it serves something else; measuring that would say nothing of the artifact.
    """
    try:
        rows = models_of(_get(client, runtime, "/v1/models"))
    except ValueError as error:
        raise ServerError(f"{runtime.url}: does not tell which model it serves ({error}); start it, or correct url") from error
    served = {str(row["id"]): str(row.get("root", "")) for row in rows}
    for name, root in served.items():
        if _leads_to(root, artifact):
            return name
    listed = ", ".join(shown(root or name) for name, root in list(served.items())[:_SHOWN]) or "no model"
    raise ServerError(f"{runtime.url} serves {listed}, not {artifact}; start it with that folder, or leave out url")


def _leads_to(root: str, artifact: Path) -> bool:
    """Return whether what a server names as its model's folder is an artifact's."""
    try:
        return Path(root).resolve() == artifact.resolve()
    except (OSError, RuntimeError, ValueError):
        return False

"""Open a session with `vllm serve`: start it, or connect to a running one at a URL."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx

from compress.checkpoints.special_tokens import special_tokens
from compress.errors import ServerError
from compress.runtimes.exchange import models_of
from compress.runtimes.openai_client import Address, ServedModel, excerpt, get_json, open_client, read_key
from compress.runtimes.runtime import OpenContext, RunningServer
from compress.runtimes.vllm.session import VllmSession
from compress.runtimes.vllm.start import start_server

if TYPE_CHECKING:
    from compress.runtimes.vllm.runtime import Vllm

_VERSION_CHARACTERS = 60
"""Characters of a server's version in messages and reports: it is not ours to trust."""

_LISTED_MODELS = 5
"""How many of a server's models a message lists."""


@contextmanager
def open_session(runtime: Vllm, context: OpenContext) -> Generator[VllmSession]:
    """Start a server for the artifact, or connect to the one at `url`.

    Raises:
        MissingError: vLLM is not installed, or the key's variable is not set.
        ServerError: the server did not start, or nothing serves at `url`.
    """
    tokens = special_tokens(context.artifact, context.family)
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
        # Without the environment's proxy: it may not reach the loopback interface.
        with open_client(address, runtime.concurrency, trust_env=False) as client:
            endpoint = ServedModel(client, served.model, started.server.check, address)
            with closing(VllmSession(endpoint, runtime, tokens)) as session:
                yield session


@contextmanager
def serve(runtime: Vllm, context: OpenContext) -> Generator[RunningServer]:
    """Start a server for the artifact, or connect to the one at `url`, for a load generator to measure.

    Raises:
        MissingError: vLLM is not installed, or the key's variable is not set.
        ServerError: the server did not start, or nothing serves at `url`.
    """
    if runtime.url is None:
        with start_server(runtime, context) as started:
            yield started.served
        return
    address = _address(runtime)
    with open_client(address, 1) as client:
        model = _remote_model(runtime, client, context.artifact)
    yield RunningServer(runtime.url.rstrip("/").removesuffix("/v1"), model, address.key)


def remote_version(runtime: Vllm) -> str:
    """Return the version reported by the server at `url`.

    Raises:
        MissingError: it does not answer, or is no vLLM server.
    """
    with open_client(_address(runtime), 1) as client:
        return excerpt(str(_get(client, runtime, "/version").get("version", "unknown")), _VERSION_CHARACTERS)


def _get(client: httpx.Client, runtime: Vllm, path: str) -> dict[str, Any]:
    content = get_json(client, _address(runtime), path, runtime.request_seconds)
    if isinstance(content, dict):
        return cast("dict[str, Any]", content)
    raise ServerError(f"{runtime.url}: no vLLM server answers there ({path}: no JSON object); start it, or correct url")


def _address(runtime: Vllm) -> Address:
    url = cast("str", runtime.url)
    return Address(url, read_key(runtime.key_variable, url), runtime.key_variable)


def _remote_model(runtime: Vllm, client: httpx.Client, artifact: Path) -> str:
    """Return the name under which the server at `url` serves the artifact.

    Raises:
        ServerError: it serves another model, whose results would say nothing about the artifact.
    """
    try:
        rows = models_of(_get(client, runtime, "/v1/models"))
    except ValueError as error:
        raise ServerError(f"{runtime.url}: does not tell which model it serves ({error}); start it, or correct url") from error
    # vLLM reports the folder it was started with as `root`, whatever name it serves it under.
    roots = {str(row["id"]): str(row.get("root", "")) for row in rows}
    for name, root in roots.items():
        if _is_folder_of(root, artifact):
            return name
    names = ", ".join(excerpt(root or name) for name, root in list(roots.items())[:_LISTED_MODELS]) or "no model"
    raise ServerError(f"{runtime.url} serves {names}, not {artifact}; start it with that folder, or leave out url")


def _is_folder_of(root: str, artifact: Path) -> bool:
    """Return whether the model root that a server reports is the artifact's folder."""
    try:
        # The server's word may be any text, of which `resolve` can raise for a NUL or a loop of links.
        return Path(root).resolve() == artifact.resolve()
    except (OSError, RuntimeError, ValueError):
        return False

"""Bringing up `vllm serve`, or reaching one at a URL."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx

from compress.checkpoint import read_config, read_json_object, text_config
from compress.errors import MissingError, ServerError
from compress.families import family_at
from compress.files import telling_where, write_text
from compress.runtimes.environment import require
from compress.runtimes.runtime import Environment, OpenContext
from compress.runtimes.server import choose_port, run_server
from compress.runtimes.vllm import Vllm
from compress.runtimes.vllm_session import Endpoint, Tokens, VllmSession

_CONTEXT = 8192
_CONNECT_SECONDS = 10
_DROPPED = {"PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def open_session(runtime: Vllm, context: OpenContext) -> Generator[VllmSession]:
    """Bring up a server for the artifact, or reach the one at `url`.

    Raises:
        MissingError: vLLM is not installed, or the key's variable is not set.
        ServerError: the server did not come up, or nothing serves at `url`.
    """
    config = read_config(context.artifact)
    tokens = Tokens(stop_tokens(context.artifact), family_at(context.artifact).placeholders(config))
    if runtime.url is not None:
        with _client(runtime, runtime.url, _remote_key(runtime)) as client:
            endpoint = Endpoint(client, _remote_model(runtime, client, context.artifact), lambda: None)
            with closing(VllmSession(endpoint, runtime, tokens)) as session:
                yield session
        return
    environment = require("vllm")
    port = choose_port(runtime.port, "vLLM")
    model, key = f"compress-{secrets.token_hex(4)}", secrets.token_hex(16)
    url = f"http://127.0.0.1:{port}"
    extra = ("--port", str(port), "--served-model-name", model, *_chat_template(context))
    command = _command(runtime, context, environment, extra)
    with (
        run_server(f"vLLM, serving {context.artifact},", command, _variables(runtime, key), context.logs / "vllm.log") as server,
        _client(runtime, url, key) as client,
    ):
        with context.progress.task("start vllm", 1, "servers") as advance:
            server.wait(lambda: _is_healthy(client), runtime.startup_seconds)
            names = _models(client)
            if names != [model]:
                raise ServerError(f"{url} serves {', '.join(names)}, not the server that was started; run it again")
            advance(1)
        with closing(VllmSession(Endpoint(client, model, server.check), runtime, tokens)) as session:
            yield session


def remote_version(runtime: Vllm) -> str:
    """Return the version that the server at `url` tells.

    Raises:
        MissingError: it does not answer, or is no vLLM server.
    """
    with _client(runtime, cast("str", runtime.url), _remote_key(runtime)) as client:
        return str(_get(client, "/version").get("version", "unknown"))


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


def _command(runtime: Vllm, context: OpenContext, environment: Environment, extra: tuple[str, ...]) -> list[str]:
    command = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "serve", str(context.artifact)]
    command += ["--host", "127.0.0.1", *extra, "--dtype", runtime.dtype, "--seed", "0"]
    command += ["--max-model-len", str(runtime.max_model_len or _context(context.artifact))]
    command += ["--gpu-memory-utilization", str(runtime.gpu_memory_utilization)]
    command += ["--max-logprobs", str(runtime.top_logprobs)]
    command += ["--generation-config", "vllm"]  # models ship sampling settings and penalties, which greedy decoding leaves out
    command += ["--no-enable-prefix-caching"]  # a cached prefix is computed in other pieces than a new one, and rounds otherwise
    command += ["--enable-scale-out"]  # the endpoints that take an answer as tokens
    command += ["--enforce-eager"] if runtime.eager else []
    command += ["--trust-remote-code"] if context.trust_remote_code else []
    return [*command, *runtime.arguments]


def _chat_template(context: OpenContext) -> tuple[str, ...]:
    """Return what makes a server write prompts as the in-process runtime does where the artifact ships no chat template."""
    artifact, template = context.artifact, family_at(context.artifact).chat_template
    settings = artifact / "tokenizer_config.json"
    ships = any((artifact / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not template or ships or (settings.is_file() and read_json_object(settings).get("chat_template")):
        return ()
    path = context.logs / "chat_template.jinja"
    with telling_where(context.logs):
        context.logs.mkdir(parents=True, exist_ok=True)
        write_text(path, template)
    return ("--chat-template", str(path))


def _context(artifact: Path) -> int:
    return min(int(text_config(read_config(artifact)).get("max_position_embeddings", _CONTEXT)), _CONTEXT)


def _variables(runtime: Vllm, key: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    return kept | _SETTINGS | {"VLLM_API_KEY": key, "VLLM_CPU_KVCACHE_SPACE": str(runtime.kv_cache_gib)}


def _client(runtime: Vllm, url: str, key: str | None) -> httpx.Client:
    return httpx.Client(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(runtime.request_seconds, connect=_CONNECT_SECONDS),
        limits=httpx.Limits(max_connections=runtime.concurrency),
        trust_env=runtime.url is not None,  # no proxy stands between this machine and itself
    )


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health", timeout=_CONNECT_SECONDS).is_success
    except httpx.TransportError:
        return False


def _models(client: httpx.Client) -> list[str]:
    return [str(row["id"]) for row in _get(client, "/v1/models").get("data", [])]


def _get(client: httpx.Client, path: str) -> dict[str, Any]:
    try:
        answer = client.get(path)
        answer.raise_for_status()
        return cast("dict[str, Any]", answer.json())
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(f"{client.base_url}: no vLLM server answers there ({error}); start it, or correct url") from error


def _remote_key(runtime: Vllm) -> str | None:
    if runtime.key_variable is None:
        return None
    key = os.environ.get(runtime.key_variable)
    if not key:
        raise MissingError(f"the key for {runtime.url} is not there: set the environment variable {runtime.key_variable}")
    return key


def _remote_model(runtime: Vllm, client: httpx.Client, artifact: Path) -> str:
    """Return the name under which the server at `url` serves the artifact.

    Raises:
        ServerError: it serves something else; measuring that would say nothing of the artifact.
    """
    served = {str(row["id"]): str(row.get("root", "")) for row in _get(client, "/v1/models").get("data", [])}
    for name, root in served.items():
        if Path(root).resolve() == artifact.resolve():
            return name
    shown = ", ".join(root or name for name, root in served.items()) or "no model"
    raise ServerError(f"{runtime.url} serves {shown}, not {artifact}; start it with that folder, or leave out url")

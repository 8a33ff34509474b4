"""What a runtime offers is what its sessions' classes implement, and nothing else."""

import inspect
from typing import cast

import pytest

from compress.recipe.schema import load_attribute, load_row
from compress.runtimes import RUNTIMES
from compress.runtimes.embedding import EmbeddingSession
from compress.runtimes.endpoint.session import EndpointSession
from compress.runtimes.onnxruntime.session import OnnxruntimeSession
from compress.runtimes.onnxruntime_genai.session import OnnxruntimeGenaiSession
from compress.runtimes.runtime import CAPABILITIES, Runtime, Served, ServingRuntime
from compress.runtimes.server_session import ServerSession
from compress.runtimes.transformers.session import TransformersSession
from compress.runtimes.vllm.session import ScoringSession, VllmSession

SESSIONS: dict[str, tuple[type, ...]] = {
    "endpoint": (VllmSession, ScoringSession, EndpointSession, ServerSession),
    "onnxruntime": (OnnxruntimeSession, EmbeddingSession),
    "onnxruntime-genai": (OnnxruntimeGenaiSession,),
    "transformers": (TransformersSession, EmbeddingSession),
    "vllm": (VllmSession,),
}
METHODS = {capability: {name for name in vars(capability) if not name.startswith("_")} for capability in CAPABILITIES}


def implements(session: type, capability: type) -> bool:
    """Return whether a class has a protocol's methods; an endpoint is there once the session is made."""
    return METHODS[capability] - {"endpoint", "block"} <= {name for name in dir(session) if not name.startswith("_")}


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_offers_what_its_sessions_implement(name: str) -> None:
    row = cast("type[Runtime]", load_row(RUNTIMES, name))
    assert row.offers == {each for each in CAPABILITIES for session in SESSIONS[name] if implements(session, each)}


@pytest.mark.parametrize("name", RUNTIMES)
def test_what_a_runtime_points_to_is_there_and_takes_what_it_is_given(name: str) -> None:
    row = cast("type[Runtime]", load_row(RUNTIMES, name))
    assert list(inspect.signature(load_attribute(row.opener)).parameters)[:2] == ["runtime", "context"]
    assert list(inspect.signature(load_attribute(row.component_timer)).parameters) == [
        "runtime",
        "context",
        "point",
        "prompt",
        "repeats",
    ]
    if issubclass(row, ServingRuntime):
        assert list(inspect.signature(load_attribute(row.server)).parameters) == ["runtime", "context"]
    assert issubclass(row, ServingRuntime) or Served not in row.offers  # what a harness can ask, a load generator can too

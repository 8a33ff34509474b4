"""Measuring latency as a whole: with servers that speak the API in this process, and with vLLM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
import pytest

from compress.errors import ServerError
from compress.eval.latency.measure import LatencyContext, measure_latency
from compress.eval.latency.results import Latency
from compress.eval.latency.settings import LatencySettings
from compress.families.resolve import family_at
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext, RunningServer, ServingRuntime
from compress.runtimes.vllm.memory_fallback import MemoryFallback
from tests.eval.stream_server import Body, Reply, StreamServer, stream_server, whole_answer

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "model"
SILENT = Silent()


class Streaming(ServingRuntime):
    """A runtime whose server lives in this process; `started` notes which artifacts were served, in order."""

    revision: ClassVar[int] = 1
    kl_definition: ClassVar[str] = "none"
    started: ClassVar[list[str]] = []
    servers: ClassVar[list[StreamServer]] = []
    reply: ClassVar[Reply] = staticmethod(whole_answer)
    lowers_at: ClassVar[int] = -1
    process: ClassVar[int | None] = None

    runtime: Literal["streaming"]

    def versions(self) -> dict[str, str]:
        return {"streaming": "1"}

    def open(self, context: OpenContext) -> AbstractContextManager[Any]:
        raise NotImplementedError

    @contextmanager
    def serve(self, context: OpenContext) -> Generator[RunningServer]:
        with stream_server(type(self).reply) as server:
            self.started.append(context.name)
            self.servers.append(server)
            if len(self.started) == self.lowers_at:
                step = MemoryFallback(
                    rung="context", setting="max_model_len", value=1024, before="2,048", after="1,024", cause="no memory"
                )
                context.on_fallback(step)
            yield RunningServer(server.url, "the-model", None, self.process, lambda: "INFO serving\nCUDA out of memory")


def _runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **shape: Any) -> Streaming:
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path / "none"))
    fresh: dict[str, Any] = {"started": [], "servers": []}
    for name, value in (fresh | shape).items():
        monkeypatch.setattr(Streaming, name, value)
    return Streaming(runtime="streaming")


def _settings(**fields: object) -> LatencySettings:
    small = {"requests": 6, "warmup": 2, "rounds": 2, "images": 1, "resolution": [32, 32], "prompt_tokens": 4, "output_tokens": 3}
    return LatencySettings.model_validate({"concurrency": [1, 2], "component_repeats": 0} | small | fields)


def _measure(runtime: ServingRuntime, settings: LatencySettings, tmp_path: Path, names: Sequence[str] = ("awq",)) -> Latency:
    return measure_latency(
        runtime, DEMO, dict.fromkeys(names, DEMO), settings, LatencyContext(tmp_path / "logs", SILENT, family_at(DEMO))
    )


def test_models_alternate_and_get_the_same_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = _runtime(monkeypatch, tmp_path)
    latency = _measure(runtime, _settings(), tmp_path, ("awq", "gptq"))
    assert Streaming.started == ["original", "awq", "gptq", "gptq", "awq", "original"]
    asked = [sorted(str(body["messages"]) for body in server.asked) for server in Streaming.servers]
    assert asked[0] == asked[1] == asked[2]
    assert asked[3] == asked[4] == asked[5]
    assert not set(asked[0]) & set(asked[3]), "another round asks something else"
    assert [len(rows) for rows in asked] == [2 * (2 + 6)] * 6
    for model in (latency.original, *latency.artifacts.values()):
        assert [row.point.concurrency for row in model.points] == [1, 2]
        assert [(row.pooled.requests, row.pooled.failed, len(row.rounds)) for row in model.points] == [(12, 0, 2)] * 2
        assert model.points[0].pooled.client == "compress"
    assert not latency.original.points[0].ratios
    ratios = latency.artifacts["gptq"].points[1].ratios
    assert ratios.keys() >= {"ttft_p95", "e2el_p99", "request_rate", "output_token_rate"}
    assert all(ratios[name].interval is not None for name in ("ttft_p50", "e2el_p95", "request_rate", "output_token_rate"))


def test_failed_requests_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def sometimes(body: Body, number: int) -> list[bytes] | tuple[int, str]:
        return (503, "busy") if number % 4 == 3 else whole_answer(body, number)

    latency = _measure(_runtime(monkeypatch, tmp_path, reply=staticmethod(sometimes)), _settings(concurrency=1), tmp_path)
    (row,) = latency.artifacts["awq"].points
    assert (row.pooled.requests, row.pooled.failed, row.pooled.faults) == (12, 4, {"503: busy": 4})


def test_concurrency_is_found_for_each_shape_and_measured_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = _settings(concurrency="auto", max_concurrency=2, images=[0, 1], goal={"e2el_ms": 60_000})
    latency = _measure(_runtime(monkeypatch, tmp_path), settings, tmp_path)
    assert Streaming.started == ["original", "awq", "original", "awq", "awq", "original"]
    for model in (latency.original, latency.artifacts["awq"]):
        assert [best.shape.images for best in model.best] == [0, 1]
        assert all(best.concurrency in (1, 2) and all(trial.held for trial in best.trials) for best in model.best)
        assert {row.point.images for row in model.points if row.point.concurrency == 1} == {0, 1}
    assert latency.original.points[0].point == latency.artifacts["awq"].points[0].point
    assert latency.artifacts["awq"].points[0].ratios["goodput"].value > 0


def test_all_models_are_measured_with_what_the_last_one_came_up_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    latency = _measure(_runtime(monkeypatch, tmp_path, lowers_at=2), _settings(), tmp_path)
    assert Streaming.started == ["original", "awq", "original", "awq", "awq", "original"]
    assert [step.after for step in latency.steps] == ["1,024"]
    assert [len(row.rounds) for row in latency.original.points] == [2, 2]


def test_step_of_the_first_server_costs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    latency = _measure(_runtime(monkeypatch, tmp_path, lowers_at=1), _settings(), tmp_path)
    assert Streaming.started == ["original", "awq", "awq", "original"]
    assert len(latency.steps) == 1


def test_server_that_refuses_such_requests_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(body: Body, number: int) -> tuple[int, str]:
        del body, number
        return 400, "maximum context length is 8"

    runtime = _runtime(monkeypatch, tmp_path, reply=staticmethod(refuse))
    with pytest.raises(ServerError, match=r"maximum context length is 8\); ask for fewer tokens or smaller images"):
        _measure(runtime, _settings(), tmp_path)


def test_server_that_ends_under_load_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has ended already stands for a server that ran out of memory in the middle."""
    ended = subprocess.Popen(["/bin/true"])
    try:
        runtime = _runtime(monkeypatch, tmp_path, process=ended.pid)
        while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
            os.sched_yield()
        with pytest.raises(ServerError, match=r"its server ended under load \(1 at once, .*\); put less [\s\S]*CUDA out of memory"):
            _measure(runtime, _settings(), tmp_path)
    finally:
        ended.wait()

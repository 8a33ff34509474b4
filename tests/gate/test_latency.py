"""Limits on latency and memory: pass, fail or inconclusive by the interval, each with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from compress.errors import DataError
from compress.eval.latency.limits import LatencyLimit, MemoryLimit
from compress.eval.latency.results import Estimate, Latency, LoadResult, ModelLatency, PointLatency, read_latency, write_latency
from compress.eval.latency.settings import LatencySettings, LoadPoint
from compress.gate.gate import Check, Gate
from compress.gate.judge import judge
from tests.judged import subject

POINT = LoadPoint(concurrency=4, images=1, width=64, height=48, prompt_tokens=8, output_tokens=8)
GIB = 1024**3


def _row(failed: int = 0, **ratios: Estimate) -> PointLatency:
    result = LoadResult(
        requests=100,
        failed=failed,
        seconds=1.0,
        ttft=None,
        tpot=None,
        itl=None,
        e2el=None,
        request_rate=1.0,
        output_token_rate=1.0,
        faults={"503: busy": failed} if failed else {},
        client="compress",
    )
    figures = {
        "ttft_p95": Estimate(value=123.4, interval=(110.0, 140.0)),
        "output_token_rate": Estimate(value=50.0, interval=(45.0, 55.0)),
    }
    return PointLatency(point=POINT, pooled=result, rounds=(result,), figures=figures, ratios=ratios)


def _latency(row: PointLatency, before: PointLatency | None = None, memory: int | None = 3 * GIB) -> Latency:
    return Latency(
        revision=1,
        runtime="vllm",
        settings=LatencySettings.model_validate({"concurrency": 4}),
        hardware={"cores": 2},
        versions={"vllm": "1"},
        original=ModelLatency(name="original", points=(before or _row(),), memory_bytes=4 * GIB),
        artifacts={"awq": ModelLatency(name="awq", points=(row,), memory_bytes=memory)},
    )


def _checks(gate: dict[str, dict[str, float]], latency: Latency | None, name: str = "awq") -> tuple[Check, ...]:
    artifact = replace(subject(name, 40), latency=latency)
    return judge(Gate.model_validate(gate), subject("original", 100), [artifact]).checks


def _judge(limit: dict[str, float], row: PointLatency, before: PointLatency | None = None) -> tuple[Check, ...]:
    return _checks({"latency": limit}, _latency(row, before))


@pytest.mark.parametrize(
    ("limit", "outcome"), [(1.0, "pass"), (0.9, "pass"), (0.85, "inconclusive"), (0.7, "inconclusive"), (0.69, "fail")]
)
def test_ratio_is_judged_by_its_interval(limit: float, outcome: str) -> None:
    (finding,) = _judge({"max_p95_ratio": limit}, _row(e2el_p95=Estimate(value=0.8, interval=(0.7, 0.9))))
    assert (finding.check, finding.task, finding.value, finding.interval) == (
        "latency.max_p95_ratio",
        POINT.label,
        0.8,
        (0.7, 0.9),
    )
    assert (finding.verdict, finding.limit) == (outcome, limit)
    assert finding.reason.startswith(
        f"95th percentile of the time of a request: 0.8 (0.7 to 0.9) times the original's; the limit is at most {limit:g}"
    )
    assert finding.reason.endswith("more requests or rounds would settle it") == (outcome == "inconclusive")


@pytest.mark.parametrize(("limit", "outcome"), [(1.1, "pass"), (1.3, "inconclusive"), (1.6, "fail")])
def test_throughput_must_be_at_least_its_limit(limit: float, outcome: str) -> None:
    (finding,) = _judge({"min_throughput_ratio": limit}, _row(output_token_rate=Estimate(value=1.3, interval=(1.2, 1.4))))
    assert finding.verdict == outcome
    assert f"1.3 (1.2 to 1.4) times the original's, 50 itself; the limit is at least {limit:g}" in finding.reason


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [
        ({"max_ttft_p95_ms": 150}, "pass"),
        ({"max_ttft_p95_ms": 120}, "inconclusive"),
        ({"min_output_tokens_per_second": 60}, "fail"),
    ],
)
def test_absolute_limits_are_of_the_artifact_alone(limit: dict[str, float], outcome: str) -> None:
    (finding,) = _judge(limit, _row())
    assert finding.verdict == outcome


def test_absolute_reason_has_its_unit() -> None:
    (finding,) = _judge({"max_ttft_p95_ms": 150}, _row())
    assert finding.reason == "95th percentile of the time to the first token: 123.4 ms (110 to 140); the limit is at most 150 ms"


def test_failed_requests_fail_unless_they_are_allowed() -> None:
    row = _row(failed=3, e2el_p95=Estimate(value=0.5, interval=(0.4, 0.6)))
    failed, ratio = _judge({"max_p95_ratio": 1.0}, row)
    assert (failed.check, failed.verdict, failed.value) == ("latency.max_failed_share", "fail", 0.03)
    assert failed.reason == "3 of 100 requests had no answer (503: busy); 0.0% may"
    assert ratio.verdict == "pass"
    assert [finding.check for finding in _judge({"max_p95_ratio": 1.0, "max_failed_share": 0.05}, row)] == ["latency.max_p95_ratio"]


def test_ratio_to_an_original_that_failed_is_open() -> None:
    (finding,) = _judge({"max_p95_ratio": 1.0}, _row(e2el_p95=Estimate(value=0.5, interval=(0.4, 0.6))), before=_row(failed=1))
    assert (finding.verdict, finding.value) == ("inconclusive", None)
    assert "1 of the original's 100 requests had no answer, so there is nothing sound to compare with" in finding.reason


def test_what_was_not_measured_is_open_not_left_out() -> None:
    (figure,) = _judge({"min_goodput_ratio": 1.0}, _row())
    assert (figure.verdict, figure.reason) == (
        "inconclusive",
        "requests per second that keep the goal: was not measured (set eval.latency.goal)",
    )
    (single,) = _judge({"max_p95_ratio": 1.0}, _row(e2el_p95=Estimate(value=0.5)))
    assert (single.verdict, single.value) == ("inconclusive", 0.5)
    nothing = _checks({"latency": {"max_p95_ratio": 1.0, "min_throughput_ratio": 1.0}}, _latency(_row()), "gptq")
    assert [(finding.check, finding.verdict) for finding in nothing] == [
        ("latency.max_p95_ratio", "inconclusive"),
        ("latency.min_throughput_ratio", "inconclusive"),
    ]


@pytest.mark.parametrize(
    ("limit", "outcomes"), [({"max_ratio": 0.8}, ["pass"]), ({"max_ratio": 0.7, "max_bytes": 4 * GIB}, ["fail", "pass"])]
)
def test_memory_is_judged_as_it_was_seen(limit: dict[str, float], outcomes: list[str]) -> None:
    findings = _checks({"memory": limit}, _latency(_row()))
    assert [row.verdict for row in findings] == outcomes
    assert findings[0].reason.startswith("the server holds 3.00 GiB at most, 75.0% of the original's 4.00 GiB; the limit is")


def test_memory_that_was_not_seen_is_open() -> None:
    findings = _checks({"memory": {"max_ratio": 1.0, "max_bytes": 1}}, _latency(_row(), memory=None))
    assert [(row.verdict, row.value) for row in findings] == [("inconclusive", None)] * 2
    assert "does not run on this machine" in findings[0].reason


def test_a_target_without_a_load_leaves_both_open() -> None:
    checks = _checks({"latency": {"max_p95_ratio": 1.0}, "memory": {"max_ratio": 1.0}}, None)
    assert [(check.check, check.verdict) for check in checks] == [("latency", "inconclusive"), ("memory", "inconclusive")]
    assert checks[0].reason == "no load was put on a server at target local, so its latency is not known"


def test_limits_must_say_something() -> None:
    with pytest.raises(ValidationError, match="sets no limit; write at least one of max_p50_ratio"):
        LatencyLimit(max_failed_share=0.1)
    with pytest.raises(ValidationError, match="sets no limit; write max_ratio, max_bytes or both"):
        MemoryLimit()
    assert LatencyLimit(min_goodput=1.0).needs_goal
    assert not LatencyLimit(max_p95_ratio=1.0).needs_goal


def test_results_survive_the_file(tmp_path: Path) -> None:
    latency = _latency(_row(failed=1, e2el_p95=Estimate(value=0.5, interval=(0.4, 0.6))))
    write_latency(tmp_path, latency)
    assert read_latency(tmp_path) == latency
    (tmp_path / "latency.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"latency.json: no latency measurement; measure again with --fresh"):
        read_latency(tmp_path)
    with pytest.raises(DataError, match=r"latency.json: cannot be read"):
        read_latency(tmp_path / "nowhere")

"""What `vllm bench serve` writes, as it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ServerError
from compress.eval.latency.bench_serve import Bench, bench_serve, read_bench
from compress.eval.latency.figures import summarize
from compress.eval.latency.settings import LoadPoint
from compress.runtimes.runtime import Environment, RunningServer
from compress.untrusted.redaction import remember_secret

RESULT: dict[str, Any] = {
    "duration": 2.0,
    "completed": 2,
    "failed": 1,
    "ttfts": [0.5, 0.25, 0.0],
    "itls": [[0.0, 0.1, 0.2], [0.0, 0.3, 0.1], []],
    "output_lens": [3, 3, 0],
    "errors": ["", "", "Traceback (most recent call last):\n  File …\nConnectionResetError: Connection lost\n"],
    "start_times": [100.5, 100.25, 101.0],
}


def test_result_is_read_request_by_request(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(RESULT), encoding="utf-8")
    load = read_bench(path)
    assert [sample.fault for sample in load.samples] == [None, None, "ConnectionResetError: Connection lost"]
    assert (load.seconds, load.began, load.client) == (2.0, 100.25, "vllm bench serve")
    assert load.samples[0].between_tokens == (0.1, 0.2)
    result = summarize(load, None)
    assert (result.requests, result.failed, result.output_token_rate) == (3, 1, 3.0)
    assert result.e2el is not None
    assert result.e2el.mean == pytest.approx(725)
    assert result.tpot is not None
    assert result.tpot.mean == pytest.approx(175)


@pytest.mark.parametrize("content", ["{}", "no json", json.dumps(RESULT | {"itls": []}), json.dumps(RESULT | {"duration": None})])
def test_other_content_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ServerError, match=r"bench.json: holds no result of vllm bench serve for each request .* install vLLM anew"):
        read_bench(path)


def test_what_the_client_saves_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers repeat keys in what they say of a failure, and the client writes that down; a program stands for the client."""
    key = "sk-the-secret-0123456789"
    monkeypatch.setattr("compress.untrusted.redaction._noted", dict[str, None]())
    remember_secret(key)
    saved = json.dumps(RESULT | {"errors": ["", "", f"401: Incorrect API key provided: {key}\x9b"]})
    (tmp_path / "saved.json").write_text(saved, encoding="utf-8")
    program = tmp_path / "python"
    lines = ["#!/bin/sh", 'while [ "$1" != --result-dir ]; do shift; done', f'cp {tmp_path}/saved.json "$2/$4"']
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    program.chmod(0o755)
    bench = Bench(Environment("vllm", program), tmp_path / "model", tmp_path / "logs", 1.0)
    point = LoadPoint(concurrency=2, images=0, width=64, height=48, prompt_tokens=8, output_tokens=8)
    load = bench_serve(bench, RunningServer("http://127.0.0.1:1", "m", key), point, 3, 7)
    assert [sample.fault for sample in load.samples] == [None, None, "401: Incorrect API key provided: …\\x9b"]
    (kept,) = (tmp_path / "logs").glob("*.json")
    assert json.loads(kept.read_text(encoding="utf-8"))["ttfts"] == RESULT["ttfts"]
    assert key not in kept.read_text(encoding="utf-8")


def test_client_that_fails_is_told_with_its_last_lines_and_without_the_key(tmp_path: Path) -> None:
    """A Python without vLLM stands for a broken environment: it fails at once."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@" 1>&2\necho "No module named vllm"\nexit 3\n', encoding="utf-8")
    program.chmod(0o755)
    bench = Bench(Environment("vllm", program), tmp_path / "model", tmp_path / "logs", 1.0)
    point = LoadPoint(concurrency=2, images=1, width=64, height=48, prompt_tokens=8, output_tokens=8)
    with pytest.raises(ServerError, match=r"vllm bench serve ended without a result\.\nThe last lines of .*\.log:\n") as raised:
        bench_serve(bench, RunningServer("http://127.0.0.1:1", "m", "the-secret"), point, 4, 7)
    words = str(raised.value)
    assert words.endswith("\n  No module named vllm\n  The server ended with exit code 3.")
    assert "the-secret" not in words
    assert "--random-mm-bucket-config {(48, 64, 1): 1.0}" in words
    assert "--seed 7" in words

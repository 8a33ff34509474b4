"""A hub cache that can only be read and has what is asked for, the hub being reached or not, and its snapshot as a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hub_server import Repo, hub_server
from tests.jobs import Job, make_job
from tests.read_only import compress_with_read_only

_FILL = (
    "from compress.hubs import huggingface as hub\n"
    "pin = hub.list_files('model', 'acme/tiny', 'main')\n"
    "hub.fetch(pin, pin.files, lambda count: None)"
)
_COMMIT = Repo({}).commit


def commands(job: Job, source: str) -> list[str]:
    text = {"task": "perplexity", "dataset": "text", "source": str(job.folder / "test.txt"), "window": 32, "samples": 4}
    settings = {"model.source": source, "eval.tasks": [text], "export": [{"format": "vllm", "layout": "awq"}]}
    return job.arguments("--json", *(f"--set={name}={json.dumps(value)}" for name, value in settings.items()))


def contents(folder: Path) -> dict[str, str | bytes]:
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def test_a_cache_that_can_only_be_read_is_enough(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", layers=1)
    cache = tmp_path / "cache"
    with hub_server() as server:
        server.repos["model", "acme/tiny"] = Repo({path.name: path.read_bytes() for path in (job.folder / "model").iterdir()})
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
        subprocess.run([sys.executable, "-c", _FILL], env=environment, check=True)
        (cache / "hub" / "models--acme--tiny" / "refs" / "main").unlink()  # filled by commit: online, the client would note it
        before, fetched = contents(cache), list(server.served)

        online = compress_with_read_only(cache, *commands(job, "acme/tiny"), environment=environment)
        assert online.returncode == 0, online.stderr
        assert server.served == fetched
    first: dict[str, Any] = json.loads(online.stdout)
    assert first["source"]["commit"] == _COMMIT

    offline = environment | {"HF_HUB_OFFLINE": "1"}
    by_commit = [*commands(job, "acme/tiny"), f"--set=model.revision={_COMMIT}"]
    again = compress_with_read_only(cache, *by_commit, environment=offline)
    assert again.returncode == 0, again.stderr
    second: dict[str, Any] = json.loads(again.stdout)
    assert {timing["step"] for timing in second["timings"] if not timing["cached"]} <= {"export vllm-awq", "measure vllm-awq"}
    assert figures(second) == figures(first)

    snapshot = cache / "hub" / "models--acme--tiny" / "snapshots" / _COMMIT
    assert all(path.is_symlink() for path in snapshot.iterdir())
    folder = compress_with_read_only(cache, *commands(job, str(snapshot)), environment=offline)
    assert folder.returncode == 0, folder.stderr
    assert figures(json.loads(folder.stdout)) == figures(first)
    assert contents(cache) == before
    for path in (job.published / "tiny" / "vllm-awq").iterdir():
        assert not path.is_symlink()


def figures(report: dict[str, Any]) -> list[object]:
    return [[row["artifact"], row["bytes"], row["metrics"], row["fidelity"]] for row in report["rows"]]


def test_what_the_read_only_cache_lacks_is_told(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", layers=1)
    cache = tmp_path / "cache"
    cache.mkdir()
    with hub_server() as server:
        server.repos["model", "acme/tiny"] = Repo({path.name: path.read_bytes() for path in (job.folder / "model").iterdir()})
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
        done = compress_with_read_only(cache, *commands(job, "acme/tiny"), environment=environment)
    assert done.returncode == 3, done.stderr
    assert str(cache) in json.loads(done.stdout)["error"]
    assert list(cache.iterdir()) == []

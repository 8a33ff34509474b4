"""Two thousand questions with images, asked of a server that fails, stalls, talks nonsense and goes away for a while."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from compress.data.prompts import Prompt
from compress.data.tables import read_rows
from compress.eval.journal import answer_all
from compress.families.qwen2_5_vl import QWEN2_5_VL
from compress.progress import Silent
from compress.runtimes.endpoint.runtime import Endpoint, EndpointModel
from compress.runtimes.runtime import OpenContext
from tests.chaos_server import MODEL, SECONDS, Manners, Refusal, StandIn, Trouble, answer_to, digest_of, stand_in

ITEMS = 2000


def square(number: int) -> bytes:
    """Return a small picture of one colour."""
    content = io.BytesIO()
    Image.new("RGB", (14, 14), (number * 12, 100, 200)).save(content, "PNG")
    return content.getvalue()


def questions(count: int) -> list[Prompt]:
    images = [square(number) for number in range(20)]
    return [
        Prompt(f"q{number}", f"What is in picture {number}?", tuple(images[(number + place) % 20] for place in range(number % 3)))
        for number in range(count)
    ]


def runtime(url: str) -> Endpoint:
    return Endpoint(
        runtime="endpoint", original=EndpointModel(url=url, model=MODEL), artifacts={}, concurrency=32, request_seconds=12
    )


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_every_item_is_accounted_for(tmp_path: Path) -> None:
    prompts = questions(ITEMS)
    refused = {"picture 77?": Refusal(400, "the image is too large"), "picture 1234?": Refusal(500, "it stumbles here each time")}
    trouble = Trouble(failing=0.03, resetting=0.02, stalling=0.005, malformed=0.02, truncated=0.01, restart_after=900)
    with stand_in(trouble, Manners(statuses=refused)) as server:
        with runtime(server.url).open(OpenContext(tmp_path, tmp_path, Silent(), QWEN2_5_VL)) as session:
            answers = answer_all(session, prompts, 8, tmp_path, "scenes", Silent())
        happened = server.happened
        assert happened["restart"] == 1
        for kind, least in {"fail": 40, "reset": 25, "stall": 4, "malform": 25, "truncate": 10}.items():
            assert happened[kind] > least, kind
    assert [answer.id for answer in answers] == [prompt.id for prompt in prompts]
    failed = {answer.id: answer.fault for answer in answers if answer.fault is not None}
    assert failed == {"q77": "400: the image is too large", "q1234": "500: it stumbles here each time"}
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.text == ("" if answer.fault else answer_to(prompt))
    kept = [row for path in (tmp_path / "journal" / "scenes").glob("*.parquet") for row in read_rows(path)]
    assert sorted(str(row["id"]) for row in kept) == sorted(prompt.id for prompt in prompts)


PROGRAM = """
import json, sys
from pathlib import Path
from compress.eval.journal import answer_all
from compress.progress import Silent
from compress.families.qwen2_5_vl import QWEN2_5_VL
from compress.runtimes.runtime import OpenContext
from tests.runtimes.test_chaos import questions, runtime
folder = Path(sys.argv[2])
prompts = questions(int(sys.argv[3]))
with runtime(sys.argv[1]).open(OpenContext(folder, folder, Silent(), QWEN2_5_VL)) as session:
    answers = answer_all(session, prompts, 8, folder, "scenes", Silent())
print(json.dumps([[answer.id, answer.text] for answer in answers]))
"""


def start(server: StandIn, folder: Path, count: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PROGRAM, server.url, str(folder), str(count)]
    root = Path(__file__).parent.parent.parent
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


def kept_in(folder: Path) -> set[str]:
    parts = (folder / "journal" / "scenes").glob("answers-*.parquet")
    return {str(row["id"]) for path in parts for row in read_rows(path)}


def wait_for_part(folder: Path) -> None:
    """Wait until a part of the journal is there: the last answers that were sent may not have been read yet."""
    deadline, pause = time.monotonic() + SECONDS, threading.Event()
    while not kept_in(folder):
        assert time.monotonic() < deadline
        pause.wait(0.05)


def test_a_measurement_that_is_killed_asks_only_for_the_rest(tmp_path: Path) -> None:
    """The server holds back all answers after the 300th, so that the process is killed while it waits for the others."""
    prompts = questions(500)
    with stand_in(Trouble(failing=0.05, hold_after=300)) as server:
        process = start(server, tmp_path, len(prompts))
        server.wait(300)
        wait_for_part(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = kept_in(tmp_path)
        assert 0 < len(kept) <= 300 + 32
        digests = {prompt.id: digest_of(prompt.text, prompt.images) for prompt in prompts}
        before = server.asked.copy()
        server.release()
        done = start(server, tmp_path, len(prompts))
        out, _ = done.communicate(timeout=SECONDS)
        assert done.returncode == 0
        assert {name: server.asked[digests[name]] - before[digests[name]] for name in kept} == dict.fromkeys(kept, 0)
        assert json.loads(out) == [[prompt.id, answer_to(prompt)] for prompt in prompts]
        assert kept_in(tmp_path) == set(digests)

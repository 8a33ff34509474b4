"""Items per second of this package's evaluation beside lmms-eval's, both asking the same vLLM server the same questions.

    compress runtime install vllm
    compress runtime install lmms-eval          # prints that environment's python
    python -m benchmarks.throughput --peer PYTHON --output benchmarks/results/throughput.json

One server with the demo's model and the 400 questions of its test set, or with `--model` and `--questions`; the same number of
requests at once and at most the same number of tokens, greedy. Each side is timed from its task in memory to all answers in
memory: for lmms-eval that is `generate_until` of its class for OpenAI-compatible servers, for this package reading the questions
and `answer_all`, with its journal of answers on disk. Starting Python, importing and loading the data set is left out, which is in
lmms-eval's favour. The sides take turns, and change who is first; each row has the median of its rounds, and `ratio` is the median
of the ratios of the two sides' rates in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from compress.data.prompts import Prompt
from compress.data.sources import QuestionSource
from compress.eval.journal import answer_all
from compress.eval.tasks.task import draw_questions
from compress.files import write_json
from compress.hardware import describe
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.vllm.runtime import Vllm
from compress.runtimes.vllm.session import VllmSession
from compress.workers.environment import require

DEMO = Path("recipes/demo")
PEER = Path(__file__).with_name("throughput_peer.py")
MAX_NEW_TOKENS = 4
KEY = "COMPRESS_BENCHMARK_KEY"


def main() -> None:
    """Measure both sides at each number of requests at once, and write the figures."""
    parser = argparse.ArgumentParser(description="Items per second beside lmms-eval.")
    parser.add_argument("--peer", type=Path, required=True, help="python of lmms-eval's environment")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--questions", type=Path, default=DEMO / "test.parquet")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(given, concurrency, Path(folder)) for concurrency in given.concurrency]
    versions = {**require("vllm").versions, **require("lmms-eval").versions, "python": platform.python_version()}
    loads = [round(each, 1) for each in os.getloadavg()]  # over 1, 5 and 15 minutes, what was measured among it
    report = {
        "model": given.model.name,
        "rows": rows,
        "load_average": loads,
        "max_new_tokens": MAX_NEW_TOKENS,
        "versions": versions,
        "hardware": describe(),
    }
    write_json(given.output, report)
    for row in rows:
        print(row["concurrency"], row["compress"]["items_per_second"], row["lmms-eval"]["items_per_second"], row["ratio"])


def measure(given: argparse.Namespace, concurrency: int, folder: Path) -> dict[str, Any]:
    """Return both sides' figures with so many requests at once; a first round warms up."""
    runtime = Vllm(runtime="vllm", max_model_len=512, concurrency=concurrency)
    opening = OpenContext.at(given.model.absolute(), folder / "logs", Silent())
    seconds: dict[str, list[float]] = {"compress": [], "lmms-eval": []}
    with runtime.open(opening) as session:
        assert isinstance(session, VllmSession)
        with peer(given, session, concurrency, folder) as ask:
            said = {"compress": ask_ourselves(session, given.questions, folder), "lmms-eval": ask()}
            for number in range(given.rounds):
                sides = [("compress", lambda: ask_ourselves(session, given.questions, folder)), ("lmms-eval", ask)]
                for name, side in sides if number % 2 else sides[::-1]:
                    seconds[name].append(side()[0])
    ours, theirs = said["compress"][1], said["lmms-eval"][1]
    rates = {name: [len(ours) / each for each in taken] for name, taken in seconds.items()}
    ratios = [one / other for one, other in zip(rates["compress"], rates["lmms-eval"], strict=True)]
    return {
        "concurrency": concurrency,
        "items": len(ours),
        "rounds": given.rounds,
        "same_answers": sum(one.strip() == other.strip() for one, other in zip(ours, theirs, strict=True)),
        **{name: figures(values) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def figures(rates: list[float]) -> dict[str, float]:
    """Return the median and the range of some rates."""
    return {
        "items_per_second": round(statistics.median(rates), 1),
        "least": round(min(rates), 1),
        "most": round(max(rates), 1),
    }


def ask_ourselves(session: VllmSession, source: Path, folder: Path) -> tuple[float, list[str]]:
    """Return the seconds from the file of questions to all answers, and what was said."""
    target = folder / "measurement"
    began = time.perf_counter()
    questions = draw_questions([source], QuestionSource(source=str(source)), None, 0)
    prompts = [Prompt(id=question.id, text=question.question, images=question.images) for question in questions]
    answers = answer_all(session, prompts, MAX_NEW_TOKENS, target, "scenes", Silent())
    taken = time.perf_counter() - began
    assert not any(answer.fault for answer in answers)
    shutil.rmtree(target)
    return taken, [answer.text for answer in answers]


@contextmanager
def peer(given: argparse.Namespace, session: VllmSession, concurrency: int, folder: Path) -> Generator[Any]:
    """Start lmms-eval beside the server, its task loaded; give what asks all of it once more."""
    client = session.endpoint.client
    job = {
        "url": str(client.base_url).rstrip("/"),
        "model": session.endpoint.model,
        "data": str(given.questions.absolute()),
        "concurrency": concurrency,
        "max_new_tokens": MAX_NEW_TOKENS,
        "folder": str(folder / "task"),
    }
    key = str(client.headers["Authorization"]).removeprefix("Bearer ")
    with (
        (folder / "peer.log").open("a") as log,
        subprocess.Popen(
            [str(given.peer), "-I", str(PEER), json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | {KEY: key, "CUDA_VISIBLE_DEVICES": ""},
        ) as process,
    ):  # fmt: skip
        sent, heard = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)

        def ask() -> tuple[float, list[str]]:
            sent.write("again\n")
            sent.flush()
            while line := heard.readline():
                if line.startswith("{"):
                    told = json.loads(line)
                    return told["seconds"], told["said"]
            raise SystemExit(f"lmms-eval ended:\n{(folder / 'peer.log').read_text()[-2000:]}")

        yield ask
        sent.close()


if __name__ == "__main__":
    main()

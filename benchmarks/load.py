"""Load of compress's own client beside `vllm bench serve`, in alternation on one server: what the own client costs.

    compress runtime install vllm
    python -m benchmarks.load --model recipes/demo/model --rounds 10 --output benchmarks/results/load.json

Two servers are asked. vLLM itself with the model, where a client's work takes time from the server on a small machine. And a
paced one that sends its tokens by the clock, whatever the client does: there the times themselves are known, and what is above
them is the client's. Each round puts the same kind of load (requests, images, lengths, concurrency) on with both clients, every
second round in the opposite order. `overhead` is how much longer requests take, or how many fewer are answered per second, with the
own client than with vLLM's: the median over rounds, with an interval by the signs of the rounds (95 %).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scipy.stats import binom

from compress.eval.latency.bench_serve import Bench, bench_serve
from compress.eval.latency.figures import summarize
from compress.eval.latency.load_generator import DIALECTS, Load, make_requests, run_load, warm_up
from compress.eval.latency.results import LoadResult
from compress.eval.latency.settings import LoadPoint
from compress.files import write_json
from compress.hardware import describe
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext, RunningServer
from compress.runtimes.vllm.runtime import Vllm
from compress.workers.environment import require

FIGURES: dict[str, Callable[[LoadResult], float]] = {
    "e2el_p50": lambda result: result.e2el.p50 if result.e2el else float("nan"),
    "e2el_mean": lambda result: result.e2el.mean if result.e2el else float("nan"),
    "ttft_p50": lambda result: result.ttft.p50 if result.ttft else float("nan"),
    "seconds_per_request": lambda result: 1 / result.request_rate,
}


def main() -> None:
    arguments = _arguments()
    point = LoadPoint(
        concurrency=arguments.concurrency,
        images=1,
        width=arguments.side,
        height=arguments.side,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
    )
    result: dict[str, Any] = {
        "what": "the own load client beside vllm bench serve on one server: overhead = own / vLLM's - 1",
        "point": point.model_dump(),
        "requests": arguments.requests,
        "machine": describe(),
        "versions": require("vllm").versions,
        "load_average_before": os.getloadavg(),
        "servers": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(require("vllm"), arguments.model, folder, 600.0)
        with _paced(arguments.first_ms, arguments.token_ms) as served:
            known = arguments.first_ms + arguments.output_tokens * arguments.token_ms
            result["servers"]["paced"] = {"known_e2el_ms": known} | _alternate(served, bench, point, arguments)
        runtime = Vllm(runtime="vllm", kv_cache_gib=1, max_model_len=512)
        with runtime.serve(OpenContext.at(arguments.model, folder, Silent())) as served:
            result["servers"]["vllm"] = _alternate(served, bench, point, arguments)
    result["load_average_after"] = os.getloadavg()
    print(json.dumps(result["servers"], indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def _alternate(served: RunningServer, bench: Bench, point: LoadPoint, arguments: argparse.Namespace) -> dict[str, Any]:
    warm_up(served, make_requests(bench.artifact, point, 8, 1), 600.0)

    def own(seed: int) -> Load:
        requests = make_requests(bench.artifact, point, arguments.requests, seed)
        return run_load(served, requests.bodies(served.model, DIALECTS[0]), point.concurrency, 600.0, point.output_tokens)

    def theirs(seed: int) -> Load:
        return bench_serve(bench, served, point, arguments.requests, seed)

    clients = {"compress": own, "vllm bench serve": theirs}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
    for number in range(arguments.rounds):
        for name in clients if number % 2 == 0 else reversed(clients):
            result = summarize(clients[name](100 + number), None)
            if result.failed:
                raise SystemExit(f"{name}: {result.failed} requests failed: {result.faults}")
            found[name].append({figure: take(result) for figure, take in FIGURES.items()})
        print(
            number,
            {name: {key: round(value, 4) for key, value in rows[-1].items()} for name, rows in found.items()},
            file=sys.stderr,
        )
    ours, peers = found["compress"], found["vllm bench serve"]
    overhead = {figure: _overhead([row[figure] for row in ours], [row[figure] for row in peers]) for figure in FIGURES}
    return {"overhead": overhead, "rounds": found}


def _overhead(own: list[float], theirs: list[float]) -> dict[str, Any]:
    ratios = sorted(first / second - 1 for first, second in zip(own, theirs, strict=True))
    place = int(binom.ppf(0.025, len(ratios), 0.5))  # the order statistics that hold the median in 95 % of samples
    interval = [ratios[place - 1], ratios[-place]] if place >= 1 else None
    return {"median": statistics.median(ratios), "interval": interval}


@contextmanager
def _paced(first_ms: float, token_ms: float) -> Generator[RunningServer]:
    """Serve answers whose tokens come by the clock, from a thread of its own."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    port: list[int] = []
    stopping = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(lambda reader, writer: _answer(reader, writer, first_ms, token_ms), "127.0.0.1", 0)
        port.append(server.sockets[0].getsockname()[1])
        ready.set()
        async with server:
            await stopping.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield RunningServer(f"http://127.0.0.1:{port[0]}", "paced", None, 0)
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first_ms: float, token_ms: float) -> None:
    loop = asyncio.get_running_loop()

    def send(content: str) -> None:
        data = f"data: {content}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def token(delta: dict[str, str], finish: str | None) -> str:
        return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if not head.startswith("POST"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length"))
            count = int(json.loads(await reader.readexactly(length))["max_completion_tokens"])
            moment = loop.time() + first_ms / 1000
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            await asyncio.sleep(moment - loop.time())
            send(token({"role": "assistant", "content": ""}, None))
            for place in range(count):
                moment += token_ms / 1000
                await asyncio.sleep(max(moment - loop.time(), 0))
                send(token({"content": "word "}, "length" if place == count - 1 else None))
            send(json.dumps({"choices": [], "usage": {"completion_tokens": count}}))
            send("[DONE]")
            writer.write(b"0\r\n\r\n")
            await writer.drain()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("recipes/demo/model"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--first-ms", type=float, default=50.0)
    parser.add_argument("--token-ms", type=float, default=5.0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

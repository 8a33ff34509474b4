"""A running server of one model, and the loads that are run on it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from compress.errors import ServerError
from compress.eval.latency.bench_serve import Bench, bench_serve
from compress.eval.latency.load_generator import DIALECTS, Load, make_requests, run_load, warm_up
from compress.eval.latency.results import Telemetry
from compress.eval.latency.settings import LatencySettings, LoadPoint
from compress.eval.latency.telemetry import ServerMonitor, monitor_server
from compress.runtimes.runtime import OpenContext, RunningServer, ServingRuntime
from compress.workers.environment import find
from compress.workers.exit_reason import describe_exit

_REQUEST_SECONDS = 600.0
"""The time limit of a request where the runtime has no `request_seconds`."""


@dataclass(frozen=True)
class ServerUnderLoad:
    """A running server with its load generator."""

    served: RunningServer
    context: OpenContext
    settings: LatencySettings
    bench: Bench | None
    """vLLM's own client, used where it is installed and the server accepts its requests; else this package's generator."""

    request_seconds: float
    monitor: ServerMonitor

    def run_load(self, point: LoadPoint, label: str) -> tuple[Load, Telemetry]:
        """Run one load on the server, after warm-up requests; `label` is mixed into the seed, so that loads share no requests.

        Raises:
            ServerError: the server does not answer a request of such a size, or ended.
            MissingError: the artifact has no tokenizer that can be read.
        """
        artifact, settings = self.context.artifact, self.settings
        warmup_requests = make_requests(artifact, point, settings.warmup, settings.seed_of(point, f"warm-up {label}"))
        try:
            dialect = warm_up(self.served, warmup_requests, self.request_seconds)
        except ServerError:
            self._check(point)
            raise
        count, seed = settings.requests_at(point), settings.seed_of(point, label)
        # vLLM's client where it can be used: its figures are the ones that others publish. It takes no other dialect.
        if self.bench is not None and dialect == DIALECTS[0]:
            load = bench_serve(self.bench, self.served, point, count, seed)
        else:
            bodies = make_requests(artifact, point, count, seed).bodies(self.served.model, dialect)
            load = run_load(self.served, bodies, point.concurrency, self.request_seconds, point.output_tokens)
        self._check(point)
        # Energy per answered request: failed ones cost energy, too, and gave nothing.
        answered = sum(sample.fault is None for sample in load.samples)
        return load, self.monitor.during(load.began, load.seconds, answered)

    def _check(self, point: LoadPoint) -> None:
        if self.served.process is not None and _has_ended(self.served.process):
            raise ServerError(
                f"{self.context.artifact}: its server ended under load ({point.label}); put less on it, or give it less memory"
                f"{describe_exit(self.served.read_log(), None)}"
            )


def _has_ended(process: int) -> bool:
    """Return whether a child process has ended; it stays as a zombie until it is waited for."""
    try:
        # The worker's own thread waits for it later: until then its id is still taken.
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def serve_under_load(runtime: ServingRuntime, context: OpenContext, settings: LatencySettings) -> Generator[ServerUnderLoad]:
    """Start a model's server, alone on the machine, and end it with the context.

    Raises:
        MissingError: it is not installed, or the server did not come up.
    """
    seconds = float(getattr(runtime, "request_seconds", _REQUEST_SECONDS))
    # Whatever the runtime: the client only needs vLLM's environment, not its server.
    environment = find("vllm")
    bench = None
    if environment is not None:
        bench = Bench(environment, context.artifact, context.logs, seconds, context.trust_remote_code)
    with runtime.serve(context) as served, monitor_server(served.process, served.read_log()) as monitor:
        yield ServerUnderLoad(served, context, settings, bench, seconds, monitor)

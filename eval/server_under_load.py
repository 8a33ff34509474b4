"""One model's server while it runs, and the loads that are put on it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from compress.errors import ServerError
from compress.eval.bench_serve import Bench, bench_serve
from compress.eval.latency import LatencySettings, LoadPoint
from compress.eval.latency_results import Telemetry
from compress.eval.load_generator import DIALECTS, Load, make_requests, put_load, warm_up
from compress.eval.telemetry import Watch, watching
from compress.runtimes.environment import find
from compress.runtimes.exit_reason import describe_exit
from compress.runtimes.runtime import OpenContext, RunningServer, Runtime

_REQUEST_SECONDS = 600.0


@dataclass(frozen=True)
class Loading:
    """A server, what it serves, and how load is put on it: by `bench` where that is there and the server takes what it sends."""

    served: RunningServer
    context: OpenContext
    settings: LatencySettings
    bench: Bench | None
    request_seconds: float
    watch: Watch

    def put(self, point: LoadPoint, part: str) -> tuple[Load, Telemetry]:
        """Put one load on the server, after requests that do not count; `part` tells its requests from those of other loads.

        Raises:
            ServerError: the server does not answer a request of such a size, or ended.
            MissingError: the artifact has no tokenizer that can be read.
        """
        artifact, settings = self.context.artifact, self.settings
        first = make_requests(artifact, point, settings.warmup, settings.seed_of(point, f"warm-up {part}"))
        try:
            dialect = warm_up(self.served, first, self.request_seconds)
        except ServerError:
            self._check(point)
            raise
        count, seed = settings.requests_at(point), settings.seed_of(point, part)
        if self.bench is not None and dialect == DIALECTS[0]:
            load = bench_serve(self.bench, self.served, point, count, seed)
        else:
            bodies = make_requests(artifact, point, count, seed).bodies(self.served.model, dialect)
            load = put_load(self.served, bodies, point.concurrency, self.request_seconds, point.output_tokens)
        self._check(point)
        answered = sum(sample.fault is None for sample in load.samples)
        return load, self.watch.during(load.began, load.seconds, answered)

    def _check(self, point: LoadPoint) -> None:
        if self.served.process is not None and _has_ended(self.served.process):
            raise ServerError(
                f"{self.context.artifact}: its server ended under load ({point.label}); put less on it, or give it less memory"
                f"{describe_exit(self.served.read_log(), None)}"
            )


def _has_ended(process: int) -> bool:
    """Return whether a process that this one started has ended; its number stays until it is waited for."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def loading(runtime: Runtime, context: OpenContext, settings: LatencySettings) -> Generator[Loading]:
    """Bring up a model's server, alone on the machine, and end it with the context.

    Raises:
        UsageError: the runtime has no server.
        MissingError: it is not installed, or the server did not come up.
    """
    seconds = float(getattr(runtime, "request_seconds", _REQUEST_SECONDS))
    environment = find("vllm")
    bench = None
    if environment is not None:
        bench = Bench(environment, context.artifact, context.logs, seconds, context.trust_remote_code)
    with runtime.serve(context) as served, watching(served.process, served.read_log()) as watch:
        yield Loading(served, context, settings, bench, seconds, watch)

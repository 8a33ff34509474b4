"""A server is a process group that ends with the context, or with the process that started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from compress.errors import ServerError, StoreError
from compress.untrusted.redaction import remember_secret
from compress.workers.server import choose_port
from compress.workers.worker import Worker, run_worker

SECONDS = 600
"""How long anything that must come is waited for: longer than the busiest machine takes."""

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""

STARTER = """
import os, signal, sys
from pathlib import Path
from compress.workers.worker import run_worker
log = Path(sys.argv[1])
with run_worker("the server", [sys.executable, "-c", sys.argv[2]], os.environ, log) as server:
    server.wait(lambda: b"child" in log.read_bytes(), 600)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def child_of(log: Path) -> psutil.Process:
    words = log.read_text(encoding="utf-8").split()
    return psutil.Process(int(words[words.index("child") + 1]))


def start(server: Worker) -> psutil.Process:
    server.wait(lambda: b"child" in server.log.read_bytes(), 600)
    return child_of(server.log)


def test_whole_group_ends_with_the_context(tmp_path: Path) -> None:
    with run_worker("the server", [sys.executable, "-c", FAMILY], os.environ, tmp_path / "logs" / "server.log") as server:
        child = start(server)
        assert child.is_running()
        server.check()
    assert server.process.returncode is not None
    child.wait(SECONDS)


def test_group_ends_when_the_context_is_left_by_an_interrupt(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAMILY]
    children: list[psutil.Process] = []
    with pytest.raises(KeyboardInterrupt), run_worker("the server", command, os.environ, tmp_path / "server.log") as server:
        children.append(start(server))
        raise KeyboardInterrupt
    children[0].wait(SECONDS)
    assert not psutil.pid_exists(server.process.pid)


def test_group_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    starter = subprocess.run([sys.executable, "-c", STARTER, str(log), FAMILY], check=False)
    assert starter.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        child_of(log).wait(SECONDS)


def test_group_ends_when_only_the_server_does(tmp_path: Path) -> None:
    code = FAMILY.replace("time.sleep(600)\n", "raise SystemExit(3)\n")
    with run_worker("the server", [sys.executable, "-c", code], os.environ, tmp_path / "server.log") as server:
        server.process.wait(SECONDS)
        with pytest.raises(ServerError, match=r"(?s)the server ended\..*ended with exit code 3"):
            server.check()
    assert not psutil.pid_exists(server.process.pid)


def test_end_while_loading_shows_cause_last_lines_and_log(tmp_path: Path) -> None:
    lines = ["print('WARNING such as OSError: none')", "print('ValueError: no such dtype', flush=True)"]
    code = "\n".join([*lines, "for i in range(30): print('line', i)", "raise RuntimeError('see above')"])
    log = tmp_path / "server.log"
    log.write_text("an earlier server's TypeError: not ours\n", encoding="utf-8")
    with run_worker("the server", [sys.executable, "-c", code], os.environ, log) as server, pytest.raises(ServerError) as caught:
        server.wait(lambda: False, SECONDS)
    message = str(caught.value)
    assert message.startswith("the server ended while it was loading: ValueError: no such dtype\n")
    assert f"The last lines of {log}:" in message
    assert "RuntimeError: see above" in message
    assert "line 20\n" not in message
    assert "not ours" not in message


CHATTY = """
import os, sys, time
for part in ("key ", os.environ["TOLD"][:9], os.environ["TOLD"][9:], " said\\n", "and ", os.environ["HF_TOKEN"]):
    sys.stdout.write(part)
    sys.stdout.flush()
os.write(2, b"\\rhalf a line, 5/9 \\xff")
"""


def test_a_log_holds_no_secret_however_it_is_printed(tmp_path: Path) -> None:
    """Neither one that was read for a server nor one of the server's own environment, though it comes in two parts."""
    remember_secret(key := "sk-told-to-the-guard-0123456789")
    environment = {**os.environ, "TOLD": key, "HF_TOKEN": "hf_of_its_own_environment"}
    with run_worker("the server", [sys.executable, "-c", CHATTY], environment, tmp_path / "server.log") as server:
        server.process.wait(SECONDS)
    log = (tmp_path / "server.log").read_bytes()
    assert log == b"key \xe2\x80\xa6 said\nand \xe2\x80\xa6\rhalf a line, 5/9 \xff\nThe server ended with exit code 0.\n"
    status = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert key not in status


def test_a_server_that_closes_its_output_runs_on(tmp_path: Path) -> None:
    code = "import os, sys; os.close(1); os.close(2); sys.stdin.read(); os.kill(os.getpid(), 9)"
    with run_worker("the server", [sys.executable, "-c", code], os.environ, tmp_path / "server.log") as server:
        server.process.wait(SECONDS)
    assert (tmp_path / "server.log").read_text() == "The server ended with signal 9 (SIGKILL).\n"


def test_server_that_is_never_ready(tmp_path: Path) -> None:
    with run_worker("the server", [sys.executable, "-c", FAMILY], os.environ, tmp_path / "server.log") as server:
        start(server)
        with pytest.raises(ServerError, match=r"(?s)did not answer within 0 seconds; raise startup_seconds.*child"):
            server.wait(lambda: False, 0)


def test_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    context = run_worker("the server", ["true"], os.environ, tmp_path / "file" / "server.log")
    with pytest.raises(StoreError, match="the log of the server cannot be written"), context:
        pass


def test_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ServerError, match=rf"vLLM cannot serve on port {port} \(.*in use\); name another port, or leave it out"
        ):
            choose_port(port, "vLLM")
    assert choose_port(port, "vLLM") == port


def test_free_port_is_free() -> None:
    with socket.create_server(("127.0.0.1", choose_port(None, "vLLM"))) as server:
        assert server.getsockname()[1] > 0

"""Servers that a stranger runs: asked as a run asks them; nothing breaks, hangs, goes elsewhere or tells the key."""

from __future__ import annotations

import base64
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.untrusted.reading import printable
from tests.fuzz.answers import Way
from tests.fuzz.harness import Harness, Outcome, cases, drawn, make_decoys
from tests.fuzz.servers import ANSWER, CLIENTS, KEY, KEY_VARIABLE, LIKELIHOOD, MODEL, Behaviour, behave
from tests.raw_server import Asked, RawServer, http, raw_server
from tests.tiny import build_qwen2_5_vl

SEEDED, DRAWN = 170, 30
"""How many behaviours are made from seeds, and how many Hypothesis draws: 200."""

MODULES = (
    *(
        "tests.fuzz.servers",
        "compress.runtimes.endpoint.session",
        "compress.runtimes.vllm.server",
        "compress.engine.derive.derived",
    ),
    *("transformers.models.qwen2_5_vl.configuration_qwen2_5_vl", "huggingface_hub.constants", "httpx", "httpcore", "rich.markup"),
)
LIMITS = {
    "COMPRESS_LIMIT_ANSWER_BYTES": "2000000",
    "COMPRESS_LIMIT_ANSWER_VALUES": "200000",
    "COMPRESS_LIMIT_HEAD_BYTES": "16384",
    "COMPRESS_LIMIT_EVENT_BYTES": "16384",
}
"""So low that what goes past them comes in little time."""
_LONGEST = 3000


def _tellings() -> tuple[str, ...]:
    """Return what gives the key away."""
    encoded = (base64.b64encode(KEY.encode()).decode(), KEY.encode().hex(), quote(KEY, safe=""), quote(KEY), KEY, KEY.upper())
    return (*encoded, KEY[:16], json.dumps(KEY)[1:-1])


@dataclass
class Ground:
    """Where everything lies, and a server that nobody may be led to."""

    folder: Path
    harness: Harness
    other: RawServer
    right: int = field(default=0)

    @property
    def target(self) -> Path:
        return self.folder / "target"

    def attempt(self, behaviour: Behaviour) -> list[str]:
        """Ask a server; return what must not happen and does."""
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir()
        with raw_server(behaviour.reply) as server:
            arguments = (behaviour.client, server.url, str(self.folder / "model"), str(self.target))
            outcome = self.harness.call("tests.fuzz.servers:consume", *arguments)
        faults = outcome.faults({0, 3}, [self.folder]) + self._told(outcome)
        if self.other.asked:
            faults.append("it went elsewhere")
        if outcome.code == 0:
            faults += judge(json.loads(outcome.stdout), exact=behaviour.sound)
            self.right += behaviour.sound
        elif behaviour.sound:
            faults.append("it did not come to the right result")
        return [f"{behaviour}: {fault} … {outcome.stdout[-700:]} {outcome.stderr[-1500:]}" for fault in faults]

    def _told(self, outcome: Outcome) -> list[str]:
        """Return what is wrong with what it said and wrote down."""
        shown = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        faults = list[str]()
        if outcome.code and len(shown) != 1:
            faults.append(f"{len(shown)} messages")
        if len(outcome.stderr) > _LONGEST or printable(outcome.stderr) != outcome.stderr:
            faults.append("it says too much, or what steers a terminal")
        written = [path for path in self.target.rglob("*") if path.is_file()]
        texts = {"what it shows": outcome.stdout + outcome.stderr}
        texts |= {path.name: path.read_bytes().decode("utf-8", "replace") for path in written}
        faults += [f"{name} holds the key" for name, text in texts.items() if any(part in text for part in _tellings())]
        return faults


def judge(result: dict[str, Any], *, exact: bool) -> list[str]:
    """Return what is wrong with a result: what no answer or score can be or, where it is to be `exact`, what differs."""
    found = list[str]()
    for row in cast("list[dict[str, Any]]", [*result.get("answers", ()), *result.get("samples", ()), *result.get("scores", ())]):
        fault = row["fault"]
        if fault is not None and (exact or printable(fault) != fault or "\n" in fault or not 0 < len(fault) <= 400):
            found.append(f"an item's fault is {fault!r}")
    for answer in cast("list[dict[str, Any]]", result.get("answers", ())):
        answer["text"].encode()
        if (exact and answer["text"] != ANSWER) or not all(0 <= token < 1 << 31 for token in answer["token_ids"]):
            found.append(f"an answer is {answer}")
    values = [value for row in result.get("scores", ()) for value in row["likelihood"]]
    if not all(math.isfinite(value) and (value == -LIKELIHOOD or not exact) for value in values):
        found.append(f"the likelihoods are {values}")
    if not all(value == 0.0 for row in result.get("kl", ()) for value in row) and exact:
        found.append(f"KL is {result['kl']}")
    if not all(math.isfinite(value) for row in result.get("kl", ()) for value in row):
        found.append(f"KL is {result['kl']}")
    shares = [share for row in result.get("shares", ()) for share in row or ()]
    if not all(0 <= share <= 1.01 for share in shares) or (exact and shares and not np.allclose(shares, (0.5, 0.25, 0.25))):
        found.append(f"the distribution is {shares}")
    if exact and result.get("model", MODEL) != MODEL:
        found.append("it names another model")
    return found


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    build_qwen2_5_vl(folder / "model", layers=1, vision_blocks=1)
    around = {**LIMITS, KEY_VARIABLE: KEY, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    decoys = make_decoys(folder / "decoys")
    with raw_server(lambda asked: [http(b"{}")]) as other, Harness(MODULES, decoys, around) as harness:
        yield (made := Ground(folder, harness, other))
        print(f"\nservers: {harness.tally}; {made.right} right results where one was due")  # noqa: T201 - the figures of make fuzz


PLAIN = Way("as it should be", lambda asked, body: [http(body)], sound=True)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_sound_server_is_asked_with_the_key_and_answers(ground: Ground, client: str) -> None:
    behaviour = Behaviour(client, CLIENTS[client][-1], PLAIN, once=False, folder=str(ground.folder / "model"))
    assert ground.attempt(behaviour) == []
    assert behaviour.done


@pytest.mark.parametrize(
    "content",
    [
        {"prompt_logprobs": [{str(token): {"logprob": float("-inf")} for token in (5, 6, 7)}] * 3},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token_id": None, "logprob": -1.0}]}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token_id": -1, "logprob": -1.0}]}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token_id": 0, "logprob": float("-inf")}]}]}}]},
    ],
)
def test_what_is_no_log_probability_makes_no_figure(ground: Ground, content: object) -> None:
    kind = "logprobs" if "choices" in str(content) else "prompt_logprobs"

    def reply(asked: Asked, body: bytes) -> list[bytes]:
        return [http(content if f'"{kind}"'.encode() in asked.body else body)]

    behaviour = Behaviour("scores", "/inference/v1/generate", Way("no log-probability", reply), False, str(ground.folder / "model"))
    assert ground.attempt(behaviour) == []
    if kind == "logprobs":
        assert (ground.target / "events.jsonl").read_text(encoding="utf-8").count("gives no whole distributions") == 1


SAID = f"Incorrect API key provided: {KEY}"
REPEATED: list[tuple[str, str, str, object]] = [
    ("answers", "/v1/chat/completions", "400 Bad", {"error": {"message": SAID}}),
    ("answers", "/v1/chat/completions", "401 Denied", {"error": {"message": SAID}}),
    ("answers", "/v1/chat/completions", "200 OK", {"choices": [{"message": {"content": f"{SAID} {KEY}"}}]}),
    ("answers", "/v1/chat/completions", "302 Elsewhere", {}),
    ("answers", "/v1/models", "200 OK", {"data": [{"id": KEY}]}),
    ("scores", "/inference/v1/generate", "422 Bad", SAID.encode()),
    ("scores", "/v1/chat/completions", "200 OK", {"choices": [{"message": {"content": KEY}, "token_ids": [5]}]}),
    ("told", "/version", "200 OK", {"version": KEY}),
    ("url", "/v1/models", "200 OK", {"data": [{"id": KEY, "root": KEY}]}),
    ("load", "/v1/chat/completions", "400 Bad", {"error": {"message": SAID}}),
    ("start", "/v1/models", "200 OK", {"data": [{"id": KEY}]}),
]


@pytest.mark.parametrize(("client", "path", "status", "content"), REPEATED)
def test_a_key_that_a_server_repeats_is_told_nowhere(ground: Ground, client: str, path: str, status: str, content: object) -> None:
    way = Way(f"{status}, the key", lambda asked, _: [http(content, status, f"Location: http://127.0.0.1:1/?x={KEY}", f"X: {KEY}")])
    behaviour = Behaviour(client, path, way, once=False, folder=str(ground.folder / "model"))
    assert ground.attempt(behaviour) == []
    assert behaviour.done


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_behaviours_from_seeds(ground: Ground) -> None:
    faults = list[str]()
    for seed in range(cases(SEEDED)):
        behaviour = behave(seed, ground.folder / "model", ground.other.url)
        faults += [f"seed {seed}: {fault}" for fault in ground.attempt(behaviour)]
    assert not faults, "\n".join(faults)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["assistant", KEY, "5"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["message", "content", "delta", "token_ids", "logprob", "5", "id", "error"]), inner)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@drawn(DRAWN)
@given(
    asked=st.sampled_from([(client, path) for client, paths in CLIENTS.items() for path in paths]),
    name=st.sampled_from(["choices", "data", "version", "token_ids", "prompt_logprobs", "error"]),
    value=VALUES,
)
def test_answers_that_hypothesis_draws(ground: Ground, asked: tuple[str, str], name: str, value: object) -> None:
    client, path = asked
    body = json.dumps({name: value}).encode("utf-8", "surrogatepass")
    way = Way(f"body {body[:100]!r}", lambda asked, _: [http(body)])
    assert ground.attempt(Behaviour(client, path, way, once=True, folder=str(ground.folder / "model"))) == []

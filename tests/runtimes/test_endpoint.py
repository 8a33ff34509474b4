"""Servers that run elsewhere: what they serve, what they can be asked, and what is said where that cannot be had."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import compress
from compress.data.prompts import Prompt
from compress.errors import MissingError, RecipeError, ServerError, UsageError
from compress.eval.results import ScoreMetrics
from compress.families.qwen2_5_vl import QWEN2_5_VL
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.runtimes.endpoint.runtime import Endpoint, EndpointModel
from compress.runtimes.runtime import CAPABILITIES, Embeds, Generates, OpenContext, Scores, Served, capable
from compress.runtimes.server_session import alternative_concurrency
from tests.chaos_server import MODEL, Manners, Refusal, StandIn, Trouble, answer_to, stand_in
from tests.jobs import Job, content, make_job, write_questions
from tests.raw_server import absent_server, mute_server

KEY = "sk-secret-0123456789"
PROMPTS = [Prompt(f"q{number}", f"What is number {number}?", (b"\x89PNG" + bytes([number]),)) for number in range(6)]


class Listener(Silent):
    """Progress that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint(url: str, model: str = MODEL, **fields: object) -> Endpoint:
    place = {"url": url, "model": model}
    return Endpoint.model_validate({"runtime": "endpoint", "original": place, "artifacts": {"awq": place}, **fields})


def context(folder: Path, name: str = "original", progress: Silent | None = None) -> OpenContext:
    return OpenContext(folder, folder, progress or Silent(), QWEN2_5_VL, name=name)


def test_questions_are_answered_with_their_images_and_without_tokens(tmp_path: Path) -> None:
    with stand_in() as server, endpoint(server.url).open(context(tmp_path, "awq")) as session:
        assert isinstance(session, Generates) and isinstance(session, Served) and not isinstance(session, Scores)
        answers = session.answer(PROMPTS, 12, Silent())
        assert [(answer.id, answer.text, answer.token_ids) for answer in answers] == [
            (prompt.id, answer_to(prompt), ()) for prompt in PROMPTS
        ]
        for body in server.bodies:
            assert (body["model"], body["max_tokens"], body["temperature"]) == (MODEL, 12, 0.0)


def test_what_it_does_not_offer_is_refused_and_told_beforehand(tmp_path: Path) -> None:
    with stand_in() as server:
        runtime = endpoint(server.url)
        assert runtime.versions() == {"original": "OpenAI-compatible", "awq": "OpenAI-compatible"}
        missing = runtime.missing()
        assert missing == {
            Scores: f"{server.url} (original), {server.url} (awq) gives no log-probabilities of given tokens",
        }
        assert endpoint(server.url, images=False).missing()[Generates] == "images is false"
        with runtime.open(context(tmp_path)) as session:
            for capability in (Scores, Embeds):
                with pytest.raises(UsageError, match=f"does not offer {CAPABILITIES[capability]}; measure another task"):
                    capable(session, capability)
        with endpoint(server.url, images=False).open(context(tmp_path)) as session:
            assert not any(isinstance(session, capability) for capability in (Generates, Scores, Embeds))


def test_vllm_without_its_token_endpoints_says_how_to_get_them(tmp_path: Path) -> None:
    listener = Listener()
    with stand_in(manners=Manners(version="0.32.0")) as server:
        assert endpoint(server.url).versions()["awq"] == "vLLM 0.32.0"
        assert endpoint(server.url).loaded_with("awq") == "endpoint (vLLM 0.32.0)"
        with endpoint(server.url).open(context(tmp_path, progress=listener)) as session:
            assert isinstance(session, Generates) and isinstance(session, Served) and not isinstance(session, Scores)
    assert "start it with --enable-scale-out for perplexity and KL" in listener.warnings[0]


def test_nothing_listens(tmp_path: Path) -> None:
    with (
        absent_server() as url,
        pytest.raises(ServerError, match=f"{url}: no server answers there .*; start it, or correct url"),
        endpoint(url).open(context(tmp_path)),
    ):
        pass


def test_a_server_that_is_slow(tmp_path: Path) -> None:
    with mute_server() as mute:
        runtime = endpoint(mute.url, request_seconds=1)
        with (
            pytest.raises(ServerError, match="did not answer within 1 seconds; raise request_seconds"),
            runtime.open(context(tmp_path)),
        ):
            pass


def test_a_server_of_another_model(tmp_path: Path) -> None:
    models = tuple(f"other-{number}" for number in range(7))
    with (
        stand_in(manners=Manners(models=models)) as server,
        pytest.raises(
            ServerError,
            match=r"serves other-0, .*, other-4 and 2 more, not served, which the recipe names for awq; correct model, or start",
        ),
        endpoint(server.url).open(context(tmp_path, "awq")),
    ):
        pass


def test_a_server_that_does_not_say_what_it_serves(tmp_path: Path) -> None:
    listener = Listener()
    with (
        stand_in(manners=Manners(tells_models=False)) as server,
        endpoint(server.url).open(context(tmp_path, progress=listener)) as session,
    ):
        assert session.answer(PROMPTS[:1], 4, Silent())[0].text == answer_to(PROMPTS[0])
    assert listener.warnings == [f"{server.url}: does not tell which models it serves; that it serves served is taken on trust"]


def test_something_else_than_an_api(tmp_path: Path) -> None:
    refusal = "its list of models cannot be read; give the URL of an OpenAI-compatible server"
    with (
        stand_in(manners=Manners(models_said=["a", "b"])) as server,
        pytest.raises(ServerError, match=refusal),
        endpoint(server.url).open(context(tmp_path)),
    ):
        pass


def test_a_key_is_sent_and_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", f" {KEY}\n")
    with stand_in(manners=Manners(key=KEY)) as server:
        runtime = endpoint(server.url, key_variable="THE_KEY")
        with runtime.open(context(tmp_path)) as session:
            assert session.answer(PROMPTS[:1], 4, Silent())[0].fault is None
            assert KEY not in repr(session) + repr(session.__dict__) + repr(runtime)
        assert KEY not in str(runtime.settings("awq")) + str(runtime.versions()) + runtime.model_dump_json()
        with (
            pytest.raises(ServerError, match="401; it needs a key: put it into an environment variable, and name that as key_v"),
            endpoint(server.url).open(context(tmp_path)),
        ):
            pass
        monkeypatch.setenv("THE_KEY", wrong := "sk-wrong-0123456789")
        with pytest.raises(ServerError) as caught, runtime.open(context(tmp_path)):
            pass
        assert "it refuses the key in the environment variable THE_KEY; correct it" in str(caught.value)
        assert wrong not in str(caught.value)
        monkeypatch.delenv("THE_KEY")
        with pytest.raises(MissingError, match="set the environment variable THE_KEY"), runtime.open(context(tmp_path)):
            pass


def test_a_key_that_is_taken_back_meanwhile_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    manners = Manners(key=KEY)
    with stand_in(manners=manners) as server, endpoint(server.url, key_variable="THE_KEY").open(context(tmp_path)) as session:
        manners.key = "another"
        with pytest.raises(ServerError) as caught:
            session.answer(PROMPTS, 4, Silent())
    assert "401: Incorrect API key provided: …; it refuses the key in the environment variable THE_KEY" in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_fault_repeats_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    manners = Manners(key=KEY, statuses={"number 3": Refusal(400, f"bad request\nby {KEY} " + "x" * 1000)})
    with stand_in(manners=manners) as server, endpoint(server.url, key_variable="THE_KEY").open(context(tmp_path)) as session:
        answers = session.answer(PROMPTS, 4, Silent())
    assert [answer.fault is None for answer in answers] == [True, True, True, False, True, True]
    fault = answers[3].fault or ""
    assert fault.startswith("400: bad request by … xxx")
    assert len(fault) == 300


def test_only_its_own_server_shapes_an_artifacts_figures() -> None:
    one = endpoint("http://a:1", key_variable="ONE")
    other = one.model_copy(update={"artifacts": {"awq": EndpointModel(url="http://b:1/v1", model="m")}, "key_variable": "TWO"})
    assert one.settings("original") == other.settings("original")
    assert one.settings("awq") != other.settings("awq")
    assert one.settings("awq")["url"] == "http://a:1"
    assert "key_variable" not in one.settings("awq")
    with pytest.raises(UsageError, match=r"no server is named for int8; add int8: \{url: …, model: …\} to the artifacts"):
        one.settings("int8")


def test_servers_and_exports_belong_together() -> None:
    assert endpoint("http://a:1").faults(["awq"]) == []
    assert endpoint("http://a:1").faults(["awq", "int8"]) == [
        "no server is named for int8; add int8: {url: …, model: …} to the artifacts of runtime: endpoint"
    ]
    assert endpoint("http://a:1").faults(["int8"])[1] == (
        "artifacts.awq: the recipe exports no artifact of that name, only int8; correct the name"
    )


@pytest.mark.parametrize("url", ["http://user:secret@host/v1", "ftp://host", "http://host/v1?key=secret", "host:8000"])
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=r"original\.url"):
        endpoint(url)


def test_the_original_has_its_own_place() -> None:
    place = {"url": "http://a:1", "model": "m"}
    with pytest.raises(ValidationError, match="name it beside artifacts"):
        Endpoint.model_validate({"runtime": "endpoint", "original": place, "artifacts": {"original": place}})


def test_load_is_put_on_the_same_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    with stand_in(manners=Manners(key=KEY)) as server:
        with endpoint(server.url, key_variable="THE_KEY").serve(context(tmp_path)) as served:
            assert (served.url, served.model, served.key) == (server.url.removesuffix("/v1"), MODEL, KEY)
            assert KEY not in repr(served)
        with (
            pytest.raises(ServerError, match="serves served, not another"),
            endpoint(server.url, "another", key_variable="THE_KEY").serve(context(tmp_path)),
        ):
            pass


def test_trouble_passes(tmp_path: Path) -> None:
    """Every request has a one in three chance to fail in some way; each item is asked for until it is answered."""
    trouble = Trouble(failing=0.15, resetting=0.1, malformed=0.1, seed=1)
    with stand_in(trouble) as server, endpoint(server.url).open(context(tmp_path)) as session:
        answers = session.answer(PROMPTS, 4, Silent())
        assert [answer.text for answer in answers] == [answer_to(prompt) for prompt in PROMPTS]
        server.wait(len(PROMPTS))
        assert server.asked.total() > len(PROMPTS) == server.answered.total()


def served_job(folder: Path, server: StandIn) -> Job:
    """Return a recipe whose original and artifact are served elsewhere, by a server that gives no scores."""
    job = make_job(folder)
    write_questions(folder, "test.jsonl", range(200, 290))
    recipe = content(job)
    place = {"url": server.url, "model": MODEL}
    artifacts = {"vllm-awq": place, "vllm-compressed-tensors": place}
    runtime = {"runtime": "endpoint", "original": place, "artifacts": artifacts, "startup_seconds": 1, "concurrency": 4}
    recipe["eval"] = {**recipe["eval"], "runtime": runtime, "noise": 0}
    recipe["stages"] = [{"stage": "rtn", "bits": 4, "group_size": 32}]
    recipe["gate"] = {"size": {"max_ratio": 0.9}}
    del recipe["publish"]
    job.recipe.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return job


def test_a_run_goes_on_where_it_lost_its_server(tmp_path: Path) -> None:
    """The server answers 70 of the original's 90 questions, and goes; when it is back, the same command asks for the rest."""
    with stand_in(Trouble(hold_after=70)) as server:
        job = served_job(tmp_path, server)

        def leave() -> None:
            server.wait(70)
            server.close()

        leaving = threading.Thread(target=leave)
        leaving.start()
        with pytest.raises(
            ServerError, match="nothing has answered for 1 seconds; start the server again, and run the same command"
        ):
            compress.run(job.recipe, **job.places())
        leaving.join()
        first = server.answered.copy()
        assert 70 <= first.total() < 90
        server.back()
        report = compress.run(job.recipe, **job.places())
        server.wait(3 * 90)
        assert server.answered.total() == 3 * 90
        assert set((server.answered - first).values()) == {2, 3}
    for row in report.rows:
        (metrics,) = row.metrics.values()
        assert isinstance(metrics, ScoreMetrics)
        assert (metrics.items, metrics.failed) == (90, 0)
    assert report.rows[1].fidelity is None
    unmeasured = "task text: not measured: what serves this model does not offer log-probabilities of given tokens"
    assert unmeasured in report.warnings
    store = [path.name for path in job.store.rglob("*") if path.is_file()]
    assert "items-scenes.parquet" in store
    assert not [name for name in store if name.startswith("answers-")]


def test_a_plan_says_what_will_not_be_measured(tmp_path: Path) -> None:
    with stand_in() as server:
        job = served_job(tmp_path, server)
        plan = make_plan(job.recipe, {}, Store(job.store))
        assert f"{server.url} (original)" in (note := next(note for note in plan.power if "task text" in note))
        assert note.startswith("task text: not measured at local: ")
        other = {"eval.runtime.artifacts": {"other": {"url": server.url, "model": MODEL}}}
        with pytest.raises(RecipeError) as caught:
            make_plan(job.recipe, other, Store(job.store))
        assert "eval.runtime: no server is named for vllm-awq; add vllm-awq: {url: …, model: …}" in caught.value.faults[0]
        typo = {"eval.runtime.artifacts": {"vllm-awq": {"uri": server.url, "model": MODEL}}}
        with pytest.raises(RecipeError, match="unknown key; allowed here: model, url; did you mean url"):
            make_plan(job.recipe, typo, Store(job.store))


def test_asked_again_it_is_in_another_order_and_in_other_batches(tmp_path: Path) -> None:
    """A server that computes alike whatever it is asked with shows nothing of the noise of its kernels."""
    prompts = [Prompt(f"q{number}", f"What is number {number}?") for number in range(12)]
    with stand_in() as server, endpoint(server.url, concurrency=4).open(context(tmp_path, "awq")) as session:
        before = session.answer(prompts, 12, Silent())
        count = len(server.bodies)
        assert session.reordered().answer(prompts, 12, Silent()) == before
        texts = [body["messages"][0]["content"][-1]["text"] for body in server.bodies[count:]]
    assert sorted(texts) == sorted(prompt.text for prompt in prompts)
    assert texts != [prompt.text for prompt in prompts]  # one at a time, so that they come in the order they were sent
    assert alternative_concurrency(4) == 1 and alternative_concurrency(1) > 1

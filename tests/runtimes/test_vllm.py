"""A real vLLM server with a tiny model: its answers and scores are those of the in-process runtime."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from compress.checkpoints.special_tokens import SpecialTokens, end_tokens
from compress.data.prompts import Prompt
from compress.errors import CheckpointError, MissingError, RecipeError, ServerError
from compress.eval.full_vocabulary import kl_divergence
from compress.progress import Silent
from compress.runtimes.endpoint.runtime import Endpoint
from compress.runtimes.runtime import Answer, Generates, OpenContext, Passage, Score, Scores
from compress.runtimes.transformers.runtime import Transformers
from compress.runtimes.vllm.runtime import Vllm
from compress.runtimes.vllm.session import VllmSession
from compress.workers.environment import install
from tests.raw_server import absent_server
from tests.runtimes.agreement import FEW_BLOCKS
from tests.tiny import build_qwen2_5_vl, picture

PRELOADED = ("vllm",)

SILENT = Silent()


class Listener(Silent):
    """Progress that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


PROMPTS = (
    Prompt("one picture", "What colour is the shape?", (picture(0),)),
    Prompt("another", "What colour is the shape?", (picture(1),)),
    Prompt("two pictures", "Which is larger?", (picture(2, 56, 168), picture(3, 140, 84))),
    Prompt("only text", "How many circles are there?"),
)
PASSAGES = (
    Passage("text", tuple(range(40, 340, 3))),
    Passage("forced", (51, 140, 347, 483, 594), PROMPTS[0]),
    Passage("one token", (70,)),
    Passage("forced, two pictures", (12, 13), PROMPTS[2]),
    Passage("forced nothing", (), PROMPTS[3]),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def runtime() -> Vllm:
    install("vllm", SILENT)
    return Vllm(runtime="vllm", dtype="float32", kv_cache_gib=1, max_model_len=512, top_logprobs=128, arguments=FEW_BLOCKS)


@pytest.fixture(scope="module")
def session(runtime: Vllm, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[VllmSession]:
    with runtime.open(OpenContext.at(model, tmp_path_factory.mktemp("logs"), SILENT)) as opened:
        assert isinstance(opened, VllmSession)
        yield opened


@pytest.fixture(scope="module")
def changed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with other weights in its decoder."""
    folder = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight") and "visual" not in name:
            tensors[name] = (tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def other(runtime: Vllm, changed: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[VllmSession]:
    with runtime.open(OpenContext.at(changed, tmp_path_factory.mktemp("logs"), SILENT)) as opened:
        assert isinstance(opened, VllmSession)
        yield opened


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Answer], list[Score]]:
    context = OpenContext.at(model, tmp_path_factory.mktemp("logs"), SILENT)
    with Transformers(runtime="transformers", dtype="float32", device="cpu").open(context) as inside:
        return inside.answer(PROMPTS, 8, SILENT), inside.score(PASSAGES, None, None, SILENT)


@pytest.mark.slow
def test_answers_equal_the_in_process_ones(session: VllmSession, expected: tuple[list[Answer], list[Score]]) -> None:
    """Up to the mark that stands for a character whose last bytes are still to come: vLLM holds it back."""
    for actual, reference in zip(session.answer(PROMPTS, 8, SILENT), expected[0], strict=True):
        assert (actual.id, actual.token_ids) == (reference.id, reference.token_ids)
        assert actual.text.rstrip("\ufffd") == reference.text.rstrip("\ufffd")


@pytest.mark.slow
def test_answers_depend_on_the_pictures_and_come_in_order(session: VllmSession) -> None:
    answers = session.answer(PROMPTS * 3, 8, SILENT)
    assert [answer.id for answer in answers] == [prompt.id for prompt in PROMPTS * 3]
    assert answers[0].token_ids != answers[1].token_ids
    assert answers[:4] == answers[4:8] == answers[8:]


@pytest.mark.slow
def test_answers_are_as_long_as_allowed(session: VllmSession) -> None:
    short, long = (session.answer(PROMPTS[:2], tokens, SILENT) for tokens in (2, 6))
    for few, many in zip(short, long, strict=True):
        assert len(few.token_ids) == 2
        assert len(many.token_ids) == 6
        assert many.token_ids[:2] == few.token_ids


@pytest.mark.slow
def test_answer_ends_before_its_stop_token(session: VllmSession, model: Path, runtime: Vllm) -> None:
    full = session.answer(PROMPTS[:1], 8, SILENT)[0].token_ids
    assert end_tokens(model) == (594, 595)
    stopping = VllmSession(session.endpoint, runtime, SpecialTokens((full[3],)))
    assert stopping.answer(PROMPTS[:1], 8, SILENT)[0].token_ids == full[: full.index(full[3])]


@pytest.mark.slow
def test_answer_holds_no_placeholder(session: VllmSession, runtime: Vllm) -> None:
    """Taking what the model says first for an image's token, it must say something else; the other answers stay."""
    before = session.answer(PROMPTS, 2, SILENT)
    without = VllmSession(session.endpoint, runtime, SpecialTokens((594, 595), (before[0].token_ids[0],)))
    for old, new in zip(before, without.answer(PROMPTS, 2, SILENT), strict=True):
        assert before[0].token_ids[0] not in new.token_ids
        assert (old == new) == (before[0].token_ids[0] not in old.token_ids)


@pytest.mark.slow
def test_scores_equal_the_in_process_ones(session: VllmSession, expected: tuple[list[Answer], list[Score]]) -> None:
    scores = session.score(PASSAGES, None, None, SILENT)
    assert [len(score.negative_log_likelihood) for score in scores] == [99, 5, 0, 2, 0]
    for actual, reference in zip(scores, expected[1], strict=True):
        assert actual.id == reference.id
        np.testing.assert_allclose(actual.negative_log_likelihood, reference.negative_log_likelihood, atol=2e-3)


@pytest.mark.slow
def test_model_compared_with_itself_does_not_differ(session: VllmSession, tmp_path: Path) -> None:
    recorded = session.score(PASSAGES, tmp_path / "record", None, SILENT)
    compared = session.score(PASSAGES, None, tmp_path / "record", SILENT)
    for before, after in zip(recorded, compared, strict=True):
        np.testing.assert_allclose(before.negative_log_likelihood, after.negative_log_likelihood, atol=1e-4)
        assert before.kl is None
        assert after.kl is not None
        assert after.same_top is not None
        assert after.kl.shape == after.same_top.shape == after.negative_log_likelihood.shape
        assert (after.kl < 1e-5).all()
        assert after.same_top.all()


@pytest.mark.slow
def test_changed_model_is_compared_with_the_original(
    session: VllmSession, other: VllmSession, model: Path, changed: Path, tmp_path: Path
) -> None:
    """KL over the top tokens is a bound from below of the exact one, and a good part of it even of predictions as flat as these."""
    session.score(PASSAGES, tmp_path / "record", None, SILENT)
    scores = other.score(PASSAGES, None, tmp_path / "record", SILENT)
    inside = Transformers(runtime="transformers", dtype="float32", device="cpu")
    with inside.open(OpenContext.at(model, tmp_path, SILENT)) as original:
        original.score(PASSAGES, tmp_path / "exact", None, SILENT)
    with inside.open(OpenContext.at(changed, tmp_path, SILENT)) as artifact:
        exact = artifact.score(PASSAGES, None, tmp_path / "exact", SILENT)

    kl = np.concatenate([score.kl for score in scores if score.kl is not None])
    true = np.concatenate([score.kl for score in exact if score.kl is not None])
    assert (kl <= true + 1e-4).all()
    assert 0.3 * true.mean() < kl.mean() < true.mean()
    same = [score.same_top for score in scores if score.same_top is not None]
    same_exact = [score.same_top for score in exact if score.same_top is not None]
    assert (np.concatenate(same) == np.concatenate(same_exact)).mean() > 0.98


@pytest.mark.slow
def test_whole_distributions_are_those_that_transformers_compares(
    session: VllmSession, other: VllmSession, runtime: Vllm, model: Path, changed: Path, tmp_path: Path
) -> None:
    """KL over the top 20 is below what the whole vocabulary gives, and that is the in-process runtime's."""
    inside = Transformers(runtime="transformers", dtype="float32", device="cpu")
    with inside.open(OpenContext.at(model, tmp_path, SILENT)) as original:
        original.score(PASSAGES, tmp_path / "exact", None, SILENT)
    with inside.open(OpenContext.at(changed, tmp_path, SILENT)) as artifact:
        exact = artifact.score(PASSAGES, None, tmp_path / "exact", SILENT)
    few = runtime.model_copy(update={"top_logprobs": 20})
    before = VllmSession(session.endpoint, few, SpecialTokens(()))
    before.score(PASSAGES, tmp_path / "record", None, SILENT)
    positions = [(0, token) for token in range(0, 99, 9)] + [(1, 0), (1, 4), (3, 1)]
    old = before.distributions(PASSAGES, positions, SILENT)
    after = VllmSession(other.endpoint, few, SpecialTokens(()))
    lower = after.score(PASSAGES, None, tmp_path / "record", SILENT)
    new = after.distributions(PASSAGES, positions, SILENT)
    assert all(score.at_least for score in lower if len(score.negative_log_likelihood))
    for (index, token), p, q in zip(positions, old, new, strict=True):
        exact_kl, bound = exact[index].kl, lower[index].kl
        assert p is not None and q is not None and exact_kl is not None and bound is not None
        assert kl_divergence(p, q) == pytest.approx(exact_kl[token], rel=0.05, abs=1e-5)
        assert bound[token] < 0.9 * kl_divergence(p, q)


@pytest.mark.slow
def test_a_server_that_gives_few_tokens_is_known_from_below_and_says_so(runtime: Vllm, model: Path, tmp_path: Path) -> None:
    heard = Listener()
    with runtime.model_copy(update={"whole_tokens": 0}).open(OpenContext.at(model, tmp_path, SILENT)) as few:
        assert isinstance(few, VllmSession)
        assert few.distributions(PASSAGES, [(0, 1), (1, 2)], heard) == [None, None]
    assert "gives no whole distributions (400: " in heard.warnings[0] and "--max-logprobs -1" in heard.warnings[0]


@pytest.mark.slow
def test_an_item_that_cannot_be_scored_is_a_fault_of_its_own(session: VllmSession, tmp_path: Path) -> None:
    long = Passage("too long a passage", tuple(range(30, 590)))
    recorded = session.score([long, PASSAGES[0]], tmp_path / "record", None, SILENT)
    assert [len(score.negative_log_likelihood) for score in recorded] == [0, 99]
    fault = recorded[0].fault or ""
    assert fault.startswith("400: ") and "512" in fault
    compared = session.score([long, PASSAGES[0]], None, tmp_path / "record", SILENT)
    assert compared[0].fault == fault
    assert compared[1].kl is not None and (compared[1].kl < 1e-5).all()


@pytest.mark.slow
def test_an_unreadable_image_is_a_fault_of_its_own(session: VllmSession) -> None:
    heard: list[Answer] = []
    answers = session.answer([Prompt("broken picture", "What?", (b"\x89PNG nothing",)), PROMPTS[0]], 4, SILENT, heard.append)
    assert answers[0].fault is not None and answers[0].text == ""
    assert answers[1].fault is None and len(answers[1].token_ids) == 4
    assert sorted(answer.id for answer in heard) == ["broken picture", "one picture"]


@pytest.mark.slow
def test_a_vllm_server_elsewhere_answers_and_scores_alike(
    session: VllmSession, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = session.endpoint.client
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("THE_KEY", client.headers["Authorization"].removeprefix("Bearer "))
    original = {"url": f"{str(client.base_url).rstrip('/')}/v1", "model": session.endpoint.model}
    fields = {"runtime": "endpoint", "original": original, "artifacts": {}, "key_variable": "THE_KEY", "top_logprobs": 128}
    elsewhere = Endpoint.model_validate(fields)
    assert elsewhere.versions() == {"original": "vLLM 0.32.0, with scores"}
    assert elsewhere.missing() == {}
    with elsewhere.open(OpenContext.at(model, tmp_path, SILENT)) as opened:
        assert isinstance(opened, Generates) and isinstance(opened, Scores)
        assert opened.answer(PROMPTS, 8, SILENT) == session.answer(PROMPTS, 8, SILENT)
        session.score(PASSAGES, tmp_path / "record", None, SILENT)
        for score in opened.score(PASSAGES, None, tmp_path / "record", SILENT):
            assert score.fault is None
            assert score.kl is not None and (score.kl < 1e-5).all()
    with Endpoint.model_validate({**fields, "images": False}).open(OpenContext.at(model, tmp_path, SILENT)) as opened:
        assert isinstance(opened, Scores) and not isinstance(opened, Generates)


@pytest.mark.slow
def test_server_at_a_url_is_asked_with_its_key(
    session: VllmSession, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = session.endpoint.client
    monkeypatch.setenv("THE_KEY", client.headers["Authorization"].removeprefix("Bearer "))
    remote = Vllm(runtime="vllm", url=f"{str(client.base_url).rstrip('/')}/v1", key_variable="THE_KEY")
    assert remote.versions() == {"vllm": "0.32.0"}
    with remote.open(OpenContext.at(model, tmp_path, SILENT)) as opened:
        assert opened.answer(PROMPTS, 4, SILENT) == session.answer(PROMPTS, 4, SILENT)
    monkeypatch.setenv("THE_KEY", "wrong")
    context = OpenContext.at(model, tmp_path, SILENT)
    with pytest.raises(ServerError, match="it refuses the key in the environment variable THE_KEY"), remote.open(context):
        pass


@pytest.mark.slow
def test_server_that_dies_while_loading_says_what_is_at_fault(runtime: Vllm, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["intermediate_size"] += 32
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught, runtime.open(OpenContext.at(broken, tmp_path / "logs", SILENT)):
        pass
    message = str(caught.value)
    assert f"vLLM, serving {broken} ended while it was loading: " in message
    assert "export it again" in message
    assert f"(its log: {tmp_path / 'logs' / 'vllm.log'})" in message


@pytest.mark.slow
def test_a_setting_that_vllm_does_not_take_is_the_recipes_fault(runtime: Vllm, model: Path, tmp_path: Path) -> None:
    long = runtime.model_copy(update={"max_model_len": 1_000_000})
    with pytest.raises(RecipeError) as caught, long.open(OpenContext.at(model, tmp_path / "logs", SILENT)):
        pass
    assert str(caught.value).startswith("max_model_len of runtime vllm: vLLM, serving ")
    assert "User-specified max_model_len (1000000) is greater than" in str(caught.value)
    assert "set it to at most " in str(caught.value)


@pytest.mark.slow
def test_port_in_use_is_refused_before_anything_starts(runtime: Vllm, model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        context = runtime.model_copy(update={"port": port}).open(OpenContext.at(model, tmp_path / "logs", SILENT))
        with pytest.raises(ServerError, match=f"vLLM cannot serve on port {port} "), context:
            pass
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_versions_are_those_of_its_environment(runtime: Vllm) -> None:
    versions = runtime.versions()
    assert versions["transformers"] == "5.17.0"
    assert versions["vllm"].startswith("0.32.0")


def test_missing_runtime_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path))
    runtime = Vllm(runtime="vllm")
    model = build_qwen2_5_vl(tmp_path / "model")
    with pytest.raises(MissingError, match="run `compress runtime install vllm`"):
        runtime.versions()
    with (
        pytest.raises(MissingError, match="run `compress runtime install vllm`"),
        runtime.open(OpenContext.at(model, tmp_path, SILENT)),
    ):
        pass


def test_url_and_port_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="leave out port and arguments, or leave out url"):
        Vllm(runtime="vllm", url="http://127.0.0.1:1", port=8000)
    with pytest.raises(ValidationError, match="key_variable belongs to url"):
        Vllm(runtime="vllm", key_variable="KEY")


def test_absent_server_at_a_url(tmp_path: Path) -> None:
    context = OpenContext.at(build_qwen2_5_vl(tmp_path / "model"), tmp_path, SILENT)
    with absent_server() as url:
        remote = Vllm(runtime="vllm", url=url)
        with pytest.raises(ServerError, match=f"{url}: no server answers there .* start it, or correct url"):
            remote.versions()
        with pytest.raises(ServerError, match="no server answers there"), remote.open(context):
            pass


def test_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(MissingError, match="set the environment variable THE_KEY"):
        Vllm(runtime="vllm", url="http://127.0.0.1:1", key_variable="THE_KEY").versions()

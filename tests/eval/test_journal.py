"""An interrupted measurement goes on: what was answered and scored is kept piece by piece, and only the rest is asked for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.data.prompts import Prompt
from compress.errors import CheckpointError, ServerError
from compress.eval import journal
from compress.eval.journal import Journal, answer_all, remove_journal, score_all
from compress.families.qwen2_5_vl import QWEN2_5_VL
from compress.progress import Progress, Silent
from compress.runtimes.endpoint.runtime import Endpoint, EndpointModel
from compress.runtimes.runtime import Answer, OpenContext, Passage, Score
from compress.runtimes.transformers.runtime import Transformers
from compress.runtimes.transformers.session import TransformersSession
from tests.chaos_server import MODEL, Manners, Refusal, StandIn, answer_to, digest_of, stand_in
from tests.tiny import build_qwen2_5_vl, picture

TOKENS = 3


class Listener(Silent):
    """Progress that keeps the warnings and counts what was finished; it may end the work, as Ctrl-C does."""

    def __init__(self, limit: int | None = None) -> None:
        self.warnings: list[str] = []
        self.tasks: list[tuple[str, int, int]] = []
        self.limit = limit

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.limit is not None and done >= self.limit:
                raise KeyboardInterrupt

        yield advance
        self.tasks.append((name, total, done))


@dataclass
class Counting:
    """A session that counts what passes through it; it may be cut short, or mix the items up."""

    session: Any
    cut_after: int | None = None
    mixing: bool = False
    answered: list[str] = field(default_factory=lambda: list[str]())
    scored: list[str] = field(default_factory=lambda: list[str]())

    @property
    def block(self) -> int | None:
        return self.session.block

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        self.answered += [prompt.id for prompt in prompts]
        answers = self.session.answer(prompts, max_new_tokens, progress, on_answer)
        return answers[::-1] if self.mixing else answers

    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        if self.cut_after is not None and len(self.scored) >= self.cut_after:
            raise KeyboardInterrupt
        self.scored += [passage.id for passage in passages]
        scores = self.session.score(passages, record, reference, progress)
        return scores[::-1] if self.mixing else scores


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    folder = build_qwen2_5_vl(tmp_path_factory.mktemp("model"))
    with Transformers(runtime="transformers", device="cpu").open(OpenContext.at(folder, folder, Silent())) as session:
        yield session


def served(server: StandIn, folder: Path) -> Any:
    runtime = Endpoint(runtime="endpoint", original=EndpointModel(url=server.url, model=MODEL), artifacts={})
    return runtime.open(OpenContext(folder, folder, Silent(), QWEN2_5_VL))


def questions(count: int) -> list[Prompt]:
    return [Prompt(f"q{number}", f"Is it {number}.", (b"\x89PNG" + bytes([number % 7]),)) for number in range(count)]


def journal_files(folder: Path, name: str = "scenes") -> list[Path]:
    return sorted((folder / "journal" / name).glob("answers-*.parquet"))


def test_answers_come_in_order_and_are_kept(tmp_path: Path) -> None:
    prompts, listener = questions(150), Listener()
    with stand_in() as server, served(server, tmp_path) as session:
        answers = answer_all(session, prompts, 8, tmp_path, "scenes", listener)
        assert [(answer.id, answer.text) for answer in answers] == [(prompt.id, answer_to(prompt)) for prompt in prompts]
        assert listener.tasks == [("answer", 150, 150)]
        assert len(journal_files(tmp_path)) >= 3
        again = answer_all(session, prompts[::-1], 8, tmp_path, "scenes", listener)
        assert again == answers[::-1]
        assert listener.tasks[1] == ("answer", 150, 150)
        assert server.asked.total() == 150
    remove_journal(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_journal(tmp_path)


def test_an_interrupted_measurement_asks_for_the_rest(tmp_path: Path) -> None:
    prompts = questions(200)
    with stand_in() as server, served(server, tmp_path) as session:
        with pytest.raises(KeyboardInterrupt):
            answer_all(session, prompts, 8, tmp_path, "scenes", Listener(limit=100))
        server.wait_asked(100)
        (journalled, *others) = [sum(len(rows_of(path)) for path in journal_files(tmp_path))]
        assert journalled == 100 and not others
    with stand_in() as server, served(server, tmp_path) as session:
        answers = answer_all(session, prompts, 8, tmp_path, "scenes", Silent())
        assert [answer.text for answer in answers] == [answer_to(prompt) for prompt in prompts]
        assert server.asked.total() == 100


def rows_of(path: Path) -> list[dict[str, object]]:
    from compress.data.tables import read_rows

    return read_rows(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_part_is_asked_for_again(damage: str, tmp_path: Path) -> None:
    prompts = questions(150)
    with stand_in() as server, served(server, tmp_path) as session:
        whole = answer_all(session, prompts, 8, tmp_path, "scenes", Silent())
    last = journal_files(tmp_path)[-1]
    lost = {str(row["id"]) for row in rows_of(last)}
    content = last.read_bytes()
    last.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"not a table"}[damage])
    (last.parent / ".answers-00009.parquet.1a2b").write_bytes(b"left by a killed process")
    with stand_in() as server, served(server, tmp_path) as session:
        assert answer_all(session, prompts, 8, tmp_path, "scenes", Silent()) == whole
        assert set(server.asked) == {digest_of(p.text, p.images) for p in prompts if p.id in lost}
    assert len(journal_files(tmp_path)) > 1


@pytest.mark.parametrize("change", ["text", "image", "tokens", "name"])
def test_an_answer_to_something_else_is_not_taken(change: str, tmp_path: Path) -> None:
    prompts = questions(3)
    other = list(prompts)
    if change == "text":
        other[1] = Prompt("q1", "Is it really 1?", prompts[1].images)
    if change == "image":
        other[1] = Prompt("q1", prompts[1].text, (b"\x89PNG another",))
    with stand_in() as server, served(server, tmp_path) as session:
        answer_all(session, prompts, 8, tmp_path, "scenes", Silent())
        tokens, name = (9 if change == "tokens" else 8), ("scenes@again" if change == "name" else "scenes")
        answers = answer_all(session, other, tokens, tmp_path, name, Silent())
        assert [answer.text for answer in answers] == [answer_to(prompt) for prompt in other]
        assert server.asked.total() == 3 + (3 if change in ("tokens", "name") else 1)


def test_items_that_fail_are_counted_named_and_asked_once_more_later(tmp_path: Path) -> None:
    prompts, listener = questions(60), Listener()
    refusals = {f"it {number}.": Refusal(400, f"bad {number}") for number in (7, 21, 35, 49)}
    manners = Manners(statuses=refusals)
    with stand_in(manners=manners) as server, served(server, tmp_path) as session:
        answers = answer_all(session, prompts, 8, tmp_path, "scenes", listener)
        assert [answer.fault for answer in answers if answer.fault] == ["400: bad 7", "400: bad 21", "400: bad 35", "400: bad 49"]
        assert listener.warnings == [
            "task scenes: 4 of 60 items could not be answered and count as wrong; the first: q7: 400: bad 7; q21: 400: bad 21; "
            "q35: 400: bad 35"
        ]
        manners.statuses.clear()
        answers = answer_all(session, prompts, 8, tmp_path, "scenes", listener)
        assert [answer.text for answer in answers] == [answer_to(prompt) for prompt in prompts]
        assert server.asked.total() == 64
        assert len(listener.warnings) == 1


def test_where_all_items_fail_there_is_no_measurement(tmp_path: Path) -> None:
    manners = Manners(statuses={"it": Refusal(400, "no images here")})
    with (
        stand_in(manners=manners) as server,
        served(server, tmp_path) as session,
        pytest.raises(
            ServerError, match="task scenes: none of its 4 items could be answered; the first: q0: 400: no images here; q1: 400"
        ),
    ):
        answer_all(session, questions(4), 8, tmp_path, "scenes", Silent())


def test_questions_of_one_id_keep_their_own_answers(tmp_path: Path) -> None:
    prompts = [Prompt("same", f"Is it {number}.") for number in range(5)]
    with stand_in() as server, served(server, tmp_path) as session:
        for _ in range(2):
            answers = answer_all(session, prompts, 8, tmp_path, "scenes", Silent())
            assert [answer.text for answer in answers] == [answer_to(prompt) for prompt in prompts]
        assert server.asked.total() == 5


def test_prompts_computed_together_are_asked_for_together_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is whole, of the second some answers are kept: its prompts are computed in the same company as before."""
    folder = build_qwen2_5_vl(tmp_path / "model")
    monkeypatch.setattr(TransformersSession, "block", 4)
    prompts = [Prompt(f"q{number}", "What is it? " * (number % 3 + 1), (picture(number, 28, 28),)) for number in range(10)]
    prompts[2] = Prompt("q2", "What is it?", (b"no image",))
    with Transformers(runtime="transformers", device="cpu", tokens_per_batch=60).open(
        OpenContext.at(folder, folder, Silent())
    ) as inside:
        whole = answer_all(inside, prompts, TOKENS, tmp_path / "whole", "scenes", Silent())
        assert whole[2].fault is not None
        with pytest.raises(KeyboardInterrupt):
            answer_all(inside, prompts, TOKENS, tmp_path / "cut", "scenes", Listener(limit=6))
        journalled = {str(row["id"]) for path in journal_files(tmp_path / "cut") for row in rows_of(path)}
        assert {"q0", "q1", "q2", "q3"} < journalled < {f"q{number}" for number in range(8)}
        counting, listener = Counting(inside), Listener()
        assert answer_all(counting, prompts, TOKENS, tmp_path / "cut", "scenes", listener) == whole
    assert counting.answered == [f"q{number}" for number in range(4, 10)]
    assert listener.tasks == [("answer", 10, 10)]


def passages(count: int) -> list[Passage]:
    generator = np.random.default_rng(3)
    texts = [Passage(f"t{number}", tuple(generator.integers(0, 500, 3 + number % 4).tolist())) for number in range(count)]
    return [*texts, Passage("none", ()), Passage("forced", (17, 40), Prompt("p", "What is it?", (picture(1, 28, 28),)))]


def book(folder: Path, against: Path | None = None, name: str = "text") -> Journal:
    return Journal(folder, name, None if against else folder / "record" / name, against and against / "record" / name)


def assert_same(scores: Sequence[Score], expected: Sequence[Score]) -> None:
    assert [(score.id, score.fault) for score in scores] == [(score.id, score.fault) for score in expected]
    for one, other in zip(scores, expected, strict=True):
        for array, other_array in (
            (one.negative_log_likelihood, other.negative_log_likelihood),
            (one.kl, other.kl),
            (one.same_top, other.same_top),
        ):
            assert (array is None) == (other_array is None)
            assert array is None or other_array is None or (array.dtype == other_array.dtype and np.array_equal(array, other_array))


def test_scores_go_on_at_the_next_chunk(inside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording and comparing alike; a chunk whose scores were lost after its record was written is scored again."""
    monkeypatch.setattr(journal, "_CHUNK_PASSAGES", 4)
    texts, listener = passages(10), Listener()
    undisturbed = score_all(inside, texts, book(tmp_path / "whole"), listener)
    tokens = sum(len(score.negative_log_likelihood) for score in undisturbed)
    assert listener.tasks == [("score", tokens, tokens)]
    assert [path.name for path in sorted((tmp_path / "whole" / "record" / "text").iterdir())] == ["00000", "00001", "00002"]
    compared = score_all(inside, texts, book(tmp_path / "compared", tmp_path / "whole"), Silent())
    for source, expected in ((None, undisturbed), (tmp_path / "whole", compared)):
        target = tmp_path / f"cut-{source is None}"
        with pytest.raises(KeyboardInterrupt):
            score_all(Counting(inside, cut_after=8), texts, book(target, source), Silent())
        (target / "journal" / "text" / "scores-00001.npz").write_bytes(b"damaged")
        counting = Counting(inside)
        assert_same(score_all(counting, texts, book(target, source), Silent()), expected)
        assert counting.scored == [passage.id for passage in texts[4:]]
    scores = score_all(inside, texts, book(tmp_path / "last", tmp_path / "cut-True"), Silent())
    assert all(score.kl is not None and (score.kl < 1e-6).all() for score in scores)


def test_chunks_end_by_the_number_of_tokens_too(inside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_CHUNK_TOKENS", 10)
    texts = [Passage(f"t{number}", tuple(range(5, 10))) for number in range(5)] + [Passage("long", tuple(range(5, 45)))]
    score_all(inside, texts, book(tmp_path), Silent())
    assert len(list((tmp_path / "record" / "text").iterdir())) == 4


def test_scores_of_other_passages_are_not_taken(inside: Any, tmp_path: Path) -> None:
    first = score_all(inside, passages(3), book(tmp_path), Silent())
    counting = Counting(inside)
    second = score_all(counting, passages(3)[1:], book(tmp_path), Silent())
    assert [score.id for score in second] == [score.id for score in first[1:]]
    assert len(counting.scored) == len(second)


def test_passages_that_fail_are_told_of(inside: Any, tmp_path: Path) -> None:
    broken = Passage("broken", (17, 40), Prompt("broken", "What is it?", (b"no image",)))
    listener = Listener()
    scores = score_all(inside, [*passages(2), broken], book(tmp_path / "one"), listener)
    assert scores[-1].fault is not None
    assert_same(score_all(inside, [*passages(2), broken], book(tmp_path / "one"), Silent()), scores)
    assert listener.warnings[0].startswith(
        "task text: 1 of 4 items could not be scored and count as wrong; the first: broken: image 0: cannot be read"
    )
    score_all(inside, [*passages(2), broken], book(tmp_path / "two", tmp_path / "one"), listener)
    with pytest.raises(ServerError, match="task text: none of its 1 items could be scored; the first: broken: image 0"):
        score_all(inside, [broken, Passage("none", ())], book(tmp_path / "three"), Silent())


def test_a_runtime_that_mixes_items_up_is_told(inside: Any, tmp_path: Path) -> None:
    prompts = [Prompt(f"q{number}", "What is it?") for number in range(2)]
    with pytest.raises(CheckpointError, match="task scenes: the runtime did not answer the 2 prompts it was given in their order"):
        answer_all(Counting(inside, mixing=True), prompts, TOKENS, tmp_path, "scenes", Silent())
    with pytest.raises(CheckpointError, match="task text: the runtime did not score the 4 items it was given in their order"):
        score_all(Counting(inside, mixing=True), passages(2), book(tmp_path), Silent())

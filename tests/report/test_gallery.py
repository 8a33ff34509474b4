import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from compress.errors import MissingError
from compress.eval.results import Fidelity, ItemizedMeasurement, PerplexityMetrics, QuestionItem, ScoreMetrics, TaskMeasurement
from compress.eval.tasks.vqa import Vqa
from compress.report.gallery import Gallery, TaskFlips, make_gallery, thumbnail
from tests.jobs import write_questions
from tests.tiny import picture


def item(name: str, score: float, said: str = "red", fault: str | None = None) -> QuestionItem:
    accepted = ("red", "red", "dark red")
    return QuestionItem(
        id=name, digest=name, cluster=name, accepted=accepted, said=said, score=score, fault=fault,
        prompt=f"Asked: {name}", token_ids=(1,), tokens=1, nll=0.1,
    )  # fmt: skip


def measured(scores: Mapping[str, float], *, task: str = "scenes", binary: bool = True) -> ItemizedMeasurement:
    items = tuple(item(name, score) for name, score in scores.items())
    metrics = ScoreMetrics(task="vqa", metric="exact_match", score=0.5, items=len(items), binary=binary)
    return ItemizedMeasurement(tasks={task: TaskMeasurement(name=task, metrics=metrics)}, items={task: items})


def task(folder: Path, name: str = "scenes") -> tuple[Vqa, Callable[[], Sequence[Path]]]:
    path = write_questions(folder, f"{name}.jsonl", range(8))
    return Vqa.model_validate({"task": "vqa", "definition": "scenes", "name": name, "source": str(path)}), lambda: [path]


def scores(*values: float) -> dict[str, float]:
    return {f"q{number}": value for number, value in enumerate(values)}


def test_lost_items_come_first_with_their_images_and_every_answer(tmp_path: Path) -> None:
    vqa, files = task(tmp_path)
    before = measured(scores(1, 1, 0, 1, 0))
    after = {"awq": measured(scores(0, 1, 1, 0, 0)), "int8": measured(scores(1, 1, 1, 0, 0))}
    gallery = make_gallery([TaskFlips(vqa, files, before, after)])
    assert (gallery.lost, gallery.gained, gallery.missing) == (2, 1, ())
    assert [(card.id, card.kind, [answer.model for answer in card.answers]) for card in gallery.cards] == [
        ("q3", "lost", ["original", "awq", "int8"]),
        ("q0", "lost", ["original", "awq"]),
        ("q2", "gained", ["original", "awq", "int8"]),
    ]
    card = gallery.cards[0]
    assert card.question == "What is in picture 3?"
    assert card.accepted == (("red", 2), ("dark red", 1))
    assert card.images[0].uri.startswith("data:image/jpeg;base64,")


def test_the_data_are_read_only_where_something_flipped(tmp_path: Path) -> None:
    vqa, _ = task(tmp_path)

    def unwanted() -> Sequence[Path]:
        raise AssertionError("the data were asked for")

    same = measured(scores(1, 0))
    assert make_gallery([TaskFlips(vqa, unwanted, same, {"awq": same})]) == Gallery()


def test_data_that_have_gone_are_told_and_the_answers_stay(tmp_path: Path) -> None:
    vqa, _ = task(tmp_path)

    def gone() -> Sequence[Path]:
        raise MissingError("hub: cannot be reached; try again later")

    gallery = make_gallery([TaskFlips(vqa, gone, measured(scores(1)), {"awq": measured(scores(0))})])
    assert gallery.missing == ("scenes: hub: cannot be reached; try again later",)
    assert [(card.id, card.question, card.images) for card in gallery.cards] == [("q0", "Asked: q0", ())]


@pytest.mark.parametrize(("lost", "gained", "expected"), [(8, 8, (4, 2)), (8, 1, (5, 1)), (1, 8, (1, 5)), (2, 1, (2, 1))])
def test_so_many_are_shown_two_thirds_of_them_lost_where_there_are_enough(
    tmp_path: Path, lost: int, gained: int, expected: tuple[int, int]
) -> None:
    vqa, _ = task(tmp_path)
    before = measured({**{f"l{number}": 1 for number in range(lost)}, **{f"g{number}": 0 for number in range(gained)}})
    after = measured({**{f"l{number}": 0 for number in range(lost)}, **{f"g{number}": 1 for number in range(gained)}})
    gallery = make_gallery([TaskFlips(vqa, lambda: [tmp_path / "scenes.jsonl"], before, {"awq": after})], limit=6)
    kinds = [card.kind for card in gallery.cards]
    assert (kinds.count("lost"), kinds.count("gained")) == expected
    assert (gallery.lost, gallery.gained) == (lost, gained)


def test_tasks_take_turns(tmp_path: Path) -> None:
    flips: list[TaskFlips] = []
    for name in ("first", "second"):
        vqa, files = task(tmp_path, name)
        flips.append(TaskFlips(vqa, files, measured(scores(1, 1, 1), task=name), {"awq": measured(scores(0, 0, 0), task=name)}))
    gallery = make_gallery(flips, limit=3)
    assert [card.task for card in gallery.cards] == ["first", "second", "first"]


def test_a_graded_score_that_moved_is_a_flip(tmp_path: Path) -> None:
    vqa, files = task(tmp_path)
    gallery = make_gallery([TaskFlips(vqa, files, measured(scores(0.9), binary=False), {"awq": measured(scores(0.3))})])
    assert [(card.kind, card.binary, card.answers[1].score) for card in gallery.cards] == [("lost", False, 0.3)]


def test_items_that_an_artifact_was_not_asked_and_tasks_without_scores_are_no_flips(tmp_path: Path) -> None:
    vqa, files = task(tmp_path)
    before, after = measured(scores(1, 1)), measured({"q1": 1})
    text = PerplexityMetrics(perplexity=8, window=16, windows=1, tokens=16)
    fidelity = Fidelity(tokens=16, kl_mean=0.1, kl_p99=0.2, kl_interval=None, top1_agreement=0.9)
    plain = ItemizedMeasurement(
        tasks={"scenes": TaskMeasurement(name="scenes", metrics=text, fidelity=fidelity)}, items={"scenes": ()}
    )
    assert make_gallery([TaskFlips(vqa, files, before, {"awq": after}), TaskFlips(vqa, files, plain, {})]) == Gallery()


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (640, 480)), ("RGBA", (30, 900)), ("L", (12, 12)), ("P", (300, 300)), ("I;16", (9, 9))]
)
def test_thumbnails_are_small_jpegs_of_any_image(mode: str, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    small = thumbnail(buffer.getvalue(), "a picture")
    decoded = Image.open(io.BytesIO(base64.b64decode(small.uri.partition(",")[2])))
    assert (decoded.format, decoded.mode, decoded.size) == ("JPEG", "RGB", (small.width, small.height))
    assert max(decoded.size) <= 256
    scale = min(1, 256 / max(size))
    assert decoded.size == tuple(max(1, round(side * scale)) for side in size)


def test_what_is_transparent_is_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(buffer, "PNG")
    decoded = Image.open(io.BytesIO(base64.b64decode(thumbnail(buffer.getvalue(), "a picture").uri.partition(",")[2])))
    assert decoded.getpixel((10, 10)) == (255, 255, 255)


def test_an_image_is_shown_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).convert("RGB").resize((80, 40)).save(buffer, "JPEG", exif=exif)
    small = thumbnail(buffer.getvalue(), "a picture")
    assert (small.width, small.height) == (40, 80)

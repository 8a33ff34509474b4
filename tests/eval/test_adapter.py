"""Tasks of lmms-eval and lm-evaluation-harness, run by them in their environments against a real vLLM server."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from PIL import Image
from pydantic import ValidationError

from compress.errors import MissingError, RecipeError, ServerError, UsageError
from compress.eval.harness.worker import FAILED, AnswerLog, HarnessResults, UnknownNameError, canonical, details, item
from compress.eval.results import AdapterItem, ScoreMetrics, read_items
from compress.eval.tasks.adapter import Adapter, expand_short_name
from compress.eval.tasks.task import TaskContext
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext, Session
from compress.runtimes.transformers.runtime import Transformers
from compress.runtimes.vllm.runtime import Vllm
from compress.workers.environment import install
from tests.runtimes.agreement import FEW_BLOCKS
from tests.tiny import build_qwen2_5_vl

PRELOADED = ("vllm", "lmms-eval", "lm-eval")

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
COLOURS = ("red", "blue", "green")


class Listening(Silent):
    """Progress that remembers its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_short_names_stand_for_tables() -> None:
    assert expand_short_name("lmms:mme") == {"task": "adapter", "harness": "lmms", "benchmark": "mme"}
    assert expand_short_name("lm:hellaswag") == {"task": "adapter", "harness": "lm", "benchmark": "hellaswag"}
    assert expand_short_name("lmm:mme") == "lmm:mme"
    assert expand_short_name({"task": "vqa"}) == {"task": "vqa"}


def test_named_as_the_benchmark_unless_said() -> None:
    assert adapter("lm", "arc:easy").name == "arc-easy"
    assert adapter("lm", "arc_easy", name="arc").name == "arc"


@pytest.mark.parametrize(
    ("harness", "fields", "message"),
    [
        ("lmms", {"filter": "strict"}, "filter belongs to harness: lm"),
        ("lmms", {"chat": True}, "chat belongs to harness: lm"),
        ("lm", {"benchmark": "two,tasks"}, "pattern"),
        ("lm", {"include_path": str(Path(__file__))}, "no folder at"),
        ("lm", {"include_path": "./nowhere"}, "no file or folder at"),
        ("lm", {"shots": 5}, "Extra inputs"),
    ],
)
def test_faults_of_a_table_are_told(harness: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        adapter(harness, **{"benchmark": "mme", **fields})


def test_says_how_to_install_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path))
    with pytest.raises(MissingError, match="compress runtime install lmms-eval"):
        adapter("lmms", "mme").settings()


def test_needs_a_server(tmp_path: Path) -> None:
    model = build_qwen2_5_vl(tmp_path / "model")
    runtime = Transformers(runtime="transformers", dtype="float32", device="cpu")
    with (
        runtime.open(OpenContext.at(model, tmp_path, Silent())) as session,
        pytest.raises(UsageError, match="does not offer a server for harnesses to ask"),
    ):
        adapter("lmms", "mme").measure(context(session, tmp_path))


def test_a_recipe_without_a_server_is_refused(tmp_path: Path) -> None:
    message_pattern = r"eval\.tasks\.1: adapter needs a server, and runtime transformers has none"
    with pytest.raises(RecipeError, match=message_pattern):
        make_plan(DEMO.parent / "demo.yaml", {"eval.tasks.1": "lmms:mme", "gate.perplexity": None}, Store(tmp_path))


def test_a_name_that_cannot_be_is_a_fault_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"eval\.tasks\.0: does not have the form .*two tasks"):
        make_plan(DEMO.parent / "demo.yaml", {"eval.tasks.0": "lmms:two tasks"}, Store(tmp_path))


def test_an_item_is_known_by_its_content_and_its_images() -> None:
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    other = Image.new("RGB", (4, 4), (0, 255, 0))
    rows = [
        row_of({"doc_id": 0, "doc": {"image": image, "question": question}, "exact_match": True})
        for image, question in ((picture, "?"), (picture.copy(), "?"), (picture, "!"), (other, "?"), (None, "?"))
    ]
    assert rows[0] == rows[1]
    assert len({row["digest"] for row in rows}) == 4
    assert rows[2]["cluster"] == rows[0]["cluster"] != rows[3]["cluster"]
    assert rows[4]["cluster"] == rows[4]["digest"]


def test_stored_images_are_digests() -> None:
    images: list[str] = []
    content = canonical({"image": {"bytes": b"png", "path": None}, "many": [b"jpeg"], "n": 1, "odd": object()}, images)
    assert content == {"image": images[0], "many": [images[1]], "n": 1, "odd": "object"}


@pytest.mark.parametrize(
    ("value", "score"),
    [(1, 1.0), (True, 1.0), (0.25, 0.25), ({"score": 0.5, "category": "a"}, 0.5), ({"right": 3, "of": 4}, 0.75)],
)
def test_an_item_scores_what_the_metric_gives_it(value: object, score: float) -> None:
    assert row_of({"doc_id": 3, "exact_match": value})["score"] == score


def test_a_metric_of_all_items_together_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="gives none a score of its own"):
        row_of({"doc_id": 3, "exact_match": ("said", "meant")})


def test_a_failed_request_is_the_items_fault() -> None:
    row = row_of({"doc_id": 1, "resps": [[FAILED + "500: broken"]], "exact_match": 1.0})
    assert (row["score"], row["said"], row["fault"]) == (0.0, "", "500: broken")
    lmms_row = row_of({"doc_id": 1, "resps": [["[LMMS_EVAL_REQUEST_FAILED after 4 retries] timed out"]], "exact_match": 1.0})
    assert lmms_row["fault"] == "timed out"
    choice = row_of({"doc_id": 1, "resps": [[(-1.0, True)], [(-float("inf"), False)]], "exact_match": 1.0})
    assert (choice["score"], choice["fault"]) == (0.0, "the server gave no likelihood of it")


def test_aggregates_come_with_their_errors() -> None:
    row = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": float("nan"), "acc_norm,none": 0.25, "acc_norm_stderr,none": 0.1}
    task = SimpleNamespace(VERSION=2.0)
    assert details(HarnessResults({"x": task}, {}, {"x": row})) == {
        "acc": 0.5,
        "acc_norm": 0.25,
        "acc_norm_stderr": 0.1,
        "task version": 2.0,
    }
    two_tasks = details(HarnessResults({"x": task, "y": task}, {}, {"x": {"em,strict": 1.0}, "y": {"em,loose": 0.0}}))
    assert two_tasks == {"x: em (strict)": 1.0, "y: em (loose)": 0.0}


def test_a_journal_gives_each_answer_once_and_drops_what_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    first = AnswerLog(path)
    first.add("a", ["one"])
    first.add("a", ["two"])
    first.file.close()
    path.write_bytes(path.read_bytes() + b'["b", ["thr')
    again = AnswerLog(path)
    assert [again.find("a"), again.find("a"), again.find("a"), again.find("b")] == [["one"], ["two"], None, None]
    again.add("b", ["three"])
    again.file.close()
    last = AnswerLog(path)
    last.file.close()
    assert last.find("b") == ["three"]


@dataclass(frozen=True)
class Bench:
    """A server, and a folder with task files for both harnesses."""

    session: Session
    lmms: Path
    lm: Path
    key: str


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Generator[Bench]:
    for name in ("vllm", "lmms-eval", "lm-eval"):
        install(name, Silent())
    folder = tmp_path_factory.mktemp("bench")
    runtime = Vllm(runtime="vllm", dtype="float32", kv_cache_gib=1, max_model_len=512, arguments=FEW_BLOCKS)
    with runtime.open(OpenContext.at(DEMO / "model", folder / "logs", Silent())) as session:
        client = session.endpoint.client
        key = str(client.headers["Authorization"]).removeprefix("Bearer ")
        yield Bench(session, write_scenes(folder / "lmms"), write_texts(folder / "lm"), key)


@pytest.mark.slow
def test_lmms_eval_asks_the_server(bench: Bench, tmp_path: Path) -> None:
    task = adapter("lmms", "demo_scenes", include_path=str(bench.lmms), samples=24)
    measurement = task.measure(context(bench.session, tmp_path / "original"))
    metrics = cast("ScoreMetrics", measurement.metrics)
    items = adapter_items(tmp_path / "original", "demo_scenes")
    assert (metrics.metric, metrics.items, metrics.failed, metrics.binary) == ("exact_match", 24, 0, True)
    assert metrics.score == metrics.details["exact_match"] == sum(row.score for row in items) / 24
    assert metrics.score > 0.8
    assert {"exact_match_stderr", "task version"} <= set(metrics.details)
    assert [row.id for row in items] == [f"demo_scenes-{number}" for number in range(24)]
    assert all((row.said.lower() in row.accepted) == (row.score == 1.0) for row in items)
    assert len({row.digest for row in items}) == 24
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "lmms-eval-demo_scenes.log" for path in written)
    assert not any(bench.key.encode() in path.read_bytes() for path in written)

    copy = task.measure(context(bench.session, tmp_path / "copy", against=tmp_path / "original"))
    assert copy.metrics == measurement.metrics
    assert adapter_items(tmp_path / "copy", "demo_scenes") == items


@pytest.mark.slow
def test_what_was_answered_is_not_asked_again(bench: Bench, tmp_path: Path) -> None:
    for task in (
        adapter("lmms", "demo_scenes", include_path=str(bench.lmms), samples=8),
        adapter("lm", "demo_texts", include_path=str(bench.lm)),
    ):
        task.measure(context(bench.session, tmp_path))
        before = adapter_items(tmp_path, task.name)
        journal = tmp_path / "journal" / f"{task.name}.harness.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])  # the last answer was being written
        listening = Listening()
        with nowhere() as session:
            cut = cast("ScoreMetrics", task.measure(context(session, tmp_path, progress=listening)).metrics)
        after = adapter_items(tmp_path, task.name)
        assert cut.failed == 1
        assert listening.warnings == [
            next(
                f"task {task.name}: 1 of {len(after):,} items have no answer and count 0, such as {row.id}: {row.fault}"
                for row in after
                if row.fault
            )
        ]
        assert [row for row in after if row.fault is None] == [
            old for old, new in zip(before, after, strict=True) if new.fault is None
        ]


@pytest.mark.slow
def test_lm_eval_compares_likelihoods(bench: Bench, tmp_path: Path) -> None:
    task = adapter("lm", "demo_texts", include_path=str(bench.lm))
    metrics = cast("ScoreMetrics", task.measure(context(bench.session, tmp_path)).metrics)
    items = adapter_items(tmp_path, "demo_texts")
    assert (metrics.metric, metrics.items, metrics.binary) == ("acc", 12, True)
    assert metrics.score == metrics.details["acc"] == sum(row.score for row in items) / 12
    assert {"acc_stderr", "acc_norm", "acc_norm_stderr"} <= set(metrics.details)
    assert [row.accepted for row in items] == [(COLOURS[number % 3],) for number in range(12)]
    assert all(row.said in COLOURS and (row.said in row.accepted) == (row.score == 1.0) for row in items)


@pytest.mark.slow
def test_lm_eval_runs_groups_and_asks_in_chat(bench: Bench, tmp_path: Path) -> None:
    task = adapter("lm", "demo_said", include_path=str(bench.lm), chat=True, samples=5)
    metrics = cast("ScoreMetrics", task.measure(context(bench.session, tmp_path)).metrics)
    items = adapter_items(tmp_path, "demo_said")
    assert metrics.items == 10
    assert {row.id.rpartition("-")[0] for row in items} == {"demo_says", "demo_tells"}
    assert {"demo_says: exact_match (first)", "demo_tells: exact_match (none)"} <= set(metrics.details)
    assert all(len(row.said) == 1 for row in items if row.id.startswith("demo_says"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"benchmark": "demo_text"}, RecipeError, "lm-eval: no task is called demo_text; near it are demo_texts"),
        ({"benchmark": "demo_texts", "metric": "f1"}, RecipeError, "the task's metrics are acc, acc_norm, and not f1"),
        ({"benchmark": "demo_says", "chat": True, "filter": "x"}, RecipeError, "filters are first, last, and not x"),
        ({"benchmark": "demo_worse", "chat": True}, RecipeError, "the metric misses is the better the lower it is"),
        ({"benchmark": "demo_texts", "chat": True}, ServerError, "asked for by completions: leave out chat"),
    ],
)
def test_what_the_harness_does_not_have_is_told(
    bench: Bench, tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    task = adapter("lm", **fields, include_path=str(bench.lm))
    with pytest.raises(error, match=message) as caught:
        task.measure(context(bench.session, tmp_path))
    assert str(tmp_path / "logs") in str(caught.value)


@pytest.mark.slow
def test_data_that_are_not_there_offline_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a task of the harness in a group of the user's own."""
    monkeypatch.delenv("COMPRESS_RUNTIMES")  # the hub's library reads the two variables when it is imported
    install("lm-eval", Silent())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    message_pattern = r"Rowan/hellaswag.*\n.*HF_HUB_OFFLINE is set: the data must be in the hub's cache"
    with nowhere() as session, pytest.raises(MissingError, match=message_pattern):
        adapter("lm", "demo_mixed", include_path=str(write_texts(tmp_path / "lm"))).measure(context(session, tmp_path))


@pytest.mark.slow
def test_a_server_that_is_not_there_or_wants_another_key_is_told(bench: Bench, tmp_path: Path) -> None:
    texts = adapter("lm", "demo_tells", include_path=str(bench.lm), chat=True, samples=2)
    message_pattern = r"had no answer to any of its 2 items \(ClientConnectorError.*lm-eval-demo_tells.log"
    with nowhere() as session, pytest.raises(ServerError, match=message_pattern):
        texts.measure(context(session, tmp_path / "nowhere"))
    endpoint = cast("Any", bench.session).endpoint
    scenes = adapter("lmms", "demo_scenes", include_path=str(bench.lmms), samples=2)
    refused = r"had no answer to any of its 2 items \(.*401"
    with nowhere(str(endpoint.client.base_url), endpoint.model) as session, pytest.raises(ServerError, match=refused):
        scenes.measure(context(session, tmp_path / "key"))


@pytest.mark.slow
def test_the_key_covers_the_harness_and_the_task_files(bench: Bench) -> None:
    task = adapter("lm", "demo_texts", include_path=str(bench.lm))
    before = task.settings()
    assert before["versions"]["lm-eval"]
    assert task.settings() == before
    note = bench.lm / "further.yaml"
    note.write_text("task: further\n")
    changed = task.settings()
    note.unlink()
    assert changed != before == task.settings()
    assert str(bench.lm) not in json.dumps(before)


def adapter(harness: str, benchmark: str, **fields: Any) -> Adapter:
    return Adapter.model_validate({"task": "adapter", "harness": harness, "benchmark": benchmark, **fields})


def context(session: Session, folder: Path, against: Path | None = None, progress: Silent | None = None) -> TaskContext:
    folder.mkdir(parents=True, exist_ok=True)
    return TaskContext(
        session=session,
        original_checkpoint=DEMO / "model",
        files=(),
        output_dir=folder,
        original_measurement=against,
        progress=progress or Silent(),
        logs=folder / "logs",
    )


@contextmanager
def nowhere(url: str = "http://127.0.0.1:9", model: str = "none") -> Generator[Session]:
    """Give a session whose server is not there, or is another's and not given the key."""
    with httpx.Client(base_url=url, trust_env=False) as client:
        endpoint = SimpleNamespace(client=client, model=model, check=lambda: None)
        yield cast("Session", SimpleNamespace(endpoint=endpoint, reordered=lambda: None))


def adapter_items(folder: Path, name: str) -> list[AdapterItem]:
    return [row for row in read_items(folder, name) if isinstance(row, AdapterItem)]


def row_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a sample with these parts."""

    def share(rows: list[dict[str, int]]) -> float:
        return sum(row["right"] for row in rows) / sum(row["of"] for row in rows)

    task = SimpleNamespace(aggregation=lambda: {"exact_match": share})
    sample: dict[str, Any] = {"doc": {}, "arguments": ["words"], "resps": [["red"]], "filtered_resps": ["red"], "target": "red"}
    return item("scenes", task, sample | fields, ["exact_match"])[0]


def write_scenes(folder: Path) -> Path:
    """Write lmms-eval's files of a task over the demo's scenes."""
    folder.mkdir()
    (folder / "scenes.py").write_text('def visual(doc):\n    return [doc["image"].convert("RGB")]\n')
    (folder / "scenes.yaml").write_text(f"""\
task: demo_scenes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {DEMO / "test.parquet"}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
metadata: {{version: 1.0}}
""")
    return folder


def write_texts(folder: Path) -> Path:
    """Write lm-eval's files of three tasks over a few lines of text, two of them a group."""
    folder.mkdir()
    rows = [{"text": f"{number + 1} shapes. The colour of the shape is", "label": number % 3} for number in range(12)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"""\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "texts.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
metadata: {{version: 2.0}}
"""
    choice = f"""\
output_type: multiple_choice
doc_to_choice: {json.dumps(COLOURS)}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
    answer = """\
output_type: generate_until
generation_kwargs: {max_gen_toks: 4, until: ["\\n"]}
"""
    exact = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    filters = """\
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "^\\\\s*(\\\\S)"}, {function: take_first}]}
  - {name: last, filter: [{function: regex, regex_pattern: "(\\\\S)\\\\s*$"}, {function: take_first}]}
"""
    (folder / "misses.py").write_text('def misses(doc, results):\n    return {"misses": 1.0}\n')
    worse = "process_results: !function misses.misses\n" + exact.replace("exact_match", "misses").replace("true", "false")
    (folder / "texts.yaml").write_text("task: demo_texts\n" + data + choice)
    (folder / "says.yaml").write_text("task: demo_says\n" + data + answer + exact + filters)
    (folder / "tells.yaml").write_text("task: demo_tells\n" + data + answer + exact)
    (folder / "worse.yaml").write_text("task: demo_worse\n" + data + answer + worse)
    (folder / "said.yaml").write_text("group: demo_said\ntask: [demo_says, demo_tells]\n")
    (folder / "mixed.yaml").write_text("group: demo_mixed\ntask: [demo_tells, hellaswag]\n")
    return folder

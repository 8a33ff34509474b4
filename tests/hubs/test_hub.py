from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import torch as safetensors_torch

from compress.calibration.enough import enough_for
from compress.calibration.sets import TextSet
from compress.checkpoints.artifact import file_digest
from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.output_head import head_is_tied
from compress.errors import CheckpointError, MissingError, UsageError
from compress.families.resolve import family_at
from compress.hubs.hub import (
    fetch_dataset_files,
    fetch_model,
    open_pinned,
    resolve_dataset,
    resolve_model,
)
from compress.progress import Silent
from tests.hub_server import HubServer, Repo, hub_server
from tests.pickles import files_of, save_pickles
from tests.tiny import build_qwen2_5_vl


class Counting(Silent):
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        assert unit == "B"
        counts = list[int]()
        self.tasks.append((name, total, counts))
        yield counts.append


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[HubServer]:
    with hub_server() as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope-home"))
        monkeypatch.setenv("MODELSCOPE_CREDENTIALS_PATH", str(tmp_path / "modelscope-home"))
        yield server
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("model"))


def sharded(folder: Path) -> dict[str, bytes]:
    """Return the checkpoint's files with its weights in two shards."""
    files = files_of(folder)
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    del files["model.safetensors"]
    for shard, tensor_names in shards.items():
        files[shard] = safetensors_torch.save({name: tensors[name] for name in tensor_names})
    weight_map = {name: shard for shard, tensor_names in shards.items() for name in tensor_names}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(cast("Any", pa).table(columns), buffer)
    return buffer.getvalue()


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    return {name: (entry.dtype, entry.shape, entry.start, entry.end) for name, entry in checkpoint.tensors.items()}


def test_plan_reads_headers_only(hub: HubServer, checkpoint: Path) -> None:
    hub.repos["model", "org/tiny"] = repo = Repo(sharded(checkpoint))
    pin = resolve_model("org/tiny", "huggingface", "main")
    opened = open_pinned(pin)
    assert opened is not None
    plain = open_checkpoint(checkpoint)
    assert {name: entry.shape for name, entry in opened.tensors.items()} == {
        name: entry.shape for name, entry in plain.tensors.items()
    }
    assert opened.weight_bytes == plain.weight_bytes
    assert opened.config == plain.config
    assert pin.describe() == {"source": "org/tiny", "hub": "huggingface", "revision": "main", "commit": repo.commit}
    assert not any(name.endswith(".safetensors") for name in hub.names())


@pytest.mark.parametrize("hub_name", ["huggingface", "modelscope"])
def test_a_part_that_drips_is_waited_for_so_long(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, hub_name: Literal["huggingface", "modelscope"]
) -> None:
    kind, revision = ("model", "main") if hub_name == "huggingface" else ("modelscope", "master")
    hub.repos[kind, "org/tiny"] = repo = Repo(files_of(checkpoint), revisions=("main", "master"))
    pin = resolve_model("org/tiny", hub_name, revision)
    repo.dripping = True
    monkeypatch.setenv("COMPRESS_LIMIT_HUB_SECONDS", "1")
    with pytest.raises(MissingError, match=r"org/tiny: a part of a file has not come in time \(limit hub_seconds = 1, set by"):
        open_pinned(pin)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"[",
        b"[1]",
        b"null",
        b'{"sha": 7}',
        b'{"id": "org/tiny", "sha": "c0ffee", "siblings": [7]}',
        b'{"id": "org/tiny", "sha": "c0ffee", "siblings": [{}]}',
        b'{"id": "org/tiny", "sha": "c0ffee", "siblings": {"a": 1}}',
        b'{"id": "org/tiny", "sha": "c0ffee", "siblings": [{"rfilename": 7}]}',
        b'{"id": "org/tiny", "sha": "c0ffee", "siblings": [{"rfilename": "config.json", "size": "large"}]}',
        b'{"id": "org/tiny", "sha": "c0ffee", "siblings": [{"rfilename": "config.json", "size": -1}]}',
        b"[" * 100_000,
    ],
)
def test_a_listing_that_cannot_be_read_is_one_message(hub: HubServer, said: bytes) -> None:
    hub.repos["model", "org/tiny"] = Repo({}, said=said)
    with pytest.raises((MissingError, CheckpointError), match=r"^org/tiny: [^\n]+$"):
        resolve_model("org/tiny", "huggingface", "main")


@pytest.mark.parametrize(
    "files",
    [
        b"7",
        b"[7]",
        b"[{}]",
        b'{"a": 1}',
        b'[{"Path": 7, "Size": 1, "Sha256": "ab"}]',
        b'[{"Path": "config.json", "Size": "large", "Sha256": "ab"}]',
        b'[{"Path": "config.json", "Size": -1, "Sha256": "ab"}]',
        b'[{"Path": "../config.json", "Size": 1, "Sha256": "ab"}]',
        b'[{"Path": "config.json", "Size": 1, "Sha256": [7]}]',
        b"[" * 100_000,
    ],
)
def test_a_listing_of_modelscope_that_cannot_be_read_is_one_message(hub: HubServer, files: bytes) -> None:
    hub.repos["modelscope", "org/tiny"] = Repo(
        {}, revisions=("master",), said=b'{"Code": 200, "Success": true, "Data": {"Files": %b}}' % files
    )
    with pytest.raises((MissingError, CheckpointError), match=r"^org/tiny: [^\n]+$"):
        resolve_model("org/tiny", "modelscope", "master")


def test_fetch_takes_the_listed_files_only(hub: HubServer, checkpoint: Path) -> None:
    extra = {
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"no",
        "consolidated.safetensors": b"no",
        "notes.txt": b"no",
        "README.md": b"no",
    }
    hub.repos["model", "org/tiny"] = Repo({**sharded(checkpoint), **extra})
    pin = resolve_model("org/tiny", "huggingface", "main")
    progress = Counting()
    folder = fetch_model(pin, progress)
    assert not set(hub.names()) & set(extra)
    assert shapes(open_checkpoint(folder)).keys() == shapes(open_checkpoint(checkpoint)).keys()
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert file_digest(folder / name) == file_digest(checkpoint / name)
    ((_, total, counts),) = progress.tasks
    assert sum(counts) == total
    fetch_model(pin, Silent(), trust_remote_code=True)
    assert "modeling.py" in hub.names()


def test_remote_table_equals_the_fetched_one(hub: HubServer, checkpoint: Path) -> None:
    hub.repos["model", "org/tiny"] = Repo(files_of(checkpoint))
    pin = resolve_model("org/tiny", "huggingface", "main")
    before = open_pinned(pin)
    assert before is not None
    fetched = open_checkpoint(fetch_model(pin, Silent()))
    assert shapes(before) == shapes(fetched)
    assert before.folder == fetched.folder
    assert before.tensors["lm_head.weight"].file == fetched.tensors["lm_head.weight"].file


def test_digest_follows_the_content(hub: HubServer, checkpoint: Path) -> None:
    files = files_of(checkpoint)
    hub.repos["model", "org/tiny"] = Repo(files)
    first = resolve_model("org/tiny", "huggingface", "main")
    hub.repos["model", "org/tiny"] = Repo({**files, "README.md": b"x"}, commit="beef" * 10)
    readme = resolve_model("org/tiny", "huggingface", "main")
    hub.repos["model", "org/tiny"] = Repo({**files, "chat_template.jinja": b"x"}, commit="feed" * 10)
    template = resolve_model("org/tiny", "huggingface", "main")
    weights = {"model.safetensors": files["model.safetensors"][:-1] + b"x"}
    hub.repos["model", "org/tiny"] = Repo({**files, **weights}, commit="dead" * 10)
    retrained = resolve_model("org/tiny", "huggingface", "main")
    assert first.digest(file_digest) == readme.digest(file_digest)
    assert len({pin.digest(file_digest) for pin in (first, template, retrained)}) == 3
    assert first.side_digest(file_digest) == retrained.side_digest(file_digest) != template.side_digest(file_digest)


def test_folder_digest_follows_the_content(tmp_path: Path, checkpoint: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in files_of(checkpoint).items():
        (copy / name).write_bytes(data)
    original, other = (resolve_model(str(folder), "huggingface", "main") for folder in (checkpoint, copy))
    assert original.digest(file_digest) == other.digest(file_digest)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert original.digest(file_digest) != other.digest(file_digest)
    assert other.describe() == {"source": str(copy)}
    assert fetch_model(other, Silent()) == copy


def test_the_licence_comes_with_the_card_and_its_terms_with_the_model(hub: HubServer, checkpoint: Path) -> None:
    terms = {"README.md": b"---\nlicense: apache-2.0\n---\n", "LICENSE": b"terms", "USE_POLICY.md": b"policy"}
    hub.repos["model", "org/tiny"] = Repo({**files_of(checkpoint), **terms})
    pin = resolve_model("org/tiny", "huggingface", "main")
    assert pin.describe()["license"] == "apache-2.0"
    folder = fetch_model(pin, Silent())
    assert {name: (folder / name).read_bytes() for name in terms} == terms


def test_a_contradiction_about_the_head_is_seen_before_the_weights_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model", layers=1, tied=True)
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    for other in (False, True):
        head = tensors["model.embed_tokens.weight"] + (1 if other else 0)
        safetensors_torch.save_file({**tensors, "lm_head.weight": head.contiguous()}, folder / "model.safetensors")
        hub.repos["model", f"org/head{other}"] = Repo(files_of(folder))
        opened = open_pinned(resolve_model(f"org/head{other}", "huggingface", "main"))
        assert opened is not None
        assert not any(entry.file.exists() for entry in opened.tensors.values())
        assert head_is_tied(opened, family_at(folder)) != other


def test_offline_takes_the_cache(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["model", "org/tiny"] = Repo(files_of(checkpoint))
    online = resolve_model("org/tiny", "huggingface", "main")
    folder = fetch_model(online, Silent())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    served = len(hub.served)
    offline = resolve_model("org/tiny", "huggingface", "main")
    assert offline.digest(file_digest) == online.digest(file_digest)
    assert offline.describe() == online.describe()
    assert fetch_model(offline, Silent()) == folder
    assert open_pinned(offline) is not None
    assert len(hub.served) == served
    with pytest.raises(MissingError, match=r"org/other: not in the cache at revision 'main', and HF_HUB_OFFLINE is set"):
        resolve_model("org/other", "huggingface", "main")


def test_unreachable_hub_takes_the_cache_or_says_so(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["model", "org/tiny"] = Repo(files_of(checkpoint))
    online = resolve_model("org/tiny", "huggingface", "main")
    fetch_model(online, Silent())
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model("org/tiny", "huggingface", "main").digest(file_digest) == online.digest(file_digest)
    with pytest.raises(MissingError, match=r"127.0.0.1:9 cannot be reached .* set HF_ENDPOINT to a mirror, or name a local path"):
        resolve_model("org/other", "huggingface", "main")


def test_missing_things_are_named(hub: HubServer, checkpoint: Path) -> None:
    hub.repos["model", "org/tiny"] = Repo(files_of(checkpoint))
    hub.repos["model", "org/gated"] = Repo(files_of(checkpoint), gated=True)
    hub.repos["model", "org/empty"] = Repo({"README.md": b""})
    with pytest.raises(MissingError, match=r"org/none: no such model at http.*/org/none, or a private one; .*HF_TOKEN"):
        resolve_model("org/none", "huggingface", "main")
    with pytest.raises(MissingError, match="org/tiny: has no revision 'v9'"):
        resolve_model("org/tiny", "huggingface", "v9")
    with pytest.raises(CheckpointError, match=r"org/empty: holds no config.json at revision main"):
        resolve_model("org/empty", "huggingface", "main")
    with pytest.raises(UsageError, match="'a b': is no model id such as org/name"):
        resolve_model("a b", "huggingface", "main")
    hub.repos["model", "org/down"] = Repo({}, down=True)
    with pytest.raises(MissingError, match=r"org/down: http.* answered .*503.*; try again, or set HF_TOKEN"):
        resolve_model("org/down", "huggingface", "main")
    gated = resolve_model("org/gated", "huggingface", "main")
    with pytest.raises(MissingError, match=r"org/gated: is gated; accept its licence at http.*/org/gated and set HF_TOKEN"):
        open_pinned(gated)


def test_damaged_download_is_fetched_again_then_refused(hub: HubServer, checkpoint: Path) -> None:
    files = files_of(checkpoint)
    hub.repos["model", "org/once"] = Repo(files, damaged={"model.safetensors": 1})
    folder = fetch_model(resolve_model("org/once", "huggingface", "main"), Silent())
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    hub.repos["model", "org/always"] = Repo(files, damaged={"model.safetensors": 9})
    pin = resolve_model("org/always", "huggingface", "main")
    with pytest.raises(MissingError, match=r"org/always: model.safetensors arrived damaged twice"):
        fetch_model(pin, Silent())
    hub.repos["model", "org/always"].damaged.clear()
    assert (fetch_model(pin, Silent()) / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_index_naming_an_absent_shard_is_refused(hub: HubServer, checkpoint: Path) -> None:
    files = sharded(checkpoint)
    del files["model-00002-of-00002.safetensors"]
    hub.repos["model", "org/tiny"] = Repo(files)
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002.safetensors, which is not there"):
        open_pinned(resolve_model("org/tiny", "huggingface", "main"))


def test_endpoint_and_cache_come_from_the_environment(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    hub.repos["model", "org/tiny"] = Repo(files_of(checkpoint))
    program = (
        "from compress.hubs.hub import fetch_model, resolve_model\n"
        "from compress.progress import Silent\n"
        "print(fetch_model(resolve_model('org/tiny', 'huggingface', 'main'), Silent()))\n"
        "import sys\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")
    assert done.stderr == ""


def test_modelscope(hub: HubServer, checkpoint: Path) -> None:
    files = sharded(checkpoint)
    hub.repos["modelscope", "org/tiny"] = Repo({**files, "modeling.py": b"raise SystemExit"}, revisions=("master",))
    pin = resolve_model("org/tiny", "modelscope", "master")
    opened = open_pinned(pin)
    assert opened is not None
    assert not any(name.endswith(".safetensors") for name in hub.names())
    progress = Counting()
    folder = fetch_model(pin, progress)
    assert shapes(open_checkpoint(folder)) == shapes(opened)
    assert folder == opened.folder
    assert "modeling.py" not in hub.names()
    ((_, total, counts),) = progress.tasks
    assert sum(counts) == total
    assert pin.describe()["hub"] == "modelscope"
    assert pin.digest(file_digest) == resolve_model("org/tiny", "modelscope", "master").digest(file_digest)


def test_modelscope_faults(hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["modelscope", "org/tiny"] = Repo(files_of(checkpoint), revisions=("master",))
    with pytest.raises(MissingError, match=r"org/tiny: ModelScope has no such model with a revision 'main'; .*master"):
        resolve_model("org/tiny", "modelscope", "main")
    pin = resolve_model("org/tiny", "modelscope", "master")
    hub.repos["modelscope", "org/tiny"].files["config.json"] += b" "
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    with pytest.raises(MissingError, match=r"org/tiny: a file changed or was damaged since master was pinned"):
        fetch_model(pin, Silent())
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(MissingError, match=r'not installed; run pip install "vlm-compress\[modelscope\]"'):
        resolve_model("org/tiny", "modelscope", "master")


WIKITEXT_CARD = b"""---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: [wikitext-2-raw-v1/train-*]
- config_name: other
  data_dir: elsewhere
  data_files: {train: "*.jsonl"}
---
# Wikitext
"""


def test_dataset_by_its_card(hub: HubServer) -> None:
    files = {
        "README.md": WIKITEXT_CARD,
        "wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet(text=["a"]),
        "wikitext-2-raw-v1/train-00001-of-00002.parquet": parquet(text=["c"]),
        "wikitext-2-raw-v1/train-00000-of-00002.parquet": parquet(text=["b"]),
        "elsewhere/x.jsonl": b'{"text": "d"}\n',
    }
    hub.repos["dataset", "org/wikitext"] = Repo(files)
    pin = resolve_dataset("org/wikitext", "wikitext-2-raw-v1", "train", "main")
    assert [file.name for file in pin.files] == [
        "wikitext-2-raw-v1/train-00000-of-00002.parquet",
        "wikitext-2-raw-v1/train-00001-of-00002.parquet",
    ]
    assert pin.label == "org/wikitext@c0ffee000000"
    assert [file.name for file in resolve_dataset("org/wikitext", "other", "train", "main").files] == ["elsewhere/x.jsonl"]
    with pytest.raises(
        MissingError, match=r"split 'dev' of subset 'other' .*subset wikitext-2-raw-v1 with test, train; subset other"
    ):
        resolve_dataset("org/wikitext", "other", "dev", "main")


@pytest.mark.parametrize(
    ("subset", "names"),
    [
        (None, ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (None, ["train.jsonl"]),
        ("en", ["en/train-00000-of-00001.parquet"]),
        ("en", ["en/train/0000.parquet", "en/train/0001.parquet"]),
    ],
)
def test_dataset_by_the_usual_names(hub: HubServer, subset: str | None, names: list[str]) -> None:
    others = ["data/training_notes.md", "fr/train/0000.parquet", "data/test-00000-of-00001.parquet", "trainer.jsonl"]
    hub.repos["dataset", "org/data"] = Repo(dict.fromkeys([*names, *others], b"x"))
    assert [file.name for file in resolve_dataset("org/data", subset, "train", "main").files] == names


def test_dataset_from_the_converted_branch(hub: HubServer) -> None:
    hub.repos["dataset", "org/data"] = Repo({"data.zip": b"x"})
    with pytest.raises(MissingError, match=r"no parquet or JSONL files for split 'train' at revision main; there are: data.zip"):
        resolve_dataset("org/data", None, "train", "main")
    converted = Repo({"default/train/0000.parquet": parquet(text=["a"])}, revisions=("refs/convert/parquet",))
    hub.repos["dataset", "org/data"] = converted
    with pytest.raises(MissingError, match="has no revision 'main'"):
        resolve_dataset("org/data", None, "train", "main")
    converted.revisions = ("main", "refs/convert/parquet")
    assert [file.name for file in resolve_dataset("org/data", None, "train", "main").files] == ["default/train/0000.parquet"]


def test_no_more_shards_than_needed(hub: HubServer) -> None:
    shards = {f"data/train-0000{number}-of-00003.parquet": parquet(text=[f"word {number} " * 50] * 10) for number in range(3)}
    hub.repos["dataset", "org/data"] = Repo(shards)
    pin = resolve_dataset("org/data", None, "train", "main")
    assert len(fetch_dataset_files(pin, 10, Silent())) == 1
    assert len(fetch_dataset_files(pin, 11, Silent())) == 2
    assert len(hub.names()) == 2
    spec = TextSet(dataset="text", source="org/data", samples=1, tokens=4)
    assert len(fetch_dataset_files(pin, enough_for(spec), Silent())) == 1
    paths = fetch_dataset_files(pin, None, Silent())
    assert [path.read_bytes() for path in paths] == list(shards.values())


def test_pickle_on_the_hub_is_fetched_only_when_allowed(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    save_pickles(checkpoint, tmp_path, [[]])
    hub.repos["model", "org/old"] = Repo(files_of(tmp_path))
    pin = resolve_model("org/old", "huggingface", "main")
    with pytest.raises(CheckpointError, match="org/old: holds a pickle checkpoint"):
        fetch_model(pin, Silent())
    assert "pytorch_model.bin" not in hub.names()
    assert (fetch_model(pin, Silent(), allow_pickle=True) / "pytorch_model.bin").is_file()

"""Whether a head is the embeddings, beside what transformers itself makes of the same files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from transformers import AutoConfig, AutoModelForImageTextToText

from compress.checkpoints import output_head
from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.output_head import check_head, config_with_stated_tie, head_is_tied, head_notes
from compress.engine.derive.derived import derive_family
from compress.errors import CheckpointError
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.families import Family
from compress.families.resolve import family_at
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.families.samples import load_plain
from tests.tiny import BUILDERS

KEY = "tie_word_embeddings"
WRITING = [name for name in BUILDERS if name != "clip"]
SAID = (None, False, True)


def say(folder: Path, top: bool | None, text: bool | None) -> None:
    """Write what config.json says of the head, at its top and of its text."""
    config = json.loads((folder / "config.json").read_text())
    for section, value in ((config, top), (config["text_config"], text)):
        section.pop(KEY, None)
        if value is not None:
            section[KEY] = value
    (folder / "config.json").write_text(json.dumps(config))


def names(checkpoint: Checkpoint, family: Family) -> tuple[str, str]:
    """Return what the head's matrix and the embeddings are called on disk."""
    disk = {family.module_name(name): name for name in checkpoint.tensors}
    return disk.get(f"{family.head}.weight", f"{family.head}.weight"), disk[f"{family.embeddings}.weight"]


def put_head(folder: Path, kind: str, source: Path) -> None:
    """Write the weights anew with no head on disk, one that equals the embeddings, or one of its own."""
    family = family_at(folder)
    head, embeddings = names(open_checkpoint(source), family)
    tensors = load_file(source / "model.safetensors")
    tensors.pop(head, None)
    if kind != "absent":
        tensors[head] = tensors[embeddings].clone()
        if kind == "different":
            tensors[head][-1, -1] += 1  # one value in the last row is enough
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tied_in(model: Any, family: Family) -> bool:
    return model.get_submodule(family.head).weight is model.get_submodule(family.embeddings).weight


@pytest.mark.parametrize("name", WRITING)
def test_a_config_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    folder = BUILDERS[name](tmp_path)
    family = family_at(folder)
    for top, text in product(SAID, SAID):
        say(folder, top, text)
        config = cast("Any", AutoConfig).from_pretrained(folder)
        with torch.device("meta"):
            model: Any = cast("Any", AutoModelForImageTextToText).from_config(config)
        expected = f"{family.head}.weight" in model.all_tied_weights_keys
        assert family.says_tied(json.loads((folder / "config.json").read_text())) == expected, (top, text)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "internvl3", "blip-2"])
def test_config_and_tensors_together_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    folder, source = BUILDERS[name](tmp_path / "model"), BUILDERS[name](tmp_path / "source")
    family = family_at(folder)
    for (top, text), kind in product(
        [(True, True), (True, False), (False, True), (False, False)], ["absent", "equal", "different"]
    ):
        say(folder, top, text)
        put_head(folder, kind, source)
        checkpoint = open_checkpoint(folder)
        if kind == "absent" and not family.says_tied(checkpoint.config):  # transformers draws random numbers
            with pytest.raises(CheckpointError, match=r"holds no output head \(.*lm_head.weight\)"):
                check_head(checkpoint, family)
            continue
        check_head(checkpoint, family)
        reference: Any = load_plain(folder, "float32")
        loaded: Any = load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))
        assert head_is_tied(checkpoint, family) == tied_in(reference, family) == tied_in(loaded, family), (top, text, kind)
        assert torch.equal(loaded.get_submodule(family.head).weight, reference.get_submodule(family.head).weight), (top, text, kind)


@pytest.mark.parametrize("remote", [False, True])
def test_a_difference_is_found_at_the_end_of_large_matrices(remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared piece by piece, and on a hub at places from the first to the last."""
    monkeypatch.setattr(output_head, "_CHUNK", 8 * 1000)
    monkeypatch.setattr(output_head, "_SAMPLE", 8 * 100)
    source, folder = BUILDERS["qwen2.5-vl"](tmp_path / "source"), BUILDERS["qwen2.5-vl"](tmp_path / "model")
    family = family_at(folder)
    say(folder, True, None)
    for kind in ("equal", "different"):
        put_head(folder, kind, source)
        checkpoint = open_checkpoint(folder)
        matrix = checkpoint.tensors[names(checkpoint, family)[0]]
        assert matrix.elements > 8 * 1000
        if remote:
            checkpoint = on_a_hub(checkpoint)
        assert head_is_tied(checkpoint, family) == (kind == "equal")


def test_matrices_of_no_rows_are_equal_on_a_hub_too(tmp_path: Path) -> None:
    folder = BUILDERS["qwen2.5-vl"](tmp_path / "model")
    put_head(folder, "equal", BUILDERS["qwen2.5-vl"](tmp_path / "source"))
    say(folder, True, None)
    checkpoint, family = open_checkpoint(folder), family_at(folder)
    empty = {name: replace(checkpoint.tensors[name], shape=(0, 64), start=0, end=0) for name in names(checkpoint, family)}
    assert head_is_tied(on_a_hub(replace(checkpoint, tensors={**checkpoint.tensors, **empty})), family)


def on_a_hub(checkpoint: Checkpoint) -> Checkpoint:
    """Give the bytes of a checkpoint's files only in parts, as a hub does."""
    folder = checkpoint.folder

    def read_range(name: str, start: int, end: int) -> bytes:
        return (folder / name).read_bytes()[start:end]

    away = {name: replace(entry, file=Path("/on-the-hub") / entry.file.name) for name, entry in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=away, read_range=read_range)


def test_a_contradiction_is_told_and_what_is_written_contradicts_nothing(tmp_path: Path) -> None:
    source, folder = BUILDERS["qwen2.5-vl"](tmp_path / "source"), BUILDERS["qwen2.5-vl"](tmp_path / "model")
    family = family_at(folder)

    def notes(top: bool | None, text: bool | None, kind: str) -> tuple[list[str], Mapping[str, Any]]:
        say(folder, top, text)
        put_head(folder, kind, source)
        checkpoint = open_checkpoint(folder)
        return head_notes(checkpoint, family), config_with_stated_tie(checkpoint.config, family, head_is_tied(checkpoint, family))

    for top, text, kind in ((True, None, "absent"), (True, True, "equal"), (False, False, "different"), (None, None, "different")):
        assert notes(top, text, kind) == ([], open_checkpoint(folder).config)
    (note,), config = notes(True, True, "different")
    assert "the weights hold a head with other values" in note
    assert "the head on disk is used, as transformers 5 and vLLM do" in note
    assert (config[KEY], config["text_config"][KEY]) == (False, False)
    (note,), config = notes(False, True, "absent")
    assert "says tie_word_embeddings: false and text_config.tie_word_embeddings: true; transformers 5 goes by" in note
    assert "the embeddings are used, and artifacts say tie_word_embeddings: true in every place" in note
    assert (config[KEY], config["text_config"][KEY]) == (True, True)


def test_an_artifact_of_a_contradictory_checkpoint_contradicts_nothing(tmp_path: Path) -> None:
    folder = BUILDERS["qwen2.5-vl"](tmp_path / "model", layers=1)
    put_head(folder, "different", BUILDERS["qwen2.5-vl"](tmp_path / "weights", layers=1))
    say(folder, True, True)
    target = tmp_path / "artifact"
    target.mkdir()
    export = VllmExport(format="vllm", layout="compressed-tensors")
    export.apply(ExportContext(folder, target, family_at(folder), Silent()))
    config = open_checkpoint(target).config
    assert (config[KEY], config["text_config"][KEY]) == (False, False)
    assert torch.equal(load_plain(target).lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


def test_weights_that_hold_a_head_and_no_embeddings_are_refused(tmp_path: Path) -> None:
    folder = BUILDERS["qwen2.5-vl"](tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"no embeddings \(model.language_model.embed_tokens.weight\); write lm_head.weight"):
        check_head(checkpoint, family_at(folder))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")])
def test_matrices_of_other_types_are_compared_by_their_values(dtypes: tuple[str, str], tmp_path: Path) -> None:
    folder = BUILDERS["qwen2.5-vl"](tmp_path, tied=True)
    family = family_at(folder)
    tensors = load_file(folder / "model.safetensors")
    values = torch.randn(tensors["model.embed_tokens.weight"].shape).to(torch.bfloat16).clamp(-1, 1).round(decimals=1)
    values = values.to(torch.float16).to(torch.bfloat16).to(torch.float16).to(torch.bfloat16)
    kinds = [cast("torch.dtype", getattr(torch, name)) for name in dtypes]
    for change, expected in ((0.0, True), (0.5, False)):
        tensors["model.embed_tokens.weight"] = values.to(kinds[0])
        tensors["lm_head.weight"] = values.to(kinds[1]).clone()
        tensors["lm_head.weight"][3, 5] += change
        save_file(tensors, folder / "model.safetensors")
        assert head_is_tied(open_checkpoint(folder), family) == expected


def test_a_derived_family_reads_it_as_its_model_does(tmp_path: Path) -> None:
    for tied in (False, True):
        checkpoint = open_checkpoint(BUILDERS["qwen3-vl"](tmp_path / str(tied), tied=tied))
        assert derive_family(checkpoint, "here: unknown").says_tied(checkpoint.config) == tied

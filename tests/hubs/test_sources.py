"""Models as people have them: two sets of weights, files of every kind beside them, code of their own, names of training tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from compress.checkpoints.artifact import copy_side_files, is_terms, side_files
from compress.checkpoints.checkpoint import INDEX, open_checkpoint
from compress.checkpoints.tokens_check import check_tokens
from compress.errors import CheckpointError
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.families.resolve import family_at, family_of
from compress.hubs.card import read_licence
from compress.hubs.hub import open_pinned, resolve_model, weights_notes
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from compress.stages.quantization.rtn import Rtn
from compress.stages.stage import StageContext
from compress.untrusted.remote_code import code_files
from tests.families.samples import load_plain
from tests.tiny import BUILDERS, build_qwen2_5_vl

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("sources") / "model", layers=1)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def exported(folder: Path, target: Path) -> Path:
    target.mkdir()
    VllmExport(format="vllm", layout="compressed-tensors").apply(ExportContext(folder, target, family_at(folder), Silent()))
    return target


@pytest.mark.parametrize("whole", [True, False])
def test_of_two_sets_of_weights_those_are_taken_that_transformers_takes(whole: bool, folder: Path, tmp_path: Path) -> None:
    alone = VllmExport.total_bytes(folder)
    tensors = load_file(folder / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))
    if whole:
        save_file({**tensors, NORM: tensors[NORM] + 1}, folder / shard, metadata={"format": "pt"})
    theirs = load_plain(folder).model.language_model.norm.weight
    ours = load_model(
        OpenContext.at(folder, folder, Silent()), torch.bfloat16, torch.device("cpu")
    ).model.language_model.norm.weight
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, tensors[NORM])
    pin = resolve_model(str(folder), "huggingface", "main")
    assert pin.weights == ("model.safetensors",)
    assert open_pinned(pin) == open_checkpoint(folder)
    (note,) = weights_notes(pin)
    expected = "there are weights twice: model.safetensors, and 1 shards" if whole else f"is stale: {shard} is not there"
    assert expected in note
    assert "vLLM goes by the index" in note
    assert VllmExport.total_bytes(folder) == alone
    assert {path.name for path in exported(folder, tmp_path / "out").glob("model*")} == {"model.safetensors"}


def test_an_index_of_the_single_file_itself_is_no_second_set(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(open_checkpoint(folder).tensors, "model.safetensors")}))
    assert weights_notes(resolve_model(str(folder), "huggingface", "main")) == []


CARRIED = (
    "vocab.txt", "spiece.model", "qwen.tiktoken", "sentencepiece.bpe.model", "tokenizer.model", "LICENSE", "LICENSE.txt",
    "LICENCE.md", "NOTICE", "Notice.txt", "USE_POLICY.md", "ACCEPTABLE_USE_POLICY.md", "THIRD_PARTY_NOTICES.txt", "COPYING",
    "LICENSE-MODEL",
)  # fmt: skip


def test_files_of_every_kind_are_carried_and_no_others(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    left = (
        "README.md",
        "train.py",
        "optimizer.pt",
        "training_args.bin",
        "license_check.py",
        "notes.txt",
        ".env",
        "trainer_state.json",
    )
    for name in (*CARRIED, *left, "additional_chat_templates/tool.jinja", "additional_chat_templates/secret.txt"):
        (folder / name).write_text(name)
    artifact = exported(folder, tmp_path / "out")
    for name in (*CARRIED, "additional_chat_templates/tool.jinja"):
        assert (artifact / name).read_text() == name
    assert not [name for name in (*left, "additional_chat_templates/secret.txt") if (artifact / name).exists()]


def test_a_file_that_leads_out_of_the_folder_is_not_carried(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "private")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="LICENSE: leads out of its folder"):
        copy_side_files(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").exists()


@pytest.mark.parametrize("name", ["LICENSES", "licensed_data.json", "noticeable.txt", "terminals.md"])
def test_names_that_only_begin_like_terms_are_none(name: str) -> None:
    assert is_terms(name) == (name == "LICENSES")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# Model\n", {"license": "apache-2.0"}),
        (
            '---\nlicense: other\nlicense_name: "tongyi-qianwen"\nlicense_link: https://example.org/a/LICENSE\n---\n',
            {"license": "other", "license_name": "tongyi-qianwen", "license_link": "https://example.org/a/LICENSE"},
        ),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ("---\nlicense: !!python/object:os.system [x]\nlicense_link: javascript:alert(1)\n---\n", {}),
        ("# Model\nlicense: mit\n", {}),
    ],
)
def test_the_licence_is_read_from_the_cards_front_matter(card: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card, newline="")
    assert dict(read_licence(tmp_path)) == expected


OWN = {
    "configuration_own.py": (
        "from transformers import Qwen2_5_VLConfig\n"
        "class OwnConfig(Qwen2_5_VLConfig):\n    model_type = 'own_vl'\n    auto_map = {}\n"
    ),
    "own_parts.py": "FACTOR = 1\n",
    "modeling_own.py": (
        "from transformers import Qwen2_5_VLForConditionalGeneration\n"
        "from .configuration_own import OwnConfig\nfrom .own_parts import FACTOR\n"
        "class OwnForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):\n    config_class = OwnConfig\n"
    ),
    "unrelated.py": "raise SystemExit\n",
}


@pytest.fixture
def own(folder: Path) -> Path:
    for name, text in OWN.items():
        (folder / name).write_text(text)
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForImageTextToText": "modeling_own.OwnForConditionalGeneration"}
    edit(folder / "config.json", model_type="own_vl", architectures=["OwnForConditionalGeneration"], auto_map=names)
    return folder


def test_a_models_own_code_goes_into_what_is_made_of_it(own: Path, tmp_path: Path) -> None:
    assert code_files(own) == ["configuration_own.py", "modeling_own.py", "own_parts.py"]
    checkpoint = open_checkpoint(own)
    family = family_of(checkpoint.config, str(own), checkpoint, trust_remote_code=True)
    assert family.blocks == "model.language_model.layers"
    rounded, artifact = tmp_path / "rounded", tmp_path / "artifact"
    rounded.mkdir()
    artifact.mkdir()
    stage = Rtn.model_validate({"stage": "rtn", "bits": 8, "group_size": 32, "symmetric": True})
    stage.apply(StageContext(own, rounded, None, family, "cpu", 0, Silent(), trust_remote_code=True))
    VllmExport(format="vllm", layout="compressed-tensors").apply(ExportContext(rounded, artifact, family, Silent()))
    assert code_files(artifact) == code_files(own)
    assert not (artifact / "unrelated.py").exists()
    loaded = load_model(OpenContext.at(artifact, artifact, Silent(), True), torch.float32, torch.device("cpu"))
    assert type(loaded).__name__ == "OwnForConditionalGeneration"
    before = load_file(own / "model.safetensors")["lm_head.weight"]
    assert torch.equal(loaded.lm_head.weight, before.float())


def test_code_that_is_not_trusted_is_not_run_and_the_setting_is_named(own: Path) -> None:
    checkpoint = open_checkpoint(own)
    (own / "configuration_own.py").write_text("raise SystemExit('was run')\n")
    with pytest.raises(CheckpointError, match=r"set model\.trust_remote_code: true in the recipe if you trust its author"):
        family_of(checkpoint.config, str(own), checkpoint)


def test_code_is_found_through_relative_imports_and_stays_in_the_folder(own: Path, tmp_path: Path) -> None:
    (own / "deep").mkdir()
    (own / "own_parts.py").write_text("from .deep import mixing\nfrom . import own_more\nfrom ..outside import x\nimport os\n")
    for name in ("deep/__init__.py", "deep/mixing.py", "own_more.py", "outside.py"):
        (own / name).write_text("")
    (own / "deep" / "mixing.py").write_text("from ..own_last import LAST\n")
    (own / "own_last.py").write_text("LAST = 1\n")
    edit(
        own / "config.json",
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModel": ["own_parts.A", "other/repo--far.B"]},
    )
    assert code_files(own) == [
        "configuration_own.py", "deep/__init__.py", "deep/mixing.py", "own_last.py", "own_more.py", "own_parts.py",
    ]  # fmt: skip
    assert set(code_files(own)) <= set(side_files(own)) <= resolve_model(str(own), "huggingface", "main").names
    (own / "own_more.py").unlink()
    (tmp_path / "private.py").write_text("KEY = 'secret'\n")
    (own / "own_more.py").symlink_to(tmp_path / "private.py")
    with pytest.raises(CheckpointError, match=r"own_more.py: leads out of its folder"):
        code_files(own)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("base_model.model.", "begin with 'base_model.model.', as PEFT leaves them; save what merge_and_unload"),
        ("_orig_mod.", "begin with '_orig_mod.', as torch.compile leaves them"),
        ("module.", "begin with 'module.', as DataParallel leaves them"),
    ],
)
def test_names_that_a_wrapper_has_left_are_told(prefix: str, message: str, folder: Path) -> None:
    rewrite(folder, lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        open_checkpoint(folder)


def test_an_adapter_is_told_from_a_model(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"lora_A.default.weight, a part of a PEFT adapter that is not merged; merge it"):
        open_checkpoint(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}))
    message = "holds a PEFT adapter and no model; it belongs to Qwen/Qwen2.5-VL-7B-Instruct: merge it and take the folder"
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(adapter), "huggingface", "main")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("internvl_chat", r"use the repository of the same model whose name ends in -hf, such as OpenGVLab/InternVL3-2B-hf"),
        ("llava_qwen", r"use the repository of the same model at llava-hf"),
        ("nonesuch", r"transformers [\d.]+ has no model_type 'nonesuch'; use another model"),
    ],
)
def test_what_to_use_in_the_place_of_an_unsupported_model_is_told(model_type: str, message: str, folder: Path) -> None:
    edit(folder / "config.json", model_type=model_type)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=message):
        family_of(checkpoint.config, str(folder), checkpoint)


def test_tokens_without_a_row_are_told(folder: Path) -> None:
    checkpoint, family = open_checkpoint(folder), family_at(folder)
    check_tokens(checkpoint, family)
    table = json.loads((folder / "tokenizer.json").read_text())
    rows = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    added = [{"id": rows + place, "content": word, **plain} for place, word in enumerate(("colour", "shapes"))]
    (folder / "tokenizer.json").write_text(json.dumps({**table, "added_tokens": [*table["added_tokens"], *added]}))
    with pytest.raises(
        CheckpointError, match=rf"the token 'colour' \(number {rows}\) and 1 more have no row .* end at {rows - 1};"
    ):
        check_tokens(checkpoint, family)
    edit(folder / "config.json", image_token_id=rows, video_token_id=rows + 1)
    check_tokens(open_checkpoint(folder), family)  # the features of images take their places


@pytest.mark.parametrize("name", BUILDERS)
def test_the_tokens_of_every_family_have_rows(name: str, tmp_path: Path) -> None:
    folder = BUILDERS[name](tmp_path)
    check_tokens(open_checkpoint(folder), cast("Any", family_at(folder)))

"""Checkpoints as a stranger could make them: a sound one, changed in one to three ways."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "chat_template.json",
    "model.safetensors.index.json",
)
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 64, 2**31, 2**63, 10**9, 10**30, -(10**18), 0.5, -1e308, "", "x", "7", "../../etc/passwd",
    "/etc/passwd", "\x1b[2J\x07", "\u202e", "a" * 5000, "re:(a+)+$", "{{ 7 }}", [], {}, [[]], [None], [1, 2, 3], ["x"] * 50,
    {"a": {"b": {"c": 1}}}, [0] * 3000, {"text_config": {}}, {"__type": "AddedToken"}, "<image>", "float32", "gelu",
)  # fmt: skip
TEXTS: tuple[bytes, ...] = (
    b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"\0" * 64, b"[" * 100_000, b'{"a":' * 5000, b"NaN", b'{"a": Infinity}',
    b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}', b'{"a": "\\u0000"}', b'{"a": 1e999}', b"\xef\xbb\xbf{}", b"{}" * 2,
    b'{"a": 1, "a": 2}', b" " * 100_000,
)  # fmt: skip
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ 'a' * 9000000000 }}",
    "{{ 2 ** (2 ** 40) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{% if %}",
    "{{ messages[99].content }}",
    "{" * 3000,
    "{% if a %}" * 3000,
    "{{ raise_exception('\x1b[2J') }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "x" * 3_000_000,
)

Change = Callable[[Path, random.Random, Path], None]
"""Changes a checkpoint's folder; the last argument is the folder of decoys."""


def _values(value: Any, places: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Collect each place of a JSON value: its container and the key in it, of lists the first few alone."""
    if isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            places.append((cast("Any", value), key))
            _values(item, places)
    elif isinstance(value, list):
        for position, item in enumerate(cast("list[Any]", value)[:4]):
            places.append((cast("Any", value), position))
            _values(item, places)
    return places


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _json_files(folder: Path) -> list[Path]:
    return [folder / name for name in JSON_FILES if _is_plain(folder / name)]


def _write(path: Path, content: bytes) -> None:
    """Write a file in place of whatever is there, not through a link or into a pipe."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def change_value(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Put another value in one place of a JSON file, or remove the place."""
    files = _json_files(folder)
    if not files:
        return
    path = chance.choice([files[0], files[0], *files])
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    places = _values(content, [])
    if not places:
        return
    container, key = chance.choice(places)
    if chance.random() < 0.15:
        del container[key]
    else:
        container[key] = chance.choice([*HOSTILE, str(decoys / "secret.json"), str(decoys)])
    path.write_text(json.dumps(content), encoding="utf-8")


def add_value(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Add a key that some reader knows to a JSON file."""
    files = _json_files(folder)
    if not files:
        return
    path = chance.choice(files)
    keys = (
        "vocab_file", "merges_file", "tokenizer_file", "spm_file", "chat_template", "audio_tokenizer", "auto_map", "backbone",
        "quantization_config", "use_pretrained_backbone", "_name_or_path", "base_model_name_or_path", "tokenizer_class",
        "processor_class", "image_processor_type", "extra_special_tokens", "added_tokens_decoder", "rope_scaling", "layer_types",
        "transformers_weights", "dtype", "torch_dtype", "id2label", "num_labels", "init_inputs",
    )  # fmt: skip
    try:
        content = json.loads(path.read_bytes())
        content[chance.choice(keys)] = chance.choice([*HOSTILE, str(decoys / "secret.json"), [str(decoys / "secret.txt")]])
    except (OSError, ValueError, TypeError, RecursionError):
        return
    path.write_text(json.dumps(content), encoding="utf-8")


def replace_text(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Put something else in place of a whole JSON file."""
    del decoys
    _write(folder / chance.choice(JSON_FILES), chance.choice(TEXTS))


def link_out(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Put a link to somebody else's file, or a pipe, in place of a file."""
    names = (
        *JSON_FILES,
        "chat_template.jinja",
        "model.safetensors",
        "added_tokens.json",
        "merges.txt",
        "tokenizer.model",
        "vocab.json",
    )
    path = folder / chance.choice(names)
    path.unlink(missing_ok=True)
    kind = chance.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2 and not (folder / "additional_chat_templates").exists():
        (folder / "additional_chat_templates").symlink_to(decoys)
    else:
        path.symlink_to(decoys / chance.choice(["secret.json", "secret.txt", "secret.jinja", "missing"]))


def change_template(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Write a chat template that does not work, does not end, or fills the memory."""
    del decoys
    _write(folder / "chat_template.jinja", chance.choice(TEMPLATES).encode())


def change_header(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Change the header of the weights: its length, its text, or one of its values."""
    del decoys
    path = folder / "model.safetensors"
    if not _is_plain(path):
        return
    data = path.read_bytes()
    if len(data) < 8:
        return
    length = struct.unpack("<Q", data[:8])[0]
    kind = chance.randrange(5)
    if kind == 0:
        path.write_bytes(struct.pack("<Q", chance.choice([0, 1, 2**31, 2**63, 2**64 - 1, length - 1, length + 1])) + data[8:])
        return
    if kind == 1:
        path.write_bytes(data[: chance.randrange(len(data))])
        return
    if kind == 2:
        text = chance.choice(TEXTS)
    else:
        try:
            header = json.loads(data[8 : 8 + length])
            name = chance.choice(sorted(header))
            if kind == 3 and isinstance(header[name], dict):
                header[name][chance.choice(["dtype", "shape", "data_offsets"])] = chance.choice(
                    [*HOSTILE, [-1, -4], [2**40, 2**40], [0, 1]]
                )
            else:
                header[chance.choice(["a\x1b[2J", "model." * 900, "lm_head.weight", "x"])] = header.pop(name)
        except (ValueError, IndexError, RecursionError, TypeError, AttributeError):
            return
        text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def make_index(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Write an index that names other files than there are, or files elsewhere."""
    shard = chance.choice(
        ["model.safetensors", "../secret", str(decoys / "secret.txt"), "", ".", "..", "x\0y", "missing.safetensors", "a/b"]
    )
    content = {"metadata": {}, "weight_map": chance.choice([{"lm_head.weight": shard}, {"a": 7}, [], {}, {"x" * 9: shard}])}
    _write(folder / "model.safetensors.index.json", json.dumps(content).encode())


def remove_file(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Remove a file."""
    del decoys
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if files:
        chance.choice(files).unlink()


def change_bytes(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Change some bytes of a file."""
    del decoys
    files = [path for path in sorted(folder.iterdir()) if _is_plain(path)]
    if not files:
        return
    path = chance.choice(files)
    data = bytearray(path.read_bytes())
    for _ in range(chance.randrange(1, 20) if data else 0):
        data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(data)


def quantized(folder: Path, chance: random.Random, decoys: Path) -> None:
    """Say that the weights are quantized, in a way that is none."""
    del decoys
    path = folder / "config.json"
    if not _is_plain(path):
        return
    try:
        content = json.loads(path.read_bytes())
        group: dict[str, Any] = {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "strategy": "group", "symmetric": True, "group_size": 32},
        }
        group[chance.choice(["targets", "weights"])] = chance.choice([*HOSTILE, ["re:(a+)+$", "re:((.*)*)*x"]])
        settings: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": group},
            "ignore": [],
        }
        settings[chance.choice(sorted(settings))] = chance.choice([*HOSTILE, settings["config_groups"], "pack-quantized"])
        content["quantization_config"] = settings
    except (OSError, ValueError, TypeError, RecursionError):
        return
    path.write_text(json.dumps(content), encoding="utf-8")


CHANGES: dict[str, Change] = {
    "value": change_value,
    "another value": change_value,
    "added": add_value,
    "text": replace_text,
    "link": link_out,
    "template": change_template,
    "header": change_header,
    "index": make_index,
    "removed": remove_file,
    "bytes": change_bytes,
    "quantized": quantized,
}


def make_checkpoint(sound: Path, folder: Path, decoys: Path, changes: list[tuple[str, int]]) -> Path:
    """Copy a sound checkpoint to `folder` and change it: each change is a name of `CHANGES` and the seed of its choices."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(sound, folder)
    for name, seed in changes:
        CHANGES[name](folder, random.Random(seed), decoys)
    return folder

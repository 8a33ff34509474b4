"""What a checkpoint's folder holds beside its weights, and the record of where an artifact came from."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from compress.checkpoint import open_checkpoint
from compress.files import write_json
from compress.redaction import redact_value

SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""The files that say how text and images enter a model; an artifact carries them as they are in the source."""

RECORD = "compress.json"

ArtifactFormat = Literal["onnx", "onnx-genai", "vllm"]
"""What an artifact's folder is by its files: graphs of ours, a folder of onnxruntime-genai's, or a checkpoint."""

_GENAI = "genai_config.json"
_GENAI_IMAGES = "vision_processor.json"


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, processor, chat template and generation config byte for byte; sub-folders of chat templates too."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates", dirs_exist_ok=True)


def file_digest(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder by its relative POSIX path, in order of the paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def artifact_format(folder: Path) -> ArtifactFormat:
    """Return what an artifact's folder is, by its files."""
    if (folder / _GENAI).is_file():
        return "onnx-genai"
    return "onnx" if any(folder.glob("*.onnx")) else "vllm"


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold an artifact's weights: safetensors and their index, or graphs and their external data."""
    if artifact_format(folder) == "vllm":
        return sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    return sorted([*folder.glob("*.onnx"), *folder.glob("*.onnx_data"), *folder.glob("*.onnx.data")])


def weight_bytes(folder: Path) -> int:
    """Return the size of an artifact's weights: of all tensors of a checkpoint, or of graphs with their external data."""
    if artifact_format(folder) == "vllm":
        return open_checkpoint(folder).weight_bytes
    return sum(path.stat().st_size for path in weight_files(folder))


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files that make up an artifact: config, weights, and how text and images enter the model."""
    named = [folder / name for name in ("config.json", _GENAI, _GENAI_IMAGES, *SIDE_FILES) if (folder / name).is_file()]
    templates = [path for path in (folder / "additional_chat_templates").rglob("*") if path.is_file()]
    return sorted([*named, *weight_files(folder), *templates])


def checkpoint_bytes(folder: Path) -> int:
    """Return an artifact's size on disk, whatever else lies in its folder."""
    return sum(path.stat().st_size for path in checkpoint_files(folder))


def write_record(folder: Path, record: Mapping[str, object]) -> None:
    """Write `compress.json` into an artifact: `record`, and the digest of every other file."""
    (folder / RECORD).unlink(missing_ok=True)
    write_json(folder / RECORD, {"schema": 1, **redact_value(record), "files": folder_digests(folder)})


def source_commit() -> str | None:
    """Return the git commit of this package's own source, None where it was installed without one."""
    package = Path(__file__).resolve().parent
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None

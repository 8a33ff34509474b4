"""Files of a checkpoint beside its weights, and an artifact's record (`compress.json`)."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from compress.checkpoints.checkpoint import read_json_object
from compress.checkpoints.config_types import check_config
from compress.checkpoints.tokenizer_files import write_uncut
from compress.errors import CheckpointError
from compress.files import write_json
from compress.untrusted.limits import limits
from compress.untrusted.reading import check_folder, inside, read_text
from compress.untrusted.redaction import redact_value
from compress.untrusted.remote_code import code_files

_SIDE_NAMES = frozenset({
    "added_tokens.json", "bpe.codes", "chat_template.json", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "special_tokens_map.json", "tekken.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer_file.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
})  # fmt: skip
"""Files of tokenizer, processor and generation config with fixed names."""

_SIDE_SUFFIXES = (".jinja", ".model", ".tiktoken")
"""Files of slow tokenizers have many names: tokenizer.model, spiece.model, sentencepiece.bpe.model, qwen.tiktoken, …"""

_TERMS = re.compile(
    r"(?i)^((third[-_]party[-_])?(licen[cs]e|notice|copying|copyright|(acceptable_)?use_policy|terms)s?)([-_. ].*)?$"
)
_TEMPLATES = "additional_chat_templates"

RECORD = "compress.json"
"""The record of an artifact: its provenance, and the digest of every file."""


def is_side_file(name: str) -> bool:
    """Return whether a file, by its path in a model's folder, belongs to the tokenizer, processor, chat template or terms of use.

    Such files are copied unchanged into artifacts.
    """
    path = PurePosixPath(name)
    if path.parent.name == _TEMPLATES:
        return path.suffix == ".jinja"
    return path.parent == PurePosixPath() and (name in _SIDE_NAMES or path.suffix in _SIDE_SUFFIXES or is_terms(name))


def is_terms(name: str) -> bool:
    """Return whether a file, by its name, is a licence, a notice, or a use policy."""
    # a module or weights may be called licence-something too; code is copied by rules of its own
    return _TERMS.match(name) is not None and not name.endswith((".py", ".safetensors"))


def side_files(folder: Path) -> list[str]:
    """Return the paths, relative to a model's folder, of its files beside weights and config, its code included."""
    files = [path for path in (*folder.glob("*"), *folder.glob(f"{_TEMPLATES}/*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    return sorted([*(name for name in names if is_side_file(name)), *code_files(folder)])


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, processor, chat templates, generation config, terms of use and the model's own code byte for byte.

    Settings of the tokenizer that would truncate prompts are removed.

    Raises:
        CheckpointError: a link leads out of the source's folder.
    """
    # a link in a downloaded folder could put any file of this machine into an artifact that is published
    check_folder(source)
    for name in side_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(source, source / name), target / name)
    write_uncut(source, target)


def check_side_files(folder: Path) -> None:
    """Check the files of a folder that transformers reads: they are inside the folder, and JSON files are valid.

    Raises:
        CheckpointError: a link leads out, a file is invalid or too large, or the processor refers to another repository.
    """
    check_folder(folder)
    for path in (folder / name for name in ("config.json", *side_files(folder))):
        if path.suffix == ".json" and path.is_file():
            state = path.stat()
            _check_json(path, state.st_size, state.st_mtime_ns)
        elif path.suffix == ".jinja":
            read_text(path, limits().template_bytes, name="template_bytes", root=folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        check_config(read_json_object(generation), str(generation))
    processor = folder / "processor_config.json"
    if processor.is_file() and read_json_object(processor).get("audio_tokenizer") is not None:
        raise CheckpointError(f"{processor}: names an audio tokenizer, which would be read elsewhere; remove it from the file")


@lru_cache(maxsize=64)
def _check_json(path: Path, size: int, changed: int) -> None:
    """Check a file, cached for its state: tokenizers' files are large."""
    del size, changed
    read_json_object(path)


def file_digest(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder by its relative POSIX path, in order of the paths."""
    # sorted, because the order of a folder's entries differs between file systems
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def write_record(folder: Path, record: Mapping[str, object]) -> None:
    """Write `compress.json` into an artifact: `record`, and the digest of every other file."""
    # the record cannot contain its own digest
    (folder / RECORD).unlink(missing_ok=True)
    write_json(folder / RECORD, {"schema": 1, **redact_value(record), "files": folder_digests(folder)})


def source_commit() -> str | None:
    """Return the git commit of this package's source; None where it is not installed from a git checkout."""
    package = Path(__file__).resolve().parents[1]
    # git looks in all parent folders: an installed package would report the commit of whatever project contains it
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    return completed.stdout.strip() or None

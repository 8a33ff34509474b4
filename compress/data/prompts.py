"""How a prompt becomes a model's input: one implementation for calibration and the in-process runtime."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image

from compress.checkpoints.artifact import check_side_files
from compress.checkpoints.checkpoint import read_config, text_config
from compress.checkpoints.tokenizer_files import never_cut
from compress.data.images import decode_image
from compress.errors import CheckpointError, DataError
from compress.families import Family
from compress.families.resolve import family_at
from compress.untrusted.reading import library_errors
from compress.untrusted.trial import try_template


@dataclass(frozen=True)
class Prompt:
    """One user turn: encoded images (PNG, JPEG, …) first, then the text."""

    id: str
    text: str
    images: tuple[bytes, ...] = ()


class RefusedError(DataError):
    """A model's processor does not take an image or a text, such as an image two hundred times as wide as it is high."""


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's tokenizer, for use in memory only; it cuts nothing, whatever its files say.

    Raises:
        CheckpointError: it cannot be loaded, or there is none.
    """
    from transformers import AutoTokenizer

    check_side_files(folder)
    with library_errors(f"{folder}: its tokenizer cannot be loaded", remedy="fetch the checkpoint again"):
        tokenizer = cast("Any", AutoTokenizer).from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():  # transformers makes an empty one of missing files
            raise CheckpointError(f"{folder}: has no tokenizer; add its tokenizer.json, or fetch the checkpoint again")
        never_cut(tokenizer)
    return tokenizer


def load_processor(folder: Path, trust_remote_code: bool = False, family: Family | None = None) -> Any:
    """Load a checkpoint's processor, for use in memory only, with its family's chat template where it ships none.

    Its tokenizer cuts nothing, whatever its files say. Without `family`, the folder's own is resolved where a template is missing.

    Raises:
        CheckpointError: it cannot be loaded, or its chat template does not work.
    """
    from transformers import AutoProcessor

    check_side_files(folder)
    with library_errors(f"{folder}: its processor cannot be loaded", remedy="fetch or export it again"):
        # never from the network, whatever repository the folder's files refer to
        processor = cast("Any", AutoProcessor).from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        never_cut(getattr(processor, "tokenizer", processor))  # where nothing but a tokenizer is there, it is that
    if getattr(processor, "chat_template", None) is None:
        # A processor takes up its own file's alone; one in tokenizer_config.json is the tokenizer's, which vLLM asks next.
        shipped = getattr(getattr(processor, "tokenizer", processor), "chat_template", None)
        if isinstance(shipped, dict):  # several by name, as a list in the file
            shipped = cast("dict[str, str]", shipped).get("default")
        processor.chat_template = shipped or (family or family_at(folder, trust_remote_code)).chat_template or None
    if processor.chat_template is not None:  # without one, text can be scored all the same
        check_template(processor, folder)
    return processor


def longest_input(model: Path) -> int | None:
    """Return the context length of the checkpoint's decoder by its config; None where it gives none."""
    config = read_config(model)
    length: object = text_config(config).get("max_position_embeddings", config.get("max_position_embeddings"))
    return length if isinstance(length, int) else None


def run_processor(processor: Any, name: str, **given: Any) -> Any:
    """Return the outputs of a model's processor, or of a part of it, for texts or images; `name` identifies these in messages.

    Raises:
        RefusedError: it does not take them.
    """
    with library_errors(f"{name}: the model's processor does not take it", RefusedError, "leave it out"):
        return processor(**given)


def write_prompt(processor: Any, prompt: Prompt, answer: str | None = None) -> str:
    """Return a prompt as the chat template writes it, ready for the model to begin, or with its answer.

    Without a template, as of CLIP, it is the text itself, and the answer after it.
    """
    if processor.chat_template is None:
        return " ".join([prompt.text, answer] if answer else [prompt.text])
    return processor.apply_chat_template(messages(prompt, answer), tokenize=False, add_generation_prompt=answer is None)


def check_image_count(family: Family, prompt: Prompt) -> None:
    """Check that a prompt has no more images than the model takes.

    Raises:
        DataError: it has; names the prompt.
    """
    if family.single_image and len(prompt.images) > 1:
        raise DataError(f"{prompt.id}: has {len(prompt.images)} images, and {family.name} takes one at a time; leave it out")


def messages(prompt: Prompt, answer: str | None = None) -> list[dict[str, Any]]:
    """Return the conversation as a chat template reads it: one user turn, images first, then the text.

    With `answer`, the assistant's turn follows. An image stands as `{"type": "image"}`; the pictures themselves go to the
    processor in the same order, as `open_images` gives them.
    """
    content = [{"type": "image"} for _ in prompt.images] + [{"type": "text", "text": prompt.text}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def check_template(processor: Any, folder: Path) -> None:
    """Write short conversations with the chat template of the checkpoint at `folder`, at first in a process with limits.

    Raises:
        CheckpointError: the template is broken, or takes too long or too much memory.
    """
    turns = messages(Prompt("trial", "What is it?", (b"",)), "red")
    others = (messages(Prompt("trial", "What is it?", images)) for images in ((), (b"", b"")))
    with library_errors(f"{folder}: its tokenizer cannot be loaded"):
        tokens = {**processor.tokenizer.special_tokens_map}
    # in a process with limits first: Jinja's sandbox stops access to Python, not endless loops
    try_template(processor.chat_template, [turns, turns[:1], *others], tokens, str(folder))
    with library_errors(f"{folder}: its chat template cannot be used", remedy="correct it, or fetch it again"):
        # with and without an answer, the two ways in which prompts are written
        for shown, begun in ((turns, False), (turns[:1], True)):
            processor.apply_chat_template(shown, tokenize=False, add_generation_prompt=begun)


def check_reserved(texts: Iterable[str], reserved: Iterable[str], name: str) -> None:
    """Check that a question's texts hold none of the model's special tokens, which would be read as such.

    Raises:
        DataError: one is there; `name` says in which question.
    """
    held = list(texts)
    # sorted, so that the message is the same in each process
    for token in sorted(reserved):
        if any(token in text for text in held):
            raise DataError(f"{name}: holds {token!r}, a special token of the model; remove the row")


def open_images(prompt: Prompt) -> list[Image.Image]:
    """Decode a prompt's images, in order, each as `decode_image` does.

    Raises:
        DataError: an image cannot be decoded; names the prompt and which of its images.
    """
    return [decode_image(image, f"{prompt.id}: image {place}") for place, image in enumerate(prompt.images)]

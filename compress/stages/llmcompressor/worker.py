"""Runs llm-compressor's modifiers on a model: a script of `compress/workers/job.py` for its own environment.

The job is made in `apply.py`. Nothing of this package is imported: torch and transformers have other versions.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import transformers

_MODIFIERS = "llmcompressor.modifiers"
_BASE = "Modifier"


class UnknownNameError(Exception):
    """A modifier or argument that the library does not have."""


class Samples:
    """The samples' files, read when needed.

    Block by block the library assumes that every sample has the first one's inputs, and omits what the model does with others. So
    samples with images come first, and with `same_inputs` the others get the missing inputs as None.
    """

    def __init__(self, folder: Path, *, same_inputs: bool) -> None:
        # by their numbers: the order of samples is part of the result
        files = sorted(folder.glob("*.safetensors"))
        inputs = [set(_load(file)) for file in files]
        self.common = sorted(set[str]().union(*inputs)) if same_inputs else []
        self.files = [file for _, file in sorted(zip(inputs, files, strict=True), key=lambda row: (-len(row[0]), row[1]))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | None]:
        tensors = _load(self.files[index])
        return {**dict.fromkeys(self.common), **tensors}


def main(job: dict[str, Any]) -> None:
    """Run one job; it ends with a checkpoint in the job's `output`."""
    modifiers = make_modifiers(job)
    # some modifiers draw random numbers when they start (rotations)
    transformers.set_seed(job["seed"])
    model = load_model(job)
    samples = Samples(Path(job["samples"]), same_inputs=job["pipeline"] != "basic")
    loader: Any = torch.utils.data.DataLoader(cast("Any", samples), batch_size=1, collate_fn=_first, shuffle=False)
    disable_pinned_memory()
    import_module("llmcompressor").oneshot(
        model=model,
        recipe=modifiers,
        dataset=loader,
        num_calibration_samples=len(samples),
        sequential_targets=block_classes(model, job["blocks"]),  # else the vision tower's blocks too
        trust_remote_code_model=job["trust_remote_code"],
        pipeline=job["pipeline"],
    )
    model.save_pretrained(job["output"], save_compressed=True)


def make_modifiers(job: dict[str, Any]) -> list[Any]:
    """Return a job's modifiers, with its defaults for omitted arguments.

    Raises:
        UnknownNameError: there is no such modifier, or it does not take such arguments.
    """
    classes = import_module(_MODIFIERS).ModifierFactory.load_from_package(_MODIFIERS)
    # the abstract base is found among the modifiers as well
    classes.pop(_BASE, None)
    return [_make_modifier(classes, name, arguments, job) for name, arguments in job["modifiers"]]


def _make_modifier(classes: dict[str, Any], name: str, arguments: dict[str, Any], job: dict[str, Any]) -> Any:
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownNameError(f"llm-compressor has no modifier {name!r}; it has {', '.join(sorted(classes))}{hint}")
    kind = classes[name]
    arguments = dict(arguments)
    if "ignore" in kind.model_fields:
        arguments.setdefault("ignore", job["ignore"])
    # a modifier may be a subclass of AWQ's or SmoothQuant's, with the same mappings
    for ancestor in kind.__mro__:
        if ancestor.__name__ in job["mappings"]:
            arguments.setdefault("mappings", job["mappings"][ancestor.__name__])
    try:
        modifier = kind(**arguments)
        if name == "SpinQuantModifier" and modifier.transform_config is None:
            fill_rotations(modifier, job["rotation"])
        return modifier
    except (ValueError, TypeError, NotImplementedError) as error:
        # the rest of the fields schedules training steps, and names in `_` are the library's own state
        accepted = sorted(set(kind.model_fields) - {"index", "group", "start", "end", "update"})
        accepted = [field for field in accepted if not field.endswith("_")]
        raise UnknownNameError(f"{name}: {_error_message(error)}; the arguments it takes: {', '.join(accepted)}") from error


def fill_rotations(modifier: Any, rotation: dict[str, Any] | None) -> None:
    """Set SpinQuant's mappings and transforms, which the library would derive from the module names of text models.

    The embeddings are not centered: unlike a LayerNorm, an RMSNorm does not cancel that.

    Raises:
        UnknownNameError: the model cannot be rotated, or not in its weights alone.
    """
    if rotation is None:
        raise UnknownNameError(
            "SpinQuantModifier: it rotates what enters a decoder of q/k/v/o and gate/up/down projections behind RMSNorms, and this "
            "model has other parts; use another modifier, or give transform_config, mappings and norm_mappings"
        )
    if online := sorted({*modifier.rotations} - {"R1", "R2"}):
        raise UnknownNameError(
            f"SpinQuantModifier: {', '.join(online)} rotate at run time, by names that vLLM gives otherwise; leave R1 and R2, or "
            "give transform_config, mappings and norm_mappings"
        )
    package = import_module("llmcompressor.modifiers.transform.spinquant.base")
    modifier.mappings = package.SpinQuantMapping(**rotation["mappings"])
    modifier.norm_mappings = [package.NormMapping(**entry) for entry in rotation["norm_mappings"]]
    sizes = {"R2": (rotation["head_dim"],)}
    schemes = {name: getattr(modifier, f"_create_{name.lower()}_scheme")(*sizes.get(name, ())) for name in modifier.rotations}
    modifier.transform_config = package.TransformConfig(config_groups=schemes)
    modifier.mappings.embedding = "re:(?!)"


def _error_message(error: Exception) -> str:
    """Return an error's message; for pydantic's, one per argument."""
    details: Any = getattr(error, "errors", None)
    if details is None:
        return str(error)
    return "; ".join(f"{'.'.join(map(str, row['loc']))}: {row['msg']}" for row in details())


def load_model(job: dict[str, Any]) -> Any:
    """Return the model in its stored type, on the CPU: the library moves each block to the device."""
    remote = job["trust_remote_code"]
    # the record's class first: the automatic one only knows models that write text (not CLIP)
    kind: Any = getattr(transformers, job["architecture"], None)
    if kind is None or remote:
        kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(job["model"], dtype="auto", trust_remote_code=remote, local_files_only=True).eval()


def block_classes(model: Any, blocks: str) -> list[str]:
    """Return the classes of the decoder's blocks: the library would also choose the vision tower's."""
    return sorted({type(block).__name__ for block in model.get_submodule(blocks)})


def disable_pinned_memory() -> None:
    """Keep the library's cache from allocating pinned memory where there is no CUDA driver."""
    if not torch.cuda.is_available():
        cache = import_module("llmcompressor.pipelines.cache").IntermediatesCache
        cache.pin_memory = lambda self, batch_index, input_names=None: None  # pyright: ignore


def _load(file: Path) -> dict[str, torch.Tensor]:
    return import_module("safetensors.torch").load_file(file)


def _first(rows: list[Any]) -> Any:
    return rows[0]


def describe(error: BaseException, job: dict[str, Any]) -> tuple[str, str]:
    """Return the kind of an error that ended a job, and its message."""
    del job
    if isinstance(error, UnknownNameError):
        return "arguments", str(error)
    while error.__cause__ is not None:  # the library wraps errors, with the whole traced program in the message
        error = error.__cause__
    return "memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__, str(error)

"""Runs llm-compressor's modifiers on a model: a script for its own environment, `llmcompressor_worker.py JOB`.

JOB is a JSON file that `llmcompressor_apply` wrote (`Job` there); what came of it goes to the file `outcome` that it names.
Nothing of this package is imported: what is here runs beside other versions of torch and transformers than this package's.
"""

from __future__ import annotations

import difflib
import json
import sys
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import transformers

_MODIFIERS = "llmcompressor.modifiers"
_BASE = "Modifier"


class UnknownNameError(Exception):
    """A job that asks for what the library does not have."""


class Samples:
    """The samples' files, read when asked for.

    Block by block the library takes the first sample's inputs for those that every sample has, and leaves out what the model does
    with any other. So those with images come first, and with `alike` the others are given theirs as None.
    """

    def __init__(self, folder: Path, *, alike: bool) -> None:
        files = sorted(folder.glob("*.safetensors"))
        inputs = [set(_load(file)) for file in files]
        self.common = sorted(set[str]().union(*inputs)) if alike else []
        self.files = [file for _, file in sorted(zip(inputs, files, strict=True), key=lambda row: (-len(row[0]), row[1]))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | None]:
        tensors = _load(self.files[index])
        return {**dict.fromkeys(self.common), **tensors}


def main(job: dict[str, Any]) -> None:
    """Run one job; it ends with a checkpoint in the job's `output`."""
    modifiers = make_modifiers(job)
    transformers.set_seed(job["seed"])
    model = load_model(job)
    samples = Samples(Path(job["samples"]), alike=job["pipeline"] != "basic")
    loader: Any = torch.utils.data.DataLoader(cast("Any", samples), batch_size=1, collate_fn=_first, shuffle=False)
    make_pinning_harmless()
    import_module("llmcompressor").oneshot(
        model=model,
        recipe=modifiers,
        dataset=loader,
        num_calibration_samples=len(samples),
        sequential_targets=block_classes(model, job["blocks"]),
        trust_remote_code_model=job["trust_remote_code"],
        pipeline=job["pipeline"],
    )
    model.save_pretrained(job["output"], save_compressed=True)


def make_modifiers(job: dict[str, Any]) -> list[Any]:
    """Return the modifiers that a job names, with what it gives for arguments that are left out.

    Raises:
        JobError: there is no such modifier, or it does not take such arguments.
    """
    known = import_module(_MODIFIERS).ModifierFactory.load_from_package(_MODIFIERS)
    known.pop(_BASE, None)
    return [_make_modifier(known, name, arguments, job) for name, arguments in job["modifiers"]]


def _make_modifier(known: dict[str, Any], name: str, arguments: dict[str, Any], job: dict[str, Any]) -> Any:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownNameError(f"llm-compressor has no modifier {name!r}; it has {', '.join(sorted(known))}{hint}")
    kind = known[name]
    arguments = dict(arguments)
    if "ignore" in kind.model_fields:
        arguments.setdefault("ignore", job["ignore"])
    for ancestor in kind.__mro__:
        if ancestor.__name__ in job["mappings"]:
            arguments.setdefault("mappings", job["mappings"][ancestor.__name__])
    try:
        modifier = kind(**arguments)
        if name == "SpinQuantModifier" and modifier.transform_config is None:
            fill_rotations(modifier, job["rotation"])
        return modifier
    except (ValueError, TypeError, NotImplementedError) as error:
        taken = sorted(set(kind.model_fields) - {"index", "group", "start", "end", "update"})
        taken = [field for field in taken if not field.endswith("_")]
        raise UnknownNameError(f"{name}: {_said(error)}; the arguments it takes: {', '.join(taken)}") from error


def fill_rotations(modifier: Any, given: dict[str, Any] | None) -> None:
    """Lay out SpinQuant's rotations, which the library would do from the names that text models have.

    Its embeddings are not centred: no RMSNorm lets that pass unseen.

    Raises:
        JobError: the model cannot be rotated, or not in its weights alone.
    """
    if given is None:
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
    modifier.mappings = package.SpinQuantMapping(**given["mappings"])
    modifier.norm_mappings = [package.NormMapping(**entry) for entry in given["norm_mappings"]]
    sized = {"R2": (given["head_dim"],)}
    schemes = {name: getattr(modifier, f"_create_{name.lower()}_scheme")(*sized.get(name, ())) for name in modifier.rotations}
    modifier.transform_config = package.TransformConfig(config_groups=schemes)
    modifier.mappings.embedding = "re:(?!)"


def _said(error: Exception) -> str:
    """Return an error's message; of pydantic's, each argument's own."""
    details: Any = getattr(error, "errors", None)
    if details is None:
        return str(error)
    return "; ".join(f"{'.'.join(map(str, row['loc']))}: {row['msg']}" for row in details())


def load_model(job: dict[str, Any]) -> Any:
    """Return the model in the type it is stored in, on the CPU: the library brings each block to the device."""
    remote = job["trust_remote_code"]
    kind: Any = getattr(transformers, job["architecture"], None)
    if kind is None or remote:
        kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(job["model"], dtype="auto", trust_remote_code=remote, local_files_only=True).eval()


def block_classes(model: Any, blocks: str) -> list[str]:
    """Return the classes of the decoder's blocks: the library would take the vision tower's for such parts too."""
    return sorted({type(block).__name__ for block in model.get_submodule(blocks)})


def make_pinning_harmless() -> None:
    """Keep the library's cache from asking for pinned memory where there is no driver to give it."""
    if not torch.cuda.is_available():
        cache = import_module("llmcompressor.pipelines.cache").IntermediatesCache
        cache.pin_memory = lambda self, batch_index, input_names=None: None  # pyright: ignore


def _load(file: Path) -> dict[str, torch.Tensor]:
    return import_module("safetensors.torch").load_file(file)


def _first(rows: list[Any]) -> Any:
    return rows[0]


def leave_word(outcome: Path) -> None:
    """See to it that an error that ends this process is left in `outcome` as well as in the log."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        failed = "arguments"
        if not isinstance(error, UnknownNameError):
            while error.__cause__ is not None:  # the library puts whole programs around what went wrong in them
                error = error.__cause__
            failed = "memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        _write(outcome, {"failed": failed, "message": str(error)})

    sys.excepthook = hook


def _write(path: Path, outcome: dict[str, str]) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(outcome), encoding="utf-8")
    aside.replace(path)


def run(path: Path) -> None:
    """Run the job of a file, and leave word of what came of it."""
    job = json.loads(path.read_text(encoding="utf-8"))
    leave_word(Path(job["outcome"]))
    main(job)
    _write(Path(job["outcome"]), {})


if __name__ == "__main__":
    run(Path(sys.argv[1]))

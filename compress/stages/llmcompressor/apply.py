"""llm-compressor on a checkpoint: write its samples, run it in its environment, and convert its output."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from compress.calibration.batches import Batch, WindowBatch, load_batches
from compress.checkpoints.artifact import copy_side_files
from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.layouts import unquantized_linears
from compress.checkpoints.output_head import config_with_stated_tie, head_is_tied
from compress.checkpoints.spec import spec_of
from compress.engine.weights import DTYPES, ShardWriter, map_tensor
from compress.errors import CheckpointError, CompressError, DataError, MissingError, RecipeError
from compress.families import Family
from compress.files import disk_errors, write_bytes, write_json
from compress.progress import Progress
from compress.stages.llmcompressor.defaults import ENVIRONMENT, Defaults
from compress.stages.stage import StageContext
from compress.workers.worker import LogProgress, WorkerJob, run_job, variables_with

if TYPE_CHECKING:
    from compress.stages.llmcompressor.stage import Llmcompressor

_WORKER = Path(__file__).with_name("worker.py")
_WORK = ".llmcompressor"
"""The folder of samples, job and output in the target folder; removed at the end."""

_LOG = "llmcompressor.log"
_SCALE = "weight_scale"
_BARS = LogProgress(re.compile(rb"\((\d+)/(\d+)\): Calibrating"), "models", "calibrate", "parts")
"""The library's progress bar: the current block and the number of blocks; each pass over the model counts them anew."""

_VARIABLES = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment variables of the worker: it must not download anything."""

_MESSAGE_LINES = 12
_MESSAGE_CHARACTERS = 1200
"""How much of the library's error a message repeats; the log has all of it."""

_REMOVED = ("LLM_COMPRESSOR_LOG_FILE",)
"""Would send its log elsewhere."""


def apply(stage: Llmcompressor, context: StageContext) -> None:
    """Apply a stage; see `Llmcompressor.apply`."""
    checkpoint = open_checkpoint(context.source)
    if context.calibration is None:
        raise DataError("llmcompressor: needs calibration samples; add calibration.sets to the recipe")
    if faults := stage.plan(spec_of(checkpoint, context.family)).faults:
        raise CheckpointError("\n".join(faults))
    with disk_errors(context.target):
        for path in context.target.iterdir():  # a killed call restarts: the library commits nothing
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        work = context.target / _WORK
        samples = work / "samples"
        samples.mkdir(parents=True)
        write_samples(context.calibration, context, samples)
        _run(stage, context, checkpoint, work)
        _OutputConversion(checkpoint, open_checkpoint(work / "output"), context.family).write(context)
        shutil.rmtree(work)


def write_samples(calibration: Path, context: StageContext, folder: Path) -> None:
    """Write each sample's inputs to a file of its own, without padding, which the library would count as tokens."""
    # one position per batch at most: each sample comes alone, and so without padding
    batches: Sequence[Batch] = load_batches(calibration, context.source, 1, context.trust_remote_code)
    if context.family.cross_attention_linears:
        batches = _with_images(batches, context.progress)
    with context.progress.task("llmcompressor: prepare samples", len(batches), "samples") as advance:
        for number, batch in enumerate(batches):
            inputs = {name: tensor.contiguous() for name, tensor in batch.inputs().items()}
            write_bytes(folder / f"{number:06}.safetensors", save(inputs))
            advance(1)


def _with_images(batches: Sequence[Batch], progress: Progress) -> Sequence[Batch]:
    """Return the samples with images: the library runs all blocks on all samples, cross-attention without images included.

    Raises:
        DataError: no sample has an image.
    """
    with_images = [batch for batch in batches if not isinstance(batch, WindowBatch)]
    if not with_images:
        raise DataError("llmcompressor: this model has blocks that read images, and no calibration sample has one; add a vqa set")
    if len(with_images) < len(batches):
        progress.warn(
            f"llmcompressor: {len(batches) - len(with_images)} calibration samples of text alone were left out: this model has "
            "blocks that read images, and the library cannot leave these out"
        )
    return with_images


def _run(stage: Llmcompressor, context: StageContext, checkpoint: Checkpoint, work: Path) -> None:
    """Run the worker.

    Raises:
        RecipeError, CheckpointError, MissingError, ServerError: as `Llmcompressor.apply`.
    """
    defaults = Defaults(checkpoint, context.family)
    job = {
        "model": str(context.source.absolute()),
        "architecture": context.family.architecture,
        "blocks": context.family.blocks,
        "samples": str((work / "samples").absolute()),
        "output": str((work / "output").absolute()),
        "seed": context.seed,
        "trust_remote_code": context.trust_remote_code,
        "modifiers": stage.calls,
        "pipeline": stage.pipeline,
        "ignore": defaults.ignore,
        "mappings": defaults.mappings,
        "rotation": defaults.rotation,
    }
    log = (context.logs or context.target.parent) / _LOG
    # the library takes any GPU that it sees: on the CPU it must see none
    variables = variables_with(_VARIABLES | ({"CUDA_VISIBLE_DEVICES": ""} if context.device == "cpu" else {}), _REMOVED)
    outcome = run_job(WorkerJob(ENVIRONMENT, _WORKER, job, variables, log, _BARS), work, context.progress)
    if outcome:
        raise _failure(outcome["failed"], _shortened(outcome["message"]), context.device, log.absolute())


def _failure(failed: str, message: str, device: str, log: Path) -> CompressError:
    """Return the error for what ended the worker."""
    if failed == "arguments":
        return RecipeError([f"stages: llmcompressor: {message}"])
    if failed == "memory":
        return MissingError(
            f"llmcompressor: {device} has too little memory ({message}). End other programs that use it, use a larger device, or "
            f"give calibration.sets fewer tokens per sample and smaller images. Its log is {log}"
        )
    remedy = "Change the modifiers' arguments, or leave out with `ignore` what it cannot work on."
    if failed == "TraceError":
        remedy = "It cannot go through this model block by block; set pipeline: basic."
    return CheckpointError(f"llmcompressor failed with {failed}: {message}\n{remedy} Its whole log is {log}")


def _shortened(message: str) -> str:
    """Return the first lines of an error: some of the library's contain the whole config or every layer's name."""
    lines = message.splitlines() or [message]
    shortened = "\n".join(lines[:_MESSAGE_LINES])[:_MESSAGE_CHARACTERS]
    return shortened if len(shortened) == len(message) else f"{shortened} …"


@dataclass(frozen=True)
class _OutputConversion:
    """Conversion of the library's output to the source's names; unchanged tensors keep the source's bytes."""

    source: Checkpoint
    written: Checkpoint
    family: Family

    @cached_property
    def disk_modules(self) -> dict[str, str]:
        """The names on disk of the source's modules, including those without weights, by their names in transformers."""
        disk_names: dict[str, str] = {}
        for name in self.source.tensors:
            # a rename changes the front of a name: walking up from the tensor gives every parent both of its names
            module, disk = self.family.module_name(name), name
            while module.rpartition(".")[2] == disk.rpartition(".")[2] and "." in module and "." in disk:
                module, disk = module.rpartition(".")[0], disk.rpartition(".")[0]
                disk_names[module] = disk
        return disk_names

    @cached_property
    def names(self) -> dict[str, str]:
        """The tensors' names on disk, by their names in the library's output."""
        return {name: self._disk_name(name) for name in self.written.tensors}

    @cached_property
    def quantized(self) -> list[str]:
        """The names on disk of the quantized linears."""
        return sorted(name.removesuffix(f".{_SCALE}") for name in self.names.values() if name.endswith(f".{_SCALE}"))

    def _disk_name(self, name: str) -> str:
        module, _, leaf = self.family.module_name(name).rpartition(".")
        disk_module = self.disk_modules.get(module, name.rpartition(".")[0])
        return f"{disk_module}.{leaf}" if disk_module else leaf

    def _disk_module(self, name: str) -> str:
        """Return a linear's name on disk by its name in the library; the name of a class does not change."""
        return self.disk_modules.get(self.family.module_name(f"{name}.weight").removesuffix(".weight"), name)

    def write(self, context: StageContext) -> None:
        """Write the checkpoint.

        Raises:
            CheckpointError: no tensor differs from the source.
        """
        changed = 0
        with (
            ShardWriter(context.target) as writer,
            context.progress.task("llmcompressor: write", len(self.names), "tensors") as advance,
        ):
            for name, tensor, unchanged in self._tensors():
                writer.add(name, tensor)
                changed += not unchanged
                advance(1)
        if not changed:
            raise CheckpointError(
                f"llmcompressor: its modifiers changed nothing: all {len(self.names)} tensors of {self.source.folder} are as they "
                "were; give them targets that this model has, or remove the stage"
            )
        copy_side_files(context.source, context.target)
        write_json(context.target / "config.json", self._config())

    def _tensors(self) -> Iterator[tuple[str, Tensor, bool]]:
        for written_name, entry in self.written.tensors.items():
            name = self.names[written_name]
            tensor = map_tensor(entry)
            source = self.source.tensors.get(name)
            # the library may save in another type: compared in that type, and the source's bytes are kept
            if source is not None and source.shape == entry.shape and name.rpartition(".")[0] not in self.quantized:
                original = map_tensor(source)
                if torch.equal(original.to(DTYPES[entry.dtype]), tensor):
                    yield name, original, True
                    continue
            yield name, tensor, False

    def _config(self) -> dict[str, Any]:
        """Return the source's config with the library's `quantization_config`, and whether the head is still tied."""
        # the library unties a head that it changes: the written tensors decide, not the source's config
        config = config_with_stated_tie(self.source.config, self.family, head_is_tied(self.written, self.family))
        settings = cast("Mapping[str, Any]", self.written.config.get("quantization_config") or {})
        if self.quantized or _is_online(settings):
            config["quantization_config"] = self._settings(settings)
        return config

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return `quantization_config` with the source's names, patterns expanded, and all unquantized linears in `ignore`."""
        unquantized = unquantized_linears(self.source, self.family, self.quantized)
        # names on disk, which vLLM maps to its own; names in transformers would only be right for transformers
        ignored = {self._disk_module(name) for name in cast("list[str]", settings.get("ignore") or [])}
        config_groups = cast("Mapping[str, Mapping[str, Any]]", settings.get("config_groups") or {})
        groups = {name: {**group, "targets": self._targets(group["targets"])} for name, group in config_groups.items()}
        # all unquantized linears, not only those it was told of: a linear that no list names counts as quantized
        ignore = sorted({*unquantized, *ignored} - set(self.quantized))
        # rotations that are already in the weights must not be applied again by a runtime
        transforms = {} if _is_online(settings) else {"transform_config": cast("dict[str, Any]", {})}
        return {**settings, "config_groups": groups, "ignore": ignore, **transforms}

    def _targets(self, targets: list[str]) -> list[str]:
        names: list[str] = []
        for target in targets:
            if not target.startswith("re:"):
                names.append(self._disk_module(target))
                continue
            # patterns match names in transformers: expanded here to the linears that they have matched
            pattern = re.compile(target.removeprefix("re:"))
            modules = {name: self.family.module_name(f"{name}.weight").removesuffix(".weight") for name in self.quantized}
            names += [name for name, module in modules.items() if pattern.match(module)]
        return list(dict.fromkeys(names))


def _is_online(settings: Mapping[str, Any]) -> bool:
    """Return whether a runtime has to apply transforms; those already applied to the weights do not count."""
    transforms = cast("Mapping[str, Any]", settings.get("transform_config") or {})
    schemes = cast("Mapping[str, Mapping[str, Any]]", transforms.get("config_groups") or {})
    locations = [str(entry["location"]) for scheme in schemes.values() for entry in cast("list[dict[str, Any]]", scheme["apply"])]
    return any(not location.startswith("weight_") for location in locations)

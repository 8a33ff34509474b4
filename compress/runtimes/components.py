"""Latency of each component of a model in this process: vision tower, projector, prefill and decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig

from compress.data.prompts import Prompt, open_images, run_processor
from compress.errors import DataError
from compress.eval.latency.results import Component, ComponentTable
from compress.eval.latency.settings import LoadPoint
from compress.families import Family
from compress.runtimes.inputs import Encoder
from compress.runtimes.runtime import OpenContext, Runtime
from compress.runtimes.transformers.model import choose_device, choose_dtype, load_model

ComponentName = Literal["vision", "projector", "prefill", "decode"]

DECODED = 8
"""Decode steps per repeat; the repeat's decode time is their mean: one step is as short as jitter."""


def measure_components(runtime: Runtime, context: OpenContext, point: LoadPoint, prompt: Prompt, repeats: int) -> ComponentTable:
    """Return the time of each component of the dense model; see `Runtime.time_components`.

    Components that the family's record does not name, or that the prompt does not run, are left out: the vision tower without an
    image, prefill and decode of a model that generates no text.

    Raises:
        CheckpointError: the artifact cannot be read.
        DataError: the model cannot take the prompt.
    """
    device = choose_device(runtime.component_device())
    dtype, family = choose_dtype("auto", context.artifact, device), context.family
    encoder = Encoder.of(context, 1)
    model = load_model(context, dtype, device)
    # One more than the decode steps: the first token comes from the prefill. With the minimum no end of sequence ends it early.
    neutral = GenerationConfig(do_sample=False, max_new_tokens=DECODED + 1, min_new_tokens=DECODED + 1, pad_token_id=0)
    for module in model.modules():  # models ship sampling and penalties, to which `generate` falls back
        if getattr(module, "generation_config", None) is not None:
            module.generation_config = neutral
    rows: list[dict[ComponentName, float]] = []
    with torch.inference_mode(), context.progress.task("time components", repeats, "repeats") as advance:
        inputs = _inputs(encoder, context, prompt, device)
        # Run 0 warms up: it allocates, and picks kernels.
        for repeat in range(repeats + 1):
            clock = _Clock(device)
            with _hooked(model, family, clock):
                _run(model, family, inputs, neutral)
            if repeat:
                rows.append(clock.milliseconds())
                advance(1)
    order: Sequence[ComponentName] = ("vision", "projector", "prefill", "decode")
    return ComponentTable(
        runtime="transformers",
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        point=point,
        sequence_tokens=int(inputs["input_ids"].shape[1]),
        components=tuple(component_of(name, [row[name] for row in rows]) for name in order if rows and name in rows[0]),
    )


@dataclass
class _Clock:
    """Seconds spent in each kind of module; the device is synchronized at each reading."""

    device: torch.device
    spent: dict[str, float] = field(default_factory=lambda: {"vision": 0.0, "projector": 0.0, "projector in vision": 0.0})
    entered: float | None = None
    """When the decoder was entered."""

    steps: list[float] = field(default_factory=lambda: list[float]())
    """Seconds of each forward pass of the decoder, the prefill first."""

    def now(self) -> float:
        if self.device.type == "cuda":
            # Kernels are launched asynchronously: without it the hooks would time launches.
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def hook(self, module: nn.Module, kind: str) -> list[Any]:
        """Time a module's calls; return the handles that remove the hooks."""
        began: list[float] = []

        def before(module: nn.Module, args: Any) -> None:
            del module, args
            began.append(self.now())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            del module, args, output
            # A stack, as a module may be called again within its own call.
            self.spent[kind] += self.now() - began.pop()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def milliseconds(self) -> dict[ComponentName, float]:
        """Return the time per component in milliseconds, the vision tower without a projector inside it."""
        seconds: dict[ComponentName, float] = {
            # In Qwen's families the merger is a child of the tower, whose hook has timed it too.
            "vision": self.spent["vision"] - self.spent["projector in vision"],
            "projector": self.spent["projector"] + self.spent["projector in vision"],
            "prefill": self.steps[0] if self.steps else 0.0,
            "decode": statistics.fmean(self.steps[1:]) if len(self.steps) > 1 else 0.0,
        }
        return {component: 1000 * value for component, value in seconds.items() if value > 0}


@contextmanager
def _hooked(model: Any, family: Family, clock: _Clock) -> Generator[None]:
    """Time the family's modules while the context lasts; the decoder from its first block to the output head."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    handles = _decoder_hooks(modules, family, clock)
    projectors = _called(modules, family.projector)
    for name, module in _called(modules, family.vision).items():
        if name not in projectors:
            handles += clock.hook(module, "vision")
    for name, module in projectors.items():
        inside = any(name.startswith(f"{tower}.") for tower in family.vision if tower not in family.projector)
        handles += clock.hook(module, "projector in vision" if inside else "projector")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _called(modules: dict[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the model's modules of these names; for a `ModuleList` its members, as a list has no forward."""
    called: dict[str, nn.Module] = {}
    for name in names:
        module = modules.get(name)
        if isinstance(module, nn.ModuleList):
            called |= {f"{name}.{index}": child for index, child in enumerate(module)}
        elif module is not None:
            called[name] = module
    return called


def _decoder_hooks(modules: dict[str, nn.Module], family: Family, clock: _Clock) -> list[Any]:
    def enter(module: nn.Module, args: Any) -> None:
        del module, args
        clock.entered = clock.now()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        if clock.entered is not None:
            clock.steps.append(clock.now() - clock.entered)
            clock.entered = None

    first, head = modules.get(f"{family.blocks}.0"), modules.get(family.head) if family.head is not None else None
    if first is None or head is None:
        return []
    return [first.register_forward_pre_hook(enter), head.register_forward_hook(leave)]


def _inputs(encoder: Encoder, context: OpenContext, prompt: Prompt, device: torch.device) -> dict[str, Any]:
    if encoder.family.head is None:  # CLIP has no chat template
        images = open_images(prompt) or None
        values = run_processor(
            encoder.processor, prompt.id, text=[prompt.text], images=images, truncation=True, return_tensors="pt"
        )
        return {key: value.to(device) for key, value in values.items()}
    faults: dict[int, str] = {}
    batches = list(encoder.prompts([prompt], DECODED + 1, faults))
    if not batches:
        raise DataError(f"{context.artifact}: the parts of the model cannot be timed: {faults[0]}")
    return dict(encoder.collate(batches[0], "left", device))


def _run(model: Any, family: Family, inputs: dict[str, Any], settings: GenerationConfig) -> None:
    entry = model.get_submodule(family.entry(inputs))
    if family.head is None:
        entry(**inputs)
    else:
        entry.generate(**inputs, generation_config=settings)


def component_of(name: ComponentName, milliseconds: Sequence[float]) -> Component:
    """Return a component's row from its time in each repeat."""
    # The median, as one descheduled repeat would move a mean; the least is the machine at its quietest.
    median = statistics.median(milliseconds)
    return Component(component=name, median_ms=median, least_ms=min(milliseconds), repeats=len(milliseconds))

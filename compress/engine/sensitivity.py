"""How much a model's predictions depend on each output channel of its linears: one forward walk, then one in reverse.

With p the model's distribution of the next token and δ a change of a linear's output, the predictions move by
KL(p ‖ p′) ≈ ½ E[(g·δ)²], g the gradient, at that output, of the loss of labels drawn from p itself (the Fisher information).
Approximating channels and tokens as independent of each other and of the input activations, a rounding error ΔW of the linear
costs ½ Σ_m n_m/n Σ_r s_m[r] ΔW_r (H_m/n_m) ΔW_rᵀ nats per predicted token: m are text and vision tokens, s_m the mean of g² over
the n_m tokens of a modality, H_m their Hessian Σ xᵀx, n the predicted tokens. Every text token that is no padding counts as
predicted; predictions after an image's placeholder tokens are never used.

Gradients and inputs depend on each other: tokens with large activations have small gradients, or large ones. For one error of each
linear, the reference, (g·ΔWx)² is therefore measured token by token, and other errors are set in relation to it.

Only one block has its weights loaded at a time, in float32 in the reverse walk, so that no gradient is lost to rounding. What the
author does between blocks is assumed to pass gradients on unchanged: true of additions (deepstack) and of skipped blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from compress.checkpoints.output_head import head_is_tied
from compress.engine.host import map_tensors
from compress.engine.recorder import hidden_states
from compress.engine.replay import BlockVisit, Call, Positions, Replay, WalkConfig
from compress.engine.statistics import InputStatistics
from compress.engine.weights import unload
from compress.errors import CheckpointError
from compress.families import within

_Count = Callable[[str, str, Tensor, Tensor], None]
"""Counts gradients at a linear's output and its inputs, by its names in the module and in the model."""

_HEAD_CHUNK = 1 << 25
"""Logits that are computed at once: 128 MiB in float32."""


@dataclass(frozen=True)
class OutputErrors:
    """The mean squared error of a linear's output channels over text and over vision tokens, float32 [out]; None for no tokens."""

    text: Tensor | None
    vision: Tensor | None

    @classmethod
    def of(cls, error: Tensor, statistics: InputStatistics) -> OutputErrors:
        """Return those of a weight error ΔW [out, in]."""
        text, vision = (
            None if inputs is None else inputs.hessian.output_errors(error) / inputs.tokens
            for inputs in (statistics.text, statistics.vision)
        )
        return cls(text, vision)


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of the predictions to a linear's outputs: the mean squared gradient of the summed loss, by output channel."""

    text: Tensor | None
    """The mean over text tokens, float32 [out]; None where there was none."""

    vision: Tensor | None
    """The mean over vision tokens, float32 [out]; None where there was none."""

    per_token: tuple[float, float]
    """How many text and vision tokens the linear processes per predicted token."""

    reference: tuple[float, float] | None = None
    """The mean of (g·ΔWx)² over text and over vision tokens for the reference error ΔW; None where there was none."""

    def predicted_loss(self, errors: OutputErrors, reference: OutputErrors | None = None) -> float:
        """Return the predicted loss of errors at the linear's outputs, in nats per predicted token.

        `reference` are those of the reference error. Where it is given, the measured loss of that error is what others relate to.
        """
        total = 0.0
        for index, sensitivity in enumerate((self.text, self.vision)):
            error = (errors.text, errors.vision)[index]
            if sensitivity is None or error is None:
                continue
            loss = float(sensitivity.to(error).dot(error))
            if reference is not None and self.reference is not None:
                of_reference = (reference.text, reference.vision)[index]
                assert of_reference is not None  # both come from the same statistics
                independent = float(sensitivity.to(of_reference).dot(of_reference))
                # 0 where no gradient reaches the linear, so that `loss` is 0 as well, or where the reference changes nothing
                if independent:
                    loss *= self.reference[index] / independent
            total += self.per_token[index] * loss
        return total / 2


def balance(statistics: InputStatistics, sensitivities: Iterable[Sensitivity]) -> tuple[float, float]:
    """Return the weights of a text and a vision token of one input, from the output gradients of the linears that read it.

    Both are means of g², summed over all channels of these linears, and scaled to a mean weight of 1 per token. All tokens have the
    weight 1 where there is only one modality, one was not measured, or all gradients are zero.
    """
    if statistics.text is None or statistics.vision is None:
        return 1.0, 1.0
    sums = [0.0, 0.0]
    for sensitivity in sensitivities:
        if sensitivity.text is None or sensitivity.vision is None:
            return 1.0, 1.0
        sums[0] += float(sensitivity.text.sum(dtype=torch.float64))
        sums[1] += float(sensitivity.vision.sum(dtype=torch.float64))
    counts = (statistics.text.tokens, statistics.vision.tokens)
    total = sum(count * value for count, value in zip(counts, sums, strict=True))
    if total == 0:
        return 1.0, 1.0
    # with a mean weight of 1 the sums stay comparable with unweighted ones
    scale = sum(counts) / total
    return sums[0] * scale, sums[1] * scale


def share(statistics: InputStatistics, text: float) -> tuple[float, float]:
    """Return the weights of a text and a vision token such that text has the share `text`, from 0 to 1, of the total weight.

    The mean weight is 1 per token. All tokens have the weight 1 where there is only one modality.
    """
    if statistics.text is None or statistics.vision is None:
        return 1.0, 1.0
    return text * statistics.tokens / statistics.text.tokens, (1 - text) * statistics.tokens / statistics.vision.tokens


@dataclass
class _Sums:
    """Sums of squared gradients per output channel, and counts of tokens, of text and vision."""

    squares: list[Tensor | None] = field(default_factory=lambda: [None, None])
    tokens: list[int] = field(default_factory=lambda: [0, 0])

    reference: list[float] | None = None
    """The sums of (g·ΔWx)²; None without a reference error."""

    def add(self, gradient: Tensor, inputs: Tensor, error: Tensor | None, positions: Positions | None) -> None:
        """Add gradients [..., out] at inputs [..., in]; without positions every row is a vision token."""
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        if positions is None:
            self.add_rows(rows, inputs, error, vision=True)
        else:
            for vision, mask in enumerate((positions.text.to(rows.device), positions.vision.to(rows.device))):
                self.add_rows(rows[mask], inputs[mask], error, vision=bool(vision))

    def add_rows(self, rows: Tensor, inputs: Tensor, error: Tensor | None, *, vision: bool) -> None:
        """Add gradients [tokens, out] at inputs [tokens, in] of tokens of one modality, and what a reference error costs there."""
        if rows.shape[0]:
            if error is not None:
                change = nn.functional.linear(inputs, error).mul_(rows).sum(dim=1)
                self.reference = self.reference or [0.0, 0.0]
                self.reference[vision] += float(change.square_().sum(dtype=torch.float64))
            # float64 over batches: a float32 sum would lose what small gradients add to large ones
            squares = rows.square().sum(dim=0).to(torch.float64)
            before = self.squares[vision]
            self.squares[vision] = squares if before is None else before + squares
            self.tokens[vision] += rows.shape[0]

    def result(self, predicted: int) -> Sensitivity:
        """Return the means."""
        text, vision = (
            None if squares is None else (squares / count).to(torch.float32).cpu()
            for squares, count in zip(self.squares, self.tokens, strict=True)
        )
        reference = None
        if self.reference is not None:
            of_text, of_vision = (total / max(1, count) for total, count in zip(self.reference, self.tokens, strict=True))
            reference = (of_text, of_vision)
        return Sensitivity(text, vision, (self.tokens[0] / predicted, self.tokens[1] / predicted), reference)


@dataclass(frozen=True)
class Forward:
    """What else the forward walk is used for, so that the blocks need not be walked once more."""

    visit: Callable[[BlockVisit], None] | None = None
    """Called for each block, and for the head where its sensitivity is measured, with the calls of all batches."""

    measured: Collection[int] | None = None
    """The indices of the batches that sensitivities are measured on; None: all of them."""

    reference: Callable[[str, Tensor], Tensor | None] | None = None
    """Returns a linear's reference error ΔW, float32 [out, in], by its name in the model and its weight, once all is visited.

    None for a linear without one, whose sensitivity alone is measured.
    """


def measure_sensitivity(
    config: WalkConfig,
    linears: Iterable[str],
    seed: int,
    advance: Callable[[int], None] = lambda blocks: None,
    forward: Forward = Forward(),
) -> dict[str, Sensitivity]:
    """Return the sensitivity of linears of the decoder or its head, by their names in the model.

    `seed` seeds the sampling of labels; the same settings and seed give the same result. `advance` is called twice for each block.

    Raises:
        CheckpointError: the family has no output head, weights cannot be used, or a linear is never called.
    """
    names = tuple(linears)
    if config.family.head is None:
        raise CheckpointError(
            f"{config.checkpoint.folder}: {config.family.name} has no output head, so nothing tells what its predictions depend "
            "on; give bits and balance as numbers"
        )
    # seeded on the device that draws: the same settings give the same labels there, not across devices
    return _ReverseWalk(
        Replay(config), config.family.head, names, torch.Generator(config.device).manual_seed(seed), advance, forward
    ).measure()


@dataclass
class _ReverseWalk:
    """One measurement; `gradients` are those at the output of the current block, by batch."""

    replay: Replay
    head: str
    linears: tuple[str, ...]
    generator: torch.Generator
    advance: Callable[[int], None]
    forward: Forward
    calls: dict[str, Sequence[Call]] = field(default_factory=lambda: dict[str, Sequence[Call]]())
    gradients: dict[int, Tensor] = field(default_factory=lambda: dict[int, Tensor]())
    sums: dict[str, _Sums] = field(default_factory=lambda: dict[str, _Sums]())
    predicted: int = 0

    @property
    def device(self) -> str:
        return self.replay.config.device

    def measure(self) -> dict[str, Sensitivity]:
        units = self.replay.decoder_units()
        self._forward(units)
        # in a method of its own, so that what it held is free
        self.replay.release()
        for name in reversed(units):
            self._backward(name)
            self.advance(1)
        missing = [name for name in self.linears if name not in self.sums]
        if missing:
            raise CheckpointError(f"{missing[0]}: no calibration sample calls it; leave it out of the stage")
        return {name: self.sums[name].result(self.predicted) for name in self.linears}

    def _forward(self, units: Sequence[str]) -> None:
        """Walk forward, keep the measured batches' calls, and compute the gradients at the last block's output."""
        measured = self.forward.measured
        for visit in self.replay.walk([*units, self.head]):
            if self.forward.visit is not None:
                self.forward.visit(visit)
            self.calls[visit.name] = [call for call in visit.calls if measured is None or call.batch in measured]
            self.advance(1)
            if visit.name == units[-1]:
                if self.forward.visit is not None and self.head in self.linears:
                    self._visit_head(visit, self.forward.visit)
                self._start(visit)
                # the head's own weights are used through `_head_weight`, so it need not be visited
                return

    def _visit_head(self, last: BlockVisit, use: Callable[[BlockVisit], None]) -> None:
        """Visit the head while the rest of the model is in the type it runs in."""
        calls: list[Call] = []
        for call in last.calls:
            hidden = self.replay.head_input(call.batch, {last.name: last.run(call)})
            calls.append(replace(call, args=(self.replay.host.offload(hidden.detach()),), kwargs={}))
        module = self.replay.model.get_submodule(self.head)
        self.replay.reader.load(module, self.head, self.device)
        use(BlockVisit(self.head, module, calls, self.device))
        unload(module)

    def _start(self, last: BlockVisit) -> None:
        """Compute the gradients at the last block's output, with the rest of the model in float32."""
        # in bfloat16 the gradient p - 1 of a label is 0 from p = 0.998 on
        self.replay.model.float()
        weight = self._head_weight()
        reference = self._reference(self.head, weight) if self.head in self.linears else None
        for call in self.calls[last.name]:
            with torch.no_grad():
                output = last.module(*self._to_device(call.args), **self._to_device(call.kwargs))
            leaf = hidden_states((output,), {}).detach().requires_grad_()
            hidden = self.replay.head_input(call.batch, {last.name: _replace_hidden_states(output, leaf)})
            positions = cast("Positions", call.positions)
            gradient = self._head_gradient(hidden.detach(), weight, reference, positions)
            hidden.backward(gradient)
            self.gradients[call.batch] = self.replay.host.offload(cast("Tensor", leaf.grad))

    def _head_weight(self) -> Tensor:
        reader = self.replay.reader
        family = self.replay.family
        # a tied head has no tensor on disk
        owner = family.embeddings if head_is_tied(reader.checkpoint, family) else self.head
        return reader.tensor(f"{owner}.weight", self.device).to(torch.float32)

    @torch.no_grad()
    def _head_gradient(self, hidden: Tensor, weight: Tensor, reference: Tensor | None, positions: Positions) -> Tensor:
        """Return the gradient, at the head's input [samples, tokens, hidden], of the loss of labels sampled from its logits."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        gradient = torch.zeros_like(rows)
        text = positions.text.to(rows.device).nonzero().squeeze(1)
        bias = cast("Tensor | None", getattr(self.replay.model.get_submodule(self.head), "bias", None))
        if bias is not None:
            bias = self.replay.reader.tensor(f"{self.head}.bias", self.device).to(torch.float32)
        # only text positions: a language model's loss is never taken after an image's placeholder tokens
        for chunk in torch.split(text, max(1, _HEAD_CHUNK // weight.shape[0])):
            error = nn.functional.linear(rows[chunk], weight, bias).softmax(dim=-1)
            noise = torch.empty_like(error).exponential_(generator=self.generator)
            labels = (error / noise).argmax(dim=-1, keepdim=True)  # a sample of softmax by the Gumbel-max trick, with exponentials
            # the gradient of cross-entropy at the logits is p minus the label's one-hot vector; formed in place, logits are large
            error.scatter_(1, labels, error.gather(1, labels) - 1)
            if self.head in self.linears:
                self._sums(self.head).add_rows(error, rows[chunk], reference, vision=False)
            gradient[chunk] = error @ weight
        # each text token predicts the next one, the last of a sample included: labels are drawn, not read from the text
        self.predicted += len(text)
        return gradient.view(hidden.shape)

    def _backward(self, name: str) -> None:
        """Propagate every batch's gradient from a block's output to its input, and accumulate it at the block's linears."""
        module = self.replay.model.get_submodule(name)
        # loaded again in float32: the walk has freed it, and the model's type has changed since
        self.replay.reader.load(module, name, self.device)
        local = {linear.removeprefix(f"{name}."): linear for linear in self.linears if within(linear, name)}
        errors = {linear: self._reference(linear, module.get_parameter(f"{path}.weight")) for path, linear in local.items()}
        for call in self.calls.pop(name):
            args, kwargs = self._to_device(call.args), self._to_device(call.kwargs)
            states = hidden_states(args, kwargs)
            # a leaf per block: the graph never spans two blocks, so one block's activations are all that is kept
            leaf = states.detach().requires_grad_()
            with _OutputGradients(module, local, self._accumulator(call.positions, errors)), self._attention(), torch.enable_grad():
                output = hidden_states((module(*_replace_tensor(args, states, leaf), **_replace_tensor(kwargs, states, leaf)),), {})
                output.backward(self.gradients[call.batch].to(self.device))
            # the gradient at this block's input is the one at the previous block's output
            self.gradients[call.batch] = self.replay.host.offload(cast("Tensor", leaf.grad))
        unload(module)

    def _attention(self) -> AbstractContextManager[object]:
        """Return a context with deterministic attention gradients: CUDA's fused kernels accumulate them in any order."""
        cuda = torch.device(self.device).type == "cuda"
        return cast("AbstractContextManager[object]", sdpa_kernel(SDPBackend.MATH)) if cuda else nullcontext()

    def _reference(self, linear: str, weight: Tensor) -> Tensor | None:
        return None if self.forward.reference is None else self.forward.reference(linear, weight.detach())

    def _accumulator(self, positions: Positions | None, errors: Mapping[str, Tensor | None]) -> _Count:
        readers = self.replay.family.cross_attention_linears

        def count(local: str, linear: str, gradient: Tensor, inputs: Tensor) -> None:
            rows = gradient.numel() // gradient.shape[-1]
            seen = positions.of_images(rows) if positions and local in readers else positions
            self._sums(linear).add(gradient, inputs, errors[linear], seen)

        return count

    def _sums(self, linear: str) -> _Sums:
        return self.sums.setdefault(linear, _Sums())

    def _to_device(self, tree: Any) -> Any:
        """Move a recorded call's tensors to the device, floats as float32."""
        return map_tensors(tree, lambda tensor: tensor.to(self.device, torch.float32 if tensor.is_floating_point() else None))


class _OutputGradients:
    """Passes the gradients at the outputs of a module's linears (local name → name in the model) to `count` while it is active."""

    def __init__(self, module: nn.Module, linears: dict[str, str], count: _Count) -> None:
        self._module = module
        self._linears = linears
        self._count = count
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for local, linear in self._linears.items():
            self._hooks.append(self._module.get_submodule(local).register_forward_hook(self._hook(local, linear)))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, local: str, linear: str) -> Any:
        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            del module
            inputs = args[0].detach()

            def counted(gradient: Tensor) -> None:
                self._count(local, linear, gradient, inputs)

            if not output.requires_grad:
                output.requires_grad_()  # it reads the image features alone, which need no gradient here
            output.register_hook(counted)

        return watch


def _replace_tensor(tree: Any, old: Tensor, new: Tensor) -> Any:
    return map_tensors(tree, lambda tensor: new if tensor is old else tensor)


def _replace_hidden_states(output: Any, leaf: Tensor) -> Any:
    """Return a block's output with its hidden states replaced."""
    return _replace_tensor(output, hidden_states((output,), {}), leaf)

"""Second moments and magnitudes of what linears are given, over all calibration tokens, text and vision apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.engine.recorder import ReachedError
from compress.engine.replay import BlockVisit, Positions
from compress.engine.second_moment import WHOLE, Gram, HessianRequest, in_chunks
from compress.errors import CheckpointError
from compress.numerics.rounding import PANEL


class Moment:
    """Sums over the tokens of one kind: `second`, of xᵀx, `abs_sum` Σ |x| [in] and `abs_max` max |x| [in], all float32."""

    def __init__(self, channels: int, device: torch.device, requested: HessianRequest = WHOLE) -> None:
        self.second = requested.start(channels, device)
        self.abs_sum = torch.zeros(channels, device=device)
        self.abs_max = torch.zeros(channels, device=device)
        self.tokens: float = 0

    def add(self, rows: Tensor) -> None:
        """Count tokens [tokens, in]."""
        for part in in_chunks(rows):
            values = part.to(torch.float32)
            self.second.add(values)
            self.abs_sum += _norms(values, 1)
            self.abs_max = torch.maximum(self.abs_max, _norms(values, math.inf))
        self.tokens += rows.shape[0]


def _norms(values: Tensor, order: float) -> Tensor:
    """Return the norm of each column: without a copy of the magnitudes."""
    return cast("Tensor", torch.linalg.vector_norm(values, ord=order, dim=0))


@dataclass
class Moments:
    """What one distinct linear input was over the calibration samples; a kind of token that never came is None.

    `weights` say how much a text and a vision token count in the means. Of what is `disposable` nobody needs the sums any more
    once `take_hessian` was called. `kept` says what of the second moments there is: the whole ones can be asked for where it does.
    """

    text: Moment | None = None
    vision: Moment | None = None
    weights: tuple[float, float] = (1.0, 1.0)
    disposable: bool = False
    requested: HessianRequest = WHOLE

    @property
    def tokens(self) -> float:
        """How many tokens were counted."""
        return sum(part.tokens for part, _ in self._parts())

    def mean_hessian(self) -> Tensor:
        """Return the weighted mean of xᵀx over all tokens, float32 [in, in]."""
        (first, weight), *others = self._grams()
        lower = first.lower.clone() if weight == 1 else first.lower * weight
        for part, weight in others:
            lower.add_(part.lower, alpha=weight)
        return _mirror(lower).div_(self._weight())

    def take_hessian(self) -> Tensor:
        """Return what `mean_hessian` does, made in place of the sums where they are disposable: a matrix may take gigabytes."""
        if not self.disposable:
            return self.mean_hessian()
        (first, weight), *others = self._grams()
        lower = first.lower.mul_(weight)
        for part, weight in others:
            lower.add_(part.lower, alpha=weight)
        for part, _ in self._grams():
            part.lower = part.lower.new_empty(0, 0)
        return _mirror(lower).div_(self._weight())

    def output_error(self, error: Tensor) -> float:
        """Return the weighted sum over all tokens of the squared error of the output, for an error of the weight [out, in]."""
        return float(sum(part.second.output_error(error) * weight for part, weight in self._parts()))

    def blocks(self, size: int) -> Tensor:
        """Return the weighted sums of xᵀx of `size` neighbouring channels at a time, float32 [in / size, size, size]."""
        (first, weight), *others = self._parts()
        total = first.second.blocks(size) * weight
        for part, weight in others:
            total.add_(part.second.blocks(size), alpha=weight)
        return total

    def merge(self) -> None:
        """Keep the weighted sums over both kinds alone, in the memory of one; means stay as they are, the kinds are lost."""
        if self.text is None or self.vision is None:
            return
        (first, weight), (second, other) = self._parts()
        first.second.absorb(second.second, weight, other)
        first.abs_sum.mul_(weight).add_(second.abs_sum, alpha=other)
        first.abs_max = torch.maximum(first.abs_max, second.abs_max)
        first.tokens = first.tokens * weight + second.tokens * other
        self.vision, self.weights = None, (1.0, 1.0)

    def mean_abs(self) -> Tensor:
        """Return the weighted mean of |x| over all tokens, float32 [in]."""
        (first, weight), *others = self._parts()
        total = first.abs_sum * weight
        for part, weight in others:
            total.add_(part.abs_sum, alpha=weight)
        return total / self._weight()

    def mean_square(self) -> Tensor:
        """Return the weighted mean of x² over all tokens, float32 [in]."""
        (first, weight), *others = self._parts()
        total = first.second.diagonal() * weight
        for part, weight in others:
            total.add_(part.second.diagonal(), alpha=weight)
        return total / self._weight()

    def abs_max(self) -> Tensor:
        """Return the largest |x| of any token, float32 [in]."""
        (first, _), *others = self._parts()
        largest = first.abs_max
        for part, _ in others:
            largest = torch.maximum(largest, part.abs_max)
        return largest

    def _weight(self) -> float:
        return sum(part.tokens * weight for part, weight in self._parts())

    def _parts(self) -> list[tuple[Moment, float]]:
        parts = [(part, weight) for part, weight in zip((self.text, self.vision), self.weights, strict=True) if part is not None]
        if not parts:
            raise CheckpointError("no calibration token was counted; every sample is padding only, give others")
        return parts

    def _grams(self) -> list[tuple[Gram, float]]:
        return [(part.second, weight) for part, weight in self._parts() if isinstance(part.second, Gram)]

    def add(self, inputs: Tensor, positions: Positions | None) -> None:
        """Count a linear's input [..., in]; without positions every row is a vision token."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if positions is None:
            self.vision = self._added(self.vision, rows)
            return
        for kind, mask in (("text", positions.text), ("vision", positions.vision)):
            count = int(mask.sum())
            if count:
                chosen = rows if count == rows.shape[0] else rows[mask.to(rows.device)]
                setattr(self, kind, self._added(getattr(self, kind), chosen))

    def _added(self, part: Moment | None, rows: Tensor) -> Moment:
        moment = part or Moment(rows.shape[-1], rows.device, self.requested)
        moment.add(rows)
        return moment


def _mirror(lower: Tensor) -> Tensor:
    """Make a matrix symmetric by its lower triangle, in place: at a size of 30,000 channels a copy takes 3.6 GB."""
    for start in range(0, lower.shape[0], PANEL):
        panel = slice(start, start + PANEL)
        below = slice(start + PANEL, None)
        lower[panel, below] = lower[below, panel].t()
        lower[panel, panel] = lower[panel, panel].tril() + lower[panel, panel].tril(-1).t()
    return lower


class Observer:
    """Watches linears of a module while it runs; those that are given the same tensor share one `Moments`.

    `vision_readers` are those whose input is the images' states, whatever the tokens of the prompt are. Once every linear has its
    input, a run is ended by `ReachedError`.
    """

    def __init__(
        self, module: nn.Module, linears: Iterable[str], vision_readers: Iterable[str] = (), requested: HessianRequest = WHOLE
    ) -> None:
        self.moments: dict[str, Moments] = {}
        self.positions: Positions | None = None
        self._vision_readers = frozenset(vision_readers)
        self._requested = requested
        self._module = module
        self._linears = tuple(linears)
        self._hooks: list[RemovableHandle] = []
        self._leader: dict[str, str] = {}
        self._seen: set[str] = set()
        self._last: tuple[str, Tensor] | None = None

    def __enter__(self) -> Self:
        for name in self._linears:
            self._hooks.append(self._module.get_submodule(name).register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def _hook(self, name: str) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            inputs: Tensor = args[0]
            if name not in self._leader:
                shared = self._last is not None and self._last[1] is inputs
                self._leader[name] = self._last[0] if shared and self._last is not None else name
                self.moments.setdefault(self._leader[name], Moments(requested=self._requested))
                self.moments[name] = self.moments[self._leader[name]]
            leader = self._leader[name]
            if leader == name:
                self._last = (name, inputs)
                self.moments[name].add(inputs, self._rows(name, inputs))
            self._seen.add(name)
            if len(self._seen) == len(self._linears):
                self._seen.clear()
                raise ReachedError  # what the module does after its last linear's input is nobody's business

        return count

    def _rows(self, name: str, inputs: Tensor) -> Positions | None:
        if self.positions is None or name not in self._vision_readers:
            return self.positions
        return self.positions.of_images(inputs.numel() // inputs.shape[-1])


def observe(visit: BlockVisit, linears: Iterable[str], requested: HessianRequest = WHOLE) -> dict[str, Moments]:
    """Run a visited module over all its calls and return what its linears (names within the module) were given.

    Linears with the same input share one object. `kept` says what of the second moments is wanted.

    Raises:
        CheckpointError: no sample reaches the module, a linear was never called, or its input is not finite.
    """
    names = tuple(linears)
    if not visit.calls:
        raise CheckpointError(
            f"{visit.name}: no calibration sample reaches it; add samples that do, images with questions for what reads images"
        )
    with Observer(visit.module, names, visit.vision_readers, requested) as observer:
        for call in visit.calls:
            observer.positions = call.positions
            with suppress(ReachedError):
                visit.run(call)
    missing = [name for name in names if name not in observer.moments]
    if missing:
        raise CheckpointError(f"{visit.name}.{missing[0]}: its block ran without calling it; leave it out of the stage")
    for name in names:
        if not bool(observer.moments[name].mean_abs().isfinite().all()):
            dtype = visit.module.get_parameter(f"{name}.weight").dtype
            raise CheckpointError(
                f"{visit.name}.{name}: its input overflows in {dtype} for some calibration sample; convert the checkpoint to "
                "bfloat16, or give other samples"
            )
    return observer.moments

"""Statistics of linears' input activations over the calibration tokens: Hessians and magnitudes, text and vision apart."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.engine.hessian import FULL_HESSIAN, FullHessian, HessianRequest, in_chunks
from compress.engine.recorder import ReachedError
from compress.engine.replay import BlockVisit, Positions
from compress.errors import CheckpointError
from compress.numerics.rounding import PANEL


class TokenStatistics:
    """Statistics over the tokens of one modality: `hessian` Σ xᵀx, `abs_sum` Σ |x| [in], `abs_max` max |x| [in], all float32."""

    def __init__(self, channels: int, device: torch.device, requested: HessianRequest = FULL_HESSIAN) -> None:
        self.hessian = requested.start(channels, device)
        self.abs_sum = torch.zeros(channels, device=device)
        self.abs_max = torch.zeros(channels, device=device)
        self.tokens: float = 0

    def add(self, rows: Tensor) -> None:
        """Add tokens [tokens, in]."""
        for chunk in in_chunks(rows):
            # squares of float16 overflow beyond 256, and sums in bfloat16 stop growing after a few hundred tokens
            values = chunk.to(torch.float32)
            self.hessian.add(values)
            magnitudes = values.abs()  # `vector_norm` needs no copy, but takes eight times as long over columns
            self.abs_sum += magnitudes.sum(dim=0)
            # never weighted by modality: a static scale has to cover the largest value of any token
            self.abs_max = torch.maximum(self.abs_max, magnitudes.amax(dim=0))
        self.tokens += rows.shape[0]


@dataclass
class InputStatistics:
    """Statistics of input activations that one or several linears share, over the calibration samples."""

    text: TokenStatistics | None = None
    """Those of text tokens; None where there was none."""

    vision: TokenStatistics | None = None
    """Those of vision tokens; None where there was none."""

    weights: tuple[float, float] = (1.0, 1.0)
    """How much a text and a vision token count in the means."""

    may_overwrite: bool = False
    """Whether `take_hessian` may overwrite the sums, because nothing needs them afterwards."""

    requested: HessianRequest = FULL_HESSIAN
    """What is accumulated of the Hessian; `mean_hessian` and `take_hessian` need the full one."""

    @property
    def tokens(self) -> float:
        """The number of tokens, weighted after `merge`."""
        return sum(sums.tokens for sums, _ in self._weighted())

    def mean_hessian(self) -> Tensor:
        """Return the weighted mean of xᵀx over all tokens, float32 [in, in]."""
        (first, weight), *others = self._full_hessians()
        lower = first.lower.clone() if weight == 1 else first.lower * weight
        for sums, weight in others:
            lower.add_(sums.lower, alpha=weight)
        return _mirror(lower).div_(self._weight())

    def take_hessian(self) -> Tensor:
        """Return `mean_hessian`, computed in the memory of the sums where that is allowed: a matrix may take gigabytes."""
        if not self.may_overwrite:
            return self.mean_hessian()
        (first, weight), *others = self._full_hessians()
        lower = first.lower.mul_(weight)
        for sums, weight in others:
            lower.add_(sums.lower, alpha=weight)
        for sums, _ in self._full_hessians():
            # frees the other modality's matrix, and makes a second use of the sums fail instead of returning an overwritten one
            sums.lower = sums.lower.new_empty(0, 0)
        return _mirror(lower).div_(self._weight())

    def output_error(self, error: Tensor) -> float:
        """Return the squared output error, summed over all tokens with their weights, for a weight error [out, in]."""
        return float(sum(sums.hessian.output_errors(error).sum() * weight for sums, weight in self._weighted()))

    def blocks(self, size: int) -> Tensor:
        """Return the weighted sum's blocks of `size` channels along the diagonal, float32 [in / size, size, size]."""
        (first, weight), *others = self._weighted()
        total = first.hessian.blocks(size) * weight
        for sums, weight in others:
            total.add_(sums.hessian.blocks(size), alpha=weight)
        return total

    def merge(self) -> None:
        """Replace the sums of both modalities by their weighted sum, in the memory of one; the means do not change."""
        if self.text is None or self.vision is None:
            return
        (first, weight), (second, other_weight) = self._weighted()
        first.hessian.add_weighted(second.hessian, weight, other_weight)
        first.abs_sum.mul_(weight).add_(second.abs_sum, alpha=other_weight)
        first.abs_max = torch.maximum(first.abs_max, second.abs_max)
        first.tokens = first.tokens * weight + second.tokens * other_weight
        self.vision, self.weights = None, (1.0, 1.0)

    def mean_abs(self) -> Tensor:
        """Return the weighted mean of |x| over all tokens, float32 [in]."""
        (first, weight), *others = self._weighted()
        total = first.abs_sum * weight
        for sums, weight in others:
            total.add_(sums.abs_sum, alpha=weight)
        return total / self._weight()

    def mean_square(self) -> Tensor:
        """Return the weighted mean of x² over all tokens, float32 [in]."""
        (first, weight), *others = self._weighted()
        total = first.hessian.diagonal() * weight
        for sums, weight in others:
            total.add_(sums.hessian.diagonal(), alpha=weight)
        return total / self._weight()

    def abs_max(self) -> Tensor:
        """Return the largest |x| of any token, float32 [in]."""
        (first, _), *others = self._weighted()
        largest = first.abs_max
        for sums, _ in others:
            largest = torch.maximum(largest, sums.abs_max)
        return largest

    def _weight(self) -> float:
        return sum(sums.tokens * weight for sums, weight in self._weighted())

    def _weighted(self) -> list[tuple[TokenStatistics, float]]:
        pairs = [(sums, weight) for sums, weight in zip((self.text, self.vision), self.weights, strict=True) if sums is not None]
        if not pairs:
            raise CheckpointError("no calibration token was counted; every sample is padding only, give others")
        return pairs

    def _full_hessians(self) -> list[tuple[FullHessian, float]]:
        return [(sums.hessian, weight) for sums, weight in self._weighted() if isinstance(sums.hessian, FullHessian)]

    def add(self, inputs: Tensor, positions: Positions | None) -> None:
        """Add a linear's input [..., in]; without positions every row is a vision token."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if positions is None:
            self.vision = self._added(self.vision, rows)
            return
        for kind, mask in (("text", positions.text), ("vision", positions.vision)):
            count = int(mask.sum())
            if count:
                # indexing by a mask copies the rows: avoided where all of them count
                tokens = rows if count == rows.shape[0] else rows[mask.to(rows.device)]
                setattr(self, kind, self._added(getattr(self, kind), tokens))

    def _added(self, current: TokenStatistics | None, rows: Tensor) -> TokenStatistics:
        sums = current or TokenStatistics(rows.shape[-1], rows.device, self.requested)
        sums.add(rows)
        return sums


def _mirror(lower: Tensor) -> Tensor:
    """Fill the upper triangle of a symmetric matrix from the lower one, in place: at 30,000 channels a copy takes 3.6 GB."""
    for start in range(0, lower.shape[0], PANEL):
        panel = slice(start, start + PANEL)
        below = slice(start + PANEL, None)
        lower[panel, below] = lower[below, panel].t()
        lower[panel, panel] = lower[panel, panel].tril() + lower[panel, panel].tril(-1).t()
    return lower


class Observer:
    """Collects input statistics of a module's linears while it runs; linears with the same input tensor share them.

    `vision_readers` are linears whose input is the image features (cross-attention), whatever the tokens of the prompt are. Once
    every linear has been called, the forward is ended by `ReachedError`.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Iterable[str],
        cross_attention_linears: Iterable[str] = (),
        requested: HessianRequest = FULL_HESSIAN,
    ) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self.positions: Positions | None = None
        self._vision_readers = frozenset(cross_attention_linears)
        self._requested = requested
        self._module = module
        self._linears = tuple(linears)
        self._hooks: list[RemovableHandle] = []
        # by linear, the first one that received the same input tensor
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
            # decided at the first call alone: which linears share an input follows from the model's code, not from the sample
            if name not in self._leader:
                # by identity of the tensor object, which `_last` keeps alive, so that its memory cannot be given to another one
                shared = self._last is not None and self._last[1] is inputs
                self._leader[name] = self._last[0] if shared and self._last is not None else name
                self.statistics.setdefault(self._leader[name], InputStatistics(requested=self._requested))
                self.statistics[name] = self.statistics[self._leader[name]]
            leader = self._leader[name]
            # counted once for all linears that share the input: q, k and v would triple the most expensive product of the pass
            if leader == name:
                self._last = (name, inputs)
                self.statistics[name].add(inputs, self._rows(name, inputs))
            self._seen.add(name)
            if len(self._seen) == len(self._linears):
                self._seen.clear()
                raise ReachedError  # the rest of the forward would be wasted work

        return count

    def _rows(self, name: str, inputs: Tensor) -> Positions | None:
        if self.positions is None or name not in self._vision_readers:
            return self.positions
        return self.positions.of_images(inputs.numel() // inputs.shape[-1])


def observe(visit: BlockVisit, linears: Iterable[str], requested: HessianRequest = FULL_HESSIAN) -> dict[str, InputStatistics]:
    """Run a visited module over all its calls and return its linears' input statistics, by names within the module.

    Linears with the same input share one object. `requested` limits what is accumulated of the Hessians.

    Raises:
        CheckpointError: no sample reaches the module, a linear was never called, or its input is not finite.
    """
    names = tuple(linears)
    if not visit.calls:
        raise CheckpointError(
            f"{visit.name}: no calibration sample reaches it; add samples that do, images with questions for what reads images"
        )
    with Observer(visit.module, names, visit.cross_attention_linears, requested) as observer:
        for call in visit.calls:
            observer.positions = call.positions
            with suppress(ReachedError):
                visit.run(call)
    missing = [name for name in names if name not in observer.statistics]
    if missing:
        raise CheckpointError(f"{visit.name}.{missing[0]}: its block ran without calling it; leave it out of the stage")
    for name in names:
        # checked here, where layer, type and remedy are known: a solver would only find that its Hessian is not finite
        if not bool(observer.statistics[name].mean_abs().isfinite().all()):
            dtype = visit.module.get_parameter(f"{name}.weight").dtype
            raise CheckpointError(
                f"{visit.name}.{name}: its input overflows in {dtype} for some calibration sample; convert the checkpoint to "
                "bfloat16, or give other samples"
            )
    return observer.statistics

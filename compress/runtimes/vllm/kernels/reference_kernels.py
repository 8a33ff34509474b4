"""Reference kernels in plain torch for quantized linears in vLLM's CPU build, on processors that its own kernels do not support.

A vLLM server loads this module in vLLM's environment before the model, as a worker extension (`--worker-extension-cls`); it imports
nothing of this package. It replaces functions of vLLM 0.32's `_custom_ops`. Loading, fusing and repacking of weights and the
quantization of activations stay vLLM's own.

- `cpu_gemm_wna16`: 4-bit weights. vLLM compiles the kernel for AVX-512, AMX, Arm and others, not for AVX2.
- `onednn_scaled_mm`: W8A8. Without VNNI oneDNN adds two int8 products in 16 bits, which saturates: Intel, "Nuances of int8
  Computations", oneDNN developer guide.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]

_BITS = 4
_BLOCK = 16
"""Output channels per block in the layout of vLLM's `CPUWNA16LinearKernel`."""

_EXACT = 512
"""The number of int8 products whose sum is exact in float32: 2¹⁴ · 2⁹ = 2²³, below 2²⁴."""


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Return the codes [rows, 8 · words] of 32-bit words [rows, words], the lowest bits first."""
    # An int32 shift copies the sign bit in; the mask removes it.
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**_BITS - 1)).flatten(1)


def cpu_gemm_wna16(
    input: torch.Tensor,  # noqa: A002 - vLLM's name, by which it calls
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """Return `input` [..., K] times the dequantized weight, plus `bias` [N], summed in float32.

    `q_weight` [N / 16, K · 2] has two words per block of 16 output channels and input channel; `scales` [groups, N]; `zeros`
    [groups, N / 8] are packed along the output, None where every zero point is 8.
    """
    del pack_factor, isa_hint
    groups, outputs = scales.shape
    words = _BLOCK * _BITS // 32
    inputs = q_weight.shape[1] // words
    # Blocks of 16 outputs lie one after the other, each [inputs, 2 words]: blocks become columns again.
    codes = _unpack(q_weight.view(-1, inputs, words).permute(1, 0, 2).reshape(inputs, -1))
    zero = torch.tensor(2 ** (_BITS - 1)) if zeros is None else _unpack(zeros).unsqueeze(1)
    weight = (codes.view(groups, -1, outputs) - zero).float() * scales.float().unsqueeze(1)
    product = input.float() @ weight.view(inputs, outputs)
    return (product if bias is None else product + bias.float()).to(input.dtype)


class _Handler:
    """Replaces oneDNN's prepared matrix: `weight` [K, N] int8, `scales` [N] float32."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        self.k, self.n = weight.shape
        self.weight, self.scales = weight.contiguous(), scales.float().view(-1)


def create_onednn_scaled_mm(
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    output_type: torch.dtype,
    dynamic_quant: bool,
    use_azp: bool,
    primitive_cache_size: int = 128,
) -> _Handler:
    """Return a handler of `weight` [K, N] int8 and its scales, one or one per output channel."""
    del output_type, dynamic_quant, use_azp, primitive_cache_size
    return _Handler(weight, weight_scales)


def onednn_scaled_mm(
    dnnl_handler: _Handler,
    x: torch.Tensor,
    output: torch.Tensor,
    input_scale: torch.Tensor | None,
    input_zp: torch.Tensor | None,
    input_zp_adj: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Write to `output` [M, N] the exact integer product of `x` [M, K] int8 with the matrix, times both scales, plus `bias`.

    Raises:
        NotImplementedError: the input has zero points.
    """
    if input_zp is not None:
        raise NotImplementedError("the reference kernel of W8A8 has no zero points of inputs")
    del input_zp_adj  # needed for zero points of inputs only
    product = torch.zeros(len(x), dnnl_handler.n, dtype=torch.int32)
    # A float32 product of 512 terms is exact and runs on the fast GEMM; torch's integer matrix products have none on CPUs.
    for first in range(0, dnnl_handler.k, _EXACT):
        partial = x[:, first : first + _EXACT].float() @ dnnl_handler.weight[first : first + _EXACT].float()
        product += partial.to(torch.int32)
    scaled = product.float() * dnnl_handler.scales
    if input_scale is not None:
        scaled = scaled * input_scale.float()
    # Both scales after the exact sum, as in vLLM's GPU kernels.
    return output.copy_(scaled if bias is None else scaled + bias.float())


class ReferenceKernels:
    """The extension by which vLLM loads this module; it adds nothing to the worker."""


_custom_ops.cpu_gemm_wna16 = cpu_gemm_wna16
_custom_ops.create_onednn_scaled_mm = create_onednn_scaled_mm
_custom_ops.onednn_scaled_mm = onednn_scaled_mm

"""Codes of 1 to 8 bits packed into 32-bit words, and back; nothing here modifies its input.

Two orders are in use: a dense little-endian stream of bits along a row (compressed-tensors' pack-quantized, and GPTQ's with the
matrix transposed), and AutoAWQ's GEMM order, which packs eight 4-bit columns of the transposed matrix into a word, interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's GEMM layout: nibble i of a word, lowest first, is column 8·word + AWQ_ORDER[i].

Its kernels convert nibbles i and i + 4 with one mask (0x000f000f) into a pair of float16 values: two neighbouring columns.
"""

_CHUNK = 1 << 24
"""Codes that are packed at once, so that intermediate copies stay small whatever the matrix's size."""


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [rows, columns] along the columns: int32 [rows, ceil(columns · bits / 32)].

    Code i of a row takes the bits i·bits and up of its words, lowest first, across the words' borders; unused bits are zero.
    """
    rows, columns = codes.shape
    # 32 codes of any width fill whole words, so that each row starts at a word
    padded = pad(codes, (0, -columns % 32)) if columns % 32 else codes
    # bytes are reinterpreted, not shifted: right on little-endian hosts alone, the byte order of safetensors' data
    words = torch.cat([_pack_bytes(chunk, bits) for chunk in _row_chunks(padded)]).view(torch.int32)
    return words.view(rows, -1)[:, : -(-columns * bits // 32)].contiguous()


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the uint8 codes [rows, columns] which `pack_words` packed."""
    rows, count = words.shape
    # `bits` words hold 32 codes: the unit that the bytes below divide into
    padded = pad(words, (0, -count % bits)) if count % bits else words.contiguous()
    codes = torch.cat([_unpack_bytes(chunk, bits) for chunk in _row_chunks(padded.view(torch.uint8))])
    return codes.view(rows, -1)[:, :columns].contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """Pack 4-bit codes [out, in] for AutoAWQ's GEMM kernel: int32 [in, out / 8]; `out` must be a multiple of 8."""
    rows, columns = codes.shape
    order = torch.tensor(AWQ_ORDER, device=codes.device)
    interleaved = codes.t().reshape(columns, rows // 8, 8).index_select(2, order)
    return pack_words(interleaved.view(columns, rows), bits=4)


def unpack_awq(words: Tensor) -> Tensor:
    """Return the uint8 codes [out, in] which `pack_awq` packed."""
    columns, count = words.shape
    positions = torch.tensor([AWQ_ORDER.index(column) for column in range(8)], device=words.device)
    interleaved = unpack_words(words, bits=4, columns=count * 8).view(columns, count, 8)
    return interleaved.index_select(2, positions).view(columns, count * 8).t().contiguous()


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [out, in] as GPTQ does, in words along the input: int32 [in · bits / 32, out]; they must fill whole words."""
    return pack_words(codes, bits).t().contiguous()


def unpack_gptq(words: Tensor, bits: int) -> Tensor:
    """Return the uint8 codes [out, in] which `pack_gptq` packed."""
    return unpack_words(words.t().contiguous(), bits, words.shape[0] * 32 // bits)


def _row_chunks(matrix: Tensor) -> Sequence[Tensor]:
    return torch.split(matrix, max(1, _CHUNK // max(1, matrix.shape[1])))


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack eight codes into `bits` bytes: uint8 [rows, columns], columns a multiple of 8, to uint8 [rows · columns / 8 · bits]."""
    eights = codes.reshape(-1, 8)
    packed = torch.zeros(eights.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        # a uint8 shift drops the bits above the byte; the next line puts them into the following one
        packed[:, byte] |= eights[:, index] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= eights[:, index] >> (8 - shift)
    return packed.view(-1)


def _unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """Undo `_pack_bytes`: uint8 [rows, bytes], bytes a multiple of `bits`, to uint8 [rows · bytes / bits · 8]."""
    eighths = packed.reshape(-1, bits)
    codes = torch.empty(eighths.shape[0], 8, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        code = eighths[:, byte] >> shift
        if shift + bits > 8:
            # whole bytes are combined and masked at the end, so that codes may cross their borders (3 bits do)
            code = code | (eighths[:, byte + 1] << (8 - shift))
        codes[:, index] = code & mask
    return codes.view(-1)

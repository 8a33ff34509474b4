import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from compress.numerics.packing import AWQ_ORDER, pack_awq, pack_words, unpack_awq, unpack_words

WIDTHS = range(1, 9)
SHAPES = [(1, 1), (8, 32), (5, 33), (3, 7), (16, 96), (64, 130)]


def random_codes(shape: tuple[int, int], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_words_unpack_to_what_was_packed(shape: tuple[int, int], bits: int) -> None:
    codes = random_codes(shape, bits)
    before = codes.clone()
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (shape[0], -(-shape[1] * bits // 32))
    assert torch.equal(unpack_words(words, bits, shape[1]), codes)
    assert torch.equal(codes, before)


def test_random_shapes_and_widths_round_trip() -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(40):
        rows, columns, bits = (int(torch.randint(1, high, (), generator=generator)) for high in (40, 200, 9))
        codes = random_codes((rows, columns), bits, seed)
        assert torch.equal(unpack_words(pack_words(codes, bits), bits, columns), codes), (rows, columns, bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_words_are_those_of_compressed_tensors(shape: tuple[int, int], bits: int) -> None:
    codes = random_codes(shape, bits)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    words = pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, torch.Size(shape)), signed)
    along_outputs = pack_words(codes.t(), bits).t()
    assert torch.equal(along_outputs, pack_to_int32(signed, bits, packed_dim=0))


def test_words_are_filled_from_the_lowest_bit() -> None:
    assert pack_words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [[1 | 2 << 3 | 3 << 6]]


def test_matrices_larger_than_a_chunk_are_packed_whole() -> None:
    codes = random_codes((2050, 16384), 2)
    assert torch.equal(unpack_words(pack_words(codes, 2), 2, 16384), codes)


@pytest.mark.parametrize("shape", [(8, 1), (24, 10), (64, 128)])
def test_awq_words_unpack_to_what_was_packed(shape: tuple[int, int]) -> None:
    codes = random_codes(shape, 4)
    words = pack_awq(codes)
    assert words.dtype == torch.int32
    assert words.shape == (shape[1], shape[0] // 8)
    assert torch.equal(unpack_awq(words), codes)


def test_awq_words_hold_outputs_in_autoawqs_order() -> None:
    codes = torch.zeros(16, 1, dtype=torch.uint8)
    codes[8 + AWQ_ORDER[3]] = 0xA
    assert pack_awq(codes).tolist() == [[0, 0xA << 12]]

"""The launch configuration (csrc/cuda/plan.h), on its own: what it covers, aligns and fits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_library import BYTES, H100, INTERLEAVED, PLANAR, Feature, Limits, dense, plan

A100 = Limits(108, 166912, 167936)
SMALL = Limits(20, 101376, 102400)
DEVICES = {"H100": H100, "A100": A100, "sm_86": SMALL}


@st.composite
def features(draw: st.DrawFn, b: int, n: int) -> Feature:
    dtype, layout = draw(st.sampled_from(list(BYTES))), draw(st.sampled_from([PLANAR, INTERLEAVED]))
    c = draw(st.one_of(st.integers(1, 80), st.sampled_from([128, 256, 512, 2048])))
    x = dense(b, c, n, dtype, layout)
    return x._replace(
        batch=x.batch + draw(st.sampled_from([0, 0, 1, 8])),
        line=x.line + draw(st.sampled_from([0, 0, 1, 8])),
        address=x.address + draw(st.sampled_from([0, 0, 0, BYTES[dtype]])),
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Feature, Feature, int]:
    b = draw(st.sampled_from([1, 2, 3, 32, 128, 513]))
    h = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 14, 16, 28, 32, 56, 111, 112, 224]))
    s, t = draw(features(b, h * h)), draw(features(b, h * h))
    rest = draw(st.sampled_from([0, 10**6, 10**8]))  # what else is in the list
    return s, t, b * (s.bytes + t.bytes) + rest


def check_access(x: Feature, vector: int, fold: int, lanes: int, whole: bool) -> None:
    assert lanes in {2**i for i in range(9)}
    if x.layout == INTERLEAVED:
        assert fold == 1
        assert lanes <= 32  # they meet by shuffles
    assert x.C % fold == 0
    if vector == 1:
        assert fold == 1
        return
    assert vector * BYTES[x.dtype] == 16
    assert x.address % 16 == 0
    assert x.B == 1 or x.batch % vector == 0
    if x.layout == INTERLEAVED:
        assert x.C % vector == 0
        assert x.N == 1 or x.line % vector == 0
    else:
        assert (x.N * fold) % vector == 0
        assert fold == x.C or (x.line * fold) % vector == 0
    if fold > 1:
        assert whole  # a row of several channels is one block's
        assert x.line == x.N
        assert lanes * vector >= x.N * fold


def check_pieces(n: int, pieces: int, positions: int) -> None:
    assert (pieces - 1) * positions < n <= pieces * positions
    assert pieces == 1 or positions % 32 == 0


def check_sweep(x: Feature, vector: int, fold: int, sweep: list[int]) -> None:
    lanes, row_pieces, rows, column_pieces, columns = sweep
    all_rows = x.C // fold if x.layout == PLANAR else x.N
    all_columns = (x.N * fold if x.layout == PLANAR else x.C) // vector
    assert (row_pieces - 1) * rows < all_rows <= row_pieces * rows
    assert (column_pieces - 1) * columns < all_columns <= column_pieces * columns
    assert lanes in {2**i for i in range(9)}


EVERY = settings(deadline=None, max_examples=300)


@EVERY
@given(data=pairs(), device=st.sampled_from(list(DEVICES)))
def test_maps_and_losses(data: tuple[Feature, Feature, int], device: str) -> None:
    s, t, total = data
    limits = DEVICES[device]
    tasks, pieces, positions, *access = plan("map", s, total, limits)[:6]
    check_pieces(s.N, pieces, positions)
    check_access(s, *access, whole=pieces == 1)
    assert tasks == s.B * pieces

    fp64 = 1 in (s.dtype, t.dtype)
    tasks, samples, pieces, positions, shared, *access = plan("loss", s, t, total, fp64, limits)
    check_pieces(s.N, pieces // 2, positions)
    check_access(s, *access[:3], whole=pieces == 2)
    check_access(t, *access[3:6], whole=pieces == 2)
    assert shared <= 48 << 10  # more must be asked for
    if samples:
        assert pieces == 2
        assert tasks == math.ceil(s.B / samples)
        assert shared >= 384 + 8192 + 2 * s.N * (8 if fp64 else 4)
    else:
        assert tasks == s.B * pieces


@EVERY
@given(
    data=pairs(),
    device=st.sampled_from(list(DEVICES)),
    shift=st.sampled_from([0, 0, 4]),
    apart=st.sampled_from([0, 0, 1, 8]),
)
def test_gradients(data: tuple[Feature, Feature, int], device: str, shift: int, apart: int) -> None:
    s, t, total = data
    limits = DEVICES[device]
    to = dense(s.B, s.C, s.N, s.dtype, s.layout)._replace(address=8192 + shift)
    tasks, samples, *rest = plan("sweep", s, to, total, limits)
    vector, fold, lanes = rest[:3]
    check_access(s, vector, fold, lanes, whole=True)
    check_access(to, vector, fold, lanes, whole=True)
    check_sweep(s, vector, fold, rest[3:8])
    assert tasks == math.ceil(s.B / samples) * rest[4] * rest[6]

    # What the gradient is added to moves in the same vectors, or none of the three does.
    addend = dense(s.B, s.C, s.N, s.dtype, s.layout)
    addend = addend._replace(address=t.address, line=addend.line + apart)
    tasks, samples, *rest = plan("tap", s, to, addend, total, limits)
    for x in (s, to, addend):
        check_access(x, *rest[:3], whole=True)
    check_sweep(s, rest[0], rest[1], rest[3:8])
    assert tasks == math.ceil(s.B / samples) * rest[4] * rest[6]

    fp64 = 1 in (s.dtype, t.dtype)
    out = plan("gradient", s, t, to, fp64, limits)
    tasks, samples, pieces, positions, shared, kept, lag, *rest = out
    check_pieces(s.N, pieces // 2, positions)
    check_access(s, *rest[:3], whole=pieces == 2)
    check_access(to, *rest[:3], whole=pieces == 2)
    check_access(t, *rest[3:6], whole=pieces == 2)
    check_sweep(s, rest[0], rest[1], rest[6:11])
    assert shared <= limits.shared_per_block
    if samples:
        assert kept >= s.bytes
        assert 2 * shared + 2048 <= limits.shared_per_multiprocessor  # two blocks side by side
        assert rest[7] == rest[9] == 1 or kept  # one block sweeps it all
        assert tasks == math.ceil(s.B / samples)
    else:
        assert 1 <= lag <= s.B
        assert tasks == (s.B + lag) * (pieces + rest[7] * rest[9])


@EVERY
@given(data=pairs(), device=st.sampled_from(list(DEVICES)))
def test_losses_of_maps(data: tuple[Feature, Feature, int], device: str) -> None:
    b, n = data[0].B, data[0].N
    s, t = dense(b, 1, n, data[0].dtype % 2), dense(b, 1, n, data[1].dtype % 2)
    tasks, samples = plan("map_loss", s, t, DEVICES[device])[:2]
    assert 1 <= samples <= b
    assert tasks == math.ceil(b / samples)


@pytest.mark.parametrize("layout", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
@pytest.mark.parametrize("dtype", [0, 3], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 256, 56 * 56), (512, 64, 64), (32, 256, 56 * 56)], ids=str)
def test_large_and_small_samples_fill_the_device(
    shape: tuple[int, int, int], dtype: int, layout: int
) -> None:
    s = dense(*shape, dtype, layout)
    total = 2 * s.B * s.bytes
    loss = plan("loss", s, s, total, False, H100)
    assert loss[0] >= H100.multiprocessors
    assert loss[5] * BYTES[dtype] == 16
    sweep = plan("sweep", s, s, total, H100)
    assert sweep[0] >= 0.7 * H100.multiprocessors
    gradient = plan("gradient", s, s, s, False, H100)
    assert gradient[0] >= H100.multiprocessors


def test_sevens_are_read_in_vectors() -> None:
    """7x7 maps, where no row of one channel is whole vectors: rows of 4 or 8 channels are."""
    for dtype, fold in ((0, 4), (3, 8), (1, 2)):
        s = dense(32, 512, 49, dtype)
        out = plan("loss", s, s, 2 * s.B * s.bytes, dtype == 1, H100)
        assert out[5:8] == [16 // BYTES[dtype], fold, 64]
        assert plan("map", s._replace(B=2), 10**9, H100)[3:6] == [16 // BYTES[dtype], fold, 64]
        assert plan("map", s._replace(B=2), 0, H100)[1] == 1
    odd = dense(32, 510, 49)  # samples that start anywhere
    assert plan("loss", odd, odd, 2 * odd.B * odd.bytes, False, H100)[5:7] == [1, 1]


def test_on_chip_or_read_again() -> None:
    """A student's sample stays on chip up to half of a multiprocessor's shared memory."""
    fits, large = dense(128, 16, 1024), dense(32, 64, 3136)
    assert plan("gradient", fits, fits, fits, False, H100)[5] == fits.bytes
    out = plan("gradient", large, large, large, False, H100)
    assert out[1] == out[5] == 0
    assert out[6] > 1

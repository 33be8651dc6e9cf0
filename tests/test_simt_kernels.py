"""The CUDA kernels in the harness: schedules, widths of access, memory, sizes, and their errors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import loss_arguments
from simt_backend import SHARED_PER_BLOCK, Counters, simt
from torch import Tensor

import at_fused
from at_fused import _ops

# cudaDeviceAttr
COMPUTE_CAPABILITY_MAJOR, SHARED_WITHOUT_ASKING = 75, 8


def counters(harness: ctypes.CDLL) -> Counters:
    found = Counters()
    harness.simt_last_counters(ctypes.byref(found))
    return found


def counted(harness: ctypes.CDLL, call: Callable[[], Any]) -> Counters:
    """Add up all launches of a call."""
    total = Counters()
    harness.simt_reset_counters()
    call()
    harness.simt_counters(ctypes.byref(total))
    return total


@pytest.fixture
def wide() -> Iterator[ctypes.CDLL]:
    with simt(multiprocessors=132) as harness:
        yield harness


def everything(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """All that the kernels compute, from calls one after the other."""
    loss = at_fused.at_loss(students, teachers, reduction="none")
    gradients = torch.autograd.grad(loss.sum(), students + teachers)
    value, direct = at_fused.at_value_and_grad(students, teachers)
    plain = [x.detach() for x in students]
    maps = _ops.attention_map(plain, 2.0, "mean")
    results = [loss.detach(), *gradients, value, *direct, *maps]
    masks = [torch.linspace(0, 1, x[:, 0].numel()).view_as(x[:, 0]) for x in plain]
    options = {"mask": masks, "form": "paper", "eps_mode": "add", "eps": 0.1}
    masked = at_fused.at_loss(students, teachers, **options)
    value, direct = at_fused.at_value_and_grad(students, teachers, **options)
    results += [masked.detach(), *torch.autograd.grad(masked, students + teachers), value, *direct]
    alike = [plain[0]] * 2, [x.detach() for x in teachers[:1] * 2]
    value, direct = at_fused.at_value_and_grad(*alike, reduction="sample")
    results += [value, *direct]
    for collapse in ("max", "sum"):
        found = _ops.attention_map(plain, 3.0, collapse)
        maps, channels = found[: len(plain)], found[len(plain) :]
        above, pairs = torch.arange(1.0, 1.0 + len(plain)), [*range(len(plain))]
        gradients = _ops.attention_map_backward(plain, maps, above, pairs, 3.0, [], channels)
        results += [*found, *gradients]
        for i, x in enumerate(plain):
            g, won = torch.ones_like(x), channels[i] if channels else None
            results += [_ops.attention_tap_backward(g, x, maps[i], 3.0, collapse, won)]
            _ops.attention_tap_backward_(g, x, maps[i], 3.0, collapse, won)
            results += [g]
        value, found = MAP_LOSS(maps, maps[:1] + [q + 1 for q in maps[1:]], *LOSS)
        results += [value, *found]
    return results


def assert_same_bits(compute: Callable[[], list[Tensor]], multiprocessors: int) -> None:
    """Threads, warps and blocks in other orders, one block at a time or many."""
    first = None
    for seed in range(8):
        with simt(seed=seed, multiprocessors=multiprocessors, shared=40 << 10) as harness:
            harness.simt_options((1, 2, 4, 16)[seed % 4], seed % 2)
            try:
                found = compute()
            finally:
                harness.simt_options(4, 0)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), seed


MAP_LOSS = torch.ops.at_fused.map_loss.default
LOSS: tuple[Any, ...] = [], "paper", "sum", "add", 1e-6, True, True


@pytest.mark.parametrize("multiprocessors", [132, 1])
def test_same_bits_whatever_the_schedule(multiprocessors: int) -> None:
    shapes = [(2, 24, 30, 31), (3, 5, 7, 7), (1, 64, 20, 16)]
    students = [torch.randn(shape, requires_grad=True) for shape in shapes]
    students[2] = students[2].detach().to(memory_format=torch.channels_last).requires_grad_()
    teachers = [torch.randn(b, 9, h, w, requires_grad=True) for b, _, h, w in shapes]
    assert_same_bits(lambda: everything(students, teachers), multiprocessors)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(4, 64, 7, 7), (2, 32, 14, 14), (1, 48, 56, 56)], ids=str)
def test_features_move_in_128_bits(
    wide: ctypes.CDLL, size: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(size).to(dtype, memory_format=layout)
    everywhere = loss_arguments([x], [x.clone()])
    loss, maps = torch.ops.at_fused.at_loss(*everywhere, True, False)
    forward = counters(wide)
    assert forward.launches == 1
    assert 16 * forward.loads[4] == 2 * x.nbytes
    _ops.attention_map_backward([x], maps[:1], loss, [0], 2.0)
    backward = counters(wide)
    assert backward.launches == 1
    assert 16 * backward.loads[4] == x.nbytes
    assert 16 * backward.stores[4] == backward.store_bytes == x.nbytes
    both = counted(wide, lambda: _ops.at_value_and_grad(*everywhere, 1.0, None))
    on_chip = both.max_dynamic_shared >= x[0].nbytes
    # A student that does not fit is read again, by a launch of its own.
    assert both.launches == (1 if on_chip else 2)
    assert 16 * both.loads[4] == (2 if on_chip else 3) * x.nbytes
    assert 16 * both.stores[4] == x.nbytes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(4, 64, 7, 7), (2, 32, 14, 14), (1, 48, 56, 56)], ids=str)
def test_maxima_move_in_128_bits(
    wide: ctypes.CDLL, size: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(size).to(dtype, memory_format=layout)
    q, channels = _ops.attention_map([x], 3.0, "max")
    forward = counters(wide)
    assert forward.launches == 1
    assert 16 * forward.loads[4] == forward.load_bytes == x.nbytes
    _ops.attention_map_backward([x], [q], None, [0], 3.0, [], [channels])
    backward = counters(wide)
    assert backward.launches == 1
    assert 16 * backward.stores[4] == backward.store_bytes == x.nbytes
    assert backward.loads[4] == 0
    if x.element_size() == 2:  # nothing else has this width
        assert backward.loads[1] == q.numel()  # a feature's winners, each once


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(4, 64, 7, 7), (2, 32, 14, 14), (1, 48, 56, 56)], ids=str)
def test_a_tap_reads_twice_and_writes_once(
    wide: ctypes.CDLL, size: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    g, x = (torch.randn(size).to(dtype, memory_format=layout) for _ in range(2))
    k = torch.randn(size[0], size[2] * size[3], dtype=torch.promote_types(dtype, torch.float32))
    for operator in (_ops.attention_tap_backward, _ops.attention_tap_backward_):
        operator(g, x, k, 3.0, "mean")
        found = counters(wide)
        assert found.launches == 1
        assert 16 * found.loads[4] == 2 * x.nbytes
        assert 16 * found.stores[4] == found.store_bytes == x.nbytes
        assert found.distinct_load_bytes == 2 * x.nbytes + k.nbytes
        assert found.distinct_store_bytes == x.nbytes
        assert found.atomics == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(4, 64, 7, 7), (2, 32, 14, 14), (1, 48, 56, 56)], ids=str)
def test_a_tap_of_maxima_touches_the_winners(
    wide: ctypes.CDLL, size: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    g, x = (torch.randn(size).to(dtype, memory_format=layout) for _ in range(2))
    q, channels = _ops.attention_map([x], 2.0, "max")
    won = q.numel() * x.itemsize
    rest = x, q, 2.0, "max", channels
    _ops.attention_tap_backward_(g, *rest)
    found = counters(wide)
    assert found.launches == 1
    assert found.store_bytes == won
    assert found.distinct_load_bytes == 2 * won + channels.nbytes + q.nbytes
    _ops.attention_tap_backward(g, *rest)
    found = counters(wide)
    assert found.launches == 1
    assert 16 * found.loads[4] == 16 * found.stores[4] == x.nbytes
    assert found.store_bytes == x.nbytes + won
    assert found.distinct_store_bytes == x.nbytes
    assert found.distinct_load_bytes == x.nbytes + won + channels.nbytes + q.nbytes


def test_a_list_of_maps_takes_one_launch(wide: ctypes.CDLL) -> None:
    xs = [torch.randn(2, 3, 4 + i, 4) for i in range(6)]

    def launches(call: Callable[[], Any]) -> int:
        return counted(wide, call).launches

    for collapse in ("mean", "max"):
        found = _ops.attention_map(xs, 2.0, collapse)
        assert launches(lambda c=collapse: _ops.attention_map(xs, 2.0, c)) == 1
        rest = found[:6], None, [0] * 6, 2.0, [], found[6:]
        assert launches(lambda r=rest: _ops.attention_map_backward(xs, *r)) == 1
    assert launches(lambda: MAP_LOSS(found[:6], found[:6], *LOSS)) == 1
    assert launches(lambda: at_fused.at_loss(xs * 6, xs * 6)) == 3  # 16 pairs each


def test_masked_tokens_take_one_launch_each_way(wide: ctypes.CDLL) -> None:
    """A skipped token is not read, whatever the options."""
    xs, ys = ([torch.randn(2, 13, c) for c in sizes] for sizes in ((16, 8), (24, 8)))
    for x in xs:
        x.requires_grad_()
    options = {"channel_dim": -1, "skip_tokens": 1, "mask": torch.rand(2, 12) > 0.5}
    for more in ({}, {"reduction": "sample", "eps_mode": "add", "eps": 0.1}):
        wide.simt_reset_counters()
        loss = at_fused.at_loss(xs, ys, **options, **more)
        total = Counters()
        wide.simt_counters(ctypes.byref(total))
        assert total.launches == 1
        read = sum(x[:, 1:].nbytes for x in (*xs, *ys))
        assert read <= total.distinct_load_bytes < read + 2048
        torch.autograd.grad(loss.sum(), xs)
        found = counters(wide)
        wide.simt_counters(ctypes.byref(total))
        assert total.launches == 2
        assert found.store_bytes == sum(x[:, 1:].nbytes for x in xs)
        wide.simt_reset_counters()
        at_fused.at_value_and_grad(xs, ys, **options, **more)
        wide.simt_counters(ctypes.byref(total))
        assert total.launches == 1


def test_features_that_are_not_aligned_move_in_elements(wide: ctypes.CDLL) -> None:
    x = torch.randn(2 * 8 * 64 + 1)[1:].view(2, 8, 8, 8)
    _ops.attention_map([x], 2.0, "mean")
    found = counters(wide)
    assert found.loads[4] == 0
    assert 4 * found.loads[2] == x.nbytes


@pytest.mark.parametrize("which", ["gradient", "feature"])
def test_a_tap_moves_both_in_elements_where_one_is_not_aligned(
    wide: ctypes.CDLL, which: str
) -> None:
    aligned, x = torch.randn(2, 8, 8, 8), torch.randn(2 * 8 * 64 + 1)[1:].view(2, 8, 8, 8)
    both = (x, aligned) if which == "gradient" else (aligned, x)
    for operator in (_ops.attention_tap_backward, _ops.attention_tap_backward_):
        operator(*both, torch.randn(2, 64), 2.0, "mean")
        found = counters(wide)
        assert found.loads[4] == found.stores[4] == 0
        assert found.store_bytes == x.nbytes


def test_a_launch_that_fails_is_a_python_error(wide: ctypes.CDLL) -> None:
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = at_fused.at_loss(s, t)
    wide.simt_set_attribute(COMPUTE_CAPABILITY_MAJOR, 7)
    try:
        with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or later"):
            at_fused.at_loss(s, t)
    finally:
        wide.simt_set_attribute(COMPUTE_CAPABILITY_MAJOR, 9)
    # A launch that the device refuses.
    large = torch.randn(1, 3, 60, 60)
    before = 48 << 10
    wide.simt_set_attribute(SHARED_WITHOUT_ASKING, 4096)
    wide.simt_set_attribute(SHARED_PER_BLOCK, 4096)
    try:
        with pytest.raises(RuntimeError, match="at_loss_kernel: cudaErrorInvalidValue"):
            at_fused.at_loss(large, large)
    finally:
        wide.simt_set_attribute(SHARED_WITHOUT_ASKING, before)
        wide.simt_set_attribute(SHARED_PER_BLOCK, 232448)
    many = torch.randn(1, 1, 1, 1).expand(2**31, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"at most 2\^30 samples, got"):
        at_fused.at_loss(many, many)
    huge = torch.randn(1, 3, 1, 1).expand(1, 3, 2**16, 2**15)
    with pytest.raises(RuntimeError, match=r"at most 2\^30 channels and 2\^30 positions"):
        _ops.attention_map([huge], 2.0, "mean")
    with pytest.raises(RuntimeError, match=r"at most 2\^30 channels and 2\^30 positions"):
        _ops.attention_map([huge], 2.0, "max")
    long = torch.empty(1, 2**30 + 1, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"at most 2\^30 channels and 2\^30 positions"):
        _ops.attention_tap_backward_(long, long, torch.ones(1, 1), 2.0, "mean")
    torch.testing.assert_close(at_fused.at_loss(s, t), expected, rtol=0, atol=0)


def test_calls_from_many_threads_agree(wide: ctypes.CDLL) -> None:
    from concurrent.futures import ThreadPoolExecutor

    s, t = torch.randn(4, 8, 10, 10), torch.randn(4, 8, 10, 10)

    def work(i: int) -> Tensor:
        x = (s * (1 + i % 3)).requires_grad_()
        at_fused.at_loss(x, t).backward()
        return x.grad * (1 + i % 3)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(16)))
    for gradient in results:
        torch.testing.assert_close(gradient, results[0], rtol=1e-5, atol=1e-9)

"""The CUDA kernels in the emulator: determinism, 128-bit accesses, bytes, launches, errors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cuda_emulator import Emulator, emulated
from matrix import crossed
from reference import loss_arguments
from torch import Tensor

import at_fused
from at_fused import _ops

MAP_LOSS = torch.ops.at_fused.map_loss.default
LOSS: tuple[Any, ...] = [], "paper", "sum", "add", 1e-6, True, True
TAPS = _ops.attention_tap_backward, _ops.attention_tap_backward_


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with emulated(multiprocessors=132) as emulator:
        yield emulator


# ---- determinism ---------------------------------------------------------------------------------


def all_results(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """Call all operators and return their results."""
    features = [x.detach() for x in students]
    masks = [torch.linspace(0, 1, x[:, 0].numel()).view_as(x[:, 0]) for x in features]
    results = _ops.attention_map(features, 2.0, "mean")
    for options in ({}, {"mask": masks, "form": "paper", "eps_mode": "add", "eps": 0.1}):
        loss = at_fused.at_loss(students, teachers, reduction="none", **options)
        value, direct = at_fused.at_value_and_grad(students, teachers, **options)
        gradients = torch.autograd.grad(loss.sum(), students + teachers)
        results += [loss.detach(), *gradients, value, *direct]
    same_batch = [features[0]] * 2, [x.detach() for x in teachers[:1] * 2]
    value, direct = at_fused.at_value_and_grad(*same_batch, reduction="sample")
    results += [value, *direct]
    for collapse in ("max", "sum"):
        outputs = _ops.attention_map(features, 3.0, collapse)
        maps, channels = outputs[: len(features)], outputs[len(features) :]
        upstream, pairs = torch.arange(1.0, 1.0 + len(features)), [*range(len(features))]
        value, ks = MAP_LOSS(maps, maps[:1] + [q + 1 for q in maps[1:]], *LOSS)
        results += [*outputs, value, *ks]
        results += _ops.attention_map_backward(features, maps, upstream, pairs, 3.0, [], channels)
        for i, x in enumerate(features):
            g, argmax = torch.ones_like(x), channels[i] if channels else None
            results += [TAPS[0](g, x, maps[i], 3.0, collapse, argmax)]
            TAPS[1](g, x, maps[i], 3.0, collapse, argmax)
            results += [g]
    return results


@pytest.mark.parametrize("multiprocessors", [132, 1])
@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 12), marks=pytest.mark.exhaustive)], ids=str
)
def test_results_do_not_depend_on_thread_order(multiprocessors: int, seeds: range) -> None:
    """Run threads, warps and blocks in random orders, with 1 to 16 resident blocks."""
    shapes = [(2, 24, 30, 31), (3, 5, 7, 7), (1, 64, 20, 16)]
    students = [torch.randn(shape, requires_grad=True) for shape in shapes]
    students[2] = students[2].detach().to(memory_format=torch.channels_last).requires_grad_()
    teachers = [torch.randn(b, 9, h, w, requires_grad=True) for b, _, h, w in shapes]
    first = None
    for seed in seeds:
        resident = (1, 2, 4, 16)[seed % 4]
        with emulated(multiprocessors, 40 << 10, seed, resident):
            results = all_results(students, teachers)
        first = first or results
        assert all(map(torch.equal, first, results)), seed


# ---- accesses and launches -----------------------------------------------------------------------

every = crossed(
    size=[(4, 64, 7, 7), (2, 32, 14, 14), (1, 48, 56, 56)],
    dtype=[torch.float32, torch.bfloat16, torch.float64, torch.float16],
    layout=[torch.contiguous_format, torch.channels_last],
)


@every
def test_features_move_in_128_bits(emulator: Emulator, size: Any, dtype: Any, layout: Any) -> None:
    x = torch.randn(size).to(dtype, memory_format=layout)
    arguments = loss_arguments([x], [x.clone()])
    at_loss = partial(torch.ops.at_fused.at_loss, *arguments, True, False)
    (loss, maps), forward = emulator.counted(at_loss)
    assert forward.launches == 1
    assert 16 * forward.loads[4] == 2 * x.nbytes
    sweep = partial(_ops.attention_map_backward, [x], maps[:1], loss, [0], 2.0)
    _, backward = emulator.counted(sweep)
    assert backward.launches == 1
    assert 16 * backward.loads[4] == x.nbytes
    assert 16 * backward.stores[4] == backward.store_bytes == x.nbytes
    _, both = emulator.counted(partial(_ops.at_value_and_grad, *arguments, 1.0, None))
    cached = both.max_dynamic_shared >= x[0].nbytes
    # A student that does not fit in shared memory is read again by a second launch.
    assert both.launches == (1 if cached else 2)
    assert 16 * both.loads[4] == (2 if cached else 3) * x.nbytes
    assert 16 * both.stores[4] == x.nbytes


@every
def test_a_tap_reads_twice_and_writes_once(
    emulator: Emulator, size: Any, dtype: Any, layout: Any
) -> None:
    x = torch.randn(size).to(dtype, memory_format=layout)
    g, wide = torch.randn_like(x), torch.promote_types(x.dtype, torch.float32)
    k = torch.randn(len(x), x[0, 0].numel(), dtype=wide)
    for tap in TAPS:
        _, c = emulator.counted(partial(tap, g, x, k, 3.0, "mean"))
        assert c.launches == 1
        assert 16 * c.loads[4] == 2 * x.nbytes
        assert 16 * c.stores[4] == c.store_bytes == x.nbytes
        assert c.distinct_load_bytes == 2 * x.nbytes + k.nbytes
        assert c.distinct_store_bytes == x.nbytes
        assert c.atomics == 0


@every
def test_max_accesses_argmax_only(emulator: Emulator, size: Any, dtype: Any, layout: Any) -> None:
    x = torch.randn(size).to(dtype, memory_format=layout)
    (q, channels), forward = emulator.counted(partial(_ops.attention_map, [x], 2.0, "max"))
    assert 16 * forward.loads[4] == forward.load_bytes == x.nbytes
    sweep = partial(_ops.attention_map_backward, [x], [q], None, [0], 2.0, [], [channels])
    g = torch.randn_like(x)
    calls = [sweep, *(partial(tap, g, x, q, 2.0, "max", channels) for tap in TAPS)]
    backward, new, in_place = (emulator.counted(call)[1] for call in calls)
    assert forward.launches == backward.launches == new.launches == in_place.launches == 1
    argmax_bytes = q.numel() * x.itemsize
    read = argmax_bytes + channels.nbytes + q.nbytes
    assert backward.distinct_load_bytes == read
    assert new.distinct_load_bytes == read + x.nbytes
    assert in_place.distinct_load_bytes == read + argmax_bytes
    assert in_place.store_bytes == argmax_bytes
    assert 16 * new.loads[4] == x.nbytes
    for c in (backward, new):
        assert 16 * c.stores[4] == c.distinct_store_bytes == x.nbytes
        assert c.store_bytes == x.nbytes + argmax_bytes


def test_a_list_of_maps_takes_one_launch(emulator: Emulator) -> None:
    xs = [torch.randn(2, 3, 4 + i, 4) for i in range(6)]
    for collapse in ("mean", "max"):
        maps, forward = emulator.counted(partial(_ops.attention_map, xs, 2.0, collapse))
        rest = maps[:6], None, [0] * 6, 2.0, [], maps[6:]
        _, backward = emulator.counted(partial(_ops.attention_map_backward, xs, *rest))
        assert forward.launches == backward.launches == 1
    _, c = emulator.counted(partial(MAP_LOSS, maps[:6], maps[:6], *LOSS))
    assert c.launches == 1
    _, c = emulator.counted(partial(at_fused.at_loss, xs * 6, xs * 6))
    assert c.launches == 3  # 16 pairs each


def test_masked_tokens_take_one_launch_per_pass(emulator: Emulator) -> None:
    """Skipped tokens are not read."""
    xs, ys = ([torch.randn(2, 13, c) for c in sizes] for sizes in ((16, 8), (24, 8)))
    for x in xs:
        x.requires_grad_()
    masked = {"channel_dim": -1, "skip_tokens": 1, "mask": torch.rand(2, 12) > 0.5}
    for more in ({}, {"reduction": "sample", "eps_mode": "add", "eps": 0.1}):
        options = {**masked, **more}
        loss, forward = emulator.counted(partial(at_fused.at_loss, xs, ys, **options))
        assert forward.launches == 1
        read = sum(x[:, 1:].nbytes for x in (*xs, *ys))
        assert read <= forward.distinct_load_bytes < read + 2048
        _, backward = emulator.counted(partial(torch.autograd.grad, loss.sum(), xs))
        assert backward.launches == 1
        assert backward.store_bytes == sum(x[:, 1:].nbytes for x in xs)
        _, both = emulator.counted(partial(at_fused.at_value_and_grad, xs, ys, **options))
        assert both.launches == 1


def test_unaligned_features_are_accessed_by_elements(emulator: Emulator) -> None:
    aligned, x = torch.randn(2, 8, 8, 8), torch.randn(2 * 8 * 64 + 1)[1:].view(2, 8, 8, 8)
    _, c = emulator.counted(partial(_ops.attention_map, [x], 2.0, "mean"))
    assert (4 * c.loads[2], c.loads[4]) == (x.nbytes, 0)
    # A tap reads both tensors by elements if one is not aligned.
    for tap in TAPS:
        for both in ((x, aligned), (aligned, x)):
            _, c = emulator.counted(partial(tap, *both, torch.randn(2, 64), 2.0, "mean"))
            assert c.loads[4] == c.stores[4] == 0
            assert c.store_bytes == x.nbytes


# ---- errors --------------------------------------------------------------------------------------


def test_failed_launch_raises(emulator: Emulator) -> None:
    x, y = torch.randn(2, 1, 3, 60, 60)
    expected = at_fused.at_loss(x, y)
    for attribute, value, default, message in (
        (emulator.COMPUTE_CAPABILITY_MAJOR, 7, 9, r"compute capability 8\.0 or later"),
        (emulator.DEFAULT_SHARED_PER_BLOCK, 4 << 10, 48 << 10, "at_loss_kernel: cudaErrorInvalidV"),
    ):
        emulator.set_attribute(attribute, value)
        try:
            with pytest.raises(RuntimeError, match=message):
                at_fused.at_loss(x, y)
        finally:
            emulator.set_attribute(attribute, default)
    torch.testing.assert_close(at_fused.at_loss(x, y), expected, rtol=0, atol=0)


def test_unsupported_sizes_raise(emulator: Emulator) -> None:
    many = torch.randn(1, 1, 1, 1).expand(2**31, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"at most 2\^30 samples, got"):
        at_fused.at_loss(many, many)
    huge = torch.randn(1, 3, 1, 1).expand(1, 3, 2**16, 2**15)
    long = torch.empty(1, 2**30 + 1, 1, dtype=torch.float16)
    for call in (
        partial(_ops.attention_map, [huge], 2.0, "mean"),
        partial(_ops.attention_map, [huge], 2.0, "max"),
        partial(TAPS[0], long, long, torch.ones(1, 1), 2.0, "mean"),
    ):
        with pytest.raises(RuntimeError, match=r"at most 2\^30 channels and 2\^30 positions"):
            call()

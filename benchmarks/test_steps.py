"""What attention transfer costs in a whole training step, in time and in memory. On the CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from cases import CASES, DTYPES, LAYOUTS, Inputs, popular_losses
from conftest import STEP_ROWS, TAP_ROWS
from pytest_benchmark.fixture import BenchmarkFixture
from steps import NETWORKS, features_of, own_seconds, peak_bytes, programs
from timing import CpuTimer, medians

import at_fused
from at_fused import _ops

SECONDS = 20.0  # of measuring for each pair of networks, about
OWN_ROUNDS = 12


@pytest.mark.parametrize("name", NETWORKS)
def test_step(benchmark: BenchmarkFixture, name: str) -> None:
    torch.manual_seed(0)
    networks = NETWORKS[name]()
    steps = programs(networks)
    ms, rounds = medians(steps, CpuTimer(), SECONDS)
    own = own_seconds(networks, OWN_ROUNDS)
    # The popular lines alone, on features like the networks': their forward and backward.
    students, teachers = features_of(networks)
    losses = {"eager": popular_losses, "drop-in": at_fused.at_loss}
    alone, _ = medians(
        {
            key: lambda loss=loss: torch.autograd.grad(loss(students, teachers), students)
            for key, loss in losses.items()
        },
        CpuTimer(),
        2.0,
    )
    STEP_ROWS[name] = {
        "ms": ms,
        "own ms": statistics.median(seconds for _, seconds in own) * 1e3,
        "own share": statistics.median(seconds / step for step, seconds in own),
        "alone ms": alone,
        "bytes": {key: peak_bytes(step) for key, step in steps.items()},
    }
    benchmark.group = f"step: {name}"
    benchmark.pedantic(steps["tap"], rounds=min(rounds, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_tap_backward(benchmark: BenchmarkFixture, case: str, dtype: str, layout: str) -> None:
    """The map's gradient added in place, against a gradient of its own that autograd adds."""
    torch.manual_seed(0)
    students, _ = Inputs.make(case, dtype, layout)
    features = [x.detach() for x in students]
    gradients = [torch.randn_like(x) for x in features]
    of_maps = [torch.randn(len(x), x[0, 0].numel()) for x in features]

    def tap() -> None:
        for g, x, q in zip(gradients, features, of_maps, strict=True):
            _ops.attention_tap_backward_(g, x, q, 2.0, "mean")

    def added(found: Callable[[], list[torch.Tensor]]) -> None:
        # The engine adds the later gradient into the earlier, AT's, which nobody else holds.
        for own, g in zip(found(), gradients, strict=True):
            own.add_(g)

    def drop_in() -> list[torch.Tensor]:
        pairs = list(range(len(features)))
        return _ops.attention_map_backward(features, of_maps, None, pairs, 2.0)

    def eager() -> list[torch.Tensor]:
        return [
            x * (q * (2 / x.shape[1])).view(len(x), 1, *x.shape[2:]).to(x.dtype)
            for x, q in zip(features, of_maps, strict=True)
        ]

    timed = {"tap": tap, "drop-in": lambda: added(drop_in), "eager": lambda: added(eager)}
    ms, rounds = medians(timed, CpuTimer(), 1.5)
    TAP_ROWS[case[0], dtype, layout] = ms
    benchmark.group = f"tap: {case}, {dtype}, {layout}"
    benchmark.pedantic(tap, rounds=rounds)

"""Generated calls of losses, maps and taps, on every back end, against float64 (oracle.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from cases import Call, losses, maps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import MAP_ROUNDING, Reference, assert_value
from reference import Options, both
from torch import Tensor

import at_fused

SCALE = 2.0**8
OF_LAYOUTS = ("channel_dim", "skip_tokens", "map_size")


def leaves_of(call: Call) -> tuple[list[Tensor], list[int], list[int]]:
    """The leaves, the numbers of those that want a gradient, and how often each is a feature."""
    leaves = [x.make() for x in call.leaves]
    used = [feature.leaf for feature in (*call.student, *call.teacher)]
    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    return leaves, wanted, [used.count(i) for i in range(len(leaves))]


def gradients(
    outputs: Any, leaves: Sequence[Tensor], wanted: Sequence[int], above: Any
) -> dict[int, Tensor]:
    found = torch.autograd.grad(outputs, [leaves[i] for i in wanted], above)
    return dict(zip(wanted, found, strict=True))


def strides(x: Tensor) -> list[int]:
    """Those that say anything."""
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def check_loss(call: Call) -> None:
    """Value and gradients of ``at_loss``, and the same in one pass."""
    leaves, wanted, uses = leaves_of(call)
    options = call.tensor_options()
    known = Options(**options)
    students, teachers = call.sides(leaves)
    loss = at_fused.at_loss(call.given(students), call.given(teachers), **options)
    wide = any(x.dtype == torch.float64 for x in (*students, *teachers))
    assert loss.dtype == (torch.float64 if wide else torch.float32)

    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * SCALE
    reference = Reference(leaves, call.sides)
    right = reference.loss(known, upstream)
    assert_value(loss, right)
    assert loss.requires_grad == bool(wanted)
    twice = 1 + (known.attend == "both")
    if wanted:
        found = gradients(loss, leaves, wanted, upstream)
        reference.assert_gradients(found, right.value, upstream, [twice * n for n in uses])

    # Each feature by itself, whatever else it is.
    alone = [x.detach() for x in (*students, *teachers)]
    n = len(students)
    value, found = at_fused.at_value_and_grad(alone[:n], alone[n:], scale=SCALE, **options)
    reference = Reference(alone, lambda x: (x[:n], x[n:]))
    above = torch.full(loss.shape, SCALE)
    right = reference.loss(known, above)
    assert_value(value, right)
    for x, g in zip(alone, found, strict=False):
        assert g.dtype == x.dtype
        if known.attend == "spatial" and not known.skip_tokens and 0 not in x.stride():
            assert strides(g) == strides(torch.empty_like(x))
    reference.assert_gradients(dict(enumerate(found)), right.value, above, [twice] * n)


def check_map(call: Call) -> None:
    """Value and gradient of ``attention_map``."""
    leaves, wanted, uses = leaves_of(call)
    q = at_fused.attention_map(leaves[0], **call.options)
    reference = Reference(leaves, lambda x: (x, ()))
    options = dict(call.options)
    normalized = options.pop("normalize")
    upstream = torch.linspace(-1, 2, q.numel(), dtype=q.dtype).view_as(q)
    (x,) = reference.students
    right = oracle.attention_map(x, Options(**options), normalized, upstream, reference.bounds)
    assert q.dtype == (torch.float64 if leaves[0].dtype == torch.float64 else torch.float32)
    assert_value(q, right)
    if wanted and q.isfinite().all():
        found = gradients(q, leaves, wanted, upstream)
        reference.assert_gradients(found, right.value, upstream, uses)


def check_tap(call: Call) -> None:
    """Taps and ``map_loss``, and the gradient that the next layer sends back as well."""
    leaves, wanted, uses = leaves_of(call)
    given = call.tensor_options()
    of_maps = ("p", "collapse", "absolute", "attend")
    shared = {name: given[name] for name in of_maps if name in given}
    of_loss = {k: v for k, v in given.items() if k not in (*of_maps, *OF_LAYOUTS)}
    ys, qs = [], []
    for i, features in enumerate(call.sides(leaves)):
        layout = {name: both(given[name])[i] for name in OF_LAYOUTS if name in given}
        taps = [at_fused.attention_tap(x, **shared, **layout) for x in features]
        ys += [y for y, _ in taps]
        qs.append([q for _, q in taps])
    loss = at_fused.map_loss(call.given(qs[0]), call.given(qs[1]), **of_loss)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * SCALE
    reference = Reference(leaves, call.sides)
    right = reference.loss(Options(**given), upstream)
    assert_value(loss, right)
    if not wanted:
        return
    # A gradient that comes from the next layer and is nobody else's: it is changed in place.
    torch.manual_seed(0)
    factors = [torch.randn(y.shape).to(y.dtype) for y in ys]
    nexts = [y * c for y, c in zip(ys, factors, strict=True) if y.requires_grad]
    above = [upstream, *map(torch.ones_like, nexts)]
    found = gradients([loss, *nexts], leaves, wanted, above)
    value = (right.value * upstream.double()).sum()
    features = reference.students + reference.teachers
    for x, c in zip(features, factors, strict=True):
        value = value + (x.value * c.double()).sum()
        reference.bounds.total += (x.size * c.double().abs() * MAP_ROUNDING[False]).sum()
    reference.assert_gradients(found, value, torch.ones(()), [2 * n for n in uses])


# What a call is drawn from, how it is checked, and its share of the profile's number of examples.
CHECKS: dict[str, tuple[st.SearchStrategy[Call], Callable[[Call], None], float]] = {
    "losses": (losses(), check_loss, 1.0),
    "taps": (losses(of_maps=True), check_tap, 0.5),
    "maps": (maps(), check_map, 0.4),
}
# The others take longer.
SHARES = {"cpu": 0.5, "eager": 0.5, "emulator-wide": 0.2, "emulator-small": 0.2, "triton": 0.05}


@pytest.mark.parametrize("kind", CHECKS)
def test_generated_calls(backend: str, kind: str) -> None:
    calls, check, share = CHECKS[kind]

    @settings(
        max_examples=max(1, int(settings.default.max_examples * share * SHARES[backend])),
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls)
    def generated(call: Call) -> None:
        check(call)

    generated()

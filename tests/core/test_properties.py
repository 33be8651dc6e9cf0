"""Generated calls of losses, and of taps with their maps, on every back end, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Call, losses
from hypothesis import HealthCheck, given, settings
from reference import Precision, assert_matches_reference, reference_loss, two_sides
from torch import Tensor

import at_fused

OF_MAPS = ("p", "collapse", "absolute", "attend")
OF_LAYOUTS = ("channel_dim", "skip_tokens", "map_size")


def check_loss(call: Call) -> None:
    """Value and gradients of ``at_loss``, and the same in one call."""
    students, teachers, options = call.make()
    grads = dict(zip(("student_grad", "teacher_grad"), call.grads, strict=True))
    assert_matches_reference(students, teachers, any_strides=True, **grads, **options)


def check_taps(call: Call) -> None:
    """Taps of students and maps of teachers; the next layer sends a gradient back as well."""
    students, teachers, options = call.make()
    of_maps = {name: options[name] for name in OF_MAPS if name in options}
    layouts: list[dict[str, Any]] = [
        {name: two_sides(options[name])[side] for name in OF_LAYOUTS if name in options}
        for side in range(2)
    ]
    of_loss = {k: v for k, v in options.items() if k not in (*OF_MAPS, *OF_LAYOUTS)}
    leaves = [x.detach().requires_grad_() for x in students]
    doubles = [x.detach().double().requires_grad_() for x in students]
    ys, qs = zip(*(at_fused.attention_tap(x, **of_maps, **layouts[0]) for x in leaves), strict=True)
    qt = [at_fused.attention_map(x, **of_maps, **layouts[1]) for x in teachers]
    loss = at_fused.map_loss(qs, qt, **of_loss)
    of_teachers = [x.double() for x in teachers]
    expected = reference_loss(doubles, of_teachers, **options)
    precision = Precision.of([*students, *teachers], doubles, of_teachers, options)
    precision.assert_value(loss, expected)
    # A gradient that comes from the next layer and is nobody else's: it is changed in place.
    scale = 2.0**8
    upstream = torch.full_like(loss, scale)
    factors = [torch.randn(y.shape).to(y.dtype) for y in ys]
    nexts = [y * c for y, c in zip(ys, factors, strict=True)]
    above = [upstream, *map(torch.ones_like, nexts)]
    found = torch.autograd.grad([loss, *nexts], leaves, above)
    right: list[Tensor] = [
        r + c.double()
        for r, c in zip(
            torch.autograd.grad(expected, doubles, upstream.double()), factors, strict=True
        )
    ]
    for g, r in zip(found, right, strict=True):
        precision.assert_gradient(g, r, scale)


# How calls are checked, and their share of the profile's number of examples.
CHECKS = {"losses": (losses(), check_loss, 1.0), "taps": (losses(for_taps=True), check_taps, 0.6)}
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

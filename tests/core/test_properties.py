"""Generated calls of losses and taps on every back end against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Call, losses
from hypothesis import HealthCheck, given, settings
from reference import Precision, assert_matches_reference, reference_loss, two_sides

import at_fused

MAP_OPTIONS = ("p", "collapse", "absolute", "attend")
LAYOUT_OPTIONS = ("channel_dim", "skip_tokens", "map_size")


def check_loss(call: Call) -> None:
    """Check ``at_loss``, its gradients, and ``at_value_and_grad``."""
    students, teachers, options = call.make()
    grads = dict(zip(("student_grad", "teacher_grad"), call.grads, strict=True))
    assert_matches_reference(students, teachers, any_strides=True, **grads, **options)


def check_taps(call: Call) -> None:
    """Check taps of students with teacher maps, and gradients from the next layer as well."""
    students, teachers, options = call.make()
    map_options = {name: options[name] for name in MAP_OPTIONS if name in options}
    layouts: list[dict[str, Any]] = [
        {name: two_sides(options[name])[side] for name in LAYOUT_OPTIONS if name in options}
        for side in range(2)
    ]
    loss_options = {k: v for k, v in options.items() if k not in (*MAP_OPTIONS, *LAYOUT_OPTIONS)}
    leaves = [x.detach().requires_grad_() for x in students]
    doubles = [x.detach().double().requires_grad_() for x in students]
    ys, qs = zip(
        *(at_fused.attention_tap(x, **map_options, **layouts[0]) for x in leaves), strict=True
    )
    qt = [at_fused.attention_map(x, **map_options, **layouts[1]) for x in teachers]
    loss = at_fused.map_loss(qs, qt, **loss_options)
    teacher_doubles = [x.double() for x in teachers]
    expected = reference_loss(doubles, teacher_doubles, **options)
    precision = Precision.of([*students, *teachers], doubles, teacher_doubles, options)
    precision.assert_value(loss, expected)
    # Only the tap holds the gradient from the next layer, so it updates that in place.
    scale = 2.0**8
    upstream = torch.full_like(loss, scale)
    factors = [torch.randn(y.shape).to(y.dtype) for y in ys]
    nexts = [y * c for y, c in zip(ys, factors, strict=True)]
    grad_outputs = [upstream, *map(torch.ones_like, nexts)]
    actual = torch.autograd.grad([loss, *nexts], leaves, grad_outputs)
    gradients = torch.autograd.grad(expected, doubles, upstream.double())
    for g, e, c in zip(actual, gradients, factors, strict=True):
        precision.assert_gradient(g, e + c.double(), scale)


# Strategy, check, and share of the profile's number of examples.
CHECKS = {"losses": (losses(), check_loss, 1.0), "taps": (losses(for_taps=True), check_taps, 0.6)}
# Share of examples of each back end: the emulator and Triton's interpreter are slow.
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
    def check_generated(call: Call) -> None:
        check(call)

    check_generated()

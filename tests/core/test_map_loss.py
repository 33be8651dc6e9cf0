"""The loss of maps: what at_loss gives for the features that they were made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import crossed

import at_fused


@crossed(
    options=[
        {},
        {"form": "paper"},
        {"weights": [2.0, 0.5], "reduction": "none"},
        {"reduction": "sample"},
        {"sample_weights": torch.tensor([1.0, 0.0, 2.0])},
        {"mask": torch.rand(3, 12, 10)},
    ],
    normalize=[False, True],
)
def test_as_the_loss_of_features(
    fast_backend: str, options: dict[str, Any], normalize: bool
) -> None:
    students, teachers = (
        [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        for shapes in (((3, 4, 6, 5), (3, 8, 4, 4)), ((3, 7, 6, 5), (3, 2, 4, 4)))
    )
    expected = at_fused.at_loss(students, teachers, **options)
    right = torch.autograd.grad(expected.sum(), students + teachers)
    maps = (
        [at_fused.attention_map(x, normalize=normalize) for x in side]
        for side in (students, teachers)
    )
    loss = at_fused.map_loss(*maps, **options)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss.sum(), students + teachers)
    torch.testing.assert_close(found, right)


def test_a_larger_map_of_the_teacher(fast_backend: str) -> None:
    s, t = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 10, 9).double()
    expected = at_fused.at_loss(s, t, resize="maps", eps=0.1, eps_mode="add")
    q_s, q_t = at_fused.attention_map(s), at_fused.attention_map(t)
    loss = at_fused.map_loss(q_s, q_t, resize="maps", eps=0.1, eps_mode="add")
    torch.testing.assert_close(loss, expected)


def test_maps_of_channels() -> None:
    s, t = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 3, 3)
    q_s, q_t = (at_fused.attention_map(x, attend="channel") for x in (s, t))
    torch.testing.assert_close(
        at_fused.map_loss(q_s, q_t), at_fused.at_loss(s, t, attend="channel")
    )
    assert at_fused.map_loss(q_s, q_s) == 0


MAP = torch.rand(2, 4, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (MAP, [MAP], {}, "both be tensors or both be sequences"),
        ([MAP], MAP, {}, "both be tensors or both be sequences"),
        ([], [], {}, "student must not be an empty list"),
        ([MAP, 3], [MAP, MAP], {}, r"student\[1\] must be a tensor, got int"),
        (MAP.half(), MAP, {}, "student must be float32 or float64, as attention maps are"),
        (MAP[0, 0], MAP, {}, r"student must be a map \(B, H, W\)"),
        (MAP, MAP[:0], {}, "teacher must not be empty"),
        ([MAP], [MAP, MAP], {}, "same number of tensors"),
        (MAP, MAP[:1], {}, "same batch size, got 2 and 1"),
        (MAP, MAP.reshape(2, 2, 8), {}, r"same map size \(H x W\), got 4x4 and 2x8"),
        (MAP, MAP.reshape(2, 16), {}, "same map size.*; choose layers whose maps have as many"),
        (MAP, MAP, {"resize": "features"}, "resize must be None or 'maps', got 'features'"),
        (MAP, MAP, {"form": "other"}, "form must be"),
        (MAP, MAP, {"weights": [1.0, 2.0]}, "weights must have one number per pair"),
        (MAP, MAP, {"mask": torch.rand(3, 4, 4)}, "mask must be"),
        (MAP, MAP, {"sample_weights": torch.rand(3)}, "sample_weights must be"),
        (MAP, MAP.to("meta"), {}, "must be on one device"),
    ],
)
def test_wrong_arguments(student: Any, teacher: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        at_fused.map_loss(student, teacher, **options)

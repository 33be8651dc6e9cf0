"""Options may be NumPy or torch numbers, arrays and other sequences instead of Python's."""

from __future__ import annotations

from collections import UserList  # a sequence that is not a list, like OmegaConf's
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transfer_networks import GROUPS, networks

import at_fused
from at_fused import compat, schedules, visualize

Convert = Callable[[Any], Any]


def convert_numbers(make: Convert) -> Convert:
    """Return a function that converts numbers, and lists to another sequence of them."""

    def convert(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return UserList(map(convert, x))
        return make(x) if isinstance(x, (int, float)) else x

    return convert


def convert_to_arrays(make: Convert) -> Convert:
    """Return a function that converts numbers and lists of numbers to arrays."""

    def convert(x: Any) -> Any:
        is_list = isinstance(x, (list, tuple))
        if is_list and not all(isinstance(n, (int, float)) for n in x):
            return [convert(n) for n in x]
        return x if isinstance(x, (str, type(None))) else make(x)

    return convert


KINDS: dict[str, Convert] = {
    "float32": convert_numbers(lambda x: np.int64(x) if isinstance(x, int) else np.float32(x)),
    "float64": convert_numbers(lambda x: np.int64(x) if isinstance(x, int) else np.float64(x)),
    "arrays of a number": convert_numbers(np.array),
    "tensors of a number": convert_numbers(torch.tensor),
    "arrays": convert_to_arrays(np.array),
    "tensors": convert_to_arrays(torch.tensor),
}
X, Y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
TOKENS = torch.randn(2, 17, 3)
Q = X.square().mean(1)
LOGITS, LABELS = torch.randn(2, 5), torch.tensor([1, 3])
LOSS = {"p": 3.0, "eps": 0.5, "weights": [2.0]}
SIDES = {"channel_dim": (1, -1), "skip_tokens": (0, 1), "map_size": (None, (4, 4))}
ONE_SIDE = {"channel_dim": -1, "skip_tokens": 1, "map_size": [4, 4]}
AT_LOSS: list[tuple[Any, ...]] = [(X, Y, LOSS), (X, TOKENS, SIDES), (TOKENS, TOKENS, ONE_SIDE)]
CALLS: list[Callable[[Convert], Any]] = [
    *(
        lambda c, f=f, s=s, t=t, o=o: f(s, t, **{name: c(value) for name, value in o.items()})
        for f in (at_fused.at_loss, at_fused.at_value_and_grad)
        for s, t, o in AT_LOSS
    ),
    lambda c: at_fused.at_value_and_grad(X, Y, scale=c(2.0))[1],
    lambda c: at_fused.at(X, p=c(4), eps=c(0.25), channel_dim=c(1)),
    lambda c: at_fused.attention_map(TOKENS, **{n: c(value) for n, value in ONE_SIDE.items()}),
    lambda c: at_fused.attention_tap(X, p=c(3), absolute=False)[1],
    lambda c: at_fused.map_loss(Q, Q + 1, eps=c(0.5), weights=c([3])),
    lambda c: at_fused.ATLoss(**{n: c(value) for n, value in LOSS.items()})(X, Y),
    lambda c: repr(at_fused.ATLoss(**{n: c(value) for n, value in LOSS.items()})),
    lambda c: at_fused.kd_loss(LOGITS, LOGITS + X[:, 0, 0, :1], LABELS, c(2), c(0.5)),
    lambda c: at_fused.kd_loss(
        LOGITS, LOGITS, LABELS, label_smoothing=c(0.25), ignore_index=c(3), alpha=c(0)
    ),
    lambda c: repr(at_fused.KDLoss(c(2.0), c(0.5), label_smoothing=c(0.25), ignore_index=c(7))),
    lambda c: at_fused.features_loss([X, X], [Y, X], weights=c([0.5, 2])),
    lambda c: repr(at_fused.FeaturesLoss(c([3, 4]), c([3, 5]), weights=c([0.5, 2]))),
    lambda c: compat.convert_beta(c(2.0), "authors", "aberhu", [X.shape]),
    lambda c: compat.paper_at_loss([X, Y], [Y, X + 1], c([0.5, 2.0])),
    lambda c: compat.paper_at_loss(X, Y, c(0.5), p=c(3.0)),
    lambda c: compat.mdistiller_at_loss(X, Y, c(3), c(1000.0)),
    lambda c: compat.RepDistillerAttention(c(3))([X], [Y])[0],
    lambda c: compat.tensorflow_zoo_at_loss(X, Y, c(0.5), c(1)),
    lambda c: schedules.constant(c(0.5))(c(2)),
    lambda c: schedules.linear_decay(c(8.0), c(4), c(1.0))(c(2)),
    lambda c: schedules.cosine(c(8.0), c(4))(c(1.5)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_numbers_of_other_types(call: Callable[[Convert], Any], kind: str) -> None:
    expected, actual = call(lambda x: x), call(KINDS[kind])
    assert type(actual) is type(expected)
    if isinstance(expected, (Tensor, tuple)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    else:
        assert actual == expected


@pytest.mark.parametrize("kind", KINDS)
def test_attention_transfer(kind: str, tmp_path: Path) -> None:
    student, teacher, x, _ = networks()
    results = []
    for c in (lambda x: x, KINDS[kind]):
        options = {"p": 3.0, "eps": 0.5, "weights": [1.0, 0.5, 2.0], "channel_dim": (1, 1)}
        at = at_fused.AttentionTransfer(
            *(student, teacher, c(GROUPS)),
            beta=c(2.0),
            cache=at_fused.TeacherCache(tmp_path, samples=c(10)),
            **{name: c(value) for name, value in options.items()},
        )
        for _ in range(2):
            student(x)
            results.append(at(x, c([7, 2, 9, 0]), seed=c(3)))
        at.beta = c(4.0)
        results.append(at.beta)
        results.append(repr(at))
        at.remove()
    assert results[:4] == results[4:]
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-seed3")


def test_layer_names_in_other_sequences() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert list(visualize.attention_maps(net, X, UserList(["0", "1"]))) == ["0", "1"]
    student, teacher, *_ = networks()
    pairs = UserList([UserList(["groups.0", "groups.0"]), "groups.1"])
    at = at_fused.AttentionTransfer(student, teacher, pairs, beta=1.0)
    assert at.pairs == [(g, g) for g in GROUPS[:2]]


def test_numbers_of_other_types_in_compiled_modules() -> None:
    torch._dynamo.reset()
    options = {"p": torch.tensor(3.0), "weights": np.array([0.5]), "channel_dim": np.int64(1)}
    loss = at_fused.ATLoss(**options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, Y), at_fused.at_loss(X, Y, p=3.0, weights=[0.5]))
    kd = torch.compile(at_fused.KDLoss(np.float32(2)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(kd(LOGITS, LOGITS * 2), at_fused.kd_loss(LOGITS, LOGITS * 2, T=2.0))

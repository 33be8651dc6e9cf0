"""Mistakes in a call that was right, and the errors that have to say so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class Mistake(NamedTuple):
    """What becomes of an argument, the error, and what its message must name."""

    wrong: Any  # a value, or a function of the right one
    error: type[Exception]
    message: str

    def __repr__(self) -> str:
        """Without the address of a function, so that a test has the same name each time."""
        return f"{self.error.__name__}: {self.message}"

    def of(self, right: Any) -> Any:
        return self.wrong(right) if callable(self.wrong) else self.wrong


def each(error: type[Exception], message: str, *wrong: Any) -> list[Mistake]:
    return [Mistake(x, error, message) for x in wrong]


# ---- tensors: {name} is what the feature is called -----------------------------------------------

FEATURE = [
    Mistake(lambda x: x.long(), TypeError, "{name} must be float32.*int64"),
    Mistake(lambda x: x > 0, TypeError, "{name} must be float32.*bool"),
    Mistake(lambda x: x.to(torch.complex64), TypeError, "{name} must be float32.*complex64"),
    Mistake(lambda x: x.detach().to_sparse(), TypeError, "{name} must be a dense tensor"),
    *each(ValueError, "{name} must not be empty", lambda x: x[:0], lambda x: x[..., :0]),
]
# Of a pair: those of one side that do not fit the other one.
PAIRED = [
    Mistake(lambda x: torch.cat([x, x]), ValueError, "batch size|same shape|must have the shape"),
    Mistake(lambda x: x.to("meta"), ValueError, "on meta|on one device|on the device"),
]
LISTED = each(TypeError, "{name} must be a tensor", None, 1.0, "x", [1.0])
RANKED = each(
    ValueError,
    r"{name} must be \(B, C, H, W\)",
    lambda x: x.flatten(1),
    lambda x: x.reshape(*x.shape, *[1] * (6 - x.dim())),
)

# ---- numbers and choices -------------------------------------------------------------------------

NO_NUMBERS = (
    *(None, "2", True, [2.0], 2j),
    *(np.True_, np.ones(1), np.ones(2), np.complex64(2), np.str_("2")),
    *(torch.tensor(True), torch.ones(1), torch.ones(2), torch.ones(1).to_sparse()),
)
NO_FINITE_NUMBERS = (math.nan, math.inf, 10**400, np.float32(math.nan), torch.tensor(math.inf))


def number(name: str, *wrong: float) -> list[Mistake]:
    learned = torch.ones((), requires_grad=True)
    return [
        *each(TypeError, f"{name} must be a number, got", *NO_NUMBERS),
        *each(TypeError, f"{name} must not require a gradient, .*detach", learned),
        *each(ValueError, f"{name} must be .*got", *wrong, *NO_FINITE_NUMBERS),
    ]


def choice(name: str, *wrong: Any) -> list[Mistake]:
    of_bytes = b"code", b"sum", b"max", b"mean"  # as long as the option's own
    return each(ValueError, f"{name} must be .*got", "", "MEAN", 1, ["mean"], *of_bytes, *wrong)


def last_weight(x: Any) -> Callable[[list[float]], list[Any]]:
    return lambda weights: [*weights[1:], x]


WEIGHTS = [
    *each(TypeError, "weights must be", "ab", 1.0, torch.tensor(1.0), {1.0}),
    *each(TypeError, "weights must not require a gradient", torch.ones(1, requires_grad=True)),
    *each(ValueError, "weights must have one number per pair, got 7", [1.0] * 7),
    *each(ValueError, "weights must have one number per pair, got 0", []),
    *each(TypeError, "weights.*must be a number", *map(last_weight, NO_NUMBERS)),
    *each(ValueError, "weights.*must be", *map(last_weight, NO_FINITE_NUMBERS)),
]

# ---- options of each function --------------------------------------------------------------------

ONES = torch.ones(1)
# Wrong masks, weights of samples and labels, whatever their shape.
NO_FACTORS = (
    *(1, "ab", ONES.to_sparse()),
    *(torch.nested.nested_tensor([ONES]), ONES.to(torch.float8_e5m2)),
)

LOSS: dict[str, list[Mistake]] = {
    "p": number("p", 0.0, 0.99, -2.0),
    "eps": number("eps", 0.0, -1e-12),
    "collapse": choice("collapse", None, torch.ones(2), np.ones(2)),
    "form": choice("form", None),
    "reduction": choice("reduction", None),
    "resize": choice("resize"),
    "attend": choice("attend", None, np.ones(2)),
    "eps_mode": choice("eps_mode", None),
    "absolute": each(TypeError, "absolute must be", 1, None, "yes"),
    "weights": WEIGHTS,
    "channel_dim": [
        *each(ValueError, "channel_dim must be", 0, 7, -2, (1, 1, -1)),
        *each(TypeError, "channel_dim must be", None, 1.5, "1", True, 1.0, np.float32(1)),
    ],
    "skip_tokens": [
        *each(ValueError, "skip_tokens", -1, (0, 0, 0)),
        *each(TypeError, "skip_tokens must be", None, 1.5, "1", False, 0.0, np.False_),
    ],
    "map_size": each(ValueError, "map_size", 0, (0, 2), "ab", (1, 1, 1, 1), [[1]], (True,)),
    "mask": [
        *each(TypeError, "mask must be", *NO_FACTORS),
        *each(ValueError, "mask", [], torch.ones(1), torch.ones(99, 1, 1)),
    ],
    "sample_weights": [
        *each(TypeError, "sample_weights must be", *NO_FACTORS, ONES.long()),
        *each(ValueError, "sample_weights must be", torch.ones(99), torch.ones(1, 1)),
    ],
}

DISTANCE: dict[str, list[Mistake]] = {
    "form": choice("form", None),
    "weights": WEIGHTS,
    "reduction": choice("reduction", None, "sample"),
}

KD: dict[str, list[Mistake]] = {
    "T": number("T", 0.0, -1.0),
    "alpha": number("alpha", -0.1, 1.1),
    "label_smoothing": number("label_smoothing", -0.1, 1.0),
    "ignore_index": each(TypeError, "ignore_index", None, 1.0, True, "1"),
    "labels": [
        *each(TypeError, "labels must be", *NO_FACTORS, ONES),
        *each(ValueError, "labels must be", *(ONES.long().expand(n) for n in ((99,), (1, 1)))),
        *(
            Mistake(lambda y, n=n: torch.full_like(y, n), RuntimeError, "labels must be from 0")
            for n in (-1, 10**6, 2**63 - 1, -(2**63))
        ),
    ],
}

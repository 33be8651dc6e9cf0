"""Invalid values for arguments of the public functions, and the errors that they must raise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class BadValue(NamedTuple):
    """An invalid value, the type of its error, and a regular expression for its message."""

    value: Any  # or a function that computes it from the valid value
    error: type[Exception]
    message: str

    def __repr__(self) -> str:
        """Omit the value, so that ids of tests do not contain a function's address."""
        return f"{self.error.__name__}: {self.message}"

    def replace(self, valid: Any) -> Any:
        return self.value(valid) if callable(self.value) else self.value


def bad_values(error: type[Exception], message: str, *values: Any) -> list[BadValue]:
    return [BadValue(x, error, message) for x in values]


# ---- tensors: {name} stands for the argument's name ----------------------------------------------

FEATURE = [
    BadValue(lambda x: x.long(), TypeError, "{name} must be float32.*int64"),
    BadValue(lambda x: x > 0, TypeError, "{name} must be float32.*bool"),
    BadValue(lambda x: x.to(torch.complex64), TypeError, "{name} must be float32.*complex64"),
    BadValue(lambda x: x.detach().to_sparse(), TypeError, "{name} must be a dense tensor"),
    *bad_values(ValueError, "{name} must not be empty", lambda x: x[:0], lambda x: x[..., :0]),
]
# Features that do not match the other feature of the pair.
PAIRED = [
    BadValue(lambda x: torch.cat([x, x]), ValueError, "batch size|same shape|must have the shape"),
    BadValue(lambda x: x.to("meta"), ValueError, "on meta|on one device|on the device"),
]
LISTED = bad_values(TypeError, "{name} must be a tensor", None, 1.0, "x", [1.0])
RANKED = bad_values(
    ValueError,
    r"{name} must be \(B, C, H, W\)",
    lambda x: x.flatten(1),
    lambda x: x.reshape(*x.shape, *[1] * (6 - x.dim())),
)

# ---- numbers and choices -------------------------------------------------------------------------

NOT_NUMBERS = (
    *(None, "2", True, [2.0], 2j),
    *(np.True_, np.ones(1), np.ones(2), np.complex64(2), np.str_("2")),
    *(torch.tensor(True), torch.ones(1), torch.ones(2), torch.ones(1).to_sparse()),
)
NOT_FINITE_NUMBERS = (math.nan, math.inf, 10**400, np.float32(math.nan), torch.tensor(math.inf))


def number(name: str, *out_of_range: float) -> list[BadValue]:
    trainable = torch.ones((), requires_grad=True)
    return [
        *bad_values(TypeError, f"{name} must be a number, got", *NOT_NUMBERS),
        *bad_values(TypeError, f"{name} must not require a gradient, .*detach", trainable),
        *bad_values(ValueError, f"{name} must be .*got", *out_of_range, *NOT_FINITE_NUMBERS),
    ]


def choice(name: str, *values: Any) -> list[BadValue]:
    values = ("", "MEAN", 1, ["mean"], b"code", b"sum", b"max", b"mean", *values)
    return bad_values(ValueError, f"{name} must be .*got", *values)


def replace_last_weight(x: Any) -> Callable[[list[float]], list[Any]]:
    return lambda weights: [*weights[1:], x]


WEIGHTS = [
    *bad_values(TypeError, "weights must be", "ab", 1.0, torch.tensor(1.0), {1.0}),
    *bad_values(
        TypeError, "weights must not require a gradient", torch.ones(1, requires_grad=True)
    ),
    *bad_values(ValueError, "weights must have one number per pair, got 7", [1.0] * 7),
    *bad_values(ValueError, "weights must have one number per pair, got 0", []),
    *bad_values(TypeError, "weights.*must be a number", *map(replace_last_weight, NOT_NUMBERS)),
    *bad_values(ValueError, "weights.*must be", *map(replace_last_weight, NOT_FINITE_NUMBERS)),
]

# ---- options of each function --------------------------------------------------------------------

ONES = torch.ones(1)
# Invalid masks, sample weights and labels of any shape.
NOT_FACTORS = (
    *(1, "ab", ONES.to_sparse()),
    *(torch.nested.nested_tensor([ONES]), ONES.to(torch.float8_e5m2)),
)

LOSS: dict[str, list[BadValue]] = {
    "p": number("p", 0.0, 0.99, -2.0),
    "eps": number("eps", 0.0, -1e-12),
    "collapse": choice("collapse", None, torch.ones(2), np.ones(2)),
    "form": choice("form", None),
    "reduction": choice("reduction", None),
    "resize": choice("resize"),
    "attend": choice("attend", None, np.ones(2)),
    "eps_mode": choice("eps_mode", None),
    "absolute": bad_values(TypeError, "absolute must be", 1, None, "yes"),
    "weights": WEIGHTS,
    "channel_dim": [
        *bad_values(ValueError, "channel_dim must be", 0, 7, -2, (1, 1, -1)),
        *bad_values(TypeError, "channel_dim must be", None, 1.5, "1", True, 1.0, np.float32(1)),
    ],
    "skip_tokens": [
        *bad_values(ValueError, "skip_tokens", -1, (0, 0, 0)),
        *bad_values(TypeError, "skip_tokens must be", None, 1.5, "1", False, 0.0, np.False_),
    ],
    "map_size": bad_values(ValueError, "map_size", 0, (0, 2), "ab", (1, 1, 1, 1), [[1]], (True,)),
    "mask": [
        *bad_values(TypeError, "mask must be", *NOT_FACTORS),
        *bad_values(ValueError, "mask", [], torch.ones(1), torch.ones(99, 1, 1)),
    ],
    "sample_weights": [
        *bad_values(TypeError, "sample_weights must be", *NOT_FACTORS, ONES.long()),
        *bad_values(ValueError, "sample_weights must be", torch.ones(99), torch.ones(1, 1)),
    ],
}

FEATURES_LOSS: dict[str, list[BadValue]] = {
    "form": choice("form", None),
    "weights": WEIGHTS,
    "reduction": choice("reduction", None, "sample"),
}

KD: dict[str, list[BadValue]] = {
    "T": number("T", 0.0, -1.0),
    "alpha": number("alpha", -0.1, 1.1),
    "label_smoothing": number("label_smoothing", -0.1, 1.0),
    "ignore_index": bad_values(TypeError, "ignore_index", None, 1.0, True, "1"),
    "labels": [
        *bad_values(TypeError, "labels must be", *NOT_FACTORS, ONES),
        *bad_values(
            ValueError, "labels must be", *(ONES.long().expand(n) for n in ((99,), (1, 1)))
        ),
        *(
            BadValue(lambda y, n=n: torch.full_like(y, n), RuntimeError, "labels must be from 0")
            for n in (-1, 10**6, 2**63 - 1, -(2**63))
        ),
    ],
}

"""What can be wrong with a call that was right, and the error that has to say so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Mistake(NamedTuple):
    """What becomes of an argument, the error, and what its message must name."""

    wrong: Any  # a value, or a function of the right one
    error: type[Exception]
    message: str

    def __repr__(self) -> str:
        """Without the address of a function, so that the same cases are drawn each time."""
        return f"{self.error.__name__}: {self.message}"

    def of(self, right: Any) -> Any:
        return self.wrong(right) if callable(self.wrong) else self.wrong


def ranked(rank: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.reshape(*x.shape, *[1] * (rank - x.dim()))


# Of one feature. {name} is what the feature is called, {i} its pair's number.
FEATURE = [
    Mistake(lambda x: x.long(), TypeError, "{name} must be float32.*int64"),
    Mistake(lambda x: x > 0, TypeError, "{name} must be float32.*bool"),
    Mistake(lambda x: x.to(torch.complex64), TypeError, "{name} must be float32.*complex64"),
    Mistake(lambda x: x.detach().to_sparse(), TypeError, "{name} must be a dense tensor"),
    Mistake(lambda x: x[:0], ValueError, "{name} must not be empty"),
    Mistake(lambda x: x[..., :0], ValueError, "{name} must not be empty"),
    Mistake(lambda x: torch.cat([x, x]), ValueError, "batch size|same shape"),
    Mistake(lambda x: x.to("meta"), ValueError, "on meta|on one device"),
]
LISTED_FEATURE = [
    Mistake(wrong, TypeError, "{name} must be a tensor") for wrong in (None, 1.0, "x", [1.0])
]
RANKED_FEATURE = [
    Mistake(lambda x: x.flatten(1), ValueError, r"{name} must be \(B, C, H, W\)"),
    Mistake(ranked(6), ValueError, r"{name} must be \(B, C, H, W\)"),
]

NO_NUMBERS = (
    *(None, "2", True, [2.0], 2j),
    *(np.True_, np.ones(1), np.ones(2), np.complex64(2), np.str_("2")),
    *(torch.tensor(True), torch.ones(1), torch.ones(2), torch.ones(1).to_sparse()),
)
NO_WEIGHTS = (math.nan, math.inf, 10**400, np.float32(math.nan), torch.tensor(math.inf))


def number(name: str, *wrong: float) -> list[Mistake]:
    found = [Mistake(x, TypeError, f"{name} must be a number, got") for x in NO_NUMBERS]
    learned = torch.ones((), requires_grad=True)
    found.append(Mistake(learned, TypeError, f"{name} must not require a gradient, .*detach"))
    return found + [Mistake(x, ValueError, f"{name} must be .*got") for x in (*wrong, *NO_WEIGHTS)]


def choice(name: str, *wrong: Any) -> list[Mistake]:
    of_bytes = b"code", b"sum", b"max", b"mean"  # as long as the option's own
    wrong = "", "MEAN", 1, ["mean"], *of_bytes, *wrong
    return [Mistake(x, ValueError, f"{name} must be .*got") for x in wrong]


WEIGHTS = [
    *(Mistake(x, TypeError, "weights must be") for x in ("ab", 1.0, torch.tensor(1.0), {1.0})),
    Mistake(torch.ones(1, requires_grad=True), TypeError, "weights must not require a gradient"),
    Mistake([1.0] * 7, ValueError, "weights must have one number per pair, got 7"),
    Mistake([], ValueError, "weights must have one number per pair, got 0"),
    *(
        Mistake(lambda w, x=x: [*w[1:], x], TypeError, "weights.*must be a number")
        for x in NO_NUMBERS
    ),
    *(Mistake(lambda w, x=x: [*w[1:], x], ValueError, "weights.*must be") for x in NO_WEIGHTS),
]

# Wrong factors, whatever their shape.
ONES = torch.ones(1)
FACTORS = [
    1,
    "ab",
    ONES.to_sparse(),
    torch.nested.nested_tensor([ONES]),
    ONES.to(torch.float8_e5m2),
]

# Of an option of at_loss.
LOSS: dict[str, list[Mistake]] = {
    "p": number("p", 0.0, 0.99, -2.0),
    "eps": number("eps", 0.0, -1e-12),
    "collapse": choice("collapse", None, torch.ones(2), np.ones(2)),
    "form": choice("form", None),
    "reduction": choice("reduction", None),
    "resize": choice("resize"),
    "attend": choice("attend", None, np.ones(2)),
    "eps_mode": choice("eps_mode", None),
    "absolute": [Mistake(x, TypeError, "absolute must be") for x in (1, None, "yes")],
    "weights": WEIGHTS,
    "channel_dim": [
        *(Mistake(x, ValueError, "channel_dim must be") for x in (0, 7, -2, (1, 1, -1))),
        *(
            Mistake(x, TypeError, "channel_dim must be")
            for x in (None, 1.5, "1", True, 1.0, np.float32(1))
        ),
    ],
    "skip_tokens": [
        *(Mistake(x, ValueError, "skip_tokens") for x in (-1, (0, 0, 0))),
        *(
            Mistake(x, TypeError, "skip_tokens must be")
            for x in (None, 1.5, "1", False, 0.0, np.False_)
        ),
    ],
    "map_size": [
        Mistake(x, ValueError, "map_size") for x in (0, (0, 2), "ab", (1, 1, 1, 1), [[1]], (True,))
    ],
    "mask": [
        *(Mistake(x, TypeError, "mask must be") for x in FACTORS),
        *(Mistake(x, ValueError, "mask") for x in ([], torch.ones(1), torch.ones(99, 1, 1))),
    ],
    "sample_weights": [
        *(Mistake(x, TypeError, "sample_weights must be") for x in (*FACTORS, ONES.long())),
        *(Mistake(torch.ones(n), ValueError, "sample_weights must be") for n in ((99,), (1, 1))),
    ],
}

DISTANCE: dict[str, list[Mistake]] = {
    "form": choice("form", None),
    "weights": WEIGHTS,
    "reduction": choice("reduction", None, "sample"),
}

# Of logits, both sides' names being {name}; a row of them has a label that is no class.
OF_LOGITS = [
    *(m for m in FEATURE if "batch" not in m.message and "meta" not in m.message),
    Mistake(lambda x: torch.cat([x, x]), ValueError, "must have the shape of student_logits"),
    Mistake(lambda x: x.unsqueeze(0), ValueError, "_logits must"),
    *(Mistake(x, TypeError, "{name} must be a tensor") for x in (None, 1.0, [1.0])),
]
LOGITS: dict[str, list[Mistake]] = {
    "T": number("T", 0.0, -1.0),
    "alpha": number("alpha", -0.1, 1.1),
    "label_smoothing": number("label_smoothing", -0.1, 1.0),
    "ignore_index": [Mistake(x, TypeError, "ignore_index") for x in (None, 1.0, True, "1")],
    "labels": [
        *(Mistake(x, TypeError, "labels must be") for x in (*FACTORS, ONES)),
        *(
            Mistake(torch.zeros(n, dtype=torch.int64), ValueError, "labels must be")
            for n in ((99,), (1, 1), ())
        ),
        *(
            Mistake(
                lambda right, n=n: torch.full_like(right, n), RuntimeError, "labels must be from 0"
            )
            for n in (-1, 10**6, 2**63 - 1, -(2**63))
        ),
    ],
}

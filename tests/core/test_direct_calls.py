"""Invalid direct calls of ``torch.ops.at_fused`` raise an error that names the argument.

The operators check what keeps their kernels within memory. The public functions check more
(test_errors.py).
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from back_ends import ALL_BACKENDS, EMULATED, use

X = torch.randn(2, 3, 4, 4)
X_COPY = X.clone()
Q, CHANNELS, ONE_SAMPLE = torch.rand(2, 16), torch.zeros(2, 16).int(), torch.rand(1, 16)
TOKENS, BATCHES = [torch.randn(2, 3, 5)], [X, X[:1]]
TWO = {"student": [X, X], "teacher": [X, X]}
TWO_FEATURES = {"features": [X, X], "coefficients": [Q, Q], "pairs": [0, 0]}
OPTIONS = {"form": "code", "reduction": "sum", "eps_mode": "max", "eps": 1e-12}
PAIRS = {"student": [X], "teacher": [X + 1], "masks": [], "weights": [], "skip_tokens": []}
LOSS = {**PAIRS, "p": 2.0, "collapse": "mean", **OPTIONS}
TAP = {"gradient": X, "feature": X, "map_gradient": Q, "p": 2.0, "collapse": "mean"}
NO_GRADIENTS = {"student_grad": False, "teacher_grad": False}
VALID: dict[str, dict[str, Any]] = {
    "attention_map": {"features": [X], "p": 2.0, "collapse": "mean"},
    "attention_map_backward": {
        **{"features": [X], "coefficients": [Q], "loss_gradient": None, "pairs": [0]},
        **{"p": 2.0, "skip_tokens": [], "channels": []},
    },
    "attention_tap_backward": TAP,
    "attention_tap_backward_": TAP,
    "at_loss": LOSS | NO_GRADIENTS,
    "at_value_and_grad": LOSS | {"scale": 1.0, "loss_gradient": None},
    "map_loss": {"student": [Q], "teacher": [Q + 1], "weights": [], **OPTIONS, **NO_GRADIENTS},
}


def call(operator: str, change: dict[str, Any]) -> None:
    getattr(torch.ops.at_fused, operator)(**(VALID[operator] | change))


TAPS = "attention_tap_backward", "attention_tap_backward_"
FLOATING, SPATIAL = "float16, bfloat16, float32 or float64", r"\(B, C, \*spatial\)"
# Invalid arguments of some operators, and regular expressions for their errors.
INVALID: dict[tuple[str, ...], list[tuple[dict[str, Any], str]]] = {
    ("at_loss", "at_value_and_grad", "map_loss"): [
        ({"student": []}, "same number of tensors"),
        ({"teacher": []}, "same number of tensors"),
        ({"weights": [1.0, 2.0]}, "weights must have one number per pair"),
        ({"form": "book"}, "form must be 'code' or 'paper', got 'book'"),
        ({"reduction": "mean"}, "reduction must be 'sum', 'none' or 'sample', got 'mean'"),
        ({"eps_mode": "min"}, "eps_mode must be 'max' or 'add', got 'min'"),
        *(({"eps": eps}, "eps must be a finite number > 0") for eps in (0.0, -1.0, math.inf)),
    ],
    ("at_loss", "at_value_and_grad", "attention_map", *TAPS): [
        ({"collapse": "median"}, "collapse must be 'mean', 'sum' or 'max', got 'median'"),
        *(({"p": p}, "p must be a finite number >= 1, got") for p in (0.5, math.inf, math.nan)),
    ],
    ("at_loss", "at_value_and_grad"): [
        ({"collapse": "max"}, "'mean' or 'sum' for a loss, got 'max'"),
        ({"student": [torch.randn(2, 3)]}, SPATIAL),
        ({"student": [X[:0]]}, "empty"),
        ({"student": [X.int()]}, FLOATING),
        ({"teacher": [torch.randn(2, 3, 4, 5)]}, "same B and positions"),
        ({"teacher": [X[:1]]}, "same B and positions"),
        ({"student": BATCHES, "teacher": BATCHES, "reduction": "sample"}, "same batch size"),
        ({"masks": [Q, Q]}, "masks must have one mask per pair"),
        (TWO | {"masks": [Q]}, "masks must have one mask per pair"),
        (TWO | {"weights": [1.0]}, "weights must have one number per pair"),
        *(
            ({"masks": [mask]}, r"a mask must be \(B, N\).* float32 otherwise")
            for mask in (torch.rand(2, 15), ONE_SAMPLE, Q.double(), Q > 0, Q.view(2, 4, 4))
        ),
        ({"skip_tokens": [0]}, "one number per feature"),
        ({"skip_tokens": [1, 1]}, r"leave a token of a feature \(B, C, N\), got 1"),
        *(
            ({"student": TOKENS, "teacher": TOKENS, "skip_tokens": skips}, message)
            for skips, message in (
                ([5, 5], "leave a token.*got 5"),
                ([0, -1], "leave a token.*got -1"),
                ([0, 1], "same B and positions"),
            )
        ),
    ],
    ("at_value_and_grad", "attention_map_backward"): [
        ({"loss_gradient": torch.ones(1, 3)}, "loss gradient.*sample|batch size"),
        ({"loss_gradient": torch.ones(0)}, "pair number 0|pair 0"),
        ({"loss_gradient": torch.ones(1, 2, 1)}, "loss gradient must be a scalar, "),
        ({"loss_gradient": torch.ones((), dtype=torch.int64)}, "loss gradient.*float32 or float64"),
    ],
    ("at_value_and_grad",): [
        (TWO | {"loss_gradient": torch.ones(1)}, "pair number 1|pair 1"),
        (
            {"student": BATCHES, "teacher": BATCHES, "loss_gradient": torch.ones(2, 2)},
            "loss gradient.*sample|batch size",
        ),
    ],
    ("map_loss",): [
        ({"teacher": [torch.ones(2, 5)]}, "the same shape in a pair"),
        ({"student": [Q.half()]}, "float32 or float64"),
        ({"student": [Q.unsqueeze(2)]}, r"maps must be \(B, N\)"),
        ({"student": [Q[:0]], "teacher": [Q[:0]]}, "not empty"),
        (
            {"student": [Q, ONE_SAMPLE], "teacher": [Q, ONE_SAMPLE], "reduction": "sample"},
            "same batch size",
        ),
    ],
    ("attention_map",): [
        ({"features": [X[0, 0]]}, SPATIAL),
        ({"features": [X.int()]}, FLOATING),
        ({"skip_tokens": [0, 0]}, "one number per feature"),
    ],
    ("attention_map_backward",): [
        ({"p": 0.5}, "p must be a finite number >= 1, got"),
        *(
            ({"coefficients": [k]}, r"must be \(B, N\)")
            for k in (torch.rand(2, 15), Q.t(), Q.double(), ONE_SAMPLE, Q[:, :4])
        ),
        ({"coefficients": []}, "coefficients.*per feature"),
        ({"pairs": [0, 1]}, "pairs.*per feature"),
        (TWO_FEATURES | {"pairs": [0]}, "pairs.*per feature"),
        ({"pairs": [1], "loss_gradient": torch.ones(1)}, "pair number 1|pair 1"),
        ({"pairs": [-1], "loss_gradient": torch.ones(3)}, "pair number -1|pair -1"),
        ({"pairs": [2], "loss_gradient": torch.ones(2, 2)}, "pair number 2|pair 2"),
        ({"channels": [CHANNELS, CHANNELS]}, "per feature"),
        (TWO_FEATURES | {"channels": [CHANNELS]}, "per feature"),
        ({"channels": [Q]}, "of int32"),
        ({"channels": [CHANNELS[:, 1:]]}, "of int32"),
    ],
    TAPS: [
        *(
            ({"gradient": g}, "must have the shape, dtype and device of its feature")
            for g in (torch.ones(2, 3, 4, 5), X.flatten(2), X.half(), X.double())
        ),
        ({"gradient": X[0, 0], "feature": X[0, 0]}, SPATIAL),
        ({"gradient": X[:0], "feature": X[:0]}, "be empty"),
        ({"gradient": X.int(), "feature": X.int()}, FLOATING),
        *(
            ({"map_gradient": k}, r"must be \(B, N\)")
            for k in (Q[:, 1:], ONE_SAMPLE, Q.view(2, 4, 4), Q.double(), Q.half())
        ),
        *(
            (change, "channels must be passed with collapse 'max', and only then")
            for change in ({"collapse": "max"}, {"channels": CHANNELS})
        ),
        *(
            ({"collapse": "max", "channels": channels}, "of int32")
            for channels in (CHANNELS.long(), CHANNELS[:, 1:])
        ),
    ],
    ("attention_tap_backward_",): [
        ({"gradient": gradient}, "in place must not be expanded, nor overlap")
        for gradient in (
            X[:1].expand_as(X),
            X[:, :1, :1, :1].expand_as(X),
            torch.ones(96).as_strided((2, 3, 4, 4), (24, 8, 2, 1)),
        )
    ],
}


@pytest.mark.parametrize(
    ("operators", "change", "message"),
    [(operators, *row) for operators, rows in INVALID.items() for row in rows],
)
def test_invalid_calls(operators: tuple[str, ...], change: dict[str, Any], message: str) -> None:
    for operator, name in itertools.product(operators, ALL_BACKENDS):
        with use(name), pytest.raises(RuntimeError, match="at_fused: ") as error:
            call(operator, change)
        assert re.search(message, str(error.value)), f"{operator} of {name}"
        assert torch.equal(X, X_COPY)


@pytest.mark.parametrize("argument", range(4))
def test_tensors_on_another_device_raise(argument: int) -> None:
    tensors = [X.clone(), X, Q, CHANNELS]
    tensors[argument] = tensors[argument].to("meta")
    *others, channels = tensors
    message = ("device of its feature", "device of its feature", r"\(B, N\)", "of int32")[argument]
    # The dispatcher would choose meta's kernel, so name the dispatch key.
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for operator, name in itertools.product(TAPS, ALL_BACKENDS):
        namespace = torch.ops.at_fused_emulated if name in EMULATED else torch.ops.at_fused
        with use(name), pytest.raises(RuntimeError, match=message):
            getattr(namespace, operator).default.redispatch(cpu, *others, 2.0, "max", channels)

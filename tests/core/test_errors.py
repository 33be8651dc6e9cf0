"""Errors of the public functions: one error that names the bad argument and its value."""

from __future__ import annotations

import re
from typing import Any

import bad_values
import pytest
import torch
from bad_values import BadValue

import at_fused

X = torch.randn(2, 3, 4, 4)
Y = torch.randn(2, 5, 4, 4)
TOKENS, T_TOKENS = X[:, 0], Y[:, 0]
ONES = torch.ones(2, 4, 4)
C_LAST = {"channel_dim": -1}

# Invalid calls of at_loss by their messages. bad_values.LOSS has those with one bad option.
TYPE_ERRORS: dict[str, tuple[Any, ...]] = {
    "both be tensors or both be.*list.*Tensor": ([1.0], Y),
    "both be tensors.*Tensor and list": (X, [Y]),
    "student must be a tensor or a list.*got int": (3, [Y]),
    "student must be.*float8_e5m2": (X.to(torch.float8_e5m2), Y),
    "student must be.*got dict": ({"a": X}, {"a": Y}),
    r"student\[1\] must be a tensor, got ndarray": ([X, X.numpy()], [Y, Y]),
    "student must be a dense tensor.*sparse_coo": (X.to_sparse(), Y.to_sparse()),
    "student must be a dense tensor.*nested": (torch.nested.nested_tensor([X[0], X[1]]), Y),
    "mask must be float32.*got torch.int64": (X, X, {"mask": X[:, 0].long()}),
}
VALUE_ERRORS: dict[str, tuple[Any, ...]] = {
    "same batch size, got 2 and 1": (X, Y[:1]),
    "same map size.*4x4 and 3x4.*resize=": (X, Y[:, :, :3]),
    "same map size.*16 and 12.*tokens": (X.flatten(2), Y[:, :, :3].flatten(2)),
    "pair 1.*4x4 and 2x4": ([X, X], [Y, Y[:, :, :2]]),
    "same number of tensors, got 2 and 1": ([X, X], [Y]),
    "student must not be an empty list": ([], []),
    "teacher must not be empty": (X, Y[:, :0]),
    "student of pair 1 is on meta": ([X, X.to("meta")], [Y, Y]),
    r"4x4 and 16; choose .* and rank \(for tokens, at_loss has .* and map_size\)$": (
        *(X, Y.flatten(2), {"resize": "maps"}),
    ),
    "got 4x4 and 1x4x4; choose .* and rank": (X, Y[:, :, None], {"resize": "maps"}),
    "got 3 and 5; choose layers with the same number": (X, Y, {"attend": "channel"}),
    "an integer.*2.5": (X, Y, {"absolute": False, "p": 2.5}),
    "collapse='max' needs absolute=True": (X, Y, {"absolute": False, "p": 3, "collapse": "max"}),
    "skip_tokens is for token features.*channel_dim=-1": (X, Y, {"skip_tokens": 1}),
    "map_size is for token features.*channel_dim=-1": (X, Y, {"map_size": (4, 4)}),
    "at least one token of student.*has 4, got 4": (TOKENS, T_TOKENS, C_LAST | {"skip_tokens": 4}),
    r"map_size must have.*has tokens after skip_tokens, 4, got \(3, 2\)": (
        *(TOKENS, T_TOKENS, C_LAST | {"map_size": (3, 2)}),
    ),
    "map_size is for spatial attention, got attend='channel'": (
        *(TOKENS, T_TOKENS, C_LAST | {"map_size": (2, 2), "attend": "channel"}),
    ),
    "one per pair, got 2 for 1": (X, X, {"mask": [ONES, ONES]}),
    "features' device, cpu, got meta": (X, X, {"mask": ONES.to("meta")}),
    "mask is for attend='spatial'": (X, X, {"mask": ONES, "attend": "channel"}),
    r"mask must cover the 3 tokens left by skip_tokens=1, got 4 tokens; pass mask\[:, 1:\]": (
        *(TOKENS, T_TOKENS, C_LAST | {"skip_tokens": 1, "mask": torch.ones(2, 4)}),
    ),
    r"sample_weights must be \(2,\), one number per sample of pair 0, got shape \(3,\)": (
        *(X, Y, {"sample_weights": torch.ones(3)}),
    ),
    r"map_size must be one to three.*got \[3, 3.0\]": (
        *(TOKENS, T_TOKENS, C_LAST | {"map_size": [3, 3.0]}),
    ),
    r"skip_tokens .*=-1 \(got \(1, -1\)\); the student has none, got skip_tokens=\(1, 0\)": (
        *(X, T_TOKENS, {"channel_dim": (1, -1), "skip_tokens": (1, 0)}),
    ),
    r"map_size .*got map_size=\(None, \(4, 4\)\)": (
        *(TOKENS, Y, {"channel_dim": (-1, 1), "map_size": (None, (4, 4))}),
    ),
    "one batch size, got 2 for pair 0 and 1 for pair 1": (
        *([X, X[:1]], [Y, Y[:1]], {"reduction": "sample"}),
    ),
}


# With only these options at_loss calls the operator first, and _arguments.py if that raises.
# channel_dim=(1, 1) means 1, but calls _arguments.py first.
FAST_OPTIONS = ("p", "eps", "collapse", "form", "reduction", "eps_mode")
CHECKED = {"channel_dim": (1, 1)}


def get_error(student: Any, teacher: Any, **options: Any) -> tuple[type[Exception], str]:
    """Return type and message of the error, equal for both functions and both paths."""
    errors = set()
    for function in (at_fused.at_loss, at_fused.at_value_and_grad):
        for path in [{}, CHECKED] if options.keys() <= {*FAST_OPTIONS} else [{}]:
            with pytest.raises((TypeError, ValueError)) as error:
                function(student, teacher, **options, **path)
            errors.add((error.type, str(error.value)))
    (error,) = errors
    return error


@pytest.mark.parametrize("message", [*TYPE_ERRORS, *VALUE_ERRORS])
def test_errors_of_at_loss(message: str) -> None:
    student, teacher, *options = (TYPE_ERRORS | VALUE_ERRORS)[message]
    error, actual = get_error(student, teacher, **(options[0] if options else {}))
    assert issubclass(error, TypeError if message in TYPE_ERRORS else ValueError)
    assert re.search(message, actual)


def parametrize_bad_options(options: dict[str, list[BadValue]]) -> Any:
    rows = [(name, bad) for name, values in options.items() for bad in values]
    return pytest.mark.parametrize(("name", "bad"), rows, ids=str)


@parametrize_bad_options(bad_values.LOSS)
def test_bad_options_of_at_loss(name: str, bad: BadValue) -> None:
    error, message = get_error(X, Y, **{name: bad.replace([1.0] if name == "weights" else 2.0)})
    assert issubclass(error, bad.error)
    assert re.search(bad.message, message)


@parametrize_bad_options(bad_values.FEATURES_LOSS)
def test_bad_options_of_features_loss(name: str, bad: BadValue) -> None:
    with pytest.raises(bad.error, match=bad.message):
        at_fused.features_loss([X, Y], [X + 1, Y], **{name: bad.replace([1.0, 2.0])})


LOGITS, LABELS = torch.randn(4, 6), torch.tensor([0, 1, 5, 3])


@parametrize_bad_options(bad_values.KD)
def test_bad_options_of_kd_loss(name: str, bad: BadValue) -> None:
    options = {"labels": LABELS, "alpha": 0.5} | {name: bad.replace(LABELS)}
    with pytest.raises(bad.error, match=bad.message):
        at_fused.kd_loss(LOGITS, LOGITS * 2, **options)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", bad_values.FEATURE + bad_values.PAIRED, ids=str)
def test_bad_tensors_of_kd_loss_and_features_loss(bad: BadValue, side: int) -> None:
    for function, valid, names in (
        (at_fused.kd_loss, LOGITS, ("student_logits", "teacher_logits")),
        (at_fused.features_loss, X, ("student", "teacher")),
    ):
        pair = [valid, valid]
        pair[side] = bad.replace(valid)
        with pytest.raises(bad.error, match=bad.message.format(name=names[side])):
            function(*pair)


MAP_ERRORS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([X], {}, TypeError, "x must be a tensor, got list"),
    (X[0, 0, 0], {}, ValueError, r"x must be \(B, C, H, W\).*\(4,\)"),
    (X, {"channel_dim": 2}, ValueError, "channel_dim must be 1 or -1, got 2"),
    (X, {"eps": 0.0}, ValueError, "eps must be"),
    (X, {"skip_tokens": 1}, ValueError, "skip_tokens is for token features"),
    (X, {"attend": "channel", "map_size": (4, 4)}, ValueError, "map_size is for spatial"),
    (TOKENS, {"channel_dim": (1, -1)}, ValueError, "must be one value each"),
    (TOKENS, {"channel_dim": -1, "map_size": ((2, 2), None)}, ValueError, "must be one value each"),
    (X, {"normalize": "no"}, TypeError, "normalize must be True or False"),
    (X, {"attend": "both"}, ValueError, "attend must be 'spatial' or 'channel', got 'both'$"),
    (X, {"normalize": False, "eps": 0.1}, ValueError, "eps and eps_mode are for normalize=True"),
]


@pytest.mark.parametrize("function", [at_fused.at, at_fused.attention_map, at_fused.attention_tap])
@pytest.mark.parametrize(("x", "options", "error", "message"), MAP_ERRORS)
def test_errors_of_map_functions(
    function: Any, x: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if function is at_fused.at and not options.keys() <= {"collapse", "channel_dim", "p", "eps"}:
        error, message = TypeError, "unexpected keyword argument"
    with pytest.raises(error, match=message):
        function(x, **options)


def test_errors_of_the_module_constructor() -> None:
    for name, valid in (("form", ""), ("p", 2.0), ("eps", 2.0), ("weights", [1.0, 2.0])):
        for bad in bad_values.LOSS[name]:
            if "number per pair" not in bad.message:  # the constructor does not know the number
                with pytest.raises(bad.error, match=bad.message):
                    at_fused.ATLoss(**{name: bad.replace(valid)})


def test_errors_of_use_backend() -> None:
    for name, got in (("gpu", "'gpu'"), (None, "None"), (["eager"], r"\['eager'\]")):
        with pytest.raises(ValueError, match=rf"name must be 'auto', .* or 'eager', got {got}"):
            at_fused.use_backend(name)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "bad",
    bad_values.FEATURE + bad_values.PAIRED + bad_values.LISTED + bad_values.RANKED,
    ids=str,
)
def test_bad_features_of_at_loss(fast_backend: str, bad: BadValue, side: int) -> None:
    pair = [X, Y]
    pair[side] = bad.replace(pair[side])
    error, message = get_error([X, pair[0]], [Y, pair[1]])
    assert issubclass(error, bad.error)
    expected = bad.message.format(name=rf"{('student', 'teacher')[side]}\[1\]")
    assert re.search(expected, message)
    if isinstance(pair[side], torch.Tensor):
        get_error(*pair)


def test_both_paths_give_equal_results(backend: str) -> None:
    s = torch.nn.Parameter(X.clone())
    for student, teacher, options in (
        (s, Y, {}),
        ((s, s), [Y, Y], {"reduction": "none", "p": 3}),
        ([s], (Y.double(),), {"form": "paper", "eps": 1}),
        ([s, s[:, :, ::2]], [Y, Y[:, :, ::2]], {"reduction": "sample", "eps_mode": "add"}),
        (s, Y, {"collapse": "max"}),
    ):
        losses = [at_fused.at_loss(student, teacher, **options, **path) for path in ({}, CHECKED)]
        assert torch.equal(*losses)
        assert torch.equal(*(torch.autograd.grad(loss.sum(), s)[0] for loss in losses))


def test_single_position_warns_once_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = X[:, :, :1, :1], Y[:, :, :1, :1]
    for path in ({}, CHECKED):
        monkeypatch.setattr(at_fused._arguments, "single_position_warned", False)
        with pytest.warns(at_fused.AtFusedWarning, match="pair 1 has maps of a single posit") as w:
            at_fused.at_loss([X, s], [Y, t], **path)
        assert [warning.filename for warning in w] == [__file__]
        at_fused.at_loss(s, t, **path)  # pytest would turn a second warning into an error


MAP = torch.rand(2, 4, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (MAP, [MAP], {}, "both be tensors or both be sequences"),
        ([], [], {}, "student must not be an empty list"),
        ([[MAP, MAP]], [MAP, MAP], {}, r"student\[0\] must be a tensor, got list"),
        (MAP.half(), MAP, {}, "student must be float32 or float64, as attention maps are"),
        (MAP[0, 0], MAP, {}, r"student must be a map \(B, H, W\)"),
        (MAP, MAP[:1], {}, "same batch size, got 2 and 1"),
        (MAP, MAP.reshape(2, 2, 8), {}, r"same map size \(H x W\), got 4x4 and 2x8"),
        (MAP, MAP.reshape(2, 16), {}, "same map size.* and rank"),
        (MAP, MAP, {"resize": "features"}, "resize must be None or 'maps', got 'features'"),
        (MAP, MAP, {"weights": [1.0, 2.0]}, "weights must have one number per pair"),
        (MAP, MAP, {"mask": torch.rand(3, 4, 4)}, "mask must be"),
        (MAP, MAP, {"sample_weights": torch.rand(3)}, "sample_weights must be"),
        (MAP, MAP.to("meta"), {}, "must be on one device"),
    ],
)
def test_map_loss_errors(student: Any, teacher: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        at_fused.map_loss(student, teacher, **options)

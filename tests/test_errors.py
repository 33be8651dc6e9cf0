"""Bad input: one error that names the argument and what was given."""

from __future__ import annotations

import re
from typing import Any

import mistakes
import pytest
import torch

import at_fused

X = torch.randn(2, 3, 4, 4)
Y = torch.randn(2, 5, 4, 4)
TOKENS = X[:, 0]

CASES: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "not a tensor": ([1.0], Y, {}, TypeError, "both be tensors or both be sequences.*list.*Tensor"),
    "a number": (3, [Y], {}, TypeError, "student must be a tensor or a list.*got int"),
    "None": (None, None, {}, TypeError, "student must be.*NoneType"),
    "a string": ("ab", [Y, Y], {}, TypeError, "student must be.*str"),
    "teacher not a tensor": (X, "t", {}, TypeError, "both be tensors"),
    "an array": (X.numpy(), [Y], {}, TypeError, "student must be.*ndarray"),
    "float8": (X.to(torch.float8_e5m2), Y, {}, TypeError, "student must be.*float8_e5m2"),
    "batch": (X, Y[:1], {}, ValueError, "same batch size, got 2 and 1"),
    "batch of 1 is not broadcast": (X[:1], Y, {}, ValueError, "same batch size, got 1 and 2"),
    "height": (X, Y[:, :, :3], {}, ValueError, "same map size.*4x4 and 3x4.*resize="),
    "size 1 is not broadcast": (X, Y[:, :, :1, :1], {}, ValueError, "4x4 and 1x1"),
    "4x16 against 8x8": (
        torch.randn(2, 3, 4, 16),
        torch.randn(2, 3, 8, 8),
        {},
        ValueError,
        "4x16 and 8x8",
    ),
    "ranks differ": (X, Y.flatten(2), {}, ValueError, "4x4 and 16"),
    "the pair is named": ([X, X], [Y, Y[:, :, :2]], {}, ValueError, "pair 1.*4x4 and 2x4"),
    "list lengths": ([X, X], [Y], {}, ValueError, "same number of features, got 2 and 1"),
    "empty list": ([], [], {}, ValueError, "student must not be an empty list"),
    "a tensor and a list": (X, [Y], {}, TypeError, "Tensor and list"),
    "no channels": (X, Y[:, :0], {}, ValueError, "teacher must not be empty"),
    "devices": (X, Y.to("meta"), {}, ValueError, "teacher of pair 0 is on meta.*student on cpu"),
    "p too small": (X, Y, {"p": 0.99}, ValueError, "p must be a finite number >= 1, got 0.99"),
    "collapse": (X, Y, {"collapse": "avg"}, ValueError, "collapse must be.*got 'avg'"),
    "form": (X, Y, {"form": 2}, ValueError, "form must be 'code' or 'paper', got 2"),
    "reduction": (
        X,
        Y,
        {"reduction": "mean"},
        ValueError,
        "reduction must be 'sum', 'none' or 'sample'",
    ),
    "eps zero": (X, Y, {"eps": 0.0}, ValueError, "eps must be a finite number > 0, got 0.0"),
    "channel_dim": (X, Y, {"channel_dim": 2}, ValueError, "channel_dim must be 1 or -1, got 2"),
    "resize": (
        X,
        Y,
        {"resize": "feature"},
        ValueError,
        "resize must be None, 'maps' or 'features'",
    ),
    "resize and ranks": (
        X,
        Y.flatten(2),
        {"resize": "maps"},
        ValueError,
        r"4x4 and 16; choose layers of one map size; .* channel_dim=-1 and map_size=\(H, W\)$",
    ),
    "a map and a video": (
        X,
        Y[:, :, None],
        {"resize": "maps"},
        ValueError,
        "got 4x4 and 1x4x4; choose layers whose maps have as many dimensions$",
    ),
    "attend": (X, Y, {"attend": "channels"}, ValueError, "attend must be 'spatial', 'channel' or"),
    "channels": (X, Y, {"attend": "channel"}, ValueError, "got 3 and 5; choose layers of equal"),
    "channels of both": (X, Y, {"attend": "both"}, ValueError, "pair 0.*channels.*3 and 5"),
    "sizes of both": (X, X[:, :, 1:], {"attend": "both"}, ValueError, "4x4 and 3x4"),
    "eps_mode": (X, Y, {"eps_mode": "clamp"}, ValueError, "eps_mode must be 'max' or 'add'"),
    "p without absolute": (X, Y, {"absolute": False, "p": 2.5}, ValueError, "whole number.*2.5"),
    "max without absolute": (
        X,
        Y,
        {"absolute": False, "p": 3, "collapse": "max"},
        ValueError,
        "collapse='max' takes absolute values",
    ),
    "skip_tokens of a map": (
        X,
        Y,
        {"skip_tokens": 1},
        ValueError,
        "token features.*channel_dim=-1",
    ),
    "map_size of a map": (X, Y, {"map_size": (4, 4)}, ValueError, "token features.*channel_dim=-1"),
    "skip_tokens negative": (
        X[:, 0],
        Y[:, 0],
        {"channel_dim": -1, "skip_tokens": -1},
        ValueError,
        "skip_tokens must be >= 0, got -1",
    ),
    "skip_tokens all": (
        X[:, 0],
        Y[:, 0],
        {"channel_dim": -1, "skip_tokens": 4},
        ValueError,
        "skip_tokens must leave a token of student, which has 4, got 4",
    ),
    "skip_tokens real": (
        X[:, 0],
        Y[:, 0],
        {"channel_dim": -1, "skip_tokens": 1.0},
        TypeError,
        "skip_tokens must be a whole number, got float",
    ),
    "map_size wrong": (
        X[:, 0],
        Y[:, 0],
        {"channel_dim": -1, "map_size": (3, 2)},
        ValueError,
        r"map_size must have.*has tokens behind skip_tokens, 4, got \(3, 2\)",
    ),
    "mask integers": (
        X,
        Y,
        {"mask": torch.ones(2, 4, 4, dtype=torch.int64)},
        TypeError,
        "mask must be float32, float16, bfloat16, float64 or bool, got torch.int64",
    ),
    "mask shape": (X, Y, {"mask": torch.ones(2, 1, 4, 4)}, ValueError, r"mask must be \(B, H, W\)"),
    "mask batch": (X, Y, {"mask": torch.ones(1, 4, 4)}, ValueError, r"mask must be.*\(1, 4, 4\)"),
    "masks": (X, Y, {"mask": [torch.ones(2, 4, 4)] * 2}, ValueError, "one per pair, got 2 for 1"),
    "mask device": (
        X,
        Y,
        {"mask": torch.ones(2, 4, 4, device="meta")},
        ValueError,
        "mask must be on the features' device, cpu, got meta",
    ),
    "resize of channels": (
        X,
        X,
        {"resize": "maps", "attend": "channel"},
        ValueError,
        "resize is for spatial attention, got attend='channel'",
    ),
    "map_size of channels": (
        TOKENS,
        TOKENS,
        {"channel_dim": -1, "map_size": (2, 2), "attend": "channel"},
        ValueError,
        "map_size is for spatial attention, got attend='channel'",
    ),
    "mask of all tokens": (
        TOKENS,
        TOKENS,
        {"channel_dim": -1, "skip_tokens": 1, "mask": torch.ones(2, 4)},
        ValueError,
        r"mask must be of the 3 tokens that skip_tokens=1 leaves, got 4; give mask\[:, 1:\]",
    ),
    "mask of channels": (
        X,
        X,
        {"mask": torch.ones(2, 4, 4), "attend": "channel"},
        ValueError,
        "mask is for attend='spatial', got attend='channel'",
    ),
    "sample_weights shape": (
        X,
        Y,
        {"sample_weights": torch.ones(3)},
        ValueError,
        r"sample_weights must be \(2,\), one for each sample of pair 0, got shape \(3,\)",
    ),
    "samples of two batches": (
        [X, X[:1]],
        [Y, Y[:1]],
        {"reduction": "sample"},
        ValueError,
        "one batch size, got 2 and, in pair 1, 1",
    ),
}


# Plain arguments go straight to the operator, and to the thorough checks where it refuses them.
# channel_dim=(1, 1) says what 1 does, and goes to the checks at once.
QUICK = ("p", "eps", "collapse", "form", "reduction", "eps_mode")
WRONG_OPTIONS = [(name, mistake) for name, several in mistakes.LOSS.items() for mistake in several]


def raised(student: Any, teacher: Any, **options: Any) -> tuple[type[Exception], str]:
    """The one error of both functions."""
    found = set()
    for function in (at_fused.at_loss, at_fused.at_value_and_grad):
        with pytest.raises((TypeError, ValueError)) as error:
            function(student, teacher, **options)
        found.add((error.type, str(error.value)))
    (one,) = found
    return one


def assert_same_error(student: Any, teacher: Any, **options: Any) -> tuple[type[Exception], str]:
    quick = raised(student, teacher, **options)
    assert quick == raised(student, teacher, channel_dim=(1, 1), **options)
    return quick


@pytest.mark.parametrize("case", CASES)
def test_at_loss(case: str) -> None:
    student, teacher, options, error, message = CASES[case]
    found = (raised if options else assert_same_error)(student, teacher, **options)
    assert issubclass(found[0], error)
    assert re.search(message, found[1])


@pytest.mark.parametrize(("name", "mistake"), WRONG_OPTIONS, ids=str)
def test_a_wrong_option(name: str, mistake: mistakes.Mistake) -> None:
    check = assert_same_error if name in QUICK else raised
    error, message = check(X, Y, **{name: mistake.of([1.0] if name == "weights" else 2.0)})
    assert issubclass(error, mistake.error)
    assert re.search(mistake.message, message)


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="power"):
        at_fused.at_loss(X, Y, power=2)
    with pytest.raises(TypeError, match="positional"):
        at_fused.at_loss(X, Y, 2)


OF_ONE_FEATURE: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([X], {}, TypeError, "x must be a tensor, got list"),
    (X[0, 0, 0], {}, ValueError, r"x must be \(B, C, H, W\).*\(4,\)"),
    (X.int(), {}, TypeError, "x must be float32.*got torch.int32"),
    (X, {"collapse": "max of all"}, ValueError, "collapse must be"),
    (X, {"channel_dim": 2}, ValueError, "channel_dim must be 1 or -1, got 2"),
    (X, {"p": 0}, ValueError, "p must be"),
    (X, {"eps": 0.0}, ValueError, "eps must be"),
    (X, {"skip_tokens": 1}, ValueError, "skip_tokens is for token features"),
    (X, {"attend": "channel", "map_size": (4, 4)}, ValueError, "map_size is for spatial"),
    (TOKENS, {"channel_dim": (1, -1)}, ValueError, "must be one value each"),
    (TOKENS, {"channel_dim": -1, "skip_tokens": (1, 1)}, ValueError, "must be one value each"),
    (TOKENS, {"channel_dim": -1, "skip_tokens": (1, 2)}, ValueError, "must be one value each"),
    (TOKENS, {"channel_dim": -1, "map_size": ((2, 2), None)}, ValueError, "must be one value each"),
    (X, {"normalize": "no"}, TypeError, "normalize must be True or False"),
    (X, {"attend": "all"}, ValueError, "attend must be 'spatial' or 'channel', got 'all'$"),
    (X, {"attend": "both"}, ValueError, "attend must be 'spatial' or 'channel', got 'both'$"),
    (X, {"normalize": 1}, TypeError, "normalize must be True or False"),
    (X, {"normalize": None}, TypeError, "normalize must be True or False"),
    (X, {"normalize": False, "eps": 0.1}, ValueError, "eps and eps_mode are for normalize=True"),
]


@pytest.mark.parametrize("function", [at_fused.at, at_fused.attention_map, at_fused.attention_tap])
@pytest.mark.parametrize(("x", "options", "error", "message"), OF_ONE_FEATURE)
def test_maps(
    function: Any, x: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if function is at_fused.at and not options.keys() <= {"collapse", "channel_dim", "p", "eps"}:
        error, message = TypeError, "unexpected keyword argument"
    with pytest.raises(error, match=message):
        function(x, **options)


def test_module_checks_its_options_when_made() -> None:
    with pytest.raises(ValueError, match="form must be"):
        at_fused.ATLoss(form="letter")
    with pytest.raises(TypeError, match="p must be a number"):
        at_fused.ATLoss(p=None)
    with pytest.raises(TypeError, match="weights must be a list or tuple"):
        at_fused.ATLoss(weights="ab")
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite, got nan"):
        at_fused.ATLoss(weights=[1.0, float("nan")])


def test_use_backend() -> None:
    for wrong, got in (("gpu", "'gpu'"), (None, "None"), (["eager"], r"\['eager'\]")):
        with pytest.raises(ValueError, match=rf"name must be 'auto', .* or 'eager', got {got}"):
            at_fused.use_backend(wrong)


# ---- the quick way of ordinary calls -------------------------------------------------------------

OTHERS: dict[str, tuple[Any, Any]] = {
    "1x48 against 6x8": (torch.randn(2, 3, 1, 48), torch.randn(2, 3, 6, 8)),
    "6x8 against 8x6": (torch.randn(2, 3, 6, 8), torch.randn(2, 3, 8, 6)),
    "batch of 1 in the second pair": ([X, X[:1]], [Y, Y]),
    "a set": ({X}, {Y}),
    "a generator": ((x for x in [X]), (y for y in [Y])),
    "a dict": ({"a": X}, {"a": Y}),
    "arrays": ([X.numpy()], [Y.numpy()]),
    "an array and a tensor": ([X, X.numpy()], [Y, Y]),
    "nested": ([[X]], [[Y]]),
    "a stack for a list": (torch.stack([X, X]), [Y, Y]),
    "meta in a list": ([X, X.to("meta")], [Y, Y]),
    "both sparse": (X.to_sparse(), Y.to_sparse()),
    "nested tensors": (torch.nested.nested_tensor([X[0], X[1]]), Y),
}


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "mistake", mistakes.FEATURE + mistakes.LISTED_FEATURE + mistakes.RANKED_FEATURE, ids=str
)
def test_a_wrong_feature_the_quick_way(
    fast_backend: str, mistake: mistakes.Mistake, side: int
) -> None:
    pair = [X, Y]
    pair[side] = mistake.of(pair[side])
    listed = [[X, pair[0]], [Y, pair[1]]]
    error, message = assert_same_error(*listed)
    assert issubclass(error, mistake.error)
    named = mistake.message.format(name=rf"{('student', 'teacher')[side]}\[1\]", i=1)
    assert re.search(named, message)
    if isinstance(pair[side], torch.Tensor):
        assert_same_error(*pair)


@pytest.mark.parametrize("case", OTHERS)
def test_wrong_features_the_quick_way(case: str) -> None:
    student, teacher = OTHERS[case]
    assert_same_error(student, teacher)


def test_both_ways_give_the_same(backend: str) -> None:
    s = torch.nn.Parameter(X.clone())
    for student, teacher, options in (
        (s, Y, {}),
        ((s, s), [Y, Y], {"reduction": "none", "p": 3}),
        ([s], (Y.double(),), {"form": "paper", "eps": 1}),
        ([s, s[:, :, ::2]], [Y, Y[:, :, ::2]], {"reduction": "sample", "eps_mode": "add"}),
        (s, Y, {"collapse": "max"}),
    ):
        losses = [
            at_fused.at_loss(student, teacher, **options, **more)
            for more in ({}, {"channel_dim": (1, 1)})
        ]
        assert torch.equal(*losses)
        assert torch.equal(*(torch.autograd.grad(loss.sum(), s)[0] for loss in losses))


@pytest.mark.parametrize("more", [{}, {"channel_dim": (1, 1)}], ids=str)
def test_a_single_position_warns_once_either_way(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(at_fused._inputs, "_single_position_warned", False)
    s, t = X[:, :, :1, :1], Y[:, :, :1, :1]
    with pytest.warns(at_fused.AtFusedWarning, match="pair 1 has maps of a single position") as w:
        loss = at_fused.at_loss([X, s], [Y, t], reduction="none", **more)
    assert len(w) == 1
    assert w[0].filename == __file__
    assert loss[1] == 0
    at_fused.at_loss(s, t, **more)  # a second warning would be an error here


@pytest.mark.parametrize(
    ("channel_dim", "option", "message"),
    [
        (-1, {"map_size": [3, 3.0]}, r"must be one to three.*got \[3, 3.0\], in which 3.0 is none"),
        (-1, {"map_size": ((2, 2), 4)}, "must be one to three whole numbers > 0, got 4"),
        ((1, -1), {"skip_tokens": (1, 0)}, r"=-1 \(here \(1, -1\)\), got skip_tokens=\(1, 0\)"),
        ((-1, 1), {"map_size": (None, (4, 4))}, r"got map_size=\(None, \(4, 4\)\)"),
        (-1, {"skip_tokens": (1, 1)}, r"features \(B, N, C\), which student has not, got .*1\)"),
        (-1, {"map_size": ((2, 2), None)}, r"which student has not, got map_size=\(\(2, 2\)"),
    ],
    ids=str,
)
def test_options_of_tokens(channel_dim: Any, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{min(option)} .*{message}"):
        at_fused.at_loss([X, X], [Y[:, 0], Y], channel_dim=channel_dim, **option)


def test_lists_of_lists_of_maps_are_refused() -> None:
    q = torch.rand(2, 4, 4)
    with pytest.raises(TypeError, match=r"student\[0\] must be a tensor, got list"):
        at_fused.map_loss([[q, q]], [q, q])

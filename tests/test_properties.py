"""Generated calls of the public functions, on every back end, against float64 (oracle.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mistakes
import oracle
import pytest
import torch
from cases import Call, both, distances, logits, losses, maps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistakes import Mistake
from oracle import MAP_ROUNDING, Reference, assert_gradient, assert_value
from torch import Tensor

import at_fused

OPTIONS: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}
SCALE = 2.0**8
PLACES = ("channel_dim", "skip_tokens", "map_size")


def strides(x: Tensor) -> list[int]:
    """Those that say anything."""
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def check_loss(call: Call) -> None:
    """Value and gradients of ``at_loss``, and the same in one pass."""
    leaves = [x.make() for x in call.leaves]
    options = call.tensor_options()
    students, teachers = call.sides(leaves)
    loss = at_fused.at_loss(call.given(students), call.given(teachers), **options)
    wide = any(x.dtype == torch.float64 for x in (*students, *teachers))
    assert loss.dtype == (torch.float64 if wide else torch.float32)

    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * SCALE
    known = oracle.Options(**options)
    reference = Reference(leaves)
    right = oracle.at_loss(*reference.sided(call.sides), known, upstream, reference.bounds)
    assert_value(loss, right)
    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    assert loss.requires_grad == bool(wanted)
    uses = [f.leaf for f in (*call.student, *call.teacher)] * (1 + (known.attend == "both"))
    if wanted:
        found = torch.autograd.grad(loss, [leaves[i] for i in wanted], upstream)
        compare(reference, wanted, found, right.value, upstream, [uses.count(i) for i in wanted])

    # Each feature by itself, whatever else it is.
    alone = [x.detach() for x in (*students, *teachers)]
    n = len(students)
    value, gradients = at_fused.at_value_and_grad(alone[:n], alone[n:], scale=SCALE, **options)
    reference = Reference(alone)
    above = torch.full(loss.shape, SCALE)

    def split(x: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return x[:n], x[n:]

    right = oracle.at_loss(*reference.sided(split), known, above, reference.bounds)
    assert_value(value, right)
    for x, g in zip(alone, gradients, strict=False):
        assert g.dtype == x.dtype
        if known.attend == "spatial" and not known.skip_tokens and 0 not in x.stride():
            assert strides(g) == strides(torch.empty_like(x))
    compare(reference, range(n), gradients, right.value, above, [1 + (known.attend == "both")] * n)


def compare(
    reference: Reference,
    which: Sequence[int],
    found: Sequence[Tensor],
    value: Tensor,
    upstream: Tensor,
    uses: Sequence[int],
) -> None:
    right = torch.autograd.grad(value, [reference.doubles[i] for i in which], upstream.double())
    errors = torch.autograd.grad(reference.bounds.total, [reference.sizes[i] for i in which])
    for g, r, e, n in zip(found, right, errors, uses, strict=True):
        assert_gradient(g, r, e + reference.bounds.floor, n)


def check_map(call: Call) -> None:
    """Value and gradient of ``attention_map``."""
    leaves = [x.make() for x in call.leaves]
    q = at_fused.attention_map(leaves[0], **call.options)
    reference = Reference(leaves)
    options = dict(call.options)
    normalized = options.pop("normalize")
    known = oracle.Options(**options)
    (x,), _ = reference.sided(lambda tensors: (tensors[:1], []))
    x = oracle.place(x, known.channel_dim, known.skip_tokens, known.map_size, reference.bounds)
    upstream = torch.linspace(-1, 2, q.numel(), dtype=q.dtype).view_as(q)
    right = oracle.attention_map(x, known, normalized, upstream, reference.bounds)
    assert q.dtype == (torch.float64 if leaves[0].dtype == torch.float64 else torch.float32)
    assert_value(q, right)
    if leaves[0].requires_grad and q.isfinite().all():
        (g,) = torch.autograd.grad(q, leaves, upstream)
        compare(reference, [0], [g], right.value, upstream, [1])


def check_tap(call: Call) -> None:
    """Taps and ``map_loss``, and what the next layer sends back beside them."""
    leaves = [x.make() for x in call.leaves]
    given = call.tensor_options()
    of_maps = ("p", "collapse", "absolute", "attend")
    shared = {name: given[name] for name in of_maps if name in given}
    of_loss = {k: v for k, v in given.items() if k not in (*of_maps, *PLACES)}
    if given["attend"] == "channel":
        of_loss["resize"] = None
    ys, qs = [], []
    for i, features in enumerate(call.sides(leaves)):
        place = {name: both(given[name])[i] for name in PLACES if name in given}
        taps = [at_fused.attention_tap(x, **shared, **place) for x in features]
        ys += [y for y, _ in taps]
        qs.append([q for _, q in taps])
    loss = at_fused.map_loss(call.given(qs[0]), call.given(qs[1]), **of_loss)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * SCALE
    known = oracle.Options(**given)
    reference = Reference(leaves)
    right = oracle.at_loss(*reference.sided(call.sides), known, upstream, reference.bounds)
    assert_value(loss, right)
    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    if not wanted:
        return
    # A gradient that comes from the next layer and is nobody else's: it is changed in place.
    torch.manual_seed(0)
    factors = [torch.randn(y.shape).to(y.dtype) for y in ys]
    nexts = [y * c for y, c in zip(ys, factors, strict=True) if y.requires_grad]
    found = torch.autograd.grad(
        [loss, *nexts], [leaves[i] for i in wanted], [upstream, *map(torch.ones_like, nexts)]
    )
    features = [x for side in reference.sided(call.sides) for x in side]
    straight = 0.0
    for x, c in zip(features, factors, strict=True):
        c = c.double()
        straight = straight + (x.value * c).sum()
        reference.bounds.total = (
            reference.bounds.total + (x.size * c.abs() * MAP_ROUNDING[False]).sum()
        )
    value = (right.value * upstream.double()).sum() + straight
    uses = [f.leaf for f in (*call.student, *call.teacher)]
    compare(reference, wanted, found, value, torch.ones(()), [2 * uses.count(i) for i in wanted])


def check_logits(call: Call) -> None:
    """``kd_loss``."""
    leaves = [x.make() for x in call.leaves]
    (s,), (t,) = call.sides(leaves)
    loss = at_fused.kd_loss(s, t, **call.options)
    right = oracle.kd_loss(s.detach(), t.detach(), **call.options)
    assert_value(loss, right.loss)
    # The teacher has no part in the loss where its term is left out.
    sides = (s, t) if call.options["alpha"] > 0 else (s,)
    wanted = [x for x in sides if x.requires_grad]
    assert loss.requires_grad == bool(wanted)
    if s is t:
        return
    for x, g in zip(wanted, torch.autograd.grad(loss, wanted), strict=True) if wanted else ():
        assert_gradient(g, *(right.student if x is s else right.teacher))


def check_distance(call: Call) -> None:
    """``features_loss`` and ``gradient_at_loss``."""
    leaves = [x.make() for x in call.leaves]
    students, teachers = call.sides(leaves)
    of_gradients = call.options["form"] in ("paper", "squared", "code")
    function = at_fused.gradient_at_loss if of_gradients else at_fused.features_loss
    loss = function(call.given(students), call.given(teachers), **call.options)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    right = oracle.distance_loss(*call.sides(doubles), **call.options)
    assert_value(loss, right)
    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    if not wanted:
        return
    above = torch.ones_like(loss)
    found = torch.autograd.grad(loss, [leaves[i] for i in wanted], above)
    expected = torch.autograd.grad(right.value, [doubles[i] for i in wanted], above.double())
    uses = [f.leaf for f in (*call.student, *call.teacher)]
    for i, g, r in zip(wanted, found, expected, strict=True):
        # Of several gradients each is rounded.
        more = 1e-6 * r.abs() if uses.count(i) == 1 else 1e-2 * r.abs().max().expand(r.shape)
        assert_gradient(g, r, more)


# ---- what is generated ---------------------------------------------------------------------------

# What a call is drawn from, how it is checked, and its share of the cases.
CHECKS: dict[str, tuple[st.SearchStrategy[Call], Callable[[Call], None], float]] = {
    "losses": (losses(), check_loss, 1.0),
    "taps": (losses(of_maps=True), check_tap, 0.5),
    "maps": (maps(), check_map, 0.4),
    "logits": (logits(), check_logits, 0.4),
    "distances": (distances(), check_distance, 0.3),
}


def run(kind: str, count: float) -> None:
    """Checks that many calls, and as many of the kind's share."""
    calls, check, share = CHECKS[kind]

    @settings(max_examples=max(1, int(count * share)), **OPTIONS)
    @given(call=calls)
    def generated(call: Call) -> None:
        check(call)

    generated()


# Of the profile's number of examples: the others take longer.
SHARES = {"cpu": 0.5, "eager": 0.5, "simt-wide": 0.05, "simt-small": 0.05, "triton": 0.05}


# Plain PyTorch, whatever the back end.
PLAIN = ("logits", "distances")


@pytest.mark.parametrize("kind", PLAIN)
def test_generated_calls_of_plain_pytorch(kind: str) -> None:
    run(kind, settings.default.max_examples)


@pytest.mark.parametrize("kind", [kind for kind in CHECKS if kind not in PLAIN])
def test_generated_calls(backend: str, kind: str) -> None:
    run(kind, settings.default.max_examples * SHARES[backend])


# ---- mistakes ------------------------------------------------------------------------------------


def value_and_grad(*features: Any, **options: Any) -> Any:
    return at_fused.at_value_and_grad(*features, scale=2.0, **options)


# The functions, the mistakes in a tensor, and those in an option.
MISTAKES: dict[str, tuple[list[Any], list[Mistake], dict[str, list[Mistake]]]] = {
    "losses": (
        [at_fused.at_loss, value_and_grad],
        mistakes.FEATURE + mistakes.RANKED_FEATURE,
        mistakes.LOSS,
    ),
    "logits": ([at_fused.kd_loss], mistakes.OF_LOGITS, mistakes.LOGITS),
    "distances": ([at_fused.features_loss], mistakes.FEATURE, mistakes.DISTANCE),
}


def check_mistake(kind: str, call: Call, draw: Callable[[Any], Any]) -> None:
    """One thing is wrong, and the error names it."""
    functions, of_tensors, of_options = MISTAKES[kind]
    sides = [list(side) for side in call.sides([x.make() for x in call.leaves])]
    options = call.tensor_options()
    options = {name: options[name] for name in options if name != "form" or kind != "distances"}
    which = draw(st.sampled_from(["student", "teacher", *of_options]))
    names = {"name": which}
    if which in of_options:
        mistake = draw(st.sampled_from(of_options[which]))
        right = options.get(which)
        if which == "weights":
            right = right or [1.0] * len(sides[0])
        elif which == "labels":
            right = torch.zeros(len(sides[0][0]), dtype=torch.int64)
            options |= {"ignore_index": -100, "alpha": 0.5}
        elif which == "mask" and call.options["attend"] != "spatial":
            mistake = Mistake(mistake.wrong, ValueError, "mask is for attend='spatial'")
        options[which] = mistake.of(right)
    else:
        one = call.listed and kind != "logits"
        mistake = draw(st.sampled_from(of_tensors + mistakes.LISTED_FEATURE * one))
        side = sides[which == "teacher"]
        i = draw(st.integers(0, len(side) - 1))
        side[i] = mistake.of(side[i])
        names["name"] = rf"{which}\[{i}\]" if one else which + "_logits" * (kind == "logits")
    arguments = map(call.given, sides)
    function = draw(st.sampled_from(functions))
    with pytest.raises(mistake.error, match=mistake.message.format(**names)):
        function(*arguments, **options)


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_named(kind: str) -> None:
    calls, _, _ = CHECKS[kind]

    @settings(**OPTIONS)
    @given(call=calls, data=st.data())
    def generated(call: Call, data: st.DataObject) -> None:
        check_mistake(kind, call, data.draw)

    generated()

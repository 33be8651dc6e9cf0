"""Fuzzes the operators with invalid arguments.

    hostile.py SEED COUNT [BACKEND [NUMBER]]   runs COUNT random calls, from call NUMBER on
    hostile.py kept                            prints the memory that operators retain, as JSON

Arguments of valid calls are replaced by wrong, odd or huge values of the same type. A call must
raise an exception or return the result of plain PyTorch. Each call is printed before it runs, so
that a crash can be reproduced: ``hostile.py SEED 1 BACKEND NUMBER``.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from back_ends import ALL_BACKENDS, use
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import at_fused
from at_fused.backends import OPERATORS

warnings.simplefilter("ignore")
# The errors that wrong arguments may raise, here or in torch.
ERRORS = (RuntimeError, ValueError, TypeError, LookupError, MemoryError, OverflowError)
# Plain PyTorch would allocate results of 2^31 and 2^33 elements.
HUGE = (2**40, 2**62) if "eager" in sys.argv else (2**31, 2**33, 2**40, 2**62)
# AddressSanitizer aborts if memory runs out.
HUGE = (2**62,) if "asan" in os.environ.get("LD_PRELOAD", "") else HUGE


# ---- valid calls ---------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
CHANNELS = (1, 3, 5, 17, 40)


def feature(r: random.Random, b: int, spatial: tuple[int, ...], channels: Sequence[int]) -> Tensor:
    return torch.randn(b, r.choice(channels), *spatial).to(r.choice(DTYPES))


def map_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def map_for(x: Tensor, skip: int = 0) -> Tensor:
    return torch.randn(x.shape[0], math.prod(x.shape[2:]) - skip, dtype=map_dtype(x))


def channels_for(x: Tensor, skip: int = 0) -> Tensor:
    return torch.randint(x.shape[1], map_for(x, skip).shape, dtype=torch.int32)


def valid_call(name: str, r: random.Random, channels: Sequence[int] = CHANNELS) -> list[Any]:
    """Return random valid arguments of an operator."""
    b, n = r.randint(1, 4), r.randint(1, 3)
    sizes = [tuple(r.randint(1, 9) for _ in range(r.randint(1, 3))) for _ in range(n)]
    xs, ys = ([feature(r, b, size, channels) for size in sizes] for _ in range(2))
    x, p, collapse = xs[0], r.choice((1.0, 2.0, 2.5, 4.0)), r.choice(("mean", "sum"))
    upstream = r.choice((None, torch.randn(()), torch.randn(n), torch.randn(n, b)))
    skips = [r.randint(0, x.shape[2] - 1) if x.dim() == 3 else 0 for x in xs]
    skips = skips if r.random() < 0.5 else []
    each = list(zip(xs, skips or [0] * n, strict=True))
    if name == "attention_map":
        return [xs, p, r.choice((collapse, "max")), skips]
    if name == "attention_map_backward":
        argmax = [channels_for(*x) for x in each] if r.random() < 0.5 else []
        return [xs, [map_for(*x) for x in each], upstream, list(range(n)), p, skips, argmax]
    if name.startswith("attention_tap_backward"):
        maximum = r.random() < 0.3
        rest = ("max", channels_for(x)) if maximum else (collapse, None)
        return [torch.randn_like(x), x, map_for(x), p, *rest]
    weights = r.choice(([], [1.0] * n, [-0.5] * n))
    options = r.choice(("code", "paper")), r.choice(("sum", "none", "sample"))
    options += r.choice(("max", "add")), 1e-12
    flags = r.random() < 0.5, r.random() < 0.5
    if name == "map_loss":
        maps = [[map_for(x) for x in xs] for _ in range(2)]
        return [*maps, weights, *options, *flags]
    masks = [
        torch.rand(map_for(*x).shape, dtype=torch.promote_types(map_dtype(x[0]), map_dtype(y)))
        for x, y in zip(each, ys, strict=True)
    ]
    rest = flags if name == "at_loss" else (2.0, upstream)
    return [xs, ys, r.choice(([], masks)), weights, skips * 2, p, collapse, *options, *rest]


# ---- wrong arguments -----------------------------------------------------------------------------


def huge(x: Tensor, r: random.Random) -> Tensor:
    """Return a huge expanded tensor. Its size differs in one dimension, not in the channels."""
    d = r.choice([d for d in range(max(1, x.dim())) if d != 1])
    shape = [*x.shape[:d], r.choice(HUGE), *x.shape[d + 1 :]]
    return torch.ones(1, dtype=x.dtype).expand(shape)


SPECIAL = (math.nan, math.inf, -math.inf, 1e30, 65504.0, 1e-45, -0.0)
ODD: list[Callable[[Tensor, random.Random], Any]] = [
    lambda x, r: x.flatten(),
    lambda x, r: x.reshape(x.shape + (1,) * r.randint(1, 5)),
    lambda x, r: x.flatten(1) if x.dim() > 1 else x,
    lambda x, r: x[:0],
    lambda x, r: x[..., :0],
    lambda x, r: torch.cat([x, x]),
    lambda x, r: x.to(r.choice((torch.int64, torch.int32, torch.uint8, torch.bool, torch.int8))),
    lambda x, r: x.to(r.choice((torch.complex64, torch.complex128))),
    lambda x, r: x.to(r.choice(DTYPES)),
    lambda x, r: x.to(torch.float8_e5m2) if x.is_floating_point() else x,
    lambda x, r: x.to_sparse(),
    lambda x, r: x.float().to_mkldnn(),
    lambda x, r: torch.nested.nested_tensor([x, x[:1]]) if x.dim() else x,
    lambda x, r: x.to("meta"),
    lambda x, r: x.detach().requires_grad_() if x.is_floating_point() else x,
    # Overlapping: every stride is 1.
    lambda x, r: torch.randn(sum(x.shape) + 1).to(x).as_strided(x.shape, [1] * x.dim()),
    lambda x, r: x[:1].expand(x.shape) if x.dim() else x,
    lambda x, r: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    lambda x, r: x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x),
    lambda x, r: torch.full_like(x, r.choice(SPECIAL)) if x.is_floating_point() else x,
    lambda x, r: torch.full_like(x, r.choice((-1, 2**31 - 1, -(2**31), 99))),
    huge,
]
FLOATS = (*SPECIAL, 0.0, -1.0, 0.5, 1e308, 5e-324, 1e39, 3.0, 7.0)
INTS = (-1, 0, 1, 2, 7, 10**6, 2**31, 2**63 - 1, -(2**63), 2**63)
STRINGS = ("", "mean", "sum", "max", "none", "sample", "code", "paper", "add", "mean\0", "x" * 4096)


def wrong(value: Any, kind: str, r: random.Random) -> Any:
    """Return another value of an argument's type, which the operator may not accept."""
    if isinstance(value, Tensor):
        return r.choice(ODD)(value, r)
    if isinstance(value, list):
        return wrong_list(value, kind, r)
    if isinstance(value, bool):
        return not value
    if "Tensor" in kind:  # the value is None
        return r.choice((torch.randn(()), torch.randn(3), torch.zeros(4, dtype=torch.int64)))
    return r.choice({"float": FLOATS, "int": INTS, "str": STRINGS}[kind])


def wrong_list(values: list[Any], kind: str, r: random.Random) -> list[Any]:
    if not values and "Tensor" in kind:
        return values
    values = values or [1]
    i = r.randrange(len(values))
    kind = "Tensor" if "Tensor" in kind else "float" if "float" in kind else "int"
    changed = [*values[:i], wrong(values[i], kind, r), *values[i + 1 :]]
    return r.choice(([], values[:-1], values * r.choice((2, 23)), changed, changed, changed))


def overlap(arguments: list[Any], r: random.Random) -> None:
    """Replace two tensors by overlapping views of one storage."""
    candidates = [
        i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.dtype == torch.float
    ]
    if len(candidates) < 2:
        return
    chosen = r.sample(candidates, 2)
    memory = torch.randn(max(arguments[i].numel() for i in chosen) + 4)
    for i in chosen:
        begin, shape = r.randint(0, 4), arguments[i].shape
        arguments[i] = memory[begin : begin + shape.numel()].view(shape)


# ---- calls ---------------------------------------------------------------------------------------


def hostile_call(name: str, r: random.Random) -> list[Any]:
    arguments = valid_call(name, r)
    kinds = [str(a.type) for a in getattr(torch.ops.at_fused, name).default._schema.arguments]
    if r.random() < 0.15:
        overlap(arguments, r)
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        i = r.randrange(len(arguments))
        try:
            arguments[i] = wrong(arguments[i], kinds[i], r)
        except ERRORS:
            continue  # torch cannot create such a tensor
    return arguments


def tensors_of(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def results_of(name: str, arguments: list[Any]) -> list[Tensor] | Exception:
    """Return the results of a call and its gradients, or the exception that it raises."""
    try:
        output = getattr(torch.ops.at_fused, name).default(*arguments)
        results = tensors_of(arguments[0] if output is None else output)
        leaves = [x for x in tensors_of(arguments) if x.requires_grad and x.is_leaf]
        roots = [x.double().sum() for x in results if x.requires_grad]
        if leaves and roots:
            total = torch.stack(roots).sum()
            results += tensors_of(torch.autograd.grad(total, leaves, allow_unused=True))
        return [x.detach() for x in results]
    except ERRORS as error:
        return error


def differ(results: list[Tensor], expected: list[Tensor]) -> bool:
    """Return True if results differ. Non-finite ones are ignored: sums of infinities vary."""
    if [(x.shape, x.dtype) for x in results] != [(x.shape, x.dtype) for x in expected]:
        return True
    for x, y in zip(results, expected, strict=True):
        if x.numel() and not (x.is_meta or y.is_meta):
            bound = 0.02 * y.double().abs().max() + 1e-6
            error = (x.double() - y.double()).abs().max()
            if x.isfinite().all() and bound.isfinite() and error > bound:
                return True
    return False


def described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:40]
    kind = f"{value.dtype} {value.device} {value.layout}{' grad' * value.requires_grad}"
    if value.is_nested or value.layout is not torch.strided:
        return kind
    return f"{kind} {tuple(value.shape)}/{value.stride()}"


def matches_eager(i: int, seed: int) -> bool | None:
    """Return True if call ``i`` gives the results of plain PyTorch, None if it raises."""
    r = random.Random(f"{seed}/{i}")
    torch.manual_seed(r.randrange(2**31))
    name = r.choice(OPERATORS)
    arguments = hostile_call(name, r)
    print(f"{i}: {name}({tree_map(described, arguments)})", flush=True)
    try:
        duplicate = copy.deepcopy(arguments)
    except ERRORS:
        duplicate = None
    results = results_of(name, arguments)
    if isinstance(results, Exception) or duplicate is None:
        return None
    with at_fused.use_backend("eager"):
        expected = results_of(name, duplicate)
    if isinstance(expected, Exception) or not differ(results, expected):
        return True
    print(f"   WRONG {results}, expected {expected}", flush=True)
    return False


def main(seed: int, count: int, backend: str = "cpu", first: int = 0) -> int:
    with use(backend):
        matches = [matches_eager(i, seed) for i in range(first, first + count)]
    raised, wrong_results = matches.count(None), matches.count(False)
    print(f"{count} calls of {backend}, {raised} raised, {wrong_results} wrong", flush=True)
    return bool(wrong_results)


def retained_bytes() -> dict[str, int]:
    """Return the bytes that each operator's first call retains, besides its outputs."""
    retained = {}
    for name in OPERATORS:
        arguments = valid_call(name, random.Random(0))
        result = None  # frees the previous result outside the profile
        with torch.profiler.profile(profile_memory=True) as profile:
            result = getattr(torch.ops.at_fused, name)(*arguments)
            gc.collect()  # Triton's interpreter leaves reference cycles
        retained[name] = sum(event.self_cpu_memory_usage for event in profile.events())
        retained[name] -= sum(x.nbytes for x in tensors_of(result))
    return retained


if __name__ == "__main__":
    if sys.argv[1:] == ["kept"]:
        retained = {}
        for name in ALL_BACKENDS:
            with use(name):
                retained[name] = retained_bytes()
        print(json.dumps(retained))
        sys.exit()
    seed, count, *rest = sys.argv[1:]
    sys.exit(main(int(seed), int(count), *rest[:1], *map(int, rest[1:])))

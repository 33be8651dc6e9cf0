"""Compiles the Triton kernels ahead of time without a GPU.

    python tests/support/triton_compile.py [--everything]   registers, spills and widths, as JSON
    python tests/support/triton_compile.py --kernels        compilations per kernel, as JSON

Needs Triton without TRITON_INTERPRET. It intercepts the launches of real calls of the back end.
Triton's own binder decides how the arguments specialise a kernel.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from reference import loss_arguments
from torch import Tensor
from triton.backends.compiler import GPUTarget

from at_fused.backends import triton as backend
from at_fused.backends.triton import launch
from at_fused.backends.triton.maps import new_map

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Call(NamedTuple):
    """An intercepted launch."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def launches_of(function: Callable[[], object]) -> list[Call]:
    """Return the launches of a call of the back end, without running them."""
    calls: list[Call] = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        calls.append(Call(kernel, programs, arguments, constants))

    with mock.patch.multiple(launch, start=record, on_device=lambda _: nullcontext()):
        function()
    return calls


def set_target(target: GPUTarget) -> None:
    """Install a driver that is sufficient to compile for a target."""
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    triton.runtime.driver.set_active(driver)


def compiled(call: Call, target: GPUTarget) -> Any:
    """Return Triton's compiled kernel for a launch."""
    set_target(target)
    call.kernel.device_caches.clear()
    options = launch.options(cuda=target.backend == "cuda")
    return call.kernel.warmup(*call.arguments, grid=(call.programs,), **call.constants, **options)


def specialisation(call: Call) -> str:
    """Return the part of a launch's arguments that Triton compiles a kernel for."""
    binder = call.kernel.device_caches[0][-1]
    return str(binder(*call.arguments, **call.constants)[1])


# ---- figures: spills in bytes, widths of accesses in bits ----------------------------------------


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.check_output([str(path), *arguments], text=True)


def _sass_bits(modifiers: str) -> int:
    # LDG.E, LDG.E.128.CONSTANT, LDG.E.U16, STG.E.ENL2.256
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
    return int(width[1]) if width else 32


def _cuda_figures(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return {
        "registers": registers,
        "spills": stack + local,
        "loads": Counter(map(_sass_bits, re.findall(r"\bLDG(\.[\w.]+)", sass))),
        "stores": Counter(map(_sass_bits, re.findall(r"\bSTG(\.[\w.]+)", sass))),
    }


def _hip_bits(kind: str) -> int:
    dwords = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    return 8 if kind in ("ubyte", "sbyte", "byte") else dwords.get(kind, 16)


def _hip_figures(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    access = r"\b(?:global|buffer|flat)_{}_(\w+?)(?:_d16\w*)?\b"
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        # Scalar registers spill into vector registers, which is cheap. Only private memory counts.
        "spills": int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1]),
        "loads": Counter(map(_hip_bits, re.findall(access.format("load"), text))),
        "stores": Counter(map(_hip_bits, re.findall(access.format("store"), text))),
    }


def row(variant: Variant, call: Call, target: str) -> dict[str, Any]:
    """Compile a variant for one of ``TARGETS`` and return its figures."""
    kernel = compiled(call, TARGETS[target])
    figures = _hip_figures if TARGETS[target].backend == "hip" else _cuda_figures
    return {
        "variant": variant.name,
        "operator": variant.operator,
        "wide": variant.wide,
        "target": target,
        "shared": kernel.metadata.shared,
        **figures(kernel),
    }


# ---- variants ------------------------------------------------------------------------------------

LARGE, SMALL, ODD = (32, 256, 56, 56), (128, 64, 8, 8), (64, 511, 7, 7)
TOKENS, FAR = (32, 192, 197), (1, 257, 56, 56)
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
LAYOUTS = "planar", "interleaved"


class Variant(NamedTuple):
    """A call of an operator that launches one kernel."""

    operator: str
    dtype: torch.dtype = FP32
    layout: str = "planar"
    p: float = 2.0
    shape: tuple[int, ...] = LARGE  # FAR has offsets over 31 bits; with TOKENS one token is skipped
    pairs: int = 1
    collapse: str = "mean"
    reduction: str = "sum"
    eps_mode: str = "max"
    masked: bool = False

    @property
    def name(self) -> str:
        """The fields that differ from the defaults."""
        default = self._field_defaults.get
        return ", ".join(f"{k}={v}" for k, v in self._asdict().items() if v != default(k))

    @property
    def wide(self) -> tuple[bool, bool]:
        """Pair of flags: features are read, and gradients written, by 128 bits."""
        # With "max" the gradient accesses argmax channels only.
        aligned, dense = self.shape != ODD, self.collapse != "max"
        loads, stores = {
            "map": (True, False),
            "loss": (True, False),
            "value and gradient": (True, True),
            "backward": (dense, dense),
            "tap": (dense, dense),
            "map loss": (False, False),
        }[self.operator]
        return aligned and loads, aligned and stores

    def feature(self) -> Tensor:
        """Return a feature of the shape and layout, not initialised."""
        b, c, h, *more = self.shape  # h is the number of tokens in three dimensions
        w = math.prod(more)
        if self.shape == FAR:
            far = torch.empty(2**31 + h * w * c, dtype=self.dtype)
            line = 2**31 // (c - 1)
            return far.as_strided(self.shape, (c * h * w, line, w, 1))
        if self.layout == "planar":
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.empty(b, h, *more, c, dtype=self.dtype).movedim(-1, 1)

    def call(self) -> Call:
        """Return the launch of the operator."""
        s, t = ([self.feature() for _ in range(self.pairs)] for _ in range(2))
        skip = int(self.shape == TOKENS)
        maps = [new_map(x[:, :, skip:]) for x in s]
        upstream = maps[0].new_empty((len(s), len(s[0])) if self.reduction == "sample" else ())
        calls = operators(
            s,
            t,
            maps,
            upstream,
            p=self.p,
            collapse=self.collapse,
            skips=[1] * skip,
            argmax=[q.to(torch.int32) for q in maps] if self.collapse == "max" else [],
            masks=maps if self.masked else (),
            reduction=self.reduction,
            eps_mode=self.eps_mode,
        )
        (call,) = launches_of(calls[self.operator])
        return call


def operators(
    s: list[Tensor],
    t: list[Tensor],
    maps: list[Tensor],
    upstream: Tensor,
    p: float = 2.0,
    collapse: str = "mean",
    skips: Sequence[int] = (),
    argmax: Sequence[Tensor] = (),
    scale: float = 1.0,
    **options: Any,
) -> dict[str, Callable[[], object]]:
    """Return calls of all operators. The tap takes the first teacher as gradient."""
    pairs = list(range(len(s)))
    arguments = loss_arguments(s, t, skip_tokens=[*skips, *skips], p=p, **options)
    pair_options = arguments[3], *arguments[-4:]
    tapped = t[0], s[0], maps[0], p, collapse, *argmax
    return {
        "map": lambda: backend.attention_map(s, p, collapse, skips),
        "loss": lambda: backend.at_loss(*arguments, True, False),
        "backward": lambda: backend.attention_map_backward(
            s, maps, upstream, pairs, p, skips, argmax
        ),
        "tap": lambda: backend.attention_tap_backward_(*tapped),
        "value and gradient": lambda: backend.at_value_and_grad(*arguments, scale, upstream),
        "map loss": lambda: backend.map_loss(maps, maps, *pair_options, True, False),
    }


def variants() -> Iterator[Variant]:
    """Yield the variants to compile: operators, dtypes, layouts, exponents and options."""
    for operator in ("map", "loss", "backward", "value and gradient"):
        shape = SMALL if operator == "value and gradient" else LARGE
        for layout, dtype in product(LAYOUTS, (FP32, BF16)):
            yield Variant(operator, dtype, layout, shape=shape)
        yield Variant(operator, p=2.5, shape=shape)
        for dtype in (FP32, BF16):
            yield Variant(operator, dtype, "interleaved", shape=TOKENS)
    for operator in ("loss", "backward"):
        yield Variant(operator, FP16)
        yield Variant(operator, FP64)
        yield Variant(operator, layout="interleaved", p=2.5)
        for layout in LAYOUTS:
            yield Variant(operator, layout=layout, shape=ODD)
    yield Variant("backward", BF16, reduction="sample")
    yield Variant("backward", BF16, shape=FAR)
    yield Variant("value and gradient", BF16, shape=SMALL, pairs=4)
    yield Variant("loss", p=2.5, pairs=4)
    yield Variant("loss", BF16, p=1.0)
    yield Variant("loss", FP64, p=2.5)
    for operator in ("loss", "value and gradient"):
        last = Variant(operator, FP64, p=2.5, shape=SMALL, reduction="sample", eps_mode="add")
        yield last._replace(masked=True)
        yield last._replace(dtype=BF16, p=2.0, masked=True)
        yield Variant(operator, BF16, shape=SMALL, masked=True)
        yield Variant(operator, BF16, shape=SMALL, eps_mode="add")
        yield Variant(operator, BF16, shape=SMALL, reduction="sample")
    for operator in ("map", "backward", "tap"):
        for layout, dtype in product(LAYOUTS, (FP32, BF16, FP64)):
            yield Variant(operator, dtype, layout, collapse="max")
        yield Variant(operator, p=2.5, collapse="max")
        yield Variant(operator, shape=ODD, collapse="max")
    for layout in LAYOUTS:
        for dtype in (FP32, BF16, FP64):
            yield Variant("tap", dtype, layout)
        yield Variant("tap", layout=layout, p=2.5)
        yield Variant("tap", layout=layout, shape=ODD)
    yield Variant("tap", FP16)
    yield Variant("tap", FP64, p=2.5)
    for collapse in ("mean", "max"):
        yield Variant("tap", BF16, shape=FAR, collapse=collapse)
    for eps_mode, reduction in product(("max", "add"), ("sum", "sample")):
        yield Variant("map loss", reduction=reduction, eps_mode=eps_mode)
    yield Variant("map loss", reduction="none", shape=ODD, pairs=4)


# ---- compilations per kernel ---------------------------------------------------------------------

STAGES = {  # (channels, height) of both sides
    "three stages of a WRN": ((32, 32), (64, 16), (128, 8)),
    "one stage of a ResNet": ((64, 56),),
    "four stages of a ResNet": ((256, 56), (512, 28), (1024, 14), (2048, 7)),
}


def step(stages: tuple[tuple[int, int], ...], batch: int) -> dict[str, Callable[[], object]]:
    """Return calls of the operators. All that may vary between steps depends on ``batch``."""
    s, t = ([torch.empty(batch, c, size, size) for c, size in stages] for _ in range(2))
    # The alignment of the loss gradient varies with the batch. It is expanded from one element.
    upstream = torch.empty(2 * batch)[batch - 1].expand(len(s))
    weights = [(batch - 1) / (3 + i) for i in range(len(s))]
    numbers = {"weights": weights, "eps": batch * 1e-9, "scale": 2.0 ** (batch - 1)}
    return operators(s, t, [new_map(x) for x in s], upstream, reduction="none", **numbers)


def kernels() -> dict[str, int]:
    """Count the compilations of each kernel over batch sizes that Triton may specialise on."""
    set_target(TARGETS["sm_90"])
    keys: dict[str, set[str]] = {}
    for name, stages in STAGES.items():
        for batch in (*range(1, 20), 31, 32, 33, 64, 96, 127, 128, 129, 256, 1024):
            for operator, call in step(stages, batch).items():
                for launched in launches_of(call):
                    kernel = f"{operator} of {name}, {launched.kernel.fn.__name__}"
                    keys.setdefault(kernel, set()).add(specialisation(launched))
    return {name: len(each) for name, each in keys.items()}


def rows(everything: bool) -> Iterator[dict[str, Any]]:
    """Yield the figures of every variant for every target, or for one CUDA target and gfx942."""
    cuda = [target for target in TARGETS if target != "gfx942"]
    for number, variant in enumerate(variants()):
        call = variant.call()
        for target in TARGETS if everything else (cuda[number % len(cuda)], "gfx942"):
            yield row(variant, call, target)


if __name__ == "__main__":
    figures = kernels() if "--kernels" in sys.argv else list(rows("--everything" in sys.argv))
    print(json.dumps(figures, indent=1))

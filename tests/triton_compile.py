"""Compiles the Triton kernels ahead of time, as the back end would launch them, without a GPU.

    python tests/triton_compile.py > table.md
    python tests/triton_compile.py --json [--everything] > rows.json
    python tests/triton_compile.py --kernels

Needs Triton without TRITON_INTERPRET. The arguments are those of real calls of the back end, whose
launches are caught; Triton's own binder then decides what they are specialised on.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from reference import loss_arguments
from torch import Tensor
from triton.backends.compiler import GPUTarget

from at_fused.backends import triton as backend
from at_fused.backends.results import accumulate_dtype
from at_fused.backends.triton import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Call(NamedTuple):
    """A launch that was caught."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Row(NamedTuple):
    """What one kernel compiled to; spills are in bytes, widths the bits of each access."""

    variant: str
    operator: str
    wide_loads: bool
    wide_stores: bool
    target: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


def caught(function: Callable[[], object]) -> list[Call]:
    """The launches that a call of the back end makes; none of them runs."""
    calls: list[Call] = []

    def catch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        calls.append(Call(kernel, programs, arguments, constants))

    saved = launch.start, launch.interpreted
    launch.start, launch.interpreted = catch, lambda: True
    try:
        function()
    finally:
        launch.start, launch.interpreted = saved
    return calls


class _Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(call: Call, target: GPUTarget) -> Any:
    """Triton's compiled kernel for a launch."""
    triton.runtime.driver.set_active(_Driver(target))
    call.kernel.device_caches.clear()
    options = launch.options(cuda=target.backend == "cuda")
    return call.kernel.warmup(*call.arguments, grid=(call.programs,), **call.constants, **options)


def specialized(call: Call) -> str:
    """The part of a launch that Triton compiles for."""
    *_, binder = call.kernel.device_caches[0]
    _, found, _ = binder(*call.arguments, **call.constants)
    return str(found)


# ---- what came out -------------------------------------------------------------------------------


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(path), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _widths(pattern: str, text: str, bits: Callable[[re.Match[str]], int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for match in re.finditer(pattern, text):
        width = bits(match)
        found[width] = found.get(width, 0) + 1
    return dict(sorted(found.items()))


def _sass_bits(match: re.Match[str]) -> int:
    # LDG.E, LDG.E.128.CONSTANT, LDG.E.U16, STG.E.ENL2.256
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", match[0])
    return int(width[1]) if width else 32


def _cuda_row(variant: Variant, target: str, kernel: Any) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Row(
        variant.name,
        variant.operator,
        variant.wide_loads,
        variant.wide_stores,
        target,
        registers,
        stack + local,
        kernel.metadata.shared,
        _widths(r"\bLDG\.[\w.]+", sass, _sass_bits),
        _widths(r"\bSTG\.[\w.]+", sass, _sass_bits),
    )


def _hip_bits(match: re.Match[str]) -> int:
    name = match[1]
    if name in ("ubyte", "sbyte", "byte"):
        return 8
    return {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}.get(name, 16)


def _hip_row(variant: Variant, target: str, kernel: Any) -> Row:
    text = kernel.asm["amdgcn"]
    # Scalar registers spill into lanes of vector registers; private memory is the one that costs.
    number = {
        name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
    }
    kind = r"\b(?:global|buffer|flat)_{}_(\w+?)(?:_d16\w*)?\b"
    return Row(
        variant.name,
        variant.operator,
        variant.wide_loads,
        variant.wide_stores,
        target,
        number["vgpr_count"],
        number["private_segment_fixed_size"],
        kernel.metadata.shared,
        _widths(kind.format("load"), text, _hip_bits),
        _widths(kind.format("store"), text, _hip_bits),
    )


def row(variant: Variant, call: Call, target: str) -> Row:
    """Compiles a variant for one of ``TARGETS``."""
    kernel = compiled(call, TARGETS[target])
    make = _hip_row if TARGETS[target].backend == "hip" else _cuda_row
    return make(variant, target, kernel)


# ---- variants ------------------------------------------------------------------------------------

OPERATORS = ("map", "loss", "backward", "value and gradient")  # of the plain options
LARGE, SMALL, ODD = (32, 256, 56, 56), (128, 64, 8, 8), (64, 511, 7, 7)
TOKENS = (32, 192, 197)
_SHORT = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


class Variant(NamedTuple):
    """A call of an operator that one kernel is compiled for."""

    operator: str
    dtype: torch.dtype = torch.float32
    layout: str = "planar"
    p: float = 2.0
    shape: tuple[int, ...] = LARGE  # of three, tokens (B, C, N), of which one is skipped
    pairs: int = 1
    wide: bool = False  # offsets within a sample beyond 31 bits
    collapse: str = "mean"
    reduction: str = "sum"
    eps_mode: str = "max"
    masked: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        size = "x".join(map(str, self.shape))
        times = f"{self.pairs} of " if self.pairs > 1 else ""
        wide = ", 64-bit offsets" if self.wide else ""
        kind = f"{_SHORT[self.dtype]} {self.layout}, p={self.p:g}"
        if self.operator == "map loss":
            kind = f"{self.reduction}, {self.eps_mode}"
            size = f"{self.shape[0]}x{math.prod(self.shape[2:])}"
        elif (self.reduction, self.eps_mode) != ("sum", "max"):
            kind += f", {self.reduction}, {self.eps_mode}"
        more = ", max" if self.collapse == "max" else ""
        more += ", mask" * self.masked
        return f"{self.operator}, {kind}{more}, {times}{size}{wide}"

    @property
    def aligned(self) -> bool:
        """Whether every line of the features begins on 16 bytes, and is taken as it lies."""
        return self.shape != ODD

    @property
    def wide_loads(self) -> bool:
        """Whether features are read by 128 bits: where all of them, and they alone, are."""
        if self.operator in ("tap", "backward"):
            return self.aligned and self.collapse != "max"
        return self.aligned and self.operator != "map loss"

    @property
    def wide_stores(self) -> bool:
        """Whether gradients are written by 128 bits."""
        if self.operator == "tap" and self.collapse == "max":
            return False  # the winners alone
        return self.aligned and self.operator in ("backward", "tap", "value and gradient")

    def feature(self) -> Tensor:
        """Memory that nobody reads."""
        b, c, h, *more = self.shape  # h are the tokens of three
        w = math.prod(more)
        if self.wide:
            far = torch.empty(2**31 + h * w * c, dtype=self.dtype)
            line = 2**31 // (c - 1)
            return far.as_strided(self.shape, (c * h * w, line, w, 1))
        if self.layout == "planar":
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.empty(b, h, *more, c, dtype=self.dtype).movedim(-1, 1)

    def call(self) -> Call:
        """The launch."""
        s, t = ([self.feature() for _ in range(self.pairs)] for _ in range(2))
        p, pairs = self.p, list(range(self.pairs))
        skip = int(len(self.shape) == 3)
        skips = [skip] * (self.pairs * skip)
        loss = torch.empty((), dtype=accumulate_dtype(*s))
        maps = [loss.new_empty(x.shape[0], math.prod(self.shape[2:]) - skip) for x in s]
        above = loss.new_empty(len(s), len(s[0])) if self.reduction == "sample" else loss
        arguments = loss_arguments(
            s,
            t,
            masks=maps if self.masked else (),
            skip_tokens=skips * 2,
            p=p,
            reduction=self.reduction,
            eps_mode=self.eps_mode,
        )
        winners = [q.to(torch.int32) for q in maps] if self.collapse == "max" else []
        pair_options = [], "code", self.reduction, self.eps_mode, 1e-12
        tapped = p, self.collapse, *winners
        calls: dict[str, Callable[[], object]] = {
            "map": lambda: backend.attention_map(s, p, self.collapse, skips),
            "loss": lambda: backend.at_loss(*arguments, True, False),
            "backward": lambda: backend.attention_map_backward(
                s, maps, above, pairs, p, skips, winners
            ),
            "tap": lambda: backend.attention_tap_backward_(t[0], s[0], maps[0], *tapped),
            "value and gradient": lambda: backend.at_value_and_grad(*arguments, 1.0, above),
            "map loss": lambda: backend.map_loss(maps, maps, *pair_options, True, False),
        }
        (only,) = caught(calls[self.operator])
        return only


def variants() -> Iterator[Variant]:
    """The kernels that matter: each operator, dtype, layout, and kind of exponent."""
    for operator in OPERATORS:
        shape = SMALL if operator == "value and gradient" else LARGE
        for layout in ("planar", "interleaved"):
            for dtype in (torch.float32, torch.bfloat16):
                yield Variant(operator, dtype, layout, shape=shape)
        yield Variant(operator, p=2.5, shape=shape)
    for operator in ("loss", "backward"):
        yield Variant(operator, torch.float16)
        yield Variant(operator, torch.float64)
        yield Variant(operator, layout="interleaved", p=2.5)
        for layout in ("planar", "interleaved"):
            yield Variant(operator, layout=layout, shape=ODD)
    yield Variant("loss", torch.bfloat16, p=1.0)
    yield Variant("loss", torch.float64, p=2.5)
    yield Variant("loss", p=2.5, pairs=4)
    yield Variant("value and gradient", torch.bfloat16, shape=SMALL, pairs=4)
    yield Variant("backward", torch.bfloat16, shape=(1, 257, 56, 56), wide=True)
    for operator in ("map", "backward"):
        for layout in ("planar", "interleaved"):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                yield Variant(operator, dtype, layout, collapse="max")
        yield Variant(operator, p=2.5, collapse="max")
        yield Variant(operator, shape=ODD, collapse="max")
    for layout in ("planar", "interleaved"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for collapse in ("mean", "max"):
                yield Variant("tap", dtype, layout, collapse=collapse)
        yield Variant("tap", layout=layout, p=2.5)
        yield Variant("tap", layout=layout, shape=ODD)
    yield Variant("tap", torch.float16)
    yield Variant("tap", torch.float64, p=2.5)
    yield Variant("tap", p=2.5, collapse="max")
    yield Variant("tap", shape=ODD, collapse="max")
    for collapse in ("mean", "max"):
        yield Variant("tap", torch.bfloat16, shape=(1, 257, 56, 56), wide=True, collapse=collapse)
    for eps_mode in ("max", "add"):
        for reduction in ("sum", "sample"):
            yield Variant("map loss", reduction=reduction, eps_mode=eps_mode)
    yield Variant("map loss", reduction="none", shape=ODD, pairs=4)
    for operator in ("loss", "value and gradient"):
        for masked, reduction, eps_mode in (
            (True, "sum", "max"),
            (False, "sum", "add"),
            (False, "sample", "max"),
            (True, "sample", "add"),
        ):
            options = {"masked": masked, "reduction": reduction, "eps_mode": eps_mode}
            yield Variant(operator, torch.bfloat16, shape=SMALL, **options)
        yield Variant(operator, torch.float64, p=2.5, shape=SMALL, **options)
    for operator in OPERATORS:
        for dtype in (torch.float32, torch.bfloat16):
            yield Variant(operator, dtype, "interleaved", shape=TOKENS)
    yield Variant("backward", torch.bfloat16, reduction="sample")


# ---- one kernel for many calls -------------------------------------------------------------------

STAGES = {  # channels of the student and of the teacher, height and width
    "three stages of a WRN": ((16, 32, 32), (32, 64, 16), (64, 128, 8)),
    "one of a ResNet": ((64, 64, 56),),
    "four of a ResNet": ((64, 256, 56), (128, 512, 28), (256, 1024, 14), (512, 2048, 7)),
}


def a_step(stages: tuple[tuple[int, int, int], ...], batch: int) -> dict[str, Callable[[], object]]:
    """The operators on a batch; all that may vary from step to step is another for each batch."""
    s, t = ([torch.empty(batch, x[i], x[2], x[2]) for x in stages] for i in (0, 1))
    maps = [torch.empty(batch, x[2] ** 2) for x in stages]
    weights = [(batch - 1) / (3 + i) for i in range(len(s))]
    # Its place is odd for every other batch; it is stretched from one element.
    above = torch.empty(2 * batch)[batch - 1].expand(len(s))
    eps, scale, pairs = batch * 1e-9, 2.0 ** (batch - 1), list(range(len(s)))
    arguments = loss_arguments(s, t, weights=weights, reduction="none", eps=eps)
    options = weights, "code", "none", "max", eps
    return {
        "attention_map": lambda: backend.attention_map(s, 2.0, "mean"),
        "at_loss": lambda: backend.at_loss(*arguments, True, False),
        "attention_map_backward": lambda: backend.attention_map_backward(
            s, maps, above, pairs, 2.0
        ),
        "tap": lambda: backend.attention_tap_backward(s[0], s[0], maps[0], 2.0, "mean"),
        "at_value_and_grad": lambda: backend.at_value_and_grad(*arguments, scale, above),
        "map_loss": lambda: backend.map_loss(maps, maps, *options, True, False),
    }


def kernels() -> dict[str, int]:
    """Count the compilations of each for all batch sizes to 130, and some beyond."""
    triton.runtime.driver.set_active(_Driver(TARGETS["sm_90"]))
    found: dict[str, set[str]] = {}
    for name, stages in STAGES.items():
        for batch in (*range(1, 131), 256, 512, 1024):
            for operator, call in a_step(stages, batch).items():
                for launched in caught(call):
                    kernel = f"{operator} of {name}, {launched.kernel.fn.__name__}"
                    found.setdefault(kernel, set()).add(specialized(launched))
    return {name: len(keys) for name, keys in found.items()}


# ---- the table -----------------------------------------------------------------------------------


def rows(everything: bool) -> Iterator[Row]:
    """Every variant for every target; or in turn for one of the CUDA targets, and for gfx942."""
    cuda = [target for target in TARGETS if target != "gfx942"]
    for number, variant in enumerate(variants()):
        call = variant.call()
        for target in TARGETS if everything else (cuda[number % len(cuda)], "gfx942"):
            yield row(variant, call, target)


def table(found: list[Row]) -> str:
    """Markdown: registers, and the bits of the widest load and store, for each target."""
    lines = [
        "| kernel | " + " | ".join(TARGETS) + " |",
        "|---" * (1 + len(TARGETS)) + "|",
    ]
    for name in dict.fromkeys(r.variant for r in found):
        cells = [
            f"{r.registers} / {max(r.loads)} / {max(r.stores)}" for r in found if r.variant == name
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    spilled = max(r.spills for r in found)
    shared = max(r.shared for r in found)
    return "\n".join(
        [
            f"Triton {triton.__version__}. Registers per thread / bits of the widest load / store. "
            f"Spilled, at most: {spilled} bytes. Shared memory, at most: {shared} bytes.",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    if "--kernels" in sys.argv:
        print(json.dumps(kernels(), indent=1))
    elif "--json" in sys.argv:
        print(json.dumps([r._asdict() for r in rows("--everything" in sys.argv)]))
    else:
        print(table(list(rows(True))))

"""Check an installed package in seconds: its libraries, its numbers, README's first example.

    python scripts/smoke.py cpu [cuda]

The arguments are the compiled libraries that the package must have; none is plain PyTorch.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

# A package without its libraries warns; this one must not.
warnings.simplefilter("error")
import at_fused  # noqa: E402
from at_fused.backends import backend_by_device  # noqa: E402
from at_fused.backends.compiled import build_info  # noqa: E402
from at_fused.info import lines  # noqa: E402

README = Path(__file__).resolve().parent.parent / "README.md"


def eager_at(x: torch.Tensor) -> torch.Tensor:
    """Return the attention map in float64."""
    return F.normalize(x.double().pow(2).mean(1).flatten(1))


def main(libraries: list[str]) -> None:
    """Raise AssertionError at the first difference."""
    print(*lines(), sep="\n")
    table = at_fused.backends()
    assert at_fused.__file__.startswith(sys.prefix), f"imported {at_fused.__file__}"
    assert table["cpu"].available == ("cpu" in libraries), table["cpu"].reason
    assert (build_info() is not None) == bool(libraries), "the wheel has no record of its build"
    assert ("installed with AT_FUSED_CPP=0" in "\n".join(lines())) == (not libraries)
    if "cuda" in libraries and torch.version.cuda:
        assert backend_by_device()["cuda"] == "cuda", table["cuda"].reason

    torch.manual_seed(0)
    s, t = torch.randn(4, 8, 7, 7, requires_grad=True), torch.randn(4, 16, 7, 7)
    expected = (eager_at(s) - eager_at(t)).pow(2).mean()
    expected = [expected.float(), *torch.autograd.grad(expected, s)]
    for name in ["cpu", "eager"] if libraries else ["eager"]:
        with at_fused.use_backend(name):
            loss = at_fused.at_loss(s, t)
        actual = [loss, *torch.autograd.grad(loss, s)]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)

    example = re.search(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)[1]
    names = {"logits": torch.randn(4, 10, requires_grad=True), "labels": torch.arange(4)}
    names |= {"student_features": [s], "teacher_features": [t], "beta": 1e3}
    names |= {"cross_entropy": F.cross_entropy}
    exec(example, names)
    task = F.cross_entropy(names["logits"], names["labels"])
    torch.testing.assert_close(names["loss"], task + 1e3 * expected[0], rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    main(sys.argv[1:])

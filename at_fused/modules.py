"""The loss as ``nn.Module``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from at_fused._inputs import check_kept
from at_fused.functional import ATOptions, at_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ATLoss(nn.Module):
    """``at_loss`` with its options kept: ``ATLoss(p=2)(student, teacher)``.

    The formula is that of :func:`at_fused.at_loss`. Has no parameters.

    Args:
        options: the keyword arguments of :func:`at_fused.at_loss`, which documents them, but for
            ``mask`` and ``sample_weights``, which belong to a batch and are given in the call. They
            are checked here, once, and can be read back from the attribute of this name.

    Raises:
        TypeError, ValueError: an option that does not exist, or is not allowed.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1.
    """

    def __init__(self, **options: Unpack[ATOptions]) -> None:
        super().__init__()
        self.options = check_kept("ATLoss", options, ATOptions.__annotations__)

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor] | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of one pair, or of all pairs of two sequences.

        Args:
            student, teacher, mask, sample_weights: as in :func:`at_fused.at_loss`.

        Returns:
            As :func:`at_fused.at_loss`: a scalar, (pairs,) or (pairs, B), float32 or float64.

        Raises:
            TypeError, ValueError: as :func:`at_fused.at_loss`.
        """
        return at_loss(student, teacher, mask=mask, sample_weights=sample_weights, **self.options)

    def extra_repr(self) -> str:
        """The options that were given, as in the call."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

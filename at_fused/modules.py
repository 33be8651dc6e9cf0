"""The loss as ``nn.Module``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from at_fused.functional import at_loss, check_options


class ATLoss(nn.Module):
    """``at_loss`` with its options kept: ``ATLoss(p=2)(student, teacher)``.

    Takes the keyword arguments of :func:`at_fused.at_loss`, which documents them, the formula and
    the errors; they are checked here, once, and can be read back as attributes. Has no parameters.
    """

    def __init__(
        self,
        *,
        p: float = 2.0,
        collapse: str = "mean",
        form: str = "code",
        weights: Sequence[float] | None = None,
        reduction: str = "sum",
        channel_dim: int = 1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        check_options(p=p, collapse=collapse, form=form, reduction=reduction, eps=eps)
        self.p = p
        self.collapse = collapse
        self.form = form
        self.weights = None if weights is None else list(weights)
        self.reduction = reduction
        self.channel_dim = channel_dim
        self.eps = eps

    def forward(
        self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """The loss of one pair, or of all pairs of two sequences."""
        return at_loss(
            student,
            teacher,
            p=self.p,
            collapse=self.collapse,
            form=self.form,
            weights=self.weights,
            reduction=self.reduction,
            channel_dim=self.channel_dim,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """The options, as in the call."""
        options = ("p", "collapse", "form", "weights", "reduction", "channel_dim", "eps")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)

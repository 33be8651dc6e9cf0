"""``FusedATLoss`` for torchdistill: the ``ATLoss`` of its configurations, on the fused kernels.

Two lines of a YAML configuration change, the second from ``key: 'ATLoss'``:

    dependencies:
      - 'at_fused.integrations.torchdistill'
    ...
          criterion:
            key: 'FusedATLoss'
            kwargs:
              at_pairs:
                pair1:
                  teacher:
                    io: 'output'
                    path: 'layer3'
                  student:
                    io: 'output'
                    path: 'layer3'
                  weight: 1
              mode: 'code'

torchdistill's example programs import what ``dependencies`` lists, by
``torchdistill.common.main_util.import_dependencies``; importing this module registers the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from at_fused._arguments import ATOptions, check_choice, check_one_batch
from at_fused._layouts import check_module_options
from at_fused._numbers import check_finite
from at_fused.functional import at_loss

# The others are given by mode and at_pairs.
_OPTIONS = ATOptions.__annotations__.keys() - {"form", "weights", "reduction"}


@register_mid_level_loss(key="FusedATLoss")
class FusedATLoss(nn.Module):
    """torchdistill's ``ATLoss`` in one call for all pairs: the same arguments, value and gradients.

    ``mode="code"`` is ``sum_j w_j mean((q_s - q_t)^2)`` with ``Q = mean_c A^2``; "paper" is
    ``(1/B) sum_j w_j sum_b ||qs[b] - qt[b]||`` with ``Q = sum_c A^2``, and
    ``q = Q / max(||Q||, 1e-12)`` in both (:func:`at_fused.compat.torchdistill_at_loss`).

    Args:
        at_pairs: for each pair, under a name of its own, ``teacher`` and ``student``, each with
            ``path`` and ``io`` ("input" or "output"), and perhaps ``weight``, a number (default 1).
        mode: "code" or "paper".
        options: further ones of :func:`at_fused.at_loss`, for either mode: p, collapse (default
            "mean", in "paper" "sum"), resize, attend, channel_dim, skip_tokens, map_size, absolute,
            eps, eps_mode. (``ATLoss`` takes any and ignores them.)

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: torchdistill/losses/mid_level.py of yoshitomo-matsubara/torchdistill.
    """

    def __init__(
        self, at_pairs: Mapping[str, Mapping[str, Any]], mode: str = "code", **options: Any
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("code", "paper"))
        if mode == "paper":
            options = {"collapse": "sum", **options}
        check_module_options("FusedATLoss", options, _OPTIONS)
        if not isinstance(at_pairs, Mapping) or not at_pairs:
            raise TypeError(f"at_pairs must be a dict of pairs by name, got {at_pairs!r:.80}")
        self.at_pairs, self.mode, self.options = at_pairs, mode, options
        self._weights = [_checked_weight(f"at_pairs[{k!r}]", v) for k, v in at_pairs.items()]

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Any]],
        teacher_io_dict: Mapping[str, Mapping[str, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of all pairs, as torchdistill's criteria call it.

        Args:
            student_io_dict, teacher_io_dict: what the hooks kept, by path and by "input" or
                "output".
            args, kwargs: the targets, which do not matter here.

        Returns:
            A scalar, float32 or float64.

        Raises:
            ValueError: a dictionary lacks a path or an io; features that do not go together, as
                :func:`at_fused.at_loss`; with "paper", batch sizes that differ among the pairs.
        """
        students, teachers = (
            [_feature(name, side, pair[side], kept) for name, pair in self.at_pairs.items()]
            for side, kept in (("student", student_io_dict), ("teacher", teacher_io_dict))
        )
        loss = at_loss(students, teachers, form=self.mode, weights=self._weights, **self.options)
        if self.mode == "paper":
            # The original divides by that of the first pair, at_loss by each pair's own.
            check_one_batch(students, "all pairs must have one batch size with mode 'paper'")
        return loss

    def extra_repr(self) -> str:
        """The pairs' names, the mode and the options, for torchdistill's log."""
        options = [f"{k}={v!r}" for k, v in {"mode": self.mode, **self.options}.items()]
        return ", ".join([*self.at_pairs, *options])


def _feature(
    pair: str, side: str, source: Mapping[str, str], kept: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Return a feature from where torchdistill's hooks leave it."""
    path, io = source["path"], source["io"]
    if path in kept and io in kept[path]:
        return kept[path][io]
    raise ValueError(
        f"at_pairs[{pair!r}]: the {side} kept no {io} of {path!r}; list it under '{io}' of "
        "forward_hook in its configuration"
    )


def _checked_weight(where: str, pair: Any) -> float:
    """Return a pair's weight, once all of the pair is as it must be."""
    keys = {*pair} if isinstance(pair, Mapping) else set()
    # A misspelt weight would be 1 without a word.
    right = {"student", "teacher"} <= keys <= {"student", "teacher", "weight"} and all(
        isinstance(pair[side], Mapping) and {"path", "io"} <= {*pair[side]}
        for side in ("student", "teacher")
    )
    if not right:
        raise TypeError(
            f"{where} must be a dict with 'student' and 'teacher', each a dict with 'path' and "
            f"'io', and perhaps 'weight', got {pair!r:.200}"
        )
    return check_finite(f"{where}['weight']", pair.get("weight", 1))

"""``FusedATLoss`` for torchdistill: its ``ATLoss`` on the fused kernels.

A YAML configuration changes in two lines: the dependency, and the key, which was ``'ATLoss'``:

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

torchdistill's example programs import the modules in ``dependencies`` with
``torchdistill.common.main_util.import_dependencies``. Importing this module registers the loss.
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

# mode and at_pairs replace the other options.
_OPTIONS = ATOptions.__annotations__.keys() - {"form", "weights", "reduction"}


@register_mid_level_loss(key="FusedATLoss")
class FusedATLoss(nn.Module):
    """torchdistill's ``ATLoss`` in one call for all pairs, with the same value and gradients.

    ``mode="code"`` is ``sum_j w_j mean((q_s - q_t)^2)`` with ``Q = mean_c A^2``; "paper" is
    ``(1/B) sum_j w_j sum_b ||qs[b] - qt[b]||`` with ``Q = sum_c A^2``, and
    ``q = Q / max(||Q||, 1e-12)`` in both (:func:`at_fused.compat.torchdistill_at_loss`).

    Args:
        at_pairs: pairs by name. Each has ``teacher`` and ``student``, both with ``path`` and ``io``
            ("input" or "output"), and optionally ``weight``, a number (default 1).
        mode: "code" or "paper".
        options: options of :func:`at_fused.at_loss` for either mode: p, collapse (default "mean",
            with mode "paper" "sum"), resize, attend, channel_dim, skip_tokens, map_size, absolute,
            eps, eps_mode. (``ATLoss`` takes any options and ignores them.)

    Raises:
        TypeError, ValueError: an argument is invalid.

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
        self._weights = [_check_pair(f"at_pairs[{k!r}]", v) for k, v in at_pairs.items()]

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Any]],
        teacher_io_dict: Mapping[str, Mapping[str, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss of all pairs; torchdistill's criteria call it.

        Args:
            student_io_dict, teacher_io_dict: the features from the hooks, by path and by "input" or
                "output".
            args, kwargs: the targets, which are ignored.

        Returns:
            A scalar, float32 or float64.

        Raises:
            ValueError: a dictionary lacks a path or an io; features of a pair do not match, as in
                :func:`at_fused.at_loss`; with "paper", the pairs differ in batch size.
        """
        students, teachers = (
            [_feature(name, side, pair[side], io_dict) for name, pair in self.at_pairs.items()]
            for side, io_dict in (("student", student_io_dict), ("teacher", teacher_io_dict))
        )
        loss = at_loss(students, teachers, form=self.mode, weights=self._weights, **self.options)
        if self.mode == "paper":
            # ATLoss divides by the first pair's batch size, at_loss by each pair's own.
            check_one_batch(students, "all pairs must have the same batch size with mode 'paper'")
        return loss

    def extra_repr(self) -> str:
        """Return the pairs' names, the mode and the options, for torchdistill's log."""
        options = [f"{k}={v!r}" for k, v in {"mode": self.mode, **self.options}.items()]
        return ", ".join([*self.at_pairs, *options])


def _feature(
    pair: str, side: str, source: Mapping[str, str], io_dict: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Return the feature that torchdistill's hooks stored."""
    path, io = source["path"], source["io"]
    if path in io_dict and io in io_dict[path]:
        return io_dict[path][io]
    raise ValueError(
        f"at_pairs[{pair!r}]: no {io} of {path!r} was stored for the {side}; list {path!r} under "
        f"'{io}' of forward_hook in its configuration"
    )


def _check_pair(name: str, pair: Any) -> float:
    """Check a pair and return its weight."""
    keys = {*pair} if isinstance(pair, Mapping) else set()
    # Refuse unknown keys: a misspelt weight would silently be 1.
    is_valid = {"student", "teacher"} <= keys <= {"student", "teacher", "weight"} and all(
        isinstance(pair[side], Mapping) and {"path", "io"} <= {*pair[side]}
        for side in ("student", "teacher")
    )
    if not is_valid:
        raise TypeError(
            f"{name} must be a dict with 'student' and 'teacher', each a dict with 'path' and "
            f"'io', and optionally 'weight', got {pair!r:.200}"
        )
    return check_finite(f"{name}['weight']", pair.get("weight", 1))

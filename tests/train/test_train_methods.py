"""Losses of at-fused-train against their formulas, and the plan of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_runs import small

import at_fused
from at_fused import AttentionTransfer, TeacherCache
from at_fused.layers import Pair
from at_fused.train.config import METHODS, Config
from at_fused.train.experiment import Experiment
from at_fused.train.loop import Plan
from at_fused.train.methods import OBJECTIVES, Batch, Networks
from at_fused.train.networks import build

PAIRS = [Pair(f"groups.{i}", f"groups.{i}") for i in range(3)]
BETA = 7.0


class Fixture:
    """Two networks and a batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student = build("wrn-10-1-b4", 10, 1)
        self.teacher = build("wrn-16-1-b4", 10, 1).eval().requires_grad_(False)
        self.batch = Batch(
            torch.randn(6, 1, 8, 8), torch.randint(10, (6,)), torch.arange(6) + 3, seed=5
        )

    def networks(self, student: nn.Module) -> Networks:
        return Networks(student, self.teacher, PAIRS, student, self.teacher, self.batch.x)


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


def without_side_effects(model: nn.Module) -> Callable[..., Any]:
    """Return a callable with the same parameters that does not update BatchNorm statistics."""
    return lambda x: torch.func.functional_call(
        model, {k: b.clone() for k, b in model.named_buffers()}, (x,)
    )


def expected_loss(method: str, c: Config, fixture: Fixture, student: nn.Module) -> Tensor:
    """Return the loss, from the package's loss functions, which have tests of their own."""
    x, y = fixture.batch.x.detach().requires_grad_(), fixture.batch.y
    teacher = fixture.teacher
    (logits, features), (teacher_logits, teacher_features) = student(x), teacher(x.detach())
    base = F.cross_entropy(logits, y)
    if method in ("kd", "at+kd"):
        base = at_fused.kd_loss(logits, teacher_logits, y, T=c.T, alpha=c.alpha)
    if method in ("none", "kd"):
        return base
    if method == "gradient-at":
        gradient = at_fused.input_gradient(logits, x, y, create_graph=True)
        target = at_fused.input_gradient(lambda x: teacher(x)[0], x, y)
        return base + BETA / 2 * at_fused.gradient_at_loss(gradient, target)
    if method == "flip-symmetry":
        model = without_side_effects(student)
        return base + BETA / 2 * at_fused.flip_symmetry_loss(lambda x: model(x)[0], x, y)
    if method == "f-actt":
        return base + BETA * at_fused.features_loss(features, teacher_features)
    options: Any = {"p": c.p, "collapse": c.collapse, "form": c.form}
    attend = "channel" if method == "channel-at" else "spatial"
    return base + BETA * at_fused.at_loss(features, teacher_features, attend=attend, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in METHODS),
        ("kd", {"T": 2.0, "alpha": 0.5}),
        ("at", {"p": 4.0, "collapse": "max"}),
        ("at+kd", {"form": "paper", "beta": 1.0, "T": 8.0}),
    ],
)
def test_losses_and_gradients_match_the_formulas(
    fixture: Fixture, method: str, options: dict[str, Any]
) -> None:
    student, other = fixture.student, copy.deepcopy(fixture.student)
    config = small(method={method: options}).for_method(method)
    objective = OBJECTIVES[method](config, fixture.networks(student), None)
    terms = objective(fixture.batch, BETA)
    terms.loss.backward()
    expected = expected_loss(method, config, fixture, other)
    expected.backward()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in fixture.teacher.parameters())
    logits = without_side_effects(other)(fixture.batch.x)[0]
    torch.testing.assert_close(terms.task, F.cross_entropy(logits, fixture.batch.y))
    objective.close()
    assert not any(m._forward_hooks for n in (student, fixture.teacher) for m in n.modules())


@pytest.mark.parametrize("method", ["at", "kd", "at+kd"])
def test_cached_losses_equal_those_of_the_teacher(
    fixture: Fixture, tmp_path: Path, method: str
) -> None:
    cache, passes, losses, count = TeacherCache(tmp_path, samples=20), [], [], 0
    fixture.teacher.register_forward_hook(lambda *args: passes.append(args))
    for each in (None, cache, cache):
        student = copy.deepcopy(fixture.student)
        networks = fixture.networks(student)
        objective = OBJECTIVES[method](small().for_method(method), networks, each)
        before = len(passes)  # not those that find the layouts
        losses.append(objective(fixture.batch, BETA).loss.item())
        count += len(passes) - before
        objective.close()
    assert losses == [losses[0]] * 3
    assert count == 2


# ---- plan


def test_each_epoch_is_another_permutation() -> None:
    def order(epoch: int, seed: int = 3) -> list[int]:
        return torch.cat(Plan(small(batch_size=8), 21, seed, 1.0).batches(epoch)).tolist()

    assert sorted(order(0)) == sorted(order(1)) == list(range(21))
    assert order(1) == order(1) not in (order(0), order(1, seed=4))
    plan = Plan(small(batch_size=8), 21, seed=3, beta=1.0)
    assert (plan.steps_per_epoch, plan.steps) == (3, 18)
    # A last batch of one image is dropped.
    assert Plan(small(batch_size=10), 21, 3, 1.0).steps_per_epoch == 2


def test_lr_warms_up_and_follows_torchs_cosine_schedule() -> None:
    plan = Plan(small(epochs=10, lr=0.3, batch_size=10), 40, 0, 1.0)
    warm = Plan(small(epochs=10, lr=0.3, batch_size=10, warmup=2.0), 40, 0, 1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    for step in range(plan.steps):
        assert plan.lr(step) == pytest.approx(schedule.get_last_lr()[0])
        assert warm.lr(step) == pytest.approx(plan.lr(step) * min(1, (step + 1) / 8))
        optimizer.step()
        schedule.step()


def test_beta_follows_its_schedule() -> None:
    last = Plan(small(), 64, 0, 8.0).steps
    for schedule, betas in (("constant", (8, 8)), ("linear", (4, 0)), ("cosine", (4, 0))):
        plan = Plan(small(beta_schedule=schedule), 64, 0, 8.0)
        assert (plan.beta(last / 2), plan.beta(last)) == pytest.approx(betas)


def test_augmentation_repeats_only_with_a_cache() -> None:
    def seeds(**options: Any) -> list[int | None]:
        return [Plan(small(**options), 64, 2, 1.0).augmentation_seed(epoch) for epoch in range(6)]

    assert len(set(seeds())) == 6
    assert seeds(cache=2) == [0, 1, 0, 1, 0, 1]
    assert seeds(augment=False) == [None] * 6


# ---- speed exact

STEP = {"lr_schedule": "step", "lr_drops": (0.6,)}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("at", STEP),
        ("at+kd", {"teacher_epochs": 2}),
        ("none", {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.01}),
        ("none", {"warmup": 2.0}),
        ("none", {"label_smoothing": 0.1}),
        ("none", {**STEP, "reset_momentum": True}),
        ("none", {"init": "paper", "augment": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_exact_speed_matches_a_plain_loop_bit_for_bit(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The plain loop uses AttentionTransfer, kd_loss and torch's optimizers directly."""
    config = small(compare=[method], epochs=3, batch_size=8, **changes)
    experiment = Experiment(config, tmp_path)
    experiment.run()
    *_, job = experiment.jobs()
    torch.manual_seed(0)
    student = build("wrn-10-1-b4", 10, 1, init=config.init).train()
    teacher = build("wrn-10-1-b8", 10, 1).eval()
    if method != "none":
        teacher.load_state_dict(experiment.teacher.state_dict())
        at = AttentionTransfer(student, teacher, PAIRS, beta=job.plan.beta(0))
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    optimizer_type = torch.optim.AdamW if config.optimizer == "adamw" else sgd
    decay, parameters = job.config.weight_decay, [*student.parameters()]
    make_optimizer = partial(optimizer_type, parameters, 1.0, weight_decay=decay)
    optimizer, step, plan = make_optimizer(), 0, job.plan
    for epoch in range(3):
        for x, y, _ in job.train.batches(plan.batches(epoch), plan.augmentation_seed(epoch)):
            if config.reset_momentum and step == 6:  # lr_drops is 0.6 of 9 steps
                optimizer = make_optimizer()
            optimizer.param_groups[0]["lr"] = plan.lr(step)
            logits, _ = student(x)
            loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
            if method != "none":
                transfer = at(x)
                if method == "at+kd":
                    loss = at_fused.kd_loss(logits, at.teacher_output, y, T=4.0, alpha=0.9)
                loss = loss + transfer
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    saved = torch.load(tmp_path / f"student_{method}-seed0.pt", weights_only=True)["model"]
    different = [n for n, x in student.state_dict().items() if not torch.equal(saved[n], x)]
    assert (step, different) == (9, [])

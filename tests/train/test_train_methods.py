"""Losses of at-fused-train: each method's, against its formula in plain PyTorch."""

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
    """Two networks, a batch, and what both make of it."""

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
def given() -> Fixture:
    return Fixture()


def copy_of(model: nn.Module) -> Callable[..., Any]:
    """The same parameters in another pass that leaves no statistics."""
    return lambda x: torch.func.functional_call(
        model, {k: b.clone() for k, b in model.named_buffers()}, (x,)
    )


def formula(method: str, c: Config, g: Fixture, student: nn.Module) -> Tensor:
    """The losses of the package, each of which has a test of its own, put together."""
    x, y = g.batch.x.detach().requires_grad_(), g.batch.y
    (logits, features), (wanted, others) = student(x), g.teacher(x.detach())
    base = F.cross_entropy(logits, y)
    if method in ("kd", "at+kd"):
        base = at_fused.kd_loss(logits, wanted, y, T=c.T, alpha=c.alpha)
    if method in ("none", "kd"):
        return base
    if method == "gradient-at":
        seen = at_fused.input_gradient(logits, x, y, create_graph=True)
        given = at_fused.input_gradient(lambda x: g.teacher(x)[0], x, y)
        return base + BETA / 2 * at_fused.gradient_at_loss(seen, given)
    if method == "flip-symmetry":
        model = copy_of(student)
        return base + BETA / 2 * at_fused.flip_symmetry_loss(lambda x: model(x)[0], x, y)
    if method == "f-actt":
        return base + BETA * at_fused.features_loss(features, others)
    options: Any = {"p": c.p, "collapse": c.collapse, "form": c.form}
    attend = "channel" if method == "channel-at" else "spatial"
    return base + BETA * at_fused.at_loss(features, others, attend=attend, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in METHODS),
        ("kd", {"T": 2.0, "alpha": 0.5}),
        ("at", {"p": 4.0, "collapse": "max"}),
        ("at+kd", {"form": "paper", "beta": 1.0, "T": 8.0}),
    ],
)
def test_the_loss_and_its_gradients_are_the_formulas(
    given: Fixture, method: str, options: dict[str, Any]
) -> None:
    one, two = given.student, copy.deepcopy(given.student)
    config = small(method={method: options}).for_method(method)
    made = OBJECTIVES[method](config, given.networks(one), None)
    terms = made(given.batch, BETA)
    terms.loss.backward()
    wanted = formula(method, config, given, two)
    wanted.backward()
    torch.testing.assert_close(terms.loss, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    # BatchNorm has seen the batch once (twice, where the flipped one runs as well).
    assert all(p.grad is None for p in given.teacher.parameters())
    torch.testing.assert_close(
        terms.task, F.cross_entropy(copy_of(two)(given.batch.x)[0], given.batch.y)
    )
    made.close()
    assert not any(m._forward_hooks for n in (one, given.teacher) for m in n.modules())


@pytest.mark.parametrize("method", ["at", "kd", "at+kd"])
def test_a_cache_gives_what_the_teacher_would(given: Fixture, tmp_path: Path, method: str) -> None:
    cache, runs, losses, batches = TeacherCache(tmp_path, samples=20), [], [], 0
    given.teacher.register_forward_hook(lambda *a: runs.append(a))
    for each in (None, cache, cache):
        student = copy.deepcopy(given.student)
        made = OBJECTIVES[method](small().for_method(method), given.networks(student), each)
        before = len(runs)  # without those that show how features lie
        losses.append(made(given.batch, BETA).loss.item())
        batches += len(runs) - before
        made.close()
    assert losses == [losses[0]] * 3
    assert batches == 2


# ---- the plan of a run


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    def order(epoch: int, seed: int = 3) -> list[int]:
        return torch.cat(Plan(small(batch_size=8), 21, seed, 1.0).batches(epoch)).tolist()

    assert sorted(order(0)) == sorted(order(1)) == list(range(21))
    assert order(1) == order(1) not in (order(0), order(1, seed=4))
    plan = Plan(small(batch_size=8), 21, seed=3, beta=1.0)
    assert (plan.per_epoch, plan.steps) == (3, 18)
    # One image is no batch.
    assert Plan(small(batch_size=10), 21, 3, 1.0).per_epoch == 2


def test_a_rate_rises_in_the_warm_up_and_falls_as_torchs_cosine() -> None:
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


def test_augmentation_repeats_only_for_a_cache() -> None:
    def seeds(**options: Any) -> list[int | None]:
        return [Plan(small(**options), 64, 2, 1.0).augmentation(epoch) for epoch in range(6)]

    assert len(set(seeds())) == 6
    assert seeds(cache=2) == [0, 1, 0, 1, 0, 1]
    assert seeds(augment=False) == [None] * 6


# ---- exact is the plain program

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
def test_exact_is_bit_for_bit_the_plain_program(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """A loop that anybody would write, with torch's optimizer, ends in the same bits."""
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
    kind = torch.optim.AdamW if config.optimizer == "adamw" else sgd
    make = partial(kind, [*student.parameters()], 1.0, weight_decay=job.config.weight_decay)
    optimizer, step, plan = make(), 0, job.plan
    for epoch in range(3):
        for x, y, _ in job.train.batches(plan.batches(epoch), plan.augmentation(epoch)):
            if config.reset_momentum and step == 6:  # of 9: 0.6 of them are done
                optimizer = make()
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
    found = torch.load(tmp_path / f"student_{method}-seed0.pt", weights_only=True)["model"]
    different = [n for n, x in student.state_dict().items() if not torch.equal(found[n], x)]
    assert (step, different) == (9, [])

"""AttentionTransfer in frameworks and library networks: examples/stacks, docs/networks.md."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import output_of
from reference import reference_loss
from test_train_parallel import run_distributed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DistributedSampler

sys.path.append(str(Path(__file__).parents[2] / "examples/stacks"))
import toy

pytestmark = pytest.mark.stacks
STACKS = Path(toy.__file__).parent
ROOT = STACKS.parents[1]
PAIRS = [(name, name) for name in toy.LAYERS]
Steps = Sequence[Sequence[tuple[Tensor, Tensor]]]


@pytest.fixture(autouse=True)
def isolate() -> Iterator[None]:
    torch.set_num_threads(1)  # small networks are slower on more
    yield
    # accelerate would keep the options of its first use.
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


def train_eagerly(
    networks: tuple[nn.Module, nn.Module],
    steps: Steps,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    beta: float = toy.BETA,
    lr: float = 0.05,
    momentum: float = 0.9,
    task: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda net, x, y: cross_entropy(
        net(x), y
    ),
    after_step: Callable[[], None] = lambda: None,
    options: Callable[[Tensor], dict[str, Any]] = lambda y: {},
) -> list[float]:
    """Train with hooks and the reference loss, and return the loss of each batch."""
    outputs: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for side, network in enumerate(networks):
        for name in (pair[side] for pair in pairs):
            network.get_submodule(name).register_forward_hook(
                lambda module, args, out, side=side, name=name: outputs[side].update({name: out})
            )
    student, teacher = networks
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr, momentum)
    losses = []
    for batches in steps:
        optimizer.zero_grad()
        for x, y in batches:
            loss = task(student, x, y)
            with torch.no_grad():
                teacher(x)
            features = [[outputs[i][pair[i]].float() for pair in pairs] for i in (0, 1)]
            transfer = beta * reference_loss(*features, **options(y))
            assert transfer > 0.1 * loss, "too small to affect the comparison"
            loss = loss + transfer
            (loss / len(batches)).backward()
            losses.append(loss.item())
        optimizer.step()
        after_step()
    return losses


def split_batches(parts: int = 1, count: int = 4) -> Steps:
    """Return the batches of the examples, each split into parts."""
    return [list(zip(x.chunk(parts), y.chunk(parts), strict=True)) for x, y in toy.batches(count)]


def autocast(enabled: bool) -> torch.autocast:
    """Return autocast without its cache of weights, which the optimizer changes."""
    return torch.autocast("cpu", torch.bfloat16, enabled, cache_enabled=False)


def assert_same_training(
    losses: list[float],
    expected_losses: list[float],
    student: nn.Module,
    expected_student: nn.Module,
    bf16: bool,
) -> None:
    """Compare the first losses strictly, even in bf16, and the rest loosely: rounding adds up.

    With a teacher in fp32, the first loss would be off by 1e-3.
    """
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-4)
    assert losses == pytest.approx(expected_losses, rel=1e-2 if bf16 else 1e-4)
    tolerance = {"rtol": 0, "atol": 1e-2} if bf16 else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(student.state_dict(), expected_student.state_dict(), **tolerance)


def test_accelerate_in_bf16() -> None:
    losses, student = importlib.import_module("accelerate_bf16").train(seed=3)
    networks = toy.networks(3)
    with autocast(True):
        expected = train_eagerly(networks, split_batches(2))
    assert_same_training(losses, expected, student, networks[0], True)


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trainer(bf16: bool, tmp_path: Path) -> None:
    example = importlib.import_module("transformers_trainer")
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    arguments = {"learning_rate": 0.1, "train_sampling_strategy": "sequential", "bf16": bf16}
    losses, student = example.train(3, str(tmp_path), **plain, **arguments)
    torch.manual_seed(3)
    networks = example.vit(16, 2), example.vit(32, 3)
    with autocast(bf16):
        expected = train_eagerly(
            networks,
            split_batches(2),
            example.LAYERS,
            lr=0.1,
            momentum=0,
            task=lambda net, x, y: cross_entropy(net(x).logits, y),
            options=lambda y: {"channel_dim": -1, "skip_tokens": (1, 1)},
        )
    expected = torch.tensor(expected).view(-1, 2).mean(1).tolist()
    assert_same_training(losses, expected, student, networks[0], bf16)


def test_lightning_in_two_processes_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    output_of(tmp_path, str(STACKS / "lightning_ddp.py"), str(tmp_path))
    images, labels = (torch.cat(tensors) for tensors in zip(*toy.batches(2), strict=True))
    steps = []
    for epoch in (0, 1):
        samplers = [DistributedSampler(images, 2, rank) for rank in (0, 1)]  # as in Lightning
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for rows in zip(
            *(torch.tensor(list(sampler)).split(8) for sampler in samplers), strict=True
        ):
            steps.append([(images[torch.cat(rows)], labels[torch.cat(rows)])])
    networks = toy.networks(0)
    train_eagerly(networks, steps)
    saved = torch.load(tmp_path / "epochs-2.ckpt", weights_only=False)
    assert saved["global_step"] == 4
    expected = {f"student.{name}": x for name, x in networks[0].state_dict().items()}
    torch.testing.assert_close(saved["state_dict"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "parts"), [("ddp_no_sync", 2), ("fsdp2", 1)])
def test_two_processes_train_like_one(name: str, parts: int, tmp_path: Path) -> None:
    def train_rank(rank: int) -> None:
        losses, student = importlib.import_module(name).train(seed=3)
        weights = student.state_dict() if isinstance(student, nn.Module) else student
        torch.save((losses, weights), tmp_path / f"{rank}.pt")

    assert run_distributed(2, train_rank) == [0, 0]
    networks = toy.networks(3)
    expected = torch.tensor(train_eagerly(networks, split_batches()))
    (losses, weights), (others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    # Losses are those of half of a batch in fsdp2, of a quarter and divided by 2 in ddp_no_sync.
    actual = torch.tensor([losses, others]).view(2, -1, parts).sum(2).mean(0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, networks[0].state_dict(), rtol=1e-4, atol=1e-6)


def test_ema_and_its_export_have_no_hooks() -> None:
    losses, average, program = importlib.import_module("ema_export").train(seed=3)
    networks = toy.networks(3)
    averages: list[Tensor] = []

    def update_averages() -> None:
        new = [p.detach() for p in networks[0].parameters()]
        old = averages or new
        averages[:] = [0.9 * a + 0.1 * b for a, b in zip(old, new, strict=True)]

    expected = train_eagerly(networks, split_batches(), after_step=update_averages)
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(list(average.module.parameters()), averages, rtol=1e-4, atol=1e-6)
    for module in average.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any("at_fused" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), average(x))


def test_segmentation_with_a_mask() -> None:
    example = importlib.import_module("torchvision_segmentation")
    losses, student = example.train(seed=3)
    torch.manual_seed(3)
    networks = example.networks()
    expected = train_eagerly(
        networks,
        [[example.batch()]] * len(losses),
        example.LAYERS,
        beta=1e3,
        lr=0.01,
        momentum=0,
        task=lambda net, x, y: cross_entropy(net(x)["out"], y, ignore_index=example.IGNORED),
        options=lambda y: {"resize": "maps", "mask": [y != example.IGNORED] * 2},
    )
    assert losses == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(student.state_dict(), networks[0].state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", sorted({path.name for path in STACKS.glob("*.py")} - {"toy.py", "lightning_ddp.py"})
)
def test_example_runs_as_a_program(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(STACKS / name), run_name="__main__")
    printed = capfd.readouterr().out
    assert re.search(r"^(process \d: )?\d\.\d{3}( \d\.\d{3})+$", printed, re.M)


def test_networks_page_is_current() -> None:
    script = runpy.run_path(str(ROOT / "scripts/networks.py"))
    assert script["page"]() == (ROOT / "docs/networks.md").read_text()

"""AttentionTransfer: the loss of two networks that nobody edited."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_method import expected_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import at_fused
from at_fused import AttentionTransfer, _hooks
from at_fused.train.wrn import WRN

BETA = 1e3
GROUPS = ["groups.0", "groups.1", "groups.2"]


def networks(dtype: torch.dtype = torch.float64) -> tuple[WRN, WRN, Tensor, Tensor]:
    student, teacher = WRN(10, 1, base=4).to(dtype), WRN(10, 2, base=4).to(dtype)
    return student, teacher, torch.randn(4, 3, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 3])


def task_loss(output: tuple[Tensor, Any], y: Tensor) -> Tensor:
    return F.cross_entropy(output[0], y)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def by_hand(student: WRN, teacher: WRN, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The loss in the authors' style: both networks give their features away."""
    output = student(x)
    teacher.eval()
    with torch.no_grad():
        targets = teacher(x)[1]
    teacher.train()
    weights = options.pop("weights", [1.0] * 3)
    losses = [expected_loss(s, t, **options) for s, t in zip(output[1], targets, strict=True)]
    at = sum(w * each.mean() for w, each in zip(weights, losses, strict=True))
    return task_loss(output, y) + BETA * at


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": 1.0, "collapse": "sum"},
        {"p": 3.0, "absolute": False},
        {"collapse": "max", "form": "paper"},
        {"weights": [1.0, 0.0, 2.5]},
        {"eps": 0.1, "eps_mode": "add"},
        {"attend": "channel"},
    ],
)
def test_loss_and_gradients(fast_backend: str, options: dict[str, Any]) -> None:
    student, teacher, x, y = networks()
    if "attend" in options:
        teacher = WRN(16, 1, base=4).double()
    expected = by_hand(student, teacher, x, y, **options)
    right = gradients(student, expected)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, **options)
    loss = task_loss(student(x), y) + at(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(student, loss), right)


def test_other_sizes_are_interpolated_where_asked() -> None:
    student, teacher, x, _ = networks()
    pairs = [("groups.0", "groups.1"), ("groups.1", "groups.0")]
    at = AttentionTransfer(student, teacher, pairs, beta=BETA)
    student(x)
    with pytest.raises(ValueError, match=r"pair 0 must have the same map size.*resize='maps'"):
        at(x)
    at.remove()
    at = AttentionTransfer(student, teacher, pairs, beta=BETA, attend="channel")
    student(x)
    with pytest.raises(ValueError, match=r"got \d+ and \d+; choose layers of equal channels, or"):
        at(x)
    at.remove()
    at = AttentionTransfer(student, teacher, pairs, beta=BETA, resize="maps")
    (_, s), (_, t) = student(x), teacher.eval()(x)
    expected = sum(expected_loss(s[i], t[1 - i], resize="maps").mean() for i in (0, 1))
    torch.testing.assert_close(at(x), BETA * expected)


def test_one_network_each_and_the_teacher_in_eval_mode_without_gradients() -> None:
    student, teacher, x, y = networks()
    count = {"student": 0, "teacher": 0}
    student.register_forward_hook(lambda *_: count.update(student=count["student"] + 1))

    def on_teacher(module: nn.Module, args: Any, output: Any) -> None:
        count["teacher"] += 1
        assert not torch.is_grad_enabled()
        assert not any(m.training for m in teacher.modules())

    teacher.register_forward_hook(on_teacher)
    teacher.groups[1].eval()
    modes = [m.training for m in teacher.modules()]
    before = copy.deepcopy(teacher.state_dict())
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    for _ in range(2):
        (task_loss(student(x), y) + at(x)).backward()
    assert count == {"student": 2, "teacher": 2}
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(a, before[k]) for k, a in teacher.state_dict().items())
    student(x)
    with pytest.raises(RuntimeError, match="size"):
        at(torch.randn(4, 5, 8, 8).double())
    assert [m.training for m in teacher.modules()] == modes
    with torch.no_grad():
        torch.testing.assert_close(at.teacher_output, teacher.eval()(x)[0])


def test_evaluation_and_accumulated_parts_of_a_batch() -> None:
    student, teacher, x, y = networks()
    student.eval()  # the statistics of a part are not those of the whole
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    with torch.no_grad():
        alive = [weakref.ref(feature) for feature in student(x)[1]]
        assert all(feature() is None for feature in alive)
        value = at(x)
    output = student(x)
    loss = at(x)
    torch.testing.assert_close(loss.detach(), value)
    right = gradients(student, task_loss(output, y) + loss)
    for part in (slice(0, 2), slice(2, 4)):
        ((task_loss(student(x[part]), y[part]) + at(x[part])) / 2).backward()
    torch.testing.assert_close([p.grad for p in student.parameters()], right)


# ---- the networks stay as they are ---------------------------------------------------------------


def test_outputs_and_states_are_unchanged() -> None:
    student, teacher, x, _ = networks()
    keys, output = list(student.state_dict()), student.eval()(x)[0]
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    assert list(student.state_dict()) == keys
    assert torch.equal(student(x)[0], output)
    assert len(list(student.parameters())) == len(list(WRN(10, 1, base=4).parameters()))
    at.remove()
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    student(x)
    with pytest.raises(RuntimeError, match="has given no map"):
        at(x)


def test_saving_copying_and_pickling() -> None:
    student, teacher, x, y = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    output = student(x)  # the maps of a graph are at hand: they are not what is copied
    average = copy.deepcopy(student)
    buffer = io.BytesIO()
    torch.save(student, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    other = pickle.loads(pickle.dumps(at))
    for model in (average, loaded):
        model(torch.randn(2, 3, 8, 8).double())  # its hooks are its own
    loss = task_loss(output, y) + at(x)
    loss.backward()
    model = other._student.model
    torch.testing.assert_close(task_loss(model(x), y) + other(x), loss)
    assert len(pickle.dumps(student)) < 1.2 * len(pickle.dumps(WRN(10, 1, base=4).double())) + 5000


def test_a_change_in_place_behind_a_layer_is_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    AttentionTransfer(net, copy.deepcopy(net), ["0"], beta=1.0)
    with pytest.raises(RuntimeError, match=r"inplace|in-place"):
        net(torch.randn(2, 3, 8, 8))


# ---- calls in another order ----------------------------------------------------------------------


def test_calls_that_do_not_belong_together() -> None:
    student, teacher, x, _ = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    with pytest.raises(RuntimeError, match=r"layer 'groups.0' has given no map.*before each at"):
        at(x)
    student(x)
    at(x)
    with pytest.raises(RuntimeError, match="before each at"):
        at(x)
    student(x)
    with pytest.raises(ValueError, match="same batch size, got 4 and 2"):
        at(x[:2])
    with torch.no_grad():
        student(x)
    with pytest.raises(RuntimeError, match=r"no graph: it ran under no_grad, or in.*reentrant"):
        at(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    student, teacher, x, y = networks()

    class Checkpointed(nn.Module):
        def __init__(self, net: WRN) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            net = self.net
            x = net.stem(x)
            for group in net.groups:
                x = checkpoint(group, x, use_reentrant=reentrant)
            return net.head(torch.relu(net.bn(x)).mean(dim=(2, 3))), None

    right = gradients(student, by_hand(student, teacher, x, y))
    model = Checkpointed(student)
    at = AttentionTransfer(model, teacher, [(f"net.{g}", g) for g in GROUPS], beta=BETA)
    output = model(x)
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            at(x)
        return
    (task_loss(output, y) + at(x)).backward()
    torch.testing.assert_close([p.grad for p in student.parameters()], right)
    assert not at._student.maps.found  # what ran again in the backward has not been kept


@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_student_and_teacher(order: str) -> None:
    torch._dynamo.reset()
    student, teacher, x, y = networks()
    expected = by_hand(student, teacher, x, y)
    right = gradients(student, expected)
    options: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
    if order == "after":
        at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
        fast = torch.compile(student, **options)
    else:
        fast = torch.compile(student, **options)
        at = AttentionTransfer(fast, torch.compile(teacher, **options), GROUPS, beta=BETA)
    with torch._dynamo.config.patch(error_on_recompile=False):
        task_loss(fast(x), y) + at(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            loss = task_loss(fast(x), y) + at(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(student, loss), right)


# ---- what layers give ----------------------------------------------------------------------------


class Wrapping(nn.Module):
    """A network whose layer gives more than a tensor, or does not run."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.skip = nn.Conv2d(3, 4, 3), False
        # Before other hooks, as if the layer itself did it.
        self.layer.register_forward_hook(lambda module, args, output: wrap(output))

    def forward(self, x: Tensor) -> Any:
        if self.skip:
            return x
        self.given = self.layer(x)
        return self.given[0]


Both = namedtuple("Both", "feature extra")


@pytest.mark.parametrize("wrap", [lambda x: (x, 1), lambda x: [x], lambda x: Both(x, None)])
def test_layers_that_give_more_than_a_tensor(wrap: Callable[[Tensor], Any]) -> None:
    student, teacher, x = Wrapping(wrap), Wrapping(wrap), torch.randn(2, 3, 8, 8)
    at = AttentionTransfer(student, teacher, ["layer"], beta=2.0)
    found, loss = student(x), at(x)
    assert type(student.given) is type(wrap(x))
    torch.testing.assert_close(loss, 2 * at_fused.at_loss(found, teacher(x).detach()))
    student(x)
    student.skip = True  # a pass without the layer does not use the map of another
    student(x)
    with pytest.raises(RuntimeError, match="layer 'layer' has given no map"):
        at(x)


def test_a_layer_that_gives_something_else() -> None:
    for wrap, error, message in (
        (lambda x: {0: x}, TypeError, r"'layer' \(Conv2d\) must give a tensor, .* got dict"),
        (lambda x: x.flatten(1), ValueError, "the output of layer 'layer' must be"),
    ):
        student = Wrapping(wrap)
        AttentionTransfer(student, Wrapping(wrap), ["layer"], beta=1.0)
        with pytest.raises(error, match=message):
            student(torch.randn(2, 3, 4, 4))


def test_tokens_and_maps() -> None:
    """One token is put before 36 patches, which the other network gives as a map."""

    def tokens(x: Tensor) -> tuple[Tensor]:
        return (torch.cat([torch.ones(len(x), 1, 4), x.flatten(2).mT], 1),)

    student, teacher, x = Wrapping(tokens), Wrapping(lambda x: (x,)), torch.randn(2, 3, 8, 8)
    options: dict[str, Any] = {"skip_tokens": (1, 0), "map_size": ((6, 6), None)}
    expected = at_fused.at_loss(student(x), teacher(x).detach(), channel_dim=(-1, 1), **options)
    for given in ({}, options, {"example": x}, {"skip_tokens": (1, None)}):
        at = AttentionTransfer(student, teacher, ["layer"], beta=BETA, **given)
        student(x)
        torch.testing.assert_close(at(x), BETA * expected)
        at.remove()
    at = AttentionTransfer(student, teacher, ["layer"], beta=BETA, map_size=((4, 9), None))
    student(x)
    with pytest.raises(ValueError, match=r"pair 0 must have the same map size.*4x9 and 6x6"):
        at(x)
    at.remove()
    at = AttentionTransfer(student, teacher, ["layer"], beta=BETA, map_size=((5, 7), None))
    student(x)
    with pytest.raises(ValueError, match=r"map_size must be \(H, W\) of 36 tokens.*6x6"):
        at(x)
    at.remove()
    # Tokens of both sides are maps to be interpolated, not a line of tokens.
    other = Wrapping(lambda x: tokens(x[:, :, ::2, ::2]))
    options = {"skip_tokens": 1, "map_size": ((6, 6), (3, 3)), "resize": "maps"}
    found, target = student(x), other(x).detach()
    expected = at_fused.at_loss(found, target, channel_dim=-1, **options)
    for given in (options, {"resize": "maps"}):
        at = AttentionTransfer(student, other, ["layer"], beta=BETA, **given)
        student(x)
        torch.testing.assert_close(at(x), BETA * expected)
        at.remove()


@pytest.mark.parametrize("option", [{"skip_tokens": 1}, {"map_size": (4, 4)}], ids=str)
def test_options_of_tokens_where_there_are_none(option: dict[str, Any]) -> None:
    student, teacher, x, _ = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=1.0, **option)
    student(x)
    with pytest.raises(ValueError, match=f"{min(option)} is for token features"):
        at(x)


# ---- automatic pairs -----------------------------------------------------------------------------


def sequential(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c_in, c_out in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(True)]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


def test_pairs_are_found_printed_and_returned(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher, x, _ = networks()
    before = copy.deepcopy(student.state_dict())
    at = AttentionTransfer(student, teacher, example=x, beta=BETA)
    assert at.pairs == [(g, g) for g in GROUPS]
    printed = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in printed] == [
        "map student features teacher features",
        "8x8 groups.0 (B, 4, H, W) groups.0 (B, 8, H, W)",
        "4x4 groups.1 (B, 8, H, W) groups.1 (B, 16, H, W)",
        "2x2 groups.2 (B, 16, H, W) groups.2 (B, 32, H, W)",
    ]
    assert all(torch.equal(a, before[k]) for k, a in student.state_dict().items())
    assert student.training
    pairs = at_fused.match_layers(student, teacher, x, verbose=False)
    assert pairs == at.pairs
    assert not capsys.readouterr().out


def test_pairs_of_plain_layers() -> None:
    x = torch.randn(2, 3, 16, 16)
    student, teacher = sequential(4, 8), sequential(6, 6, 6)
    # 4x4 exists in the student, but nothing there was learned.
    assert at_fused.match_layers(student, teacher, x, verbose=False) == [("2", "2"), ("6", "6")]
    at = AttentionTransfer(student, teacher, example=x, beta=1.0, verbose=False)
    (student(x).sum() + at(x)).backward()


def test_pairs_that_cannot_be_told() -> None:
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"no stage of the student .* student 0 5x5; teacher"):
        at_fused.match_layers(nn.Sequential(nn.Conv2d(3, 4, 3, 3)), WRN(10, 1), x)
    hourglass = nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)
    )
    with pytest.raises(ValueError, match="Sequential comes back to maps of 16x16"):
        at_fused.match_layers(hourglass, WRN(10, 1), x)
    growing = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2))
    with pytest.raises(ValueError, match="comes back to maps of 16x16"):
        at_fused.match_layers(growing, sequential(4, 4), x)


# ---- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": 3}, TypeError, "student must be an nn.Module, got int"),
        ({"teacher": "same"}, ValueError, "must be two networks"),
        ({"layers": "groups.0"}, TypeError, "layers must be a list"),
        ({"layers": [3]}, TypeError, r"layers\[0\] must be a name or a pair"),
        ({"layers": ["groups.7"]}, ValueError, "WRN has no module 'groups.7'; near: groups"),
        ({"layers": ["groups.0", "groups.0"]}, ValueError, "'groups.0' again"),
        ({"layers": None}, ValueError, "layers or example must be given"),
        ({"beta": "much"}, TypeError, "beta must be a number"),
        ({"beta": float("nan")}, ValueError, "beta must be finite"),
        ({"form": "print"}, ValueError, "form must be"),
        ({"attend": "both"}, ValueError, "attend must be"),
        ({"resize": "features"}, ValueError, "resize must be None or 'maps'"),
        ({"weights": [1.0]}, ValueError, "weights must have one number per pair"),
        ({"reduction": "none"}, TypeError, "takes no option 'reduction'"),
        ({"channel_dim": 2}, ValueError, "channel_dim must be None, 1 or -1"),
        ({"map_size": (True, 4)}, ValueError, "map_size must be"),
        (
            {"beta": 1e200, "weights": [1.0, -1e200, 1.0]},
            ValueError,
            r"beta \* weights\[1\] must be finite, got -inf",
        ),
        ({"skip_tokens": (1, -1)}, ValueError, "skip_tokens must be None, a whole number"),
        ({"skip_tokens": 1, "channel_dim": 1}, ValueError, "skip_tokens is for token features"),
        ({"map_size": (4, 4), "attend": "channel"}, ValueError, "map_size is for spatial"),
        ({"resize": "maps", "attend": "channel"}, ValueError, "resize is for spatial attention"),
        # What is allowed is allowed here: not all that at_loss takes.
        ({"attend": "all"}, ValueError, "attend must be 'spatial' or 'channel', got 'all'$"),
        ({"resize": "up"}, ValueError, "resize must be None or 'maps', got 'up'$"),
        ({"example": []}, TypeError, "example must hold a tensor"),
        ({"cache": "folder"}, TypeError, "cache must be a TeacherCache"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    student, teacher, _, _ = networks()
    arguments = {"student": student, "teacher": teacher, "layers": GROUPS, "beta": 1.0, **change}
    if arguments["teacher"] == "same":
        arguments["teacher"] = student
    with pytest.raises(error, match=message):
        AttentionTransfer(**arguments)
    # Nothing is left behind by what was refused.
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))


def test_beta_may_be_set_anew() -> None:
    student, teacher, x, _ = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=1.0)
    student(x)
    one = at(x)
    at.beta = 3.0
    student(x)
    torch.testing.assert_close(at(x), 3 * one)
    with pytest.raises(ValueError, match="beta must be finite"):
        at.beta = float("inf")
    assert "groups.0" in repr(at)
    assert "beta=3.0" in repr(at)


# ---- several devices -----------------------------------------------------------------------------


class OneAfterTheOther(nn.DataParallel):
    """DataParallel's parts of a batch, in an order that is not the batch's."""

    running = 0

    def __init__(self, module: nn.Module, device_ids: list[int]) -> None:
        super().__init__(module)
        self.device_ids = device_ids

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        outputs = []
        for device, part in reversed(list(zip(self.device_ids, x.chunk(2), strict=True))):
            OneAfterTheOther.running = device
            outputs.append(self.module(part)[0])
        return torch.cat(outputs[::-1]), None


def test_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hooks, "_replica", lambda x: OneAfterTheOther.running)
    student, teacher, x, y = networks()
    student.eval()
    expected = by_hand(student, teacher, x, y)
    right = gradients(student, expected)
    parallel = OneAfterTheOther(student, [2, 0])
    at = AttentionTransfer(parallel, teacher, GROUPS, beta=BETA)
    for _ in range(2):
        parallel(x)  # an evaluation in between
        loss = task_loss(parallel(x), y) + at(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(student, loss), right)


# ---- a cache -------------------------------------------------------------------------------------


def test_the_teacher_runs_once_for_each_sample(tmp_path: Path) -> None:
    student, teacher, x, _ = networks()
    rows: list[int] = []
    teacher.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    student(x)
    expected, logits = at(x), at.teacher_output
    at.remove()
    cache = at_fused.TeacherCache(tmp_path, samples=10)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, cache=cache)
    rows.clear()
    for index in ([7, 2], [7, 2, 9, 0], torch.tensor([7, 2, 9, 0])):
        student(x[: len(index)])
        loss = at(x[: len(index)], index)
    assert rows == [2, 2]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(at.teacher_output, logits)
    loss.backward()

    # Another seed, another option of the maps, another precision, another teacher: computed anew.
    student(x), at(x, [7, 2, 9, 0], seed=1)
    other = AttentionTransfer(student, teacher, GROUPS, beta=BETA, cache=cache, p=1.0)
    student(x), other(x, [7, 2, 9, 0])
    other.remove()
    with torch.autocast("cpu", torch.bfloat16):
        student(x), at(x, [7, 2, 9, 0])
    with torch.no_grad():
        teacher.stem.weight.mul_(1.5)
    student(x), at(x, [7, 2, 9, 0])
    assert rows == [2, 2, 4, 4, 4, 4]
    with pytest.raises(RuntimeError, match="sample 7 is not the input"):
        student(x), at(x + 1, [7, 2, 9, 0])
    student(x)
    with pytest.raises(ValueError, match="index must be given"):
        at(x)
    at.remove()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    student(x)
    for wrong in ({"index": [7, 2, 9, 0]}, {"seed": 1}):
        with pytest.raises(ValueError, match="index and seed are for a cache, got"):
            student(x), at(x, **wrong)


# ---- the teacher first ---------------------------------------------------------------------------


def test_prepared() -> None:
    student, teacher, x, _ = networks()
    count = [0]
    teacher.register_forward_pre_hook(lambda *_: count.append(1))
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    student(x)
    expected, logits = at(x), at.teacher_output
    at.prepare(x)
    student(x)
    assert torch.equal(at(x), expected)
    assert torch.equal(at.teacher_output, logits)
    assert len(count) == 3
    at.prepare(x)
    student(x)
    with pytest.raises(ValueError, match=r"x must be what at\.prepare was called with"):
        at(x.clone())
    at.prepare(x)
    student(x)
    with pytest.raises(ValueError, match="index and seed, if given, must be"):
        at(x, seed=1)
    student(x)
    assert torch.equal(at(x), expected)  # what was prepared is gone
    assert len(count) == 6

"""AttentionTransfer's choice of layers, and the feature layouts that it detects or rejects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transfer_networks import BETA, transfer_loss

from at_fused import AttentionTransfer, TeacherCache, at_loss, match_layers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks are slower on several threads; in float64, rounding is below tolerances."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Convolve(nn.Module):
    """A convolutional block on channels-first features."""

    def __init__(self, c: int, c_out: int, stride: int = 1, rank: int = 2) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
        self.conv = nn.Sequential(conv(c, c_out, 3, stride, 1), norm(c_out), nn.ReLU())
        self.out = nn.Sequential(conv(c_out, c_out, 3, 1, 1), norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.out(self.conv(x)))


class Mix(nn.Module):
    """A block without convolutions, on channels-last features of any rank."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.GELU())
        self.mlp = nn.Sequential(
            nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.mlp(x)


class Net(nn.Module):
    """An embedding in some layout, and blocks of one size."""

    def __init__(
        self, embed: nn.Module, blocks: list[nn.Module], to_layout: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.embed, self.blocks, self.to_layout = embed, nn.ModuleList(blocks), to_layout
        width = getattr(embed, "out_channels", None) or getattr(embed, "embedding_dim", 0)
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_layout(self.embed(x), self.token)
        for block in self.blocks:
            x = block(x)
        return x.flatten(1)


def tokens(before: int, after: int = 0) -> Callable[..., Tensor]:
    def to_tokens(x: Tensor, token: Tensor) -> Tensor:
        patches = x.flatten(2).mT
        extra = token.expand(len(x), -1, -1)
        return torch.cat([extra] * before + [patches] + [extra] * after, 1)

    return to_tokens


def channels_first(x: Tensor, token: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor, token: Tensor) -> Tensor:
    return x.movedim(1, -1)


def nchw_map(x: Tensor) -> Tensor:
    return x.pow(2).mean(1).flatten(1)


def nhwc_map(skip: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.pow(2).mean(-1).flatten(1)[:, skip:]


_DATA = torch.Generator().manual_seed(0)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DATA, dtype=torch.float64)


IMAGE, SIGNAL, CLIP = data(2, 3, 24, 32), data(4, 2, 64), data(2, 3, 4, 16, 16)
WORDS, SQUARE = torch.randint(30, (3, 12), generator=_DATA), data(2, 3, 32, 32)
LABELS = torch.ones(2, 49)
Patch, Clip = (lambda c: nn.Conv2d(3, c, 4, 4)), (lambda c: nn.Conv3d(3, c, (2, 4, 4), (2, 4, 4)))


def mixing(embed: Any, to_layout: Any) -> Callable[[int], Net]:
    return lambda c: Net(embed(c), [Mix(c), Mix(c)], to_layout)


def convolving(embed: Any, rank: int) -> Callable[[int], Net]:
    return lambda c: Net(embed(c), [Convolve(c, c, 1, rank) for _ in "ab"], channels_first)


def vit(c: int, *between: nn.Module) -> Net:
    return Net(Patch(c), [Mix(c), *between, Mix(c)], tokens(1))


# A network by width, its input, the expected map of its features, and their description.
LAYOUTS: dict[str, tuple[Callable[[int], Net], Tensor, Callable[[Tensor], Tensor], str]] = {
    "maps": (convolving(Patch, 2), IMAGE, nchw_map, "(B, {c}, H, W)"),
    "maps, channels last": (mixing(Patch, channels_last), IMAGE, nhwc_map(0), "(B, H, W, {c})"),
    "patches": (mixing(Patch, tokens(0)), IMAGE, nhwc_map(0), "(B, N, {c})"),
    "class token": (mixing(Patch, tokens(1)), IMAGE, nhwc_map(1), "(B, 1+48, {c})"),
    "distillation token": (mixing(Patch, tokens(2)), IMAGE, nhwc_map(2), "(B, 2+48, {c})"),
    "registers": (mixing(Patch, tokens(5)), IMAGE, nhwc_map(5), "(B, 5+48, {c})"),
    "signal": (convolving(lambda c: nn.Conv1d(2, c, 4, 4), 1), SIGNAL, nchw_map, "(B, {c}, L)"),
    "words": (
        mixing(lambda c: nn.Embedding(30, c), lambda x, _: x), WORDS, nhwc_map(0), "(B, N, {c})",
    ),
    "video": (convolving(Clip, 3), CLIP, nchw_map, "(B, {c}, T, H, W)"),
    "video, channels last": (mixing(Clip, channels_last), CLIP, nhwc_map(0), "(B, T, H, W, {c})"),
    "video tokens": (mixing(Clip, tokens(1)), CLIP, nhwc_map(1), "(B, 1+32, {c})"),
}  # fmt: skip


def block_features(model: Net, x: Tensor) -> list[Tensor]:
    features = [model.to_layout(model.embed(x), model.token)]
    for block in model.blocks:
        features.append(block(features[-1]))
    return features[1:]


def eager_loss(student: Net, teacher: Net, x: Tensor, map_of: Callable[[Tensor], Tensor]) -> Tensor:
    s, t = (
        [torch.nn.functional.normalize(map_of(feature)) for feature in block_features(model, x)]
        for model in (student, teacher)
    )
    return BETA * sum((a - b.detach()).pow(2).mean() for a, b in zip(s, t, strict=True))


COMPILED = ("class token",)


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        *((x, case) for x in LAYOUTS for case in ("example", "names", "names and example")),
        *(
            pytest.param(x, "compiled", marks=[pytest.mark.exhaustive] * (x not in COMPILED))
            for x in LAYOUTS
        ),
    ],
)
def test_values_and_gradients(layout: str, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, x, map_of, description = LAYOUTS[layout]
    student, teacher = make(8).eval(), make(12).eval()
    expected = eager_loss(student, teacher, x, map_of)
    expected_grad = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    names = ["blocks.0", "blocks.1"]
    model: Any = student
    if case == "compiled":
        torch._dynamo.reset()
        model = torch.compile(student, backend="aot_eager", fullgraph=True)
    layers, example = None if case == "example" else names, x if "ex" in case else None
    at = AttentionTransfer(model, teacher, layers, beta=BETA, example=example)
    assert at.pairs == [(name, name) for name in names]
    if case == "example":
        printed = capsys.readouterr().out.splitlines()[1:3]
        for width in (8, 12):
            assert all(description.format(c=width) in line for line in printed)
    for _ in range(3):  # with named layers, the first pass detects the layouts
        model(x)
        loss = at(x)
        torch.testing.assert_close(loss, expected)
        grad = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        torch.testing.assert_close(grad, expected_grad)


def test_tokens_form_maps_that_are_not_square() -> None:
    make, x, *_ = LAYOUTS["registers"]
    coarse = mixing(lambda c: nn.Conv2d(3, c, 8, 8), tokens(1))
    student, maps, small = make(8).eval(), LAYOUTS["maps"][0](12).eval(), coarse(12).eval()
    s, map_feature, small_feature = (
        block_features(model, x)[1] for model in (student, maps, small)
    )
    s, t = s[:, 5:].mT.unflatten(2, (6, 8)), small_feature[:, 1:].mT.unflatten(2, (3, 4))
    for teacher, feature, resize in ((maps, map_feature, None), (small, t, "maps")):
        options = {"weights": [0.0, 1.0], "resize": resize, "example": x}
        expected = BETA * at_loss(s, feature, resize=resize)
        torch.testing.assert_close(transfer_loss(student, teacher, x, **options), expected)


def test_class_token_may_be_added_between_layers() -> None:
    prepend = Function(lambda x: torch.cat((x.mean(1, keepdim=True), x), 1))
    networks = [Net(Patch(c), [Mix(c), prepend, Mix(c)], tokens(0)) for c in (8, 12)]
    for i, skip in ((0, 0), (2, 1)):
        loss = transfer_loss(*networks, IMAGE, [f"blocks.{i}"])
        features = [block_features(model, IMAGE)[i] for model in networks]
        expected = BETA * at_loss(*features, channel_dim=-1, skip_tokens=skip)
        torch.testing.assert_close(loss, expected)


def shuffled(x: Tensor, token: Tensor) -> Tensor:
    """Return patches in window order, not row by row."""
    x = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1)
    return x.flatten(1, 4)


def sequence_first() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Function(lambda embed, run, x: run(embed(x).transpose(0, 1)), nn.Linear(6, 8), encoder)


def two_branches() -> nn.Module:
    branches = [nn.Sequential(Convolve(3, 4, 2), Convolve(4, 8, 2)) for _ in "ab"]
    return Function(lambda a, b, x: a(x) + b(x), *branches)


def hourglass() -> nn.Module:
    down, up = nn.Conv2d(4, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), down, up)


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))


class Function(nn.Module):
    """A block, or a network with submodules, defined by a function of these and its input."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for i, module in enumerate(modules):
            self.add_module(f"part{i}", module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.children(), x)


def moving(move: Callable[[Tensor], Tensor]) -> Callable[[], Net]:
    return lambda: Net(Patch(8), [Mix(8), Function(move), Mix(8)], tokens(0))


def by_columns(x: Tensor, token: Tensor) -> Tensor:
    return x.transpose(2, 3).flatten(2).mT


def test_cubic_features_need_convolutions_or_channel_dim() -> None:
    nets = [LAYOUTS["maps"][0](16).eval() for _ in "ab"]
    x = torch.randn(2, 3, 64, 64)
    expected = BETA * at_loss(*(block_features(net, x)[0] for net in nets))
    torch.testing.assert_close(transfer_loss(*nets, x, example=x, weights=[1.0, 0.0]), expected)
    nets = [LAYOUTS["maps, channels last"][0](16) for _ in "ab"]
    with pytest.raises(ValueError, match=r"axis in \(2, 16, 16, 16\) is unknown.*channel_dim"):
        transfer_loss(*nets, x, ["blocks.0"])
    expected = BETA * at_loss(*(block_features(net, x)[0] for net in nets), channel_dim=-1)
    loss = transfer_loss(*nets, x, ["blocks.0"], channel_dim=-1)
    torch.testing.assert_close(loss, expected)


# ---- choice of layers ----------------------------------------------------------------------------


def trunk() -> nn.Module:
    """Return a network of stages that halve the size; stem and last layer look like its blocks."""
    stages = [nn.Sequential(Convolve(c, 2 * c, 2), Convolve(2 * c, 2 * c)) for c in (4, 8, 16)]
    ends = Convolve(3, 4, 2), Convolve(32, 40)
    parts = {"stem": ends[0], "stages": nn.Sequential(*stages), "final_conv": ends[1]}
    return nn.Sequential(OrderedDict(parts))


def plain_layers() -> nn.Module:
    """Return a network without parameters at its last size."""
    pairs = [[nn.Conv2d(c, 4, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2)] for c in (3, 4)]
    return nn.Sequential(*pairs[0], *pairs[1], nn.AdaptiveAvgPool2d(1))


# docs/networks.md lists the layers chosen in networks of public libraries.
CHOSEN: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (plain_layers, ["1", "4"]),
    (trunk, ["stages.0", "stages.1", "stages.2"]),
    # A trailing norm is not part of a block: the module before it is chosen.
    (lambda: Net(Patch(8), [nn.Sequential(Mix(8), nn.LayerNorm(8))], tokens(1)), ["blocks.0.0"]),
]


@pytest.mark.parametrize(("make", "names"), CHOSEN)
def test_blocks_are_chosen(make: Any, names: list[str]) -> None:
    pairs = match_layers(make(), make(), SQUARE, verbose=False)
    assert pairs == [(name, name) for name in names]


def test_blocks_of_one_size_are_paired_at_proportional_depth() -> None:
    small, large = vit(8, *(Mix(8) for _ in range(4))), vit(12, *(Mix(12) for _ in range(10)))
    pairs = match_layers(small, large, IMAGE, verbose=False)
    expected = [(0, 2), (2, 5), (3, 8), (5, 11)]
    assert pairs == [(f"blocks.{s}", f"blocks.{t}") for s, t in expected]
    assert match_layers(vit(8), trunk(), IMAGE, verbose=False) == [("blocks.1", "stages.0")]


def test_choice_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    match_layers(LAYOUTS["registers"][0](8), trunk(), torch.randn(2, 3, 32, 32))
    assert capsys.readouterr().out.splitlines() == [
        "map  student   features      teacher   features",
        "8x8  blocks.1  (B, 5+64, 8)  stages.0  (B, 8, H, W)",
        "left out of the teacher: stages.1 (the other network has no maps of 4x4)",
        "left out of the teacher: stages.2 (the other network has no maps of 2x2)",
        "left out of the teacher: stem, final_conv (outside the stages)",
    ]
    match_layers(trunk(), trunk(), IMAGE, verbose=False)
    assert not capsys.readouterr().out


# ---- misleading layouts --------------------------------------------------------------------------


class Masked(nn.Module):
    """A network of two inputs."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.net = vit(c)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return self.net(pixels * (labels.shape[1] == 49))


@pytest.mark.parametrize("batch", [(IMAGE, LABELS), {"labels": LABELS, "pixels": IMAGE}])
def test_examples_of_several_inputs(batch: Any) -> None:
    """Do not read the 49 labels as a grid of the 1 + 48 tokens."""
    student, teacher = Masked(8), Masked(12)
    layers = ["net.blocks.0", "net.blocks.1"]
    expected = eager_loss(student.net, teacher.net, IMAGE, nhwc_map(1))
    for options in ({"layers": layers}, {"example": batch}):
        torch.testing.assert_close(transfer_loss(student, teacher, batch, **options), expected)
    assert match_layers(student, teacher, batch) == [(name, name) for name in layers]


INNER: dict[str, Any] = {"norm": nn.BatchNorm1d, "convolution": lambda c: nn.Conv1d(c, c, 1)}


@pytest.mark.parametrize("kind", INNER)
def test_modules_over_tokens_do_not_define_a_grid(kind: str) -> None:
    student, teacher = (
        vit(c, Function(lambda module, x: module(x.mT).mT, INNER[kind](c))).eval() for c in (8, 12)
    )
    assert ("blocks.0", "blocks.0") in match_layers(student, teacher, IMAGE, verbose=False)
    for example in (None, IMAGE):
        loss = transfer_loss(student, teacher, IMAGE, ["blocks.0"], example=example)
        torch.testing.assert_close(loss, first_block_loss(student, teacher))


def first_block_loss(*networks: Net) -> Tensor:
    features = [block_features(net, IMAGE)[0] for net in networks]
    return BETA * at_loss(*features, channel_dim=-1, skip_tokens=1)


def on_square(make: Callable[[int], nn.Module], *options_and_message: Any) -> tuple[Any, ...]:
    return lambda: make(64), SQUARE, "blocks.0", *options_and_message


def ends_in_norm() -> Net:
    """Return a ViT with a LayerNorm after each block, which makes all positions of a map equal."""
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in "ab"]
    return Net(Patch(8), layers, tokens(1))


NOT_CHOSEN = ("part1", "1", "blocks.2")  # by match_layers


@pytest.mark.parametrize(
    ("make", "x", "layer", "options", "message"),
    [
        on_square(lambda c: Net(Patch(c), [Mix(c)], tokens(0, 4)), {}, "last 4 of its 68 tokens"),
        on_square(lambda c: vit(c), {"skip_tokens": 65}, "leaves none of its 65"),
        on_square(LAYOUTS["maps"][0], {"channel_dim": -1}, "would be 64x8 for an image of 32x32"),
        on_square(LAYOUTS["maps, channels last"][0], {"channel_dim": 1}, "would be 8x64 for"),
        on_square(lambda c: Net(Patch(c), [Mix(c)], shuffled), {}, "not in the image's order"),
        (lambda: Net(Patch(8), [Mix(8)], by_columns), IMAGE, "blocks.0", {}, "not in the image"),
        (moving(lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1)), IMAGE, "blocks.2", {}, "not in"),
        (sequence_first, data(3, 12, 6), "part1", {}, r"batch is not the first .* \(12, 3"),
        (pooled, IMAGE, "1", {"example": IMAGE}, "has a single position"),
        (two_branches, IMAGE, None, {}, "'part0' and 'part1' have stages of the same"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), data(2, 3), None, {}, "no layer .* returns a"),
        (ends_in_norm, IMAGE, None, {}, r"student: no stage \(blocks.1: it ends in a LayerNorm"),
        (trunk, IMAGE, None, {"resize": "features"}, "must be None or 'maps', got 'features'"),
        (hourglass, IMAGE, None, {}, "Sequential returns to maps of 24x32"),
    ],
    ids=range(14),
)
def test_unsupported_layouts_raise(
    make: Any, x: Tensor, layer: str | None, options: Any, message: str
) -> None:
    student, teacher = make(), make()
    if layer not in NOT_CHOSEN:
        with pytest.raises(ValueError, match=message):
            match_layers(student, teacher, x, **options)
    if layer:
        with pytest.raises(ValueError, match=f"the student's layer '{layer}'.*{message}"):
            transfer_loss(student, teacher, x, [layer], **options)


def test_inputs_may_have_another_aspect_ratio_than_the_example() -> None:
    student, teacher = vit(8), nn.Sequential(nn.Conv2d(3, 4, 4, 4))
    for x in (torch.randn(2, 3, 16, 64), torch.randn(2, 3, 48, 48)):
        size = (x.shape[2] // 4, x.shape[3] // 4)
        feature = student(x).view(2, -1, 8)[:, 1:].mT.unflatten(2, size)
        loss = transfer_loss(student, teacher, x, [("blocks.1", "0")], example=SQUARE)
        torch.testing.assert_close(loss, BETA * at_loss(feature, teacher(x)))


# ---- named layers without an example -------------------------------------------------------------


BLOCKS = ["blocks.0", "blocks.1"]


def test_named_layers_take_one_extra_pass() -> None:
    student, teacher, second = vit(8), vit(12), vit(16)
    passes: list[int] = []
    student.register_forward_pre_hook(lambda *_: passes.append(1))
    both = [AttentionTransfer(student, t, BLOCKS, beta=BETA) for t in (teacher, second)]
    expected = [eager_loss(student, t, IMAGE, nhwc_map(1)) for t in (teacher, second)]
    passes.clear()
    for _ in range(3):
        student(IMAGE)
        torch.testing.assert_close([at(IMAGE.clone()) for at in both], expected)
    assert sum(passes) == 3 + len(both)


CASES = ["inference", "compiled blocks", "mutual", "checkpoint", "checkpointed blocks"]


@pytest.mark.parametrize("case", CASES)
def test_first_pass_may_be_unusual(case: str) -> None:
    student, teacher, x = vit(8), vit(12), IMAGE
    expected = eager_loss(student, teacher, x, nhwc_map(1))
    expected_grad = torch.autograd.grad(expected, list(student.parameters()), retain_graph=True)
    if case == "compiled blocks":
        torch._dynamo.reset()
        for block in student.blocks:
            block.compile(backend="eager", fullgraph=True)
    at = AttentionTransfer(student, teacher, BLOCKS, beta=BETA)
    if case == "inference":
        with torch.inference_mode():
            at.prepare(x)
    elif case == "mutual":
        other = AttentionTransfer(teacher, student, BLOCKS, beta=BETA)
        teacher(x)
    elif case == "checkpointed blocks":
        for block in student.blocks:
            forward = block.forward
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    for _ in range(2):
        if case == "checkpoint":
            checkpoint(student, x, use_reentrant=False)
        else:
            student(x)
        loss = at(x)
        torch.testing.assert_close(loss, expected)
        grad = torch.autograd.grad(loss, list(student.parameters()))
        torch.testing.assert_close(grad, expected_grad)
        assert not at._student.last_pass.maps  # the recomputation of a checkpoint must not add maps
    if case == "mutual":
        torch.testing.assert_close(other(x), expected)


def test_example_changes_neither_buffers_nor_random_state() -> None:
    class Counting(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x + 0 * torch.randn_like(x))

    networks = [Counting(Patch(8), [Mix(8)], by_columns) for _ in "ab"]
    for model in networks:
        model.register_buffer("count", torch.zeros(()))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="not in the image's order"):
        match_layers(*networks, IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert [int(model.count) for model in networks] == [0, 0]


def test_full_cache_keeps_the_token_layout(tmp_path: Path) -> None:
    """Do not guess 4x4 for the teacher's 2x8 tokens."""
    x, teacher = torch.randn(4, 3, 8, 32), Net(Patch(12), [Mix(12)], tokens(0))
    student, losses = nn.Sequential(nn.Conv2d(3, 4, 2, 2)), []
    options: dict[str, Any] = {"layers": [("0", "blocks.0")], "beta": BETA, "resize": "maps"}
    for cache in (TeacherCache(tmp_path, samples=4), TeacherCache(tmp_path, samples=4), None):
        at = AttentionTransfer(student, teacher, cache=cache, **options)
        student(x)
        losses.append(at(x, range(4)) if cache else at(x))
        at.remove()
    assert losses[0] == losses[1] == losses[2]


def test_pixel_mask_applies_to_tokens() -> None:
    student, teacher, mask = vit(8), vit(12), torch.rand(2, 24, 32) > 0.5
    maps = [m(IMAGE).view(2, 49, -1)[:, 1:].mT.unflatten(2, (6, 8)) for m in (student, teacher)]
    loss = transfer_loss(student, teacher, IMAGE, ["blocks.1"], mask=mask)
    torch.testing.assert_close(loss, BETA * at_loss(*maps, mask=mask))


def test_interrupted_pass_removes_hooks_and_modes() -> None:
    def stop(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = Net(Patch(8), [Mix(8), Function(stop)], tokens(1))
    with pytest.raises(KeyboardInterrupt):
        match_layers(model, vit(8), IMAGE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_feature_changed_in_place_after_its_layer() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.to_layout(self.embed(x), self.token))
            x[:, 1:5] = 0
            return x.flatten(1)

    plain, in_place = vit(8), InPlace(Patch(8), [Mix(8)], tokens(1))
    with pytest.raises(RuntimeError, match="inplace"):
        transfer_loss(in_place, plain, IMAGE, ["blocks.0"])
    expected = first_block_loss(plain, in_place)
    torch.testing.assert_close(transfer_loss(plain, in_place, IMAGE, ["blocks.0"]), expected)


class ChannelsLast(nn.Module):
    """A convolution with an output that ``forward`` permutes to channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)


def test_permuted_convolution_output_is_channels_last() -> None:
    student, teacher = (nn.Sequential(ChannelsLast(), Mix(8)) for _ in "st")
    at, x = AttentionTransfer(student, teacher, ["0"], beta=1.0, verbose=False), IMAGE
    s, t = student[0](x), teacher[0](x)
    student(x)
    torch.testing.assert_close(at(x), at_loss(s, t, channel_dim=-1))


def test_named_layer_with_a_single_position_raises() -> None:
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)).requires_grad_() for _ in "st"
    )
    at = AttentionTransfer(student, teacher, ["1"], beta=1.0, verbose=False)
    student(IMAGE)
    with pytest.raises(ValueError, match="student's layer '1' has a single element"):
        at(IMAGE)

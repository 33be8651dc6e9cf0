"""The layers that AttentionTransfer chooses, and how it reads their features, or refuses to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from at_fused import AttentionTransfer, TeacherCache, at_loss, match_layers

BETA = 1000.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more. In float64 no rounding is near a tolerance."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Convolve(nn.Module):
    """A residual block of channels first."""

    def __init__(self, c: int, c_out: int, stride: int = 1, rank: int = 2) -> None:
        super().__init__()
        make, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
        self.conv = nn.Sequential(make(c, c_out, 3, stride, 1), norm(c_out), nn.ReLU())
        self.out = nn.Sequential(make(c_out, c_out, 3, 1, 1), norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.out(self.conv(x)))


class Mix(nn.Module):
    """A block of channels last: no convolution, any number of dimensions."""

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
    """Blocks of one size, in a layout: what was embedded goes through them."""

    def __init__(
        self, embed: nn.Module, blocks: list[nn.Module], lay: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.embed, self.blocks, self.lay = embed, nn.ModuleList(blocks), lay
        width = getattr(embed, "out_channels", None) or getattr(embed, "embedding_dim", 0)
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lay(self.embed(x), self.token)
        for block in self.blocks:
            x = block(x)
        return x.flatten(1)


def tokens(before: int, after: int = 0) -> Callable[..., Tensor]:
    def lay(x: Tensor, token: Tensor) -> Tensor:
        patches = x.flatten(2).mT
        extra = token.expand(len(x), -1, -1)
        return torch.cat([extra] * before + [patches] + [extra] * after, 1)

    return lay


def as_it_is(x: Tensor, token: Tensor) -> Tensor:
    return x


def last(x: Tensor, token: Tensor) -> Tensor:
    return x.movedim(1, -1)


def of_first(x: Tensor) -> Tensor:
    return x.pow(2).mean(1).flatten(1)


def of_last(skip: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.pow(2).mean(-1).flatten(1)[:, skip:]


_DATA = torch.Generator().manual_seed(0)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DATA, dtype=torch.float64)


IMAGE, SIGNAL, CLIP = data(2, 3, 24, 32), data(4, 2, 64), data(2, 3, 4, 16, 16)
WORDS = torch.randint(30, (3, 12), generator=_DATA)
Patch, Clip = (lambda c: nn.Conv2d(3, c, 4, 4)), (lambda c: nn.Conv3d(3, c, (2, 4, 4), (2, 4, 4)))


def mixing(embed: Any, lay: Any) -> Callable[[int], Net]:
    return lambda c: Net(embed(c), [Mix(c), Mix(c)], lay)


def convolving(embed: Any, rank: int) -> Callable[[int], Net]:
    return lambda c: Net(embed(c), [Convolve(c, c, 1, rank), Convolve(c, c, 1, rank)], as_it_is)


# A network of a width, its input, the map of its features by hand, and how they are described.
LAYOUTS: dict[str, tuple[Callable[[int], Net], Tensor, Callable[[Tensor], Tensor], str]] = {
    "maps": (convolving(Patch, 2), IMAGE, of_first, "(B, {c}, H, W)"),
    "maps, channels last": (mixing(Patch, last), IMAGE, of_last(0), "(B, H, W, {c})"),
    "patches": (mixing(Patch, tokens(0)), IMAGE, of_last(0), "(B, N, {c})"),
    "a class token": (mixing(Patch, tokens(1)), IMAGE, of_last(1), "(B, 1+48, {c})"),
    "and distillation": (mixing(Patch, tokens(2)), IMAGE, of_last(2), "(B, 2+48, {c})"),
    "and registers": (mixing(Patch, tokens(5)), IMAGE, of_last(5), "(B, 5+48, {c})"),
    "a signal": (convolving(lambda c: nn.Conv1d(2, c, 4, 4), 1), SIGNAL, of_first, "(B, {c}, L)"),
    "words": (
        mixing(lambda c: nn.Embedding(30, c), lambda x, token: x), WORDS, of_last(0), "(B, N, {c})",
    ),
    "video": (convolving(Clip, 3), CLIP, of_first, "(B, {c}, T, H, W)"),
    "video, channels last": (mixing(Clip, last), CLIP, of_last(0), "(B, T, H, W, {c})"),
    "video tokens": (mixing(Clip, tokens(1)), CLIP, of_last(1), "(B, 1+32, {c})"),
}  # fmt: skip


def by_hand(student: Net, teacher: Net, x: Tensor, map_of: Callable[[Tensor], Tensor]) -> Tensor:
    maps = []
    for model in (student, teacher):
        feature, features = model.lay(model.embed(x), model.token), []
        for block in model.blocks:
            feature = block(feature)
            features.append(torch.nn.functional.normalize(map_of(feature)))
        maps.append(features)
    return BETA * sum((s - t.detach()).pow(2).mean() for s, t in zip(*maps, strict=True))


@pytest.mark.parametrize("how", ["example", "names", "names and example", "compiled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(layout: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, x, map_of, described = LAYOUTS[layout]
    student, teacher = make(8).eval(), make(12).eval()
    expected = by_hand(student, teacher, x, map_of)
    right = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    names = ["blocks.0", "blocks.1"]
    model: Any = student
    if how == "compiled":
        torch._dynamo.reset()
        model = torch.compile(student, backend="aot_eager", fullgraph=True)
    given = {
        "example": {"example": x},
        "names and example": {"layers": names, "example": x},
    }.get(how, {"layers": names})
    at = AttentionTransfer(model, teacher, beta=BETA, **given)
    assert at.pairs == [(name, name) for name in names]
    if how == "example":
        printed = capsys.readouterr().out.splitlines()[1:3]
        for width in (8, 12):
            assert all(described.format(c=width) in line for line in printed)
    for _ in range(3):  # the first pass of named layers is another than those after it
        model(x)
        loss = at(x)
        torch.testing.assert_close(loss, expected)
        found = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        torch.testing.assert_close(found, right)


def test_tokens_of_a_map() -> None:
    """Grids that are no squares, one against a network of maps, the other against a ViT."""
    make, x, *_ = LAYOUTS["and registers"]
    coarse = mixing(lambda c: nn.Conv2d(3, c, 8, 8), tokens(1))
    student, maps, small = make(8).eval(), LAYOUTS["maps"][0](12).eval(), coarse(12).eval()
    s = student(x).view(2, 53, 8)[:, 5:].mT.unflatten(2, (6, 8))
    of_maps = maps(x).view(2, 12, 6, 8).detach()
    of_small = small(x).view(2, 13, 12)[:, 1:].mT.unflatten(2, (3, 4)).detach()
    for teacher, t, resize in ((maps, of_maps, None), (small, of_small, "maps")):
        options = {"weights": [0.0, 1.0], "resize": resize}
        at = AttentionTransfer(student, teacher, example=x, beta=BETA, **options)
        student(x)
        torch.testing.assert_close(at(x), BETA * at_loss(s, t, resize=resize))
        at.remove()


def test_a_class_token_that_comes_later() -> None:
    """All patches count where a network has put its class token only before later layers."""

    class Later(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.embed, self.patches, self.end = nn.Conv2d(3, c, 8, 8), Mix(c), Mix(c)
            self.cls_token, self.num_prefix_tokens = nn.Parameter(torch.randn(1, 1, c)), 1

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(self.embed(x).flatten(2).mT)
            return self.end(torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1))[:, 0]

    student, teacher, x = Later(8), Later(12), torch.randn(2, 3, 32, 32)
    for layer, skip in (("patches", 0), ("end", 1)):
        at = AttentionTransfer(student, teacher, [layer], beta=1.0)
        with torch.no_grad():
            got = [model.patches(model.embed(x).flatten(2).mT) for model in (student, teacher)]
            if skip:
                token = [m.cls_token.expand(2, -1, -1) for m in (student, teacher)]
                got = [
                    m.end(torch.cat(each, 1))
                    for m, *each in zip((student, teacher), token, got, strict=True)
                ]
            expected = at_loss(*got, channel_dim=-1, skip_tokens=skip)
        student(x)
        torch.testing.assert_close(at(x), expected)
        at.remove()


# ---- refused -------------------------------------------------------------------------------------


class Shuffled(nn.Module):
    """A ViT that keeps its patches in an order of its own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, c, 4, 4), Mix(c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1)
        return self.block(x.flatten(1, 4))


@pytest.mark.parametrize(
    ("make", "size", "options", "message"),
    [
        (
            lambda: Net(Patch(8), [Mix(8)], tokens(0, 4)),
            32,
            {},
            "last 4 of its 68 tokens are no pat",
        ),
        (lambda: Shuffled(8), 32, {}, "its tokens do not lie as the image does"),
        (
            lambda: LAYOUTS["maps"][0](64),
            32,
            {"channel_dim": -1},
            "would be 64x8 for an image of 32x32",
        ),
        (
            lambda: LAYOUTS["maps, channels last"][0](64),
            32,
            {"channel_dim": 1},
            "would be 8x64 for",
        ),
        (
            lambda: Net(Patch(8), [Mix(8)], tokens(1)),
            32,
            {"skip_tokens": 65},
            "leaves none of its 65",
        ),
    ],
)
def test_refused(make: Any, size: int, options: dict[str, Any], message: str) -> None:
    x = torch.randn(2, 3, size, size)
    student, teacher = make(), make()
    with pytest.raises(ValueError, match=message):
        match_layers(student, teacher, x, **options)
    name = next(n for n, m in student.named_modules() if n in ("block", "blocks.0"))
    at = AttentionTransfer(student, teacher, [name], beta=1.0, **options)
    student(x)
    with pytest.raises(ValueError, match=f"the student's '{name}'.*{message}"):
        at(x)


@pytest.mark.parametrize("resize", ["features", "map"])
def test_an_unknown_resize_is_refused(resize: str) -> None:
    with pytest.raises(ValueError, match=f"resize must be None or 'maps', got '{resize}'"):
        match_layers(Trunk(), Trunk(), IMAGE, resize=resize)


def test_as_many_channels_as_rows_and_columns() -> None:
    """A map that follows the image shows that a block has turned its feature back, or not."""

    class Turning(nn.Module):
        def __init__(self, c: int, back: bool) -> None:
            super().__init__()
            self.conv, self.norm, self.back = nn.Conv2d(c, c, 3, 1, 1), Mix(c), back

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x).movedim(1, -1))
            return x.movedim(-1, 1) if self.back else x

    x = torch.randn(2, 3, 64, 64)
    for back, channel_dim in ((True, 1), (False, -1)):
        networks = [Net(Patch(16), [Turning(16, back)], as_it_is) for _ in "ab"]
        for given in ({"example": x}, {"layers": ["blocks.0"]}):
            at = AttentionTransfer(*networks, beta=BETA, **given)
            features = [model(x).view(2, 16, 16, 16) for model in networks]
            expected = BETA * at_loss(*features, channel_dim=channel_dim)
            torch.testing.assert_close(at(x), expected)
            at.remove()


def test_why_there_is_no_stage() -> None:
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in "ab"]
    with pytest.raises(ValueError, match=r"student none \(blocks.1: it ends in a LayerNorm"):
        match_layers(*(Net(Patch(8), layers, tokens(1)) for _ in "ab"), IMAGE)


# ---- the choice ----------------------------------------------------------------------------------


class Stage(nn.Module):
    """Blocks, then half the size."""

    def __init__(self, c: int, c_out: int, down: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(c, c, 3, 1, 1), nn.ReLU()) for _ in "ab")
        )
        self.down = nn.Conv2d(c, c_out, 2, 2) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.blocks(x))


class EndsSmaller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(16, 5)
        self.st1, self.st2, self.st3 = Stage(8, 12, True), Stage(12, 16, True), Stage(16, 16, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.st3(self.st2(self.st1(self.stem(x)))).mean((2, 3)))


class Trunk(nn.Module):
    """Stages at halves of the size; the stem and the last layer are made as its blocks are."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way, self.stem = way, Convolve(3, 4, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(Convolve(c, 2 * c, 2), Convolve(2 * c, 2 * c)) for c in (4, 8, 16)
        )
        self.final_conv = Convolve(32, 40)

    def forward(self, x: Any) -> Any:
        while not isinstance(x, Tensor):
            x = x[-1]
        features = [x]
        for layer in (self.stem, *self.stages):
            features.append(layer(features[-1]))
        return features if self.way == "features" else self.final_conv(features[-1])


class Calls(nn.Module):
    """A network that calls its trunk in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.trunk = way, Trunk(way)
        self.decode = nn.Sequential(Convolve(32, 8), nn.Upsample(scale_factor=2), Convolve(8, 8))
        self.classifier = nn.Sequential(Convolve(32, 16), Convolve(16, 16), nn.Conv2d(16, 5, 1))

    def forward(self, x: Tensor) -> Any:
        if self.way == "keyword":
            return self.trunk(x=x)
        if self.way == "list":
            return self.trunk([x])
        if self.way == "nested":
            return self.trunk((0, (x,)))
        last = self.trunk(x)[-1]
        return {"out": self.classifier(last), "up": self.decode(last)}


STAGES = [f"trunk.stages.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (EndsSmaller, ["st1.blocks", "st2.blocks", "st3"]),
        (Trunk, ["stages.0", "stages.1", "stages.2"]),
        *(
            (lambda way=way: Calls(way), STAGES)
            for way in ("keyword", "list", "nested", "features")
        ),
        # A norm after the last block is none of it; a block that ends in one has no other end.
        (
            lambda: Net(Patch(8), [nn.Sequential(Mix(8), nn.LayerNorm(8))], tokens(1)),
            ["blocks.0.0"],
        ),
    ],
)
def test_blocks_are_chosen(make: Any, names: list[str]) -> None:
    x = torch.randn(2, 3, 32, 32)
    pairs = match_layers(make(), make(), x, verbose=False)
    assert pairs == [(name, name) for name in names]


def test_blocks_of_one_size_are_paired_at_proportional_depth() -> None:
    def vit(c: int, depth: int) -> Net:
        return Net(Patch(c), [Mix(c) for _ in range(depth)], tokens(1))

    pairs = match_layers(vit(8, 6), vit(12, 12), IMAGE, verbose=False)
    expected = [(0, 2), (2, 5), (3, 8), (5, 11)]
    assert pairs == [(f"blocks.{s}", f"blocks.{t}") for s, t in expected]
    assert match_layers(vit(8, 2), Trunk(), IMAGE, verbose=False) == [("blocks.1", "stages.0")]


def test_a_layer_that_is_changed_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    class Linear(Convolve):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x))

    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Convolve(3, 4, 2), Linear(4, 8, 2), Convolve(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(nn.functional.relu(self.b(self.a(x)), inplace=True))

    student, teacher = Changes(), Changes()
    at = AttentionTransfer(student, teacher, example=IMAGE, beta=1.0)
    assert at.pairs == [("a", "a"), ("c", "c")]
    message = "left out of the student: b (what follows changes its output in place)"
    assert message in capsys.readouterr().out
    (student(IMAGE).sum() + at(IMAGE)).backward()
    with pytest.raises(ValueError, match=r"the student's 'b'.*changes its output in place"):
        AttentionTransfer(student, teacher, ["b"], example=IMAGE, beta=1.0)


def test_the_choice_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    match_layers(LAYOUTS["and registers"][0](8), Trunk(), torch.randn(2, 3, 32, 32))
    assert capsys.readouterr().out.splitlines() == [
        "map  student   features      teacher   features",
        "8x8  blocks.1  (B, 5+64, 8)  stages.0  (B, 8, H, W)",
        "left out of the teacher: stages.1 (the other network has no stage of 4x4)",
        "left out of the teacher: stages.2 (the other network has no stage of 2x2)",
        "left out of the teacher: stem, final_conv (outside of the stages)",
    ]


# ---- examples and passes -------------------------------------------------------------------------


class Masked(nn.Module):
    """Takes several inputs, in any form."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.net = Net(Patch(c), [Mix(c), Mix(c)], tokens(1))

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return self.net(pixels * mask)


@pytest.mark.parametrize("batch", [(IMAGE, IMAGE > 0), {"mask": IMAGE > 0, "pixels": IMAGE}])
@pytest.mark.parametrize("named", [False, True])
def test_examples_of_several_inputs(batch: Any, named: bool) -> None:
    student, teacher = Masked(8), Masked(12)
    layers = ["net.blocks.0", "net.blocks.1"]
    given = {"layers": layers} if named else {"example": batch}
    at = AttentionTransfer(student, teacher, beta=BETA, **given)
    expected = by_hand(student.net, teacher.net, IMAGE * (IMAGE > 0), of_last(1))
    student(**batch) if isinstance(batch, dict) else student(*batch)
    torch.testing.assert_close(at(batch), expected)
    assert at.pairs == [(name, name) for name in layers]


def test_a_signal_as_the_public_loss_has_it() -> None:
    """(B, C, L) features of a 1-D network: channels come first, as in ``at_loss``."""
    networks = [
        nn.Sequential(nn.Conv1d(2, c, 3, 2, 1), nn.ReLU(), nn.Conv1d(c, 2 * c, 3, 2, 1))
        for c in (8, 12)
    ]
    features = [[net[:1](SIGNAL), net(SIGNAL)] for net in networks]
    expected = BETA * at_loss(*features)
    for given in ({"layers": ["0", "2"]}, {"example": SIGNAL}):
        at = AttentionTransfer(*networks, beta=BETA, **given)
        networks[0](SIGNAL)
        if "layers" in given:
            torch.testing.assert_close(at(SIGNAL), expected)
        else:
            assert at.pairs == [("1", "1"), ("2", "2")]
        at.remove()


# ---- evidence that could be misread --------------------------------------------------------------


class Turned(nn.Module):
    """A module of (B, C, N) within a network of tokens."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.mT).mT


class WithLabels(Masked):
    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return self.net(pixels)


def vit(c: int, *between: nn.Module) -> Net:
    return Net(Patch(c), [Mix(c), *between, Mix(c)], tokens(1))


@pytest.mark.parametrize("kind", ["norm", "convolution", "labels"])
def test_lengths_of_other_things_are_no_grids(kind: str) -> None:
    """49 = 1 + 48 tokens are as long as a norm over tokens, and as another input."""

    def make(c: int) -> nn.Module:
        if kind == "labels":
            return WithLabels(c)
        inner = nn.BatchNorm1d(c) if kind == "norm" else nn.Conv1d(c, c, 1)
        return vit(c, Turned(inner)).eval()

    student, teacher = make(8), make(12)
    batch = (IMAGE, torch.ones(2, 49)) if kind == "labels" else IMAGE
    nets = [model.net if kind == "labels" else model for model in (student, teacher)]
    for given in (
        {"example": batch},
        {"layers": ["net.blocks.0" if kind == "labels" else "blocks.0"]},
    ):
        at = AttentionTransfer(student, teacher, beta=BETA, verbose=False, **given)
        student(*batch) if isinstance(batch, tuple) else student(batch)
        found = at(batch)
        blocks = [int(pair.student.split(".")[-1]) for pair in at.pairs]
        maps = []
        for net in nets:
            feature, of_net = net.lay(net.embed(IMAGE), net.token), []
            for i, block in enumerate(net.blocks):
                feature = block(feature)
                if i in blocks:
                    of_net.append(nn.functional.normalize(of_last(1)(feature)))
            maps.append(of_net)
        expected = BETA * sum((s - t).pow(2).mean() for s, t in zip(*maps, strict=True))
        torch.testing.assert_close(found, expected)
        at.remove()


def by_columns(x: Tensor, token: Tensor) -> Tensor:
    return x.transpose(2, 3).flatten(2).mT


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
        self.embed, self.encoder = (
            nn.Linear(6, 8),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embed(x).transpose(0, 1))


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth = (nn.Sequential(Convolve(3, 4, 2), Convolve(4, 8, 2)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        return self.rgb(x) + self.depth(x)


class Pooled(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


@pytest.mark.parametrize(
    ("make", "x", "layer", "message"),
    [
        (lambda: Net(Patch(8), [Mix(8)], by_columns), IMAGE, "blocks.0", "do not lie as the image"),
        (SequenceFirst, data(3, 12, 6), "encoder", r"batch does not come first in \(12, 3"),
        (TwoBranches, IMAGE, None, "'rgb' and 'depth' have the same stages"),
        (lambda: Pooled(1), IMAGE, "pool", "has a single position"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), data(2, 3), None, "no layer .* gives feat"),
    ],
)
def test_refused_for_what_the_pass_shows(
    make: Any, x: Tensor, layer: str | None, message: str
) -> None:
    student, teacher = make(), make()

    def use() -> None:
        if layer is None:
            match_layers(student, teacher, x)
        else:
            at = AttentionTransfer(student, teacher, [layer], beta=1.0)
            student(x)
            at(x)

    with pytest.raises(ValueError, match=message):
        use()


def test_other_proportions_than_the_examples() -> None:
    student, teacher = vit(8), nn.Sequential(nn.Conv2d(3, 4, 4, 4))
    for x in (torch.randn(2, 3, 16, 64), torch.randn(2, 3, 48, 48)):
        at = AttentionTransfer(
            student, teacher, [("blocks.1", "0")], beta=BETA, example=torch.randn(2, 3, 32, 32)
        )
        size = (x.shape[2] // 4, x.shape[3] // 4)
        feature = student(x).view(2, -1, 8)[:, 1:].mT.unflatten(2, size)
        torch.testing.assert_close(at(x), BETA * at_loss(feature, teacher(x).detach()))
        at.remove()


# ---- passes without an example -------------------------------------------------------------------


def expected_of(student: Net, teacher: Net, x: Tensor) -> Tensor:
    return by_hand(student, teacher, x, of_last(1))


def test_named_layers_are_read_in_the_pass_itself() -> None:
    """No other pass runs, which own hooks, buffers and random numbers would notice."""
    student, teacher, second = vit(8), vit(12), vit(16)
    passes, kept = [0], {}
    student.register_forward_pre_hook(lambda *_: passes.append(1))
    student.blocks[0].register_forward_hook(lambda m, args, y: kept.update(y=y))
    names = ["blocks.0", "blocks.1"]
    first, other = (AttentionTransfer(student, t, names, beta=BETA) for t in (teacher, second))
    student(IMAGE)
    copy_of_input = IMAGE.clone()
    losses = first(copy_of_input), other(copy_of_input)
    assert sum(passes) == 1
    assert kept["y"].requires_grad
    expected = expected_of(student, teacher, IMAGE), expected_of(student, second, IMAGE)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(
    "way", ["checkpoint", "inference", "compiled blocks", "expanded", "mutual"]
)
def test_first_passes(way: str) -> None:
    student, teacher, x, names = vit(8), vit(12), IMAGE, ["blocks.0", "blocks.1"]
    if way == "expanded":
        x = IMAGE[:, :1].expand(-1, 3, -1, -1).requires_grad_()
    expected = expected_of(student, teacher, x)
    right = torch.autograd.grad(expected, list(student.parameters()), retain_graph=True)
    if way == "checkpoint":
        for block in student.blocks:
            plain = block.forward
            block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
        names = ["blocks.0.mix", "blocks.1"]
    if way == "compiled blocks":
        torch._dynamo.reset()
        for block in student.blocks:
            block.compile(backend="eager", fullgraph=True)
    at = AttentionTransfer(student, teacher, names, beta=BETA)
    if way == "inference":
        with torch.inference_mode():
            at.prepare(x)
    if way == "mutual":
        other = AttentionTransfer(teacher, student, names, beta=BETA)
        teacher(x)
    student(x)
    loss = at(x)
    if way == "mutual":
        torch.testing.assert_close(other(x), expected)
    if way == "checkpoint":
        loss.backward()
        return
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(student.parameters())), right)


def test_an_example_leaves_no_trace() -> None:
    class Draws(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x + 0 * torch.randn_like(x))

    networks = [Draws(Patch(8), [Mix(8)], by_columns) for _ in "ab"]
    for model in networks:
        model.register_buffer("count", torch.zeros(()))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="do not lie as the image"):
        match_layers(*networks, IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert [int(model.count) for model in networks] == [0, 0]


def test_a_full_cache_reads_tokens_as_an_empty_one(tmp_path: Path) -> None:
    """The teacher's 2x8 tokens would pass for 4x4."""
    x, teacher = torch.randn(4, 3, 8, 32), Net(Patch(12), [Mix(12)], tokens(0))
    student, losses = nn.Sequential(nn.Conv2d(3, 4, 2, 2)), []
    for cache in (TeacherCache(tmp_path, samples=4), TeacherCache(tmp_path, samples=4), None):
        at = AttentionTransfer(
            student, teacher, [("0", "blocks.0")], beta=BETA, resize="maps", cache=cache
        )
        student(x)
        losses.append(at(x, range(4)) if cache else at(x))
        at.remove()
    assert losses[0] == losses[1] == losses[2]


def test_a_mask_of_pixels_for_tokens_of_both() -> None:
    student, teacher, mask = vit(8), vit(12), torch.rand(2, 24, 32) > 0.5
    at = AttentionTransfer(student, teacher, ["blocks.1"], beta=BETA)
    maps = [m(IMAGE).view(2, 49, -1)[:, 1:].mT.unflatten(2, (6, 8)) for m in (student, teacher)]
    expected = BETA * at_loss(maps[0], maps[1].detach(), mask=mask)
    torch.testing.assert_close(at(IMAGE, mask=mask), expected)


def test_markers_that_hand_their_input_on() -> None:
    networks = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity()) for _ in "ab"]
    at = AttentionTransfer(*networks, ["1"], beta=BETA)
    features = [model(IMAGE) for model in networks]
    torch.testing.assert_close(at(IMAGE), BETA * at_loss(features[0], features[1].detach()))


def test_a_watch_ends() -> None:
    """Neither an interrupt nor a network that calls itself leaves anything on, nor a removal."""

    class Calls(Net):
        stop = deep = False

        def forward(self, x: Tensor) -> Tensor:
            if self.stop:
                raise KeyboardInterrupt
            if self.deep:
                self.deep = False
                return super().forward(x) + self(x.flip(-1))
            return super().forward(x)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules())

    student, teacher = Calls(Patch(8), [Mix(8)], tokens(1)), vit(12)
    at = AttentionTransfer(student, teacher, [("blocks.0", "blocks.1")], beta=BETA)
    before = hooks()
    student.stop = True
    with pytest.raises(KeyboardInterrupt):
        student(IMAGE)
    student.stop, student.deep = False, True
    student(IMAGE)
    assert hooks() == before
    assert not torch.overrides._get_current_function_mode_stack()
    student(IMAGE)
    torch.testing.assert_close(at(IMAGE), expected_last(student, teacher))
    at.remove()
    assert hooks() == 0


def expected_last(student: Net, teacher: Net) -> Tensor:
    features = [model(IMAGE).view(2, 49, -1).detach() for model in (student, teacher)]
    return BETA * at_loss(*features, channel_dim=-1, skip_tokens=1)


@pytest.mark.parametrize("where", ["around", "two passes"])
def test_checkpoints_in_a_first_pass(where: str) -> None:
    student, teacher = vit(8), vit(12)
    right = torch.autograd.grad(expected_of(student, teacher, IMAGE), list(student.parameters()))
    at = AttentionTransfer(student, teacher, ["blocks.0", "blocks.1"], beta=BETA)
    if where == "around":
        checkpoint(student, IMAGE, use_reentrant=False)
        loss = at(IMAGE)
    else:
        for block in student.blocks:
            plain = block.forward
            block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
        student(IMAGE)
        loss = at(IMAGE)
        student(IMAGE)
        loss = (loss + at(IMAGE)) / 2
    torch.testing.assert_close(torch.autograd.grad(loss, list(student.parameters())), right)


@pytest.mark.parametrize("mode", ["teacher", "student"])
def test_changes_in_place_after_a_layer_in_a_first_pass(mode: str) -> None:
    class Changes(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.lay(self.embed(x), self.token))
            x[:, 1:5] = 0
            return x.flatten(1)

    plain, changing = vit(8), Changes(Patch(8), [Mix(8)], tokens(1))
    student, teacher = (changing, plain) if mode == "student" else (plain, changing)
    at = AttentionTransfer(student, teacher, ["blocks.0"], beta=BETA)
    if mode == "student":
        with pytest.raises(RuntimeError, match="inplace"):
            student(IMAGE)
        return
    features = [net.blocks[0](net.lay(net.embed(IMAGE), net.token)) for net in (student, teacher)]
    student(IMAGE)
    expected = BETA * at_loss(features[0], features[1].detach(), channel_dim=-1, skip_tokens=1)
    torch.testing.assert_close(at(IMAGE), expected)


def test_replicas_are_no_evidence() -> None:
    student, teacher = vit(8), vit(12)
    expected = expected_of(student, teacher, IMAGE)
    at = AttentionTransfer(student, teacher, ["blocks.0", "blocks.1"], beta=BETA)
    replica = student._replicate_for_data_parallel()
    replica._modules = student._modules
    for name, parameter in student._parameters.items():
        setattr(replica, name, parameter)
    replica(IMAGE)
    torch.testing.assert_close(at(IMAGE), expected)


def test_another_example_between_a_pass_and_its_loss() -> None:
    student, teacher = vit(8), vit(12)
    expected = expected_of(student, teacher, IMAGE)
    at = AttentionTransfer(student, teacher, ["blocks.0", "blocks.1"], beta=BETA)
    student(IMAGE)
    match_layers(student, teacher, torch.randn(2, 3, 24, 32), verbose=False)
    torch.testing.assert_close(at(IMAGE), expected)


@pytest.mark.parametrize(
    "move", [lambda x: x.flip(1), lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1)]
)
def test_tokens_that_move_on_the_way(move: Callable[[Tensor], Tensor]) -> None:
    class Moves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return move(x)

    student, teacher = Net(Patch(8), [Mix(8), Moves(), Mix(8)], tokens(0)), vit(12)
    at = AttentionTransfer(student, teacher, [("blocks.2", "blocks.1")], beta=BETA)
    student(IMAGE)
    with pytest.raises(ValueError, match="its tokens do not lie as the image does"):
        at(IMAGE)

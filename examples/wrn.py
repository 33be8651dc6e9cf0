"""Attention transfer as in the paper: a wide residual network (WRN) teaches a smaller one.

    python examples/wrn.py                # scikit-learn's digits, half a minute on one core
    python examples/wrn.py --root DATA    # CIFAR-10, WRN-16-2 to WRN-16-1, trained as in the paper

Trains a teacher, a student alone, and a student with AT: Zagoruyko & Komodakis, "Paying More
Attention to Attention", ICLR 2017. AT gains most with little data, so students see only 50 digits.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from at_fused import at_loss, kd_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """BatchNorm, ReLU and convolution, twice, around a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm0(x))
        residual = self.shortcut(y) if self.shortcut else x
        return residual + self.conv1(F.relu(self.norm1(self.conv0(y))))


class WRN(nn.Module):
    """WRN-depth-k: three groups of (depth - 4) / 6 blocks, of 16 k, 32 k and 64 k channels."""

    def __init__(self, depth: int, k: int, colours: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(colours, 16, 3, padding=1, bias=False)
        self.groups = nn.ModuleList(
            nn.Sequential(Block(c_in, c, stride), *(Block(c, c, 1) for _ in range(10, depth, 6)))
            for c_in, c, stride in ((16, 16 * k, 1), (16 * k, 32 * k, 2), (32 * k, 64 * k, 2))
        )
        self.norm, self.head = nn.BatchNorm2d(64 * k), nn.Linear(64 * k, 10)
        for name, p in self.named_parameters():
            init = nn.init.kaiming_normal_ if p.dim() > 1 else nn.init.uniform_  # BatchNorm
            (nn.init.zeros_ if name.endswith("bias") else init)(p)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        g0 = self.groups[0](self.stem(x))
        g1 = self.groups[1](g0)
        g2 = self.groups[2](g1)
        o = self.head(F.relu(self.norm(g2)).mean((2, 3)))
        return o, (g0, g1, g2)


def digits() -> list[Dataset]:  # for the teacher, the students and the test
    torch.set_num_threads(1)  # small networks are slower with more threads
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = F.interpolate(x.float().view(-1, 1, 8, 8) / 8 - 1, (12, 12), mode="bilinear")
    return [TensorDataset(x[i], y[i]) for i in (slice(1297), slice(50), slice(1297, None))]


def cifar(root: str) -> list[Dataset]:
    mean, std = ([c / 255 for c in rgb] for rgb in ([125.3, 123, 113.9], [63, 62.1, 66.7]))
    image = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    augment = [v2.Pad(4, padding_mode="reflect"), v2.RandomHorizontalFlip(), v2.RandomCrop(32)]
    train = CIFAR10(root, transform=v2.Compose(augment + image), download=True)
    return [train, train, CIFAR10(root, train=False, transform=v2.Compose(image))]


def train(name, model, images, test, epochs, teacher=None, alpha=0.0, beta=0.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    drops = [epochs * tenths // 10 for tenths in (3, 6, 8)]  # epochs 60, 120 and 160 of 200
    for epoch in range(1, epochs + 1):
        optimizer.param_groups[0]["lr"] *= 0.2 ** drops.count(epoch)
        for x, y in images:
            x, y = x.to(DEVICE), y.to(DEVICE)
            o, groups = model(x)
            loss = F.cross_entropy(o, y)
            if teacher:
                with torch.no_grad():
                    o_t, groups_t = teacher(x)
                loss = kd_loss(o, o_t, y, T=4, alpha=alpha) + beta * at_loss(groups, groups_t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % max(1, epochs // 10) == 0:
            print(f"{name}: epoch {epoch} of {epochs}, loss {loss.item():.3f}")
    with torch.no_grad():
        correct = [model.eval()(x.to(DEVICE))[0].argmax(1).cpu() == y for x, y in test]
    print(f"{name}: test accuracy {100 * torch.cat(correct).float().mean():.2f} %")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", help="folder of CIFAR-10, downloaded if it is missing")
    parser.add_argument("--epochs", type=int, default=200, help="for a student (default: 200)")
    parser.add_argument("--alpha", type=float, default=0.0, help="weight of KD (paper: 0.9)")
    parser.add_argument("--beta", type=float, help="weight of AT (default: 1000, digits: 140)")
    a = parser.parse_args(arguments)
    depth, colours, sets, workers = (16, 3, cifar(a.root), 2) if a.root else (10, 1, digits(), 0)
    beta = (1000 if a.root else 140) if a.beta is None else a.beta
    full, few, test = (DataLoader(s, 128, shuffle=True, num_workers=workers) for s in sets)
    torch.manual_seed(0)
    teacher, alone, at = (WRN(depth, width, colours).to(DEVICE) for width in (2, 1, 1))
    train("teacher", teacher, full, test, max(1, a.epochs * len(few) // len(full)))
    train("student alone", alone, few, test, a.epochs)
    train("student with AT", at, few, test, a.epochs, teacher, a.alpha, beta)


if __name__ == "__main__":
    main()

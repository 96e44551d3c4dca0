"""The networks that `merging_apart.py` merges: digits from an IDX folder, four architectures, and training them apart.

Belongs here: everything up to a pair of trained models with the receiver that one of them is. What is done with the pair,
and what is reported, is `merging_apart.py`'s matter.

The first 8,000 of 10,000 rows are for training, the last 2,000 for testing. Of every eight training rows six are trained
on, one is validation and one is a probe that all peers have, whatever the classes: nobody trains on it.
"""

import gzip
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aggregation.base import Params, Receiver

NUM_TRAIN = 8_000
BATCH = 100
LEARNING_RATE = 1e-3
HALVES = (range(5), range(5, 10))


# --- data -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Digits:
    """Images [rows, 1, 28, 28] with mean 0 and deviation 1 over all, and labels."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    probe: Tensor
    test: tuple[Tensor, Tensor]


def read_digits(folder: Path) -> Digits:
    """Exits with what is missing where the folder has not the two files."""
    images, labels = (folder / f"{name}.gz" for name in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    for path in (images, labels):
        if not path.is_file():
            sys.exit(
                f"{path} is missing: FOLDER must hold {images.name} and {labels.name} (10,000 digits, IDX, gzip)"
            )
    x = torch.from_numpy(_read_idx(images, 16)).reshape(-1, 1, 28, 28).float() / 255
    y = torch.from_numpy(_read_idx(labels, 8)).long()
    if len(x) != len(y) or len(x) <= NUM_TRAIN:
        sys.exit(
            f"{folder}: {len(x)} images and {len(y)} labels; expected equally many, more than {NUM_TRAIN}"
        )
    x = (x - 0.1307) / 0.3081
    of_eight = torch.arange(NUM_TRAIN) % 8
    rows = {
        name: torch.nonzero(chosen)[:, 0]
        for name, chosen in (("train", of_eight < 6), ("validation", of_eight == 6), ("probe", of_eight == 7))
    }
    return Digits(
        train=(x[rows["train"]], y[rows["train"]]),
        validation=(x[rows["validation"]], y[rows["validation"]]),
        probe=x[rows["probe"]],
        test=(x[NUM_TRAIN:], y[NUM_TRAIN:]),
    )


def _read_idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=np.uint8)


@dataclass(frozen=True)
class Share:
    """The data that one peer has, and how it learns from them.

    classes: all rows of these. others: the part of the rows of the other classes, from 0 to 1. masked: the loss knows of
        `classes` only, so that nothing is learned about the outputs of the others.
    """

    classes: range = range(10)
    others: float = 0.0
    masked: bool = False

    def of(self, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, labels = data
        own = (labels >= self.classes.start) & (labels < self.classes.stop)
        extra = torch.nonzero(~own)[:, 0]
        kept = (
            torch.arange(round(len(extra) * self.others))
            * len(extra)
            // max(1, round(len(extra) * self.others))
        )
        own[extra[kept]] = True
        return inputs[own], labels[own]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if not self.masked:
            return F.cross_entropy(outputs, labels)
        return F.cross_entropy(
            outputs[:, self.classes.start : self.classes.stop], labels - self.classes.start
        )

    def __str__(self) -> str:
        parts = [f"{self.classes.start}-{self.classes.stop - 1}"]
        parts += [f"{self.others:.0%} of the others"] if self.others else []
        return ", ".join([*parts, "masked"] if self.masked else parts)


# --- networks -------------------------------------------------------------------------------------------
def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for read, written in zip((784, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(read, written), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Two convolutions around a shortcut, which has a convolution of its own where the width changes."""

    def __init__(self, read: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(read, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(read, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks. The stem halves the image, so that training takes minutes on one core."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, padding=1, bias=False)
        self.norm = norm(width)
        blocks = [
            Block(read, written, stride, norm)
            for read, written, stride in [
                (width, width, 1), (width, width, 1), (width, width, 1),
                (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 2 * width, 1),
                (2 * width, 4 * width, 2), (4 * width, 4 * width, 1), (4 * width, 4 * width, 1),
            ]
        ]  # fmt: skip
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


def _four_groups(width: int) -> nn.Module:
    return nn.GroupNorm(4, width)


@dataclass(frozen=True)
class Kind:
    title: str
    make: Callable[[], nn.Module]
    epochs: int
    fix: str
    """The rule that puts a mean's activations right: where BatchNorm is, its statistics, else REPAIR."""
    most_pairs: int = 1000
    """However many are asked for: some take long."""


KINDS = {
    "mlp": Kind("MLP 512-512", lambda: _mlp(512, 512), 15, "repair"),
    "deep": Kind("MLP 64-64-64", lambda: _mlp(64, 64, 64), 15, "repair"),
    "resnet": Kind("ResNet-20, 8 wide, BN", lambda: ResNet20(8, nn.BatchNorm2d), 8, "norm.reestimate", 2),
    "resnet-wide": Kind(
        "ResNet-20, 32 wide, BN", lambda: ResNet20(32, nn.BatchNorm2d), 4, "norm.reestimate", 2
    ),
    "resnet-gn": Kind("ResNet-20, 8 wide, GN", lambda: ResNet20(8, _four_groups), 8, "repair", 2),
}
"""By name. A merge of narrow networks is a harder one: they have no units to spare."""


# --- training -------------------------------------------------------------------------------------------
def trained(kind: str, digits: Digits, share: Share, seed: int, cache: Path | None) -> Params:
    """One network, from its own start and in its own order of samples. Read from `cache` where it lies there."""
    path = cache and cache / f"{kind}, {share}, seed {seed}.safetensors"
    if path and path.is_file():
        return load_file(path)
    began = monotonic()
    inputs, labels = share.of(digits.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[kind].make()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(KINDS[kind].epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(BATCH):
            optimizer.zero_grad()
            share.loss(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    print(f"trained {kind} on {share}, seed {seed}: {monotonic() - began:.0f} s", file=sys.stderr)
    params = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(params, path)
    return params


def receiver(kind: str, digits: Digits, share: Share) -> Receiver:
    """The peer that has this data."""
    return Receiver(
        model=KINDS[kind].make().eval(),
        loss=share.loss,
        metrics=lambda outputs, targets: {"accuracy": float((outputs.argmax(1) == targets).float().mean())},
        samples=share.of(digits.train),
        validation=share.of(digits.validation),
        probe=digits.probe,
    )

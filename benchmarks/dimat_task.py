"""The task of `dimat.py`: handwritten digits, as MNIST from a folder or as scikit-learn's."""

import gzip
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from node.tasks import Task, mlp

MNIST = "images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"
NUM_TEST = 2000


def digits(folder: str = "", hidden: tuple[int, ...] = (64,), train: int = 4000) -> Task:
    """folder: holds MNIST's images as the two files of MNIST; none: scikit-learn's 1,797 images.

    The last NUM_TEST images (of scikit-learn's the last fifth) are for testing, the first `train` are dealt. Those that
    follow are the shared probe, which nobody trains on: 512, of scikit-learn's 128.
    """
    images, labels = _mnist(Path(folder)) if folder else _small()
    num_test, num_probe = (NUM_TEST, 512) if folder else (len(labels) // 5, 128)
    end = len(labels) - num_test
    train = min(train, end - num_probe)
    dealt, probe, test = slice(train), slice(train, train + num_probe), slice(end, None)
    images = (images - images[dealt].mean()) / images[dealt].std()
    images = images.flatten(1)
    return Task(
        "dimat-digits",
        partial(mlp, images.shape[1], tuple(hidden), 10),
        (images[dealt], labels[dealt]),
        (images[test], labels[test]),
        probe=images[probe],
    )


def _mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """IDX: a magic number whose last byte is the number of dimensions, the dimensions, the bytes."""
    found = []
    for name in MNIST:
        raw = gzip.decompress((folder / name).read_bytes())
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        found.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))
    images, labels = found
    return torch.from_numpy(images / np.float32(255)), torch.from_numpy(labels.astype(np.int64))


def _small() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images / 16).float(), torch.from_numpy(found.target).long()

"""Two tasks for `simulator.py`: data of MNIST's size, made up from a seed, and a network for each."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from node.tasks import Task, mlp

NUM_SAMPLES = 8000
NUM_TEST = 500


def _images(*shape: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Ten classes as blurred points around ten random images, so that something can be learned."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, *shape, generator=generator)
    labels = torch.randint(0, 10, (NUM_SAMPLES + NUM_TEST,), generator=generator)
    inputs = centres[labels] + 2 * torch.randn(len(labels), *shape, generator=generator)
    return (inputs[:NUM_SAMPLES], labels[:NUM_SAMPLES]), (inputs[NUM_SAMPLES:], labels[NUM_SAMPLES:])


def mlp784() -> Task:
    train, test = _images(784)
    return Task("mlp784", partial(mlp, 784, [100], 10), train, test)


class LeNet(nn.Module):
    """Two convolutions and two linear layers on 28 x 28 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 84)
        self.fc2 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def lenet() -> Task:
    train, test = _images(1, 28, 28)
    return Task("lenet", LeNet, train, test)

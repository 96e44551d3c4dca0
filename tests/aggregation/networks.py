"""Small networks whose permutation symmetries the alignment tests derive and check.

Belongs here: one tiny `nn.Module` per kind of structure (a residual sum, a grouped norm, attention heads, tied
weights, ...) and `NETWORKS`, which makes each of them by name. No test, and nothing about how the symmetries are
found. To add one, write its module and one entry in `NETWORKS`.

Every parameter and every buffer of a normalisation is random, so that an axis that was forgotten shows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCH = 6
TOKENS = 5
VOCABULARY = 20
WIDTH = 16
HEADS = 4
CLASSES = 10

NormFactory = Callable[[int], nn.Module]
NetworkFactory = Callable[[], tuple[nn.Module, Tensor]]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES))


class LeNet(nn.Module):
    """The flatten turns 12 channels of 2x2 into 48 features, four to a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc1 = nn.Linear(12 * 2 * 2, 16)
        self.fc2 = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class ResidualBlock(nn.Module):
    """Two convolutions, and a convolution on the shortcut where the width or the stride changes."""

    def __init__(self, in_width: int, width: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """As ResNet-20, with two blocks a stage instead of three."""

    def __init__(self, norm: NormFactory) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.stem_norm = norm(4)
        self.stages = nn.Sequential(
            ResidualBlock(4, 4, 1, norm),
            ResidualBlock(4, 4, 1, norm),
            ResidualBlock(4, 8, 2, norm),
            ResidualBlock(8, 8, 1, norm),
            ResidualBlock(8, 16, 2, norm),
            ResidualBlock(16, 16, 1, norm),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.stem_norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(2 if width == 4 else 4, width)


class FusedAttention(nn.Module):
    """Queries, keys and values of all heads from one Linear, reshaped to [batch, tokens, 3, heads, d]."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class ChunkedAttention(nn.Module):
    """The same, but the Linear's output is cut in three first, and the attention is spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
        k = k.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
        v = v.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (width // HEADS) ** -0.5
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).contiguous().view(batch, tokens, width))


def _feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))


class PreNormBlock(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = attention
        self.norm2 = nn.LayerNorm(WIDTH)
        self.feed_forward = _feed_forward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class TextClassifier(nn.Module):
    """A pre-norm encoder over tokens, with learned positions and a mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.empty(TOKENS, WIDTH))
        self.blocks = nn.Sequential(PreNormBlock(FusedAttention()), PreNormBlock(FusedAttention()))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embedding(tokens) + self.positions)
        return self.head(self.norm(x).mean(dim=1))


class TorchEncoder(nn.Module):
    """torch's own encoder, between a Linear that makes its width and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=12, dropout=0.1, batch_first=True)
        self.embed = nn.Linear(10, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


class TiedLanguageModel(nn.Module):
    """A post-norm block, and logits per token from the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = FusedAttention(causal=True)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.feed_forward = _feed_forward()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm1(x + self.attention(x))
        x = self.norm2(x + self.feed_forward(x))
        return self.output(x)


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 12, 3, padding=1),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(12 * 4, CLASSES),
    )


class MobileNet(nn.Module):
    """One inverted residual block: widen by 1x1, filter every channel by itself, narrow by 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(x.mean(dim=(2, 3)))


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all that came before: 8, then 8 + 4, then 8 + 4 + 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 4, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(16)
        self.transition = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8 * 2 * 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], dim=1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], dim=1)
        x = F.avg_pool2d(F.relu(self.transition(F.relu(self.norm3(x)))), 4)
        return self.head(x.flatten(1))


class ChunkedTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, WIDTH)
        self.block = PreNormBlock(ChunkedAttention())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(dim=1))


class GatedMlp(nn.Module):
    """SwiGLU on a residual: one Linear makes the gate and the value, unit by unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(20, 8)
        self.norm = nn.LayerNorm(8)
        self.gate_and_value = nn.Linear(8, 2 * 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gate, value = self.gate_and_value(self.norm(x)).chunk(2, dim=-1)
        return self.head(x + self.down(F.silu(gate) * value))


def _inplace() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.2, inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(12, CLASSES),
    )


class Shared(nn.Module):
    """The middle Linear runs twice, so the units it reads are the units it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 12)
        self.middle = nn.Linear(12, 12)
        self.last = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.middle(x))
        x = F.relu(self.middle(x))
        return self.last(x)


class Odd(nn.Module):
    """A running sum ties the first hidden layer's units to their places; the second's may be permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 12)
        self.second = nn.Linear(12, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(F.relu(self.first(x)), dim=-1)
        return self.last(F.relu(self.second(x)))


class VisionTransformer(nn.Module):
    """Patches from a convolution, a class token in front, and the head reads that token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.class_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.empty(1, 1 + 4, WIDTH))
        self.block = PreNormBlock(FusedAttention())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


def randomise(module: nn.Module) -> None:
    """Draws every parameter and every running statistic anew, with the global generator.

    Matrices keep the scale of their inputs; scales of a normalisation lie in [0.5, 1.5], biases around 0.
    """
    norms = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
    scales = {id(norm.weight) for norm in module.modules() if isinstance(norm, norms)}
    with torch.no_grad():
        for parameter in module.parameters():
            if id(parameter) in scales:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        for norm in module.modules():
            if isinstance(norm, _BatchNorm):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_(0.0, 0.5)
                norm.running_var.uniform_(0.5, 1.5)


def _network(build: Callable[[], nn.Module], *sample_shape: int, seed: int = 0) -> NetworkFactory:
    """A factory of the module, always the same, with a batch of float inputs of this shape."""

    def make() -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build().eval()
            randomise(module)
            return module, torch.randn(BATCH, *sample_shape)

    return make


def _token_network(build: Callable[[], nn.Module], seed: int = 0) -> NetworkFactory:
    """The same, with a batch of token sequences."""

    def make() -> tuple[nn.Module, Tensor]:
        module, _ = _network(build, seed=seed)()
        generator = torch.Generator().manual_seed(seed)
        return module, torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)

    return make


NETWORKS: dict[str, NetworkFactory] = {
    "mlp": _network(_mlp, 64),
    "lenet": _network(LeNet, 3, 8, 8),
    "resnet_bn": _network(lambda: ResNet(nn.BatchNorm2d), 3, 8, 8),
    "resnet_gn": _network(lambda: ResNet(_group_norm), 3, 8, 8),
    "transformer": _token_network(TextClassifier),
    "transformer_torch": _network(TorchEncoder, TOKENS, 10),
    "tied_lm": _token_network(TiedLanguageModel),
    "conv1d": _network(_conv1d, 3, 16),
    "depthwise": _network(MobileNet, 3, 8, 8),
    "grouped": _network(_grouped, 3, 8, 8),
    "concat": _network(DenseNet, 3, 8, 8),
    "chunk_qkv": _network(ChunkedTransformer, TOKENS, 10),
    "gated": _network(GatedMlp, 20),
    "inplace": _network(_inplace, 3, 8, 8),
    "shared": _network(Shared, 20),
    "odd": _network(Odd, 20),
    "vit": _network(VisionTransformer, 3, 8, 8),
}
"""By name: makes the module, in eval mode, and example inputs, a batch of 6. Every call makes the same."""

"""What may be permuted in a network, and that permuting it changes nothing that it computes."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from aggregation.base import Params
from aggregation.symmetry import Symmetry, UntraceableError, derive, run, symmetry_of
from tests.aggregation.networks import NETWORKS, randomise

every_network = pytest.mark.parametrize("name", NETWORKS)


def params_of(model: nn.Module) -> Params:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def difference(model: nn.Module, params: Params, inputs: Tensor) -> float:
    """How far outputs move, relative to the largest; by the module itself, not by the traced graph."""
    with torch.no_grad():
        expected = model(inputs)
        outputs = functional_call(model, params, (inputs,), tie_weights=False)
    return float((outputs - expected).abs().max() / expected.abs().max())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_network
@pytest.mark.parametrize("seed", range(3))
def test_a_permuted_network_gives_the_same_outputs(name: str, seed: int) -> None:
    model, inputs = NETWORKS[name]()
    symmetry = derive(model, inputs)

    permuted = symmetry.permute(params_of(model), symmetry.random(generator(seed)))

    assert difference(model, permuted, inputs) < 1e-5


@every_network
def test_permuting_moves_weights(name: str) -> None:
    model, inputs = NETWORKS[name]()
    symmetry, params = derive(model, inputs), params_of(model)

    permuted = symmetry.permute(params, symmetry.random(generator(1)))

    assert any(not torch.equal(permuted[key], params[key]) for key in params)
    assert {key: tensor.shape for key, tensor in permuted.items()} == {
        key: tensor.shape for key, tensor in params.items()
    }


@every_network
def test_to_leave_one_tensor_out_changes_the_outputs(name: str) -> None:
    """So the law above can fail, for each tensor."""
    model, inputs = NETWORKS[name]()
    symmetry, params = derive(model, inputs), params_of(model)
    permuted = symmetry.permute(params, symmetry.random(generator(2)))
    tied = {"embedding.weight": "output.weight"} if name == "tied_lm" else {}
    for key in params:
        if key.endswith("num_batches_tracked") or torch.equal(permuted[key], params[key]):
            continue
        broken = {**permuted, key: params[key], **({tied[key]: params[key]} if key in tied else {})}
        assert difference(model, broken, inputs) > 2e-5, key


@every_network
def test_the_identity_changes_nothing(name: str) -> None:
    model, inputs = NETWORKS[name]()
    symmetry, params = derive(model, inputs), params_of(model)

    permuted = symmetry.permute(params, symmetry.identity())

    assert all(torch.equal(permuted[key], params[key]) for key in params)


@every_network
def test_deriving_leaves_the_module_and_the_generator_as_they_were(name: str) -> None:
    model, inputs = NETWORKS[name]()
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    derive(model, inputs)

    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@every_network
def test_the_traced_graph_computes_what_the_module_computes(name: str) -> None:
    model, inputs = NETWORKS[name]()
    symmetry = derive(model, inputs)

    with torch.no_grad():
        assert torch.allclose(run(symmetry, params_of(model), inputs), model(inputs), atol=1e-6)


def sizes(symmetry: Symmetry) -> list[tuple[int, int]]:
    """Every free axis: its size, and of what it lies within; 0 for nothing."""
    axes = symmetry.axes
    return sorted(
        (axes[number].size, 0 if (within := axes[number].within) is None else axes[within].size)
        for number in symmetry.free
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", [(12, 0), (16, 0)]),
        ("lenet", [(8, 0), (12, 0), (16, 0)]),
        # A stream a stage, and the inside of each of two blocks.
        ("resnet_bn", [(4, 0)] * 3 + [(8, 0)] * 3 + [(16, 0)] * 3),
        # Groups, and channels within each group.
        ("resnet_gn", [(2, 0), (2, 2)] * 3 + [(4, 0), (2, 4)] * 3 + [(4, 0), (4, 4)] * 3),
        # The stream, and in each of two blocks heads, queries with keys, values, and the hidden layer.
        ("transformer", [(16, 0), *[(4, 0), (4, 4), (4, 4), (12, 0)] * 2]),
        ("transformer_torch", [(16, 0), *[(4, 0), (4, 4), (4, 4), (12, 0)] * 2]),
        ("tied_lm", [(16, 0), (4, 0), (4, 4), (4, 4), (12, 0)]),
        ("chunk_qkv", [(16, 0), (4, 0), (4, 4), (4, 4), (12, 0)]),
        ("conv1d", [(8, 0), (12, 0)]),
        ("depthwise", [(8, 0), (16, 0)]),
        ("grouped", [(4, 2), (6, 2), (8, 0)]),
        ("gated", [(8, 0), (12, 0)]),
        ("shared", [(12, 0)]),
    ],
)
def test_all_that_is_free_is_found(name: str, expected: list[tuple[int, int]]) -> None:
    model, inputs = NETWORKS[name]()

    assert sizes(derive(model, inputs)) == sorted(expected)


def test_what_is_held_is_told_by_name_and_reason() -> None:
    odd, grouped = derive(*NETWORKS["odd"]()), derive(*NETWORKS["grouped"]())

    assert odd.left_alone() == {"first.weight[0] (12)": "meets cumsum, which minds the order of units"}
    assert list(grouped.left_alone().values()) == ["groups of a convolution keep their places"]
    assert derive(*NETWORKS["mlp"]()).left_alone() == {}


# --- networks that tempt one to permute what must stay ---------------------------------------------------
class Net(nn.Module):
    """A network from a function of its layers."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._function = forward

    def forward(self, inputs: Tensor) -> Tensor:
        return self._function(self, inputs)


def linear(a: int, b: int) -> nn.Linear:
    return nn.Linear(a, b)


def shuffled(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    x = x.reshape(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
    return net.last(net.second(x).mean((2, 3)))


def tokens(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x).relu().flatten(1))


def mixer(net: Net, x: Tensor) -> Tensor:
    x = x + net.across(net.first(x).transpose(1, 2)).transpose(1, 2).matmul(torch.ones(8, 6) / 8)
    return net.last(x.mean(1))


def doubled(net: Net, x: Tensor) -> Tensor:
    return net.last(torch.cat([net.first(x), net.first(x).flip(1)], 1).relu())


def looked_up(net: Net, x: Tensor) -> Tensor:
    hidden = net.first(x)
    return net.last(hidden[:, [3, 1, 2, 0, 4, 5, 6, 7]])


def sorted_units(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x).sort(1).values)


def picked(net: Net, x: Tensor) -> Tensor:
    hidden = net.first(x).relu()
    return net.last(hidden) * hidden[:, 2:3]


def head_average(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x).reshape(len(x), 2, 4).mean(1))


def head_softmax(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x).reshape(len(x), 2, 4).softmax(1).flatten(1))


def recurrent(net: Net, x: Tensor) -> Tensor:
    return net.last(net.cell(x)[0][:, -1])


def parts(net: Net, x: Tensor) -> Tensor:
    a, b = net.first(x).split([3, 5], dim=1)
    return net.last(torch.cat([b.relu(), a], dim=1))


def strided(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x)[:, ::2])


def unbound(net: Net, x: Tensor) -> Tensor:
    q, k, v = net.first(x).reshape(len(x), x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    return net.last((weights @ v).transpose(1, 2).flatten(2)).mean(1)


def whole(net: Net, x: Tensor) -> Tensor:
    return net.last(F.layer_norm(net.first(x), (5, 8)).mean(1))


def qk_norm(net: Net, x: Tensor) -> Tensor:
    q, k, v = (net.first(x).reshape(len(x), x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4))[:3]
    q, k = net.norm(q), net.norm(k)
    return net.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


def heads_flipped(net: Net, x: Tensor) -> Tensor:
    hidden = net.first(x).view(-1, 2, 2)
    return net.last((hidden * hidden.flip(1)).flatten(1))


def heads_compared(net: Net, x: Tensor) -> Tensor:
    """Every head with every other: their units have one order."""
    hidden = net.first(x).view(-1, 2, 4)
    return net.last(hidden @ hidden.transpose(1, 2)).flatten(1)


def casts(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x).float().relu())


flat, sequence, image = (6, 6), (6, 5, 6), (6, 3, 5, 5)
TEMPTATIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "channel shuffle": (
        lambda: Net(
            shuffled,
            first=nn.Conv2d(3, 8, 3, padding=1),
            second=nn.Conv2d(8, 8, 3, padding=1, groups=4),
            last=linear(8, 4),
        ),
        image,
        1,
    ),
    "tokens flattened": (lambda: Net(tokens, first=linear(6, 8), last=linear(40, 4)), sequence, 1),
    "mixer": (lambda: Net(mixer, first=linear(6, 8), across=linear(5, 5), last=linear(6, 4)), sequence, 0),
    "joined with its mirror image": (
        lambda: Net(doubled, first=linear(6, 8), last=linear(16, 4)),
        flat,
        0,
    ),
    "indexed": (lambda: Net(looked_up, first=linear(6, 8), last=linear(8, 4)), flat, 0),
    "sorted": (lambda: Net(sorted_units, first=linear(6, 8), last=linear(8, 4)), flat, 0),
    "one unit picked": (lambda: Net(picked, first=linear(6, 8), last=linear(8, 4)), flat, 0),
    "averaged over heads": (lambda: Net(head_average, first=linear(6, 8), last=linear(4, 4)), flat, 1),
    "softmax over heads": (lambda: Net(head_softmax, first=linear(6, 8), last=linear(8, 4)), flat, 1),
    "recurrent": (
        lambda: Net(recurrent, cell=nn.GRU(6, 8, batch_first=True), last=linear(8, 4)),
        sequence,
        0,
    ),
    "split and joined": (lambda: Net(parts, first=linear(6, 8), last=linear(8, 4)), flat, 2),
    "strided": (lambda: Net(strided, first=linear(6, 8), last=linear(4, 4)), flat, 0),
    "heads flipped": (lambda: Net(heads_flipped, first=linear(6, 4), last=linear(4, 4)), flat, 0),
    "heads compared": (lambda: Net(heads_compared, first=linear(6, 8), last=linear(2, 4)), flat, 1),
    "cast": (lambda: Net(casts, first=linear(6, 8), last=linear(8, 4)), flat, 1),
    "one slope a channel": (
        lambda: nn.Sequential(linear(6, 8), nn.PReLU(8), linear(8, 4)),
        flat,
        1,
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, dilation=2), nn.Flatten(), nn.Linear(6 * 49, 4)
        ),
        image,
        2,
    ),
    "transposed convolution in groups": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 25, 4)
        ),
        image,
        2,
    ),
    "unbound": (lambda: Net(unbound, first=linear(6, 24), last=linear(8, 4)), sequence, 3),
    "norm over positions too": (lambda: Net(whole, first=linear(6, 8), last=linear(8, 4)), sequence, 1),
    "norm of queries and keys": (
        lambda: Net(qk_norm, first=linear(6, 24), norm=nn.LayerNorm(4), last=linear(8, 4)),
        sequence,
        2,
    ),
}


@pytest.mark.parametrize("name", TEMPTATIONS)
def test_nothing_is_permuted_that_must_stay(name: str) -> None:
    make, shape, least_free = TEMPTATIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = make()
        randomise(model)
        inputs = torch.randn(shape)
    model.eval()
    symmetry = derive(model, inputs)

    assert len(symmetry.free) >= least_free, symmetry.axes
    for seed in range(3):
        permuted = symmetry.permute(params_of(model), symmetry.random(generator(seed)))
        assert difference(model, permuted, inputs) < 1e-5


def test_an_order_within_another_axis_is_its_own_only_where_nothing_is_shared() -> None:
    make, shape, _ = TEMPTATIONS["norm of queries and keys"]
    symmetry = derive(make().eval(), torch.randn(shape, generator=generator()))
    within = {symmetry.axes[number].within for number in symmetry.free if symmetry.axes[number].size == 4}

    assert None in within, "one LayerNorm for all heads gives queries one order for all heads"


def test_frozen_and_shared_parameters_are_permuted_like_others() -> None:
    first, last = linear(6, 8), linear(8, 6)
    last.weight = nn.Parameter(first.weight.detach().T.clone())
    tied = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), last)
    tied[2].weight = nn.Parameter(torch.randn(8, 8, generator=generator()))
    for parameter in tied.parameters():
        parameter.requires_grad = False
    inputs = torch.randn(flat, generator=generator())
    symmetry = derive(tied, inputs)

    assert sizes(symmetry) == [(8, 0), (8, 0)]
    assert difference(tied, symmetry.permute(params_of(tied), symmetry.random(generator())), inputs) < 1e-5


class Auxiliary(nn.Module):
    """A second head that only training sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.second = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(8))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        return self.last(hidden) + 0.3 * self.second(hidden) if self.training else self.last(hidden)


def test_what_only_training_computes_is_permuted_along() -> None:
    model, inputs = Auxiliary(), torch.randn(flat, generator=generator())
    symmetry = derive(model.eval(), inputs)

    assert [symmetry.axes[number].name for number in symmetry.free] == ["first.weight[0]"]
    permuted = symmetry.permute(params_of(model), symmetry.random(generator()))
    for training in (False, True):
        model.train(training)
        assert difference(model, permuted, inputs) < 1e-5
    assert torch.equal(permuted["unused"], model.unused)


@pytest.mark.parametrize("value", [math.nan, 1e30, 0.0])
def test_what_the_module_happens_to_hold_has_no_part_in_it(value: float) -> None:
    model, inputs = NETWORKS["mlp"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)

    assert sizes(derive(model, inputs)) == [(12, 0), (16, 0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_keeps_its_freedom(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
    ).to(dtype)

    assert sizes(derive(model, torch.randn(8, 64, generator=generator()).to(dtype))) == [(256, 0), (256, 0)]


def test_a_wrong_handler_is_found_out_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    from aggregation import operations

    monkeypatch.setitem(operations.HANDLERS, "cumsum", operations.HANDLERS["relu"])
    model, inputs = NETWORKS["odd"]()

    symmetry = derive(model, inputs)

    assert symmetry.left_alone() == {"first.weight[0] (12)": "changes the outputs when it is permuted"}
    assert difference(model, symmetry.permute(params_of(model), symmetry.random(generator())), inputs) < 1e-5


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) if inputs.sum().item() > 0 else inputs


def test_a_network_that_cannot_be_traced_is_refused_with_the_remedy() -> None:
    with pytest.raises(UntraceableError, match=r"torch.export cannot trace the network: "):
        derive(Branching(), torch.ones(3, 4))
    with pytest.raises(ValueError, match="leave the rules out that look into it"):
        symmetry_of(Branching(), torch.ones(3, 4))


def test_a_network_is_looked_into_once() -> None:
    model, inputs = NETWORKS["mlp"]()

    assert symmetry_of(model, inputs) is symmetry_of(model, inputs)


def test_half_precision_is_permuted_to_the_bit() -> None:
    model, inputs = NETWORKS["mlp"]()
    symmetry = derive(model, inputs)
    params = {name: tensor.half() for name, tensor in params_of(model).items()}

    permuted = symmetry.permute(params, symmetry.random(generator()))

    for name, tensor in permuted.items():
        assert tensor.dtype == torch.float16
        assert math.isclose(float(tensor.double().sum()), float(params[name].double().sum()), abs_tol=1e-9)

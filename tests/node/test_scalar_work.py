"""The work of a node that learns by scalars: states equal to the byte, however they were reached, and nothing copied."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aggregation import spsa
from aggregation.perturbation import params_digest, pool_key, seed_key, trained
from aggregation.scalar_code import encode
from node.scalar_state import CLIP, SMALL_SHARE, SUMS, base_digest, base_module, make_state
from node.scalar_work import ScalarWork
from node.settings import TrainingSettings
from node.state_file import StateFile
from node.store import BlobStore
from node.tasks import Task, mlp
from node.training import evaluate
from node.weights import schema_of
from protocols.errors import ConfigError, PeerError
from protocols.events import (
    Estimate,
    Estimated,
    Evaluate,
    Evaluated,
    Replay,
    Replayed,
    RoundScalars,
    Train,
    WorkFailed,
)
from protocols.scalar_terms import ScalarSettings
from protocols.vocabulary import SIGNATURE_BYTES, STATE_ID_BYTES, ModelRef, Reason, ScalarRecord

SEED = 5
AUTHORS = [bytes([number]) * 32 for number in (1, 2, 3)]
SETTINGS = ScalarSettings(learning_rate=0.05, checkpoint_every=3, clip_quantile=0.8)
POOL = msgspec.structs.replace(SETTINGS, pool=64)


def make_task(dtype: torch.dtype = torch.float32, **changes: Any) -> Task:
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(60, 4, generator=generator)
    targets = (inputs[:, 0] + inputs[:, 1] > 0).long()
    parts = {"model": lambda: mlp(4, [8], 2).to(dtype), **changes}
    return Task(
        "two",
        train=(inputs[:40].to(dtype), targets[:40]),
        test=(inputs[40:].to(dtype), targets[40:]),
        **parts,
    )


class Node:
    """One replica on a disk of its own."""

    def __init__(
        self,
        home: Path,
        settings: ScalarSettings = SETTINGS,
        task: Task | None = None,
        author: bytes = AUTHORS[0],
        **training: Any,
    ) -> None:
        home.mkdir(exist_ok=True)
        self.task = make_task() if task is None else task
        self.module = base_module(self.task, None)
        self.base = base_digest(self.module)
        self.state = make_state(settings, self.module, self.base, home / "scratch")
        self.store = BlobStore(home, self.state.check)
        self.work = ScalarWork(
            self.task,
            self.module,
            self.state,
            settings,
            TrainingSettings(**training),
            self.store,
            self.base,
            author,
            SEED,
            "node",
        )
        self.at = ModelRef(self.base, self.state.file.size_bytes, 0, 1)

    def replay(
        self, rounds: tuple[RoundScalars, ...], ref: ModelRef | None = None, save: bool = False
    ) -> ModelRef:
        name = bytes([len(rounds) + 100]) * 32
        result = self.work.perform(Replay(1, ref or self.at, rounds, name, save))
        assert isinstance(result, Replayed), result
        if not save:
            assert result.ref.digest == name
        self.at = result.ref
        return result.ref

    def estimate(self, round_: int = 1, count: int = 4, ref: ModelRef | None = None) -> bytes:
        result = self.work.perform(Estimate(2, ref or self.at, round_, count))
        assert isinstance(result, Estimated), result
        return result.codes

    def digest(self) -> bytes:
        self.state.settle()
        return params_digest(trained(self.module))


def record(author: bytes, round_: int, codes: bytes) -> ScalarRecord:
    return ScalarRecord(author, round_, codes, bytes(STATE_ID_BYTES), bytes(SIGNATURE_BYTES))


def rounds(first: int, last: int, decay: float = 0.01) -> tuple[RoundScalars, ...]:
    rng = np.random.default_rng(SEED)
    said = rng.integers(0, 256, size=(32, 3, 2)).astype(np.uint8)
    return tuple(
        RoundScalars(
            number,
            1e-5,
            decay,
            tuple(record(author, number, bytes(said[number, index])) for index, author in enumerate(AUTHORS)),
        )
        for number in range(first, last + 1)
    )


# --- states ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [SETTINGS, POOL], ids=["direct", "pool"])
def test_a_state_is_the_same_however_it_was_reached(tmp_path: Path, settings: ScalarSettings) -> None:
    decay = 0.0 if settings.pool else 0.01
    whole, pieces, saved = (Node(tmp_path / name, settings) for name in ("whole", "pieces", "saved"))
    base = whole.at
    start = whole.digest()
    end = whole.replay(rounds(1, 9, decay), save=True)
    assert whole.digest() != start

    for number in range(1, 10):
        pieces.replay(rounds(number, number, decay))
    assert pieces.replay((), save=True) == end

    middle = saved.replay(rounds(1, 5, decay), save=True)
    blob = saved.store.path(middle).read_bytes()
    saved.replay(rounds(6, 9, decay))
    digest = saved.digest()
    saved.replay(rounds(1, 2, decay), base)
    assert saved.digest() != digest
    saved.replay(rounds(6, 9, decay), middle)
    assert saved.digest() == digest == whole.digest() == pieces.digest()
    assert saved.replay((), save=True).digest == end.digest
    assert saved.store.path(middle).read_bytes() == blob
    saved.replay((), base)
    assert saved.digest() == start, "the base is put back to the bit"


@pytest.mark.parametrize("settings", [SETTINGS, POOL], ids=["direct", "pool"])
def test_a_newcomer_goes_on_from_a_saved_state_of_another_node(
    tmp_path: Path, settings: ScalarSettings
) -> None:
    decay = 0.0 if settings.pool else 0.01
    veteran, newcomer = Node(tmp_path / "a", settings), Node(tmp_path / "b", settings)
    middle = veteran.replay(rounds(1, 4, decay), save=True)
    path = veteran.store.path(middle)
    veteran.state.check(path)
    assert newcomer.store.save(path.read_bytes(), 4, 1) == middle
    ends = [node.replay(rounds(5, 8, decay), middle, save=True) for node in (veteran, newcomer)]
    assert ends[0] == ends[1], "the clip has come along"


def test_a_state_that_is_not_saved_is_named_as_the_order_says(tmp_path: Path) -> None:
    node = Node(tmp_path)
    ref = node.replay(rounds(1, 2))
    assert (ref.round, ref.num_samples) == (2, 1)
    assert ref.size_bytes == node.state.file.size_bytes
    assert node.store.get(ref.digest) is None
    saved = node.replay(rounds(3, 3), save=True)
    assert (saved.round, saved.num_samples) == (3, 1)
    assert saved.size_bytes == node.store.path(saved).stat().st_size == ref.size_bytes


@pytest.mark.parametrize("order", [Evaluate, Estimate, Replay])
def test_a_state_that_is_gone_is_said_to_be(tmp_path: Path, order: Any) -> None:
    node = Node(tmp_path)
    lost = node.replay(rounds(1, 2))
    node.replay(rounds(3, 3))
    more = {Evaluate: (), Estimate: (4, 2), Replay: (rounds(3, 3), bytes(32), False)}[order]
    result = node.work.perform(order(9, lost, *more))
    assert isinstance(result, WorkFailed)
    assert result.token == 9
    assert "of round 2 is neither current nor saved" in result.detail
    node.estimate(4, 2)  # the current one can still be used


def test_after_a_replay_that_failed_nothing_is_taken_for_a_state(tmp_path: Path) -> None:
    node, other = Node(tmp_path / "a"), Node(tmp_path / "b")
    base = node.at
    current = node.replay(rounds(1, 1))
    wrong = (*rounds(2, 3), rounds(2, 2)[0])
    assert isinstance(node.work.perform(Replay(1, current, wrong, bytes(32), False)), WorkFailed)
    for ref in (current, ModelRef(bytes(32), 1, 1, 1)):
        assert isinstance(node.work.perform(Evaluate(1, ref)), WorkFailed)
    assert node.replay(rounds(1, 3), base, save=True) == other.replay(rounds(1, 3), save=True)


def test_an_evaluation_is_that_of_the_same_parameters(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.replay(rounds(1, 6))
    result = node.work.perform(Evaluate(3, node.at))
    params = {name: tensor.clone() for name, tensor in node.module.state_dict().items()}
    assert result == Evaluated(3, evaluate(node.task, params))


def test_a_parameter_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    node = Node(tmp_path)
    large = tuple(msgspec.structs.replace(each, scale=1e7) for each in rounds(1, 4, 0.0))
    result = node.work.perform(Replay(1, node.at, large, bytes(32), True))
    assert isinstance(result, WorkFailed)
    assert "scalars.learning_rate is too high" in result.detail


def test_a_round_in_which_nobody_measured_anything_only_decays(tmp_path: Path) -> None:
    node = Node(tmp_path)
    before = {name: tensor.clone() for name, tensor in trained(node.module).items()}
    node.replay((RoundScalars(1, 0.0, 0.5, (record(AUTHORS[0], 1, b""),)),))
    for name, tensor in trained(node.module).items():
        assert torch.equal(tensor, before[name] * (0.5 if tensor.dim() > 1 else 1)), "biases do not decay"


def test_other_orders_are_refused(tmp_path: Path) -> None:
    node = Node(tmp_path)
    assert node.work.perform(Train(7, node.at, 1)) == WorkFailed(7, "this node learns by scalars")


# --- scalars --------------------------------------------------------------------------------------------
def test_scalars_are_central_differences_on_batches_of_their_own(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(4, [8], 2)
            self.drop = nn.Dropout(0.5)

        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return self.drop(self.inner(inputs))  # type: ignore[no-any-return]

    node = Node(tmp_path, task=make_task(model=Spy), batch_size=8)
    before = node.digest()
    codes = node.estimate(round_=3, count=4)
    assert node.digest() == before
    batches = seen[::2]
    assert [len(batch) for batch in batches] == [8] * 4
    assert all(torch.equal(one, other) for one, other in zip(batches, seen[1::2], strict=True))
    rows = torch.cat(batches)
    assert len(rows.unique(dim=0)) == 32, "no sample twice while there are enough"

    inputs, targets = node.task.train
    for sample, batch in enumerate(batches):
        chosen = [int((inputs == row).all(1).nonzero()) for row in batch]

        def loss(chosen: list[int] = chosen) -> float:
            return float(node.task.loss(node.module(inputs[chosen]), targets[chosen]))

        key = seed_key(node.base, AUTHORS[0], 3, sample)
        value = spsa.central_difference(loss, trained(node.module), key, SETTINGS.epsilon)
        assert codes[sample] == encode(value)


def test_scalars_depend_on_author_round_and_state_and_on_nothing_else(tmp_path: Path) -> None:
    node, same = Node(tmp_path / "a"), Node(tmp_path / "b")
    other = Node(tmp_path / "c", author=AUTHORS[1])
    codes = node.estimate(1, 6)
    assert codes == node.estimate(1, 6) == same.estimate(1, 6)
    assert codes != node.estimate(2, 6)
    assert codes != other.estimate(1, 6)
    node.replay(rounds(1, 3))
    assert codes != node.estimate(1, 6)


def test_stochastic_rounding_is_drawn_from_a_stream_of_its_own(tmp_path: Path) -> None:
    stochastic = msgspec.structs.replace(SETTINGS, rounding="stochastic")
    nearest, drawn, again = (
        Node(tmp_path / name, settings)
        for name, settings in (("a", SETTINGS), ("b", stochastic), ("c", stochastic))
    )
    codes = drawn.estimate(1, 64)
    assert codes == again.estimate(1, 64)
    steps = [abs(one - other) for one, other in zip(codes, nearest.estimate(1, 64), strict=True)]
    assert max(steps) == 1
    assert 0 < sum(steps) < 64


def test_in_a_pool_directions_come_from_the_pool(tmp_path: Path) -> None:
    node = Node(tmp_path, POOL, batch_size=40)
    codes = node.estimate(2, 3)
    inputs, targets = node.task.train
    for sample, code in enumerate(codes):
        key = pool_key(node.base, spsa.pool_index(node.base, AUTHORS[0], 2, sample, 64))
        value = spsa.central_difference(
            lambda: float(node.task.loss(node.module(inputs), targets)),
            trained(node.module),
            key,
            SETTINGS.epsilon,
        )
        assert abs(code - encode(value)) <= 1, "the batch is in another order"


def test_private_scalars_clip_each_example_and_add_noise(tmp_path: Path) -> None:
    clip = 0.01
    quiet = msgspec.structs.replace(SETTINGS, private_clip=clip)
    loud = msgspec.structs.replace(quiet, private_noise=100.0)
    node = Node(tmp_path / "a", quiet, batch_size=10)
    values = [abs(spsa.DECODED[code]) for code in node.estimate(1, 20)]
    assert max(values) <= clip * 1.07
    noisy = Node(tmp_path / "b", loud, batch_size=10)
    codes = noisy.estimate(1, 20)
    assert np.std([spsa.DECODED[code] for code in codes]) > 3 * clip, "100 clips over 10 examples"
    assert codes != noisy.estimate(1, 20), "and nobody can draw it again"


def test_a_loss_that_is_not_finite_is_said_to_be(tmp_path: Path) -> None:
    node = Node(tmp_path, task=make_task(loss=lambda outputs, targets: outputs.sum() * float("nan")))
    result = node.work.perform(Estimate(1, node.at, 1, 2))
    assert isinstance(result, WorkFailed)
    assert "the loss is not finite in round 1" in result.detail
    assert node.digest() == Node(tmp_path / "b").digest()


def test_a_loss_that_raises_is_an_answer_and_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("no\nsuch loss")

    node = Node(tmp_path, task=make_task(loss=broken))
    before = node.digest()
    assert node.work.perform(Estimate(1, node.at, 1, 2)) == WorkFailed(1, "RuntimeError: no such loss")
    assert node.digest() == before


@pytest.mark.parametrize("pool", [0, 32])
def test_it_learns(tmp_path: Path, pool: int) -> None:
    """Alone, 60 rounds of 4 scalars: from chance to most."""
    settings = msgspec.structs.replace(SETTINGS, pool=pool, clip_quantile=1.0)
    node = Node(tmp_path, settings, batch_size=20)
    for number in range(1, 61):
        codes = node.estimate(number, 4)
        said = record(AUTHORS[0], number, codes)
        node.replay((RoundScalars(number, 0.1, 0.0, (said,)),))
    result = node.work.perform(Evaluate(1, node.at))
    assert isinstance(result, Evaluated)
    assert result.metrics["accuracy"] >= 0.8


# --- the base -------------------------------------------------------------------------------------------
class Partly(nn.Module):
    """A large frozen part, a small trained one, a tied weight, buffers of both kinds, two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 400).requires_grad_(False)
        self.norm = nn.BatchNorm1d(400)
        self.head = nn.Linear(400, 2, bias=False)
        self.tied = nn.Linear(400, 2, bias=False)
        self.tied.weight = self.head.weight
        self.low = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("derived", torch.ones(3), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.frozen(inputs))
        return self.head(hidden) + self.tied(hidden)  # type: ignore[no-any-return]


def test_the_base_digest_sees_all_that_is_saved_and_nothing_that_is_derived() -> None:
    task = make_task(model=Partly)
    digest = base_digest(base_module(task, None))
    assert digest == base_digest(base_module(task, 0))
    assert digest != base_digest(base_module(task, 1))
    for name, change in (
        ("frozen.weight", True),
        ("norm.running_mean", True),
        ("low", True),
        ("derived", False),
    ):
        module = base_module(task, None)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors[name].detach().view(-1)[0] += 1
        assert (base_digest(module) != digest) == change, name


def test_only_what_is_trained_is_moved_and_saved(tmp_path: Path) -> None:
    node = Node(tmp_path, task=make_task(model=Partly))
    frozen = {
        name: tensor.clone()
        for name, tensor in node.module.state_dict().items()
        if name[:4] in ("froz", "norm")
    }
    trained_norm = {"norm.weight", "norm.bias"}
    saved = load_file(node.store.path(node.replay(rounds(1, 3), save=True)))
    assert set(saved) == {"low", "head.weight", *trained_norm, CLIP}
    now = node.module.state_dict()
    for name, tensor in frozen.items():
        assert torch.equal(now[name], tensor) == (name not in trained_norm), name
    assert torch.equal(saved["head.weight"], now["tied.weight"])
    assert saved["low"].dtype == torch.bfloat16
    end = node.replay(rounds(4, 5), save=True)
    node.replay((), ModelRef(node.base, 1, 0, 1))
    assert node.digest() == Node(tmp_path / "b", task=make_task(model=Partly)).digest()
    assert node.replay(rounds(1, 5), save=True) == end


def test_small_base_values_stay_in_memory_and_large_ones_go_to_the_disk(tmp_path: Path) -> None:
    def model(width: int) -> nn.Module:
        module = nn.Sequential(nn.Linear(4, width).requires_grad_(False), nn.Linear(width, 2, bias=False))
        module[1].requires_grad_(width > 0)
        return module

    large = Node(tmp_path / "a", task=make_task(model=lambda: model(50)))
    assert (tmp_path / "a" / "scratch" / "base.safetensors").exists()
    assert SMALL_SHARE < 0.5

    def wide() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 50).requires_grad_(False), nn.Linear(50, 50).requires_grad_(False), nn.Linear(50, 2)
        )

    small = Node(tmp_path / "b", task=make_task(model=wide))
    assert not (tmp_path / "b" / "scratch").exists()
    for node in (large, small):
        before, base = node.digest(), node.at
        node.replay(rounds(1, 3))
        assert node.digest() != before
        node.replay((), base)
        assert node.digest() == before


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: mlp(4, [], 2).requires_grad_(False), "no parameter of 'two' requires a gradient"),
        (lambda: mlp(4, [], 2).double(), "0.bias is torch.float64, which scalars cannot train"),
        (lambda: 1 / 0, "cannot be made: ZeroDivisionError"),
    ],
)
def test_a_model_that_cannot_be_trained_so_is_the_operators_mistake(model: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        base_module(make_task(model=model), None)
    assert caught.value.path == "task.name"


# --- the file -------------------------------------------------------------------------------------------
def saved_state(node: Node) -> tuple[Path, bytearray]:
    path = node.store.path(node.replay(rounds(1, 4, 0.0), save=True))
    return path, bytearray(path.read_bytes())


def clip_place(node: Node, data: bytearray) -> int:
    """The clip stands first: its items are the largest."""
    return 8 + int.from_bytes(data[:8], "little")


def test_a_state_is_a_safetensors_file_with_its_clip(tmp_path: Path) -> None:
    node = Node(tmp_path)
    path, _ = saved_state(node)
    found = load_file(path)
    params = trained(node.module)
    assert set(found) == {*params, CLIP}
    assert all(torch.equal(found[name], tensor) for name, tensor in params.items())
    assert found[CLIP].shape == (129,)
    assert 0 <= int(found[CLIP][0]) < 127, "the limit was set in round 3"
    assert int(found[CLIP][1:].sum()) == 6, "and round 4 was counted since: 3 authors, 2 scalars each"


def test_a_pools_state_is_its_sums(tmp_path: Path) -> None:
    path, _ = saved_state(Node(tmp_path, POOL))
    found = load_file(path)
    assert set(found) == {SUMS, CLIP}
    assert found[SUMS].dtype == torch.float64
    assert found[SUMS].shape == (64,)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("header", Reason.WRONG_SHAPE),
        ("empty", Reason.WRONG_SHAPE),
        ("short", Reason.WRONG_SIZE),
        ("long", Reason.WRONG_SIZE),
        ("nan", Reason.NON_FINITE),
        ("huge", Reason.NON_FINITE),
        ("limit", Reason.WRONG_FORMAT),
        ("negative limit", Reason.WRONG_FORMAT),
        ("count", Reason.WRONG_FORMAT),
        ("negative count", Reason.WRONG_FORMAT),
        ("other task", Reason.WRONG_SHAPE),
        ("pickle", Reason.WRONG_SHAPE),
    ],
)
def test_a_strangers_file_is_refused_with_the_reason(tmp_path: Path, damage: str, reason: Reason) -> None:
    node = Node(tmp_path)
    path, data = saved_state(node)
    node.state.check(path)
    clip = clip_place(node, data)
    match damage:
        case "header":
            data[9] ^= 1
        case "empty":
            data.clear()
        case "short":
            del data[-1]
        case "long":
            data += b"x"
        case "nan":
            data[-4:] = np.float32("nan").tobytes()
        case "huge":
            data[-4:] = np.float32(1e30).tobytes()
        case "limit" | "negative limit":
            data[clip : clip + 8] = np.int64(128 if damage == "limit" else -1).tobytes()
        case "count" | "negative count":
            data[clip + 8 : clip + 16] = np.int64(2**60 if damage == "count" else -1).tobytes()
        case "other task":
            other = Node(tmp_path / "other", task=make_task(model=lambda: mlp(4, [9], 2)))
            data = saved_state(other)[1]
        case "pickle":
            data[:] = b"\x80\x04cos\nsystem\n" * 100
    path.write_bytes(data)
    with pytest.raises(PeerError) as caught:
        node.state.check(path)
    assert caught.value.reason is reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_of_any_type_is_read_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch_generator = torch.Generator().manual_seed(SEED)
    params = {
        "b": torch.randn(7, 5, generator=torch_generator).to(dtype),
        "a": torch.randn((), generator=torch_generator).to(dtype),
        "turned": torch.randn(3, 4, generator=torch_generator).to(dtype).t(),
        "none": torch.zeros(0, 2, dtype=dtype),
        "count": torch.arange(3),
        "yes": torch.tensor([True, False, True]),
    }
    file = StateFile(schema_of(params))
    path = tmp_path / "state"
    path.write_bytes(b"".join(file.pieces(params)))
    assert path.stat().st_size == file.size_bytes
    assert {name: tensor.tolist() for name, tensor in load_file(path).items()} == {
        name: tensor.tolist() for name, tensor in params.items()
    }
    target = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    file.check(path)
    file.read(path, target)
    assert all(torch.equal(target[name], tensor) for name, tensor in params.items())
    assert torch.equal(file.load(path, "b"), params["b"])

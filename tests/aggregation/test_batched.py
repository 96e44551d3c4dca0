"""Many merges at once give what the rules give one by one."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregation import batched
from aggregation.base import Contribution, Params
from aggregation.batched import BATCHED, BatchedRule, TensorSlice, build_batched
from aggregation.rules import RULES, build, merge

Specs = Sequence[str | Mapping[str, Any]]

CHAINS: list[Specs] = [
    ["mean"],
    ["variance.corrected"],
    ["mean", "variance.corrected"],
    ["mean", "mean"],
    ["variance.corrected", "mean"],
    ["variance.corrected", "variance.corrected"],
    [{"name": "mean", "conservative": 0}, {"name": "variance.corrected", "target": "own"}],
    [{"name": "variance.corrected", "conservative": 1.0}],
]
every_chain = pytest.mark.parametrize("specs", CHAINS, ids=str)
law = settings(derandomize=True, deadline=None, max_examples=6)
seeds = st.integers(0, 2**32)
shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)
names = st.sampled_from(["weight", "bias", "running_mean", "running_var"])

conservatives = st.sampled_from([0, 0.3, 0.5, 1])
half_lives = st.sampled_from([None, 1e-3, 0.5, 3])
means = st.fixed_dictionaries(
    {"name": st.just("mean"), "conservative": conservatives, "staleness_half_life": half_lives}
)
corrections = st.fixed_dictionaries(
    {
        "name": st.just("variance.corrected"),
        "conservative": conservatives,
        "target": st.sampled_from(["received", "own", "mixed"]),
        "max_scale": st.sampled_from([None, 1, 1.1, 3.0]),
        "staleness_half_life": half_lives,
    }
)
chains = st.lists(means | corrections, min_size=1, max_size=2)

LAYOUT = [
    TensorSlice("fc.weight", 0, (7, 5)),
    TensorSlice("fc.bias", 35, (7,)),
    TensorSlice("conv.weight", 42, (2, 3, 2, 2)),
    TensorSlice("bn.running_var", 66, (3, 2)),
    TensorSlice("temperature", 72, ()),
    TensorSlice("single.weight", 73, (1, 1)),
    TensorSlice("empty.weight", 74, (0, 3)),
]


@dataclass
class Work:
    """Arguments of a batched rule."""

    store: Tensor
    own: Tensor
    received: Tensor
    owner: Tensor
    weights: Tensor
    staleness: Tensor

    def run(self, rule: BatchedRule | None) -> Tensor:
        assert rule is not None
        return rule(self.store, self.own, self.received, self.owner, self.weights, self.staleness)

    def only(self, merges: range) -> "Work":
        mine = (self.owner >= merges.start) & (self.owner < merges.stop)
        return Work(
            self.store,
            self.own[merges.start : merges.stop],
            self.received[mine],
            self.owner[mine] - merges.start,
            self.weights[mine],
            self.staleness[mine],
        )


def layout_of(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[TensorSlice]:
    layout, offset = [], 0
    for index, (name, shape) in enumerate(tensors):
        layout.append(TensorSlice(f"{index}.{name}", offset, shape))
        offset += math.prod(shape)
    return layout


def width(layout: Sequence[TensorSlice]) -> int:
    return max((tensor.offset + math.prod(tensor.shape) for tensor in layout), default=0)


def work_of(seed: int, layout: Sequence[TensorSlice], num_merges: int = 6, num_rows: int = 7) -> Work:
    """Merges of 0 to 5 received models, each row in several of them, one tensor in some rows constant."""
    generator = torch.Generator().manual_seed(seed)

    def whole(high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=generator)

    store = torch.randn(num_rows, width(layout), generator=generator)
    for tensor in layout[: seed % 2]:
        columns(store, tensor)[: num_rows // 2] = 0.1
    owner = torch.arange(num_merges).repeat_interleave(whole(6, num_merges))
    return Work(
        store,
        whole(num_rows, num_merges),
        whole(num_rows, len(owner)),
        owner,
        0.1 + 100 * torch.rand(len(owner), generator=generator, dtype=torch.float64),
        whole(20, len(owner)),
    )


def columns(rows: Tensor, tensor: TensorSlice) -> Tensor:
    return rows[..., tensor.offset : tensor.offset + math.prod(tensor.shape)]


def model(row: Tensor, layout: Sequence[TensorSlice]) -> Params:
    return {tensor.name: columns(row, tensor).reshape(tensor.shape) for tensor in layout}


def one_by_one(specs: Specs, work: Work, layout: Sequence[TensorSlice]) -> Tensor:
    rule, rows = build(specs), []
    for index, own in enumerate(work.own):
        received = [
            Contribution(
                model(work.store[work.received[place]], layout),
                weight=work.weights[place].item(),
                staleness=int(work.staleness[place]),
            )
            for place in (work.owner == index).nonzero().flatten().tolist()
        ]
        local = Contribution(model(work.store[own], layout))
        params, _ = merge(rule, received, rule.init(local.params), local)
        rows.append(torch.cat([params[tensor.name].flatten() for tensor in layout]))
    return torch.stack(rows)


def assert_close(left: Tensor, right: Tensor, work: Work, roundings: float = 32) -> None:
    """Equal up to so many roundings at the size of the largest entry of the store."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    gap = (left.double() - right.double()).abs().max().item() if left.numel() else 0.0
    assert gap <= roundings * torch.finfo(torch.float32).eps * work.store.abs().max().item()


@settings(law, max_examples=60)
@given(specs=chains, seed=seeds, tensors=st.lists(st.tuples(names, shapes), min_size=1, max_size=5))
def test_it_gives_what_the_rules_give_one_by_one(
    specs: Specs, seed: int, tensors: list[tuple[str, tuple[int, ...]]]
) -> None:
    layout = layout_of(tensors)
    work = work_of(seed, layout)

    assert_close(work.run(build_batched(specs, layout)), one_by_one(specs, work, layout), work)


@every_chain
@law
@given(seed=seeds)
def test_the_chains_give_what_they_give_one_by_one(specs: Specs, seed: int) -> None:
    work = work_of(seed, LAYOUT)

    assert_close(work.run(build_batched(specs, LAYOUT)), one_by_one(specs, work, LAYOUT), work)


@every_chain
def test_tiles_do_not_show(specs: Specs, monkeypatch: pytest.MonkeyPatch) -> None:
    work, rule = work_of(3, LAYOUT, num_merges=40), build_batched(specs, LAYOUT)
    whole = work.run(rule)

    monkeypatch.setattr(batched, "TILE_ENTRIES", 100)

    assert_close(work.run(rule), whole, work, roundings=1)


@every_chain
@law
@given(seed=seeds)
def test_the_store_is_not_written_to_and_the_result_is_fresh(specs: Specs, seed: int) -> None:
    work = work_of(seed, LAYOUT)
    before = [tensor.clone() for tensor in vars(work).values()]

    work.run(build_batched(specs, LAYOUT)).fill_(math.nan)

    assert all(torch.equal(*pair) for pair in zip(vars(work).values(), before, strict=True))


@every_chain
@law
@given(seed=seeds)
def test_agreement_is_a_fixed_point(specs: Specs, seed: int) -> None:
    work = work_of(seed, LAYOUT)
    work.store[:] = work.store[0].clone()

    assert_close(work.run(build_batched(specs, LAYOUT)), work.store[work.own], work, roundings=4)


@every_chain
@law
@given(seed=seeds)
def test_the_order_of_contributions_does_not_matter(specs: Specs, seed: int) -> None:
    work, rule = work_of(seed, LAYOUT), build_batched(specs, LAYOUT)
    shuffled = torch.randperm(len(work.owner), generator=torch.Generator().manual_seed(seed))
    order = shuffled[work.owner[shuffled].argsort(stable=True)]

    other = replace(
        work,
        received=work.received[order],
        weights=work.weights[order],
        staleness=work.staleness[order],
    )

    assert_close(other.run(rule), work.run(rule), work)


@every_chain
@law
@given(seed=seeds, cut=st.integers(0, 6))
def test_how_merges_are_split_over_calls_does_not_matter(specs: Specs, seed: int, cut: int) -> None:
    work, rule = work_of(seed, LAYOUT), build_batched(specs, LAYOUT)

    parts = [work.only(range(cut)).run(rule), work.only(range(cut, 6)).run(rule)]

    assert_close(torch.cat(parts), work.run(rule), work, roundings=1)


@every_chain
def test_with_nothing_received_the_own_row_is_left_to_the_bit(specs: Specs) -> None:
    work = work_of(5, LAYOUT)
    kept = work.owner.remainder(2) == 0
    some = Work(work.store, work.own, *(each[kept] for each in list(vars(work).values())[2:]))
    none = replace(work.only(range(0)), own=work.own)

    assert torch.equal(some.run(build_batched(specs, LAYOUT))[1::2], work.store[work.own][1::2])
    assert torch.equal(none.run(build_batched(specs, LAYOUT)), work.store[work.own])
    assert work.only(range(0)).run(build_batched(specs, LAYOUT)).shape == (0, width(LAYOUT))


def pair(local: Tensor, received: Tensor) -> Work:
    """One merge of one received model."""
    return Work(
        torch.stack([local, received]),
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([0]),
        torch.ones(1, dtype=torch.float64),
        torch.tensor([0]),
    )


FC = [TensorSlice("fc.weight", 0, (2, 2))]
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])


@pytest.mark.parametrize(
    ("local", "received", "expected"),
    [
        pytest.param(
            SIGNS, 3 * SIGNS.roll(1), 2.25 * SIGNS.roll(1) / 1.5, id="stretched to 3, limited to 1.5"
        ),
        pytest.param(SIGNS, -SIGNS, 0 * SIGNS, id="the mean is constant"),
        pytest.param(SIGNS, torch.full((4,), 0.1), SIGNS / 2 + 0.05, id="the received is constant"),
        pytest.param(0 * SIGNS + 7, 0 * SIGNS + 9, 0 * SIGNS + 8, id="both are constant"),
        pytest.param(1e-30 * SIGNS, 3e-30 * SIGNS, 3e-30 * SIGNS, id="squares below float32"),
        pytest.param(1e30 * SIGNS, 3e30 * SIGNS, 3e30 * SIGNS, id="squares above float32"),
        pytest.param(
            torch.tensor([3e38, 3e38, 3e38, -3e38]),
            torch.tensor([3e38, 3e38, -3e38, 3e38]),
            torch.tensor([3e38, 3e38, 0, 0]),
            id="it would leave float32",
        ),
    ],
)
def test_the_edges_of_the_correction(local: Tensor, received: Tensor, expected: Tensor) -> None:
    specs: Specs = [{"name": "variance.corrected", "max_scale": 1.5}]
    work = pair(local, received)

    merged = work.run(build_batched(specs, FC))

    assert_close(merged, expected[None], work, roundings=4)
    assert_close(merged, one_by_one(specs, work, FC), work, roundings=1)


def test_a_spread_that_is_rounding_is_not_stretched() -> None:
    specs: Specs = [{"name": "variance.corrected", "max_scale": 1e9}]
    work = pair(SIGNS, -SIGNS * (1 + 2**-22))

    merged = work.run(build_batched(specs, FC))

    assert torch.equal(merged, one_by_one(specs, work, FC))
    assert_close(merged, torch.zeros(1, 4), work, roundings=1)


def test_weights_and_lags_at_the_ends_of_float64() -> None:
    layout = [TensorSlice("fc.bias", 0, (3,))]
    specs: Specs = [{"name": "mean", "staleness_half_life": 1e-3}]
    work = Work(
        torch.arange(12.0).reshape(4, 3),
        torch.tensor([0, 1, 0]),
        torch.tensor([1, 2, 3, 2, 3, 1, 2]),
        torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        torch.tensor([1.7e308, 1.7e308, 1.0, 5e-324, 5e-324, 1.0, 1.7e308], dtype=torch.float64),
        torch.tensor([5, 5, 5, 10**9, 10**9, 0, 10**15]),
    )

    assert_close(work.run(build_batched(specs, layout)), one_by_one(specs, work, layout), work, roundings=2)


def test_columns_of_no_tensor_are_averaged() -> None:
    work = pair(torch.zeros(6), torch.ones(6))

    assert torch.equal(work.run(build_batched(["variance.corrected"], FC)), torch.full((1, 6), 0.5))


def test_what_is_not_finite_stays_so() -> None:
    work = pair(SIGNS, torch.tensor([1.0, math.nan, 1.0, 1.0]))

    assert not work.run(build_batched(["variance.corrected"], FC)).isfinite().all()


def test_an_owner_that_is_not_ascending_is_refused() -> None:
    work = replace(work_of(1, FC), owner=torch.arange(len(work_of(1, FC).owner)).flip(0))

    with pytest.raises(ValueError, match="owner must be ascending"):
        work.run(build_batched(["mean"], FC))


@pytest.mark.parametrize(
    "specs",
    [[], "mean", ["maen"], [{"name": "mean", "conservative": 2}], [{"name": "mean", "target": "own"}], [{}]],
    ids=str,
)
def test_wrong_specs_are_refused_as_by_build(specs: Any) -> None:
    with pytest.raises(ValueError, match="rules") as expected:
        build(specs)

    with pytest.raises(ValueError, match="rules") as refused:
        build_batched(specs, FC)

    assert str(refused.value) == str(expected.value)


def test_a_chain_with_a_rule_that_has_no_batched_form_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "mean.twin", RULES["mean"])

    assert build_batched(["mean", {"name": "mean.twin"}], FC) is None
    assert build_batched(["mean"], FC) is not None


@pytest.mark.parametrize("name", BATCHED)
def test_a_batched_form_takes_the_rules_own_arguments(name: str) -> None:
    layout, *arguments = inspect.signature(BATCHED[name]).parameters.values()

    assert layout.name == "layout"
    assert arguments == list(inspect.signature(RULES[name].factory).parameters.values())

"""`perturbation`: known answers of the generator, equal bytes whatever the way, and shifts that leave no trace."""

import hashlib
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aggregation import perturbation, perturbation_kernels
from aggregation.base import Params
from aggregation.perturbation import (
    GAUSSIAN,
    GENERATOR,
    PIECE_ENTRIES,
    Step,
    apply_steps,
    normals,
    params_digest,
    pool_key,
    seed_key,
    shift,
    signs,
    signs_of,
    trained,
    unshift,
)

BASE, AUTHOR, OTHER = bytes(range(32)), bytes(range(32, 64)), b"\xff" * 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILE = perturbation_kernels.TILE_ENTRIES
SIZES = [1, 255, 256, 257, 3 * 256, TILE - 1, TILE, TILE + 1, 2 * TILE + 300]

# The same stand in protocols/README.md: key (lowest byte first), first two words, first 16 signs.
KEYS = [
    (seed_key, (AUTHOR, 0, 0), "134e0213d201e5827c59049ef878c443", "f116045da81ac725", "0d4be902134b6ffe"),
    (seed_key, (AUTHOR, 1, 11), "4a1ab9be2eab909f2954e25877f57845", "182776edf801cbec", "5194c3408c79070a"),
    (seed_key, (AUTHOR, 11, 1), "28ac1f8e09376a94827ddb2bb46c589a", "713123a094431ff0", "d417ad739e5c0a3c"),
    (
        seed_key,
        (OTHER, 2**64 - 1, 2**32 - 1),
        "ddd4c6288f6db35ec919224ac6f9fc30",
        "e2b5895501c68ad5",
        "22d55273b66fc2d7",
    ),
    (pool_key, (0,), "f334f10b33df0de18b5e7f03ea24c5b0", "977b2236ca5bc7a4", "2875ecb1b042d7c5"),
    (pool_key, (4095,), "81bd95e1ea261b099d99b0937269f081", "3d0087c9b7e04fa7", "71b5a342354cee53"),
]

# Of Random123: counter and key, lowest word first, and the block.
PHILOX = [
    (
        [0] * 4,
        [0] * 2,
        [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
    ),
    (
        [2**64 - 1] * 4,
        [2**64 - 1] * 2,
        [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
    ),
    (
        [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
        [0x452821E638D01377, 0xBE5466CF34E90C6C],
        [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
    ),
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def some_params(sizes: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Params:
    """The names sort otherwise than the tensors were made."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"w{len(sizes) - index}": torch.randn(size, generator=generator).mul_(0.05).to(dtype)
        for index, size in enumerate(sizes)
    }


def some_steps(counts: Sequence[int], decays: Sequence[float], seed: int = 0) -> list[Step]:
    rng = np.random.default_rng(seed)
    return [
        Step(
            tuple(int.from_bytes(rng.bytes(16), "little") for _ in range(count)),
            rng.normal(0, 0.01, count).astype(np.float32),
            decay,
        )
        for count, decay in zip(counts, decays, strict=True)
    ]


def copied(params: Params) -> Params:
    return {name: tensor.clone() for name, tensor in params.items()}


def bits(tensor: Tensor) -> Any:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()]).numpy()


def assert_same_bytes(found: Params, expected: Params) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert np.array_equal(bits(tensor), bits(expected[name])), name


def by_definition(
    params: Params,
    steps: Sequence[Step],
    direction: Callable[..., Any] = signs,
    undecayed: Sequence[str] = (),
) -> Params:
    """The rounding of the module's docstring, in numpy and one step after the other."""
    names = sorted(params)
    sizes = [params[name].numel() for name in names]
    ends = np.cumsum(sizes)
    found = copied(params)
    for step in steps:
        acc = np.zeros(sum(sizes), np.float32)
        for key, coefficient in zip(step.keys, step.coefficients, strict=True):
            acc = acc + direction(key, sizes).astype(np.float32) * coefficient
        for name, size, end in zip(names, sizes, ends, strict=True):
            values = found[name].float().numpy().reshape(-1)
            if step.decay and name not in undecayed:
                values = values * np.float32(1 - step.decay)
            moved = torch.from_numpy(values + acc[end - size : end])
            found[name] = moved.to(params[name].dtype).view(params[name].shape)
    return found


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of other devices, on the CPU."""
    monkeypatch.setattr(perturbation, "_is_compiled", lambda piece, kind: False)


# --- the generator --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("counter", "key", "block"), PHILOX)
def test_our_generator_and_numpys_give_the_known_answers(
    counter: list[int], key: list[int], block: list[int]
) -> None:
    state = np.zeros((4, perturbation_kernels.TILE_BLOCKS), np.uint64)
    state[:, 3] = counter
    perturbation_kernels.philox(state, np.uint64(key[0]), np.uint64(key[1]))
    assert state[:, 3].tolist() == block

    number = sum(word << 64 * place for place, word in enumerate(counter))
    numpys = np.random.Philox(key=key[0] + (key[1] << 64), counter=(number - 1) % 2**256)
    assert numpys.random_raw(4).tolist() == block


@pytest.mark.parametrize(("make", "arguments", "key", "first", "second"), KEYS)
def test_keys_and_first_words(
    make: Callable[..., int], arguments: tuple[Any, ...], key: str, first: str, second: str
) -> None:
    found = make(BASE, *arguments)

    assert found.to_bytes(16, "little").hex() == key
    words = np.random.Philox(key=found).random_raw(2)
    assert [f"{int(word):016x}" for word in words] == [first, second]
    assert signs(found, [128]).tolist() == [
        1 if int(word) >> place & 1 else -1 for word in words for place in range(64)
    ]


def test_the_first_signs_in_writing() -> None:
    found = signs(seed_key(BASE, AUTHOR, 0, 0), [16])
    assert "".join("+" if sign > 0 else "-" for sign in found) == "+-+--+--+++---++"


def test_a_key_is_what_the_docstring_says() -> None:
    said = b"covey scalar seed 1\0" + BASE + AUTHOR + struct.pack(">Q", 7) + struct.pack(">I", 3)
    assert seed_key(BASE, AUTHOR, 7, 3) == int.from_bytes(hashlib.sha256(said).digest()[:16], "little")


def test_no_two_samples_share_a_key() -> None:
    """Numbers that would run into each other if they were written as digits among them."""
    grid = itertools.product([BASE, OTHER], [AUTHOR, OTHER], [0, 1, 11, 111, 256, 2**32], range(60))
    keys = [seed_key(*place) for place in grid] + [pool_key(BASE, index) for index in range(60)]
    assert len(set(keys)) == len(keys) == 2 * 2 * 6 * 60 + 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((BASE[1:], AUTHOR, 0, 0), "base"),
        ((BASE, AUTHOR + b"x", 0, 0), "author"),
        ((BASE, AUTHOR, 2**64, 0), "round"),
        ((BASE, AUTHOR, -1, 0), "round"),
        ((BASE, AUTHOR, 0, 2**32), "sample"),
    ],
)
def test_what_does_not_fit_has_no_key(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        seed_key(*arguments)
    with pytest.raises(ValueError, match="index"):
        pool_key(BASE, 2**32)


def test_each_tensor_begins_with_a_fresh_block() -> None:
    words = np.random.Philox(key=5).random_raw(16)
    bit = [[int(word) >> place & 1 for place in range(64)] for word in words]
    found = (signs(5, [3, 257, 2]) + 1) // 2
    second = [*bit[4], *bit[5], *bit[6], *bit[7], bit[8][0]]
    assert found.tolist() == [*bit[0][:3], *second, *bit[12][:2]]


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_many_directions_at_once_are_those_of_the_reference(dtype: Any) -> None:
    keys, sizes = [1, 2**127 + 5, 77], [3, 300, 0, 256, TILE + 1]
    found = signs_of(keys, sizes, dtype)
    assert found.dtype == dtype
    assert np.array_equal(found, [signs(key, sizes) for key in keys])


def test_normals_are_normal() -> None:
    found = normals(3, [50_000, 50_001])
    assert found.dtype == np.float32
    assert len(found) == 100_001
    assert abs(found.mean()) < 0.015
    assert found.std() == pytest.approx(1, abs=0.01)
    assert (found.astype(float) ** 4).mean() == pytest.approx(3, abs=0.15)


# --- applying -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(1,), (3,), (4,), (9, 1), (0, 2, 5)])
def test_the_kernels_do_what_the_reference_does(dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    params = some_params(SIZES, dtype)
    steps = some_steps(counts, (0.0, 0.01, 0.3)[: len(counts)])
    expected = by_definition(params, [step for step in steps if step.keys], undecayed=["w2"])

    apply_steps(params, steps, undecayed=["w2"])

    assert_same_bytes(params, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [GENERATOR, GAUSSIAN])
@pytest.mark.usefixtures("without_kernels")
def test_the_way_of_other_devices_is_the_same(dtype: torch.dtype, kind: str) -> None:
    params = some_params(SIZES, dtype)
    steps = some_steps([3, 0, 5], [0.0, 0.25, 0.01])
    expected = by_definition(params, steps, signs if kind == GENERATOR else normals)

    apply_steps(params, steps, kind=kind)

    assert_same_bytes(params, expected)


def test_one_pass_is_many(threads: int) -> None:
    """On a tensor of several pieces too."""
    for dtype in DTYPES:
        params = some_params([PIECE_ENTRIES + 1000, 300], dtype)
        alone = copied(params)
        steps = some_steps([1, 6, 0, 5], [0.0, 0.01, 0.5, 0.0])

        apply_steps(params, steps)
        for step in steps:
            apply_steps(alone, [step])

        assert_same_bytes(params, alone)


def test_neither_threads_nor_pieces_nor_the_order_in_memory_are_to_be_seen(threads: int) -> None:
    params = some_params([2 * PIECE_ENTRIES + 5], torch.float32)
    params |= {"turned": torch.arange(12.0).view(3, 4).t(), "every_other": torch.arange(9.0)[::2]}
    steps = some_steps([2], [0.01])
    expected = by_definition({name: tensor.contiguous() for name, tensor in params.items()}, steps)

    apply_steps(params, steps)

    assert_same_bytes(params, expected)


def test_the_rounding_of_a_zero_is_that_of_a_sum() -> None:
    """-0 + (0 + -0) is +0: a sum begins with a zero, and a code of zero counts."""
    for coefficients in ([0.0], [-0.0], [-0.0, 0.0]):
        params = {"w": torch.tensor([-0.0] * 100)}
        apply_steps(params, [Step((1, 2)[: len(coefficients)], np.array(coefficients, np.float32))])
        assert not bits(params["w"]).any()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_as_torch_does(narrow: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(narrow)
    every = every[every.isfinite()]
    wide = np.empty(len(every), np.uint32)
    kind = perturbation.FORMATS[narrow]
    perturbation_kernels.widen(wide, bits(every).view(np.uint16), kind)
    assert np.array_equal(wide.view(np.int32), bits(every.float()))

    # Every value, the middles between neighbours, and what lies beside the middles.
    sizes = np.sort(np.abs(every.float().numpy()))
    middles = np.concatenate([(sizes[1:].astype(float) + sizes[:-1]) / 2, [65519.9, 65520.0, 1e30]])
    around = np.concatenate([middles, np.nextafter(middles.astype(np.float32), 0)]).astype(np.float32)
    floats = torch.from_numpy(np.concatenate([around, np.nextafter(around, np.float32(np.inf)), sizes]))
    floats = torch.cat([floats, -floats])
    found = np.empty(len(floats), np.uint16)
    perturbation_kernels.narrow(found, bits(floats).view(np.uint32), kind)
    assert np.array_equal(found.view(np.int16), bits(floats.to(narrow)))


def test_faulty_steps_change_nothing() -> None:
    params = some_params([10], torch.float32)
    before = params_digest(params)
    one = np.ones(1, np.float32)
    for step in (Step((1,), one, 1.0), Step((1,), one, -0.1), Step((1, 2), one), Step((1,), one * np.inf)):
        with pytest.raises(ValueError, match=r"decay|coefficients"):
            apply_steps(params, [Step((1,), one), step])
    with pytest.raises(ValueError, match="kind"):
        apply_steps(params, [Step((1,), one)], kind="xorshift")
    with pytest.raises(ValueError, match="w2 must be of"):
        apply_steps(params | {"w2": torch.zeros(2, dtype=torch.float64)}, [Step((1,), one)])
    assert params_digest(params) == before


# --- a shift that can be taken back ---------------------------------------------------------------------
@pytest.mark.parametrize("kind", [GENERATOR, GAUSSIAN])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [2.0**-10, 1e-3, -1.7, 3e4, 1e-42, 0.0])
def test_a_shift_leaves_no_trace(dtype: torch.dtype, step: float, kind: str) -> None:
    params = some_params(SIZES, dtype)
    before = copied(params)

    lost = shift(params, 9, step, kind)
    moved = copied(params)
    unshift(params, 9, step, lost, kind)

    assert_same_bytes(params, before)
    direction = signs if kind == GENERATOR else normals
    assert_same_bytes(moved, by_definition(before, [Step((9,), np.array([step], np.float32))], direction))


@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_any_bits_come_back(patterns: list[int], step: float, dtype: torch.dtype) -> None:
    """Zeros of both signs, denormal numbers, large ones, and those that are no numbers."""
    whole = np.array(patterns, np.uint32)
    whole = whole if dtype is torch.float32 else whole.astype(np.uint16)
    params = {"w": torch.from_numpy(whole).view(dtype)}
    before = copied(params)

    unshift(params, 1, step, shift(params, 1, step))

    assert_same_bytes(params, before)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shift_on_another_device_leaves_no_trace_either(dtype: torch.dtype) -> None:
    params = some_params(SIZES, dtype)
    before = copied(params)
    unshift(params, 9, 1e-3, shift(params, 9, 1e-3))
    assert_same_bytes(params, before)


def test_of_usual_weights_little_is_lost(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(PIECE_ENTRIES * 2 + 77, generator=generator) * 0.02}
    lost = shift(params, 9, 2.0**-10)
    assert lost.num_entries / params["w"].numel() == pytest.approx(0.059, abs=0.002)
    assert lost.size_bytes < 0.1 * params["w"].nbytes
    before = torch.randn(PIECE_ENTRIES * 2 + 77, generator=torch.Generator().manual_seed(0)) * 0.02
    unshift(params, 9, 2.0**-10, lost)
    assert torch.equal(params["w"], before)


@pytest.mark.parametrize("step", [float("nan"), float("inf"), 1e39])
def test_a_step_is_a_finite_number(step: float) -> None:
    with pytest.raises(ValueError, match="step"):
        shift({}, 1, step)


# --- a model's tensors ----------------------------------------------------------------------------------
class Tied(nn.Module):
    """An output layer that is the embedding, a frozen layer, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.z_embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.z_embedding.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)


def test_what_is_trained() -> None:
    module = Tied()
    found = trained(module)
    assert list(found) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]

    apply_steps(found, some_steps([1], [0.0]))

    assert torch.equal(module.z_embedding.weight, found["head.weight"])
    assert found["head.weight"].data_ptr() == module.head.weight.data_ptr()
    assert not found["head.weight"].requires_grad


def test_a_digest_is_what_the_docstring_says() -> None:
    params = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([0.5], dtype=torch.bfloat16)}
    said = b"\0\0\0\1a\0\0\0\x08bfloat16" + struct.pack(">IQ", 1, 1) + struct.pack("<H", 0x3F00)
    said += b"\0\0\0\1b\0\0\0\x07float32" + struct.pack(">IQQ", 2, 1, 2) + struct.pack("<ff", 1.0, 2.0)
    assert params_digest(params) == hashlib.sha256(said).digest()


def test_a_digest_tells_models_apart() -> None:
    params = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(())}
    others = [
        {"a": params["a"].view(3, 2), "b": params["b"]},
        {"a": params["a"].view(torch.int32), "b": params["b"]},
        {"a": params["a"], "c": params["b"]},
        {"a": params["a"], "b": -params["b"]},
        {"a": params["a"]},
    ]
    assert len({params_digest(each) for each in [params, *others]}) == 6
    turned = {"b": params["b"], "a": params["a"].t().contiguous().t()}
    assert params_digest(turned) == params_digest(params)

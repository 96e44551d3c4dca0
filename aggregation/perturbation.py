"""Directions that every replica rebuilds from a key, and how parameters are moved along them.

Belongs here: from key to direction, the layout of a direction over a model's tensors, applying many of them, and the
shift that can be taken back. What a direction is worth belongs to `spsa.py`; the loops to `perturbation_kernels.py`.

The stream of a key is what `numpy.random.Philox(key=key).random_raw` gives: Philox4x64-10, whose counter is raised
before each block of four words, so that the first block is that of counter 1 (lowest word first). Parameters stand in
the order of their sorted names. Each tensor begins with a fresh block, and takes as many as it needs:

    GENERATOR  element j (row-major) of a tensor is bit j % 64, the lowest first, of the tensor's word j // 64:
               1 means +1, 0 means -1. 256 elements a block.
    GAUSSIAN   words 2i and 2i + 1 give elements 2i and 2i + 1, by Box and Muller. 4 elements a block. Logarithm and
               cosine are those of the machine, so that the last bit may differ between machines: for comparisons
               within one, not for replicas.

How a step is rounded. acc is the sum of +-coefficient over the step's keys in their order, in float32, from 0 on;
then value = round(float32(value) * keep + acc), where keep is 1 - decay in float32, the product is rounded to float32
by itself (and left out where there is no decay), and the last rounding is to the tensor's own type, to nearest, ties
to even: once a step. Nothing depends on tiles, threads, or on how many steps are applied together. Tensors are of
float32, bfloat16 or float16 and hold finite numbers; denormal ones are not flushed to zero.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Malladi et al. 2023, Fine-Tuning
Language Models with Just Forward Passes, arXiv 2305.17333, for directions made anew instead of kept.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from aggregation.base import Params

GENERATOR = "philox4x64-10/rademacher/1"
GAUSSIAN = "philox4x64-10/gaussian/1"

BLOCK_ENTRIES = {GENERATOR: 256, GAUSSIAN: 4}
"""How many elements one Philox block gives."""

WORDS_PER_BLOCK = 4
PIECE_ENTRIES = 2**19
"""Entries of one tensor that one call works on: enough for a call to be no cost, few enough to share out."""

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The types that can be moved, by their number in `perturbation_kernels`."""

FLOAT32_MAX = float(np.finfo(np.float32).max)

Words = NDArray[np.uint64]
T = TypeVar("T")


class Step(NamedTuple):
    """One round's update: directions, what each counts, and the share of the values that decays first.

    keys: 128-bit Philox keys, in canonical order.
    coefficients: float32 [keys].
    decay: from 0 up to 1, without 1.
    """

    keys: tuple[int, ...]
    coefficients: NDArray[np.float32]
    decay: float = 0.0


class Lost(NamedTuple):
    """What rounding took in a shift: for each piece of the model, where, and the values there before.

    On the CPU "where" is one bit for each element, uint32 [ceil(entries / 32)], and the values are bits of floats;
    elsewhere it is positions.
    """

    pieces: list[tuple[Any, Any]]
    num_entries: int

    @property
    def size_bytes(self) -> int:
        return sum(where.nbytes + values.nbytes for where, values in self.pieces)


class _Piece(NamedTuple):
    """A part of a tensor, the index of its first block in the stream, and its number among all pieces."""

    name: str
    values: Tensor
    first_block: int
    number: int


# --- keys -----------------------------------------------------------------------------------------------
def seed_key(base: bytes, author: bytes, round_: int, sample: int) -> int:
    """The 128-bit key of one direction: nobody can choose it, and no two of a run share one.

    The first 16 bytes, lowest first, of SHA-256 over b"covey scalar seed 1\\0", `base` (32 bytes, what the run began
    from), `author` (32 bytes, a public key), the round (8 bytes, highest first) and the sample (4 bytes, the same).

    Raises ValueError for other lengths and for numbers that do not fit.
    """
    return _key(b"covey scalar seed 1\0", origin(base, author, round_, sample))


def pool_key(base: bytes, index: int) -> int:
    """The key of a direction in the pool that a run shares: as `seed_key`, over b"covey pool seed 1\\0", base, index.

    The index takes 4 bytes, highest first. Raises ValueError as `seed_key` does.
    """
    _require_range("index", index, 2**32)
    return _key(b"covey pool seed 1\0", _of_32_bytes("base", base) + struct.pack(">I", index))


def origin(base: bytes, author: bytes, round_: int, sample: int) -> bytes:
    """The 76 bytes that name one sample of a run: every field of a fixed length, so that none runs into the next.

    Raises ValueError as `seed_key` does.
    """
    _require_range("round", round_, 2**64)
    _require_range("sample", sample, 2**32)
    numbers = struct.pack(">QI", round_, sample)
    return _of_32_bytes("base", base) + _of_32_bytes("author", author) + numbers


def _key(purpose: bytes, what: bytes) -> int:
    return int.from_bytes(hashlib.sha256(purpose + what).digest()[:16], "little")


def _of_32_bytes(argument: str, value: bytes) -> bytes:
    if len(value) != 32:
        raise ValueError(f"{argument} must be 32 bytes, not {len(value)}")
    return bytes(value)


def _require_range(argument: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise ValueError(f"{argument} must be from 0 to {end - 1}, not {value!r}")


# --- directions -----------------------------------------------------------------------------------------
def signs(key: int, sizes: Sequence[int]) -> NDArray[np.int8]:
    """One direction of GENERATOR, +1 and -1, over tensors of these sizes in order: int8 [sum(sizes)].

    In plain numpy: the reference for everything that is faster.
    """
    return np.concatenate([np.empty(0, np.int8), *_reference(key, sizes, GENERATOR, _signs_from)])


def normals(key: int, sizes: Sequence[int]) -> NDArray[np.float32]:
    """One direction of GAUSSIAN over tensors of these sizes in order: float32 [sum(sizes)]."""
    return np.concatenate([np.empty(0, np.float32), *_reference(key, sizes, GAUSSIAN, _normals_from)])


def signs_of(keys: Sequence[int], sizes: Sequence[int], dtype: DTypeLike = np.int8) -> NDArray[Any]:
    """`signs` of many keys at once, [keys, sum(sizes)] of a signed or floating numpy type. For a small model."""
    found = np.empty((len(keys), sum(sizes)), dtype)
    blocks = np.array(_first_blocks(sizes, GENERATOR), np.uint64)
    _kernels().expand(found, _key_words(keys), blocks, np.array(sizes, np.int64))
    return found


def _words(key: int, first_block: int, num_blocks: int) -> Words:
    return np.random.Philox(key=key, counter=first_block).random_raw(WORDS_PER_BLOCK * num_blocks)


def _signs_from(words: Words) -> NDArray[Any]:
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    return 2 * bits.astype(np.int8) - 1


def _normals_from(words: Words) -> NDArray[Any]:
    """Source: Box and Muller 1958, A note on the generation of random normal deviates."""
    uniform = (words >> np.uint64(11)).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log((uniform[:, 0] + np.uint64(1)) * 2.0**-53))
    angle = 2 * math.pi * (uniform[:, 1] * 2.0**-53)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.astype(np.float32).reshape(-1)


def _reference(
    key: int, sizes: Sequence[int], kind: str, expand: Callable[[Words], NDArray[Any]]
) -> Iterator[NDArray[Any]]:
    for first, size in zip(_first_blocks(sizes, kind), sizes, strict=True):
        yield expand(_words(key, first, _num_blocks(size, kind)))[:size]


def _num_blocks(size: int, kind: str) -> int:
    return -(-size // BLOCK_ENTRIES[kind])


def _first_blocks(sizes: Sequence[int], kind: str) -> list[int]:
    firsts, next_block = [], 0
    for size in sizes:
        firsts.append(next_block)
        next_block += _num_blocks(size, kind)
    return firsts


def _key_words(keys: Sequence[int]) -> Words:
    """[keys, 2], the lower word first."""
    joined = b"".join(key.to_bytes(16, "little") for key in keys)
    return np.frombuffer(joined, "<u8").reshape(-1, 2).astype(np.uint64)


def _direction(kind: str, key: int, first_block: int, values: Tensor) -> Tensor:
    """float32, as long as `values` and beside them; signs travel to another device as bits."""
    words = _words(key, first_block, _num_blocks(len(values), kind))
    if kind == GAUSSIAN:
        return torch.from_numpy(_normals_from(words)[: len(values)]).to(values.device)
    packed = torch.from_numpy(words.astype("<u8").view(np.uint8)).to(values.device)
    places = torch.arange(8, dtype=torch.uint8, device=values.device)
    bits = (packed.unsqueeze(1) >> places) & 1
    return bits.view(-1)[: len(values)].float().mul_(2).sub_(1)


# --- applying -------------------------------------------------------------------------------------------
def apply_steps(
    params: Params, steps: Sequence[Step], *, kind: str = GENERATOR, undecayed: Collection[str] = ()
) -> None:
    """Apply steps, in place and in order, in one pass over the parameters.

    The bytes are those of applying them one by one; see the module for how a step is rounded. A step without keys
    and decay changes nothing. The CPU's tensors are shared out among as many threads as torch uses; there and
    elsewhere the extra memory is a few megabytes, whatever the model and the number of steps, and a copy of a tensor
    that does not lie in one piece.

    Args:
        params: by name, of a type in FORMATS; tied ones once (see `trained`).
        kind: GENERATOR or GAUSSIAN.
        undecayed: names that do not decay, such as those of biases and norms.

    Raises ValueError for a type or kind that is not known, a decay out of range, and coefficients that are not
    finite or not as many as the keys. Then nothing was changed.
    """
    steps = [_checked(step) for step in steps if step.keys or step.decay]
    if not steps:
        return
    keys = [key for step in steps for key in step.keys]
    key_words = _key_words(keys)
    coefficients = np.concatenate([step.coefficients for step in steps])
    ends = np.cumsum([len(step.keys) for step in steps])
    keeps = np.array([1.0 - step.decay for step in steps]).astype(np.float32)

    def work(piece: _Piece) -> None:
        own_keeps = np.ones_like(keeps) if piece.name in undecayed else keeps
        if _is_compiled(piece, kind):
            _kernels().update(*_head(piece), key_words, (-coefficients).view(np.uint32), ends, own_keeps)
        else:
            _update(piece, kind, keys, coefficients, ends, own_keeps)

    _over(params, kind, work)


def _checked(step: Step) -> Step:
    if not 0 <= step.decay < 1:
        raise ValueError(f"decay must be from 0 up to 1, without 1, not {step.decay!r}")
    coefficients = np.asarray(step.coefficients, np.float32)
    if coefficients.shape != (len(step.keys),) or not np.isfinite(coefficients).all():
        raise ValueError(f"{len(step.keys)} keys need as many finite coefficients")
    return Step(step.keys, coefficients, step.decay)


def _update(
    piece: _Piece,
    kind: str,
    keys: Sequence[int],
    coefficients: NDArray[np.float32],
    ends: NDArray[np.int64],
    keeps: NDArray[np.float32],
) -> None:
    """The compiled `update` in torch, for all devices. Every operation is a call of its own: none is contracted."""
    wide = piece.values.float()
    begin = 0
    for end, keep in zip(ends, keeps, strict=True):
        sums = torch.zeros_like(wide)
        for index in range(begin, end):
            direction = _direction(kind, keys[index], piece.first_block, piece.values)
            sums += direction.mul_(float(coefficients[index]))
        begin = end
        if keep != 1:
            wide.mul_(float(keep))
        wide.add_(sums)
        piece.values.copy_(wide)
        wide = piece.values.float()


# --- a shift that can be taken back ---------------------------------------------------------------------
def shift(params: Params, key: int, step: float, kind: str = GENERATOR) -> Lost:
    """Add step times a direction in place, each value rounded once to its type; hand back what `unshift` needs.

    What is lost are the values v with fl(fl(v + d) - d) != v: those that are small beside the step or rise into the
    next binade. They are kept, next to one bit for each element, so the extra memory is 1/32 of a float32 model
    (1/16 of a 16-bit one) and the lost share. With weights of standard deviation 0.02 and a step of 2**-10 that share
    is 5.9 % in every type; with a step of 0.001, which is no power of two, 7.8 % in float32. With a step far beyond
    the values all are lost.

    `step` is taken as the nearest float32. Raises ValueError as `apply_steps` does, and for a step that is not finite.
    """
    size = _checked_step(step)
    rooms: list[NDArray[Any]] = []
    """One for each thread, used again and again: fresh ones would leave holes in memory between what is kept."""

    def work(piece: _Piece) -> tuple[Any, Any, int]:
        if not _is_compiled(piece, kind):
            where, values = _shift(piece, kind, key, float(size))
            return where, values, len(values)
        head = _head(piece)
        marks = np.empty(-(-len(piece.values) // 32), np.uint32)
        room = rooms.pop() if rooms else np.empty(PIECE_ENTRIES, np.uint32)
        found = room.view(head[0].dtype)[: len(piece.values)]
        count = _kernels().shift(*head, _key_words([key])[0], (-size).view(np.uint32), marks, found)
        kept = found[:count].copy()
        rooms.append(room)
        return marks, kept, count

    found = _over(params, kind, work)
    return Lost([(where, values) for where, values, _ in found], sum(count for _, _, count in found))


def unshift(params: Params, key: int, step: float, lost: Lost, kind: str = GENERATOR) -> None:
    """Take a shift back, in place: afterwards every byte is what it was before `shift` with the same arguments."""
    size = _checked_step(step)

    def work(piece: _Piece) -> None:
        where, values = lost.pieces[piece.number]
        if not _is_compiled(piece, kind):
            _unshift(piece, kind, key, float(size), where, values)
            return
        flipped = (-size).view(np.uint32)
        _kernels().unshift(*_head(piece), _key_words([key])[0], flipped, where, values)

    _over(params, kind, work)


def _checked_step(step: float) -> np.float32:
    if not abs(step) <= FLOAT32_MAX:
        raise ValueError(f"step must be a finite float32, not {step!r}")
    return np.float32(step)


def _shift(piece: _Piece, kind: str, key: int, step: float) -> tuple[Tensor, Tensor]:
    old = piece.values
    change = _direction(kind, key, piece.first_block, old).mul_(step)
    moved = (old.float() + change).to(old.dtype)
    back = (moved.float() - change).to(old.dtype)
    where = (_bits(old) != _bits(back)).nonzero().squeeze(1).int()
    values = old[where]
    old.copy_(moved)
    return where, values


def _unshift(piece: _Piece, kind: str, key: int, step: float, where: Tensor, values: Tensor) -> None:
    change = _direction(kind, key, piece.first_block, piece.values).mul_(step)
    piece.values.copy_(piece.values.float() - change)
    piece.values[where] = values


# --- a model's tensors ----------------------------------------------------------------------------------
def trained(module: nn.Module) -> Params:
    """The parameters that are trained, by name in sorted order, sharing memory with the module; no buffers.

    A tied parameter stands under the smallest of its names only. Names are compared by code points, which is the
    order of their UTF-8 bytes.
    """
    found: Params = {}
    seen = set()
    for name, parameter in sorted(module.named_parameters(remove_duplicate=False)):
        place = (parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype)
        if parameter.requires_grad and place not in seen:
            found[name] = parameter.detach()
            seen.add(place)
    return found


def params_digest(params: Params) -> bytes:
    """SHA-256 over names, types, shapes and bytes: equal if and only if the replicas are. 32 bytes.

    For each tensor in the order of sorted names: the name in UTF-8 behind its length (4 bytes, highest first); the
    type, such as "float32", the same way; the number of dimensions (4 bytes) and each of them (8 bytes); the elements
    in row-major order, each lowest byte first. No copy of the model is made.
    """
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name].detach()
        for text in (name, str(tensor.dtype).removeprefix("torch.")):
            digest.update(struct.pack(">I", len(text.encode())) + text.encode())
        digest.update(struct.pack(f">I{tensor.dim()}Q", tensor.dim(), *tensor.shape))
        for part in torch.split(tensor.contiguous().view(-1), PIECE_ENTRIES):
            bits = _bits(part).cpu().numpy()
            digest.update(bits.astype(bits.dtype.newbyteorder("<"), copy=False).data)
    return digest.digest()


def _bits(values: Tensor) -> Tensor:
    """The same memory as whole numbers."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(whole[values.element_size()])


def _kernels() -> Any:
    """Loaded when first needed: numba is slow to import, and not every process moves parameters."""
    from aggregation import perturbation_kernels

    return perturbation_kernels


def _is_compiled(piece: _Piece, kind: str) -> bool:
    return kind == GENERATOR and piece.values.device.type == "cpu"


def _head(piece: _Piece) -> tuple[NDArray[Any], int, np.uint64]:
    """A piece as the kernels take it: the bits of its values, their format, the first block."""
    bits = _bits(piece.values).numpy()
    unsigned = bits.view(np.dtype(f"u{bits.itemsize}"))
    return unsigned, FORMATS[piece.values.dtype], np.uint64(piece.first_block)


def _pieces(tensors: Params, kind: str) -> Iterator[_Piece]:
    firsts = _first_blocks([tensor.numel() for tensor in tensors.values()], kind)
    number = 0
    for (name, tensor), first in zip(tensors.items(), firsts, strict=True):
        for start in range(0, tensor.numel(), PIECE_ENTRIES):
            values = tensor[start : start + PIECE_ENTRIES]
            yield _Piece(name, values, first + start // BLOCK_ENTRIES[kind], number)
            number += 1


@torch.no_grad()
def _over(params: Params, kind: str, work: Callable[[_Piece], T]) -> list[T]:
    """Do the work on every piece, which may write into it; the results in the order of the pieces."""
    if kind not in BLOCK_ENTRIES:
        raise ValueError(f"kind must be one of {', '.join(BLOCK_ENTRIES)}, not {kind!r}")
    for name, tensor in params.items():
        if tensor.dtype not in FORMATS:
            raise ValueError(f"{name} must be of float32, bfloat16 or float16, not {tensor.dtype}")
    # A tensor that does not lie in one piece is worked on as a copy that does.
    lying = {name: params[name].detach().contiguous().view(-1) for name in sorted(params)}
    pieces = list(_pieces(lying, kind))
    threads = min(torch.get_num_threads(), len(pieces))
    is_small = sum(len(piece.values) for piece in pieces) <= PIECE_ENTRIES
    if is_small or threads < 2 or not all(_is_compiled(piece, kind) for piece in pieces):
        found = [work(piece) for piece in pieces]
    else:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(work, pieces))
    for name, tensor in params.items():
        if not tensor.is_contiguous():
            tensor.detach().copy_(lying[name].view(tensor.shape))
    return found

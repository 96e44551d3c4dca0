"""What `perturbation.py` does on the CPU, compiled by numba: the Philox rounds, sums of signs, exact shifts.

Belongs here: loops over the elements of one tensor that lie in memory. What the numbers mean, the layout of the
stream and the way tensors are cut belong to `perturbation.py`, which imports this module when it first needs it,
because numba takes its time to load.

How it stays fast: a tensor is worked on in tiles that stay in the cache, so memory is read and written once however
many directions are added, and no direction is ever stored. The loops are written for the compiler to vectorise: the
rounds of many Philox blocks side by side, with 64-bit products from 32-bit halves, and 32 signs of one half-word at a
time; a change that looks harmless can cost a factor of ten (benchmarks/spsa.py). Nothing here may be reordered or
contracted (no fastmath): all must come out the same, to the bit, on every machine. Words lie lowest byte first, as on
all machines that torch runs on.

Values come as the bits of their floats, uint32 or uint16, with a format: FLOAT32, BFLOAT16 or FLOAT16.
"""

import numpy as np
from numba import njit

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

TILE_BLOCKS = 32
"""Philox blocks of a tile: 8192 elements, of which values and sums are 64 kB together, so that they stay in the
second-level cache at least. With fewer, the rounds of too few blocks run side by side."""

BLOCK_ENTRIES = 256
TILE_ENTRIES = TILE_BLOCKS * BLOCK_ENTRIES

GROUP = 4
"""Directions added in one go, their sum in a register: with one after the other, the sums in the cache cost
more than the signs."""

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIER_0_LOW, MULTIPLIER_0_HIGH = np.uint64(0xE14C6C93), np.uint64(0xD2E7470E)
MULTIPLIER_1_LOW, MULTIPLIER_1_HIGH = np.uint64(0x95121157), np.uint64(0xCA5A8263)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
ROUNDS = 10

SIGN = np.uint32(0x80000000)
ONE = np.uint32(1)

compiled = njit(nogil=True, cache=True, error_model="numpy")


# --- the generator --------------------------------------------------------------------------------------
@compiled
def product(value, low, high):  # type: ignore[no-untyped-def]
    """High and low word of the 128-bit product of a word and a multiplier given in halves."""
    value_low, value_high = value & LOW, value >> HALF
    lows = value_low * low
    middle = value_high * low + (lows >> HALF)
    other = value_low * high + (middle & LOW)
    return value_high * high + (middle >> HALF) + (other >> HALF), (other << HALF) | (lows & LOW)


@compiled
def philox(state, key_0, key_1):  # type: ignore[no-untyped-def]
    """Philox4x64-10 in place, of uint64 [4, TILE_BLOCKS]: counters, lowest word first, become words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    for _ in range(ROUNDS):
        for block in range(TILE_BLOCKS):
            high_0, low_0 = product(state[0, block], MULTIPLIER_0_LOW, MULTIPLIER_0_HIGH)
            high_1, low_1 = product(state[2, block], MULTIPLIER_1_LOW, MULTIPLIER_1_HIGH)
            state[0, block] = high_1 ^ state[1, block] ^ key_0
            state[1, block] = low_1
            state[2, block] = high_0 ^ state[3, block] ^ key_1
            state[3, block] = low_0
        key_0 += WEYL_0
        key_1 += WEYL_1


@compiled
def fill(state, key, first_block):  # type: ignore[no-untyped-def]
    """The stream from a block on: uint64 [4, TILE_BLOCKS], the words of a block below each other."""
    for block in range(TILE_BLOCKS):
        state[0, block] = first_block + np.uint64(block + 1)  # numpy counts up before it draws
        state[1, block] = state[2, block] = state[3, block] = np.uint64(0)
    philox(state, key[0], key[1])


# --- signs and sums -------------------------------------------------------------------------------------
@compiled
def signed(half, place, flipped):  # type: ignore[no-untyped-def]
    """Plus the coefficient where the bit is 1, else minus, of the bits of minus the coefficient."""
    return np.uint32(((half << np.uint32(31 - place)) & SIGN) ^ flipped).view(np.float32)


@compiled
def add_one(sums, halves, flipped):  # type: ignore[no-untyped-def]
    """One direction: halves uint32 [4, 2 * blocks], as they lie in `state`, the lower half of a word first."""
    for block in range(TILE_BLOCKS):
        for word in range(4):
            start = BLOCK_ENTRIES * block + 64 * word
            low, high = halves[word, 2 * block], halves[word, 2 * block + 1]
            for place in range(64):
                half = low if place < 32 else high
                sums[start + place] += signed(half, place & 31, flipped)


@compiled
def add_group(sums, halves, flipped):  # type: ignore[no-untyped-def]
    """GROUP directions, one after the other: halves uint32 [GROUP, 4, 2 * blocks], flipped [GROUP]."""
    for word in range(4):
        for block in range(TILE_BLOCKS):
            start = BLOCK_ENTRIES * block + 64 * word
            for place in range(32):
                low, high = sums[start + place], sums[start + 32 + place]
                for member in range(GROUP):
                    low += signed(halves[member, word, 2 * block], place, flipped[member])
                    high += signed(halves[member, word, 2 * block + 1], place, flipped[member])
                sums[start + place], sums[start + 32 + place] = low, high


@compiled
def add_all(sums, states, keys, flipped, first_block):  # type: ignore[no-untyped-def]
    """Add every direction to the sums, in the order of the keys; states is room for GROUP of them."""
    halves = states.view(np.uint32)
    done = 0
    while len(keys) - done >= GROUP:
        for member in range(GROUP):
            fill(states[member], keys[done + member], first_block)
        add_group(sums, halves, flipped[done : done + GROUP])
        done += GROUP
    for index in range(done, len(keys)):
        fill(states[0], keys[index], first_block)
        add_one(sums, halves[0], flipped[index])


# --- floats of 16 bits ----------------------------------------------------------------------------------
@compiled
def narrow_bfloat16(bits):  # type: ignore[no-untyped-def]
    """Of float32 to bfloat16, to nearest, ties to even."""
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & ONE)) >> np.uint32(16)
    is_nan = (bits & ~SIGN) > np.uint32(0x7F800000)
    return np.uint32(0x7FC0) if is_nan else np.uint32(rounded)


@compiled
def narrow_float16(bits):  # type: ignore[no-untyped-def]
    """Of float32 to float16, to nearest, ties to even."""
    size = np.uint32(bits & ~SIGN)
    # In the binade of 0.5 a unit in the last place is float16's smallest number, so the sum rounds as wanted.
    small = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    normal = (size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & ONE) - np.uint32(112 << 23)) >> np.uint32(
        13
    )
    result = small if size < np.uint32(0x38800000) else normal
    result = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else result
    result = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else result
    return np.uint32(result | ((bits & SIGN) >> np.uint32(16)))


@compiled
def widen_float16(bits):  # type: ignore[no-untyped-def]
    """Of float16 to float32, exact."""
    size = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    shifted = np.float32(size.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    is_finite = size < np.uint32(0x7C00 << 13)
    shifted = shifted if is_finite else np.uint32(size | np.uint32(0x7F800000))
    return np.uint32(shifted | ((bits & np.uint32(0x8000)) << np.uint32(16)))


@compiled
def widen(wide, values, kind):  # type: ignore[no-untyped-def]
    """Bits of float32 from those of the values."""
    if kind == FLOAT32:
        for index in range(len(values)):
            wide[index] = np.uint32(values[index])
    elif kind == BFLOAT16:
        for index in range(len(values)):
            wide[index] = np.uint32(values[index]) << np.uint32(16)
    else:
        for index in range(len(values)):
            wide[index] = widen_float16(np.uint32(values[index]))


@compiled
def narrow(values, wide, kind):  # type: ignore[no-untyped-def]
    """Bits of the values, rounded, from those of float32."""
    if kind == FLOAT32:
        for index in range(len(values)):
            values[index] = wide[index]
    elif kind == BFLOAT16:
        for index in range(len(values)):
            values[index] = narrow_bfloat16(wide[index])
    else:
        for index in range(len(values)):
            values[index] = narrow_float16(wide[index])


# --- what is done to a tensor ---------------------------------------------------------------------------
@compiled
def update(values, kind, first_block, keys, flipped, ends, keeps):  # type: ignore[no-untyped-def]
    """Apply steps in place: value * keep + sum of the signed coefficients, rounded once a step.

    Whole tiles of float32 are worked on where they lie, others as a copy of whole length.

    keys uint64 [directions, 2]; flipped uint32 [directions], bits of minus the coefficients; ends int64 [steps],
    where each step's directions end; keeps float32 [steps].
    """
    states = np.empty((GROUP, 4, TILE_BLOCKS), np.uint64)
    halves = states.view(np.uint32)
    sums = np.empty(TILE_ENTRIES, np.float32)
    wide = np.zeros(TILE_ENTRIES, np.float32)
    bits = wide.view(np.uint32)
    for start in range(0, len(values), TILE_ENTRIES):
        part = values[start : start + TILE_ENTRIES]
        in_place = kind == FLOAT32 and len(part) == TILE_ENTRIES
        tile = part.view(np.float32) if in_place else wide
        if not in_place:
            widen(bits, part, kind)
        block = first_block + np.uint64(start // BLOCK_ENTRIES)
        begin = 0
        for step in range(len(ends)):
            if keeps[step] != 1:
                for index in range(TILE_ENTRIES):
                    tile[index] *= keeps[step]
            # To add one coefficient to zero first changes nothing, but where a zero has a sign.
            if ends[step] == begin + 1 and flipped[begin] & ~SIGN:
                fill(states[0], keys[begin], block)
                add_one(tile, halves[0], flipped[begin])
            else:
                sums[:] = 0
                add_all(sums, states, keys[begin : ends[step]], flipped[begin : ends[step]], block)
                for index in range(TILE_ENTRIES):
                    tile[index] += sums[index]
            begin = ends[step]
            if not in_place:
                narrow(part, bits, kind)
                widen(bits, part, kind)


@compiled
def lowest_place(mark):  # type: ignore[no-untyped-def]
    """Of the lowest bit that is set: the exponent of its value as a float."""
    lowest = np.float32(mark & (~mark + ONE))
    return np.int64((lowest.view(np.uint32) >> np.uint32(23)) - np.uint32(127))


@compiled
def packed(flags):  # type: ignore[no-untyped-def]
    """32 bits from 32 bytes of 0 or 1, given as four words: the product moves a word's bytes to its highest one."""
    mark = np.uint32(0)
    for word in range(4):
        byte = np.uint32((flags[word] * np.uint64(0x0102040810204080)) >> np.uint64(56))
        mark |= byte << np.uint32(8 * word)
    return mark


@compiled
def shift(values, kind, first_block, key, flipped, marks, lost):  # type: ignore[no-untyped-def]
    """Add one direction in place; mark what taking it away again would not restore, and keep it.

    marks uint32 [ceil(entries / 32)], one bit for each element; lost of the type of the values, with room for all of
    them. Returns how many it holds.
    """
    state = np.empty((4, TILE_BLOCKS), np.uint64)
    halves = state.view(np.uint32)
    wide = np.zeros(TILE_ENTRIES, np.float32)
    moved = np.zeros(TILE_ENTRIES, values.dtype)
    back = np.zeros(TILE_ENTRIES, values.dtype)
    differs = np.zeros(TILE_ENTRIES, np.uint8)
    flags = differs.view(np.uint64)
    bits = wide.view(np.uint32)
    count = np.int64(0)
    for start in range(0, len(values), TILE_ENTRIES):
        part = values[start : start + TILE_ENTRIES]
        fill(state, key, first_block + np.uint64(start // BLOCK_ENTRIES))
        widen(bits, part, kind)
        add_one(wide, halves, flipped)
        narrow(moved, bits, kind)
        widen(bits, moved, kind)
        add_one(wide, halves, flipped ^ SIGN)
        narrow(back, bits, kind)
        for index in range(len(part)):
            differs[index] = part[index] != back[index]
        differs[len(part) :] = 0
        for first in range(0, len(part), 32):
            mark = packed(flags[first // 8 : first // 8 + 4])
            marks[(start + first) // 32] = mark
            while mark:
                lost[count] = part[first + lowest_place(mark)]
                count += 1
                mark &= mark - ONE
        for index in range(len(part)):
            part[index] = moved[index]
    return count


@compiled
def unshift(values, kind, first_block, key, flipped, marks, lost):  # type: ignore[no-untyped-def]
    """Take the direction of `shift` away again, and put back what was lost."""
    state = np.empty((4, TILE_BLOCKS), np.uint64)
    halves = state.view(np.uint32)
    wide = np.zeros(TILE_ENTRIES, np.float32)
    bits = wide.view(np.uint32)
    count = np.int64(0)
    for start in range(0, len(values), TILE_ENTRIES):
        part = values[start : start + TILE_ENTRIES]
        fill(state, key, first_block + np.uint64(start // BLOCK_ENTRIES))
        widen(bits, part, kind)
        add_one(wide, halves, flipped ^ SIGN)
        narrow(part, bits, kind)
        for first in range(0, len(part), 32):
            mark = marks[(start + first) // 32]
            while mark:
                part[first + lowest_place(mark)] = lost[count]
                count += 1
                mark &= mark - ONE


@compiled
def expand(signs, keys, blocks, sizes):  # type: ignore[no-untyped-def]
    """+1 and -1 of many directions of a small model: signs [directions, entries], tensors of `sizes` from `blocks`."""
    state = np.empty((4, TILE_BLOCKS), np.uint64)
    halves = state.view(np.uint32)
    for row in range(len(keys)):
        column = 0
        for tensor in range(len(sizes)):
            for start in range(0, sizes[tensor], TILE_ENTRIES):
                fill(state, keys[row], blocks[tensor] + np.uint64(start // BLOCK_ENTRIES))
                for index in range(min(TILE_ENTRIES, sizes[tensor] - start)):
                    bit = (
                        halves[(index >> 6) & 3, 2 * (index >> 8) + ((index >> 5) & 1)]
                        >> np.uint32(index & 31)
                    ) & ONE
                    signs[row, column + index] = 2 * np.int32(bit) - 1
                column += min(TILE_ENTRIES, sizes[tensor] - start)

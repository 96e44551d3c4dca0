"""Schemas, and weights from strangers."""

import hashlib
import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from node.weights import (
    TensorSpec,
    check_weights,
    encode_params,
    load_params,
    max_blob_bytes,
    schema_hash,
    schema_of,
)
from protocols.errors import LocalError, PeerError
from protocols.vocabulary import DIGEST_BYTES, Reason

PARAMS = {
    "0.weight": torch.arange(6.0).reshape(2, 3),
    "0.bias": torch.zeros(2),
    "1.count": torch.tensor(3),
    "2.half": torch.ones(2, dtype=torch.bfloat16),
}


# --- the schema -----------------------------------------------------------------------------------------
def test_the_schema_lists_every_entry_sorted_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert schema_of(model) == schema_of(model.state_dict())
    assert list(schema_of(model).items()) == [
        ("0.bias", TensorSpec((3,), "F32")),
        ("0.weight", TensorSpec((3, 2), "F32")),
        ("1.bias", TensorSpec((3,), "F32")),
        ("1.num_batches_tracked", TensorSpec((), "I64")),
        ("1.running_mean", TensorSpec((3,), "F32")),
        ("1.running_var", TensorSpec((3,), "F32")),
        ("1.weight", TensorSpec((3,), "F32")),
    ]


def test_the_schema_hash_tells_apart_what_must_not_be_averaged() -> None:
    schema = schema_of(PARAMS)
    base = schema_hash("task", schema)
    assert len(base) == DIGEST_BYTES
    assert base == schema_hash("task", dict(reversed(schema.items())))
    others = [
        schema_hash("other", schema),
        schema_hash("task", schema | {"0.bias": TensorSpec((3,), "F32")}),
        schema_hash("task", schema | {"0.bias": TensorSpec((2,), "F16")}),
        schema_hash("task", schema | {"extra": TensorSpec((2,), "F32")}),
    ]
    assert len({base, *others}) == 5


def test_the_schema_hash_is_sha256_over_canonical_json() -> None:
    text = b'["task",[["a.bias","F32",[2]],["b.count","I64",[]]]]'
    schema = {"b.count": TensorSpec((), "I64"), "a.bias": TensorSpec((2,), "F32")}
    assert schema_hash("task", schema) == hashlib.sha256(text).digest()


def test_a_dtype_that_does_not_travel_is_our_own_error() -> None:
    with pytest.raises(
        LocalError, match=r"tensor 'x' is torch.complex64, which cannot be sent \(allowed: F64"
    ):
        schema_of({"x": torch.zeros(2, dtype=torch.complex64)})


# --- weights as bytes -----------------------------------------------------------------------------------
def test_params_survive_encoding(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(encode_params(PARAMS))
    check_weights(path, schema_of(PARAMS))
    loaded = load_params(path)
    assert loaded.keys() == PARAMS.keys()
    for name, tensor in PARAMS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_writing_to_loaded_params_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(encode_params(PARAMS))
    load_params(path)["0.weight"].add_(1)
    assert path.read_bytes() == encode_params(PARAMS)


def test_equal_params_make_equal_bytes_in_any_order() -> None:
    assert encode_params(dict(reversed(PARAMS.items()))) == encode_params(PARAMS)


def test_views_tied_weights_and_strides_are_encoded_by_value(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    params = {"a": flat[:6].view(2, 3), "b": flat[6:].view(2, 3).T, "c": flat[:6].view(2, 3), "d": flat}
    path = tmp_path / "weights"
    path.write_bytes(encode_params(params))
    loaded = load_params(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in params.items())


def test_the_blob_bound_holds_for_many_tensors_of_long_names() -> None:
    params = {f"{'block.' * 40}{index}.weight": torch.zeros(1) for index in range(300)}
    schema = schema_of(params)
    assert len(encode_params(params)) <= max_blob_bytes(schema) <= 300 * (4 + 512 + 260) + 65536


def test_reading_damaged_or_missing_weights_of_our_own_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"no weights")
    for name in ("damaged", "missing"):
        with pytest.raises(LocalError, match="cannot read weights from"):
            load_params(tmp_path / name)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(LocalError, match="cannot read"):
            check_weights(path, schema_of(PARAMS))


def blob(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def refusal(data: bytes, params: Mapping[str, Tensor] = PARAMS) -> PeerError | None:
    """What `check_weights` says of a file with these bytes. Anything but a PeerError fails the test."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            check_weights(Path(file.name), schema_of(params))
        except PeerError as error:
            refused_with = error
        else:
            return None
    assert len(str(refused_with)) <= 300
    assert str(refused_with).isprintable()
    return refused_with


def without(name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in PARAMS.items() if other != name}


@pytest.mark.parametrize(
    ("params", "detail"),
    [
        (without("0.bias"), "0.bias is missing (1 such tensors)"),
        (PARAMS | {"evil": torch.ones(1)}, "evil is not expected (1 such tensors)"),
        (PARAMS | {"x\n\x1b[2J": torch.ones(1)}, "'x\\n\\x1b[2J' is not expected (1 such tensors)"),
        (PARAMS | {"0.bias": torch.zeros(3)}, "0.bias: expected F32[2], found F32[3]"),
        (PARAMS | {"0.weight": torch.zeros(3, 2)}, "0.weight: expected F32[2, 3], found F32[3, 2]"),
        (PARAMS | {"1.count": torch.tensor(3.0)}, "1.count: expected I64[], found F32[]"),
        (PARAMS | {"1.count": torch.tensor([3])}, "1.count: expected I64[], found I64[1]"),
        (
            PARAMS | {"0.bias": torch.zeros([1] * 200 + [2])},
            f"0.bias: expected F32[2], found F32[{'1, ' * 31}...",
        ),
    ],
)
def test_another_shape_is_refused_with_what_was_expected(params: dict[str, Tensor], detail: str) -> None:
    error = refusal(encode_params(params))
    assert error is not None
    assert (error.reason, error.detail) == (Reason.WRONG_SHAPE, detail)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["0.weight", "2.half"])
def test_values_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    poisoned = PARAMS[name].clone()
    poisoned.view(-1)[-1] = value
    error = refusal(encode_params(PARAMS | {name: poisoned}))
    assert error is not None
    assert (error.reason, error.detail) == (Reason.NON_FINITE, f"{name} holds NaN or an infinity")


def test_a_variance_below_zero_is_refused() -> None:
    params = {"bn.running_var": torch.tensor([1.0, -0.25])}
    error = refusal(encode_params(params), params)
    assert error is not None
    assert (error.reason, error.detail) == (Reason.NON_FINITE, "bn.running_var holds a negative variance")


def test_an_empty_tensor_passes() -> None:
    params = {"none": torch.zeros(0, 3)}
    assert refusal(encode_params(params), params) is None


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        encode_params(PARAMS)[:-1],
        encode_params(PARAMS) + b"x",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 60_000) + b"{}",
        blob(b"hello"),
        blob(b"\xff\xfe"),
        blob(b"[" * 50_000),
        blob([]),
        blob({"x\x1b" * 5000: F32 | {"data_offsets": [4, 8]}}, bytes(8)),
        blob({"x": F32 | {"shape": [2**40, 2**40]}}, bytes(4)),
        blob({"x": F32 | {"shape": [-1]}}, bytes(4)),
        blob({"x": F32 | {"dtype": "PICKLE"}}, bytes(4)),
        blob(b'{"\\ud800":' + json.dumps(F32).encode() + b"}", bytes(4)),
    ],
)
def test_bytes_that_are_no_safetensors_are_refused(data: bytes) -> None:
    error = refusal(data)
    assert error is not None
    assert error.reason is Reason.WRONG_FORMAT


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E5M2", "F8_E4M3", "C64", "U64"])
def test_dtypes_that_torch_may_not_know_are_refused(dtype: str) -> None:
    size_bytes = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "U64": 64}.get(dtype, 8)
    header = {"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, size_bytes]}}
    error = refusal(blob(header, bytes(size_bytes)), {"x": torch.zeros(8)})
    assert error is not None
    assert error.reason in {Reason.WRONG_SHAPE, Reason.WRONG_FORMAT}


def test_a_file_larger_than_the_model_can_be_is_refused_unparsed() -> None:
    limit = max_blob_bytes(schema_of(PARAMS))
    error = refusal(bytes(limit + 1))
    assert error is not None
    assert (error.reason, error.detail) == (
        Reason.TOO_LARGE,
        f"{limit + 1} bytes where this model needs at most {limit}",
    )


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_a_refusal(data: bytes) -> None:
    assert refusal(data) is not None
    assert refusal(blob(data, data)) is not None


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_header_bit_or_a_cut_file_raises_nothing_but_a_refusal(data: st.DataObject) -> None:
    good = bytearray(encode_params(PARAMS))
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        bit = data.draw(st.integers(0, 8 * header_bytes - 1))
        good[bit // 8] ^= 1 << bit % 8
    refusal(bytes(good))
    cut = data.draw(st.integers(0, len(good) - 1))
    error = refusal(encode_params(PARAMS)[:cut])
    assert error is not None
    assert error.reason is Reason.WRONG_FORMAT


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False),
        st.text(max_size=4),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["0.bias", "0.weight", "__metadata__", "x"]),
        JSON | st.fixed_dictionaries({"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON}),
        max_size=3,
    ),
    st.binary(max_size=16),
)
def test_hostile_headers_raise_nothing_but_a_refusal(header: dict[str, Any], body: bytes) -> None:
    assert refusal(blob(header, body)) is not None

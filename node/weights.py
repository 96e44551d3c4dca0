"""The safe passage of weights to and from bytes.

Belongs here: the schema that two nodes must share before they exchange anything, writing and reading a model's file,
and the check of a file from a stranger. Nothing here knows a task.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from aggregation.base import Params
from protocols.errors import LocalError, PeerError
from protocols.vocabulary import Reason, SchemaHash

HEADER_BYTES = 64 * 1024
TENSOR_HEADER_BYTES = 512


# --- the schema -----------------------------------------------------------------------------------------
class TensorSpec(NamedTuple):
    """A tensor without its values. `dtype` is spelt as safetensors spells it."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


Schema = dict[str, TensorSpec]
"""Every parameter and buffer by name, in the order of the names."""

DTYPES: dict[torch.dtype, tuple[str, int]] = {
    torch.float64: ("F64", 8),
    torch.float32: ("F32", 4),
    torch.float16: ("F16", 2),
    torch.bfloat16: ("BF16", 2),
    torch.int64: ("I64", 8),
    torch.int32: ("I32", 4),
    torch.int16: ("I16", 2),
    torch.int8: ("I8", 1),
    torch.uint8: ("U8", 1),
    torch.bool: ("BOOL", 1),
}
"""What may travel: the name in a file, and the bytes of an element."""
_ITEM_BYTES = dict(DTYPES.values())


def schema_of(source: Mapping[str, Tensor] | nn.Module) -> Schema:
    """Name -> (shape, dtype) of every entry of a `state_dict()`, buffers included, sorted by name.

    Raises LocalError on a dtype that does not travel.
    """
    state: Mapping[str, Tensor] = source.state_dict() if isinstance(source, nn.Module) else source
    return {name: _spec_of(name, state[name]) for name in sorted(state)}


def _spec_of(name: str, tensor: Tensor) -> TensorSpec:
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(spelling for spelling, _ in DTYPES.values())
        raise LocalError(f"tensor {name!r} is {tensor.dtype}, which cannot be sent (allowed: {allowed})")
    return TensorSpec(tuple(tensor.shape), DTYPES[tensor.dtype][0])


def schema_hash(task_name: str, schema: Schema) -> SchemaHash:
    """32 bytes that two nodes compare before they exchange anything. The schema's order does not matter."""
    tensors = [[name, schema[name].dtype, list(schema[name].shape)] for name in sorted(schema)]
    text = json.dumps([task_name, tensors], separators=(",", ":"))
    return SchemaHash(hashlib.sha256(text.encode()).digest())


def max_blob_bytes(schema: Schema) -> int:
    """No honest file of this schema is larger: its tensors and a generous safetensors header, in bytes."""
    tensor_bytes = sum(math.prod(spec.shape) * _ITEM_BYTES[spec.dtype] for spec in schema.values())
    header_bytes = sum(TENSOR_HEADER_BYTES + len(name.encode()) for name in schema)
    return tensor_bytes + header_bytes + HEADER_BYTES


# --- weights as bytes -----------------------------------------------------------------------------------
MAX_MAGNITUDE = 1e10
"""No weight of a model that works comes near. Far beyond it, finite weights overflow in the first forward pass."""


def all_sane(tensor: Tensor) -> bool:
    """True where every element is finite and at most MAX_MAGNITUDE; integers always are. Needs no copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(
        torch.isfinite(low) & torch.isfinite(high) & (low >= -MAX_MAGNITUDE) & (high <= MAX_MAGNITUDE)
    )


def encode_params(params: Params) -> bytes:
    """A safetensors file. Equal parameters make equal bytes, whatever the order of the dict."""
    tensors: Params = {}
    storages: set[int] = set()
    for name in sorted(params):
        tensor = params[name].detach().cpu().contiguous()
        # safetensors refuses two names for one memory: tied weights, or views of a flat vector
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    return bytes(save(tensors))


def load_params(path: Path) -> Params:
    """What `encode_params` wrote. Tensors may be mapped from the file: writing to them does not change it.

    Raises LocalError where the file cannot be read. For a peer's file call `check_weights` first.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise LocalError(f"cannot read weights from {path}: {error}") from error


def check_weights(path: Path, schema: Schema) -> None:
    """Accept a peer's file, or raise PeerError; nothing of it is kept, and one tensor is in memory at a time.

    Reasons: TOO_LARGE (more than `max_blob_bytes`, before it is parsed), WRONG_FORMAT (not safetensors, or
    longer or shorter than its header says), WRONG_SHAPE (names, shapes or dtypes are not the schema's, before a
    tensor is read), NON_FINITE (or a variance below 0, whose root is no number). Raises LocalError where our own disk fails.
    """
    try:
        size_bytes, limit = path.stat().st_size, max_blob_bytes(schema)
        if size_bytes > limit:
            raise PeerError(Reason.TOO_LARGE, f"{size_bytes} bytes where this model needs at most {limit}")
        with safe_open(path, framework="pt") as file:
            _check_names(file.keys(), schema)
            for name, expected in schema.items():
                entry = file.get_slice(name)
                found = TensorSpec(tuple(entry.get_shape()), entry.get_dtype())
                if found != expected:
                    raise PeerError(
                        Reason.WRONG_SHAPE, f"{_clip(name)}: expected {expected}, found {_clip(str(found))}"
                    )
            for name in schema:
                tensor = file.get_tensor(name)
                if not all_sane(tensor):
                    raise PeerError(Reason.NON_FINITE, f"{_clip(name)} holds NaN or an infinity")
                if name.endswith("running_var") and tensor.numel() and float(tensor.min()) < 0:
                    raise PeerError(Reason.NON_FINITE, f"{_clip(name)} holds a negative variance")
    except SafetensorError as error:
        raise PeerError(Reason.WRONG_FORMAT, _clip(str(error))) from error
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error}") from error


def _check_names(found: Iterable[str], schema: Schema) -> None:
    names = set(found)
    for problem, odd in (("missing", schema.keys() - names), ("not expected", names - schema.keys())):
        if odd:
            first = min(odd)
            raise PeerError(Reason.WRONG_SHAPE, f"{_clip(first)} is {problem} ({len(odd)} such tensors)")


def _clip(text: str) -> str:
    """A peer's text, safe in a log: short, and without control characters."""
    shown = text if len(text) <= 100 else text[:97] + "..."
    return shown if shown.isprintable() else ascii(shown)[:160]

"""The state of a replica as a file: equal states make equal bytes, and a model is written and read without a copy of it.

Belongs here: where which tensor lies in such a file. It is a safetensors file whose header follows from the schema
alone, so that a file from a stranger is never parsed: its header is the one that was expected, or it is refused.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from aggregation.base import Params
from node.weights import DTYPES, Schema, all_sane
from protocols.errors import LocalError, PeerError
from protocols.vocabulary import Reason

PIECE_BYTES = 4 * 1024 * 1024
"""What is read, checked or brought from another device at a time."""
_DTYPES = {spelling: (dtype, size) for dtype, (spelling, size) in DTYPES.items()}


class StateFile:
    """The file of tensors of one schema, in the order of their item sizes, the largest first, and then of their names."""

    def __init__(self, schema: Schema) -> None:
        self._schema = {
            name: schema[name]
            for name in sorted(schema, key=lambda name: (-_DTYPES[schema[name].dtype][1], name))
        }
        self._places: dict[str, tuple[int, int]] = {}
        at = 0
        for name, spec in self._schema.items():
            end = at + math.prod(spec.shape) * _DTYPES[spec.dtype][1]
            self._places[name] = at, end
            at = end
        described = {
            name: {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": list(self._places[name])}
            for name, spec in self._schema.items()
        }
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.size_bytes = len(self._header) + at

    def pieces(self, tensors: Params) -> Iterator[bytes | memoryview]:
        """The file's bytes in order, tensors as they lie in memory."""
        yield self._header
        for name in self._schema:
            for part in _parts(tensors[name]):
                yield part.cpu().numpy().data

    def read(self, path: Path, tensors: Params) -> None:
        """Overwrite the tensors, in place, with what a file holds that was checked.

        Raises LocalError where it cannot be read; some tensors are overwritten then.
        """
        try:
            with path.open("rb", buffering=0) as file:
                for name, (start, _) in self._places.items():
                    file.seek(len(self._header) + start)
                    _fill(file, tensors[name])
        except OSError as error:
            raise LocalError(f"cannot read the state in {path}: {error}") from error

    def check(self, path: Path) -> None:
        """Accept a file of a peer or one that lay on our disk, or raise PeerError; a piece is in memory at a time.

        Reasons: WRONG_SHAPE (the header is not that of this schema), WRONG_SIZE (shorter or longer than it says),
        NON_FINITE. Raises LocalError where our own disk fails.
        """
        try:
            with path.open("rb") as file:
                if file.read(len(self._header)) != self._header:
                    raise PeerError(Reason.WRONG_SHAPE, "not the tensors of this task's state in their order")
                size_bytes = path.stat().st_size
                if size_bytes != self.size_bytes:
                    raise PeerError(
                        Reason.WRONG_SIZE, f"{size_bytes} bytes where this state has {self.size_bytes}"
                    )
                for name, (start, end) in self._places.items():
                    if not all(map(all_sane, self._read(file, name, end - start))):
                        raise PeerError(Reason.NON_FINITE, f"{name} holds NaN or an infinity")
        except OSError as error:
            raise LocalError(f"cannot read {path}: {error}") from error

    def load(self, path: Path, name: str) -> Tensor:
        """One small tensor of a file whose header is right. Raises LocalError where it cannot be read."""
        spec, (start, end) = self._schema[name], self._places[name]
        try:
            with path.open("rb") as file:
                file.seek(len(self._header) + start)
                found = list(self._read(file, name, end - start))
        except OSError as error:
            raise LocalError(f"cannot read the state in {path}: {error}") from error
        return torch.cat(found).view(spec.shape)

    def _read(self, file: BinaryIO, name: str, size_bytes: int) -> Iterator[Tensor]:
        """The tensor that begins here, in flat pieces."""
        dtype, _ = _DTYPES[self._schema[name].dtype]
        for start in range(0, size_bytes, PIECE_BYTES):
            data = file.read(min(PIECE_BYTES, size_bytes - start))
            if len(data) < min(PIECE_BYTES, size_bytes - start):
                raise OSError("the file ends too early")
            yield torch.frombuffer(bytearray(data), dtype=dtype)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's bytes in pieces: its own memory where it lies in one piece."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    yield from torch.split(flat, PIECE_BYTES)


def _fill(file: BinaryIO, tensor: Tensor) -> None:
    with torch.no_grad():
        in_place = tensor.is_contiguous() and tensor.device.type == "cpu"
        target = tensor.detach() if in_place else torch.empty(tensor.shape, dtype=tensor.dtype)
        for part in torch.split(target.view(-1).view(torch.uint8), PIECE_BYTES):
            if file.readinto(part.numpy().data) != len(part):  # type: ignore[attr-defined]
                raise OSError("the file ends too early")
        if not in_place:
            tensor.detach().copy_(target)

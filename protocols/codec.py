"""Bytes to messages and back: a four-byte big-endian length, a version byte, MessagePack.

The length is judged before the body is read, the body is decoded into a closed union of typed structs, and
whatever does not fit is a `PeerError`: nothing else is ever raised on bytes from outside.
"""

import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from protocols.errors import PeerError
from protocols.messages import FetchMessage, LinkMessage, Message
from protocols.vocabulary import MAX_FETCH_HEADER_BYTES, MAX_FRAME_BYTES, PROTOCOL_VERSION, Reason

_LENGTH = struct.Struct(">I")
_VERSION_BYTE = bytes([PROTOCOL_VERSION])
_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """One whole frame, ready to be written."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body) + 1) + _VERSION_BYTE + body


class FrameDecoder(Generic[M]):
    """Takes bytes as they come and gives whole messages. Holds at most one frame and one read.

    After it has raised, the stream has no known position any more: drop it.
    """

    def __init__(self, union: Any, max_frame_bytes: int) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(union)
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[M]:
        """The messages completed by `data`, in order.

        Raises:
            PeerError: OVERSIZED as soon as a length says so, VERSION or MALFORMED for a whole frame.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if not 2 <= length <= self._max_frame_bytes:
                reason = Reason.OVERSIZED if length > self._max_frame_bytes else Reason.MALFORMED
                raise PeerError(reason, f"frame of {length} bytes, allowed 2 to {self._max_frame_bytes}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield self._decode(frame)

    def take_rest(self) -> bytes:
        """What was fed beyond the last whole frame; a fetch stream goes on with raw chunks."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def finish(self) -> None:
        """The stream ended.

        Raises:
            PeerError: TRUNCATED where it ended inside a frame.
        """
        if self._buffer:
            raise PeerError(Reason.TRUNCATED, f"stream ended {len(self._buffer)} bytes into a frame")

    def _decode(self, frame: bytes) -> M:
        if frame[0] != PROTOCOL_VERSION:
            raise PeerError(Reason.VERSION, f"wire version {frame[0]}, ours is {PROTOCOL_VERSION}")
        try:
            return self._decoder.decode(memoryview(frame)[1:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PeerError(Reason.MALFORMED, str(error)) from error


def link_decoder() -> FrameDecoder[LinkMessage]:
    """For the long-lived link streams."""
    return FrameDecoder(LinkMessage, MAX_FRAME_BYTES)


def fetch_decoder() -> FrameDecoder[FetchMessage]:
    """For fetch streams, whose header may be larger than a control frame."""
    return FrameDecoder(FetchMessage, MAX_FETCH_HEADER_BYTES)

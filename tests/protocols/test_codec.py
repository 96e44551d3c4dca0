"""Bytes and messages: what is legal survives the trip, everything else is a `PeerError` and costs little."""

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.admission import MAX_EXPIRES_AT, Admission, Invitation
from protocols.codec import FrameDecoder, encode, fetch_decoder, link_decoder
from protocols.errors import PeerError
from protocols.messages import (
    AggregatedModel,
    Bye,
    Census,
    Closed,
    Decline,
    FetchHeader,
    FetchMessage,
    FetchRefused,
    FetchRequest,
    Heartbeat,
    Hello,
    Holding,
    LinkMessage,
    Marks,
    Message,
    Offer,
    Peers,
    Ping,
    Pong,
    Probe,
    Probed,
    Pull,
    Ranges,
    Receipt,
    Refuse,
    RoundRange,
    Scalars,
    Shuffle,
    Suspects,
    Suspicion,
    Terms,
    TrainedModel,
)
from protocols.vocabulary import (
    CENSUS_BYTES,
    MAX_ADDRESSES,
    MAX_CHUNKS,
    MAX_FETCH_HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_IDS_PER_MESSAGE,
    MAX_INCARNATION,
    MAX_MODEL_BYTES,
    MAX_PEERS_PER_MESSAGE,
    MAX_ROUND,
    MAX_SAMPLE,
    MAX_SAMPLES,
    PROTOCOL_VERSION,
    Checkpoint,
    ModelRef,
    PeerRecord,
    Reason,
    ScalarRecord,
)

law = settings(derandomize=True, deadline=None, max_examples=100)
D1, D2 = bytes(range(32)), b"\xff" * 32

AUTHOR, STATE, SIGNATURE = bytes(range(32, 64)), bytes(range(16)), bytes(range(64, 128))
CHECKPOINT = Checkpoint(20, D1, 60, ModelRef(D2, 70_000, 20, 1))
CHECKPOINT_ITEMS = [20, D1, 60, [D2, 70_000, 20, 1]]
SCALARS: list[tuple[Message, list[object], str]] = [
    (
        Terms("philox", D1, 0.5, "constant", 0, "mean", 0.25, 0.99, 0, 20, 2, 1024, 32, bytes(32)),
        ["terms", "philox", D1, 0.5, "constant", 0, "mean", 0.25, 0.99, 0, 20, 2, 1024, 32, bytes(32)],
        (
            "00000084029fa57465726d73a67068696c6f78c420000102030405060708090a0b0c0d0e0f101112131415161718191a"
            "1b1c1d1e1fcb3fe0000000000000a8636f6e7374616e7400a46d65616ecb3fd0000000000000cb3fefae147ae147ae00"
            "1402cd040020c4200000000000000000000000000000000000000000000000000000000000000000"
        ),
    ),
    (
        Scalars(6, (ScalarRecord(AUTHOR, 7, b"\x40\xc0\x00", STATE, SIGNATURE),)),
        ["scalars", 6, [[AUTHOR, 7, b"\x40\xc0\x00", STATE, SIGNATURE]]],
        (
            "000000890293a77363616c617273069195c420202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c"
            "3d3e3f07c40340c000c410000102030405060708090a0b0c0d0e0fc440404142434445464748494a4b4c4d4e4f505152"
            "535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f"
        ),
    ),
    (
        Marks(27, 0, CHECKPOINT, None),
        ["marks", 27, 0, CHECKPOINT_ITEMS, None],
        (
            "0000005a0295a56d61726b731b009414c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d"
            "1e1f3c94c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffce000111701401c0"
        ),
    ),
    (
        Ranges((RoundRange(21, 26, 18, D1),)),
        ["ranges", [[21, 26, 18, D1]]],
        (
            "000000300292a672616e6765739194151a12c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b"
            "1c1d1e1f"
        ),
    ),
    (
        Holding(21, 21, STATE),
        ["holding", 21, 21, STATE],
        "0000001e0294a7686f6c64696e671515c410000102030405060708090a0b0c0d0e0f",
    ),
    (
        Pull(21, 26, STATE),
        ["pull", 21, 26, STATE],
        "0000001b0294a470756c6c151ac410000102030405060708090a0b0c0d0e0f",
    ),
]
RECORD = PeerRecord("A", ("/ip4/127.0.0.1/tcp/4001/p2p/A",), 300, False, 7, SIGNATURE)
RECORD_ITEMS = ["A", ["/ip4/127.0.0.1/tcp/4001/p2p/A"], 300, False, 7, SIGNATURE]
LEAVE = PeerRecord("C", (), 2**48, True, 0, SIGNATURE)
LEAVE_ITEMS = ["C", [], 2**48, True, 0, SIGNATURE]
ADMISSION = Admission(Invitation("net", D1, D2, 2_000_000_000, SIGNATURE), SIGNATURE)
ADMISSION_ITEMS = [["net", D1, D2, 2_000_000_000, SIGNATURE], SIGNATURE]
MEMBERSHIP: list[tuple[Message, list[object], str]] = [
    (
        Hello(1, "net", "none", "digits", D1, LEAVE, True, ADMISSION),
        ["hello", 1, "net", "none", "digits", D1, LEAVE_ITEMS, True, ADMISSION_ITEMS],
        (
            "000001600299a568656c6c6f01a36e6574a46e6f6e65a6646967697473c420000102030405060708090a0b0c0d0e0f10"
            "1112131415161718191a1b1c1d1e1f96a14390cf0001000000000000c300c440404142434445464748494a4b4c4d4e4f"
            "505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f"
            "c39295a36e6574c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fc420ffffffffff"
            "ffffffffffffffffffffffffffffffffffffffffffffffffffffffce77359400c440404142434445464748494a4b4c4d"
            "4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d"
            "7e7fc440404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b"
            "6c6d6e6f707172737475767778797a7b7c7d7e7f"
        ),
    ),
    (
        Shuffle((RECORD,)),
        ["shuffle", [RECORD_ITEMS]],
        (
            "000000740292a773687566666c659196a14191bd2f6970342f3132372e302e302e312f7463702f343030312f7032702f"
            "41cd012cc207c440404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f6061626364656667"
            "68696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f"
        ),
    ),
    (
        Peers((RECORD, LEAVE)),
        ["peers", [RECORD_ITEMS, LEAVE_ITEMS]],
        (
            "000000c30292a570656572739296a14191bd2f6970342f3132372e302e302e312f7463702f343030312f7032702f41cd"
            "012cc207c440404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f60616263646566676869"
            "6a6b6c6d6e6f707172737475767778797a7b7c7d7e7f96a14390cf0001000000000000c300c440404142434445464748"
            "494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778"
            "797a7b7c7d7e7f"
        ),
    ),
    (Ping(300), ["ping", 300], "0000000a0292a470696e67cd012c"),
    (Pong(300, 7), ["pong", 300, 7], "0000000b0293a4706f6e67cd012c07"),
    (Probe(301, "B"), ["probe", 301, "B"], "0000000d0293a570726f6265cd012da142"),
    (Probed(301, True), ["probed", 301, True], "0000000d0293a670726f626564cd012dc3"),
    (
        Suspects((Suspicion("B", 300),)),
        ["suspects", [["B", 300]]],
        "000000120292a873757370656374739192a142cd012c",
    ),
]
SAMPLED: list[tuple[Message, list[object], str]] = [
    (
        Census(bytes(range(256)), True),
        ["census", bytes(range(256)), True],
        (
            "0000010d0293a663656e737573c50100000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
            "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f"
            "505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f"
            "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeaf"
            "b0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedf"
            "e0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeffc3"
        ),
    ),
    (
        TrainedModel(ModelRef(D2, 70_000, 7, 1_000), D1, D2, ("A", "B")),
        ["trained", [D2, 70_000, 7, 1_000], D1, D2, ["A", "B"]],
        (
            "0000007f0295a7747261696e656494c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
            "ffce0001117007cd03e8c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fc420ffff"
            "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff92a141a142"
        ),
    ),
    (
        AggregatedModel(ModelRef(D2, 70_000, 7, 1_000), D1, ("A",)),
        ["aggregated", [D2, 70_000, 7, 1_000], D1, ["A"]],
        (
            "0000005e0294aa6167677265676174656494c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
            "ffffffffce0001117007cd03e8c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f91"
            "a141"
        ),
    ),
    (
        Receipt(300, D1),
        ["receipt", 300, D1],
        (
            "0000002f0293a772656365697074cd012cc420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c"
            "1d1e1f"
        ),
    ),
    (
        Closed(300),
        ["closed", 300],
        "0000000c0292a6636c6f736564cd012c",
    ),
]
# One of each message: the struct, the array on the wire, the whole frame.
GOLDEN: list[tuple[Message, list[object], str]] = [
    (
        Hello(1, "net", "gossip", "digits", D1, RECORD, False, None),
        ["hello", 1, "net", "gossip", "digits", D1, RECORD_ITEMS, False, None],
        (
            "000000a80299a568656c6c6f01a36e6574a6676f73736970a6646967697473c420000102030405060708090a0b0c0d0e"
            "0f101112131415161718191a1b1c1d1e1f96a14191bd2f6970342f3132372e302e302e312f7463702f343030312f7032"
            "702f41cd012cc207c440404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465"
            "666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7fc2c0"
        ),
    ),
    (
        Refuse(Reason.FULL, "no room"),
        ["refuse", "full", "no room"],
        "000000160293a6726566757365a466756c6ca76e6f20726f6f6d",
    ),
    (Heartbeat(300, True), ["beat", 300, True], "0000000b0293a462656174cd012cc3"),
    *MEMBERSHIP,
    (
        Offer(ModelRef(D2, 70_000, 7, 1_000)),
        ["offer", [D2, 70_000, 7, 1_000]],
        (
            "000000340292a56f6666657294c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffce"
            "0001117007cd03e8"
        ),
    ),
    (
        Decline(D1, Reason.TOO_LARGE),
        ["decline", D1, "too_large"],
        (
            "000000360293a76465636c696e65c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
            "a9746f6f5f6c61726765"
        ),
    ),
    (Bye(), ["bye"], "000000060291a3627965"),
    *SCALARS,
    *SAMPLED,
    (
        FetchRequest(D2, 3, 2),
        ["fetch", D2, 3, 2],
        "0000002c0294a56665746368c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff0302",
    ),
    (
        FetchHeader(1_048_577, (D1, D2)),
        ["header", 1_048_577, [D1, D2]],
        (
            "000000530293a6686561646572ce0010000192c420000102030405060708090a0b0c0d0e0f101112131415161718191a"
            "1b1c1d1e1fc420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
        ),
    ),
    (FetchRefused(Reason.GONE), ["refused", "gone"], "0000000f0292a772656675736564a4676f6e65"),
]


def decoder_for(message: Message) -> FrameDecoder:
    return link_decoder() if isinstance(message, LinkMessage) else fetch_decoder()


def frame(body: bytes, version: int = PROTOCOL_VERSION) -> bytes:
    return (len(body) + 1).to_bytes(4, "big") + bytes([version]) + body


def array(*items: object) -> bytes:
    return frame(msgpack.packb(list(items)))


def said(
    peer: object,
    addresses: object,
    *,
    incarnation: object = 0,
    left: object = False,
    round_: object = 0,
    signature: bytes = bytes(64),
) -> list[object]:
    """A peer record as it is on the wire."""
    return [peer, addresses, incarnation, left, round_, signature]


def refusal(data: bytes, decoder: FrameDecoder | None = None) -> Reason:
    """Why these bytes were refused, fed at once and then ended."""
    decoder = decoder or link_decoder()
    with pytest.raises(PeerError) as caught:  # noqa: PT012 - either may refuse
        list(decoder.feed(data))
        decoder.finish()
    assert len(caught.value.detail) <= 240
    return caught.value.reason


# --- strategies -----------------------------------------------------------------------------------------
printable = st.characters(min_codepoint=33, max_codepoint=126)
peer_ids = st.text(printable, min_size=1, max_size=128)
addresses = st.lists(st.text(printable, min_size=1, max_size=256), max_size=MAX_ADDRESSES).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=64)
details = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=240)
digests = st.binary(min_size=32, max_size=32)
rounds = st.integers(0, MAX_ROUND)
reasons = st.sampled_from(Reason)
refs = st.builds(ModelRef, digests, st.integers(1, MAX_MODEL_BYTES), rounds, st.integers(1, MAX_SAMPLES))
tokens = st.integers(0, 2**48)
incarnations = st.integers(0, MAX_INCARNATION)
signatures = st.binary(min_size=64, max_size=64)
records = st.builds(PeerRecord, peer_ids, addresses, incarnations, st.booleans(), rounds, signatures)
several_records = st.lists(records, max_size=MAX_PEERS_PER_MESSAGE).map(tuple)
suspicions = st.builds(Suspicion, peer_ids, incarnations)
samples = st.lists(peer_ids, max_size=5).map(tuple)
admissions = st.builds(
    Admission,
    st.builds(Invitation, names, digests, digests, st.integers(0, MAX_EXPIRES_AT), signatures),
    signatures,
)
numbers = st.floats(allow_nan=False)
scalar_records = st.builds(
    ScalarRecord,
    digests,
    st.integers(1, MAX_ROUND),
    st.binary(max_size=255),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=64, max_size=64),
)
checkpoints = st.builds(Checkpoint, rounds, digests, st.integers(0, MAX_SAMPLES), refs)
link_messages = st.one_of(
    st.builds(
        Hello,
        *(st.integers(0, 2**16), names, names, names, digests, records, st.booleans()),
        st.none() | admissions,
    ),
    st.builds(Refuse, reasons, details),
    st.builds(Heartbeat, rounds, st.booleans()),
    st.builds(Shuffle, several_records),
    st.builds(Peers, several_records),
    st.builds(Ping, tokens),
    st.builds(Pong, tokens, rounds),
    st.builds(Probe, tokens, peer_ids),
    st.builds(Probed, tokens, st.booleans()),
    st.builds(Suspects, st.lists(suspicions, max_size=MAX_PEERS_PER_MESSAGE).map(tuple)),
    st.builds(Offer, refs),
    st.builds(Decline, digests, reasons),
    st.builds(Bye),
    st.builds(
        Terms,
        *(names, digests, numbers, names, rounds, names, numbers, numbers, st.integers(0, 2**20)),
        *(st.integers(1, 2**20), st.integers(0, 2**20), st.integers(1, MAX_IDS_PER_MESSAGE)),
        *(st.integers(1, 255), digests),
    ),
    st.builds(Scalars, rounds, st.lists(scalar_records, max_size=3).map(tuple)),
    st.builds(Marks, rounds, rounds, checkpoints, st.none() | checkpoints),
    st.builds(
        Ranges,
        st.lists(st.builds(RoundRange, rounds, rounds, st.integers(0, 2**48), digests), max_size=32).map(
            tuple
        ),
    ),
    st.builds(Census, st.binary(min_size=CENSUS_BYTES, max_size=CENSUS_BYTES), st.booleans()),
    st.builds(TrainedModel, refs, digests, digests, samples),
    st.builds(AggregatedModel, refs, digests, samples),
    st.builds(Receipt, rounds, digests),
    st.builds(Closed, rounds),
    st.builds(Holding, rounds, rounds, st.binary(max_size=64)),
    st.builds(Pull, rounds, rounds, st.binary(max_size=64)),
)
fetch_messages = st.one_of(
    st.builds(FetchRequest, digests, st.integers(0, MAX_CHUNKS), st.integers(1, MAX_CHUNKS)),
    st.builds(
        FetchHeader,
        st.integers(1, MAX_MODEL_BYTES),
        st.lists(digests, min_size=1, max_size=9).map(tuple),
    ),
    st.builds(FetchRefused, reasons),
)


# --- what is legal --------------------------------------------------------------------------------------
@law
@given(link_messages | fetch_messages)
def test_every_legal_message_survives_the_trip(message: Message) -> None:
    decoder = decoder_for(message)
    assert list(decoder.feed(encode(message))) == [message]
    decoder.finish()


@pytest.mark.parametrize(("message", "items", "golden"), GOLDEN, ids=lambda value: type(value).__name__)
def test_the_bytes_of_each_message_never_change(message: Message, items: list[object], golden: str) -> None:
    data = encode(message)
    assert data.hex() == golden
    assert list(decoder_for(message).feed(bytes.fromhex(golden))) == [message]
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert data[4] == PROTOCOL_VERSION
    assert msgpack.unpackb(data[5:]) == items, "another implementation reads the same array, tag first"
    assert msgpack.packb(items) == data[5:], "and would write the same bytes"


def test_golden_vectors_cover_every_message() -> None:
    assert {type(message) for message, _, _ in GOLDEN} == {
        *LinkMessage.__args__,
        *FetchMessage.__args__,
    }


def test_a_stream_cut_anywhere_gives_the_same_messages() -> None:
    messages = [message for message, _, _ in GOLDEN if isinstance(message, LinkMessage)]
    data = b"".join(map(encode, messages))
    for cut in range(len(data) + 1):
        decoder = link_decoder()
        assert [*decoder.feed(data[:cut]), *decoder.feed(data[cut:])] == messages
        decoder.finish()


def test_bytes_that_drip_in_one_by_one_give_the_same_messages() -> None:
    messages = [message for message, _, _ in GOLDEN if isinstance(message, FetchMessage)]
    decoder = fetch_decoder()
    data = b"".join(map(encode, messages))
    assert [message for byte in data for message in decoder.feed(bytes([byte]))] == messages
    decoder.finish()


def test_many_frames_in_one_read_come_out_in_order() -> None:
    beats = [Heartbeat(round_, True) for round_ in range(500)]
    assert list(link_decoder().feed(b"".join(map(encode, beats)))) == beats


def test_raw_bytes_after_a_frame_are_given_back() -> None:
    decoder = fetch_decoder()
    assert next(iter(decoder.feed(encode(FetchRefused(Reason.BUSY)) + b"chunk"))) == FetchRefused(Reason.BUSY)
    assert decoder.take_rest() == b"chunk"
    decoder.finish()


def test_the_largest_legal_frames_fit_their_limits() -> None:
    address, peer, name = "a" * 256, "p" * 128, "\U0001f986" * 64
    record = PeerRecord(peer, (address,) * MAX_ADDRESSES, MAX_INCARNATION, True, MAX_ROUND, bytes(64))
    records_ = (record,) * MAX_PEERS_PER_MESSAGE
    admission = Admission(Invitation(name, D1, D2, MAX_EXPIRES_AT, bytes(64)), bytes(64))
    largest_ref = ModelRef(D2, MAX_MODEL_BYTES, MAX_ROUND, MAX_SAMPLES)
    longest_reason = max(Reason, key=len)
    full: list[Message] = [
        Hello(2**16, name, name, name, D2, record, True, admission),
        Refuse(longest_reason, "\U0001f986" * 240),
        Heartbeat(MAX_ROUND, True),
        Peers(records_),
        Shuffle(records_),
        Suspects((Suspicion(peer, MAX_INCARNATION),) * MAX_PEERS_PER_MESSAGE),
        TrainedModel(largest_ref, D1, D2, (peer,) * MAX_SAMPLE),
        AggregatedModel(largest_ref, D1, (peer,) * MAX_SAMPLE),
        Offer(largest_ref),
        Decline(D2, longest_reason),
    ]
    for message in full:
        assert len(encode(message)) - 4 <= MAX_FRAME_BYTES
        assert list(link_decoder().feed(encode(message))) == [message]
    assert len(encode(Peers(records_))) < 40 * 1024, "as vocabulary.py says"
    header = FetchHeader(MAX_MODEL_BYTES, (D2,) * MAX_CHUNKS)
    assert len(encode(header)) - 4 <= MAX_FETCH_HEADER_BYTES
    assert list(fetch_decoder().feed(encode(header))) == [header]


# --- what is not ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("decoder", "limit"), [(link_decoder, MAX_FRAME_BYTES), (fetch_decoder, MAX_FETCH_HEADER_BYTES)]
)
def test_an_oversized_length_is_refused_before_its_body_comes(decoder, limit: int) -> None:
    assert refusal((limit + 1).to_bytes(4, "big"), decoder()) is Reason.OVERSIZED
    assert refusal(b"\xff\xff\xff\xff", decoder()) is Reason.OVERSIZED
    assert list(decoder().feed(limit.to_bytes(4, "big"))) == []


@pytest.mark.parametrize("length", [0, 1])
def test_a_frame_too_short_to_hold_a_message_is_malformed(length: int) -> None:
    assert refusal(length.to_bytes(4, "big")) is Reason.MALFORMED


def test_a_stream_that_ends_inside_a_frame_is_truncated() -> None:
    data = encode(Heartbeat(1, True))
    for cut in range(1, len(data)):
        assert refusal(data[:cut]) is Reason.TRUNCATED
    assert refusal(data + data[:1]) is Reason.TRUNCATED


def test_another_wire_version_is_said_to_be_one() -> None:
    for version in (0, 1, 3, 255):
        assert refusal(frame(msgpack.packb(["bye"]), version)) is Reason.VERSION


WRONG = {
    "an unknown tag": array("gradient", 1),
    "a tag of the other stream": array("fetch", D1, 0, 1),
    "a number for a tag": array(1),
    "no tag": array(),
    "a map": frame(msgpack.packb({"type": "bye"})),
    "nil": frame(b"\xc0"),
    "an extra field": array("bye", 1),
    "an extra field inside": array("offer", [D1, 1, 1, 1, 1]),
    "a missing field": array("beat", 1),
    "a missing field inside": array("offer", [D1, 1, 1]),
    "text for a number": array("beat", "1", True),
    "a float for a number": array("beat", 1.0, True),
    "a boolean for a number": array("beat", True, True),
    "a number for a boolean": array("beat", 1, 1),
    "bytes for text": array("refuse", "full", b"x"),
    "text for bytes": array("decline", "x" * 32, "busy"),
    "a negative round": array("beat", -1, True),
    "a round beyond the limit": array("beat", MAX_ROUND + 1, True),
    "a round of 2**60": array("beat", 2**60, True),
    "a round beyond 64 bits": frame(b"\x93\xa4beat\xcf" + b"\xff" * 8 + b"\xc3"),
    "a digest of 31 bytes": array("decline", bytes(31), "busy"),
    "a digest of 33 bytes": array("decline", bytes(33), "busy"),
    "an unknown reason": array("refuse", "mood", ""),
    "a detail of 241 characters": array("refuse", "full", "x" * 241),
    "an address of 300 characters": array("peers", [said("A", ["x" * 300])]),
    "an empty address": array("peers", [said("A", [""])]),
    "an address with an escape sequence": array("peers", [said("A", ["/ip4/\x1b[2J"])]),
    "an address beyond ASCII": array("peers", [said("A", ["/dns4/ü"])]),
    "an address with a line's end": array("peers", [said("A", ["/ip4\n"])]),
    "nine addresses": array("peers", [said("A", ["x"] * 9)]),
    "an empty peer id": array("peers", [said("", [])]),
    "a peer id of 129 characters": array("peers", [said("A" * 129, [])]),
    "17 peers": array("peers", [said("A", [])] * 17),
    "17 peers in a shuffle": array("shuffle", [said("A", [])] * 17),
    "17 suspicions": array("suspects", [["A", 0]] * 17),
    "a record with one field more": array("peers", [[*said("A", []), 0]]),
    "a signature of 63 bytes": array("peers", [said("A", [], signature=bytes(63))]),
    "a signature of 65 bytes": array("peers", [said("A", [], signature=bytes(65))]),
    "a negative incarnation": array("peers", [said("A", [], incarnation=-1)]),
    "an incarnation beyond the limit": array("peers", [said("A", [], incarnation=MAX_INCARNATION + 1)]),
    "an incarnation of true": array("peers", [said("A", [], incarnation=True)]),
    "a record of a round of 2**60": array("peers", [said("A", [], round_=2**60)]),
    "a leave of one": array("peers", [said("A", [], left=1)]),
    "a suspicion of an incarnation beyond the limit": array("suspects", [["A", MAX_INCARNATION + 1]]),
    "a suspicion of nobody": array("suspects", [["", 0]]),
    "a census of 255 bytes": array("census", bytes(255), False),
    "a sample of 257": array("aggregated", [D1, 1, 1, 1], D1, ["A"] * 257),
    "a closed round of 2**60": array("closed", 2**60),
    "a probe of nobody": array("probe", 1, ""),
    "a token beyond the limit": array("ping", 2**48 + 1),
    "a negative token": array("pong", -1, 0),
    "a hello without a record": array("hello", 1, "n", "gossip", "digits", D1, None, False, None),
    "a hello with an invitation of no word": array(
        "hello", 1, "n", "gossip", "digits", D1, said("A", []), False, []
    ),
    "an empty name": array("hello", 1, "", "gossip", "digits", D1, said("A", []), False, None),
    "a name of 65 characters": array(
        "hello", 1, "n" * 65, "gossip", "digits", D1, said("A", []), False, None
    ),
    "a negative version": array("hello", -1, "n", "gossip", "digits", D1, said("A", []), False, None),
    "a model of no bytes": array("offer", [D1, 0, 1, 1]),
    "a model beyond the limit": array("offer", [D1, MAX_MODEL_BYTES + 1, 1, 1]),
    "a model of no samples": array("offer", [D1, 1, 1, 0]),
    "a model of too many samples": array("offer", [D1, 1, 1, MAX_SAMPLES + 1]),
    "trailing bytes": frame(msgpack.packb(["bye"]) + b"\x00"),
    "two bodies in one frame": frame(msgpack.packb(["bye"]) * 2),
    "half a body": frame(msgpack.packb(["beat", 1, True])[:-1]),
    "text that is no UTF-8": frame(b"\x93\xa6refuse\xa4full\xa1\xff"),
    "a tag that is no UTF-8": frame(b"\x91\xa1\xff"),
    "a byte that MessagePack never uses": frame(b"\xc1"),
    "an array of 4 billion": frame(b"\xdd\xff\xff\xff\xff\xa5peers"),
    "records said to be 4 billion": frame(b"\x92\xa5peers\xdd\xff\xff\xff\xff"),
    "text said to be 4 GiB": frame(b"\x93\xa6refuse\xdb\xff\xff\xff\xffx"),
    "60000 arrays in each other": frame(b"\x91" * 60_000),
    "60000 arrays in a field": frame(b"\x93\xa4beat" + b"\x91" * 60_000 + b"\xc3"),
    "60000 maps in each other": frame(b"\x92\xa5peers" + b"\x81\xa0" * 30_000),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_malformed(data: bytes) -> None:
    assert refusal(data) is Reason.MALFORMED


WRONG_ON_A_FETCH_STREAM = {
    "a link message": encode(Bye()),
    "a first chunk below zero": array("fetch", D1, -1, 1),
    "a first chunk beyond the limit": array("fetch", D1, MAX_CHUNKS + 1, 1),
    "no chunks": array("fetch", D1, 0, 0),
    "more chunks than there can be": array("fetch", D1, 0, MAX_CHUNKS + 1),
    "a header of no bytes": array("header", 0, [D1]),
    "a header without chunks": array("header", 1, []),
    "a chunk hash of 31 bytes": array("header", 1, [D1, bytes(31)]),
    "too many chunks": array("header", 1, [bytes(32)] * (MAX_CHUNKS + 1)),
}


@pytest.mark.parametrize("data", WRONG_ON_A_FETCH_STREAM.values(), ids=WRONG_ON_A_FETCH_STREAM)
def test_what_does_not_fit_a_fetch_stream_is_malformed(data: bytes) -> None:
    assert refusal(data, fetch_decoder()) is Reason.MALFORMED


def test_good_frames_before_a_bad_one_are_still_given() -> None:
    given_: list[Message] = []
    with pytest.raises(PeerError):
        given_.extend(link_decoder().feed(encode(Bye()) + array("beat", -1, True)))
    stream = link_decoder().feed(encode(Bye()) + array("beat", -1, True))
    assert next(stream) == Bye()


# --- hostile bytes --------------------------------------------------------------------------------------
def survives(decoder: FrameDecoder, pieces: list[bytes]) -> None:
    """Only `PeerError`, and the buffer stays under one frame and one read."""
    limit = MAX_FRAME_BYTES if decoder._max_frame_bytes == MAX_FRAME_BYTES else MAX_FETCH_HEADER_BYTES
    try:
        for piece in pieces:
            for message in decoder.feed(piece):
                assert list(decoder_for(message).feed(encode(message))) == [message]
            assert len(decoder._buffer) <= 4 + limit
        decoder.finish()
    except PeerError:
        assert len(decoder._buffer) <= 4 + limit + len(max(pieces, key=len))


@settings(law, max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=5))
def test_random_bytes_raise_only_peer_errors(pieces: list[bytes]) -> None:
    survives(link_decoder(), pieces)
    survives(fetch_decoder(), pieces)


@settings(law, max_examples=300)
@given(st.binary(min_size=1, max_size=200))
def test_random_bodies_raise_only_peer_errors(body: bytes) -> None:
    survives(link_decoder(), [frame(body)])
    survives(fetch_decoder(), [frame(body)])


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
tags = st.sampled_from([items[0] for _, items, _ in GOLDEN])


@settings(law, max_examples=300)
@given(tags, st.lists(anything, max_size=7))
def test_random_fields_under_a_known_tag_raise_only_peer_errors(tag: str, fields: list[object]) -> None:
    survives(link_decoder(), [array(tag, *fields)])
    survives(fetch_decoder(), [array(tag, *fields)])


@settings(law, max_examples=300)
@given(st.sampled_from(GOLDEN), st.data())
def test_damaged_frames_raise_only_peer_errors(golden: tuple, data: st.DataObject) -> None:
    damaged = bytearray(encode(golden[0]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["flip", "drop", "insert", "cut"])):
            case "flip":
                damaged[at] ^= data.draw(st.integers(1, 255))
            case "drop" if len(damaged) > 1:
                del damaged[at]
            case "insert":
                damaged.insert(at, data.draw(st.integers(0, 255)))
            case "cut":
                del damaged[at + 1 :]
    survives(decoder_for(golden[0]), [bytes(damaged)])


def test_the_buffer_never_holds_more_than_a_frame_and_a_read() -> None:
    decoder, read = link_decoder(), 1_000
    full = encode(Peers((PeerRecord("p" * 128, ("a" * 256,) * 8),) * 16))
    stream = full * 10
    largest = 0
    for start in range(0, len(stream), read):
        list(decoder.feed(stream[start : start + read]))
        largest = max(largest, len(decoder._buffer))
    assert largest <= len(full)


def test_our_own_bounds_are_checked_by_the_reader_not_the_writer() -> None:
    """The writer trusts its own core, so the core has to stay in bounds: the reader will not forgive."""
    assert refusal(encode(Heartbeat(MAX_ROUND + 1, True))) is Reason.MALFORMED
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(MAX_ROUND + 1, type=ModelRef.__annotations__["round"])


def test_what_a_record_leaves_out_reads_as_what_nobody_signs() -> None:
    """The one array with a tail that may be missing."""
    (message,) = link_decoder().feed(array("peers", [["A", []]]))
    assert message == Peers((PeerRecord("A", (), 0, False, 0, bytes(64)),))


@pytest.mark.parametrize("text", ["\x1b[2J", "line\nline", "\x00", "\x7f", "\x9b31m"])
def test_no_peer_writes_control_characters_to_a_terminal(text: str) -> None:
    assert refusal(encode(Refuse(Reason.FULL, text))) is Reason.MALFORMED
    assert (
        refusal(encode(Hello(1, text, "gossip", "digits", bytes(32), RECORD, False, None)))
        is Reason.MALFORMED
    )

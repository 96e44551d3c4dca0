"""Bytes and messages: what is legal survives the trip, everything else is a `PeerError` and costs little."""

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from protocols.admission import MAX_EXPIRES_AT, Admission, Invitation
from protocols.codec import FrameDecoder, encode, fetch_decoder, link_decoder
from protocols.entries import Batch, Begun, Click, Feed, FeedMark, Kind, Shared, Withdrawn
from protocols.errors import PeerError
from protocols.messages import (
    AggregatedModel,
    Ask,
    Bye,
    Census,
    Closed,
    Decline,
    Entries,
    FetchHeader,
    FetchMessage,
    FetchRefused,
    FetchRequest,
    Found,
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
    Seek,
    Shuffle,
    Suspects,
    Suspicion,
    Terms,
    TrainedModel,
)
from protocols.vocabulary import (
    CENSUS_BYTES,
    MAX_ADDRESSES,
    MAX_AUTHOR_BITS,
    MAX_BATCH_BYTES,
    MAX_BATCHES_PER_MESSAGE,
    MAX_CHUNKS,
    MAX_CONTENT_BYTES,
    MAX_DAY,
    MAX_DETAILS,
    MAX_ENTRIES_PER_ANSWER,
    MAX_ENTRIES_PER_BATCH,
    MAX_EPOCH,
    MAX_FETCH_HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_IDS_PER_MESSAGE,
    MAX_INCARNATION,
    MAX_MARKS_PER_MESSAGE,
    MAX_MODEL_BYTES,
    MAX_PEERS_PER_MESSAGE,
    MAX_ROUND,
    MAX_SAMPLE,
    MAX_SAMPLES,
    MAX_SEQ,
    MAX_TAGS,
    MAX_TERM_CHARS,
    MAX_TERMS,
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
            "00000084039fa57465726d73a67068696c6f78c420000102030405060708090a0b0c0d0e0f101112131415161718191a"
            "1b1c1d1e1fcb3fe0000000000000a8636f6e7374616e7400a46d65616ecb3fd0000000000000cb3fefae147ae147ae00"
            "1402cd040020c4200000000000000000000000000000000000000000000000000000000000000000"
        ),
    ),
    (
        Scalars(6, (ScalarRecord(AUTHOR, 7, b"\x40\xc0\x00", STATE, SIGNATURE),)),
        ["scalars", 6, [[AUTHOR, 7, b"\x40\xc0\x00", STATE, SIGNATURE]]],
        (
            "000000890393a77363616c617273069195c420202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c"
            "3d3e3f07c40340c000c410000102030405060708090a0b0c0d0e0fc440404142434445464748494a4b4c4d4e4f505152"
            "535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f"
        ),
    ),
    (
        Marks(27, 0, CHECKPOINT, None),
        ["marks", 27, 0, CHECKPOINT_ITEMS, None],
        (
            "0000005a0395a56d61726b731b009414c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d"
            "1e1f3c94c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffce000111701401c0"
        ),
    ),
    (
        Ranges((RoundRange(21, 26, 18, D1),)),
        ["ranges", [[21, 26, 18, D1]]],
        (
            "000000300392a672616e6765739194151a12c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b"
            "1c1d1e1f"
        ),
    ),
    (
        Holding(21, 21, STATE),
        ["holding", 21, 21, STATE],
        "0000001e0394a7686f6c64696e671515c410000102030405060708090a0b0c0d0e0f",
    ),
    (
        Pull(21, 26, STATE),
        ["pull", 21, 26, STATE],
        "0000001b0394a470756c6c151ac410000102030405060708090a0b0c0d0e0f",
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
            "000001600399a568656c6c6f01a36e6574a46e6f6e65a6646967697473c420000102030405060708090a0b0c0d0e0f10"
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
            "000000740392a773687566666c659196a14191bd2f6970342f3132372e302e302e312f7463702f343030312f7032702f"
            "41cd012cc207c440404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f6061626364656667"
            "68696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f"
        ),
    ),
    (
        Peers((RECORD, LEAVE)),
        ["peers", [RECORD_ITEMS, LEAVE_ITEMS]],
        (
            "000000c30392a570656572739296a14191bd2f6970342f3132372e302e302e312f7463702f343030312f7032702f41cd"
            "012cc207c440404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f60616263646566676869"
            "6a6b6c6d6e6f707172737475767778797a7b7c7d7e7f96a14390cf0001000000000000c300c440404142434445464748"
            "494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778"
            "797a7b7c7d7e7f"
        ),
    ),
    (Ping(300), ["ping", 300], "0000000a0392a470696e67cd012c"),
    (Pong(300, 7), ["pong", 300, 7], "0000000b0393a4706f6e67cd012c07"),
    (Probe(301, "B"), ["probe", 301, "B"], "0000000d0393a570726f6265cd012da142"),
    (Probed(301, True), ["probed", 301, True], "0000000d0393a670726f626564cd012dc3"),
    (
        Suspects((Suspicion("B", 300),)),
        ["suspects", [["B", 300]]],
        "000000120392a873757370656374739192a142cd012c",
    ),
]
SAMPLED: list[tuple[Message, list[object], str]] = [
    (
        Census(bytes(range(256)), True),
        ["census", bytes(range(256)), True],
        (
            "0000010d0393a663656e737573c50100000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
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
            "0000007f0395a7747261696e656494c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
            "ffce0001117007cd03e8c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fc420ffff"
            "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff92a141a142"
        ),
    ),
    (
        AggregatedModel(ModelRef(D2, 70_000, 7, 1_000), D1, ("A",)),
        ["aggregated", [D2, 70_000, 7, 1_000], D1, ["A"]],
        (
            "0000005e0394aa6167677265676174656494c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
            "ffffffffce0001117007cd03e8c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f91"
            "a141"
        ),
    ),
    (
        Receipt(300, D1),
        ["receipt", 300, D1],
        (
            "0000002f0393a772656365697074cd012cc420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c"
            "1d1e1f"
        ),
    ),
    (
        Closed(300),
        ["closed", 300],
        "0000000c0392a6636c6f736564cd012c",
    ),
]
SHARED = Shared(
    D1,
    20_000,
    Kind.MODEL,
    "東京, a model",
    "someone",
    ("house", "music"),
    "application/octet-stream",
    70_000,
    "",
    (("task", "digits"), ("accuracy", "0.97")),
)
SHARED_ITEMS = [
    *("shared", D1, 20_000, "model", "東京, a model", "someone", ["house", "music"]),
    *("application/octet-stream", 70_000, "", [["task", "digits"], ["accuracy", "0.97"]]),
]
CLICK = Click(D2, 20_001, ("house", "#0123456789abcdef"), 3)
CLICK_ITEMS = ["click", D2, 20_001, ["house", "#0123456789abcdef"], 3]
CATALOGUE = Batch(AUTHOR, 1_700_000_000, 300, STATE, (SHARED, Withdrawn(D2, 20_001)), SIGNATURE)
CATALOGUE_ITEMS = [AUTHOR, 1_700_000_000, 300, STATE, [SHARED_ITEMS, ["withdrawn", D2, 20_001]], SIGNATURE]
CLICKS = Batch(AUTHOR, 1_700_000_000, 1, bytes(16), (Begun(20_000), CLICK), SIGNATURE)
CLICKS_ITEMS = [AUTHOR, 1_700_000_000, 1, bytes(16), [["begun", 20_000], CLICK_ITEMS], SIGNATURE]
CONTENT: list[tuple[Message, list[object], str]] = [
    (
        Ask(7, Feed.CATALOGUE, 5, 21, (FeedMark(AUTHOR, 1_700_000_000, 300),), 2_000),
        ["ask", 7, "catalogue", 5, 21, [[AUTHOR, 1_700_000_000, 300]], 2_000],
        (
            "000000420397a361736b07a9636174616c6f67756505159193c420202122232425262728292a2b2c2d2e2f3031323334"
            "35363738393a3b3c3d3e3fce6553f100cd012ccd07d0"
        ),
    ),
    (
        Entries(7, Feed.CATALOGUE, (CATALOGUE,), False),
        ["entries", 7, "catalogue", [CATALOGUE_ITEMS], False],
        (
            "0000015b0395a7656e747269657307a9636174616c6f6775659196c420202122232425262728292a2b2c2d2e2f303132"
            "333435363738393a3b3c3d3e3fce6553f100cd012cc410000102030405060708090a0b0c0d0e0f929ba6736861726564"
            "c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fcd4e20a56d6f64656cafe69db1e4"
            "baac2c2061206d6f64656ca7736f6d656f6e6592a5686f757365a56d75736963b86170706c69636174696f6e2f6f6374"
            "65742d73747265616dce00011170a09292a47461736ba664696769747392a86163637572616379a4302e393793a97769"
            "7468647261776ec420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffcd4e21c4404041"
            "42434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f7071"
            "72737475767778797a7b7c7d7e7fc2"
        ),
    ),
    (
        Entries(7, Feed.CLICKS, (CLICKS,), True),
        ["entries", 7, "clicks", [CLICKS_ITEMS], True],
        (
            "000000e20395a7656e747269657307a6636c69636b739196c420202122232425262728292a2b2c2d2e2f303132333435"
            "363738393a3b3c3d3e3fce6553f10001c410000000000000000000000000000000009292a5626567756ecd4e2095a563"
            "6c69636bc420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffcd4e2192a5686f757365"
            "b1233031323334353637383961626364656603c440404142434445464748494a4b4c4d4e4f505152535455565758595a"
            "5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7fc3"
        ),
    ),
    (
        Seek(2**40, D1),
        ["seek", 2**40, D1],
        (
            "000000320393a47365656bcf0000010000000000c420000102030405060708090a0b0c0d0e0f10111213141516171819"
            "1a1b1c1d1e1f"
        ),
    ),
    (
        Found(2**40, True),
        ["found", 2**40, True],
        "000000120393a5666f756e64cf0000010000000000c3",
    ),
]
# One of each message: the struct, the array on the wire, the whole frame.
GOLDEN: list[tuple[Message, list[object], str]] = [
    (
        Hello(1, "net", "gossip", "digits", D1, RECORD, False, None),
        ["hello", 1, "net", "gossip", "digits", D1, RECORD_ITEMS, False, None],
        (
            "000000a80399a568656c6c6f01a36e6574a6676f73736970a6646967697473c420000102030405060708090a0b0c0d0e"
            "0f101112131415161718191a1b1c1d1e1f96a14191bd2f6970342f3132372e302e302e312f7463702f343030312f7032"
            "702f41cd012cc207c440404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465"
            "666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7fc2c0"
        ),
    ),
    (
        Refuse(Reason.FULL, "no room"),
        ["refuse", "full", "no room"],
        "000000160393a6726566757365a466756c6ca76e6f20726f6f6d",
    ),
    (Heartbeat(300, True), ["beat", 300, True], "0000000b0393a462656174cd012cc3"),
    *MEMBERSHIP,
    (
        Offer(ModelRef(D2, 70_000, 7, 1_000)),
        ["offer", [D2, 70_000, 7, 1_000]],
        (
            "000000340392a56f6666657294c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffce"
            "0001117007cd03e8"
        ),
    ),
    (
        Decline(D1, Reason.TOO_LARGE),
        ["decline", D1, "too_large"],
        (
            "000000360393a76465636c696e65c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
            "a9746f6f5f6c61726765"
        ),
    ),
    (Bye(), ["bye"], "000000060391a3627965"),
    *SCALARS,
    *SAMPLED,
    *CONTENT,
    (
        FetchRequest(D2, 3, 2),
        ["fetch", D2, 3, 2],
        "0000002c0394a56665746368c420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff0302",
    ),
    (
        FetchHeader(1_048_577, (D1, D2)),
        ["header", 1_048_577, [D1, D2]],
        (
            "000000530393a6686561646572ce0010000192c420000102030405060708090a0b0c0d0e0f101112131415161718191a"
            "1b1c1d1e1fc420ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
        ),
    ),
    (FetchRefused(Reason.GONE), ["refused", "gone"], "0000000f0392a772656675736564a4676f6e65"),
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


def shared(**fields: object) -> bytes:
    """A catalogue of one item, with these fields in place of good ones."""
    items = [fields.get(name, good) for name, good in zip(_SHARED_FIELDS, SHARED_ITEMS, strict=True)]
    return catalogue([items])


_SHARED_FIELDS = ("tag", *Shared.__struct_fields__)


def catalogue(entries: object, **fields: object) -> bytes:
    """Entries of one author, with these fields of the batch in place of good ones."""
    good = (AUTHOR, 1_700_000_000, 1, bytes(16), entries, SIGNATURE)
    batch = [fields.get(name, each) for name, each in zip(Batch.__struct_fields__, good, strict=True)]
    return array("entries", 7, "catalogue", [batch], True)


def clicked(*fields: object) -> bytes:
    return catalogue([["click", *fields]])


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
letters = st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"])
names = st.text(letters, min_size=1, max_size=64)
details = st.text(letters, max_size=240)
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
lines = st.text(letters, max_size=32)
some = lines.filter(None)
days = st.integers(0, MAX_DAY)
shared_entries = st.builds(
    Shared,
    *(digests, days, st.sampled_from(Kind), some, lines, st.lists(some, max_size=MAX_TAGS).map(tuple)),
    *(st.text(printable, max_size=100), st.integers(0, MAX_CONTENT_BYTES), st.text(printable, max_size=1024)),
    st.lists(st.tuples(some, lines), max_size=3).map(tuple),
)
other_entries = st.one_of(
    st.builds(Withdrawn, digests, days),
    st.builds(Begun, days),
    st.builds(
        Click, digests, days, st.lists(some, min_size=1, max_size=MAX_TERMS).map(tuple), st.integers(1, 2**16)
    ),
)
batches = st.builds(
    Batch,
    *(digests, st.integers(0, MAX_EPOCH), st.integers(1, MAX_SEQ), st.binary(min_size=16, max_size=16)),
    *(st.lists(shared_entries | other_entries, min_size=1, max_size=3).map(tuple), signatures),
)
marks = st.builds(FeedMark, digests, st.integers(0, MAX_EPOCH), st.integers(0, MAX_SEQ))
feeds = st.sampled_from(Feed)
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
    st.builds(
        Ask,
        *(tokens, feeds, st.integers(0, MAX_AUTHOR_BITS), st.integers(0, 2**MAX_AUTHOR_BITS)),
        st.lists(marks, max_size=3).map(tuple),
        st.integers(1, MAX_ENTRIES_PER_ANSWER),
    ),
    st.builds(Entries, tokens, feeds, st.lists(batches, max_size=2).map(tuple), st.booleans()),
    st.builds(Seek, tokens, digests),
    st.builds(Found, tokens, st.booleans()),
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
    one_click = replace(CLICKS, epoch=MAX_EPOCH, first=MAX_SEQ, entries=(replace(CLICK, day=MAX_DAY),))
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
        Ask(
            *(2**48, Feed.CATALOGUE, MAX_AUTHOR_BITS, 2**MAX_AUTHOR_BITS),
            (FeedMark(D2, MAX_EPOCH, MAX_SEQ),) * MAX_MARKS_PER_MESSAGE,
            MAX_ENTRIES_PER_ANSWER,
        ),
        Entries(2**48, Feed.CLICKS, (one_click,) * MAX_BATCHES_PER_MESSAGE, False),
        Seek(2**48, D2),
        Found(2**48, False),
    ]
    for message in full:
        assert len(encode(message)) - 4 <= MAX_FRAME_BYTES
        assert list(link_decoder().feed(encode(message))) == [message]
    assert len(encode(Peers(records_))) < 40 * 1024, "as vocabulary.py says"
    header = FetchHeader(MAX_MODEL_BYTES, (D2,) * MAX_CHUNKS)
    assert len(encode(header)) - 4 <= MAX_FETCH_HEADER_BYTES
    assert list(fetch_decoder().feed(encode(header))) == [header]


def test_a_full_batch_fits_a_frame_whatever_goes_around_it() -> None:
    """A batch can only be cut where its author signed: one that fits no frame would end the link of whoever passes it on."""
    entry = replace(SHARED, details=tuple(("k" * 32, "x" * 200) for _ in range(MAX_DETAILS)))
    full = replace(CATALOGUE, epoch=MAX_EPOCH, first=MAX_SEQ, entries=(entry,) * 12)
    assert MAX_BATCH_BYTES - 4_500 < len(msgspec.msgpack.encode(full)) <= MAX_BATCH_BYTES
    message = Entries(2**48, Feed.CATALOGUE, (full,), False)
    assert len(encode(message)) <= MAX_FRAME_BYTES
    assert list(link_decoder().feed(encode(message))) == [message]
    assert MAX_BATCH_BYTES + 100 < MAX_FRAME_BYTES


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
    for version in (0, 1, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, 255):
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
    "an unknown feed": array("ask", 1, "gossip", 0, 0, [], 1),
    "21 bits of a key": array("ask", 1, "clicks", MAX_AUTHOR_BITS + 1, 0, [], 1),
    "a negative prefix": array("ask", 1, "clicks", 0, -1, [], 1),
    "a prefix of 21 bits and more": array("ask", 1, "clicks", 20, 2**20 + 1, [], 1),
    "1025 marks": array("ask", 1, "clicks", 0, 0, [[AUTHOR, 0, 0]] * (MAX_MARKS_PER_MESSAGE + 1), 1),
    "an answer of no entries": array("ask", 1, "clicks", 0, 0, [], 0),
    "an answer of too many entries": array("ask", 1, "clicks", 0, 0, [], MAX_ENTRIES_PER_ANSWER + 1),
    "an ask without a limit": array("ask", 1, "clicks", 0, 0, []),
    "a mark of nobody": array("ask", 1, "clicks", 0, 0, [[b"", 0, 0]], 1),
    "a mark of more than there can be": array("ask", 1, "clicks", 0, 0, [[AUTHOR, 0, MAX_SEQ + 1]], 1),
    "a mark of an epoch beyond the limit": array("ask", 1, "clicks", 0, 0, [[AUTHOR, MAX_EPOCH + 1, 0]], 1),
    "a mark with one field more": array("ask", 1, "clicks", 0, 0, [[AUTHOR, 0, 0, 0]], 1),
    "129 batches": array("entries", 1, "clicks", [CLICKS_ITEMS] * (MAX_BATCHES_PER_MESSAGE + 1), True),
    "a batch of no entries": catalogue([]),
    "129 entries": catalogue([["begun", 0]] * (MAX_ENTRIES_PER_BATCH + 1)),
    "a batch from entry 0": catalogue([["begun", 0]], first=0),
    "a batch beyond the last entry": catalogue([["begun", 0]], first=MAX_SEQ + 1),
    "a running hash of 15 bytes": catalogue([["begun", 0]], prior=bytes(15)),
    "a running hash of 32 bytes": catalogue([["begun", 0]], prior=bytes(32)),
    "an author of 33 bytes": catalogue([["begun", 0]], author=bytes(33)),
    "a batch's signature of 63 bytes": catalogue([["begun", 0]], signature=bytes(63)),
    "a negative epoch": catalogue([["begun", 0]], epoch=-1),
    "an epoch of 1.0": catalogue([["begun", 0]], epoch=1.0),
    "an unknown entry": catalogue([["liked", D1, 0]]),
    "an entry of no kind": catalogue([[]]),
    "an entry that is a map": catalogue([{"type": "begun", "day": 0}]),
    "an entry with one field more": catalogue([["begun", 0, 0]]),
    "an entry with one field less": catalogue([["withdrawn", D1]]),
    "a message for an entry": catalogue([["beat", 1, True]]),
    "an item of 31 bytes": shared(item=bytes(31)),
    "an item of text": shared(item="x" * 32),
    "a day before 1970": shared(day=-1),
    "a day beyond the limit": shared(day=MAX_DAY + 1),
    "an unknown kind of item": shared(kind="virus"),
    "no title": shared(title=""),
    "a title of 201 characters": shared(title="x" * 201),
    "a title that is none": shared(title=None),
    "a title with an escape sequence": shared(title="\x1b[2J"),
    "a title with a null": shared(title="a\x00b"),
    "a title of two lines": shared(title="a\nb"),
    "a title with a line's end": shared(title="a\n"),
    "a title with another line's end": shared(title="a\u2028b"),
    "a title with a C1 control": shared(title="a\x9b31m"),
    "a title that is turned around": shared(title="cod.\u202efdp"),
    "a title that is turned around in part": shared(title="a\u2067b"),
    "a creator of 101 characters": shared(creator="x" * 101),
    "a creator with a line's end": shared(creator="a\n"),
    "17 tags": shared(tags=["x"] * (MAX_TAGS + 1)),
    "an empty tag": shared(tags=[""]),
    "a tag of 41 characters": shared(tags=["x" * 41]),
    "a tag with a carriage return": shared(tags=["a\rb"]),
    "a tag that is turned around": shared(tags=["\u202d"]),
    "tags of one text": shared(tags="house"),
    "a media type with a blank": shared(media_type="text html"),
    "a media type with a line's end": shared(media_type="text/html\n"),
    "a media type of 101 characters": shared(media_type="x" * 101),
    "an item of less than nothing": shared(size_bytes=-1),
    "an item beyond the limit": shared(size_bytes=MAX_CONTENT_BYTES + 1),
    "an item of 2**63 bytes": shared(size_bytes=2**63),
    "an item of a size in text": shared(size_bytes="1"),
    "a URI beyond ASCII": shared(uri="https://ex\xe4mple.org"),
    "a URI with an escape sequence": shared(uri="x\x1b[2J"),
    "a URI of 1025 characters": shared(uri="x" * 1025),
    "17 details": shared(details=[["k", "v"]] * (MAX_DETAILS + 1)),
    "details in a map": shared(details={"k": "v"}),
    "details in a map with a key twice": frame(
        msgpack.packb(["entries", 7, "catalogue", [CATALOGUE_ITEMS], True]).replace(
            msgpack.packb(SHARED_ITEMS[-1]), b"\x82\xa1k\xa1v\xa1k\xa1w"
        )
    ),
    "a detail of three": shared(details=[["k", "v", "w"]]),
    "a detail of one": shared(details=[["k"]]),
    "a detail whose name is a number": shared(details=[[1, "v"]]),
    "a detail whose text is a list": shared(details=[["k", ["v"]]]),
    "a detail of no name": shared(details=[["", "v"]]),
    "a detail's name of 33 characters": shared(details=[["k" * 33, "v"]]),
    "a detail of 241 characters of text": shared(details=[["k", "x" * 241]]),
    "a detail with an escape sequence": shared(details=[["k", "\x1b]0;x\x07"]]),
    "a click for no words": clicked(D1, 0, [], 1),
    "a click for nine words": clicked(D1, 0, ["x"] * (MAX_TERMS + 1), 1),
    "a click for an empty word": clicked(D1, 0, [""], 1),
    "a word of 65 characters": clicked(D1, 0, ["x" * (MAX_TERM_CHARS + 1)], 1),
    "a word with a line's end": clicked(D1, 0, ["a\n"], 1),
    "a word in bytes": clicked(D1, 0, [b"x"], 1),
    "a click on place 0": clicked(D1, 0, ["x"], 0),
    "a click on place 65537": clicked(D1, 0, ["x"], 2**16 + 1),
    "batches said to be 4 billion": frame(b"\x95\xa7entries\x07\xa6clicks\xdd\xff\xff\xff\xff"),
    "60000 arrays in an entry": frame(b"\x95\xa7entries\x07\xa6clicks\x91" + b"\x91" * 60_000),
    "60000 maps in a batch": frame(b"\x95\xa7entries\x07\xa6clicks\x91" + b"\x81\xa0" * 30_000),
    "text of 60 kB in an entry": catalogue([["x" * 60_000]]),
    "a held of one": array("found", 1, 1),
    "a sought digest of 33 bytes": array("seek", 1, bytes(33)),
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


@pytest.mark.parametrize("data", [shared(), catalogue([["begun", 0]]), clicked(D1, 0, ["x"], 1)])
def test_what_the_wrong_entries_are_made_of_is_right(data: bytes) -> None:
    assert len(list(link_decoder().feed(data))) == 1


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


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "line\nline", "line\n", "\x00", "\x7f", "\x9b31m", "\u2028", "\u202efdp"]
)
def test_no_peer_writes_control_characters_to_a_terminal(text: str) -> None:
    assert refusal(encode(Refuse(Reason.FULL, text))) is Reason.MALFORMED
    assert (
        refusal(encode(Hello(1, text, "gossip", "digits", bytes(32), RECORD, False, None)))
        is Reason.MALFORMED
    )

"""The wire specification says what the code does: its tables, field lists and vectors."""

import hashlib
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

import protocols
from protocols import vocabulary
from protocols.blob import hash_blob
from protocols.codec import encode
from protocols.entries import FEEDS_OF, Batch, Begun, Click, Entry, Feed, FeedMark, Shared, Withdrawn
from protocols.feeds import START, FeedLimits, FeedSet, chains, head_bytes
from protocols.messages import Bye, FetchMessage, LinkMessage
from protocols.signing import record_bytes, sign_record
from protocols.terms import hashed, item_of_uri, tokens
from protocols.view import mismatch
from protocols.vocabulary import CHAIN_BYTES, HOSTILE, ModelRef, PeerRecord, Reason
from tests.protocols.identities import hello_of

README = (Path(protocols.__file__).parent / "README.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of every table row between this heading and the next of its rank, without code marks."""
    rank = heading.split()[0]
    assert f"\n{heading}\n" in README
    section = README.split(f"\n{heading}\n", 1)[1]
    section = re.split(rf"\n{rank} ", section, maxsplit=1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def test_the_limits_are_those_of_the_vocabulary() -> None:
    told = {name: int(value) for name, value, _ in rows("## Limits")[1:]}
    assert told == {name: value for name, value in vars(vocabulary).items() if type(value) is int}


def test_every_reason_is_listed_in_order_with_its_hostility() -> None:
    told = [(reason, hostile == "yes") for reason, _, hostile in rows("## Reasons")[1:]]
    assert told == [(reason.value, reason in HOSTILE) for reason in Reason]


@pytest.mark.parametrize(
    ("heading", "union"), [("## Messages on a link", LinkMessage), ("## Fetching", FetchMessage)]
)
def test_every_message_is_listed_with_its_fields_in_order(heading: str, union: object) -> None:
    told = {
        tag: (name, [field for field in fields.split(", ") if field])
        for tag, name, fields in rows(heading)[1:]
    }
    actual = {
        struct.__struct_config__.tag: (struct.__name__, list(struct.__struct_fields__))
        for struct in union.__args__
    }
    assert told == actual


def test_every_message_has_its_checks_written_out() -> None:
    for struct in (*LinkMessage.__args__, *FetchMessage.__args__):
        assert f"**`{struct.__struct_config__.tag}`**" in README


INNER: dict[str, type[msgspec.Struct]] = {
    "ref": ModelRef,
    "record": PeerRecord,
    "batch": Batch,
    "mark": FeedMark,
    "shared": Shared,
    "withdrawn": Withdrawn,
    "click": Click,
    "begun": Begun,
}


@pytest.mark.parametrize("name", INNER)
def test_inner_arrays_are_listed_with_their_fields_in_order(name: str) -> None:
    struct = INNER[name]
    (text,) = [bounds for type_, _, bounds in rows("## Types")[1:] if type_ == name]
    tag = struct.__struct_config__.tag
    fields = [f'"{tag}"'] * (tag is not None) + list(struct.__struct_fields__)
    assert text.startswith("[" + ", ".join(fields) + "]")


def test_every_entry_is_listed_with_its_feeds() -> None:
    assert set(get_args(Entry)) == set(FEEDS_OF) <= set(INNER.values())
    (text,) = [bounds for type_, _, bounds in rows("## Types")[1:] if type_ == "entry"]
    for feed in Feed:
        tags = [str(kind.__struct_config__.tag) for kind, feeds in FEEDS_OF.items() if feed in feeds]
        assert f"in {feed.value} one of {' '.join(tags)}" in text


def test_mismatches_are_told_in_the_listed_order() -> None:
    ours = hello_of("A", network="n", learning="l", task="t")
    fields = {"version": 9, "network": "x", "learning": "x", "task": "x", "schema": b"x" * 32}
    told = rows("## Handshake")[1:]
    assert [compared for compared, _, _ in told] == list(fields)
    for compared, reason, _ in told:
        theirs = msgspec.structs.replace(ours, **fields)
        assert mismatch(ours, theirs)[0].value == reason
        del fields[compared]


def test_the_example_frame_is_a_goodbye() -> None:
    (told,) = re.findall(r"a `Bye` is `([0-9a-f ]+)`", README)
    assert encode(Bye()).hex() == told.replace(" ", "")


def test_the_record_vector_is_right() -> None:
    (text,) = re.findall(r"record: (\[.+\])", README)
    (signed,) = re.findall(r"signed: ([0-9a-f\s]+)signature", README)
    (signature,) = re.findall(r"signature: ([0-9a-f]{128})", README)
    record = msgspec.json.decode(text, type=PeerRecord)
    assert record_bytes("net", record).hex() == "".join(signed.split())
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    signatures = pytest.importorskip("node.signatures")
    mine = signatures.Ed25519Signatures(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    assert mine.author_of(record.peer) == mine.author
    assert sign_record("net", record, mine).signature.hex() == signature


def vector(name: str) -> bytes:
    """A line of the vector of feeds, in hexadecimal, which may go on over several."""
    (text,) = re.findall(rf"^{name}: ([0-9a-f]+(?:\n +[0-9a-f]+)*)$", README, re.MULTILINE)
    return bytes.fromhex("".join(text.split()))


def test_the_vector_of_feeds_is_right() -> None:
    entries = [msgspec.msgpack.decode(vector(f"entry {number}"), type=Entry) for number in (1, 2)]
    assert entries[1].item == item_of_uri(entries[1].uri)
    running = bytes(CHAIN_BYTES)
    for number in (1, 2):  # as the page says it, without our code
        running = hashlib.sha256(running + vector(f"entry {number}")).digest()[:CHAIN_BYTES]
        assert running == vector(f"hash {number}")
    assert chains(START, entries)[-1] == running
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    signatures = pytest.importorskip("node.signatures")
    mine = signatures.Ed25519Signatures(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    assert head_bytes("net", Feed.CATALOGUE, mine.author, 1_700_000_000, 2, running) == vector("head")
    assert mine.sign(vector("head")) == vector("proof")
    batch = Batch(mine.author, 1_700_000_000, 1, START, tuple(entries), vector("proof"))
    feeds = FeedSet("net", Feed.CATALOGUE, mine, FeedLimits(10, 100, 10, 180))
    assert feeds.take(batch, 20_001 * 86_400.0).batch == batch


def test_the_vector_of_a_folder_is_right() -> None:
    folders = pytest.importorskip("node.folders")
    folder = folders.Folder.from_bytes(vector("folder"))
    assert [file.parts for file in folder.files] == [("a.txt",), ("b", "c.txt")]
    assert {(file.size_bytes, bytes(file.digest)) for file in folder.files} == {(5, hash_blob(b"covey")[0])}
    section = README.split("**A folder's blob**")[1]
    assert f"1 to {folders.MAX_FILES:,} arrays" in section
    assert f"1 to {folders.MAX_DEPTH} names" in section
    assert f"{folders.MAX_LIST_BYTES // 1024**2} MiB" in section
    assert f"longer than {folders.MAX_NAME_BYTES} bytes" in section
    assert folders.MAX_FOLDER_BYTES == 2**40


def test_the_vectors_of_words_are_right() -> None:
    ((text, words),) = re.findall(r"^words: (.+) -> (.+)$", README, re.MULTILINE)
    assert tokens(text) == words.split()
    ((network, word, short),) = re.findall(r"^hashed in (\w+): (\w+) -> (#\w+)$", README, re.MULTILINE)
    whole = hashlib.sha256(b"covey term 1\0" + network.encode() + b"\0" + word.encode()).hexdigest()
    assert hashed(word, network) == "#" + whole[:16] == short


def test_the_blob_vector_is_right() -> None:
    (told,) = re.findall(r"blob digest: ([0-9a-f]{64})", README)
    assert hash_blob(b"covey")[0].hex() == told


def test_the_schema_vector_is_right() -> None:
    (text,) = re.findall(r"schema text: (.+)", README)
    (told,) = re.findall(r"schema hash: ([0-9a-f]{64})", README)
    assert hashlib.sha256(text.encode()).hexdigest() == told


def test_the_schema_vector_is_what_a_node_sends() -> None:
    weights = pytest.importorskip("node.weights")
    (told,) = re.findall(r"schema hash: ([0-9a-f]{64})", README)
    schema = {"fc.weight": weights.TensorSpec((10, 64), "F32"), "fc.bias": weights.TensorSpec((10,), "F32")}
    assert weights.schema_hash("digits", schema).hex() == told
    spelled = " ".join(spelling for spelling, _ in weights.DTYPES.values())
    assert f"`{spelled}`" in README.replace("\n  ", " ")

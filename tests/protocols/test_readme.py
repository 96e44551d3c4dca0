"""The wire specification says what the code does: its tables, field lists and vectors."""

import hashlib
import re
from pathlib import Path

import msgspec
import pytest

import protocols
from protocols import vocabulary
from protocols.blob import hash_blob
from protocols.codec import encode
from protocols.messages import Bye, FetchMessage, LinkMessage
from protocols.signing import record_bytes, sign_record
from protocols.view import mismatch
from protocols.vocabulary import HOSTILE, ModelRef, PeerRecord, Reason
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


@pytest.mark.parametrize("struct", [ModelRef, PeerRecord])
def test_inner_arrays_are_listed_with_their_fields_in_order(struct: type[msgspec.Struct]) -> None:
    arrays = {"ref": ModelRef, "record": PeerRecord}
    name = next(name for name, type_ in arrays.items() if type_ is struct)
    (text,) = [bounds for type_, _, bounds in rows("## Types")[1:] if type_ == name]
    expected = {
        "ref": "[" + ", ".join(ModelRef.__struct_fields__) + "]",
        "record": "[" + ", ".join(PeerRecord.__struct_fields__) + "]",
    }
    assert text.startswith(expected[name])


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

"""Signatures as Ed25519 has them, and the two names of an author."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from node.identity import peer_id_of
from node.signatures import Ed25519Signatures, author_of, peer_of_author

# RFC 8032, section 7.1, test 2.
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def signatures(secret: bytes = SECRET) -> Ed25519Signatures:
    return Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(secret))


def test_it_signs_as_the_standard_says() -> None:
    mine = signatures()
    assert mine.author == PUBLIC
    assert mine.sign(b"\x72") == SIGNATURE
    assert signatures(bytes(32)).verify(PUBLIC, b"\x72", SIGNATURE), "anybody's can be checked"


@pytest.mark.parametrize(
    ("author", "data", "signature"),
    [
        (PUBLIC, b"\x73", SIGNATURE),
        (PUBLIC, b"\x72", bytes(64)),
        (PUBLIC, b"\x72", b"\xff" * 64),
        (PUBLIC, b"\x72", SIGNATURE[:63]),
        (PUBLIC, b"\x72", b""),
        (signatures(bytes(32)).author, b"\x72", SIGNATURE),
        (b"\xff" * 32, b"\x72", SIGNATURE),
        (PUBLIC[:31], b"\x72", SIGNATURE),
        (b"", b"", b""),
    ],
)
def test_whatever_is_not_right_is_refused_without_an_exception(
    author: bytes, data: bytes, signature: bytes
) -> None:
    assert not signatures().verify(author, data, signature)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.binary(min_size=32, max_size=32))
def test_an_authors_peer_id_is_the_one_of_its_node(secret: bytes) -> None:
    author, peer = signatures(secret).author, peer_id_of(Ed25519PrivateKey.from_private_bytes(secret))
    assert (
        peer_of_author(author) == peer == ID.from_pubkey(create_new_key_pair(secret).public_key).to_string()
    )
    assert author_of(peer) == author


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "12D3KooWAbc",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # a hash of an RSA key
        f" {peer_of_author(PUBLIC)}",
        f"{peer_of_author(PUBLIC)}\n",
        f"1{peer_of_author(PUBLIC)}",
        peer_of_author(PUBLIC)[:-1],
        "0OIl",
        "ü",
    ],
)
def test_what_is_no_ed25519_peer_id_has_no_author(peer: str) -> None:
    with pytest.raises(ValueError, match="peer id"):
        author_of(peer)

"""The key file: made once, for its owner's eyes, and the peer id that follows from it."""

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from node.identity import create_key, key_seed, load_key, peer_id_of
from protocols.errors import LocalError
from protocols.vocabulary import PeerId

RAW = (serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())


def write_pem(path: Path, key: PrivateKeyTypes, password: bytes | None = None) -> Path:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    path.chmod(0o600)
    return path


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_the_one_libp2p_gives_the_same_key(seed: bytes) -> None:
    ours = peer_id_of(Ed25519PrivateKey.from_private_bytes(seed))
    assert ours == ID.from_pubkey(create_new_key_pair(seed).public_key).to_string()


def test_a_key_is_read_back_as_it_was_made(tmp_path: Path) -> None:
    made = create_key(tmp_path / "identity.pem")
    assert load_key(tmp_path / "identity.pem").private_bytes(*RAW) == made.private_bytes(*RAW)
    assert create_key(tmp_path / "other.pem").private_bytes(*RAW) != made.private_bytes(*RAW)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_may_read_a_key(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        create_key(tmp_path / "identity.pem")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "identity.pem").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o601])
def test_a_key_that_others_can_touch_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    create_key(path)
    path.chmod(mode)
    with pytest.raises(LocalError, match=f"can be read by others; run: chmod 600 {path}"):
        load_key(path)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    create_key(path)
    before = path.read_bytes()
    with pytest.raises(LocalError, match="exists already"):
        create_key(path)
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="cannot be written: No such file"):
        create_key(tmp_path / "nowhere" / "identity.pem")


def test_a_missing_key_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"no key at .*covey init"):
        load_key(tmp_path / "identity.pem")


def test_a_key_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "identity.pem").mkdir(mode=0o700)
    with pytest.raises(LocalError, match="cannot be read: Is a directory"):
        load_key(tmp_path / "identity.pem")


@pytest.mark.parametrize(
    "key",
    [ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)],
    ids=["ec", "rsa"],
)
def test_another_kind_of_key_is_refused_by_its_name(tmp_path: Path, key: PrivateKeyTypes) -> None:
    with pytest.raises(LocalError, match=f"holds a {type(key).__name__}, not an Ed25519 key"):
        load_key(write_pem(tmp_path / "identity.pem", key))


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\xff\x00" * 50, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"],
)
def test_garbage_is_no_key(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(LocalError, match="is not a private key in PKCS8 PEM form"):
        load_key(path)


def test_a_key_under_a_password_is_refused(tmp_path: Path) -> None:
    path = write_pem(tmp_path / "identity.pem", Ed25519PrivateKey.generate(), b"secret")
    with pytest.raises(LocalError, match="is not a private key in PKCS8 PEM form"):
        load_key(path)


def test_the_seed_of_a_key_is_its_own_and_fits_a_torch_seed() -> None:
    seeds = {key_seed(PeerId(f"peer{number}")) for number in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert key_seed(PeerId("peer1")) == key_seed(PeerId("peer1"))

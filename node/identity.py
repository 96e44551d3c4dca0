"""The node's Ed25519 key: made once, kept in a file that only its owner reads, the root of its peer id."""

import hashlib
import os
from pathlib import Path

import base58
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.errors import LocalError
from protocols.vocabulary import PeerId

KEY_FILE = "identity.pem"

# An identity multihash (00, length 36) over the protobuf of an Ed25519 public key (08 01 12 20 + key).
PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])


def peer_id_of(key: Ed25519PrivateKey) -> PeerId:
    """The libp2p peer id of a key (libp2p spec, peer-ids: identity multihash for Ed25519)."""
    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return PeerId(base58.b58encode(PEER_ID_PREFIX + public).decode())


def key_seed(peer: PeerId) -> int:
    """The seed of a node's first model and batches where none is configured: no two nodes share it."""
    return int.from_bytes(hashlib.sha256(f"covey seed {peer}".encode()).digest()[:8], "big") >> 1


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a key and keep it; an existing file is never overwritten.

    Raises:
        LocalError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise LocalError(f"{path} exists already; a node keeps its key for life") from error
    except OSError as error:
        raise LocalError(f"{path} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read the node's key.

    Raises:
        LocalError: no such file, readable by others, or not an Ed25519 key.
    """
    try:
        pem = path.read_bytes()
    except FileNotFoundError as error:
        raise LocalError(f"no key at {path}; make a home with `covey init`") from error
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}") from error
    if path.stat().st_mode & 0o077:
        raise LocalError(f"{path} can be read by others; run: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise LocalError(f"{path} is not a private key in PKCS8 PEM form: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise LocalError(f"{path} holds a {type(key).__name__}, not an Ed25519 key")
    return key

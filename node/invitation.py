"""Links to a network: everything that a newcomer needs in one line, and the invitation that it keeps.

Belongs here: the form of a link, bytes to and from it, making an invitation and using it, and the file in the home that
shows others that this node was invited. A link comes from anywhere: its size is bounded before anything is unpacked.
"""

import base64
import binascii
import os
import zlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Meta, Struct

from node.manifest import Manifest, check_manifest, check_task_code, read_bounded
from node.signatures import Ed25519Signatures
from protocols.admission import Admission, Invitation, admission_bytes, invitation_bytes
from protocols.errors import ConfigError, LocalError
from protocols.signing import Signatures
from protocols.vocabulary import KEY_BYTES, MAX_ADDRESSES, Address, PeerId, peer_of

PREFIX = "covey://join/"
MAX_LINK_CHARS = 128 * 1024
MAX_CONTENT_BYTES = 256 * 1024
"""Of a link, unpacked."""
TASK_IN_LINK_BYTES = 8 * 1024
"""Longer task files travel beside the link: a message or a QR code has no room for them."""
ADMISSION_FILE = "admission.msgpack"
MAX_ADMISSION_BYTES = 4096

_Secret = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class Link(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """What `covey invite` gives away. Whoever has a link with a holder's key may join with it."""

    version: Literal[1] = 1
    manifest: Manifest
    bootstrap: Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES)] = ()
    """Where the inviting node can be dialled, beside the manifest's addresses."""
    task_file: Annotated[bytes, Meta(max_length=TASK_IN_LINK_BYTES)] | None = None
    invitation: Invitation | None = None
    """Of a private network."""
    holder_key: _Secret | None = None
    """The private half of the invitation's holder; None where that is the newcomer's own key."""
    psk: _Secret | None = None
    """See `network.psk` in the config."""


# --- links ----------------------------------------------------------------------------------------------
def encode_link(link: Link) -> str:
    """One line without blanks. Raises LocalError where it would be too long for any link."""
    packed = msgspec.msgpack.encode(link)
    text = PREFIX + base64.urlsafe_b64encode(zlib.compress(packed, 9)).rstrip(b"=").decode()
    if len(packed) > MAX_CONTENT_BYTES or len(text) > MAX_LINK_CHARS:
        raise LocalError("this network is too large for a link; pass its manifest.toml on instead")
    return text


def decode_link(text: str) -> Link:
    """A link as it was typed or pasted: line breaks within are ignored. Its manifest and its task file are checked, its
    invitation is not.

    Raises:
        ConfigError: it is no link, or damaged.
    """
    line = "".join(text.split())
    if not line.startswith(PREFIX):
        raise ConfigError(
            "link", "does not begin as a link does", [f"{PREFIX}…, as `covey invite` prints it"]
        )
    if len(line) > MAX_LINK_CHARS:
        raise _damaged(f"it has {len(line)} characters, at most {MAX_LINK_CHARS} are allowed")
    link = _unpack(_inflate(line.removeprefix(PREFIX)))
    for address in link.bootstrap:
        if peer_of(address) is None:
            raise _damaged(f"'{address}' names no peer")
    check_manifest(link.manifest, "link")
    if link.task_file is not None:
        check_task_code(link.manifest, link.task_file, "link")
    return link


def _inflate(text: str) -> bytes:
    """URL-safe base64 without padding, then zlib; never more than `MAX_CONTENT_BYTES`."""
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        inflater = zlib.decompressobj()
        content = inflater.decompress(packed, MAX_CONTENT_BYTES)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise _damaged("a character is wrong or missing") from error
    if inflater.unconsumed_tail:
        raise _damaged(f"it holds more than {MAX_CONTENT_BYTES} bytes")
    if not inflater.eof or inflater.unused_data:
        raise _damaged("it is cut short, or something follows it")
    return content


def _unpack(content: bytes) -> Link:
    try:
        return msgspec.msgpack.decode(content, type=Link)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _damaged(
            f"its content is not a link's ({error}); was it made by another version of covey?"
        ) from error


def _damaged(problem: str) -> ConfigError:
    return ConfigError("link", f"is damaged: {problem}; copy the whole of it again, or ask for another")


# --- invitations ----------------------------------------------------------------------------------------
def invite(network: str, holder: bytes, expires_at: int, inviter: Signatures) -> Invitation:
    """An invitation for the holder of a key. holder: 32 bytes; expires_at: Unix seconds, 0 is never."""
    signature = inviter.sign(invitation_bytes(network, holder, expires_at))
    return Invitation(network, inviter.author, holder, expires_at, signature)


def make_holder() -> Ed25519PrivateKey:
    """A key for one link."""
    return Ed25519PrivateKey.generate()


def admit(invitation: Invitation, holder: Signatures, peer: PeerId) -> Admission:
    """The invitation under one peer, signed by its holder; of no use under another."""
    assert holder.author == invitation.holder
    return Admission(invitation, holder.sign(admission_bytes(invitation.network, peer)))


def use_link(link: Link, own: Signatures, peer: PeerId) -> Admission | None:
    """What this peer shows to the network's nodes; None where the link has no invitation.

    own: signs with this peer's key.

    Raises:
        LocalError: the invitation is another's.
    """
    invitation = link.invitation
    if invitation is None:
        return None
    holder: Signatures = own
    if link.holder_key is not None:
        holder = Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(link.holder_key))
    if holder.author != invitation.holder:
        raise LocalError(
            f"the invitation is for another peer than this one, which is {peer}; join from the home that it was made "
            f"for, or ask for one with `covey invite --for {peer}`"
        )
    return admit(invitation, holder, peer)


def save_admission(home: Path, admission: Admission) -> None:
    """Keep it in the home, for its owner's eyes."""
    write_private(home / ADMISSION_FILE, msgspec.msgpack.encode(admission))


def write_private(path: Path, content: bytes) -> None:
    """A whole file that only its owner reads, or none."""
    draft = path.with_name(path.name + ".draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    draft.replace(path)


def load_admission(home: Path) -> Admission | None:
    """What this node shows to others in a private network; None where it was not invited.

    Raises:
        LocalError: the file is damaged.
    """
    path = home / ADMISSION_FILE
    if not path.exists():
        return None
    try:
        return msgspec.msgpack.decode(read_bounded(path, MAX_ADMISSION_BYTES), type=Admission)
    except (ConfigError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise LocalError(
            f"{path} is damaged: {error}; join again with the link that you were given"
        ) from error

"""Taking up what the operator shares: a file, a folder or a URI, or the node's own model, hashed and with its entry.

Belongs here: what blocks while it is hashed. Saying it to all is the service's matter.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from node.content_api import ShareBody
from node.content_entries import as_told, file_entry, folder_entry, link_entry, model_entry
from node.content_store import ContentStore
from node.signatures import peer_of_author
from node.store import newest_checkpoints, verify_checkpoint
from protocols.entries import Kind, Shared
from protocols.errors import ConfigError, CoveyError, LocalError
from protocols.vocabulary import Digest

MAX_ROUNDS = 1000
"""In which a model's last figures are looked for."""
Told = Callable[[int, int], None]
"""Bytes that are hashed, and all."""


class ModelSource(NamedTuple):
    """Where the node's own model comes from, and what is said of it when it is shared.

    rounds: the last so many, oldest first; called on the loop.
    """

    home: Path
    task: str
    protocol: str
    schema: str
    network: str
    rounds: Callable[[int], list[dict[str, Any]]]


class Found(NamedTuple):
    """Something to share, hashed. digests: of all that is served for it. skipped: files of a folder that are not shared."""

    entry: Shared
    digests: tuple[Digest, ...] = ()
    path: str | None = None
    skipped: int = 0


class Sharing:
    """Makes entries of what is to be shared, and has the store serve it. Blocks.

    me: the node's author key. model: None for a node that does not learn.
    """

    def __init__(self, store: ContentStore, me: bytes, model: ModelSource | None) -> None:
        self._store = store
        self._me = me
        self._model = model

    def rounds(self) -> list[dict[str, Any]]:
        """What is known of the model's rounds. On the loop."""
        return [] if self._model is None else self._model.rounds(MAX_ROUNDS)

    def take_up(self, body: ShareBody, rounds: Sequence[Mapping[str, Any]], day: int, told: Told) -> Found:
        """One thing, with what the operator says of it.

        Raises:
            ConfigError: the field that is wrong. LocalError: it cannot be shared, and why.
        """
        if sum(map(bool, (body.path, body.uri, body.model))) != 1:
            raise ConfigError("share", "shares one thing at a time", ["a path", "a URI", "the model"])
        # Nobody waits for gigabytes to be hashed and then hears that the title is too long.
        _told(Shared(bytes(32), day, Kind.FILE, "-", "", (), "", 1, "", ()), body)
        if body.uri:
            if body.title is None:
                raise ConfigError("title", "must be given with a URI")
            found = Found(link_entry(body.uri, body.title, day))
        elif body.model:
            found = self._share_model(rounds, day, told)
        else:
            found = self._share_path(Path(body.path), day, told)
        return found._replace(entry=_told(found.entry, body))

    def _share_path(self, path: Path, day: int, told: Told) -> Found:
        if not path.is_absolute():
            raise ConfigError("path", f"'{path}' is not absolute")
        if not path.is_dir():
            ref = self._store.share_file(path, told)
            return Found(file_entry(ref, path, day), (Digest(ref.digest),), str(path))
        shared = self._store.share_folder(path, told)
        files, total_bytes = len(shared.folder.files), shared.folder.total_bytes
        entry = folder_entry(shared.ref, path, files, total_bytes, day)
        return Found(entry, shared.digests, str(path), len(shared.skipped))

    def _share_model(self, rounds: Sequence[Mapping[str, Any]], day: int, told: Told) -> Found:
        """The newest whole checkpoint, as a copy: those of the home go when newer ones come."""
        if self._model is None:
            raise LocalError(
                "this node does not learn and has no model; share a file with `covey share PATH`"
            )
        whole = []
        for path in newest_checkpoints(self._model.home):
            with contextlib.suppress(CoveyError, OSError):
                whole.append((verify_checkpoint(path)[0], path))
            if len(whole) == 2:
                break
        if not whole:
            raise LocalError(f"no whole checkpoint in {self._model.home}; has the node finished a round?")
        model, path = whole[0]
        done = [row for row in rounds if row["round"] <= model.round]
        details = {
            "protocol": self._model.protocol,
            "schema": self._model.schema,
            "network": self._model.network,
            "node": str(peer_of_author(self._me)),
            "samples": str(model.num_samples),
            "metrics": _metrics_of(done),
            "merged": f"{done[-1]['num_merged']} models of others in its last round" if done else "",
            "parent": whole[1][0].digest.hex() if len(whole) > 1 else "",
        }
        ref = self._store.share_copy(path, told)
        entry = model_entry(ref, self._model.task, model.round, details, day)
        return Found(entry, (Digest(ref.digest),), str(path))


def _told(entry: Shared, body: ShareBody) -> Shared:
    return as_told(entry, body.title, body.creator, body.tags)


def _metrics_of(rounds: Sequence[Mapping[str, Any]]) -> str:
    """The newest figures: not every round is evaluated."""
    metrics: Mapping[str, float] = next((row["metrics"] for row in reversed(rounds) if row["metrics"]), {})
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())

"""Shared content on disk: served from where it lies as long as it is as it was, and taken in within limits."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from node import content_downloads, content_store
from node.config import ContentConfig
from node.content_blobs import ContentBlob
from node.content_downloads import Downloads
from node.content_store import ContentStore, Holdings
from node.content_tables import ContentTables
from node.folders import Folder, FolderFile
from node.store import BlobStore
from protocols.blob import chunks_of, digest_of, hash_blob, num_chunks
from protocols.entries import Kind
from protocols.errors import LocalError, PeerError
from protocols.messages import FetchHeader
from protocols.vocabulary import CHUNK_BYTES, HOSTILE, MAX_CONTENT_BYTES, ContentRef, Digest, ModelRef, Reason

DATA = random.Random(3).randbytes(3 * CHUNK_BYTES + 11)
ROOMY = ContentConfig(min_free_bytes=0)
Usage = namedtuple("Usage", "total used free")


def ref_of(data: bytes) -> ContentRef:
    return ContentRef(hash_blob(data)[0], len(data))


class Box:
    """A home, its store, and what the store said."""

    def __init__(self, home: Path, settings: ContentConfig = ROOMY) -> None:
        self.home = home
        self.settings = settings
        self.said: list[tuple[Digest, str]] = []
        home.mkdir(exist_ok=True)
        self.open()

    def open(self) -> None:
        self.store = ContentStore(
            self.home, self.settings, lambda digest, problem: self.said.append((digest, problem))
        )

    def reopen(self) -> None:
        self.store.close()
        self.open()

    @property
    def inner(self) -> list[str]:
        """What lies in the store's own folder."""
        return sorted(path.name for path in (self.home / "content").iterdir())

    @property
    def downloads(self) -> dict[str, bytes]:
        found = self.home / "downloads"
        return {
            str(path.relative_to(found)): path.read_bytes() for path in found.rglob("*") if path.is_file()
        }

    def receive(self, data: bytes, *indices: int) -> None:
        """As a network does it: chunks of a wanted content, all where none are named, and the gate if that makes it whole."""
        incoming = self.store.incoming(ref_of(data))
        incoming.recover()
        incoming.prove(FetchHeader(len(data), hash_blob(data)[1]))
        chunks = [bytes(chunk) for chunk in chunks_of(data)]
        for index in indices or incoming.missing:
            incoming.write(index, chunks[index])
        if incoming.complete:
            self.store.admit(incoming)

    def get(self, data: bytes, title: str = "title", kind: Kind = Kind.FILE) -> Path:
        ref = ref_of(data)
        self.store.want(ref, kind, title)
        self.receive(data)
        assert self.store.missing(ref.digest) == ()
        return self.store.place(ref.digest, title)

    def get_folder(self, files: dict[str, bytes], title: str = "folder") -> Path:
        listed = list_of(files)
        self.store.want(ref_of(listed), Kind.FOLDER, title)
        by_digest = {ref_of(data).digest: data for data in (*files.values(), listed)}
        while missing := self.store.missing(ref_of(listed).digest):
            for ref in missing:
                self.receive(by_digest[ref.digest])
        return self.store.place(ref_of(listed).digest, title)


def list_of(files: dict[str, bytes]) -> bytes:
    rows = sorted(
        FolderFile(tuple(path.split("/")), len(data), ref_of(data).digest) for path, data in files.items()
    )
    return Folder(tuple(rows)).to_bytes()


def read(blob: ContentBlob | None) -> bytes:
    assert blob is not None
    return b"".join(map(blob.read, range(num_chunks(blob.size_bytes))))


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path / "home")
    yield box
    box.store.close()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder outside the home."""
    folder = tmp_path / "own"
    folder.mkdir()
    return folder


def write(path: Path, data: bytes = DATA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- sharing a file -------------------------------------------------------------------------------------
def test_a_shared_file_stays_where_it_is_and_is_served(box: Box, own: Path) -> None:
    told: list[tuple[int, int]] = []
    path = write(own / "film.mkv")
    ref = box.store.share_file(path, lambda done, total: told.append((done, total)))
    assert ref == ref_of(DATA)
    blob = box.store.get(ref.digest)
    assert read(blob) == DATA
    assert blob is not None
    assert (blob.path, blob.chunk_hashes) == (path, hash_blob(DATA)[1])
    assert box.inner == []
    assert told == [(min(n * CHUNK_BYTES, len(DATA)), len(DATA)) for n in (1, 2, 3, 4)]
    assert box.store.digests() == (ref.digest,)
    assert [
        (item.path, item.is_got, item.num_files, item.num_changed, item.total_bytes)
        for item in box.store.items()
    ] == [(path, False, 1, 0, len(DATA))]


def test_shares_outlive_a_restart_and_are_not_read_again(box: Box, own: Path) -> None:
    path = write(own / "film.mkv")
    ref = box.store.share_file(path)
    box.reopen()
    assert read(box.store.get(ref.digest)) == DATA
    told: list[int] = []
    assert box.store.share_file(path, lambda done, total: told.append(done)) == ref
    assert told == []


def test_a_file_is_hashed_in_constant_memory(box: Box, own: Path) -> None:
    path = own / "large"
    with path.open("wb") as file:
        file.truncate(300 * CHUNK_BYTES)
    code = (
        "import resource, sys; from pathlib import Path; from node.content_store import *\n"
        "home = Path(sys.argv[1]); home.mkdir()\n"
        "store = ContentStore(home, ContentConfig())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "store.share_file(Path(sys.argv[2])); store.close()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = [sys.executable, "-c", code, str(own / "home"), str(path)]
    grown_kib = int(subprocess.run(run, capture_output=True, check=True, text=True, timeout=60).stdout)
    assert grown_kib < 32 * 1024


@pytest.mark.parametrize("how", ["longer", "same length", "replaced", "gone", "link", "pipe"])
def test_a_file_that_has_changed_is_not_served_and_that_is_said_once(box: Box, own: Path, how: str) -> None:
    path = write(own / "film.mkv")
    ref = box.store.share_file(path)
    blob = box.store.get(ref.digest)
    assert blob is not None
    if how == "longer":
        path.write_bytes(DATA + b"x")
    elif how == "same length":
        path.write_bytes(bytes(len(DATA)))
        os.utime(path, ns=(0, 1))
    else:
        path.rename(own / "moved")
        if how == "replaced":
            path.write_bytes(DATA)
        elif how == "link":
            path.symlink_to(own / "moved")
        elif how == "pipe":
            os.mkfifo(path)
    with pytest.raises(OSError, match=r"changed|gone"):
        blob.read(0)
    assert box.store.get(ref.digest) is None
    assert [digest for digest, _ in box.said] == [ref.digest]
    assert str(path) in box.said[0][1]
    assert box.store.digests() == ()
    assert [item.num_changed for item in box.store.items()] == [1]


def test_a_change_that_hides_itself_is_found_by_the_hash(box: Box, own: Path) -> None:
    path = write(own / "film.mkv")
    ref = box.store.share_file(path)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(2 * CHUNK_BYTES)
        file.write(b"forged")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    blob = box.store.get(ref.digest)
    assert blob is not None
    assert blob.read(1) == DATA[CHUNK_BYTES : 2 * CHUNK_BYTES]
    with pytest.raises(OSError, match="not those that were shared"):
        blob.read(2)
    assert box.store.get(ref.digest) is None
    assert len(box.said) == 1
    box.store.recheck()
    assert box.store.get(ref.digest) is None, "a look at it cannot tell that it is right again"
    assert box.store.share_file(path) != ref


def test_a_disk_that_comes_back_is_served_again(box: Box, own: Path) -> None:
    path = write(own / "film.mkv")
    ref = box.store.share_file(path)
    path.rename(own / "away")
    box.store.recheck()
    assert (box.store.digests(), len(box.said)) == ((), 1)
    (own / "away").rename(path)
    box.store.recheck()
    assert read(box.store.get(ref.digest)) == DATA
    assert len(box.said) == 1


def test_a_changed_file_can_be_shared_again(box: Box, own: Path) -> None:
    path = write(own / "film.mkv")
    box.store.share_file(path)
    path.write_bytes(b"new")
    ref = box.store.share_file(path)
    assert read(box.store.get(ref.digest)) == b"new"


def test_two_places_of_one_content_stand_in_for_each_other(box: Box, own: Path) -> None:
    write(own / "folder/b.mkv")
    box.store.share_folder(own / "folder")
    ref = box.store.share_file(write(own / "a.mkv"))
    (own / "a.mkv").unlink()
    assert read(box.store.get(ref.digest)) == DATA
    assert box.said == [], "it is served all the same"
    (own / "folder/b.mkv").unlink()
    assert box.store.get(ref.digest) is None
    assert [digest for digest, _ in box.said] == [ref.digest]


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("empty", "is empty"), ("link", "symbolic link"), ("folder", "is a folder"), ("pipe", "pipe"),
        ("nothing", "No such file"), ("large", "share it in parts"), ("device", "a device"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_refused_with_a_clear_word(box: Box, own: Path, kind: str, word: str) -> None:
    path = own / kind
    if kind == "empty":
        path.touch()
    elif kind == "link":
        path.symlink_to(write(own / "file"))
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(MAX_CONTENT_BYTES + 1)
    elif kind == "device":
        path = Path("/dev/null")
    for share in (box.store.share_file, box.store.share_copy):
        with pytest.raises(LocalError, match=word):
            share(path)
    assert (box.store.digests(), box.inner) == ((), [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads all")
def test_a_file_that_may_not_be_read_is_refused(box: Box, own: Path) -> None:
    path = write(own / "secret")
    path.chmod(0)
    with pytest.raises(LocalError, match="Permission denied"):
        box.store.share_file(path)


def test_the_nodes_own_files_are_not_shared_but_may_be_copied(box: Box) -> None:
    key = write(box.home / "identity.pem", b"key")
    with pytest.raises(LocalError, match="a node's own"):
        box.store.share_file(key)
    with pytest.raises(LocalError, match="no file that can be shared"):
        box.store.share_folder(box.home)
    with pytest.raises(LocalError, match="a node's own"):
        box.store.share_file(box.home / "downloads" / ".." / "identity.pem")
    ref = box.store.share_file(write(box.home / "downloads" / "song"))
    assert read(box.store.get(ref.digest)) == DATA


def test_no_home_of_any_node_is_shared_but_for_its_downloads(box: Box, own: Path) -> None:
    for name in ("identity.pem", "library.db", "models/m", "downloads/song"):
        write(own / "bob" / name, name.encode())
    write(own / "notes", b"notes")
    shared = box.store.share_folder(own)
    assert [file.parts for file in shared.folder.files] == [("notes",)]
    assert [(each.path, "home of a node" in each.why) for each in shared.skipped] == [(own / "bob", True)]
    for name in ("identity.pem", "library.db"):
        with pytest.raises(LocalError, match="a node's own"):
            box.store.share_file(own / "bob" / name)
    with pytest.raises(LocalError, match="no file that can be shared"):
        box.store.share_folder(own / "bob")
    (own / "way").symlink_to(own / "bob")
    with pytest.raises(LocalError, match="a node's own"):
        box.store.share_file(own / "way" / "identity.pem")
    assert read(box.store.get(box.store.share_file(own / "bob/downloads/song").digest)) == b"downloads/song"


def test_a_key_that_somebody_has_left_above_forbids_nothing(box: Box, own: Path) -> None:
    """Anybody can put one into a folder for all."""
    write(own / "identity.pem")
    write(own / "mine/song")
    assert box.store.share_file(own / "mine/song") == ref_of(DATA)
    assert [file.parts for file in box.store.share_folder(own / "mine").folder.files] == [("song",)]


@pytest.mark.parametrize("how", ["link", "link above", "home"])
def test_what_becomes_of_a_folder_while_others_are_read_lets_nothing_else_out(
    box: Box, own: Path, how: str
) -> None:
    """Whoever may write into a shared folder may not read what the operator may."""
    private = own.parent / "private"
    for name in ("a", "m/z/key"):
        write(own / name, b"public")
    for name in ("key", "z/key"):
        write(private / name, b"secret")
    if how == "home":
        write(private / "identity.pem")

    def meddle(done: int, total: int) -> None:
        if (own / "m").is_dir() and not (own / "away").exists():
            place = own / "m" if how == "link above" else own / "m" / "z"
            place.rename(own / "away")
            if how == "home":
                private.rename(place)
            else:
                place.symlink_to(private)

    shared = box.store.share_folder(own, meddle)
    assert (own / "away").exists()
    assert [file.parts for file in shared.folder.files] == [("a",)]
    assert [each.path for each in shared.skipped] == [own / "m/z/key"]
    assert box.store.get(ref_of(b"secret").digest) is None


def test_a_file_behind_a_link_is_not_served_any_more(box: Box, own: Path) -> None:
    path = write(own / "folder" / "song")
    ref = box.store.share_file(path)
    blob = box.store.get(ref.digest)
    assert blob is not None
    (own / "folder").rename(own / "elsewhere")
    (own / "folder").symlink_to(own / "elsewhere")
    with pytest.raises(OSError, match=r"directory|symbolic"):
        blob.read(0)
    assert box.store.get(ref.digest) is None
    assert [why for _, why in box.said] == [
        f"{path} is not served any more: a link leads to it now; share it again as it is now"
    ]


def test_only_its_owner_sees_what_the_store_holds_and_downloads_are_usual_files(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        box = Box(tmp_path / "home")
        path = box.get(DATA, "song")
        box.store.want(ref_of(b"other"), Kind.FILE, "other")
        modes = {
            str(each.relative_to(box.home)): each.stat().st_mode & 0o777
            for each in (*box.home.glob("content*"), path)
        }
        box.store.close()
    finally:
        os.umask(mask)
    assert modes.pop("content") == 0o700
    assert modes.pop("downloads/song") == 0o644
    assert set(modes) >= {"content.db", "content.db-wal"}
    assert set(modes.values()) == {0o600}


def test_a_copy_is_served_when_its_original_is_gone(box: Box, own: Path) -> None:
    path = write(box.home / "checkpoints" / "1.safetensors")
    ref = box.store.share_copy(path)
    path.unlink()
    box.reopen()
    assert read(box.store.get(ref.digest)) == DATA
    assert box.inner == [ref.digest.hex()]
    assert box.store.unshare(ref.digest) == (ref.digest,)
    assert (box.inner, box.store.digests()) == ([], ())


@pytest.mark.parametrize("change", ["grows", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_refused(box: Box, own: Path, change: str) -> None:
    path = write(own / "log")

    def meddle(done: int, total: int) -> None:
        if done == CHUNK_BYTES:
            with path.open("ab" if change == "grows" else "r+b") as file:
                file.write(b"more")

    with pytest.raises(LocalError, match="while it was read"):
        box.store.share_file(path, meddle)
    assert box.store.digests() == ()


def test_who_is_told_can_break_off(box: Box, own: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise LocalError("stopped")

    for share in (box.store.share_file, box.store.share_copy):
        with pytest.raises(LocalError, match="stopped"):
            share(write(own / "film"), stop)
    assert (box.store.digests(), box.inner) == ((), [])


def test_what_is_not_shared_any_more_stays_but_is_not_served(box: Box, own: Path) -> None:
    path = write(own / "film.mkv")
    ref = box.store.share_file(path)
    assert box.store.unshare(ref.digest) == (ref.digest,)
    assert box.store.get(ref.digest) is None
    assert path.read_bytes() == DATA
    assert box.store.unshare(ref.digest) == ()


# --- sharing a folder -----------------------------------------------------------------------------------
def test_a_folder_is_its_list_and_its_files(box: Box, own: Path) -> None:
    files = {"a/song.ogg": DATA, "b.txt": b"text", "copy.txt": b"text"}
    for name, data in files.items():
        write(own / name, data)
    write(own / ".hidden")
    told: list[tuple[int, int]] = []
    shared = box.store.share_folder(own, lambda done, total: told.append((done, total)))
    assert shared.ref == ref_of(list_of(files))
    assert shared.folder == box.store.listing(shared.ref.digest)
    assert (
        set(shared.digests)
        == set(box.store.digests())
        == {ref_of(d).digest for d in (*files.values(), list_of(files))}
    )
    assert [(each.path.name, each.why) for each in shared.skipped] == [(".hidden", "hidden")]
    assert told[-1] == (len(DATA) + 8, len(DATA) + 8)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for data in files.values():
        assert read(box.store.get(ref_of(data).digest)) == data
    (item,) = box.store.items()
    assert (item.kind, item.path, item.num_files, item.total_bytes) == (Kind.FOLDER, own, 3, len(DATA) + 8)
    box.reopen()
    assert box.store.listing(shared.ref.digest) == shared.folder


def test_a_file_of_two_shares_is_served_until_both_are_taken_back(box: Box, own: Path) -> None:
    path = write(own / "song")
    file, folder = box.store.share_file(path), box.store.share_folder(own)
    assert box.store.unshare(file.digest) == ()
    assert read(box.store.get(file.digest)) == DATA
    assert set(box.store.unshare(folder.ref.digest)) == {file.digest, folder.ref.digest}
    assert box.store.get(file.digest) is None
    assert box.inner == []


def test_one_changed_file_of_a_folder_leaves_the_others_served(box: Box, own: Path) -> None:
    write(own / "a", b"a")
    write(own / "b", b"b")
    box.store.share_folder(own)
    (own / "a").write_bytes(b"other")
    assert box.store.get(ref_of(b"a").digest) is None
    assert read(box.store.get(ref_of(b"b").digest)) == b"b"
    assert [(item.num_files, item.num_changed) for item in box.store.items()] == [(2, 1)]


def test_a_folder_of_nothing_is_refused(box: Box, own: Path) -> None:
    (own / "empty").touch()
    with pytest.raises(LocalError, match="no file"):
        box.store.share_folder(own)


# --- getting --------------------------------------------------------------------------------------------
def test_a_file_is_got_placed_and_served_from_there(box: Box) -> None:
    ref = ref_of(DATA)
    box.store.want(ref, Kind.FILE, "My song.ogg")
    assert box.store.wanted() == ((ref, Kind.FILE, "My song.ogg"),)
    assert box.store.missing(ref.digest) == (ref,)
    assert box.store.progress(ref.digest) == (0, len(DATA))
    box.receive(DATA, 0, 3)
    assert box.store.progress(ref.digest) == (2 * CHUNK_BYTES, len(DATA))
    assert not box.store.holds(ref)
    box.receive(DATA)
    assert box.store.progress(ref.digest) == (len(DATA), len(DATA))
    assert read(box.store.get(ref.digest)) == DATA, "it is served before it is placed"
    path = box.store.place(ref.digest, "My song.ogg")
    assert path == box.home.resolve() / "downloads" / "My song.ogg"
    assert box.downloads == {"My song.ogg": DATA}
    assert box.inner == []
    blob = box.store.get(ref.digest)
    assert blob is not None
    assert (blob.path, read(blob)) == (path, DATA)
    assert box.store.wanted() == ()
    assert box.store.progress(ref.digest) == (len(DATA), len(DATA))
    assert [(item.path, item.is_got) for item in box.store.items()] == [(path, True)]
    (item,) = box.store.items()
    assert box.store.items([bytes(32), item.digest]) == (item,)
    assert box.store.items([bytes(32)]) == box.store.items([]) == ()


def test_a_folder_is_got_list_first(box: Box) -> None:
    files = {"a/b/song.ogg": DATA, "c.txt": b"text", "twice.txt": b"text"}
    ref = ref_of(list_of(files))
    box.store.want(ref, Kind.FOLDER, "Album")
    assert box.store.missing(ref.digest) == (ref,)
    box.receive(list_of(files))
    assert box.store.missing(ref.digest) == (ref_of(DATA), ref_of(b"text"))
    box.receive(DATA, 1)
    assert box.store.progress(ref.digest) == (CHUNK_BYTES + ref.size_bytes, ref.size_bytes + len(DATA) + 4)
    box.receive(DATA)
    with pytest.raises(LocalError, match="not held"):
        box.store.place(ref.digest, "Album")
    assert box.downloads.keys() <= {f".{ref.digest.hex()}.partial/a/b/song.ogg"}
    box.receive(b"text")
    path = box.store.place(ref.digest, "Album")
    assert box.downloads == {f"Album/{name}": data for name, data in files.items()}
    assert not path.joinpath("c.txt").samefile(path / "twice.txt"), "who edits one edits one"
    assert box.store.listing(ref.digest).total_bytes == len(DATA) + 8
    for data in files.values():
        assert read(box.store.get(ref_of(data).digest)) == data
    assert box.inner == [ref.digest.hex()], "the list is served too"
    assert box.store.used_bytes() == len(DATA) + 8
    box.reopen()
    assert box.inner == [ref.digest.hex()]


def test_what_was_got_is_not_fetched_again(box: Box, own: Path) -> None:
    path = box.get(DATA, "song")
    folder = box.get_folder({"x": DATA, "y": b"y"}, "album")
    again = ref_of(DATA)
    box.store.want(again, Kind.FILE, "another title")
    assert box.store.missing(again.digest) == ()
    assert box.store.place(again.digest, "another title") == path
    listed = ref_of(list_of({"x": DATA, "y": b"y"}))
    box.store.want(listed, Kind.FOLDER, "album")
    assert box.store.missing(listed.digest) == ()
    assert box.store.place(listed.digest, "album") == folder
    assert box.downloads == {"song": DATA, "album/x": DATA, "album/y": b"y"}
    assert box.store.wanted() == ()


def test_a_folders_file_that_is_the_operators_own_is_copied_and_not_linked(box: Box, own: Path) -> None:
    path = write(own / "mine")
    box.store.share_file(path)
    folder = box.get_folder({"theirs": DATA, "y": b"y"})
    assert (folder / "theirs").read_bytes() == DATA
    assert not (folder / "theirs").samefile(path)


def test_a_copy_that_is_served_and_got_at_once_stays_apart_from_the_download(box: Box, own: Path) -> None:
    ref = box.store.share_copy(write(own / "checkpoint"))
    box.store.want(ref, Kind.MODEL, "model")
    assert box.store.missing(ref.digest) == ()
    path = box.store.place(ref.digest, "model")
    assert path.read_bytes() == DATA
    path.write_bytes(b"edited")
    write(own / "checkpoint", b"over")
    ref = box.store.share_copy(write(own / "checkpoint"))
    folder = box.get_folder({"a": DATA})
    (folder / "a").write_bytes(b"edited")
    assert read(box.store.get(ref.digest)) == DATA


def test_what_was_removed_can_be_got_again(box: Box) -> None:
    box.get(DATA, "song").unlink()
    assert box.get(DATA, "song").read_bytes() == DATA
    folder = box.get_folder({"a": b"a", "b": b"b"})
    (folder / "a").unlink()
    again = box.get_folder({"a": b"a", "b": b"b"})
    assert again.name == "folder (2)"
    assert (again / "a").read_bytes() == b"a"
    assert [
        (item.path, item.num_files, item.num_changed)
        for item in box.store.items()
        if item.kind is Kind.FOLDER
    ] == [(again, 2, 0)]


def test_nothing_is_overwritten_a_number_is_added(box: Box) -> None:
    downloads = box.home / "downloads"
    write(downloads / "x.txt", b"precious")
    (downloads / "x (2).txt").symlink_to(box.home / "identity.pem")
    (downloads / "x (3).txt").mkdir()
    assert box.get(DATA, "x.txt").name == "x (4).txt"
    write(downloads / "album", b"precious")
    (downloads / "album (2)").symlink_to("/tmp")
    assert box.get_folder({"a": b"a"}, "album").name == "album (3)"
    assert (downloads / "x.txt").read_bytes() == (downloads / "album").read_bytes() == b"precious"
    assert not (box.home / "identity.pem").exists(), "nothing is made through a link"


def test_no_title_leads_out_of_the_downloads(box: Box) -> None:
    inside = box.home.resolve() / "downloads"
    for number, title in enumerate(
        ("../../evil", "/etc/passwd", "..", "", "a/b\\c", "\x1b[2J\u202eexe", "x" * 500)
    ):
        path = box.get(b"%d" % number, title)
        assert path.parent == inside
        assert path.name.isprintable()
    assert not (box.home.parent / "evil").exists()


def test_a_link_in_place_of_a_half_done_download_is_not_followed(box: Box, own: Path) -> None:
    ref = ref_of(list_of({"a": b"a"}))
    trap = box.home / "downloads" / f".{ref.digest.hex()}.partial"
    trap.parent.mkdir()
    trap.symlink_to(own)
    box.get_folder({"a": b"a"})
    assert list(own.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_downloads_may_lie_anywhere_with_hard_links_or_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def refuse(self: Path, target: Path) -> None:
            raise OSError(18, "another device")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    box = Box(tmp_path / "home", ContentConfig(downloads=str(tmp_path / "far" / "away"), min_free_bytes=0))
    path = box.get_folder({"a/b": DATA, "c": b"c"}, "album")
    assert path == tmp_path.resolve() / "far" / "away" / "album"
    assert (path / "a/b").read_bytes() == DATA
    assert box.get(b"file", "file.txt").read_bytes() == b"file"
    assert read(box.store.get(ref_of(DATA).digest)) == DATA
    box.store.close()


# --- crashes --------------------------------------------------------------------------------------------
def test_chunks_outlive_a_kill(box: Box) -> None:
    ref = ref_of(DATA)
    box.store.want(ref, Kind.FILE, "song")
    box.receive(DATA, 0, 2)
    box.open()  # the first store never said goodbye
    assert box.store.wanted() == ((ref, Kind.FILE, "song"),)
    incoming = box.store.incoming(ref)
    incoming.recover()
    assert incoming.missing == [1, 3]
    box.receive(DATA)
    assert box.store.place(ref.digest, "song").read_bytes() == DATA


def test_a_damaged_part_is_fetched_again(box: Box) -> None:
    ref = ref_of(DATA)
    box.store.want(ref, Kind.FILE, "song")
    box.receive(DATA, 0, 1, 2)
    part = box.home / "content" / f"{ref.digest.hex()}.part"
    with part.open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        file.write(b"torn")
    box.open()
    incoming = box.store.incoming(ref)
    incoming.recover()
    assert incoming.missing == [1, 3]


@pytest.mark.parametrize("header", [b"", b"x", bytes(32 * 4), bytes(32)])
def test_a_header_that_is_torn_or_forged_is_not_believed(box: Box, header: bytes) -> None:
    ref = ref_of(DATA)
    box.store.want(ref, Kind.FILE, "song")
    box.receive(DATA, 0)
    (box.home / "content" / f"{ref.digest.hex()}.header").write_bytes(header)
    box.open()
    incoming = box.store.incoming(ref)
    incoming.recover()
    assert (incoming.missing, incoming.chunk_hashes) == ([0, 1, 2, 3], ())
    box.receive(DATA)
    assert box.store.holds(ref)


def test_what_nothing_speaks_of_is_swept_away(box: Box) -> None:
    kept = ref_of(DATA)
    box.store.want(kept, Kind.FILE, "song")
    box.receive(DATA, 0)
    left = "0" * 64
    for name in (f"{left}.part", f"{left}.header", left, f"{left}.draft", "1.draft", "thesis/thesis.tex"):
        write(box.home / "content" / name, b"left")
    box.open()
    assert box.inner == [f"{kept.digest.hex()}.header", f"{kept.digest.hex()}.part", "thesis"], "not its own"


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("when", ["staging", "claimed", "renamed", "settled"])
def test_a_kill_while_a_download_is_placed_leaves_it_once_and_whole(
    box: Box, monkeypatch: pytest.MonkeyPatch, when: str, folder: bool
) -> None:
    files = {"a/b": DATA, "c": b"c"}
    ref = ref_of(list_of(files) if folder else DATA)
    box.store.want(ref, Kind.FOLDER if folder else Kind.FILE, "it")
    for data in (list_of(files), *files.values()) if folder else (DATA,):
        box.receive(data)
        box.store.missing(ref.digest)

    class Killed(BaseException):
        pass

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if when == "staging":
            link = Path.hardlink_to

            def link_one(path: Path, target: Path) -> None:
                if path.exists() or path.name != "b":
                    raise Killed
                link(path, target)

            patch.setattr(Path, "hardlink_to", link_one)
        elif when == "claimed":
            patch.setattr(Path, "rename", die)
        elif when == "renamed":
            patch.setattr(Downloads, "_settle", die)
        else:
            patch.setattr(Downloads, "_done", die)
        with pytest.raises(Killed):
            box.store.place(ref.digest, "it")
    box.open()
    assert box.store.missing(ref.digest) == ()
    path = box.store.place(ref.digest, "it")
    found = {name: data for name, data in box.downloads.items() if data}
    assert found == (
        {f"{path.name}/{name}": data for name, data in files.items()} if folder else {path.name: DATA}
    )
    if when in ("renamed", "settled"):
        assert path.name == "it"
    assert box.store.wanted() == ()
    assert read(box.store.get(ref_of(DATA).digest)) == DATA
    assert box.inner == ([ref.digest.hex()] if folder else [])


def test_two_kills_while_a_folder_is_placed_lose_nothing(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second before anything is made ready again: what is claimed is empty, and must not be taken for the item."""
    files = {"a": DATA, "b": b"b"}
    ref = ref_of(list_of(files))
    box.store.want(ref, Kind.FOLDER, "it")
    for data in (list_of(files), *files.values()):
        box.receive(data)
        box.store.missing(ref.digest)

    class Killed(BaseException):
        pass

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    ends = [(Path, "rename", die), (content_downloads, "clear", lambda path: die(shutil.rmtree(path)))]
    for where, name, end in ends:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, end)
            with pytest.raises(Killed):
                box.store.place(ref.digest, "it")
        box.open()
    path = box.store.place(ref.digest, "it")
    assert {each.name: each.read_bytes() for each in path.iterdir()} == files


def test_a_store_that_stops_copies_no_further(box: Box, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box.store.share_file(write(own / "mine"))
    listed = list_of({"theirs": DATA})
    box.store.want(ref_of(listed), Kind.FOLDER, "album")
    box.receive(listed)
    assert box.store.missing(ref_of(listed).digest) == ()
    read_chunk, num_read = ContentBlob.read, 0

    def read_and_stop(blob: ContentBlob, index: int) -> bytes:
        nonlocal num_read
        num_read += blob.path == own / "mine"
        if num_read == 2:
            box.store.stop()
        return read_chunk(blob, index)

    monkeypatch.setattr(ContentBlob, "read", read_and_stop)
    with pytest.raises(LocalError, match="the node stops"):
        box.store.place(ref_of(listed).digest, "album")
    assert num_read == 2
    assert not (box.home / "downloads" / "album").exists()
    monkeypatch.undo()
    box.reopen()
    assert (box.store.place(ref_of(listed).digest, "album") / "theirs").read_bytes() == DATA


def test_a_database_that_is_none_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "content.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(LocalError, match="damaged"):
        ContentStore(tmp_path, ROOMY)


# --- giving up ------------------------------------------------------------------------------------------
def test_what_is_given_up_leaves_nothing(box: Box) -> None:
    files = {"a": DATA, "b": b"b"}
    ref = ref_of(list_of(files))
    box.store.want(ref, Kind.FOLDER, "album")
    box.receive(list_of(files))
    box.store.missing(ref.digest)
    box.receive(DATA, 1)
    box.receive(b"b")
    assert set(box.store.unwant(ref.digest)) == {ref_of(data).digest for data in (DATA, b"b", list_of(files))}
    assert (box.inner, box.store.wanted(), box.store.digests(), box.store.used_bytes()) == ([], (), (), 0)
    assert box.store.unwant(ref.digest) == ()


def test_what_another_wants_stays(box: Box) -> None:
    ref = ref_of(list_of({"a": DATA}))
    box.store.want(ref_of(DATA), Kind.FILE, "song")
    box.store.want(ref, Kind.FOLDER, "album")
    box.receive(list_of({"a": DATA}))
    box.store.missing(ref.digest)
    box.receive(DATA)
    assert box.store.unwant(ref.digest) == (ref.digest,)
    assert box.store.missing(ref_of(DATA).digest) == ()
    assert box.store.place(ref_of(DATA).digest, "song").read_bytes() == DATA


def test_a_fetch_that_goes_on_after_that_writes_nothing(box: Box) -> None:
    ref = ref_of(DATA)
    box.store.want(ref, Kind.FILE, "song")
    incoming = box.store.incoming(ref)
    incoming.prove(FetchHeader(len(DATA), hash_blob(DATA)[1]))
    box.store.unwant(ref.digest)
    with pytest.raises(LocalError, match="not wanted"):
        incoming.write(0, DATA[:CHUNK_BYTES])
    with pytest.raises(LocalError, match="not wanted"):
        box.store.incoming(ref)
    incoming.held = set(range(4))
    with pytest.raises(LocalError, match="not wanted"):
        box.store.admit(incoming)
    assert box.inner == []


# --- lies and limits --------------------------------------------------------------------------------------
def header_of_size(size_bytes: int) -> tuple[Digest, FetchHeader]:
    hashes = (hashlib.sha256(bytes(CHUNK_BYTES)).digest(),) * num_chunks(size_bytes)
    return digest_of(size_bytes, hashes), FetchHeader(size_bytes, hashes)


def test_a_small_entry_of_a_large_content_is_refused_before_a_byte_is_written(box: Box) -> None:
    """The peer that serves what the digest says is honest: whoever wrote the entry has lied."""
    digest, header = header_of_size(MAX_CONTENT_BYTES)
    lie = ContentRef(digest, 1000)
    box.store.want(lie, Kind.FILE, "small")
    incoming = box.store.incoming(lie)
    with pytest.raises(PeerError, match=f"has {MAX_CONTENT_BYTES} bytes and not 1000") as caught:
        incoming.prove(header)
    assert caught.value.reason not in HOSTILE
    assert (incoming.chunk_hashes, box.inner) == ((), [])


@pytest.mark.parametrize("size_bytes", [1, len(DATA) - 1, len(DATA) + CHUNK_BYTES, MAX_CONTENT_BYTES])
def test_a_header_of_another_size_or_content_is_a_lie_of_the_peer(box: Box, size_bytes: int) -> None:
    ref = ref_of(DATA)
    box.store.want(ref, Kind.FILE, "song")
    _, header = header_of_size(size_bytes)
    with pytest.raises(PeerError) as caught:
        box.store.incoming(ref).prove(header)
    assert caught.value.reason is Reason.WRONG_SIZE
    with pytest.raises(PeerError) as caught:
        box.store.incoming(ref).prove(FetchHeader(len(DATA), header_of_size(len(DATA))[1].chunk_hashes))
    assert caught.value.reason is Reason.WRONG_HASH
    assert box.inner == []


@pytest.mark.parametrize("told", [1, len(DATA) + 1, 9 * CHUNK_BYTES])
def test_the_size_is_what_the_bytes_prove_whatever_was_told(box: Box, told: int) -> None:
    lie = ContentRef(ref_of(DATA).digest, told)
    box.store.want(lie, Kind.FILE, "song")
    header = FetchHeader(len(DATA), hash_blob(DATA)[1])
    with pytest.raises(PeerError) as caught:
        box.store.incoming(lie).prove(header)
    assert caught.value.reason is Reason.BUSY, "ask again, also the same peer"
    assert box.store.incoming(lie).ref == ref_of(DATA)
    assert box.store.progress(lie.digest) == (0, len(DATA))
    box.reopen()
    assert box.store.missing(lie.digest) == (ref_of(DATA),)
    box.receive(DATA)
    assert box.store.place(lie.digest, "song").read_bytes() == DATA


def test_bytes_that_prove_to_be_too_many_are_refused(box: Box) -> None:
    limited(box, max_item_bytes=len(DATA) - 1)
    lie = ContentRef(ref_of(DATA).digest, 1000)
    box.store.want(lie, Kind.FILE, "song")
    header = FetchHeader(len(DATA), hash_blob(DATA)[1])
    with pytest.raises(LocalError, match=r"content\.max_item_bytes"):
        box.store.incoming(lie).prove(header)
    listed = msgspec.msgpack.encode([[["a"], 1, ref_of(DATA).digest], [["b"], 1, ref_of(b"b").digest]])
    box.store.want(ref_of(listed), Kind.FOLDER, "album")
    box.receive(listed)
    with pytest.raises(LocalError, match=r"content\.max_item_bytes"):
        box.store.incoming(box.store.missing(ref_of(listed).digest)[0]).prove(header)
    assert box.store.wanted()[0].ref == lie, "nothing has changed"


def test_a_wrong_chunk_is_not_written(box: Box) -> None:
    box.store.want(ref_of(DATA), Kind.FILE, "song")
    incoming = box.store.incoming(ref_of(DATA))
    incoming.prove(FetchHeader(len(DATA), hash_blob(DATA)[1]))
    with pytest.raises(PeerError):
        incoming.write(0, bytes(CHUNK_BYTES))
    assert not incoming.held
    assert f"{ref_of(DATA).digest.hex()}.part" not in box.inner


def test_the_second_word_of_a_size_is_heard_until_one_is_proved(box: Box) -> None:
    lie = ContentRef(ref_of(DATA).digest, 1000)
    box.store.want(lie, Kind.FILE, "song")
    box.store.incoming(lie)
    box.store.want(ref_of(DATA), Kind.FILE, "song")
    box.receive(DATA, 0)
    box.store.want(lie, Kind.FILE, "song")
    assert box.store.wanted() == ((ref_of(DATA), Kind.FILE, "song"),)
    box.receive(DATA)
    assert box.store.missing(lie.digest) == ()


def test_a_lie_within_a_folder_does_not_disturb_what_is_on_its_way(box: Box) -> None:
    box.store.want(ref_of(DATA), Kind.FILE, "song")
    box.receive(DATA, 0)
    liar = msgspec.msgpack.encode([[["a"], 1000, ref_of(DATA).digest]])
    box.store.want(ref_of(liar), Kind.FOLDER, "album")
    box.receive(liar)
    (lie,) = box.store.missing(ref_of(liar).digest)
    with pytest.raises(LocalError, match=r"bytes, not 1000"):
        box.store.incoming(lie)
    box.receive(DATA)
    assert box.store.place(ref_of(DATA).digest, "song").read_bytes() == DATA


def test_a_folders_list_that_leads_astray_is_refused(box: Box) -> None:
    evil = msgspec.msgpack.encode([[["..", "evil"], 1, ref_of(b"x").digest]])
    box.store.want(ref_of(evil), Kind.FOLDER, "album")
    box.receive(evil)
    with pytest.raises(PeerError) as caught:
        box.store.missing(ref_of(evil).digest)
    assert caught.value.reason is Reason.WRONG_FORMAT
    with pytest.raises(PeerError):
        box.store.place(ref_of(evil).digest, "album")
    assert box.downloads == {}
    box.store.unwant(ref_of(evil).digest)
    assert box.inner == []


def limited(box: Box, **limits: int) -> None:
    box.settings = ContentConfig(**{"min_free_bytes": 0, **limits})
    box.reopen()


def test_what_is_larger_than_allowed_is_refused_with_the_remedy(box: Box) -> None:
    limited(box, max_item_bytes=len(DATA))
    box.store.want(ref_of(DATA), Kind.FILE, "song")
    with pytest.raises(LocalError, match=r"raise content\.max_item_bytes"):
        box.store.want(ContentRef(bytes(32), len(DATA) + 1), Kind.FILE, "film")
    listed = list_of({"a": DATA, "b": b"b"})
    box.store.want(ref_of(listed), Kind.FOLDER, "album")
    box.receive(listed)
    with pytest.raises(LocalError, match=r"raise content\.max_item_bytes"):
        box.store.missing(ref_of(listed).digest)


def test_a_folder_that_names_one_file_often_counts_it_so_often(box: Box) -> None:
    limited(box, max_item_bytes=100_000)
    bomb = list_of({f"{number}": b"x" * 1001 for number in range(100)})
    box.store.want(ref_of(bomb), Kind.FOLDER, "album")
    box.receive(bomb)
    with pytest.raises(LocalError, match="100100 bytes"):
        box.store.missing(ref_of(bomb).digest)


def test_the_quota_counts_what_was_got_and_what_is_wanted(box: Box) -> None:
    limited(box, max_total_bytes=2500)
    path = box.get(b"a" * 1000, "a")
    box.store.want(ContentRef(bytes(32), 1000), Kind.FILE, "b")
    with pytest.raises(LocalError, match=r"raise content\.max_total_bytes"):
        box.store.want(ContentRef(bytes(31) + b"c", 1000), Kind.FILE, "c")
    assert box.store.used_bytes() == 2000
    path.unlink()
    box.store.want(ContentRef(bytes(31) + b"c", 1000), Kind.FILE, "c")
    assert box.store.used_bytes() == 2000


def test_the_quota_holds_for_what_a_folder_turns_out_to_be(box: Box) -> None:
    limited(box, max_total_bytes=1000)
    listed = list_of({"a": bytes(990)})
    box.store.want(ref_of(listed), Kind.FOLDER, "album")
    box.receive(listed)
    with pytest.raises(LocalError, match=r"content\.max_total_bytes"):
        box.store.missing(ref_of(listed).digest)
    assert len(box.store.wanted()) == 1


def test_some_of_the_disk_stays_free(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(box, min_free_bytes=1000)
    free = [1000 + len(DATA)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free[0]))
    box.store.want(ref_of(DATA), Kind.FILE, "song")
    with pytest.raises(LocalError, match=r"lower content\.min_free_bytes"):
        box.store.want(ContentRef(bytes(32), len(DATA) + 1), Kind.FILE, "film")
    box.receive(DATA, 0)
    free[0] = 1000 + CHUNK_BYTES - 1
    with pytest.raises(LocalError, match=r"lower content\.min_free_bytes"):
        box.receive(DATA, 1)
    assert box.store.progress(ref_of(DATA).digest) == (CHUNK_BYTES, len(DATA))
    free[0] = 10**12
    box.receive(DATA)
    assert box.store.holds(ref_of(DATA))


def test_a_link_and_an_endless_list_cannot_be_got(box: Box) -> None:
    with pytest.raises(LocalError, match="no bytes"):
        box.store.want(ref_of(DATA), Kind.LINK, "link")
    with pytest.raises(LocalError, match="list"):
        box.store.want(ContentRef(bytes(32), content_store.MAX_LIST_BYTES + 1), Kind.FOLDER, "album")


# --- beside models, and many at once ------------------------------------------------------------------------
def test_models_and_contents_keep_to_themselves(tmp_path: Path, own: Path) -> None:
    box = Box(tmp_path / "home")
    models = BlobStore(box.home, lambda path: None)
    both = Holdings(models, box.store)
    model = models.save(DATA, 1, 1)
    content = box.store.share_file(write(own / "song", b"song"))
    assert read(both.get(model.digest)) == DATA  # type: ignore[arg-type]
    assert read(both.get(content.digest)) == b"song"  # type: ignore[arg-type]
    assert both.get(bytes(32)) is None
    assert both.holds(model)
    assert both.holds(content)
    assert not both.holds(ref_of(DATA)), "to hold a model is not to have got it"
    assert not both.holds(ModelRef(content.digest, content.size_bytes, 1, 1))
    box.store.want(ref_of(DATA), Kind.MODEL, "model")
    incoming = both.incoming(ref_of(DATA))
    incoming.prove(FetchHeader(len(DATA), hash_blob(DATA)[1]))
    for index, chunk in enumerate(chunks_of(DATA)):
        incoming.write(index, bytes(chunk))
    both.admit(incoming)
    assert both.holds(ref_of(DATA))
    box.store.close()


def test_many_threads_at_once(box: Box, own: Path) -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            data = b"%d" % number
            for turn in range(5):
                ref = box.store.share_file(write(own / f"{number}", data))
                assert read(box.store.get(ref.digest)) == data
                box.get(data + b"-%d" % turn, f"title {number}")
                box.store.digests(), box.store.items(), box.store.recheck()
                box.store.unshare(ref.digest)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert len(box.downloads) == 30


def test_a_large_folder_is_got_in_moderate_time(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is quadratic: what is still missing of many files is a question or two to the database."""
    asked: list[str] = []
    listed = list_of({f"{number}": b"%d" % number for number in range(2000)})
    box.store.want(ref_of(listed), Kind.FOLDER, "album")
    box.receive(listed)
    rows = ContentTables.rows

    def count(tables: ContentTables, query: str, *values: object) -> list[tuple[object, ...]]:
        asked.append(query)
        return rows(tables, query, *values)

    monkeypatch.setattr(ContentTables, "rows", count)
    assert len(box.store.missing(ref_of(listed).digest)) == 2000
    assert len(asked) < 10

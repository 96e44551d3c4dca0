"""The list of a folder's files: what may be in one, what of a directory goes into one, and names made of titles."""

import os
import socket
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import folders
from node.folders import MAX_NAME_BYTES, Folder, FolderFile, find_files, problem_of_name, safe_name
from protocols.errors import LocalError, PeerError
from protocols.vocabulary import MAX_CONTENT_BYTES, Reason

DIGEST = bytes(range(32))


def listed(*paths: str) -> bytes:
    """A list as anybody could write it."""
    return msgspec.msgpack.encode([[path.split("/"), 5, DIGEST] for path in paths])


def refusal(data: bytes) -> PeerError:
    with pytest.raises(PeerError) as caught:
        Folder.from_bytes(data)
    return caught.value


# --- lists ----------------------------------------------------------------------------------------------
def test_a_list_is_read_as_it_was_written() -> None:
    folder = Folder((FolderFile(("a", "ä.txt"), 7, DIGEST), FolderFile(("b",), MAX_CONTENT_BYTES, bytes(32))))
    assert Folder.from_bytes(folder.to_bytes()) == folder
    assert folder.total_bytes == MAX_CONTENT_BYTES + 7


def test_the_list_has_one_form_to_the_byte() -> None:
    (file,) = Folder.from_bytes(data := listed("a.txt")).files
    assert Folder((file,)).to_bytes() == data
    assert data.hex() == "919391a5612e74787405c420" + DIGEST.hex()
    long_number = data.replace(b"\x05\xc4", b"\xcc\x05\xc4")
    assert refusal(long_number).reason is Reason.WRONG_FORMAT


@pytest.mark.parametrize(
    "path",
    [
        "../evil", "a/../../evil", ".", "..", "a/.", "", "/etc/passwd", "a//b", "C:evil", "a\\b", "..\\evil",
        "file:stream", "a\0b", "a\nb", "a\x1b[31mb", "a\x7fb", "a\x85b", "a\u202egpj.exe", "a\u2066b", "a\u2028b",
        "CON", "con.txt", "NUL", "nul .tar.gz", "a/COM1", "lpt9.log", "COM¹", "CONOUT$", "dot.", "blank ",
        "x" * 256, "ä" * 128, "/".join("d" * 33),
    ],
)  # fmt: skip
def test_names_that_lead_astray_are_refused(path: str) -> None:
    assert refusal(listed(path)).reason is Reason.WRONG_FORMAT


@pytest.mark.parametrize(
    "path",
    [
        "a",
        ".hidden",
        "...x",
        "what?.mp3",
        "ä" * 127,
        "日本語.txt",
        "a\u200db",
        "console",
        "COM10",
        "/".join("d" * 32),
    ],
)
def test_usual_names_are_taken(path: str) -> None:
    assert "/".join(Folder.from_bytes(listed(path)).files[0].parts) == path


@pytest.mark.parametrize(
    "paths",
    [
        ("README", "readme"), ("A/x", "a/y"), ("a", "a/b"), ("a/b", "a/b"), ("straße", "STRASSE"),
        ("e\u0301", "\u00e9"), ("\u00c5", "\u212b"), ("d/A/x", "d/a"),
    ],
)  # fmt: skip
def test_two_names_that_are_one_somewhere_are_refused(paths: tuple[str, ...]) -> None:
    for order in (sorted(paths), sorted(paths, reverse=True)):
        assert refusal(listed(*order)).reason is Reason.WRONG_FORMAT


def test_a_list_out_of_order_is_refused() -> None:
    Folder.from_bytes(listed("a", "b"))
    assert "order" in refusal(listed("b", "a")).detail


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xc1", b"\x90", b"\x80", b"\xdd\xff\xff\xff\xff", b"\x91" * 200_000,
        listed("a")[:-1], listed("a") + b"\0",
        msgspec.msgpack.encode([["a", 5, DIGEST]]),
        msgspec.msgpack.encode([[[], 5, DIGEST]]),
        msgspec.msgpack.encode([[["a"], 0, DIGEST]]),
        msgspec.msgpack.encode([[["a"], -1, DIGEST]]),
        msgspec.msgpack.encode([[["a"], 5.0, DIGEST]]),
        msgspec.msgpack.encode([[["a"], "5", DIGEST]]),
        msgspec.msgpack.encode([[["a"], MAX_CONTENT_BYTES + 1, DIGEST]]),
        msgspec.msgpack.encode([[["a"], 5, DIGEST[:-1]]]),
        msgspec.msgpack.encode([[["a"], 5, DIGEST.decode("latin-1")]]),
        msgspec.msgpack.encode([[["a"], 5, DIGEST, 1]]),
        msgspec.msgpack.encode([[[b"a"], 5, DIGEST]]),
        b"\x91\x93\x91\xa1\xff\x05\xc4\x20" + DIGEST,
        msgspec.msgpack.encode([[["a"], 5, DIGEST], [["b"], 6, DIGEST]]),
    ],
)  # fmt: skip
def test_what_is_no_list_is_refused(data: bytes) -> None:
    assert refusal(data).reason is Reason.WRONG_FORMAT


@given(st.binary(max_size=200))
def test_any_bytes_are_a_list_or_a_refusal(data: bytes) -> None:
    try:
        folder = Folder.from_bytes(data)
    except PeerError:
        return
    assert folder.to_bytes() == data


def test_the_limits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(bytes(folders.MAX_LIST_BYTES + 1)).reason is Reason.TOO_LARGE
    many = sorted(f"{number}" for number in range(folders.MAX_FILES + 1))
    assert refusal(listed(*many)).reason is Reason.WRONG_FORMAT
    assert len(Folder.from_bytes(listed(*many[:-1])).files) == folders.MAX_FILES
    monkeypatch.setattr(folders, "MAX_FOLDER_BYTES", 9)
    assert refusal(listed("a", "b")).reason is Reason.TOO_LARGE


def test_a_list_that_names_millions_of_folders_is_refused_early() -> None:
    deep = sorted("/".join([f"{number:05}", *"abcdefgh"]) for number in range(30_000))
    assert "folders" in refusal(listed(*deep)).detail


# --- names from titles ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("A song.mp3", "A song.mp3"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("/abs", "_abs"),
        ("C:\\Windows\\x.dll", "C__Windows_x.dll"),
        ("a\x1b[2Jb\u202ec", "a_[2Jb_c"),
        ("..", "content"),
        ("   ", "content"),
        ("", "content"),
        (".bashrc", "bashrc"),
        ("con.txt", "_con.txt"),
        ("what? <really>", "what_ _really_"),
        ("tab\tand\nline", "tab_and_line"),
        ("日本語", "日本語"),
    ],
)
def test_a_title_becomes_a_name(title: str, name: str) -> None:
    assert safe_name(title) == name


def test_a_long_title_keeps_its_ending() -> None:
    name = safe_name("ä" * 300 + ".flac")
    assert name.endswith("ä.flac")
    assert len(name.encode()) <= folders.MAX_SAFE_NAME_BYTES


@given(st.text(max_size=400))
def test_any_title_becomes_a_harmless_name(title: str) -> None:
    name = safe_name(title)
    assert problem_of_name(name) is None
    assert problem_of_name(f"{name} (9999)") is None
    assert not name.startswith(".")
    assert "/" not in name
    assert len(name.encode()) <= MAX_NAME_BYTES - 16
    assert safe_name(name) == name


# --- directories ------------------------------------------------------------------------------------------
def make(root: Path, *paths: str, data: bytes = b"text") -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def names_of(found: list[Any]) -> list[str]:
    return ["/".join(file.parts) for file in found]


def test_a_directory_is_found_in_order(tmp_path: Path) -> None:
    make(tmp_path, "b", "a/z", "a/a", "a b", "Z")
    found, skipped = find_files(tmp_path)
    assert names_of(found) == ["Z", "a/a", "a/z", "a b", "b"]
    assert [file.size_bytes for file in found] == [4] * 5
    assert skipped == []


def test_what_cannot_be_shared_is_skipped_and_named(tmp_path: Path) -> None:
    make(tmp_path, "good", "sub/.git/config", ".env", "12:30", "a\nb", "nul.txt", "X", "x")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_bytes(b"text")
    found, skipped = find_files(tmp_path)
    assert names_of(found) == ["X", "good"]
    assert {os.fsencode(each.path.name): each.why.split(";")[0] for each in skipped} == {
        b".git": "hidden",
        b".env": "hidden",
        b"12:30": "the name '12:30' holds a character that no name should",
        b"a\nb": "the name 'a\\nb' holds a character that no name should",
        b"nul.txt": "the name 'nul.txt' is that of a device on Windows",
        b"x": "the name 'x' is that of another file or folder here, but for case or accents",
        b"empty": "is empty",
        b"link": "is a symbolic link",
        b"loop": "is a symbolic link",
        b"dangling": "is a symbolic link",
        b"pipe": "is a pipe, a device or a socket",
        b"\xff": "the name '\\udcff' holds a character that no name should",
    }


def test_a_socket_is_skipped() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{folder}/s")
        assert [why for _, why in find_files(Path(folder))[1]] == ["is a pipe, a device or a socket"]


def test_what_lies_too_deep_is_skipped(tmp_path: Path) -> None:
    make(tmp_path, "/".join("d" * 31) + "/file", "/".join("d" * 31) + "/e/file")
    found, skipped = find_files(tmp_path)
    assert [len(file.parts) for file in found] == [32]
    assert [path.name for path, _ in skipped] == ["e"]


def test_a_folder_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a", "b", "c")
    monkeypatch.setattr(folders, "MAX_FILES", 2)
    with pytest.raises(LocalError, match="more than 2 files"):
        find_files(tmp_path)


def test_only_a_real_folder_is_one(tmp_path: Path) -> None:
    make(tmp_path, "file", "folder/file")
    (tmp_path / "link").symlink_to("folder")
    with pytest.raises(LocalError, match="symbolic link"):
        find_files(tmp_path / "link")
    for name in ("file", "nothing"):
        with pytest.raises(LocalError, match="not a folder"):
            find_files(tmp_path / name)


def test_what_is_found_makes_a_list_that_others_take(tmp_path: Path) -> None:
    make(tmp_path, "b", "a/z", "a b", unicodedata.normalize("NFD", "é"), "ß")
    found, _ = find_files(tmp_path)
    folder = Folder(tuple(FolderFile(file.parts, file.size_bytes, DIGEST) for file in found))
    assert Folder.from_bytes(folder.to_bytes()) == folder

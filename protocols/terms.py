"""Words of queries and of what is searched, and how they are hashed for those who share clicks but not words.

Pure text: no language is assumed. Words are runs of letters, marks and digits; scripts that put no blanks between words
give every two neighbouring characters instead (n-grams), so that a query finds what holds it.
"""

import hashlib
import re
import unicodedata
from itertools import pairwise

from protocols.vocabulary import MAX_TERM_CHARS, MAX_TERMS, Digest

HASH_MARK = "#"
MAX_TEXT_CHARS = 8192
"""Of a text, what is beyond is not looked at: putting many marks on one letter in order takes the square of their number."""
_ACCENT = "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
"""Combining marks of Latin, Greek and Cyrillic. Vowel signs of other scripts have blocks of their own: they stay."""
_INVISIBLE = (
    "\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    "\U000e0000-\U000e0fff"
)
"""Joiners, directions, variants and fillers. A zero-width blank is not among them: it ends a word."""
_DROPPED = re.compile(f"[{_ACCENT}{_INVISIBLE}]+")
_NO_LETTER = re.compile(r"[\W_]")
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
    "\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U0001aff0-\U0001b16f\U00020000-\U0003ffff]+)"
)
"""Thai, Lao, Burmese, Khmer and the Tai scripts; then Japanese and Chinese."""


def tokens(text: str) -> list[str]:
    """The words of a text in order, folded so that case, width and accents do not matter, none over `MAX_TERM_CHARS` long.

    Only the first `MAX_TEXT_CHARS` of it count.
    """
    words = _NO_LETTER.sub(_mark_or_blank, _folded(text)).split()
    return [token[:MAX_TERM_CHARS] for word in words for token in _parts(word)]


def query_terms(text: str) -> tuple[str, ...]:
    """The words of a query, each once, at most `MAX_TERMS` of them."""
    return tuple(dict.fromkeys(tokens(text)))[:MAX_TERMS]


def hashed(term: str, network: str) -> str:
    """A term as those see it who may not read it: equal in one network, and of no use in another.

    It hides little from who guesses: there are not that many words. What is hashed already stays as it is.
    """
    if term.startswith(HASH_MARK):
        return term
    digest = hashlib.sha256(b"covey term 1\0" + network.encode() + b"\0" + term.encode())
    return HASH_MARK + digest.hexdigest()[:16]


def item_of_uri(uri: str) -> Digest:
    """The name of an item that is nothing but a URI."""
    return Digest(hashlib.sha256(b"covey uri 1\0" + uri.encode()).digest())


def _folded(text: str) -> str:
    """Compatibility forms, case and accents made one, as Unicode's NFKC_Casefold does it, and accents dropped."""
    bare = _DROPPED.sub("", unicodedata.normalize("NFKD", text[:MAX_TEXT_CHARS]))
    return unicodedata.normalize("NFC", bare.casefold())


def _mark_or_blank(character: re.Match[str]) -> str:
    return character[0] if _is_mark(character[0]) else " "


def _is_mark(character: str) -> bool:
    """Whether it belongs to the letter before it: a vowel sign, a tone mark."""
    return unicodedata.category(character) in ("Mn", "Mc")


def _parts(word: str) -> list[str]:
    """The word itself, or what its script allows to tell apart."""
    if word.isascii():
        return [word]
    runs = _UNSPACED.split(word)  # what is spaced and what is not, by turns
    return [part for at, run in enumerate(runs) if run for part in (_bigrams(run) if at % 2 else [run])]


def _bigrams(run: str) -> list[str]:
    """Every two neighbouring characters, with their marks; of one alone that one."""
    letters: list[str] = []
    for character in run:
        if letters and _is_mark(character):
            letters[-1] += character
        else:
            letters.append(character)
    return [a + b for a, b in pairwise(letters)] or letters

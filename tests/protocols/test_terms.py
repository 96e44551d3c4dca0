"""Words of many scripts: what a person would call the same word is one token, and nothing hostile is costly."""

import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocols.terms import MAX_TEXT_CHARS, hashed, item_of_uri, query_terms, tokens
from protocols.vocabulary import MAX_TERM_CHARS, MAX_TERMS

law = settings(derandomize=True, deadline=None, max_examples=300)

WORDS = {
    "English": ("The Quick, brown-fox (2nd ed.)", "the quick brown fox 2nd ed"),
    "an underscore": ("kind_of_blue.flac", "kind of blue flac"),
    "German": ("Straße STRASSE Übergröße", "strasse strasse ubergrosse"),
    "French": ("Café déjà-vu, l'Œuvre", "cafe deja vu l œuvre"),
    "accents of their own": ("Cafe\u0301", "cafe"),
    "Vietnamese": ("Tiếng Việt", "tieng viet"),
    "Turkish": ("İstanbul ISTANBUL", "istanbul istanbul"),
    "Russian": ("Ёлка МОСКВА", "елка москва"),
    "Greek": ("ΟΔΥΣΣΕΎΣ Οδυσσεύς Ἀθῆναι", "οδυσσευσ οδυσσευσ αθηναι"),
    "Japanese": ("東京都へ行く", "東京 京都 都へ へ行 行く"),
    "repeated characters": ("人々", "人々"),
    "kana of half width": ("ｶﾞｲﾄﾞ ガイド", "ガイ イド ガイ イド"),
    "Chinese": ("机器学习。音乐", "机器 器学 学习 音乐"),
    "a single character": ("猫", "猫"),
    "beyond the first plane": ("𠮷野家", "𠮷野 野家"),
    "Thai": ("ที่นี่ดี", "ที่นี่ นี่ดี"),
    "Lao": ("ລາວ", "ລາ າວ"),
    "Burmese": ("မြန်မာ", "မြန် န်မာ"),
    "Khmer": ("ខ្មែរ", "ខ្មែ មែរ"),
    "Hindi": ("हिन्दी की किताब", "हिन्दी की किताब"),
    "Tamil": ("தமிழ் நூல்", "தமிழ் நூல்"),
    "Arabic": ("كتاب جديد، مكتبة", "كتاب جديد مكتبة"),
    "Hebrew": ("שלום עולם", "שלום עולם"),
    "Korean": ("한국어 검색", "한국어 검색"),
    "Korean in pieces": (unicodedata.normalize("NFD", "한국어"), "한국어"),
    "numbers": ("1959, 3.5 x² ½", "1959 3 5 x2 1 2"),
    "full width": ("ＡＢＣ　１２３", "abc 123"),
    "a ligature": ("ﬁle", "file"),
    "scripts in one word": ("iPhone15東京tower", "iphone15 東京 tower"),
    "emoji": ("house🏠music ❤️ 1️⃣ 👨‍👩‍👧", "house music 1"),
    "signs": ("C# & R&B + #tag @me", "c r b tag me"),
    "a zero-width blank": ("deep\u200bhouse", "deep house"),
    "joiners and soft hyphens": ("deep\u00adhou\u2060se می\u200cخواهم", "deephouse میخواهم"),
    "directions": ("\u202eevil\u202c \u2067name\u2069", "evil name"),
    "control characters": ("a\x00b\x1b[2Jc\x9bd\u2028e", "a b 2jc d e"),
    "half a character": ("a\ud800b", "a b"),
    "struck through": ("s\u0336t\u0336", "st"),
    "nothing": ("", ""),
    "nothing but signs": (" \t?!… \ufeff\u200d", ""),
}


@pytest.mark.parametrize(("text", "words"), WORDS.values(), ids=WORDS)
def test_words_of_many_scripts(text: str, words: str) -> None:
    assert tokens(text) == words.split()


@law
@given(st.text())
@example("か\u3099\u3099 \u0e31ก a\u0e31b")
@example("\u1100\u1161\u11a8")
@example("ß\u0345ᾳŉǰ")
def test_what_is_made_of_tokens_gives_the_same_tokens(text: str) -> None:
    once = tokens(text)
    assert tokens(" ".join(once)) == once


@law
@given(st.text())
def test_a_token_can_be_a_term(text: str) -> None:
    for token in tokens(text):
        assert 1 <= len(token) <= MAX_TERM_CHARS
        assert not token.startswith("#"), "so a hashed term is never a word"
        assert all(unicodedata.category(c)[0] in "LMN" for c in token)
        token.encode()


@law
@given(st.text(st.characters(categories=["Lu", "Ll", "Nd"], max_codepoint=0x24F)))
def test_case_and_form_do_not_matter(text: str) -> None:
    assert tokens(text.upper()) == tokens(text.upper().lower())
    assert tokens(unicodedata.normalize("NFD", text)) == tokens(text)


def test_a_long_word_is_cut() -> None:
    assert tokens("x" * 4_000) == ["x" * MAX_TERM_CHARS]
    assert tokens("ก" + "\u0e38" * 4_000 + "ข") == ["ก" + "\u0e38" * (MAX_TERM_CHARS - 1)]


@pytest.mark.parametrize(
    "piece", ["a", "!", "a ", "東", "\ufdfa", "\u0e01\u0e38\u0e48", "\u05b8\u05b0", "\u0301\u0323"]
)
def test_no_text_is_costly(piece: str) -> None:
    """The longest of these takes some 30 ms. With no bound a quarter of a million marks in disorder took minutes."""
    began = time.perf_counter()
    assert len(tokens(piece * 250_000)) <= 18 * MAX_TEXT_CHARS
    assert time.perf_counter() - began < 1.0


def test_a_query_has_each_word_once_and_not_too_many() -> None:
    assert query_terms("Deep house, DEEP Café cafe") == ("deep", "house", "cafe")
    assert query_terms(" ".join(map(str, range(100)))) == tuple(map(str, range(MAX_TERMS)))
    assert query_terms("?") == ()


def test_hashed_terms_never_change() -> None:
    """`printf 'covey term 1\\0net\\0house' | sha256sum`: other implementations have to meet the same."""
    assert hashed("house", "net") == "#8598c947af51899d"
    assert hashed("東京", "net") == "#4541a20835fd4818"
    assert item_of_uri("https://example.org/a").hex() == (
        "29f3f73a5017a110933c5ad8ce4a4bc62da4cda99d7fb7fa1ab7946977eed498"
    )


def test_hashed_terms_are_of_one_network() -> None:
    assert hashed("house", "net") != hashed("house", "ten")
    assert hashed("house", "net") != hashed("houses", "net")
    assert hashed(hashed("house", "net"), "other") == hashed("house", "net"), "what is hashed stays"
    assert len(hashed("house", "net")) <= MAX_TERM_CHARS

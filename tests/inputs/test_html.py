"""Web pages: their text with its lines, their title and encoding."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

from knnlm.corpus import Corpus, Document
from knnlm.errors import CorpusError, MissingDependency

pytest.importorskip("resiliparse")

PAGE = """<!doctype html>
<html><head><title>The &amp; title</title><meta charset="{charset}"><style>p {{ color: red }}</style><script>var x = 1</script></head>
<body><nav>Menu</nav><h1>Café</h1><p>A paragraph
that goes <b>on</b>.</p><p>Another.</p><ul><li>one<li>two<ol><li>deep</ol></ul>
<pre>def f():
    return 1</pre><table><tr><td>a<td>b<tr><td>c<td>d</table><!-- a comment --></body></html>
"""
TEXT = """Menu

Café

A paragraph that goes on.

Another.

  • one
  • two
    1. deep
def f():
    return 1
a\t\tb
c\t\td"""


def read(path: Path, content: bytes, split_documents: str | None = None) -> list[Document]:
    path.write_bytes(content)
    return list(Corpus([path], split_documents))


@pytest.mark.parametrize("suffix", [".html", ".htm", ".xhtml", ".HTML", ".html.gz"])
def test_text_keeps_its_lines(suffix: str, tmp_path: Path) -> None:
    content = PAGE.format(charset="utf-8").encode()
    name = f"page{suffix}"
    found = read(tmp_path / name, gzip.compress(content) if suffix.endswith(".gz") else content)
    assert found == [Document(name, name, TEXT, metadata={"title": "The & title"})]


@pytest.mark.parametrize(
    ("declared", "encoding", "mark", "noted"),
    [
        ("utf-8", "utf-8", b"", None),
        ("utf-8", "utf-8", b"\xef\xbb\xbf", None),
        ("iso-8859-1", "latin-1", b"", "cp1252"),
        ("windows-1250", "cp1250", b"", "cp1250"),
        ("iso-8859-1", "utf-8", b"", None),
        ("utf-8", "utf-16-le", b"\xff\xfe", "utf-16-le"),
        ("utf-8", "utf-16-be", b"\xfe\xff", "utf-16-be"),
        ("shift_jis", "ascii", b"", None),
    ],
)
def test_the_encoding_is_that_of_mark_bytes_or_declaration(
    declared: str, encoding: str, mark: bytes, noted: str | None, tmp_path: Path
) -> None:
    page = PAGE.format(charset=declared).replace("Café", "Cafe" if encoding == "ascii" else "Café")
    (document,) = read(tmp_path / "a.html", mark + page.encode(encoding))
    assert document.text == TEXT.replace("Café", "Cafe" if encoding == "ascii" else "Café")
    assert document.metadata.get("encoding") == noted


def test_japanese_with_escapes_is_no_utf8(tmp_path: Path) -> None:
    (document,) = read(tmp_path / "a.html", '<meta charset="iso-2022-jp"><p>日本語'.encode("iso-2022-jp"))
    assert document.text == "日本語"


def test_bytes_that_are_not_of_the_declared_encoding_are_a_problem(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"a\.html can't be read as utf-8, the encoding that it declares or seems to have: .*0xe9"):
        read(tmp_path / "a.html", b'<meta charset="utf-8"><p>caf\xe9')
    (tmp_path / "b.html").write_text("<p>b")
    corpus = Corpus([tmp_path], on_error="skip")
    assert [document.text for document in corpus] == ["b"]
    assert corpus.problems.counts == {"unreadable HTML": 1}


def test_a_page_is_cut_as_its_text(tmp_path: Path) -> None:
    found = read(tmp_path / "a.html", b"<title>T</title><h1>= One =</h1><p>text<h1>= Two =</h1><p>more", "^= ")
    assert found == [
        Document("a.html#0", "a.html", "= One =\n\ntext\n\n", metadata={"title": "T", "first_character": 0, "first_line": 1}),
        Document("a.html#1", "a.html", "= Two =\n\nmore", metadata={"title": "T", "first_character": 15, "first_line": 5}),
    ]


@pytest.mark.parametrize("content", [b"", b"<script>only()</script>", b"<title>T</title>"])
def test_a_page_without_text_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(content)
    corpus = Corpus([tmp_path])
    assert [document.text for document in corpus] == [""]
    assert corpus.left_out == {"files without text": ["a.html"]}


def test_a_page_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.html").write_text("<p>a")
    monkeypatch.setitem(sys.modules, "resiliparse", None)
    with pytest.raises(MissingDependency, match=r"a\.html needs resiliparse, which is not installed; pip install 'knnlm\[html\]'"):
        Corpus([tmp_path])

"""What can't be read is fatal or left out, counted and named; nothing is lost in silence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from knnlm.corpus import Corpus
from knnlm.errors import CorpusError, InvalidInput
from knnlm.inputs.problems import NAMED

GOOD = '{"text": "good"}\n'
BROKEN_LINES = [
    ("{", "broken JSON", "line 2 is no JSON"),
    ("[" * 100_000, "broken JSON", "line 2 is no JSON"),
    ("[1]", "no text", 'line 2 has no field "text"'),
    ('{"body": "x"}', "no text", 'line 2 has no field "text"'),
    ('{"text": 3}', "no text", 'line 2 has no field "text"'),
    ('{"text": ""}', "empty text", 'line 2 has an empty field "text"'),
    ('{"text": "a", "x": "\\ud800"}', "half surrogate pairs", "line 2 holds half of a surrogate pair"),
    (b'{"text": "caf\xe9"}', "not UTF-8", "line 2 is not UTF-8: byte 13 of the line is 0xe9"),
]


def zstd(content: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as compressing:
        compressing.write(content)
    return bytes(stream.getvalue())


def texts(corpus: Corpus) -> list[str | None]:
    return [document.text for document in corpus]


@pytest.mark.parametrize(("line", "kind", "said"), BROKEN_LINES, ids=range(len(BROKEN_LINES)))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_broken_line_is_fatal_or_left_out(line: str | bytes, kind: str, said: str, suffix: str, tmp_path: Path) -> None:
    content = GOOD.encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n" + GOOD.encode()
    compress: Any = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}[suffix]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(content))
    with pytest.raises(CorpusError) as refused:
        list(Corpus([path]))
    assert str(refused.value).startswith(f"{path}, {said}")
    assert str(refused.value).endswith("--on-error skip.")
    corpus = Corpus([path], on_error="skip")
    for _ in range(2):  # Counts are of the latest iteration, not of all.
        assert [(d.id, d.text) for d in corpus] == [(f"a{suffix}:1", "good"), (f"a{suffix}:3", "good")]
        assert corpus.problems.counts == {kind: 1}
        assert corpus.problems.total == 1
        assert corpus.problems.first[0].startswith(f"{path}, {said}")


def test_all_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((GOOD + "{\n" + '{"text": ""}\n') * 40)
    corpus = Corpus([tmp_path], on_error="skip")
    assert len(texts(corpus)) == 40
    assert corpus.problems.counts == {"broken JSON": 40, "empty text": 40}
    assert str(corpus.problems) == "40 broken JSON, 40 empty text"
    assert corpus.problems.total == 80
    assert len(corpus.problems.first) == NAMED
    assert [
        sentence.partition(" ")[0] + sentence.partition(",")[2].partition(" is ")[0].partition(" has ")[0]
        for sentence in corpus.problems.first[:4]
    ] == [f"{tmp_path}/a.jsonl, line {line}" for line in (2, 3, 5, 6)]


def test_text_that_is_not_utf8_is_left_out_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"= a\n= b")
    (tmp_path / "b.txt").write_bytes(b"= " + b"x" * (1 << 20) + b"\n= caf\xe9\n= c")
    for cut in (None, "^= "):
        corpus = Corpus([tmp_path], cut, on_error="skip")
        assert "".join(str(text) for text in texts(corpus)) == "= a\n= b"
        assert corpus.problems.first == [f"{tmp_path}/b.txt is not UTF-8: byte {2 + (1 << 20) + 6} is 0xe9."]
        assert corpus.problems.counts == {"not UTF-8": 1}
        assert corpus.bytes_read == corpus.bytes_total


@pytest.mark.parametrize(
    ("content", "at"),
    [
        (b"\xef\xbb\xbfab\xff", 5),
        (b"ab\xe2\x82", 2),
        ("é".encode() * 600_000 + b"\x80", 1_200_000),
        (b"a" * ((1 << 20) - 1) + b"\xe2\x82x", (1 << 20) - 1),
    ],
)
def test_the_place_of_a_wrong_byte_counts_from_the_start_of_the_file(content: bytes, at: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    for cut in (None, "x"):
        with pytest.raises(CorpusError, match=rf"a\.txt is not UTF-8: byte {at} is 0x{content[at]:02x}"):
            list(Corpus([tmp_path / "a.txt"], cut))


LINES = [json.dumps({"text": f"{number} {np.random.default_rng(number).bytes(200).hex()}"}) for number in range(10_000)]


def compressed_lines(suffix: str) -> bytes:
    content = "\n".join(LINES).encode()
    return gzip.compress(content) if suffix == "gz" else zstd(content)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_what_is_read_before_the_damage_stays(suffix: str, damage: str, tmp_path: Path) -> None:
    whole = compressed_lines(suffix)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole + b"junk")
    with pytest.raises(CorpusError, match=rf"a\.jsonl\.{suffix} can't be read to its end"):
        list(Corpus([path]))
    corpus = Corpus([path], on_error="skip")
    found = texts(corpus)
    assert found == [json.loads(line)["text"] for line in LINES[: len(found)]]
    # Zstandard is undone in blocks of 8 KiB, and the one that the damage is in is lost as a whole.
    assert 9_900 < len(found) <= 10_000 if damage == "junk" else 4_000 < len(found) < 6_000
    assert corpus.problems.counts == {"unreadable files": 1}
    assert f"{path} can't be read to its end; {len(found)} documents of it were read: " in corpus.problems.first[0]


def test_a_wrong_checksum_is_a_problem(tmp_path: Path) -> None:
    whole = bytearray(compressed_lines("gz"))
    whole[-6] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    with pytest.raises(CorpusError, match=r"a\.jsonl\.gz can't be read to its end; 9999 documents of it were read: CRC check failed"):
        list(Corpus([tmp_path]))


def test_half_a_text_file_is_no_document_but_its_whole_pieces_are(tmp_path: Path) -> None:
    text = "".join(f"= {number}\n{'text ' * 20_000}\n" for number in range(60))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode())[:-9])
    (tmp_path / "b.txt").write_text("b")
    corpus = Corpus([tmp_path], on_error="skip")
    assert texts(corpus) == ["b"]
    assert corpus.problems.first == [
        f"{tmp_path}/a.txt.gz can't be read: Compressed file ended before the end-of-stream marker was reached."
    ]
    corpus = Corpus([tmp_path], "^= ", on_error="skip")
    *pieces, last = texts(corpus)
    assert last == "b"
    assert 40 < len(pieces) < 60
    assert text.startswith("".join(str(piece) for piece in pieces))
    assert corpus.problems.counts == {"unreadable files": 1}


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortran_order': False, 'shape': (99,)"])
def test_arrays_that_are_none_are_left_out(content: bytes, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "c.npy").write_bytes(content)
    corpus = Corpus([tmp_path], on_error="skip")
    assert [document.id for document in corpus] == ["a.npy"]
    assert corpus.problems.counts == {"no token ids": 1, "unreadable files": 1}


def test_a_file_that_goes_away_is_a_problem(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    corpus = Corpus([tmp_path], on_error="skip")
    (tmp_path / "a.txt").unlink()
    assert texts(corpus) == ["b.txt"]
    assert corpus.problems.first == [f"{tmp_path}/a.txt can't be read: No such file or directory."]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(CorpusError, match=r"No text found.*2 unreadable files, the first: .*a\.txt can't be read"):
        list(corpus)


def test_input_that_yields_nothing_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n[]\n")
    (tmp_path / "b.jsonl").write_text("\n\n")
    (tmp_path / "c.bin").write_bytes(b"\0")
    with pytest.raises(CorpusError) as refused:
        list(Corpus([tmp_path], on_error="skip"))
    said = str(refused.value)
    assert said.startswith(f"No text found in {tmp_path}: 1 broken JSON, 1 no text, the first: {tmp_path}/a.jsonl, line 1 is no JSON")
    assert said.endswith("; 1 binary files, 1 files without text were left out.")


def test_files_without_text_are_named(tmp_path: Path) -> None:
    for name, content in {"a.txt": "", "b.py": "", "c.jsonl": "\n", "d.txt": "text", "e.txt.gz": ""}.items():
        (tmp_path / name).write_text(content)
    corpus = Corpus([tmp_path])
    # A text file is a document, if an empty one: it is left out where tokens are made, and stands in the digest.
    assert texts(corpus) == ["", "", "text", ""]
    assert corpus.left_out == {"files without text": ["a.txt", "b.py", "c.jsonl", "e.txt.gz"]}
    assert corpus.problems.total == 0


def test_another_value_of_on_error_is_refused() -> None:
    with pytest.raises(InvalidInput, match="stop or skip") as refused:
        Corpus(["."], on_error="warn")  # type: ignore[arg-type]
    assert refused.value.field == "on_error"

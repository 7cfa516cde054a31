"""Reading text: which files become which documents, and what is refused with file and place."""

from __future__ import annotations

import gzip
import json
import shutil
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knnlm.corpus import Corpus, Document
from knnlm.errors import CorpusError, InvalidInput
from knnlm.tokenization import Encoding, TextTokenizer
from knnlm.tokenized import CHARACTERS_AT_ONCE, DOCUMENTS_AT_ONCE, tokenize
from tests.tiny import VOCABULARY, tiny_tokenizer


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(*paths: Path, split_documents: str | None = None) -> list[Document]:
    return list(Corpus(paths, split_documents))


def test_a_text_file_is_one_document_with_its_line_ends_kept(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "one\r\ntwo\n\n€"})
    assert read(tmp_path / "a.txt") == [Document("a.txt", "a.txt", "one\r\ntwo\n\n€")]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"\xef\xbb\xbfone", "b.jsonl": b'\xef\xbb\xbf{"text": "two"}\n'})
    assert [document.text for document in read(tmp_path)] == ["one", "two"]


def test_a_folder_is_read_to_any_depth_in_sorted_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.txt": "b", "a/z.md": "z", "a/b/c.py": "c", "without_suffix": "w", "é.txt": "é",
            ".hidden": "h", ".git/config": "g", "a/.cache/x.txt": "x", "picture.png": b"\x89PNG\0\0", "a/late.bin": b"x" * 100 + b"\0",
        },
    )  # fmt: skip
    corpus = Corpus([tmp_path])
    assert [document.id for document in corpus] == ["a/b/c.py", "a/z.md", "b.txt", "without_suffix", "é.txt"]
    assert corpus.skipped == ["a/late.bin", "picture.png"]
    assert not corpus.pretokenized


def test_a_hidden_folder_that_was_named_is_read(tmp_path: Path) -> None:
    write(tmp_path / ".notes", {"a.txt": "a"})
    assert [document.id for document in read(tmp_path / ".notes")] == ["a.txt"]


def test_several_folders_keep_their_names_apart(tmp_path: Path) -> None:
    write(tmp_path, {"one/a.txt": "1", "two/a.txt": "2"})
    assert [(d.id, d.text) for d in read(tmp_path / "one", tmp_path / "two")] == [("one/a.txt", "1"), ("two/a.txt", "2")]


def test_json_lines_are_documents_with_their_fields_as_metadata(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.jsonl": jsonl({"text": "one", "id": "first", "year": 1999, "tags": ["x"]}, {"text": "two"})
            + "\n  \n"
            + jsonl({"text": "six", "id": 6})
        },
    )
    documents = read(tmp_path)
    assert [(d.id, d.source, d.text) for d in documents] == [
        ("first", "a.jsonl", "one"),
        ("a.jsonl:2", "a.jsonl", "two"),
        ("6", "a.jsonl", "six"),
    ]
    assert documents[0].metadata == {"id": "first", "year": 1999, "tags": ["x"]}
    assert documents[1].metadata == {}


@pytest.mark.parametrize(
    "line",
    ["{", "3", "[]", "null", '{"body": "x"}', '{"text": 3}', '{"text": null}', '{"text": "x"} {"text": "y"}', "[" * 100_000, '"text"'],
)
def test_a_line_that_is_no_document_is_refused_with_file_and_line(tmp_path: Path, line: str) -> None:
    write(tmp_path, {"a.jsonl": jsonl({"text": "one"}) + "\n" + line + "\n"})
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 3"):
        read(tmp_path)


def test_json_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": b'{"text": "one"}\n{"text": "caf\xe9"}\n'})
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2"):
        read(tmp_path)


@pytest.mark.parametrize("record", ['{"text": "a\\ud800b"}', '{"text": "a", "id": "\\udfff"}', '{"text": "a", "author": "\\ud800"}'])
def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path, record: str) -> None:
    write(tmp_path, {"a.jsonl": jsonl({"text": "one"}) + record + "\n"})
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2.*surrogate"):
        read(tmp_path)


def test_text_that_is_not_utf8_is_refused_with_file_place_and_byte(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"caf\xe9 au lait"})
    with pytest.raises(CorpusError, match=r"a\.txt.*byte 3.*0xe9"):
        read(tmp_path)


def test_token_arrays_are_documents_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", np.array([3, 1, 2], dtype=np.uint16))
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.int64).reshape(2, 3))
    corpus = Corpus([tmp_path])
    assert corpus.pretokenized
    assert [(d.id, d.source, d.text) for d in corpus] == [("a.npy:0", "a.npy", None), ("a.npy:1", "a.npy", None), ("b.npy", "b.npy", None)]
    assert [np.asarray(d.tokens).tolist() for d in corpus] == [[0, 1, 2], [3, 4, 5], [3, 1, 2]]


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2, 2), dtype=np.int32), np.array(3), np.array(["a"]), np.array([True])])
def test_arrays_of_another_kind_are_refused_with_what_they_are(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CorpusError, match=r"a\.npy.*integer"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"no array", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortran_order': False, 'shape': (99,)"]
)
def test_files_that_are_no_array_are_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {"a.npy": content})
    with pytest.raises(CorpusError, match=r"a\.npy"):
        read(tmp_path)


def test_a_pickled_array_is_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorpusError, match=r"a\.npy"):
        read(tmp_path)


def test_arrays_and_text_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": "text"})
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(CorpusError, match=r"a\.npy.*mixed"):
        Corpus([tmp_path])


def test_split_documents_begins_one_at_each_match_and_loses_nothing(tmp_path: Path) -> None:
    text = "before\n= One =\nbody\nmore\n= Two =\nend"
    write(tmp_path, {"a.txt": text})
    documents = read(tmp_path, split_documents="^= .* =$")
    assert [d.text for d in documents] == ["before\n", "= One =\nbody\nmore\n", "= Two =\nend"]
    assert [d.id for d in documents] == ["a.txt#0", "a.txt#1", "a.txt#2"]
    for document in documents:
        start = document.metadata["first_character"]
        assert text[start:].startswith(document.text or "")
        assert document.metadata["first_line"] == text[:start].count("\n") + 1


@pytest.mark.parametrize("pattern", ["^= .* =$", "nowhere", "(?=b)", "$", "^"])
def test_split_documents_never_changes_the_text(tmp_path: Path, pattern: str) -> None:
    text = "= One =\nb bb\n= Two =\nend\n"
    write(tmp_path, {"a.txt": text})
    assert "".join(d.text or "" for d in read(tmp_path, split_documents=pattern)) == text


def test_a_bad_pattern_is_refused_by_field() -> None:
    with pytest.raises(InvalidInput, match=r"'\(' is no regular expression") as refused:
        Corpus([Path()], "(")
    assert refused.value.field == "split_documents"


def test_an_id_used_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": jsonl({"text": "one", "id": "x"}), "b.jsonl": jsonl({"text": "two", "id": "x"})})
    with pytest.raises(CorpusError, match=r"'x'.*a\.jsonl.*b\.jsonl"):
        read(tmp_path)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no file or folder"):
        Corpus([tmp_path / "nowhere"])
    with pytest.raises(CorpusError, match=r"No text found.*no files"):
        Corpus([tmp_path])
    write(tmp_path, {"a.bin": b"\0", ".b.txt": "hidden"})
    with pytest.raises(CorpusError, match="1 binary"):
        Corpus([tmp_path])


def test_digest_follows_content_and_not_place(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a.txt": "a", "b.jsonl": jsonl({"text": "b", "year": 1})})
    digest = Corpus([one]).read_digest()
    assert Corpus([shutil.copytree(one, tmp_path / "deep" / "two")]).read_digest() == digest
    assert Corpus([one / "a.txt", one / "b.jsonl"]).read_digest() == digest
    for change in (
        {"a.txt": "A"},
        {"b.jsonl": jsonl({"text": "b", "year": 2})},
        {"c.txt": "c"},
        {"b.jsonl": jsonl({"text": "c", "year": 1})},
    ):
        changed = write(shutil.copytree(one, tmp_path / "changed"), change)
        assert Corpus([changed]).read_digest() != digest
        shutil.rmtree(changed)
    (one / "a.txt").rename(one / "aa.txt")
    assert Corpus([one]).read_digest() != digest


def test_digest_tells_apart_where_documents_end(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a.jsonl": jsonl({"text": "ab", "id": 1}, {"text": "c", "id": 2})})
    other = write(tmp_path / "other", {"a.jsonl": jsonl({"text": "a", "id": 1}, {"text": "bc", "id": 2})})
    assert Corpus([one]).read_digest() != Corpus([other]).read_digest()


def test_digest_of_arrays_follows_their_numbers_and_not_their_width(tmp_path: Path) -> None:
    digests = []
    for name, array in (("a", np.arange(3, dtype=np.int32)), ("b", np.arange(3, dtype=np.uint16)), ("c", np.arange(1, 4))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", array)
        digests.append(Corpus([tmp_path / name]).read_digest())
    assert digests[0] == digests[1] != digests[2]


def test_digest_is_what_datastores_carry(tmp_path: Path) -> None:
    """Values of the first format version: another value would refuse to go on with a store that is right."""
    write(
        tmp_path / "text",
        {
            "a/b.txt": "= One =\nZoë 🙂\n= Two =\r\nend\n",
            "a.txt": "",
            "z.jsonl": jsonl({"text": "one", "id": "first", "year": 1999, "tags": ["x", None]}) + "\n" + jsonl({"text": "two é"}),
        },
    )
    (tmp_path / "tokens").mkdir()
    np.save(tmp_path / "tokens" / "t.npy", np.arange(6).reshape(2, 3))
    np.save(tmp_path / "tokens" / "u.npy", np.array([3, 1], dtype=np.uint16))
    assert Corpus([tmp_path / "text"]).read_digest() == "bb727e9dc01d7fb82ab10f958ebb000d"
    assert Corpus([tmp_path / "text"], "^= .* =$").read_digest() == "7f56298a86eb721820d8886192afd15e"
    assert Corpus([tmp_path / "tokens"]).read_digest() == "09355ecde04be8e35ae77555d566f2cb"


def test_digest_comes_with_a_whole_iteration_and_not_before(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    corpus = Corpus([tmp_path])
    assert corpus.digest is None
    next(iter(corpus))
    assert corpus.digest is None
    list(corpus)
    first = corpus.digest
    assert first == corpus.read_digest() == Corpus([tmp_path]).read_digest()
    write(tmp_path, {"b.txt": "changed"})
    assert corpus.read_digest() == first
    list(corpus)
    assert corpus.digest == Corpus([tmp_path]).read_digest() != first


def test_progress_in_bytes(tmp_path: Path) -> None:
    lines = jsonl(*({"text": "x" * 1000} for _ in range(5000)))
    write(tmp_path, {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines.encode()), "c.txt": "é" * 10, "d.txt": ""})
    corpus = Corpus([tmp_path])
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert (corpus.bytes_read, corpus.bytes_total) == (0, sum(sizes))
    for _ in range(2):
        seen = [corpus.bytes_read for _ in corpus]
        assert seen == sorted(seen)
        assert len(set(seen)) > 5
        assert 0 < seen[0] < sizes[0] == seen[5000 - 1] < seen[5000] <= sum(sizes[:2]) == seen[-3]
        assert corpus.bytes_read == sum(sizes)


def test_two_iterations_at_once_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": jsonl({"text": "one"}) + "{\n" + jsonl({"text": "two"})})
    corpus = Corpus([tmp_path], on_error="skip")
    assert [(a.text, b.text) for a, b in zip(corpus, corpus, strict=True)] == [("one", "one"), ("two", "two")]
    assert corpus.problems.total == 1


def test_memory_grows_by_a_few_bytes_a_document(tmp_path: Path) -> None:
    """Ten times the lines, pieces or rows: what Python holds at most grows by no more than the table of ids."""
    peaks = {}
    for count in (2_000, 12_000):
        folder = write(tmp_path / str(count), {"b.txt": "".join(f"= {number}\n{'text ' * 200}\n" for number in range(count))})
        write(folder, {"a.jsonl": jsonl(*({"text": f"{number} " * 200} for number in range(count)))})
        pq.write_table(pa.table({"text": [f"{number} " * 200 for number in range(count)]}), folder / "c.parquet")
        corpus = Corpus([folder], "^= ")
        tracemalloc.start()
        assert sum(1 for _ in corpus) == 3 * count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[12_000] < peaks[2_000] + 3 * 12_000 * 40


def tokenizer(bos: str = "no", eos: bool = False) -> TextTokenizer:
    return TextTokenizer(tiny_tokenizer(), bos, eos)  # type: ignore[arg-type]


def test_tokenized_documents_keep_order_and_leave_out_empty_ones() -> None:
    texts = [f"text {i}" if i % 3 else "" for i in range(150)]
    found = list(tokenize([Document(str(i), "s", text) for i, text in enumerate(texts)], tokenizer("yes", True), VOCABULARY))
    assert [t.document.id for t in found] == [str(i) for i in range(150) if i % 3]
    for item in found:
        assert item.ids.dtype == np.int32
        assert item.spans is not None
        assert item.spans.shape == (len(item.ids), 2)
        assert (item.ids[0], item.ids[-1]) == (0, 0)


@pytest.mark.parametrize("bos", ["yes", "no"])
def test_scored_bytes_are_those_of_all_tokens_but_the_first(bos: str) -> None:
    text = "The €uro 😀"
    (item,) = tokenize([Document("d", "s", text)], tokenizer(bos), VOCABULARY)
    first = "" if bos == "yes" else tokenizer().decode(item.ids[:1].tolist())
    assert item.scored_bytes() == len(text.encode()) - len(first.encode())


def test_token_documents_stay_as_they_are_without_spans_or_special_tokens() -> None:
    (item,) = tokenize([Document("d", "s", tokens=np.array([5, 6, 299]))], tokenizer("yes", True), VOCABULARY)
    assert item.ids.tolist() == [5, 6, 299]
    assert item.spans is None
    assert item.scored_bytes() is None


@pytest.mark.parametrize("ids", [[0, VOCABULARY], [-1, 3], [2**40], [np.iinfo(np.uint64).max]])
def test_token_ids_that_the_model_lacks_are_refused_with_the_document(ids: list[int]) -> None:
    with pytest.raises(CorpusError, match=r"doc7.*vocabulary is 0 to 299"):
        list(tokenize([Document("doc7", "s", tokens=np.array(ids))], tokenizer(), VOCABULARY))


def test_documents_are_tokenized_in_groups_that_are_small_in_text_too() -> None:
    lengths = [10] * 100 + [CHARACTERS_AT_ONCE] * 3 + [CHARACTERS_AT_ONCE // 3] * 7 + [10] * 70
    groups: list[list[int]] = []

    class Recording(TextTokenizer):
        def encode_documents(self, texts: Sequence[str]) -> list[Encoding]:
            groups.append([len(text) for text in texts])
            return [Encoding([1], [(0, 1)]) for _ in texts]

    documents = [Document(str(number), "s", "x" * length) for number, length in enumerate(lengths)]
    found = list(tokenize(documents, Recording(tiny_tokenizer(), "no"), VOCABULARY))
    assert [item.document for item in found] == documents
    assert [length for group in groups for length in group] == lengths
    assert all(len(group) <= DOCUMENTS_AT_ONCE and sum(group[:-1]) < CHARACTERS_AT_ONCE for group in groups)
    assert len(groups) <= 10

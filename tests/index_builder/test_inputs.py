"""From input to store: documents, token ids, special tokens, character spans, lines and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.datastore.reader import LEFT_CONTEXT_TOKENS, Datastore
from knnlm.errors import CorpusError, InvalidInput
from knnlm.model import HFLanguageModel
from tests.stores import build, text_folder, token_folder
from tests.tiny import VOCABULARY, tiny_corpus, tiny_tokenizer

MULTI_BYTE = "Zoë paid 3 € for a café crème.\nThe 農夫 laughed 🙂 loudly.\n"


def opened(inputs: Path | list[Path], folder: Path, model: HFLanguageModel, **settings: Any) -> Datastore:
    build(inputs, folder, model, **{"index": "exact", "max_length": 16, **settings})
    return Datastore.open(folder, verify=True)


@pytest.mark.parametrize("shard_tokens", [30, 262_144])
def test_entries_know_where_they_came_from(shard_tokens: int, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    """Document, character span, line and left context of every entry, against a search through the text itself."""
    texts = ["a", *tiny_corpus(3), "b", MULTI_BYTE, "\n\nA line after two empty ones", "The last."]
    store = opened(text_folder(tmp_path / "corpus", texts), tmp_path / "store", gpt2, shard_tokens=shard_tokens)
    encode, entry = tiny_tokenizer().backend_tokenizer.encode, 0
    for number, text in enumerate(texts):
        encoding = encode(text, add_special_tokens=False)
        for place in range(1, len(encoding.ids)):
            evidence = store.evidence(entry)
            start, end = encoding.offsets[place]
            assert evidence.token_id == int(store.values.slice(entry, entry + 1)[0]) == encoding.ids[place]
            assert evidence.document.id == evidence.document.source == f"story-{number:04}.txt"
            assert (evidence.document.tokens, evidence.document.characters) == (len(encoding.ids), len(text))
            assert evidence.characters == (start, end)
            assert evidence.line == text[:start].count("\n") + 1
            assert evidence.left_context == encoding.ids[max(0, place - LEFT_CONTEXT_TOKENS) : place]
            entry += 1
    assert entry == len(store)


def test_spans_decode_to_the_value_token(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    texts = tiny_corpus(4)
    store = opened(text_folder(tmp_path / "corpus", texts), tmp_path / "store", gpt2)
    tokenizer = tiny_tokenizer()
    for entry in range(len(store)):
        evidence = store.evidence(entry)
        assert evidence.characters is not None
        start, end = evidence.characters
        assert texts[store.documents.of_entry(entry)][start:end] == tokenizer.decode([evidence.token_id])


@pytest.mark.parametrize("entry", [-1, 10**9])
def test_an_entry_that_is_not_there_is_refused(entry: int, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    store = opened(text_folder(tmp_path / "corpus", ["The farmer sold it."]), tmp_path / "store", gpt2)
    with pytest.raises(InvalidInput) as refused:
        store.evidence(entry)
    assert refused.value.field == "entry"


def tokens_of(store: Datastore) -> list[list[int]]:
    starts, counts = store.documents.token_starts.tolist(), store.documents.token_counts.tolist()
    return [store.tokens.slice(start, start + count).tolist() for start, count in zip(starts, counts, strict=True)]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_token_arrays_are_taken_as_they_are(dtype: Any, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    documents = [[5, 6, 7], [8, 9, VOCABULARY - 1]]
    one, rows = tmp_path / "one.npy", tmp_path / "rows.npy"
    np.save(one, np.array(documents[0], dtype=dtype))
    np.save(rows, np.array(documents, dtype=dtype))
    folder = token_folder(tmp_path / "folder", [[3, 4], *documents])
    single = opened(one, tmp_path / "a", gpt2, bos="yes", eos=True)
    assert tokens_of(single) == documents[:1]
    assert single.manifest.text.pretokenized
    assert single.evidence(0).characters is None
    assert single.evidence(0).line is None
    store = opened(rows, tmp_path / "b", gpt2)
    assert tokens_of(store) == documents
    assert list(store.documents.ids()) == ["rows.npy:0", "rows.npy:1"]
    assert tokens_of(opened(folder, tmp_path / "c", gpt2)) == [[3, 4], *documents]


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.array([1, VOCABULARY]), rf"token ids run from 1 to {VOCABULARY}.*0 to {VOCABULARY - 1}"),
        (np.array([1, -1]), "token ids run from -1 to 1"),
        (np.array([1.0, 2.0]), r"1-D or 2-D array of integer token ids, but is float64\[2\]"),
        (np.zeros((2, 2, 2), dtype=np.int32), r"int32\[2, 2, 2\]"),
        (np.array(7), r"int64\[\]"),
        (np.array([], dtype=np.int64), "no entry"),
    ],
)
def test_arrays_that_are_no_tokens_are_refused(array: Any, problem: str, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", array)
    with pytest.raises(CorpusError, match=problem):
        build(tmp_path / "tokens.npy", tmp_path / "store", gpt2)


def test_a_file_that_is_no_array_is_named(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    for number, content in enumerate(
        [b"", b"no array", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x06\x00{'a': ", b"PK\x05\x06" + bytes(18)]
    ):
        path = tmp_path / f"{number}.npy"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=rf"{number}\.npy is no NumPy array"):
            build(path, tmp_path / "store", gpt2)


def test_text_and_arrays_cannot_be_mixed(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    folder = token_folder(tmp_path / "corpus", [[1, 2]])
    (folder / "story.txt").write_text("The farmer.")
    with pytest.raises(CorpusError, match="can't be mixed"):
        build(folder, tmp_path / "store", gpt2)


def test_json_lines_keep_their_other_fields(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    records = [
        {"text": "The farmer sold apples.", "title": "Äpfel", "year": 1901, "tags": ["a", {"b": None}]},
        {"id": "second", "text": "A sailor found it."},
        {"id": 3, "text": "A third."},
    ]
    path = tmp_path / "stories.jsonl"
    path.write_text("\n".join([json.dumps(records[0]), "", *map(json.dumps, records[1:])]))
    store = opened(path, tmp_path / "store", gpt2)
    documents = [store.documents[number] for number in range(3)]
    # Lines are counted as an editor counts them, the empty one too.
    assert [document.id for document in documents] == ["stories.jsonl:1", "second", "3"]
    assert {document.source for document in documents} == {"stories.jsonl"}
    assert documents[0].metadata == {"title": "Äpfel", "year": 1901, "tags": ["a", {"b": None}]}
    assert documents[1].metadata == {"id": "second"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', r"line 2 is no JSON"),
        ('["text"]', r'line 2 has no field "text"'),
        ('{"text": 5}', r'line 2 has no field "text"'),
        ('{"body": "a"}', r'line 2 has no field "text"'),
        ('{"text": "half a pair \\ud800 of surrogates"}', r"line 2"),
        ('{"text": "fine", "id": "\\udc00"}', r"line 2"),
    ],
)
def test_broken_json_lines_are_named(line: str, problem: str, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text('{"text": "The first is fine."}\n' + line + "\n")
    with pytest.raises(CorpusError, match=problem):
        build(path, tmp_path / "store", gpt2)


def test_an_id_that_is_used_twice_is_refused(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text('{"id": "x", "text": "one"}\n{"id": "x", "text": "two"}\n')
    with pytest.raises(CorpusError, match=r"Two documents have the id 'x'"):
        build(path, tmp_path / "store", gpt2)


def test_text_that_is_not_utf8_is_named_with_its_place(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Zoë".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"latin\.txt is not UTF-8: byte 2 is 0xeb"):
        build(tmp_path / "latin.txt", tmp_path / "store", gpt2)


@pytest.mark.parametrize(
    ("model", "bos", "added"),
    [("gpt2", "auto", False), ("llama", "auto", True), ("gpt2", "yes", True), ("llama", "no", False), ("gpt2", "no", False)],
)
def test_bos_as_asked(model: str, bos: str, added: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    texts = ["The farmer sold it.", "A sailor."]
    store = opened(text_folder(tmp_path / "corpus", texts), tmp_path / "store", request.getfixturevalue(model), bos=bos)
    plain = [tiny_tokenizer().encode(text, add_special_tokens=False) for text in texts]
    assert tokens_of(store) == [[0, *ids] if added else ids for ids in plain]
    assert (store.manifest.text.bos, store.manifest.text.bos_id) == (bos, 0 if added else None)
    # With BOS, the first token of the text is a value like any other.
    assert len(store) == sum(map(len, plain)) - (0 if added else len(plain))
    assert store.evidence(0).characters == ((0, 1) if added else (1, 3)) or store.evidence(0).characters is not None
    first = plain[0][0 if added else 1]
    assert store.evidence(0).token_id == first


def test_eos_ends_each_document(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    texts = ["The farmer sold it.", "A sailor."]
    store = opened(text_folder(tmp_path / "corpus", texts), tmp_path / "store", gpt2, eos=True)
    plain = [tiny_tokenizer().encode(text, add_special_tokens=False) for text in texts]
    assert tokens_of(store) == [[*ids, 0] for ids in plain]
    assert (store.manifest.text.eos, store.manifest.text.eos_id) == (True, 0)
    assert store.evidence(len(plain[0]) - 1).characters == (0, 0)


def test_documents_begin_at_each_match(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    text = "Before it all.\n# One\nThe farmer.\n# Two\nA sailor\nfound it.\n"
    (tmp_path / "book.txt").write_text(text)
    store = opened(tmp_path / "book.txt", tmp_path / "store", gpt2, split_documents="^# ")
    documents = [store.documents[number] for number in range(len(store.documents))]
    assert [document.id for document in documents] == ["book.txt#0", "book.txt#1", "book.txt#2"]
    starts = [document.metadata["first_character"] for document in documents]
    assert starts == [0, text.index("# One"), text.index("# Two")]
    assert [document.metadata["first_line"] for document in documents] == [1, 2, 4]
    assert sum(document.characters for document in documents) == len(text)
    assert store.manifest.text.split_documents == "^# "
    pieces = [text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert tokens_of(store) == [tiny_tokenizer().encode(piece, add_special_tokens=False) for piece in pieces]


def test_folders_are_read_in_order_without_hidden_and_binary_files(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in {
        "c.txt": "The miller.",
        "b/a.md": "The farmer.",
        "a": "A sailor.",
        ".git/x.txt": "hidden",
        ".y.txt": "hidden",
    }.items():
        (folder / name).write_text(text)
    (folder / "z.bin").write_bytes(b"\0\1\2")
    build(folder, tmp_path / "store", gpt2, index="exact")
    assert list(Datastore.open(tmp_path / "store").documents.ids()) == ["a", "b/a.md", "c.txt"]
    two = opened([folder, folder / "b"], tmp_path / "both", gpt2)
    assert list(two.documents.ids()) == ["corpus/a", "corpus/b/a.md", "corpus/c.txt", "b/a.md"]

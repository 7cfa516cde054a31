"""Which files a path, a folder, a glob or a URL means, what they are called, and what is left out by name."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from knnlm.corpus import Corpus
from knnlm.errors import CorpusError, MissingDependency
from knnlm.inputs.files import format_of

TREE = {
    "a.md": "one", "a.txt": "two", "guide/b.md": "three", "guide/deep/c.md": "four", "guide/deep/d.txt": "five", "guide.d/e.md": "six",
    ".hidden.md": "hidden", ".notes/f.md": "hidden",
}  # fmt: skip


def tree(folder: Path, files: Iterable[str] = TREE) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(TREE.get(name, "text"))
    return folder


def ids(*paths: str | Path, **settings: Any) -> list[str]:
    return [document.id for document in Corpus(paths, **settings)]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.md", ["a.md"]),
        ("**/*.md", ["a.md", "guide/b.md", "guide/deep/c.md", "guide.d/e.md"]),
        ("guide/**/*.md", ["b.md", "deep/c.md"]),
        ("guide/*", ["b.md", "deep/c.md", "deep/d.txt"]),
        ("*/deep", ["guide/deep/c.md", "guide/deep/d.txt"]),
        ("g*/?.md", ["guide/b.md", "guide.d/e.md"]),
        ("guide*/[bc].md", ["guide/b.md"]),
        ("**/deep/*.txt", ["guide/deep/d.txt"]),
        ("**", ["a.md", "a.txt", "guide/b.md", "guide/deep/c.md", "guide/deep/d.txt", "guide.d/e.md"]),
        (".notes/*", ["f.md"]),
    ],
)
def test_a_glob_means_what_a_shell_would_make_of_it(
    pattern: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that match, all of folders that do, named from the folder above the first wildcard; hidden ones only if named."""
    tree(tmp_path)
    assert ids(f"{tmp_path}/{pattern}") == found
    monkeypatch.chdir(tmp_path)
    assert ids(pattern) == found
    assert ids(Path(pattern)) == found
    assert [document.source for document in Corpus([f"file://{tmp_path}/{pattern}"])] == [
        f"file://{tmp_path}/{'guide/' if pattern.startswith('guide/') else '.notes/' if pattern.startswith('.') else ''}{name}"
        for name in found
    ]


def test_a_glob_looks_only_where_it_can_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    for name, text in TREE.items():
        memory.pipe(f"/looking/{name}", text.encode())
    listed: list[str] = []
    monkeypatch.setattr(MemoryFileSystem, "ls", recording(MemoryFileSystem.ls, listed))
    assert ids("memory://looking/*.md") == ["a.md"]
    assert set(listed) == {"/looking"}
    listed.clear()
    assert ids("memory://looking/guide/d*/*.txt") == ["deep/d.txt"]
    assert set(listed) == {"/looking/guide", "/looking/guide/deep"}


def recording(function: Any, calls: list[str]) -> Any:
    def recorded(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        calls.append(path)
        return function(self, path, *arguments, **options)

    return recorded


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    tree(tmp_path, ["a[1].txt", "a1.txt"])
    assert ids(tmp_path / "a[1].txt") == ["a[1].txt"]
    (tmp_path / "a[1].txt").unlink()
    assert ids(tmp_path / "a[1].txt") == ["a1.txt"]


def test_several_paths_put_the_folder_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.chdir(tmp_path / "guide")
    expected = [f"{name}/{file}" for name in ("guide", "deep") for file in (["b.md", "deep/c.md"] if name == "guide" else ["c.md"])]
    assert ids("**/*.md", "deep/*.md") == expected
    assert ids(".", "deep")[0] == "guide/b.md"
    assert ids("..", "deep")[0] == f"{tmp_path.name}/a.md"
    # A file that is named keeps its own name.
    assert ids("b.md", "deep") == ["b.md", "deep/c.md", "deep/d.txt"]


@pytest.mark.parametrize("path", ["nowhere", "a.md/b", "nowhere/*.md", "a.md/*", "memory://nowhere", "memory://nowhere/*.md"])
def test_where_nothing_is_is_said(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=r"There is no file or folder (memory://)?(nowhere|a\.md)"):
        Corpus([path])


def test_a_glob_without_a_match_and_one_that_is_none_are_said(tmp_path: Path) -> None:
    tree(tmp_path)
    with pytest.raises(CorpusError, match=r"No text found in .*\*\.rst: there are no files"):
        Corpus([f"{tmp_path}/*.rst"])
    with pytest.raises(CorpusError, match=r"a\*\*b is no pattern of file names"):
        Corpus([f"{tmp_path}/a**b"])


def test_a_folder_in_memory_reads_as_one_on_disk(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, text in TREE.items():
        memory.pipe(f"/reading/{name}", text.encode())
    memory.pipe("/reading/picture.png", b"\x89PNG\0")
    local = Corpus([tree(tmp_path)])
    for url in ("memory://reading", "memory://reading/", "memory:///reading"):
        remote = Corpus([url])
        assert [(d.id, d.text) for d in remote] == [(d.id, d.text) for d in local]
        assert [d.source for d in remote] == [f"{url.rstrip('/')}/{d.id}" for d in local]
        assert remote.skipped == ["picture.png"]
        assert remote.digest == local.digest
        assert remote.bytes_read == remote.bytes_total == local.bytes_total == sum(map(len, [d.text or "" for d in local]))


def test_a_file_url_and_token_arrays_below_a_url() -> None:
    memory = fsspec.filesystem("memory")
    buffer = io.BytesIO()
    np.save(buffer, np.arange(6).reshape(2, 3))
    memory.pipe("/arrays/t.npy", buffer.getvalue())
    corpus = Corpus(["memory://arrays/t.npy"])
    documents = list(corpus)
    assert corpus.pretokenized
    assert [(d.id, d.source, np.asarray(d.tokens).tolist()) for d in documents] == [
        ("t.npy:0", "memory://arrays/t.npy", [0, 1, 2]),
        ("t.npy:1", "memory://arrays/t.npy", [3, 4, 5]),
    ]


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("zip://::{zip}", ["t/a.txt", "t/b/c.txt", "u.md"]),
        ("zip://t::{zip}", ["a.txt", "b/c.txt"]),
        ("zip://**/*.txt::{zip}", ["t/a.txt", "t/b/c.txt"]),
        ("zip://u.md::file://{zip}", ["u.md"]),
    ],
)
def test_chained_urls(url: str, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "text.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("t/a.txt", "t/b/c.txt", "u.md"):
            file.writestr(name, name)
    documents = list(Corpus([url.format(zip=path)]))
    assert [document.id for document in documents] == found
    tail = url.format(zip=path).partition("::")[2]
    assert [document.source for document in documents] == [f"zip://{document.text}::{tail}" for document in documents]


def test_a_url_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("knnlm.inputs.places.url_to_fs", missing)
    with pytest.raises(MissingDependency, match=r"s3://bucket/corpus needs a package.*Install s3fs"):
        Corpus(["s3://bucket/corpus"])


def test_a_url_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"nothing://here is no URL that can be read: Protocol not known: nothing"):
        Corpus(["nothing://here"])


def test_a_filesystem_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries below fsspec raise errors of their own: asking, listing and reading."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/failing/a.txt", b"one")
    memory.pipe("/failing/b.txt", b"two")
    for method, said in (("info", "failing can't be read"), ("ls", "failing can't be read"), ("_open", r"a\.txt can't be read")):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, method, failing)
            with pytest.raises(CorpusError, match=rf"memory://.*{said}: no answer"):
                list(Corpus(["memory://failing"]))


def failing(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("no answer")


def test_a_folder_that_cannot_be_listed_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    tree(tmp_path)
    listing = LocalFileSystem.ls

    def refusing(self: Any, path: str, **options: Any) -> Any:
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return listing(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", refusing)
    with pytest.raises(CorpusError, match=r"guide/deep can't be read: .*Permission denied"):
        Corpus([tmp_path])
    corpus = Corpus([tmp_path], on_error="skip")
    for _ in range(2):
        assert len(list(corpus)) == 4
        assert corpus.problems.counts == {"unreadable folders": 1}


def test_links_to_files_are_read_and_those_to_folders_named(tmp_path: Path) -> None:
    tree(tmp_path / "corpus", ["a.txt", "guide/b.md"])
    (tmp_path / "corpus" / "file.txt").symlink_to("a.txt")
    (tmp_path / "corpus" / "folder").symlink_to("guide")
    (tmp_path / "corpus" / "loop").symlink_to(".")
    (tmp_path / "corpus" / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "corpus" / "pipe")
    corpus = Corpus([tmp_path / "corpus"])
    assert [document.id for document in corpus] == ["a.txt", "file.txt", "guide/b.md"]
    assert corpus.left_out == {"links to folders, broken links and devices": ["broken", "folder", "loop", "pipe"]}
    (tmp_path / "named").symlink_to("corpus")
    assert ids(tmp_path / "named") == ["a.txt", "file.txt", "guide/b.md"]


FORMATS = {
    "jsonl": ["a.jsonl", "A.JSONL", "a.ndjson", "a.jsonl.gz", "a.JsonL.ZST"],
    "parquet": ["a.parquet", "a.b.PARQUET"],
    "html": ["a.html", "a.HTM", "a.xhtml.gz"],
    "tokens": ["a.npy"],
    "text": ["a.txt", "a.md.zst", "a.py", "a.json", "a", ".npy", "a.gz", "a.npy.gz", "a.parquet.zst", "a.jsonl.bz2"],
}


def test_a_pipe_is_refused_for_it_can_be_read_once_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="pipe is a pipe or device"):
        Corpus([tmp_path / "pipe"])


@pytest.mark.parametrize(("name", "found"), [(name, found) for found, names in FORMATS.items() for name in names])
def test_formats_by_suffix(name: str, found: str) -> None:
    assert format_of(name) == found

"""``.gitignore`` files leave out what git itself would not add."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.corpus import Corpus
from knnlm.errors import CorpusError
from knnlm.inputs.finding import find_files
from knnlm.inputs.problems import Problems

FILES = [
    "a.txt",
    "b.log",
    "keep.log",
    "d/a.txt",
    "d/b.log",
    "d/e/a.txt",
    "d/e/keep.log",
    "e/a.txt",
    "e/d/b.log",
    "d/e/f/#x",
    "e/!y",
    "e/z ",
]
PATTERNS = st.sampled_from([
    "*.log", "!keep.log", "d", "d/", "/d", "/d/", "d/e", "**/e", "e/**", "d/**/a.txt", "*", "!*/", "!a.txt", "/*.txt", "d/*", "!d/e",
    "!d/e/", "**", "*/*", "!*/*", "[ab].*", "[!a].txt", "?.txt", "\\#x", "\\!y", "#comment", "", " ", "z ", "z\\ ", "*.log\r", "e/a.txt",
    "!/e/", "e*",    "**/d/", "d/e/**", "!d/e/**", "!**/keep.log", "a", "**/a.txt", "/**/a.txt", "!/d/**/keep.log", "e/d", "a.txt/",
    "!b.log",
])  # fmt: skip


ENVIRONMENT = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that git knows, with files that it does not track."""
    if shutil.which("git") is None:
        pytest.skip("needs git to compare with")
    folder = write(tmp_path_factory.mktemp("repository"))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, env=ENVIRONMENT, check=True)
    return folder


def write(folder: Path) -> Path:
    for file in FILES:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("text")
    return folder


def of_git(folder: Path) -> list[str]:
    """The files that git would add, without hidden ones."""
    command = ["git", "ls-files", "-z", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    return sorted(name for name in listed.stdout.decode().split("\0") if name and ".gitignore" not in name)


@settings(max_examples=200)
@given(st.lists(PATTERNS, max_size=6), st.lists(PATTERNS, max_size=4), st.lists(PATTERNS, max_size=3))
def test_what_is_read_is_what_git_would_add(repository: Path, top: list[str], in_d: list[str], in_e: list[str]) -> None:
    for below, lines in (("", top), ("d", in_d), ("d/e", in_e)):
        (repository / below / ".gitignore").write_text("\n".join(lines))
    found = find_files([repository], Problems("stop"))
    assert sorted(file.name for file in found.files) == of_git(repository)


def test_what_is_left_out_is_named_once_with_folders_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / ".gitignore").write_text("d/\n*.log\n!keep.log\n")
    corpus = Corpus([tmp_path])
    assert corpus.ignored == ["b.log", "d/", "e/d/"]
    assert [document.id for document in corpus] == ["a.txt", "e/!y", "e/a.txt", "e/z ", "keep.log"]
    everything = Corpus([tmp_path], gitignore=False)
    assert everything.ignored == []
    assert sorted(document.id for document in everything) == sorted(FILES)


def test_a_file_that_is_named_is_read_and_so_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / ".gitignore").write_text("build\n")
    (tmp_path / "build" / "a.txt").write_text("text")
    assert [document.id for document in Corpus([tmp_path / "build"])] == ["a.txt"]
    assert [document.id for document in Corpus([tmp_path / "build" / "a.txt"])] == ["a.txt"]
    with pytest.raises(CorpusError, match=r"1 files and folders of \.gitignore were left out"):
        Corpus([tmp_path])


def test_a_pattern_that_is_none_is_refused_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / ".gitignore").write_text("\ufeffb.txt\n!\n")
    with pytest.raises(CorpusError, match=r"\.gitignore: .*'!'.*--no-gitignore"):
        Corpus([tmp_path])


def test_rules_below_a_url_are_followed_too() -> None:
    memory = fsspec.filesystem("memory")
    for name, content in {".gitignore": b"*.log", "a.log": b"a", "d/.gitignore": b"!b.log", "d/b.log": b"b", "d/c.log": b"c"}.items():
        memory.pipe(f"/ignoring/{name}", content)
    corpus = Corpus(["memory://ignoring"], gitignore=True)
    assert [document.id for document in corpus] == ["d/b.log"]
    # The rules nearest to a file come first.
    assert corpus.ignored == ["a.log", "d/c.log"]

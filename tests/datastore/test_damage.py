"""A store that was damaged is refused by name, or found by ``verify``; nothing crashes on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.files import write_json_with_checksum
from knnlm.datastore.manifest import MANIFEST
from knnlm.datastore.reader import LARGE_FILES, Datastore
from knnlm.errors import StoreDamaged, StoreNotFound, StoreVersion
from knnlm.model import HFLanguageModel
from tests.stores import build, contents, knnlm, text_folder
from tests.tiny import tiny_corpus

SHARDS = ("00000", "00001", "00002")
SMALL = (
    "settings.json",
    "documents/00000.arrow",
    "index/00000/index.json",
    "search/00000.json",
    *(f"shards/{shard}/receipt.json" for shard in SHARDS),
)
LARGE = (
    "index/00000/index.faiss",
    *(f"shards/{shard}/{name}.npy" for shard in SHARDS for name in ("keys", "values", "tokens", "spans")),
)
LISTED = (*SMALL, *LARGE)
Damage = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build(text_folder(folder / "corpus", tiny_corpus(4)), folder / "store", gpt2, index="Flat", shard_tokens=300, max_length=16)
    return folder / "store"


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def flip(path: Path, at: int, bits: int = 0xFF) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def places(path: Path) -> list[int]:
    """First byte, some within, and the last."""
    size = path.stat().st_size
    return sorted({0, size // 4, size // 2, size - 1})


def test_the_files_of_this_test_are_those_of_the_store(whole: Path) -> None:
    manifest = Datastore.open(whole).manifest
    assert sorted(manifest.files) == sorted(LISTED)
    assert set(contents(whole)) == {*LISTED, MANIFEST}
    assert {Path(name).name for name in LARGE} == LARGE_FILES


@pytest.mark.parametrize("name", LISTED)
def test_a_deleted_file_is_named_with_what_was_expected(name: str, store: Path) -> None:
    size = (store / name).stat().st_size
    (store / name).unlink()
    with pytest.raises(StoreDamaged) as refused:
        Datastore.open(store)
    assert str(store / name) in str(refused.value)
    assert f"{size} bytes" in str(refused.value)
    assert knnlm("verify", store) == 1


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("left", [0, 0.5, -1], ids=["emptied", "half", "one byte short"])
def test_a_truncated_file_is_named_with_both_sizes(name: str, left: float, store: Path) -> None:
    content = (store / name).read_bytes()
    kept = content[:-1] if left == -1 else content[: int(len(content) * left)]
    (store / name).write_bytes(kept)
    with pytest.raises(StoreDamaged) as refused:
        Datastore.open(store)
    assert str(store / name) in str(refused.value)
    assert f"{len(kept)} bytes" in str(refused.value)
    assert str(len(content)) in str(refused.value)


@pytest.mark.parametrize("name", LISTED)
def test_a_byte_too_many_is_noticed(name: str, store: Path) -> None:
    (store / name).write_bytes((store / name).read_bytes() + b"\0")
    with pytest.raises(StoreDamaged, match=Path(name).name):
        Datastore.open(store)


@pytest.mark.parametrize("name", SMALL)
def test_a_flipped_byte_in_a_small_file_is_refused_on_opening(name: str, whole: Path, store: Path) -> None:
    for at in places(whole / name):
        flip(store / name, at)
        with pytest.raises(StoreDamaged, match=r"is damaged.*xxh3 [0-9a-f]{32}.*[0-9a-f]{32}") as refused:
            Datastore.open(store)
        assert str(store / name) in str(refused.value)
        flip(store / name, at)
    Datastore.open(store)


@pytest.mark.parametrize("name", LISTED)
def test_a_flipped_byte_in_any_file_is_found_by_verify(name: str, whole: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at in places(whole / name):
        flip(store / name, at, 0x01)
        with pytest.raises(StoreDamaged) as refused:
            Datastore.open(store, verify=True)
        assert str(store / name) in str(refused.value)
        assert knnlm("verify", store, "--json") == 1
        (damage,) = json.loads(capsys.readouterr().out)["problems"]
        assert str(store / name) in damage
        assert knnlm("inspect", store, "--verify") == 1
        assert str(store / name) in capsys.readouterr().err
        flip(store / name, at, 0x01)
    assert knnlm("verify", store) == 0


def test_verify_names_every_damaged_file(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(store / "shards/00001/keys.npy", -1)
    (store / "shards/00000/spans.npy").unlink()
    assert knnlm("verify", store) == 1
    out = capsys.readouterr().out.replace("\n", "")
    assert "shards/00001/keys.npy" in out
    assert "shards/00000/spans.npy" in out


@pytest.mark.parametrize("part", range(8))
def test_every_byte_of_the_manifest_counts(part: int, whole: Path, store: Path) -> None:
    for at in range(part, (whole / MANIFEST).stat().st_size, 24):
        flip(store / MANIFEST, at, 0x08)
        with pytest.raises(StoreDamaged, match=r"manifest\.json is damaged"):
            Datastore.open(store)
        flip(store / MANIFEST, at, 0x08)


@pytest.mark.parametrize("left", [0, 1, 100, -1, -2])
def test_a_truncated_manifest_is_refused(left: int, store: Path) -> None:
    content = (store / MANIFEST).read_bytes().rstrip()
    (store / MANIFEST).write_bytes(content[:left])
    with pytest.raises(StoreDamaged, match=r"manifest\.json is damaged"):
        Datastore.open(store)


def test_without_manifest_it_is_no_datastore(store: Path, tmp_path: Path) -> None:
    (store / MANIFEST).unlink()
    with pytest.raises(StoreNotFound, match=r"is no datastore.*manifest\.json"):
        Datastore.open(store)
    with pytest.raises(StoreNotFound, match="There is no datastore at"):
        Datastore.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreNotFound):
        Datastore.open(tmp_path / "file")


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("compare", "--text", __file__)], ids=lambda c: c[0])
@pytest.mark.parametrize("name", [MANIFEST, "documents/00000.arrow"])
def test_every_command_refuses_a_damaged_manifest_or_document_table(
    command: tuple[str, ...], name: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(store / name, (store / name).stat().st_size // 2)
    assert knnlm(command[0], store, *command[1:]) == 1
    said = capsys.readouterr()
    assert str(store / name) in (said.out + said.err).replace("\n", "")
    if command[0] != "verify":
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1


def rewritten(store: Path, **changes: Any) -> None:
    """A manifest with other content and a checksum that fits it."""
    content = json.loads((store / MANIFEST).read_bytes())
    del content["checksum"]
    write_json_with_checksum(store / MANIFEST, {**content, **changes})


def test_a_newer_format_is_refused_with_both_versions(store: Path) -> None:
    rewritten(store, format_version=3)
    with pytest.raises(StoreVersion, match=r"format version 3.*reads versions 1 to 2"):
        Datastore.open(store)


def test_a_required_feature_that_is_not_known_is_named(store: Path) -> None:
    rewritten(store, requires=["sparse-keys"])
    with pytest.raises(StoreVersion, match="requires sparse-keys"):
        Datastore.open(store)


FIELDS = (
    "knnlm_version",
    "created",
    "model",
    "key",
    "text",
    "windowing",
    "counts",
    "shards",
    "documents",
    "index",
    "corpus_xxh3",
    "files",
    "requires",
)


TEXTS = {"knnlm_version", "created", "documents", "index", "corpus_xxh3"}
OTHER_KINDS = [(f, v) for f in FIELDS for v in (None, 7, "text", [1], {"a": 1}, True) if not (f in TEXTS and isinstance(v, str))]


@pytest.mark.parametrize(("field", "value"), OTHER_KINDS, ids=str)
def test_a_field_of_another_kind_is_refused_by_name(field: str, value: Any, store: Path) -> None:
    rewritten(store, **{field: value})
    with pytest.raises((StoreDamaged, StoreVersion), match=r"manifest\.json"):
        Datastore.open(store)


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_refused_by_name(field: str, store: Path) -> None:
    content = json.loads((store / MANIFEST).read_bytes())
    del content["checksum"], content[field]
    write_json_with_checksum(store / MANIFEST, content)
    with pytest.raises(StoreDamaged, match=f"lacks {field}"):
        Datastore.open(store)


def test_fields_that_this_version_does_not_know_are_read_over(store: Path) -> None:
    rewritten(store, remark="by hand")
    Datastore.open(store)


@pytest.mark.parametrize("name", ["keys", "values", "tokens", "spans"])
def test_an_array_with_a_damaged_head_is_refused_or_read(name: str, store: Path) -> None:
    """Without --verify the content of large files is not read; then a damaged head must still be no traceback."""
    path = store / "shards" / "00000" / f"{name}.npy"
    head = path.read_bytes().index(b"\n") + 1
    for at in range(head):
        for bits in (0x01, 0x08, 0x10, 0x80):
            flip(path, at, bits)
            try:
                opened = Datastore.open(store)
            except StoreDamaged as refused:
                assert str(path) in str(refused)  # noqa: PT017
            else:
                opened.evidence(0)
            flip(path, at, bits)


# Every byte of these files, with three patterns, was tried once; a sample of them, mostly in the head, stays.
READ_DAMAGED_INDEX = """
import os, resource, sys
from pathlib import Path
import torch
from knnlm.datastore.reader import Datastore
from knnlm.errors import KNNLMError
from knnlm.index import FaissIndex

folder = Path(sys.argv[1])
path = folder / "index.faiss"
content = path.read_bytes()
for at in [*range(0, 100, 5), *range(100, len(content), max(1, len(content) // 6))]:
    for bits in (0x81,):
        damaged = bytearray(content)
        damaged[at] ^= bits
        path.write_bytes(damaged)
        child = os.fork()
        if not child:
            status = 1
            try:
                index = FaissIndex.open(folder)
                index.search(torch.zeros(3, index.facts.dimension), 4, 8, probes=2)
                status = 0
            except KNNLMError:
                status = 0
            except BaseException as error:
                print("byte", at, "bits", bits, repr(error)[:300], flush=True)
            os._exit(status)
        _, ended = os.waitpid(child, 0)
        if ended:
            print("byte", at, "bits", bits, "status", ended, flush=True)
path.write_bytes(content)
"""


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_faiss_reads_no_damaged_index_into_a_crash(factory: str, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    build(text_folder(tmp_path / "corpus", tiny_corpus(4)), tmp_path / "store", gpt2, index=factory, max_length=16)
    script = [sys.executable, "-c", READ_DAMAGED_INDEX, str(tmp_path / "store" / "index" / "00000")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]

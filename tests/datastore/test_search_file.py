"""The file of measured search settings: listed, checked on opening, replaced so that no interrupt leaves half of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore import search_file
from knnlm.datastore.files import file_facts, write_json_with_checksum
from knnlm.datastore.locking import locked
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.search_file import FIRST_SEARCH_FILE, read_search, replace_search, search_settings
from knnlm.errors import StoreDamaged, StoreError, StoreLocked
from knnlm.index import open_index
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from knnlm.search_settings import SearchPoint, SearchSetting, SearchSettings, SearchTuning
from tests.stores import build, contents, forget_settings, knnlm, text_folder
from tests.tiny import tiny_corpus


def point(k: int, probes: int, overfetch: float, total_variation: float = 0.001) -> SearchPoint:
    return SearchPoint(k, probes, overfetch, total_variation, 0.0005, 0.002, 0.003, 0.99, 0.0, 1000)


TUNING = SearchTuning(
    "exact", "stored entries", 128, 0.005, 10.0, 400, 4, True,
    [SearchSetting(4, 2, 1.5), SearchSetting(16, 3, 1.0)],
    [point(4, 2, 1.0, 0.01), point(4, 2, 1.5), point(16, 3, 1.0)],
)  # fmt: skip
OTHER = replace(TUNING, settings=[SearchSetting(16, 3, 1.0)])


@pytest.fixture(scope="module")
def untuned(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    build(text_folder(folder / "corpus", tiny_corpus(8)), folder / "store", gpt2, index="IVF4,SQ8", max_length=16)
    forget_settings(folder / "store")
    return folder / "store"


@pytest.fixture
def store(untuned: Path, tmp_path: Path) -> Path:
    """A store with settings of its own."""
    copy = Path(shutil.copytree(untuned, tmp_path / "store"))
    replace_search(copy, Manifest.read(copy), TUNING)
    return copy


def test_what_was_written_is_read_and_listed(store: Path, untuned: Path) -> None:
    manifest = Manifest.read(store)
    assert manifest.search == FIRST_SEARCH_FILE
    assert read_search(store, manifest) == TUNING
    assert manifest.files[FIRST_SEARCH_FILE] == file_facts(store / FIRST_SEARCH_FILE)
    assert Datastore.open(store, verify=True).search == TUNING
    assert knnlm("verify", store) == 0
    assert replace(manifest, search=None, files=Manifest.read(untuned).files) == Manifest.read(untuned)
    assert Datastore.open(untuned).search is None
    assert json.loads((store / FIRST_SEARCH_FILE).read_text())["met"] is True


def test_searches_use_the_settings_of_the_store(store: Path, untuned: Path) -> None:
    tuned, by_rule = (open_store(path).knn_lm.retriever.settings for path in (store, untuned))
    assert tuned == SearchSettings(4, 400, tuple(TUNING.settings))
    assert by_rule == SearchSettings(4, len(Datastore.open(untuned)))


def test_settings_for_another_index_are_refused_with_what_to_do(store: Path) -> None:
    replace_search(store, Manifest.read(store), replace(TUNING, nlist=9))
    opened = Datastore.open(store)
    index = open_index(store / opened.manifest.index, opened.keys, len(opened))
    with pytest.raises(StoreDamaged, match=r"search/00001\.json was measured with 9 cells.* has 4; .*knnlm doctor .* --apply"):
        search_settings(opened, index)


@pytest.mark.parametrize("at", range(0, 900, 41))
def test_a_flipped_byte_is_refused_on_opening(at: int, store: Path) -> None:
    path = store / FIRST_SEARCH_FILE
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 0x08
    path.write_bytes(content)
    with pytest.raises(StoreDamaged, match=r"search/00000\.json is damaged"):
        Datastore.open(store)
    with pytest.raises(StoreDamaged, match=r"search/00000\.json is damaged"):
        read_search(store, Manifest.read(store))
    assert knnlm("verify", store) == 1


def test_a_missing_file_is_refused_by_name(store: Path) -> None:
    (store / FIRST_SEARCH_FILE).unlink()
    with pytest.raises(StoreDamaged, match=r"search/00000\.json is missing"):
        Datastore.open(store)
    with pytest.raises(StoreDamaged, match=r"search/00000\.json is damaged"):
        read_search(store, Manifest.read(store))


def rewrite(store: Path, content: dict[str, Any]) -> None:
    """Another content under a checksum that fits it, in file and manifest."""
    write_json_with_checksum(store / FIRST_SEARCH_FILE, content)
    manifest = Manifest.read(store)
    replace(manifest, files={**manifest.files, FIRST_SEARCH_FILE: file_facts(store / FIRST_SEARCH_FILE)}).write(store)


SETTINGS = [asdict(setting) for setting in TUNING.settings]
CURVE = [asdict(found) for found in TUNING.curve]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"nlist": "four"}, "nlist"),
        ({"met": 1}, "met"),
        ({"met": False}, "met is False"),
        ({"settings": None}, "settings"),
        ({"settings": SETTINGS[::-1]}, "ascending"),
        ({"settings": [SETTINGS[0], SETTINGS[0]]}, "ascending"),
        ({"settings": [{**SETTINGS[0], "k": 0}]}, "ascending"),
        ({"settings": [{**SETTINGS[0], "probes": 0}]}, "probes is 0 for an index of 4 cells"),
        ({"settings": [{**SETTINGS[0], "probes": 5}]}, "probes is 5 for an index of 4 cells"),
        ({"settings": [{**SETTINGS[0], "overfetch": 0.5}]}, "overfetch.*0.5"),
        ({"settings": [{**SETTINGS[0], "overfetch": 3.0}]}, "not on the curve"),
        ({"settings": [{"k": 4}]}, "lacks overfetch, probes"),
        ({"curve": [{**CURVE[0], "recall": float("nan")}, *CURVE[1:]]}, "not finite"),
        ({"curve": CURVE[:1]}, "not on the curve"),
        ({"curve": [{**CURVE[0], "recall": "high"}]}, "recall"),
    ],
)
def test_what_makes_no_sense_is_refused_by_file(change: dict[str, Any], problem: str, store: Path) -> None:
    rewrite(store, {**asdict(TUNING), **change})
    with pytest.raises(StoreDamaged, match=rf"search/00000\.json.*{problem}"):
        Datastore.open(store)


@pytest.mark.parametrize("field", asdict(TUNING))
def test_a_missing_field_is_refused_by_name(field: str, store: Path) -> None:
    rewrite(store, {name: value for name, value in asdict(TUNING).items() if name != field})
    with pytest.raises(StoreDamaged, match=rf"search/00000\.json.*lacks {field}"):
        Datastore.open(store)


def test_replacing_leaves_the_new_file_alone(store: Path) -> None:
    manifest = replace_search(store, Manifest.read(store), OTHER)
    assert manifest == Manifest.read(store)
    assert manifest.search == "search/00001.json"
    assert [path.name for path in (store / "search").iterdir()] == ["00001.json"]
    assert Datastore.open(store, verify=True).search == OTHER
    assert FIRST_SEARCH_FILE not in manifest.files


def test_documents_may_be_removed_meanwhile_but_the_index_not_replaced(store: Path) -> None:
    measured = Manifest.read(store)
    replace(measured, audit=file_facts(store / "settings.json"), corpus_xxh3="other").write(store)
    assert replace_search(store, measured, OTHER).corpus_xxh3 == "other"
    replace(measured, index="index/00001").write(store)
    with pytest.raises(StoreError, match="was changed while it was measured"):
        replace_search(store, measured, TUNING)


def test_another_writer_is_waited_for(store: Path) -> None:
    before = contents(store)
    with locked(store), pytest.raises(StoreLocked, match=str(store)):
        replace_search(store, Manifest.read(store), OTHER)
    assert contents(store) == before


@pytest.mark.parametrize("step", range(4))
def test_an_interrupt_leaves_the_old_settings_or_the_new(step: int, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the new file, before the manifest, before the old file goes, and after all of it."""
    steps = iter(range(10))

    def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
        def stop_or_go_on(*arguments: Any, **options: Any) -> Any:
            if next(steps) == step:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return stop_or_go_on

    with monkeypatch.context() as patched:
        patched.setattr(search_file, "write_json_with_checksum", stopping(write_json_with_checksum))
        patched.setattr(Manifest, "write", stopping(Manifest.write))
        patched.setattr(Path, "unlink", stopping(Path.unlink))
        if step < 3:
            with pytest.raises(KeyboardInterrupt):
                replace_search(store, Manifest.read(store), OTHER)
        else:
            replace_search(store, Manifest.read(store), OTHER)
    assert Datastore.open(store, verify=True).search == (TUNING if step < 2 else OTHER)
    replace_search(store, Manifest.read(store), OTHER)
    assert Datastore.open(store, verify=True).search == OTHER
    assert len(list((store / "search").iterdir())) == 1

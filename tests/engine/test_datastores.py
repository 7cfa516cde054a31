"""The registry of datastores: what is served under which name, what does not fit, and who holds what for how long."""

from __future__ import annotations

import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch

from knnlm.datastore.profile import Profile
from knnlm.datastore.reader import Datastore
from knnlm.datastore.removal import remove_documents
from knnlm.errors import DocumentNotFound, InvalidInput, StoreDamaged, StoreMismatch, StoreNotFound
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.windows import Windowing
from knnlm_server import datastores as datastores_module
from knnlm_server import store_watch
from knnlm_server.datastores import Datastores, StoreOptions
from knnlm_server.errors import DatastoreLoaded, DatastoreNotLoaded
from knnlm_server.sequence import RetrievalParams
from knnlm_server.served_stores import ChosenStores, shares_of
from tests.changing import append
from tests.engine.serving import mapped, mixing, store_of
from tests.tiny import CONTEXT


@pytest.fixture(scope="module")
def model(tiny_gpt2_path: Path) -> HFLanguageModel:
    return HFLanguageModel.load(tiny_gpt2_path)


@pytest.fixture(scope="module")
def made(model: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores: news, law, and without stored keys codes."""
    folder = tmp_path_factory.mktemp("made")
    store_of(model, folder / "news", seed=1, max_length=16)
    store_of(model, folder / "law", documents=9, seed=2)
    store_of(model, folder / "codes", seed=3, keys="none", index="IVF4,SQ8")
    return folder


@pytest.fixture
def stores(made: Path, tmp_path: Path) -> Path:
    """Copies of them, which a test may change."""
    return Path(shutil.copytree(made, tmp_path / "stores"))


@pytest.fixture
def served(model: HFLanguageModel) -> Datastores:
    return Datastores(model, model.tokenizer())


def names(served: Datastores) -> list[str]:
    return [info.name for info in served.info]


def entries_of(path: Path) -> int:
    return Datastore.open(path).manifest.live_entries


def test_what_is_loaded_is_served_in_order(served: Datastores, stores: Path) -> None:
    info = served.load("news", stores / "news")
    assert (info.name, info.entries, info.documents) == ("news", entries_of(stores / "news"), 6)
    assert (info.key_layer, info.key_dimension, info.distance) == ("last_ffn_input (transformer.h.1.mlp)", 32, "exact")
    assert info.fingerprint == Datastore.open(stores / "news").manifest.fingerprint
    served.load("law", stores / "law")
    served.load("codes", stores / "codes", make_default=True)
    assert names(served) == ["codes", "news", "law"]
    assert [one.distance for one in served.info] == ["index", "exact", "exact"]
    served.unload("codes")
    assert names(served) == ["news", "law"]


def test_each_has_the_settings_of_its_profile_unless_others_are_given(model: HFLanguageModel, stores: Path) -> None:
    Profile(Mixture(5, 3.0, 0.4), "exact", "calibrated").write(stores / "law")
    plain, given = Datastores(model, model.tokenizer()), Datastores(model, model.tokenizer(), StoreOptions(k=7))
    assert plain.load("law", stores / "law").default_retrieval == RetrievalParams(0.4, 5, 3.0)
    info = given.load("law", stores / "law")
    assert (info.default_retrieval, info.defaults_source) == (RetrievalParams(0.4, 7, 3.0), "k given, the rest calibrated profile")


@pytest.mark.parametrize("name", ["", "-a", ".a", "_a", "a b", "a/b", "ä", "a" * 65, "a\n"])
def test_names_that_no_datastore_may_have(served: Datastores, stores: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"name: is .*, but must be 1 to 64 letters"):
        served.load(name, stores / "news")
    assert names(served) == []


def test_the_longest_and_oddest_name(served: Datastores, stores: Path) -> None:
    name = "0-._" + "A" * 60
    served.load(name, stores / "news")
    assert names(served) == [name]


def test_a_name_that_is_taken_and_names_that_are_not(served: Datastores, stores: Path) -> None:
    with pytest.raises(DatastoreNotLoaded, match="No datastore 'law' is loaded; there is none"):
        served.unload("law")
    served.load("news", stores / "news")
    before = served.info
    with pytest.raises(DatastoreLoaded, match="'news' is loaded already"):
        served.load("news", stores / "law")
    for missing in (lambda: served.unload("law"), lambda: served.reload("law"), lambda: served.remove_documents("law", ["x"], {})):
        with pytest.raises(DatastoreNotLoaded, match="No datastore 'law' is loaded; there are news"):
            missing()
    assert served.info == before


def test_what_can_not_be_opened_changes_nothing(served: Datastores, stores: Path) -> None:
    served.load("news", stores / "news")
    before = served.info
    with pytest.raises(StoreNotFound, match="nowhere"):
        served.load("law", stores / "nowhere")
    with pytest.raises(StoreNotFound, match="nowhere"):
        served.reload("news", stores / "nowhere")
    (values,) = (stores / "law").glob("shards/*/values.npy")
    values.write_bytes(values.read_bytes()[:-4])
    with pytest.raises(StoreDamaged, match=r"values\.npy"):
        served.load("law", stores / "law")
    assert served.info == before


def test_a_store_of_another_model_is_refused_with_both_sides(served: Datastores, llama_store: Path) -> None:
    with pytest.raises(StoreMismatch, match=r"can't be served beside what is loaded: .*tiny-llama.*tiny-gpt2"):
        served.load("llama", llama_store)
    assert names(served) == []


def test_special_tokens_must_be_the_same(served: Datastores, model: HFLanguageModel, tmp_path: Path) -> None:
    begun = store_of(model, tmp_path / "begun", bos="yes")
    with pytest.raises(StoreMismatch, match="documents have BOS 0 and no EOS, but the prompts and documents that are served have no BOS"):
        served.load("begun", begun)


def test_a_request_gets_what_it_names(served: Datastores, stores: Path) -> None:
    with pytest.raises(DatastoreNotLoaded, match="No datastore is loaded; a request can only"):
        served.choose(mixing())
    assert served.choose(mixing(weight=0.0)) == ChosenStores()
    for name in ("news", "law", "codes"):
        served.load(name, stores / name)

    def chosen(retrieval: RetrievalParams) -> list[tuple[str, float]]:
        return [(one.name, weight) for one, weight in served.choose(retrieval).weights]

    assert chosen(mixing()) == [("news", 1.0)]
    assert chosen(mixing("law")) == [("law", 1.0)]
    assert chosen(mixing("law", news=0.25)) == [("law", 1.0), ("news", 0.25)]
    with pytest.raises(DatastoreNotLoaded, match="No datastore 'wiki' is loaded; there are codes, law, news"):
        served.choose(mixing("law", "wiki"))
    with pytest.raises(StoreMismatch, match="the kind of distance of 'law' is 'exact', of 'codes' 'index'"):
        served.choose(mixing("law", "codes"))


def test_windows_are_those_of_the_datastore_that_is_named_first(served: Datastores, stores: Path) -> None:
    assert served.windowing(mixing()) == Windowing.for_context(CONTEXT)
    served.load("law", stores / "law")
    served.load("news", stores / "news")
    assert served.windowing(mixing(weight=0.0)) == Windowing.for_context(CONTEXT)
    assert served.windowing(mixing("news", "law")) == Windowing.for_context(CONTEXT, 16)


def test_shares_of_rows_that_chose_differently(served: Datastores, stores: Path) -> None:
    for name in ("news", "law"):
        served.load(name, stores / name)
    rows = [served.choose(one) for one in (mixing("law"), mixing(weight=0.0), mixing("news", law=3.0))]
    weights = {served.numbered(share.number).name: share.weights.tolist() for share in shares_of(rows)}
    assert weights == {"law": [1.0, 0.0, 3.0], "news": [0.0, 0.0, 1.0]}


def test_who_has_chosen_keeps_what_is_unloaded_and_nobody_else(served: Datastores, stores: Path) -> None:
    served.load("news", stores / "news")
    running = served.choose(mixing())
    number = running.weights[0][0].number
    served.unload("news")
    with pytest.raises(DatastoreNotLoaded):
        served.choose(mixing("news"))
    assert served.numbered(number) is running.weights[0][0]
    assert mapped(stores / "news")
    query = torch.zeros(1, 32)
    assert running.mix.retrieve(query, 3).found.all()
    del running
    assert served.in_use() == []
    assert not mapped(stores / "news")


@pytest.mark.parametrize("index", ["exact", "IVF4,SQ8", "Flat"])
def test_a_reload_swaps_at_once_and_lets_the_old_one_go(served: Datastores, model: HFLanguageModel, tmp_path: Path, index: str) -> None:
    path = store_of(model, tmp_path / "store", documents=12, index=index)
    served.load("news", path)
    running = served.choose(mixing("news"))
    old = weakref.ref(running.weights[0][0])
    more = store_of(model, tmp_path / "more", documents=3, seed=9)
    info = served.reload("news", more)
    assert info.entries == entries_of(more)
    (new, _), (kept, _) = served.choose(mixing("news")).weights[0], running.weights[0]
    assert (new is kept, new.number > kept.number) == (False, True)
    assert sorted(one.store.path for one in served.in_use()) == [more, path]
    del running, kept, new
    assert old() is None
    assert not mapped(path)
    assert mapped(more)


def test_a_reload_keeps_its_place_in_the_order(served: Datastores, stores: Path) -> None:
    for name in ("news", "law"):
        served.load(name, stores / name)
    served.reload("news")
    assert names(served) == ["news", "law"]


def test_an_append_is_seen_after_a_reload_and_a_removal_at_once(
    served: Datastores, model: HFLanguageModel, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_watch, "SECONDS_BETWEEN_LOOKS", 1000.0)
    served.load("news", stores / "news")
    before = served.info[0]
    served.look()
    (tmp_path / "late.txt").write_text("Late news from the village near the river.\n")
    append(tmp_path / "late.txt", stores / "news", model)
    served.look()
    assert served.info[0] == before
    after = served.reload("news")
    assert (after.documents, after.entries > before.entries) == (7, True)
    running = served.choose(mixing())
    first = running.weights[0][0].store.documents[0]
    assert served.remove_documents("news", [first.id], {}) == (1, first.tokens - 1)
    assert not running.weights[0][0].store.is_removed(0), "between two looks nothing changes for the engine"
    served.look()
    assert running.weights[0][0].store.is_removed(0)
    assert served.info[0].documents == 6
    assert served.info[0].entries == after.entries - (first.tokens - 1)


def test_removals_of_others_reach_what_only_a_request_still_holds(
    served: Datastores, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_watch, "SECONDS_BETWEEN_LOOKS", 0.0)
    served.load("news", stores / "news")
    running = served.choose(mixing())
    served.unload("news")
    store = running.weights[0][0].store
    remove_documents(stores / "news", [store.documents[2].id])
    served.look()
    first, _ = store.documents.entry_range(2)
    assert store.is_removed(first)


def test_a_removal_that_finds_no_document_removes_none(served: Datastores, stores: Path) -> None:
    served.load("news", stores / "news")
    with pytest.raises(DocumentNotFound, match="nobody"):
        served.remove_documents("news", ["nobody"], {})
    served.look()
    assert served.info[0].documents == 6


def test_those_who_ask_never_wait_for_one_that_is_being_opened(served: Datastores, stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served.load("news", stores / "news")
    opening, go_on, opened = threading.Event(), threading.Event(), datastores_module.open_searchable

    def slow(*args: object, **options: object) -> object:
        opening.set()
        assert go_on.wait(30)
        return opened(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(datastores_module, "open_searchable", slow)
    loading = threading.Thread(target=served.load, args=("law", stores / "law"))
    loading.start()
    assert opening.wait(30)
    served.look()
    assert names(served) == ["news"]
    assert len(served.choose(mixing()).weights) == 1
    go_on.set()
    loading.join(30)
    assert names(served) == ["news", "law"]


def test_changes_from_many_threads_leave_what_one_order_of_them_would(served: Datastores, stores: Path) -> None:
    refused: list[Exception] = []

    def change(number: int) -> None:
        try:
            served.load(f"own-{number}", stores / "news")
            served.load("shared", stores / "law")
            served.reload(f"own-{number}", stores / "law")
            if number % 2:
                served.unload(f"own-{number}")
        except DatastoreLoaded as error:
            refused.append(error)
            served.unload(f"own-{number}")

    threads = [threading.Thread(target=change, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(refused) == 7, "one of them loaded what they share"
    left = set(names(served))
    assert "shared" in left
    assert len(left) in (1, 2)
    assert sorted(one.name for one in served.in_use()) == sorted(left)

"""Keys that float16 can't hold: the build stops and says where, or goes over to float32 and is as if it had begun so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from knnlm.datastore.reader import Datastore
from knnlm.errors import KeyOverflow
from knnlm.model import ModelOutput
from knnlm_index_builder.executors import ProcessExecutor
from knnlm_index_builder.pipeline import BuildResult, build_datastore
from knnlm_index_builder.settings import BuildSettings, Resources
from tests.changing import Held, append, documents_file, problems, table_of
from tests.fake_model import FakeModel
from tests.stores import Silent, contents, token_folder

# Each document but the one with the large key has tokens of its own.
LARGE = 250
DOCUMENTS = [list(range(1, 41)), list(range(50, 90)), [*range(100, 120), LARGE, *range(120, 139)], list(range(150, 190))]
SETTINGS: dict[str, Any] = {"index": "IVF2,SQ8", "max_length": 16, "shard_tokens": 40}


class Overflowing(FakeModel):
    """A token makes the keys at it and after it as large as no float16 is."""

    def forward(self, tokens: Tensor, **options: Any) -> ModelOutput:
        keys = super().forward(tokens, **options).keys
        after = (tokens == LARGE).cumsum(1) > 0
        return ModelOutput(None, keys + 70_000.0 * after[..., None])


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_folder(tmp_path_factory.mktemp("corpus") / "tokens", DOCUMENTS)


def run(corpus: Path, store: Path, model: FakeModel | None = None, workers: int = 1, **settings: Any) -> BuildResult:
    resources = Resources(executor=ProcessExecutor(Overflowing, workers) if workers > 1 else None)
    asked = BuildSettings(**{**SETTINGS, **settings})
    return build_datastore([corpus], store, model or Overflowing(), asked, Silent(), resources)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def in_float32(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that asked for float32."""
    store = tmp_path_factory.mktemp("expected") / "store"
    assert len(run(corpus, store, keys="float32").manifest.shards) == 4
    return store


def test_stop_says_where_and_what_to_do(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyOverflow) as stopped:
        run(corpus, tmp_path / "store")
    said = str(stopped.value)
    assert said.startswith("The key at token 20 of document '0002.npy' has a component of size 7")
    assert "which float16 can't hold; build with --keys float32, or with --on-overflow float32" in said
    assert said.count(". ") == 0
    assert said.endswith(".")
    # What is finished stays, should the text be mended.
    assert (tmp_path / "store" / ".build").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_float32_takes_over(workers: int, corpus: Path, in_float32: Path, tmp_path: Path) -> None:
    manifest = run(corpus, tmp_path / "store", workers=workers, on_overflow="float32").manifest
    require_float32(tmp_path / "store", in_float32)
    assert manifest.key.dtype == "float32"
    # The same command again finds it complete.
    assert run(corpus, tmp_path / "store", on_overflow="float32").already_complete


def require_float32(store: Path, expected: Path) -> None:
    """All of the store is what one is whose build asked for float32, but for what was asked."""
    Held.of(store).require_equal(Held.of(expected))
    keys = Held.of(store).keys
    assert keys is not None
    assert keys.dtype == np.float32
    assert float(np.abs(keys).max()) > 65_504
    assert problems(store) == []
    found, wanted = contents(store), contents(expected)
    for name in ("settings.json", "manifest.json"):
        del found[name], wanted[name]
    assert found == wanted


def test_without_an_overflow_keys_stay_as_asked(corpus: Path, tmp_path: Path) -> None:
    manifest = run(corpus, tmp_path / "store", FakeModel(), on_overflow="float32").manifest
    assert manifest.key.dtype == "float16"


@pytest.mark.parametrize(("dtype", "shards"), [("float16", 1), ("float16", 2), ("float32", 1), ("float32", 3)])
def test_killed_before_and_after_the_change(dtype: str, shards: int, corpus: Path, in_float32: Path, tmp_path: Path) -> None:
    """Ended when so many shards have keys of ``dtype``; the same call goes on."""
    store = tmp_path / "store"

    class Dying(Overflowing):
        def forward(self, tokens: Tensor, **options: Any) -> ModelOutput:
            done = [path.parent / "keys.npy" for path in store.glob("shards/*/receipt.json")]
            if sum(np.load(path, mmap_mode="r").dtype == dtype for path in done) == shards:
                raise Killed
            return super().forward(tokens, **options)

    with pytest.raises(Killed):
        run(corpus, store, Dying(), on_overflow="float32")
    run(corpus, store, on_overflow="float32")
    require_float32(store, in_float32)


def test_an_append_of_it_is_refused_with_what_can_be_done(corpus: Path, tmp_path: Path) -> None:
    """The keys that are there are float16, so the advice of a build would be wrong."""
    old, new = token_folder(tmp_path / "old", DOCUMENTS[:2]), tmp_path / "new"
    new.mkdir()
    np.save(new / "large.npy", DOCUMENTS[2])
    store = tmp_path / "store"
    run(old, store)
    with pytest.raises(KeyOverflow) as refused:
        append(new, store, Overflowing())
    said = str(refused.value)
    assert said.startswith("The key at token 20 of document 'large.npy' has a component of size 7")
    assert said.endswith(f"{store} keeps its keys as float16, so leave this document out, or build all anew with --keys float32.")
    assert "--on-overflow" not in said
    assert len(Datastore.open(store).documents) == 2


def test_an_append_to_float32_keys_takes_it(in_float32: Path, tmp_path: Path) -> None:
    old, new = token_folder(tmp_path / "old", DOCUMENTS[:2]), tmp_path / "new"
    new.mkdir()
    for number in (2, 3):
        np.save(new / f"{number:04}.npy", DOCUMENTS[number])
    run(old, tmp_path / "store", keys="float32")
    append(new, tmp_path / "store", Overflowing())
    Held.of(tmp_path / "store").require_equal(Held.of(in_float32))
    assert table_of(tmp_path / "store") == table_of(in_float32)
    assert problems(tmp_path / "store") == []


def test_keys_in_codes_alone_may_be_as_large(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "store", keys="none")
    assert problems(tmp_path / "store") == []


def test_text_is_named_as_well(tmp_path: Path) -> None:
    corpus = documents_file(tmp_path / "corpus.jsonl", {"fine": "The farmer sold it.", "large": "The farmer sold it again."})
    token = FakeModel().tokenizer().encode("The farmer sold it again.")[-3]

    class Large(FakeModel):
        def forward(self, tokens: Tensor, **options: Any) -> ModelOutput:
            return ModelOutput(None, super().forward(tokens, **options).keys - 1e6 * (tokens == token)[..., None])

    with pytest.raises(KeyOverflow, match=r"at token \d+ of document '(fine|large)'"):
        run(corpus, tmp_path / "store", Large())

"""Where a killed build was, by what it left on the disk; told from real builds that end at a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import resuming
from knnlm.model import HFLanguageModel
from tests.stores import build, text_folder
from tests.tiny import tiny_corpus

SHARDS = 4


class Killed(Exception):
    """Stands for the end of the process."""


def die(*_: Any, **__: Any) -> Iterator[None]:
    raise Killed


@pytest.mark.parametrize(
    ("step", "stage"),
    [
        ("knnlm_index_builder.ingest.write_atomically", resuming.READING),
        ("knnlm_index_builder.pipeline.plan_shards", resuming.ENCODING),
        ("knnlm_index_builder.build_index.train", resuming.TRAINING),
        ("knnlm_index_builder.build_index.fill_part", resuming.FILLING),
        ("knnlm_index_builder.build_index.merge_parts", resuming.FILLING),
        ("knnlm_index_builder.search_stage.tune", resuming.TUNING),
        ("knnlm_index_builder.site.Site.commit", resuming.COMMITTING),
        ("knnlm_index_builder.site.Site.clean_up", resuming.COMMITTING),
    ],
)
def test_stages(step: str, stage: str, gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = text_folder(tmp_path / "corpus", tiny_corpus(8))
    settings: dict[str, Any] = {"index": "IVF4,SQ8", "shard_tokens": 400}
    store = tmp_path / "store"
    store.mkdir()
    assert resuming._stage(store, SHARDS) == resuming.STARTING
    with monkeypatch.context() as patch:
        patch.setattr(step, die)
        with pytest.raises(Killed):
            build(corpus, store, gpt2, **settings)
    assert resuming._stage(store, SHARDS) == stage
    assert len(build(corpus, store, gpt2, **settings).manifest.shards) == SHARDS
    assert resuming._stage(store, SHARDS) == resuming.DONE


def test_equal_builds_are_equal_and_a_byte_makes_a_difference(gpt2: HFLanguageModel, tmp_path: Path) -> None:
    corpus = text_folder(tmp_path / "corpus", tiny_corpus(3))
    for name in ("one", "other"):
        build(corpus, tmp_path / name, gpt2, index="exact")
    assert resuming._contents(tmp_path / "one") == resuming._contents(tmp_path / "other")
    (tmp_path / "other" / "left-over").touch()
    assert resuming._contents(tmp_path / "one") != resuming._contents(tmp_path / "other")

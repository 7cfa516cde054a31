"""Estimates against what a build of the same corpus then takes; what does not fit, and how that is said."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from knnlm.corpus import Corpus
from knnlm.datastore.manifest import Manifest
from knnlm.errors import CorpusError, KeyOverflow
from knnlm.index import read_index_facts
from knnlm.inputs import files, portions, text
from knnlm.model import HFLanguageModel, ModelOutput
from knnlm_index_builder import corpus_size, estimate, machine, needs, speed
from knnlm_index_builder.corpus_size import CorpusSize, measure_corpus
from knnlm_index_builder.estimate import Estimate, estimate_build
from knnlm_index_builder.estimate_report import as_facts
from knnlm_index_builder.index_work import index_work
from knnlm_index_builder.pipeline import append_documents, build_datastore
from knnlm_index_builder.plan_index import plan_index
from knnlm_index_builder.settings import BuildSettings, Resources
from knnlm_index_builder.train_index import choose_factory
from tests.fake_model import FakeModel
from tests.stores import Silent, command, environment, knnlm, text_folder, token_folder
from tests.tiny import tiny_corpus

SETTINGS: dict[str, Any] = {"shard_tokens": 3_000, "max_length": 16}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not looked at here."""
    monkeypatch.setattr(speed, "SECONDS", 0.01)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("corpus") / "stories", [*tiny_corpus(100), "", "a"])


def estimated(inputs: Path, store: Path, model: Any, *, workers: int = 1, memory: int | None = None, **settings: Any) -> Estimate:
    resources = Resources() if memory is None else Resources(memory)
    return estimate_build(Corpus([inputs]), store, model, BuildSettings(**SETTINGS | settings), Silent(), resources, workers=workers)


class DiskWatch:
    """Notes the most that a folder has held when a build told its progress."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.most = folder, 0

    def update(self, stage: str, done: int, total: int | None) -> None:
        self.most = max(self.most, held(self._folder))


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def built(inputs: Path, store: Path, model: Any, **settings: Any) -> tuple[Manifest, int]:
    watch = DiskWatch(store)
    result = build_datastore([inputs], store, model, BuildSettings(**SETTINGS | settings), watch)
    return result.manifest, watch.most


@pytest.mark.parametrize(
    "settings",
    [
        {"keys": "float16", "index": "auto"},
        {"keys": "float32", "index": "exact"},
        {"keys": "float32", "index": "IVF32,SQ8"},
        {"keys": "float16", "index": "IVF32,RaBitQ"},
        {"keys": "float16", "index": "SQ8"},
        {"keys": "none", "index": "auto"},
        {"keys": "none", "index": "IVF32,PQ8x4"},
    ],
    ids=str,
)
def test_counts_and_disk_are_those_of_the_build(settings: dict[str, Any], stories: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    store = tmp_path / "store"
    said = estimated(stories, store, gpt2, **settings)
    assert not store.exists()
    manifest, most = built(stories, store, gpt2, **settings)
    counts = manifest.counts
    assert said.corpus.exact
    assert (said.corpus.documents, said.corpus.tokens, said.corpus.empty) == (counts.documents, counts.tokens, 1)
    assert (said.corpus.entries, said.entries, said.keys) == (counts.entries, counts.entries, manifest.key.dtype)
    assert said.shards == pytest.approx(len(manifest.shards), abs=1)
    assert said.index.factory == read_index_facts(store / manifest.index).factory
    assert said.index.training_points == read_index_facts(store / manifest.index).trained_on
    assert said.disk.store == pytest.approx(held(store), rel=0.05)
    # Looked at between the stages, so a moment of it may be missed.
    assert 0.8 * said.disk.peak < most <= 1.05 * said.disk.peak
    assert said.fits


def test_the_parts_of_a_store_are_those_of_its_files(stories: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    said = estimated(stories, tmp_path, gpt2, keys="float32")
    manifest, _ = built(stories, tmp_path / "store", gpt2, keys="float32")

    def bytes_of(*names: str) -> int:
        return sum(facts.bytes for name, facts in manifest.files.items() if name.endswith(names))

    assert said.disk.keys == pytest.approx(bytes_of("keys.npy"), rel=0.01)
    assert said.disk.tokens == pytest.approx(bytes_of("tokens.npy", "values.npy", "spans.npy"), rel=0.01)
    assert said.disk.documents == pytest.approx(bytes_of(".arrow"), rel=0.1)
    assert said.disk.index == pytest.approx(bytes_of("index.faiss"), rel=0.01)


def test_token_arrays_have_no_spans(tmp_path: Path, gpt2: HFLanguageModel) -> None:
    chance = random.Random(0)
    arrays = token_folder(tmp_path / "arrays", [[chance.randrange(300) for _ in range(chance.randint(2, 900))] for _ in range(60)])
    said = estimated(arrays, tmp_path / "store", gpt2)
    manifest, _ = built(arrays, tmp_path / "store", gpt2)
    assert (said.corpus.documents, said.corpus.tokens) == (manifest.counts.documents, manifest.counts.tokens)
    assert said.disk.store == pytest.approx(held(tmp_path / "store"), rel=0.05)


def uneven(count: int, seed: int) -> list[str]:
    """Texts of 1 to about 200 lines, few of them long."""
    chance = random.Random(seed)
    return ["".join(tiny_corpus(max(1, int(chance.lognormvariate(1.0, 1.0))), seed=chance.randrange(10**6))) for _ in range(count)]


@pytest.mark.parametrize("form", ["files", "lines", "cut"])
def test_a_sample_tells_what_is_in_a_large_corpus(
    form: str, tmp_path: Path, gpt2: HFLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = uneven(1_500, seed=3)
    tokenizer = gpt2.tokenizer()
    counted = [len(encoding.ids) for encoding in tokenizer.encode_documents(texts)]
    separator = None
    if form == "files":
        corpus_path = text_folder(tmp_path / "corpus", texts)
    elif form == "lines":
        (corpus_path := tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        (corpus_path := tmp_path / "corpus.txt").write_text("".join(f"# {text}" for text in texts))
        separator = "^# "
    total = sum(len(text) for text in texts)
    for module in (portions, files, text):
        monkeypatch.setattr(module, "CHUNK", 2_000)
    monkeypatch.setattr(corpus_size, "READ_WHOLE", total - 1)
    monkeypatch.setattr(corpus_size, "READ_AT_MOST", total // 2)
    monkeypatch.setattr(corpus_size, "TOKENIZED_AT_MOST", total // 4)
    corpus = Corpus([corpus_path], separator)
    (tmp_path / "scratch").mkdir()
    said = measure_corpus(corpus, tokenizer, gpt2.vocabulary_size, tmp_path / "scratch", lambda *_: None)
    assert not said.exact
    assert 100 < said.sampled_documents < 600
    extra = 2 * len(texts) if form == "cut" else 0
    assert said.tokens == pytest.approx(sum(counted) + extra, rel=0.1)
    assert said.documents == pytest.approx(len(texts), rel=0.1)
    assert corpus.bytes_read < 0.65 * total


def test_a_corpus_that_is_read_whole_but_tokenised_in_part_has_exact_documents(
    tmp_path: Path, gpt2: HFLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*uneven(400, seed=8), "", ""]
    path = text_folder(tmp_path / "corpus", texts)
    monkeypatch.setattr(corpus_size, "TOKENIZED_AT_MOST", -(-sum(map(len, texts)) // 4))
    said = measure_corpus(Corpus([path]), gpt2.tokenizer(), gpt2.vocabulary_size, tmp_path, lambda *_: None)
    assert (said.documents, said.empty, said.exact) == (400, 2, False)
    assert said.sampled_documents == 400 / 4
    assert said.tokens == pytest.approx(sum(len(e.ids) for e in gpt2.tokenizer().encode_documents(texts)), rel=0.05)


def test_an_append_is_estimated_with_the_settings_of_the_store(stories: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    store, more = tmp_path / "store", text_folder(tmp_path / "more", [f"More: {text}" for text in tiny_corpus(90, seed=5)])
    shutil.copytree(more, tmp_path / "new" / "more")
    built(stories, store, gpt2, index="IVF16,SQ8", keys="float32")
    before, base = held(store), Manifest.read(store)
    assert knnlm("build", tmp_path / "new", "--store", store, "--append", "--estimate") == 0
    assert held(store) == before
    settings = BuildSettings(**SETTINGS, index="IVF16,SQ8", keys="float32")
    said = estimate_build(Corpus([tmp_path / "new"]), store, gpt2, settings, Silent(), Resources(), base=base)
    watch = DiskWatch(store)
    manifest = append_documents(Corpus([tmp_path / "new"]), store, gpt2, watch).manifest
    assert said.corpus.entries == manifest.counts.entries - base.counts.entries
    assert (said.entries, said.index.factory, said.index.training_points) == (manifest.counts.entries, "IVF16,SQ8", 0)
    assert said.disk.store == pytest.approx(held(store) - before, rel=0.05)
    assert 0.8 * said.disk.peak < watch.most - before <= 1.05 * said.disk.peak


def test_arrays_are_not_appended_to_text(stories: Path, gpt2: HFLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(stories, tmp_path / "store", gpt2)
    arrays = token_folder(tmp_path / "arrays", [[1, 2, 3]])
    assert knnlm("build", arrays, "--store", tmp_path / "store", "--append", "--estimate") == 1
    assert "holds text, but the input is token arrays" in capsys.readouterr().err


FIELDS = {"fits", "corpus", "entries", "shards", "keys", "dimension", "index", "disk", "memory", "seconds", "problems"}


def test_the_command_prints_a_verdict_and_writes_nothing(
    stories: Path, tiny_gpt2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("build", stories, "--model", tiny_gpt2_path, "--store", "deep/store", "--estimate")
    assert knnlm(*arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "fits"
    assert knnlm(*arguments, "--json", "--workers", "2") == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == FIELDS
    assert said["fits"] is True
    assert said["problems"] == []
    assert said["seconds"]["total"] == pytest.approx(
        sum(v for name, v in said["seconds"].items() if name not in ("total", "encoding_rate"))
    )
    assert list(tmp_path.iterdir()) == []


def test_every_field_of_the_json_is_documented(stories: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "building.md").read_text()
    for name, value in as_facts(estimated(stories, tmp_path, gpt2)).items():
        for field in [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]:
            assert f"`{field}`" in page, field


def test_too_little_memory_for_the_index(stories: Path, tiny_gpt2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("build", stories, "--model", tiny_gpt2_path, "--store", tmp_path / "store", "--index", "IVF32,SQ8", "--memory", "1MB")
    assert knnlm(*line, "--estimate") == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("does not fit: ")
    assert "but 1000000 are allowed" in verdict
    assert "--memory" in verdict
    assert knnlm(*line) == 2
    assert not (tmp_path / "store").exists()


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("keys", "advice"), [("float32", "--keys float16 needs "), ("float16", "--keys none needs "), ("none", "free some")]
)
def test_too_little_disk(
    keys: str, advice: str, stories: Path, gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 7_000, 7_000))
    said = estimated(stories, tmp_path / "not" / "there", gpt2, keys=keys, index="IVF32,SQ8")
    [problem] = said.problems
    assert not said.fits
    assert said.disk.free == 7_000 < said.disk.peak
    assert "the disk has 7.0 kB free" in problem
    assert advice in problem


def test_advice_about_keys_comes_true(stories: Path, gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = estimated(stories, tmp_path, gpt2, keys="float32", index="IVF32,SQ8").disk.peak
    narrow = estimated(stories, tmp_path, gpt2, keys="float16", index="IVF32,SQ8").disk.peak
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(wide, 0, (wide + narrow) // 2))
    assert not estimated(stories, tmp_path, gpt2, keys="float32", index="IVF32,SQ8").fits
    assert estimated(stories, tmp_path, gpt2, keys="float16", index="IVF32,SQ8").fits


@pytest.mark.parametrize(("workers", "advice"), [(1, "--batch-size"), (2, "fewer --workers")])
def test_too_little_memory_in_the_machine(
    workers: int, advice: str, stories: Path, gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "total_memory", lambda: 10_000_000)
    [problem] = estimated(stories, tmp_path, gpt2, workers=workers).problems
    assert problem.startswith("the machine has 10.0 MB of memory, but ")
    assert advice in problem


def test_workers_each_hold_a_model(stories: Path, gpt2: HFLanguageModel, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    one, two = (estimated(stories, tmp_path, gpt2, workers=workers).memory for workers in (1, 2))
    assert one.encoding == one.process
    assert two.encoding >= 2 * two.process + one.process / 2
    assert torch.get_num_threads() == threads
    # A worker has a shard to make, or is not there.
    assert estimated(stories, tmp_path, gpt2, workers=2, shard_tokens=10**6).memory.encoding < two.encoding


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--index", "IVF32,NONSENSE"), "error: --index 'IVF32,NONSENSE' is no FAISS factory string"),
        (("--index", "IVF99999,SQ8"), "error: --index 'IVF99999,SQ8' has 99999 cells, but there are only "),
        (("--keys", "none", "--index", "Flat"), "error: --index 'Flat' keeps whole keys"),
        (("--max-length", "4000"), "error: --max-length is 4000, but the model's context is 64"),
        (("--memory", "much"), "error: --memory is 'much'"),
    ],
)
def test_what_a_build_refuses_is_refused(
    options: tuple[str, ...], sentence: str, stories: Path, tiny_gpt2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert knnlm("build", stories, "--model", tiny_gpt2_path, "--store", tmp_path / "store", "--estimate", *options) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_corpus_without_entries_is_an_error(tmp_path: Path, gpt2: HFLanguageModel) -> None:
    with pytest.raises(CorpusError, match="The corpus yields no entry: 2 documents with 2 tokens, 1 empty"):
        estimated(text_folder(tmp_path / "corpus", ["a", "", "b"]), tmp_path / "store", gpt2)


class LoudModel(FakeModel):
    """Keys that float16 can't hold."""

    def forward(self, tokens: torch.Tensor, *, logits: bool = True, **_: object) -> ModelOutput:
        return ModelOutput(None, super().forward(tokens, logits=logits).keys * 1e6)


def test_keys_that_overflow_are_found(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyOverflow, match="--keys float32"):
        estimated(stories, tmp_path, LoudModel())
    said = estimated(stories, tmp_path, LoudModel(), on_overflow="float32")
    assert said.keys == "float32"
    assert said.disk.keys == pytest.approx(4 * said.entries * 8, rel=0.02)


class CountingModel(FakeModel):
    """Knows how many tokens it read."""

    read = 0

    def forward(self, tokens: torch.Tensor, *, logits: bool = True, **_: object) -> ModelOutput:
        self.read += tokens.numel()
        return super().forward(tokens, logits=logits)


def test_a_slow_model_reads_two_batches_at_most(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    model = CountingModel()
    said = estimated(stories, tmp_path, model)
    assert 0 < model.read <= 2 * 2048
    assert said.seconds.encoding == pytest.approx(said.corpus.entries / said.seconds.encoding_rate)


@pytest.mark.parametrize("entries", [10**6, 10**7, 10**8, 6 * 10**8])
def test_large_stores_are_sized_without_a_corpus(entries: int) -> None:
    factory = choose_factory(entries, 4096, keys_stored=False)
    plan = plan_index(factory, 4096, entries, keys_stored=False, part_entries=262_144)
    new = CorpusSize(1000, entries + 1000, 0, 100_000, 1000, exact=False, read_seconds=1.0)
    shards = -(-new.tokens // 262_144)
    task = needs.Task(new, entries, shards, 262_144, 1, "none", 4096, plan, spans=True, base=None)
    disk = needs.disk_need(task, 0)
    assert disk.keys == 0
    assert disk.store > entries * (plan.entry_bytes + 16)
    # One shard of keys at a time, never all of them.
    assert disk.peak < 3 * disk.store + 262_144 * 4096 * 4 + plan.training_points * 4096 * 4


def test_work_counts_comparisons_with_cells() -> None:
    plan = plan_index("IVF100,SQ8", 64, 10_000)
    work = index_work(plan, 64, new=5_000, entries=10_000)
    assert work.filling == 5_000 * 100 * 64 * 2
    assert work.training == plan.training_points * 100 * 64 * 2 * 8
    for compares_all in ("exact", "Flat"):
        assert index_work(plan_index(compares_all, 64, 10_000), 64, new=5_000, entries=10_000).searching == 0
    assert work.searching > 2 * 128 * 10_000 * 64
    product = index_work(plan_index("IVF100,PQ8x8np", 64, 10_000), 64, new=5_000, entries=10_000)
    assert product.filling == work.filling + 5_000 * 256 * 64 * 2
    assert product.training > work.training
    graph = index_work(plan_index("IVF10000_HNSW32,SQ8", 64, 10**6), 64, new=5_000, entries=10**6)
    assert graph.filling == 5_000 * 4096 * 64 * 2


def test_a_build_takes_no_more_memory_than_was_told(stories: Path, tiny_gpt2_path: Path, tmp_path: Path) -> None:
    line = ("build", stories, "--model", tiny_gpt2_path, "--store", tmp_path / "store", "--index", "IVF32,SQ8", "--json")
    told = json.loads(command(*line, "--estimate").stdout)["memory"]
    script = "import resource, sys; from knnlm import cli; cli.run(cli.load_commands(), sys.argv[1:]); "
    taken = _peak_of(script, [str(word) for word in line])
    assert told["process"] * 0.8 < taken < told["peak"]


def _peak_of(script: str, arguments: list[str]) -> int:
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment(), check=True)
    return int(done.stdout.splitlines()[-1])

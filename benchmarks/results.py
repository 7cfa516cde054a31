"""docs/results.md, made anew: datastores of several corpora and models built, calibrated and compared, by the product's commands.

``python -m benchmarks.results --data DATA --work FOLDER``. ``DATA`` holds ``CORPUS/{train,valid,test}.txt`` and ``models/``;
``FOLDER`` keeps texts, datastores and figures, so that a run which was stopped goes on. What is tuned is tuned on
validation text, and tested on text that nothing has seen.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import no_regret
from benchmarks.processes import command, environment
from benchmarks.reports import say

MODELS = ("wt2-gpt2-5m", "wt2-llama-5m")
MOST_NEIGHBORS = 256


@dataclass(frozen=True)
class Corpus:
    """A corpus: where its documents begin (None: the file is one), and the bytes that are used of each part."""

    name: str
    title: str
    split: str | None
    train: int = 2_000_000
    valid: int = 160_000
    test: int = 100_000
    negative: int = 24_000


CORPORA = (
    Corpus("wikitext2", "WikiText-2 (English encyclopaedia)", r"(?m)^ = [^=\n]+ = $"),
    Corpus("medquad", "MedQuAD (English medicine)", r"(?m)^Question: "),
    # Three tokens a character: the models know no Chinese.
    Corpus("tangpoems", "Tang poems (classical Chinese)", r"(?<=\n\n)(?=\S)", valid=40_000, test=25_000, negative=8_000),
)
STRANGER = Corpus("shakespeare", "Shakespeare", None, test=40_000)


def main() -> None:
    """Build, calibrate, compare, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args()
    bench = Results(options.data.resolve(), options.work.resolve())
    found = [bench.measure(corpus, model) for model in MODELS for corpus in CORPORA]
    options.out.write_text(page(found))
    say(f"wrote {options.out}")


class Results:
    """Makes what the page shows, each part once."""

    def __init__(self, data: Path, work: Path) -> None:
        self._data, self._work = data, work

    def measure(self, corpus: Corpus, model: str) -> dict[str, Any]:
        """The figures of one datastore, from its file in ``work`` if they are there."""
        path = self._work / f"{corpus.name}-{model}.json"
        if not path.exists():
            store = self._store(corpus, model)
            inspected = json.loads(self._run("inspect", store, "--json"))
            calibrated = self._calibrate(corpus, store)
            compared = json.loads(self._run("compare", store, "--text", self._text(corpus, "test"), *self._split(corpus), "--json"))
            pairs = [
                asdict(no_regret.measure(str(store), str(self._text(other, "test")), other.split, 10_000)) for other in self._tests(corpus)
            ]
            figures = {"corpus": corpus.title, "model": model, "inspected": inspected, "calibrated": calibrated}
            path.write_text(json.dumps({**figures, "compared": compared["stores"][0], "pairs": pairs}, indent=1))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _tests(self, corpus: Corpus) -> list[Corpus]:
        """Its own kind of text, one that is among the negatives of its gate, and one that its gate has never seen."""
        return [corpus, CORPORA[(CORPORA.index(corpus) + 1) % len(CORPORA)], STRANGER]

    def _store(self, corpus: Corpus, model: str) -> Path:
        store = self._work / f"{corpus.name}-{model}"
        if not (store / "manifest.json").exists():
            self._run(
                "build", self._text(corpus, "train"), "--model", self._data / "models" / model, "--store", store, *self._split(corpus)
            )
        return store

    def _calibrate(self, corpus: Corpus, store: Path) -> dict[str, Any]:
        negatives = [part for other in CORPORA if other is not corpus for part in ("--negative-text", self._text(other, "negative"))]
        line = ["--text", self._text(corpus, "valid"), *negatives, *self._split(corpus), "--k", MOST_NEIGHBORS, "--json"]
        found: dict[str, Any] = json.loads(self._run("calibrate", store, *line))
        return {name: value for name, value in found.items() if name != "surface"}

    def _text(self, corpus: Corpus, part: str) -> Path:
        """The beginning of a part of the corpus, cut where a document begins."""
        path = self._work / "text" / f"{corpus.name}-{part}.txt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            source = self._data / corpus.name / f"{'valid' if part == 'negative' else part}.txt"
            content = source.read_bytes()[: getattr(corpus, part)].decode(errors="ignore")
            begins = [0] if corpus.split is None else [match.start() for match in re.finditer(corpus.split, content)]
            path.write_text(content[: begins[-1]] if len(begins) > 1 else content)
        return path

    def _split(self, corpus: Corpus) -> list[str]:
        return [] if corpus.split is None else ["--split-documents", corpus.split]

    def _run(self, *words: object) -> str:
        line = command(*map(str, words))
        say(" ".join(line))
        done = subprocess.run(line, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout


def page(found: list[dict[str, Any]]) -> str:
    """The page, as Markdown."""
    return "\n".join([INTRODUCTION, _results(found), "", NO_REGRET, "", _pairs(found), "", SETTINGS, "", _settings(found), ""])


INTRODUCTION = f"""# Results

Made by one command, `python -m benchmarks.results --data DATA --work FOLDER`, from `DATA/CORPUS/{{train,valid,test}}.txt` and two
small models that were trained on WikiText-2 (5 M parameters, context 256). It runs `knnlm build` on the first 2 MB of each training
part, `knnlm calibrate` on validation text (with beginnings of the two other corpora as negatives, k up to {MOST_NEIGHBORS}), and
`knnlm compare` on test text that nothing has seen. Every number is a mean over all tokens of the test text; intervals are 95 %, of
the paired block bootstrap over documents. What each figure means: [comparing.md](comparing.md). Two of the corpora are far from
what the models know, so their base perplexities are high. Perplexities of one row compare; between corpora nothing does.

## A datastore of the same kind of text

`4-gram` and `cache`: the LM with an n-gram of the same datastore's tokens, and with a cache of the text itself, each at weight 0.2.
Cost: share of the time that search and mixing take beside the forward pass, and bytes of the datastore per token.
"""
NO_REGRET = """## No regret

The same calibrated datastores on three texts: of their own kind; of a kind that is among the negatives that the gate was fitted
with; and Shakespeare, which no gate has seen. `fixed λ` is the best fixed mixture of the validation text. 10,000 tokens of each text;
a gate does no harm where its interval against the base LM holds 0 or lies below."""
RESULT_COLUMNS = [
    "corpus",
    "model",
    "tokens",
    "base LM",
    "LM + 4-gram",
    "LM + cache",
    "kNN-LM",
    "change",
    "bits/byte",
    "not searched",
    "search + mixing",
    "bytes/token",
]
PAIR_COLUMNS = [
    "datastore",
    "model",
    "text",
    "base LM",
    "fixed λ",
    "gate",
    "fixed against base",
    "gate against fixed",
    "gate against base",
    "not searched",
]
SETTINGS = """## What calibration chose

On validation text; the gate is judged on held-out documents of it."""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def _results(found: list[dict[str, Any]]) -> str:
    rows = []
    for one in found:
        compared = one["compared"]
        beside = {baseline["name"]: baseline["perplexity"]["value"] for baseline in compared["baselines"]}
        base, knn, cost = compared["base"], compared["knn"], compared["cost"]
        rows.append([
            one["corpus"], one["model"], f"{compared['tokens']:,}", _perplexity(base), *(_value(value) for value in beside.values()),
            _perplexity(knn), _change(compared["change"], compared["change_interval"]),
            f"{base['bits_per_byte']:.3f} → {knn['bits_per_byte']:.3f}", f"{compared['skipped']:.0%}",
            f"{1 - cost['forward']:.0%}", f"{cost['bytes_per_token']:.0f}",
        ])  # fmt: skip
    return _table(RESULT_COLUMNS, rows)


def _pairs(found: list[dict[str, Any]]) -> str:
    rows = []
    for one in found:
        for pair in one["pairs"]:
            perplexities = [_value(pair[name]) for name in ("base", "fixed", "gated")]
            changes = [_change(*pair[name]) for name in ("fixed_against_base", "against_fixed", "against_base")]
            text = Path(pair["text"]).stem.removesuffix("-test")
            rows.append([one["corpus"], one["model"], text, *perplexities, *changes, f"{pair['skipped']:.0%}"])
    return _table(PAIR_COLUMNS, rows)


def _settings(found: list[dict[str, Any]]) -> str:
    columns = ["datastore", "model", "entries", "index", "k", "T", "λ", "validation tokens", "gate"]
    rows = []
    for one in found:
        chosen, settings = one["calibrated"], one["compared"]["settings"]
        rows.append([
            one["corpus"], one["model"], f"{settings['entries']:,}", settings["index"],
            f"{chosen['k']}", f"{chosen['knn_temperature']:.3g}", f"{chosen['weight']:.3f}",
            f"{chosen['tokens']:,}", settings["gate"] or "none",
        ])  # fmt: skip
    return _table(columns, rows)


def _perplexity(found: dict[str, Any]) -> str:
    return f"{_value(found['value'])} ± {_value(found['standard_error'])}"


def _value(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _change(change: float | None, interval: dict[str, float | None]) -> str:
    if change is None or interval["low"] is None or interval["high"] is None:
        return "—"
    return f"{change:+.1%} [{interval['low']:+.1%}, {interval['high']:+.1%}]"


if __name__ == "__main__":
    main()

"""Passages: which ones are chosen, and that their neighbours are those that the comparison found."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from knnlm import console
from knnlm.evaluation.compare_stores import OpenComparison, compare_opened
from knnlm.evaluation.comparison import PerToken
from knnlm.evaluation.exclusion import Exclusion
from knnlm.evaluation.html_report import passages_of
from knnlm.evaluation.passages import IMPOSSIBLE, SHOWN_NEIGHBORS, Passage, ShownToken, characters, most_changed, most_telling
from knnlm.evaluation.scoring import score
from knnlm.evaluation.text_view import STEPS, show_passages_text, style_of
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from knnlm.tokenization import TextTokenizer
from tests.stores import build, knnlm, text_folder
from tests.tiny import tiny_corpus


@pytest.fixture(scope="module")
def found(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> OpenComparison:
    folder = tmp_path_factory.mktemp("passages")
    corpus = text_folder(folder / "corpus", tiny_corpus(8))
    held = text_folder(folder / "held", tiny_corpus(2, seed=7))
    # A document of the datastore itself, which the comparison leaves out.
    (held / "copy.txt").write_text((corpus / "story-0002.txt").read_text())
    build(corpus, folder / "store", gpt2, index="IVF4,SQ8", keys="float32", max_length=16, stride=6)
    opened = open_store(folder / "store", k=8, temperature=5.0, weight=0.4)
    return compare_opened(opened, [held], name="store")


def made_up(changes: list[float], lengths: list[int]) -> PerToken:
    """Only what passages look at."""
    n = len(changes)
    doc = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:n]
    position = np.concatenate([np.arange(1, length + 1) for length in lengths])[:n]
    values: Any = {name: np.zeros(n) for name in PerToken.__dataclass_fields__}
    values |= {"doc": doc, "position": position, "lm_logprob": np.zeros(n, np.float32), "logprob": np.array(changes, np.float32)}
    return PerToken(**values)


@given(st.data())
def test_the_most_changed_are_chosen(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    changes = data.draw(st.lists(st.sampled_from([-np.inf, -2.0, -0.5, 0.0, 0.25, 3.0]), min_size=sum(lengths), max_size=sum(lengths)))
    count, length = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5))
    per_token = made_up(changes, lengths)
    chosen = most_changed(per_token, count, length)
    blocks: dict[tuple[int, int], list[int]] = {}
    for row in range(len(changes)):
        blocks.setdefault((int(per_token.doc[row]), int(per_token.position[row]) // length), []).append(row)
    sums = {key: sum(max(changes[row], -IMPOSSIBLE) for row in rows) for key, rows in blocks.items()}
    gained = sorted((total for total in sums.values() if total > 0), reverse=True)
    lost = sorted(total for total in sums.values() if total < 0)
    worst = min(count // 2, len(lost))
    best = gained[: count - worst]
    expected = [*best, *lost[: count - len(best)]]
    assert [sum(max(changes[row], -IMPOSSIBLE) for row in rows) for rows in chosen] == pytest.approx(expected)
    assert all(rows.tolist() in blocks.values() for rows in chosen)
    assert len({int(rows[0]) for rows in chosen}) == len(chosen) == min(count, len(gained) + len(lost))


def test_neighbors_are_those_of_the_comparison(found: OpenComparison) -> None:
    """Against a search of everything, batch by batch, as comparisons make it."""
    opened, per_token = found.opened, found.compared.comparison.per_token
    copied = {document.id for document in found.compared.comparison.leakage.excluded}
    assert copied == {"story-0002.txt"}
    passages = passages_of(found, 99)
    assert {passage.document for passage in passages} == {document.document.id for document in found.text}
    names = [document.document.id for document in found.text]
    for passage in passages:
        for place, token in enumerate(passage.tokens):
            (row,) = np.flatnonzero((per_token.doc == names.index(passage.document)) & (per_token.position == passage.position + place))
            assert token.text == opened.knn_lm.tokenizer.token_text(int(per_token.token_id[row]))
            assert (token.lm_logprob, token.logprob) == (per_token.lm_logprob[row], per_token.logprob[row])
            entries = [neighbor.entry for neighbor in token.neighbors]
            assert len(entries) == len(set(entries)) == SHOWN_NEIGHBORS
            # With one temperature the nearest is the heaviest.
            assert entries[0] == per_token.neighbor_ids[row][0]
            assert token.neighbors[0].distance == pytest.approx(float(per_token.nearest[row]), rel=1e-4, abs=1e-4)
            if per_token.supporter[row] >= 0:
                assert int(per_token.supporter[row]) in entries
            for neighbor in token.neighbors:
                evidence = opened.store.evidence(neighbor.entry)
                assert neighbor.document == evidence.document.id not in copied
                assert neighbor.line == evidence.line
                assert neighbor.same == (evidence.token_id == per_token.token_id[row])


def test_weights_are_those_of_the_softmax(found: OpenComparison) -> None:
    opened, mixture = found.opened, found.compared.comparison.mixture
    (passage,) = passages_of(found, 1)
    number = next(place for place, document in enumerate(found.text) if document.document.id == passage.document)
    text = found.text[number].ids
    weights: dict[int, dict[int, float]] = {}
    searching = Exclusion.choose(opened.store, found.text, [], automatic=True).apply(opened.knn_lm, opened.store)
    for batch in score(searching, [text], opened.store.manifest.windowing, mixture):
        for row, distances, ids in zip(batch.rows.tolist(), batch.neighbors.distances.numpy(), batch.neighbors.ids.tolist(), strict=True):
            raw = np.exp(-(distances.astype(np.float64) - distances.min()) / mixture.temperature)
            weights[row + 1] = dict(zip(ids, raw / raw.sum(), strict=True))
    for place, token in enumerate(passage.tokens):
        for neighbor in token.neighbors:
            assert neighbor.weight == pytest.approx(weights[passage.position + place][neighbor.entry], rel=1e-3)


def token(gain: float, *, searched: bool = True) -> ShownToken:
    return ShownToken("x", -5.0, -5.0 + gain, 0.3, ("n",) if searched else ())  # type: ignore[arg-type]


def test_the_telling_tokens_are_those_that_changed_most_in_order() -> None:
    passage = Passage("d", 1, 0.0, (token(0.05), token(-1), token(3), token(9, searched=False), token(0.5)))
    assert [shown.gain for shown in most_telling(passage)] == pytest.approx([-1, 3, 0.5])
    assert [shown.gain for shown in most_telling(passage, 3)] == pytest.approx([-1, 3])


def test_worse_is_underlined_and_more_change_is_another_colour() -> None:
    assert not style_of(0.0)
    assert not style_of(STEPS[0] / 2)
    for sign in (1, -1):
        styles = [style_of(sign * step) for step in STEPS]
        assert len({str(style.bgcolor) for style in styles}) == len(STEPS)
        assert all(bool(style.underline) == (sign < 0) for style in styles)


def test_the_terminal_shows_the_passage_and_nothing_harmful(found: OpenComparison, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=out, force_terminal=True, color_system="truecolor", width=160))
    (passage,) = passages_of(found, 1)
    bad = replace(passage.tokens[0], text="\x1b[2J[bold]\x07")
    show_passages_text("", [replace(passage, tokens=(bad, *passage.tokens[1:]))])
    shown = out.getvalue()
    assert "\x1b[2J" not in shown
    assert "\u241b[2J[bold]\u2407" in shown
    assert "\x07" not in shown
    for words in (passage.document, "distance", "change of log-probability"):
        assert words in shown
    show_passages_text("", [])
    assert "no passage to show" in out.getvalue()


def test_the_command_shows_passages_under_the_tables(found: OpenComparison, capsys: pytest.CaptureFixture[str]) -> None:
    line: list[str | Path] = ["compare", found.opened.store.path, "--text", found.opened.store.path.parent / "held", "--show-text", "2"]
    assert knnlm(*line) == 0
    out = capsys.readouterr().out
    assert out.count("from token") == 2
    assert out.index("perplexity") < out.index("from token") < out.index("λ ")
    assert knnlm(*line, "--json") == 2
    assert "--show-text prints passages for people" in capsys.readouterr().err


def test_bytes_of_a_character_are_shown_as_the_character(gpt2: HFLanguageModel) -> None:
    """Wherever a passage begins and ends, its text is that of its tokens; a character that is whole is shown whole."""
    tokenizer = open_tokenizer(gpt2)
    ids = tokenizer.encode("a 農夫 b🙂")
    for first in range(1, len(ids)):
        found = characters(tokenizer, ids[first:], ids[max(0, first - 3) : first])
        assert [place for places, _ in found for place in places] == list(range(len(ids) - first))
        shown = "".join(text for _, text in found)
        assert "a 農夫 b🙂".endswith(shown)
        assert "\ufffd" not in shown
    (cut,) = (text for places, text in characters(tokenizer, ids[:-1], [])[-1:])
    assert set(cut) == {"\ufffd"}


def open_tokenizer(model: HFLanguageModel) -> TextTokenizer:
    return model.tokenizer("no", False)

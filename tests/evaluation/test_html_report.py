"""The HTML report: complete, offline, harmless whatever the text says, and with the figures of the JSON."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.evaluation.compare_stores import OpenComparison, compare_opened
from knnlm.evaluation.compared_stores import ComparedStores
from knnlm.evaluation.comparison_json import content_of
from knnlm.evaluation.html_report import render, reported, versions
from knnlm.evaluation.plotting import subplots, svg
from knnlm.evaluation.visible_text import visible
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from tests.stores import build, command, knnlm, text_folder
from tests.tiny import tiny_corpus

HOSTILE = (
    "The farmer <script>alert('x')</script> sold <img src=https://example.com/x onerror=alert(1)> seven apples & \"more\".\n"
    "</script></style></div><!-- --> {{ 7*7 }} $\\frac{1}{2}$ ]]> 'quoted' \x07\x1b[31m\x7f \u202egnitirw \u200b end.\n"
)
PARTS = ("change", "frequency", "occurrence", "distance", "reliability", "weight", "leakage", "cost", "baselines", "passages", "settings")
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """A page as a browser would read it: elements, attributes, text, tables; tags that don't match fail."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.passages: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs)
        self.elements.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "div" and values.get("class") == "passage":
            self.passages.append("")

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside in ("style", "script"):
            (self.styles if inside == "style" else self.scripts).append(data)
            return
        self.text.append(data)
        if self.rows and any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data
        if self.passages and inside in ("a", "span") and "table" not in self.open:
            self.passages[-1] += data

    def attributes(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [values[name] for _, values in self.elements if name in values]


@pytest.fixture(scope="module")
def found(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> OpenComparison:
    """Hostile text in the datastore, in the text and in the names of files."""
    folder = tmp_path_factory.mktemp("report")
    corpus = text_folder(folder / "corpus", tiny_corpus(8))
    (corpus / "<b onclick=alert(1)>&\"'.txt").write_text(HOSTILE * 3)
    held = text_folder(folder / "held", tiny_corpus(2, seed=7))
    (held / "<i>\"'x.txt").write_text(HOSTILE * 2)
    build(corpus, folder / "<u>store&", gpt2, index="IVF4,SQ8", keys="float32", max_length=16)
    opened = open_store(folder / "<u>store&", k=8, temperature=5.0, weight=0.4)
    return compare_opened(opened, [held], name="<u>store&")


@pytest.fixture(scope="module")
def compared(found: OpenComparison) -> ComparedStores:
    return ComparedStores((found.compared,), ())


@pytest.fixture(scope="module")
def html(found: OpenComparison, compared: ComparedStores) -> str:
    return render(compared, [reported(found, 99)], "knnlm compare '<x>' --report r.html")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_it_loads_nothing_and_runs_nothing(page: Page) -> None:
    assert not [value for _, values in page.elements for value in values.values() if "//" in value]
    for name in ("src", "srcset", "action", "data", "poster", "background", "formaction"):
        assert page.attributes(name) == []
    assert not [name for _, values in page.elements for name in values if name.startswith("on")]
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "b", "i", "u", "iframe", "link", "object", "embed", "base", "form"})
    assert [values for tag, values in page.elements if tag == "script"] == [{"type": "application/json", "id": "figures"}]
    assert all(
        found == "#" for found in re.findall(r"url\((.)", "".join([*page.styles, *page.attributes("style"), *page.attributes("clip-path")]))
    )
    assert not any("@import" in style for style in page.styles)
    (policy,) = (values["content"] for tag, values in page.elements if values.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_links_lead_to_places_on_the_page(page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    links = page.attributes("href")
    assert links
    for link in links:
        assert link.startswith("#")
        assert link[1:] in ids


def test_every_section_is_there(page: Page) -> None:
    ids = set(page.attributes("id"))
    assert {"summary", "store-0", "reproduce", "figures"} | {f"store-0-{part}" for part in PARTS} <= ids
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 7
    assert all(label for label in page.attributes("aria-label"))


def test_hostile_text_is_shown_and_nothing_unseen(html: str, page: Page) -> None:
    text = "".join(page.text)
    assert "<script>alert" in "".join(page.passages).replace("\n", "")
    assert "<b onclick=alert(1)>&\"'.txt" in text
    assert "{{ 7*7 }}" in text
    assert {character for character in html if not character.isprintable()} <= {"\n", "\t"}
    assert "<u>store&" in text


def test_passages_are_the_text(found: OpenComparison, page: Page) -> None:
    tokenizer, per_token = found.opened.knn_lm.tokenizer, found.compared.comparison.per_token
    assert len(page.passages) > 4
    assert set(per_token.doc.tolist()) == {0, 1, 2}
    whole = [visible(tokenizer.decode(document.ids.tolist())) for document in found.text]
    for passage in page.passages:
        # The fixed grid may cut a character of several tokens.
        assert any(passage.strip("\ufffd") in text for text in whole)


def test_the_json_inside_is_that_of_the_comparison(compared: ComparedStores, page: Page) -> None:
    (text,) = page.scripts
    assert not set("<>&") & set(text)
    inside = json.loads(text)
    from knnlm.console import finite

    assert inside == json.loads(json.dumps(finite(content_of(compared))))


def test_figures_shown_are_those_of_the_json(page: Page) -> None:
    store = json.loads(page.scripts[0])["stores"][0]
    rows = page.rows
    for name, key in (("base LM", "base"), ("kNN-LM", "knn")):
        (row,) = (row for row in rows if row[1:2] == [name])
        assert row[2:5] == [f"{store[key]['value']:.2f}", f"{store[key]['standard_error']:.2f}", f"{store[key]['bits_per_byte']:.4f}"]
        assert row[5] == f"{store[key]['tokens_per_second']:,.0f}"
    interval = store["change_interval"]
    assert row[6:] == [f"{store['change']:+.2%}", f"{interval['low']:+.2%} {interval['high']:+.2%}"]
    for breakdown in store["breakdowns"]:
        for group in breakdown["groups"]:
            figures = [group["name"], f"{group['tokens']:,}", f"{group['base']:.2f}", f"{group['knn']:.2f}", f"{group['change']:+.1%}"]
            assert figures in [row[:5] for row in rows]
    for overlap in store["leakage"]["overlaps"]:
        assert [f"{overlap['length']} tokens", f"{overlap['sequences']:,}", f"{overlap['found']:,}", f"{overlap['share']:.2%}"] in rows
    for name, key in (("base LM", "base"), ("kNN-LM", "knn")):
        quality = store["reliability"][key]
        assert [name, f"{quality['error']:.4f}", f"{quality['accuracy']:.1%}", f"{quality['confidence']:.1%}"] in rows
    for document in store["leakage"]["documents"]:
        assert [
            document["id"],
            document["source"],
            f"{document['sequences']:,}",
            f"{document['found']:,}",
            f"{document['share']:.1%}",
        ] in rows
    for name, value in store["settings"].items():
        assert [name.replace("_", " "), "none" if value is None else str(value)] in rows


def test_it_says_how_to_make_it_again(found: OpenComparison, page: Page) -> None:
    assert "knnlm compare '<x>' --report r.html" in "".join(page.text)
    manifest = found.opened.store.manifest
    for value in (manifest.fingerprint, manifest.model.fingerprint.weights, manifest.model.fingerprint.tokenizer):
        assert value in "".join(page.text)
    assert dict(versions()).keys() >= {"knnlm", "Python", "torch", "transformers"}
    for row in versions():
        assert list(row) in page.rows


def test_several_datastores_stand_on_one_page(found: OpenComparison, compared: ComparedStores) -> None:
    part = reported(found, 1)
    page = Page(render(ComparedStores((found.compared, found.compared), ()), [part, part], "knnlm"))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {f"store-1-{name}" for name in PARTS} <= set(ids)


def test_without_passages_it_says_so(found: OpenComparison, compared: ComparedStores) -> None:
    page = Page(render(compared, [reported(found, 0)], "knnlm"))
    assert page.passages == []
    assert "No passage was asked for, or nothing changed." in "".join(page.text)


@given(st.text(st.characters(), max_size=60))
def test_visible_text_has_nothing_unseen_and_keeps_the_rest(text: str) -> None:
    shown = visible(text)
    assert all(character.isprintable() or character in "\n\t\u200c\u200d" or character.isspace() for character in shown)
    assert not set(shown) & {chr(code) for code in (*range(9), *range(11, 32), 127, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x85)}
    plain = "".join(character for character in text if character.isprintable())
    if plain == text:
        assert shown == text


def test_an_svg_stands_alone_and_is_the_same_twice() -> None:
    def drawn(prefix: str) -> str:
        figure, (axes,) = subplots(1, 3, 2)
        axes.plot(np.arange(3), np.arange(3))
        return svg(figure, 'a "title" <x>', prefix)

    assert drawn("p") == drawn("p")
    one = drawn("p")
    assert one.startswith("<svg ")
    assert one.endswith("</svg>")
    assert "http" not in one
    assert "currentColor" in one
    assert "<x>" not in one
    assert {found for found in re.findall(r'\bid="([^"]*)"', one) if not found.startswith("p-")} == set()
    targets = re.findall(r'(?:url\(#|href="#)([^")]*)', one)
    assert set(targets) <= set(re.findall(r'\bid="([^"]*)"', one))


def test_the_command_writes_it_and_says_its_own_line(found: OpenComparison, tmp_path: Path) -> None:
    held = found.opened.store.path.parent / "held"
    line = ["compare", str(found.opened.store.path), "--text", str(held), "--k", "4", "--passages", "2"]
    done = command(*line, "--report", tmp_path / "r.html", "--json")
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "r.html").read_text())
    assert json.loads(page.scripts[0]) == json.loads(done.stdout)
    assert len(page.passages) == 2
    assert "--k 4 --passages 2 --report" in "".join(page.text)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_it_is_refused_before_any_work(
    found: OpenComparison, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(HFLanguageModel, "forward", None)
    assert knnlm("compare", found.opened.store.path, "--text", tmp_path, "--report", tmp_path / "r.html") == 1
    error = capsys.readouterr().err
    assert f"{package} is not installed" in error
    assert '"knnlm[report]"' in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r.html").exists()

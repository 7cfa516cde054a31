"""``benchmarks.no_regret`` measures what serving would do: with the profile's gate, its rule, and its fixed mixture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import no_regret
from knnlm.datastore.profile import Profile
from knnlm.errors import InvalidInput
from knnlm.evaluation.compare import compare
from knnlm.gate import FEATURES, Gate, Network, SkipRule
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from tests.stores import build, gpt2, text_folder
from tests.tiny import tiny_corpus

__all__ = ["gpt2"]


def test_figures_are_those_of_compare(
    gpt2: HFLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, text = tmp_path / "store", text_folder(tmp_path / "text", tiny_corpus(2, seed=5))
    build(text_folder(tmp_path / "corpus", tiny_corpus(3)), store, gpt2, index="Flat", keys="float32", max_length=16)
    with pytest.raises(InvalidInput, match="has no profile; run knnlm calibrate"):
        no_regret.measure(str(store), str(text), None, 1000)
    Profile(Mixture(4, 5.0, 0.3), "exact", "by hand").write(store)
    without = no_regret.measure(str(store), str(text), None, 1000)
    assert without.gated == pytest.approx(without.fixed, rel=1e-6)
    assert without.skipped == 0.0
    width = len(FEATURES)
    outgoing = tuple(0.5 if name == "followed" else 0.0 for name in FEATURES)
    form = Network((0.0,) * width, (1.0,) * width, (((outgoing,), (-1.0,)),))
    sure = SkipRule(Network((0.0, -5.0), (1.0, 1.0), ((((0.0, -1.0),), (0.0,)),)), 0.5)
    for skip, share in ((None, 0.0), (sure, None), (SkipRule(sure.network, 1.1), 1.0)):
        Profile(Mixture(4, 5.0, 0.3), "exact", "by hand", gate=Gate(form, 0.0, skip)).write(store)
        found = no_regret.measure(str(store), str(text), None, 1000)
        opened = open_store(store)
        held = list(opened.read(opened.corpus(str(text))))
        gated = compare(opened.knn_lm, opened.store, held)
        fixed = compare(opened.knn_lm, opened.store, held, mixture=Mixture(4, 5.0, 0.3))
        assert found.base == pytest.approx(gated.base.value, rel=1e-6)
        assert found.gated == pytest.approx(gated.knn.value, rel=1e-5)
        assert found.fixed == pytest.approx(fixed.knn.value, rel=1e-5)
        assert found.against_fixed[0] == pytest.approx(found.gated / found.fixed - 1)
        assert found.against_base[0] == pytest.approx(found.gated / found.base - 1)
        assert share is None or found.skipped == share
    assert found.gated == found.base, "nothing is searched"
    monkeypatch.setattr(sys, "argv", ["no_regret", "--pair", str(store), str(text), "--json", str(tmp_path / "found.json")])
    no_regret.main()
    (written,) = json.loads((tmp_path / "found.json").read_text())
    assert written["tokens"] == found.tokens
    assert math.isclose(written["fixed"], found.fixed, rel_tol=1e-9)
    assert "gate / base" in capsys.readouterr().out

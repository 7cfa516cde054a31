"""Write golden stores of the format that this knnlm writes: ``python scripts/generate_golden_store.py tests/golden/format-N``.

Run once for each format version N and committed, since stores of every version must open for ever
(``tests/golden/test_format_versions.py``); a folder that is there already is left alone. It gets a model, a corpus, stores
that between them have every feature of the format, and what they say in ``expected.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from knnlm import console
from knnlm.datastore.manifest import FORMAT_VERSION
from knnlm.datastore.profile import Profile
from knnlm.errors import InvalidInput
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from tests.golden.observed import EXPECTED, Asked, observe
from tests.stores import build, token_folder
from tests.tiny import save, tiny_corpus, tiny_gpt2, tiny_tokenizer

EXACT_STORE = "store-exact"
# Corpus (a folder of ``corpus/``) and settings of each store.
STORES: dict[str, tuple[str, dict[str, Any]]] = {
    EXACT_STORE: (
        "text",
        {"index": "exact", "keys": "float32", "max_length": 16, "bos": "yes", "eos": True, "split_documents": "^Story "},
    ),
    "store-sq8": ("text", {"index": "IVF4,SQ8", "keys": "float16", "max_length": 16, "shard_tokens": 160}),
    "store-flat-tokens": ("tokens", {"index": "Flat", "keys": "float16", "max_length": 16, "shard_tokens": 160}),
}
PROFILES = {"store-sq8": Profile(Mixture(k=8, temperature=15.0, weight=0.4), "exact", "held-out stories")}
MIXTURE = Mixture(k=16, temperature=20.0, weight=0.5)
PROMPT = "The farmer sold"
QUERIES = 10
VOICES = (
    "Grüße aus Köln, sagte der König.\nЖили-были старик со старухой.\n昔々ある所に、\tお爺さんがいました。\nA naïve façade: 3 × 4 ≤ 5².\n"
)


def generate(folder: Path) -> None:
    """Write model, corpus, stores and what these say into ``folder``; raise :class:`InvalidInput` if it can't be theirs."""
    if folder.name != f"format-{FORMAT_VERSION}":
        raise InvalidInput(
            "folder", f"is {folder}, but this knnlm writes format version {FORMAT_VERSION}: call it format-{FORMAT_VERSION}."
        )
    if folder.exists():
        raise InvalidInput("folder", f"is {folder}, which is there already; golden stores are written once.")
    model = HFLanguageModel.load(save(tiny_gpt2(), tiny_tokenizer(), folder / "model"))
    # The manifest keeps this name; where the model lay on the machine that ran this is nobody's business.
    model.name = f"tests/golden/{folder.name}/model"
    write_text(folder / "corpus" / "text")
    write_tokens(folder / "corpus" / "tokens")
    for name, (corpus, settings) in STORES.items():
        build(folder / "corpus" / corpus, folder / name, model, **settings)
        if name in PROFILES:
            PROFILES[name].write(folder / name)
    opened = {name: open_store(folder / name, model=str(folder / "model")) for name in STORES}
    asked = Asked(some_keys(opened[EXACT_STORE]), PROMPT, MIXTURE)
    expected = {"asked": asdict(asked), "stores": {name: observe(store, asked) for name, store in opened.items()}}
    (folder / EXPECTED).write_text(readable(expected))


def write_text(folder: Path) -> None:
    """Text files (several stories in one, several bytes in a character, one token) and JSON lines with metadata."""
    folder.mkdir(parents=True)
    (folder / "stories.txt").write_text("".join(tiny_corpus(3, seed=1)))
    (folder / "voices.txt").write_text(VOICES)
    (folder / "short.txt").write_text("a")
    texts = [*tiny_corpus(3, seed=8), "The miller sold the last map."]
    facts: list[dict[str, Any]] = [
        {"id": "farm", "license": "CC0-1.0", "language": "en", "date": "2024-02-29"},
        {"id": "Märchen/1", "license": "CC-BY-4.0", "language": "de", "date": "2023-11-05"},
        {"license": "Apache-2.0", "language": "en", "date": "1999-12-31"},
        {"id": 7, "language": "en", "tags": ["old", "short"]},
    ]
    lines = [json.dumps({**fact, "text": text}, ensure_ascii=False) for fact, text in zip(facts, texts, strict=True)]
    (folder / "articles.jsonl").write_text("\n".join(lines) + "\n")


def write_tokens(folder: Path) -> None:
    """Arrays of one document, one of them a single token, and an array of several."""
    encode = tiny_tokenizer().encode
    documents = [encode(text, add_special_tokens=False) for text in tiny_corpus(6, seed=3)]
    token_folder(folder, [*(tokens[:100] for tokens in documents[:3]), [42]])
    np.save(folder / "rows.npy", np.array([tokens[:40] for tokens in documents[3:]], dtype=np.uint16))


def some_keys(exact: OpenedKNNLM) -> list[list[float]]:
    """At most :data:`QUERIES` stored keys of the store that keeps them exactly, spread over all of it."""
    assert exact.store.keys is not None, "this store keeps its keys"
    keys = [key for _, piece in exact.store.keys.chunks(1024) for key in piece.float().tolist()]
    return keys[:: len(keys) // QUERIES + 1]


def readable(content: dict[str, Any]) -> str:
    """JSON with each list of numbers on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return re.sub(r"\[(?:\s+(?:[-+.e\d]+|null),?)+\s+\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    console.quiet_transformers()
    parser.add_argument("folder", type=Path, help=f"to be made: tests/golden/format-{FORMAT_VERSION}")
    try:
        generate(parser.parse_args().folder)
    except InvalidInput as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

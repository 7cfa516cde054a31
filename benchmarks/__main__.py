"""``python -m benchmarks [building comparing decoding] [--model M --corpus DIR --held-out DIR]``."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import building, comparing, decoding
from benchmarks.inputs import load_inputs
from knnlm import console
from knnlm.opening import open_store
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.settings import BuildSettings

NAMES = ("building", "comparing", "decoding")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios against bare floors, measured side by side.")
    parser.add_argument("names", nargs="*", default=[], help=f"which of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--model", help="Hugging Face causal LM (default: the demo's)")
    parser.add_argument("--corpus", type=Path, help="text of the datastore (default: the demo's)")
    parser.add_argument("--held-out", type=Path, help="text to be compared on (default: the demo's)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, of which medians are taken (default 5)")
    arguments = parser.parse_args()
    names = arguments.names or list(NAMES)
    console.quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="knnlm-bench-") as scratch:
        folder = Path(scratch)
        inputs = load_inputs(arguments.model, arguments.corpus, arguments.held_out, folder)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, model {Path(inputs.model.name).name}")
        if "building" in names:
            report("building", building.run(inputs, folder, arguments.rounds))
        if {"comparing", "decoding"} & set(names):
            with console.progress() as reporter:
                build_datastore([inputs.corpus], folder / "store", inputs.model, BuildSettings(), reporter)
            opened = open_store(folder / "store")
            print(f"datastore: {len(opened.store):,} entries, {opened.knn_lm.retriever.index.description}")
            if "comparing" in names:
                report("comparing", comparing.run(inputs, opened, arguments.rounds))
            if "decoding" in names:
                report("decoding", decoding.run(inputs, opened, arguments.rounds))


def report(title: str, results: dict[str, float]) -> None:
    rows = [(name, f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}") for name, value in results.items()]
    console.out.print(console.table(title, ["", ""], rows))


if __name__ == "__main__":
    main()

"""What ``knnlm demo`` does: corpus, datastore, comparison, server, completions. Every step is what a user would run."""

from __future__ import annotations

import math
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table
from rich.text import Text

from knnlm import console
from knnlm.errors import InvalidInput, KNNLMError
from knnlm.evaluation.compare import compare
from knnlm.evaluation.comparison import Comparison
from knnlm.evaluation.report import perplexity_table
from knnlm.model import HFLanguageModel
from knnlm.opening import open_store
from knnlm_demo.documents import Document, demo_documents, split_documents
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.settings import BuildSettings
from knnlm_server.client import GenerationClient
from knnlm_server.display import share_style
from knnlm_server.sequence import FinishEvent, TokenEvent

MODEL = Path(__file__).with_name("model")
PROMPTS = ("The try statement specifies", "Return a list of", "If the attribute is not found")
NEW_TOKENS = 24
SERVER_START_SECONDS = 120.0
SERVER_STOP_SECONDS = 30.0


def run_demo(model: str | None, keep: Path | None, *, weight: float | None, k: int | None, knn_temperature: float | None) -> None:
    """Run the demo with ``model`` (None: the shipped one) in ``keep`` (None: a folder that is deleted at the end).

    Raises :class:`InvalidInput` if ``keep`` holds something.
    """
    console.quiet_transformers()
    started = time.monotonic()
    with _folder(keep) as folder:
        _say(f"Text: documentation inside CPython {platform.python_version()}")
        _write_corpus(folder)
        loaded = HFLanguageModel.load(model or MODEL)
        _say(f"\nDatastore: knnlm build corpus/ --model {model or 'MODEL'} --store store/")
        with console.progress() as reporter:
            result = build_datastore([folder / "corpus"], folder / "store", loaded, BuildSettings(), reporter)
        counts = result.manifest.counts
        _say(f"{counts.entries:,} entries of {counts.documents} documents")
        _say("\nPerplexity on documents that the datastore does not hold: knnlm compare store/ --text held_out/")
        comparison, settings = _compare(folder, weight, k, knn_temperature)
        _serve_and_generate(folder / "store", weight, k, knn_temperature)
        _say(f"\nBase LM against kNN-LM, {comparison.tokens:,} tokens of {comparison.documents} held-out documents ({settings})")
        console.out.print(perplexity_table(comparison))
        _say(f"perplexity {comparison.change:+.1%} ± {comparison.change_standard_error:.1%} with the datastore, no training")
        _say(f"Done in {time.monotonic() - started:.0f} s with Python {platform.python_version()}.")
        if keep is not None:
            _say(f"Corpus and datastore are in {keep}; try: knnlm inspect {keep / 'store'}")


def _say(text: str) -> None:
    console.out.print(text, markup=False)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="knnlm-demo-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise InvalidInput("keep", f"{keep} is there already and not empty; name a new folder.")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _write_corpus(folder: Path) -> None:
    split = split_documents(demo_documents())
    grid = Table()
    for column in ("documents", "language reference", "docstrings", "characters"):
        grid.add_column(column, justify="left" if column == "documents" else "right")
    for name, documents in (("datastore (corpus/)", split.datastore), ("held out (held_out/)", split.held_out)):
        for document in documents:
            path = folder / ("corpus" if documents is split.datastore else "held_out") / document.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(document.text.encode())
        topics = sum(document.name.startswith("topics/") for document in documents)
        grid.add_row(name, str(topics), str(len(documents) - topics), f"{_characters(documents):,}")
    console.out.print(grid)
    held_out = [Path(document.name).stem for document in split.held_out]
    _say(f"Held out, by document: {', '.join(held_out)}")


def _characters(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _compare(folder: Path, weight: float | None, k: int | None, knn_temperature: float | None) -> tuple[Comparison, str]:
    opened = open_store(folder / "store", k=k, temperature=knn_temperature, weight=weight)
    held_out = opened.read(opened.corpus(folder / "held_out"))
    total = sum(len(document.ids) - 1 for document in held_out)
    with console.progress() as reporter:
        comparison = compare(opened.knn_lm, opened.store, held_out, progress=lambda done: reporter.update("comparing", done, total))
    mixture = comparison.mixture
    _say(
        f"better on {comparison.better:.0%} of {comparison.tokens:,} tokens, worse on {comparison.worse:.0%}; "
        f"{comparison.overlap:.2%} of the text's 13-token sequences stand in the datastore"
    )
    return comparison, f"k={mixture.k}, kNN temperature {mixture.temperature:g}, weight {mixture.weight:g}"


def _serve_and_generate(store: Path, weight: float | None, k: int | None, knn_temperature: float | None) -> None:
    options = [
        f"--{name}={value}" for name, value in (("weight", weight), ("k", k), ("knn-temperature", knn_temperature)) if value is not None
    ]
    with _server(store, options) as address, GenerationClient(address) as client:
        client.wait_until_ready(SERVER_START_SECONDS)
        _say(f"\nServer: knnlm serve store/ --port 0 (listening on {address}); tokens stream through its gRPC client")
        for prompt in PROMPTS:
            _say(f"\nPrompt: {prompt}")
            plain = client.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0, retrieval=False)
            _say(f"  base LM : {_one_line(plain.text)}")
            events = client.stream(prompt, max_new_tokens=NEW_TOKENS, temperature=0, neighbors=64, log_probs=True)
            _show_completion(events)
    _say("\nServer stopped (SIGTERM, exit status 0)")


@contextmanager
def _server(store: Path, options: list[str]) -> Iterator[str]:
    """A server in a process of its own, on a free port; stopped by SIGTERM at the end."""
    command = [sys.executable, "-m", "knnlm", "serve", str(store), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            process.kill()
            raise KNNLMError(f"The server did not start: {process.stderr.read().strip()[-500:]}")
        try:
            yield line.removeprefix("listening on ").strip()
        finally:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=SERVER_STOP_SECONDS)
    if process.returncode != 0:
        raise KNNLMError(f"The server ended with status {process.returncode}: {said.strip()[-500:]}")


def _show_completion(events: Iterator[TokenEvent | FinishEvent]) -> None:
    """The completion in the colours of its neighbours' part, then a row for each token as it was decided."""
    grid = Table(box=None, padding=(0, 2, 0, 2), header_style="bold")
    for name, justify in (
        ("token", "left"),
        ("from neighbours", "right"),
        ("p", "right"),
        ("LM alone", "right"),
        ("strongest neighbour", "left"),
    ):
        grid.add_column(name, justify=justify)  # type: ignore[arg-type]
    line = Text("  kNN-LM  : ")
    for event in events:
        if isinstance(event, FinishEvent):
            line.append(_one_line(event.text))
            continue
        line.append(_one_line(event.text), share_style(event.knn_share))
        grid.add_row(*_token_row(event))
    console.out.print(line)
    console.out.print(grid)


def _token_row(event: TokenEvent) -> tuple[Text, ...]:
    strongest = max((n for n in event.neighbors if n.token_id == event.token_id), key=lambda n: n.weight, default=None)
    where = "(none voted for it)" if strongest is None else f"{strongest.document_id}:{strongest.line}"
    share, p, lm = event.knn_share or 0.0, math.exp(event.log_prob or 0.0), math.exp(event.lm_log_prob or 0.0)
    bar = "█" * round(share * 10)
    style = share_style(share)
    return Text(repr(event.token_text), style), Text(f"{bar} {share:.0%}", style), Text(f"{p:.3f}"), Text(f"{lm:.3f}"), Text(where)


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎")

"""One run of the benchmarks: what was asked for, and what several of them share, each made when it is first used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.inputs import Inputs, load_inputs
from knnlm import console
from knnlm.datastore.manifest import Manifest
from knnlm.opening import OpenedKNNLM, open_store
from knnlm_index_builder.pipeline import build_datastore
from knnlm_index_builder.settings import BuildSettings


@dataclass(frozen=True)
class Options:
    """What the command line says; None stands for the benchmark's own default.

    ``entries``: how many of a store's to use at most, or to make up; ``kills`` of a build, at moments drawn with ``seed``;
    ``stream_interval`` of a server, in seconds.
    """

    model: str | None
    text: Path | None
    held_out: Path | None
    split_documents: str | None
    store: Path | None
    rounds: int
    entries: int | None
    kills: int
    seed: int
    stream_interval: float | None = None


class Session:
    """``folder``: for what is made on the way; it is deleted at the end."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder

    @cached_property
    def inputs(self) -> Inputs:
        """Model and text."""
        options = self.options
        model = options.model
        if model is None and options.store is not None:
            model = Manifest.read(options.store).model.name
        return load_inputs(model, options.text, options.held_out, options.split_documents, self.folder)

    @cached_property
    def opened(self) -> OpenedKNNLM:
        """The datastore that was named, or one built of the inputs with default settings."""
        if self.options.store is not None:
            return open_store(self.options.store, model=self.options.model)
        with console.progress() as reporter:
            settings = BuildSettings(split_documents=self.inputs.cut)
            build_datastore(self.inputs.corpus(), self.folder / "store", self.inputs.model, settings, reporter)
        return open_store(self.folder / "store")

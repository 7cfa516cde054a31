"""A kNN-LM as one folder that a model hub takes: ``config.json``, a model card, the datastore, and the base model if asked for.

::

    FOLDER/config.json        what this is, which base model, and the datastore's fingerprint
    FOLDER/README.md          the model card: facts of the manifest
    FOLDER/datastore/         the datastore, each file copied and compared with its checksum
    FOLDER/model/             the base model with its tokenizer (only where it was included)
    FOLDER/report.json, .html comparisons, where given

Nothing here speaks to a network: any tool that copies folders (``huggingface_hub.upload_folder``, ``snapshot_download``)
pushes and pulls them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnlm.console import counted
from knnlm.datastore.audit import AUDIT_LOG
from knnlm.datastore.files import file_facts, made_aside, named
from knnlm.datastore.manifest import MANIFEST, RECEIPT, Manifest
from knnlm.datastore.profile import PROFILE, Profile
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidInput, StoreDamaged, StoreError, StoreMismatch, StoreNotFound, StoreVersion
from knnlm.model_card import model_card, public_name

CONFIG, CARD, DATASTORE, MODEL = "config.json", "README.md", "datastore", "model"
REPORTS = {".json": "report.json", ".html": "report.html"}
MODEL_TYPE = "knnlm"
LAYOUT = 1


@dataclass(frozen=True)
class HubFolder:
    """A folder that was read: where the datastore lies, the base model in it (None: by the name that the manifest has), and
    reports."""

    store: Path
    model: Path | None
    reports: list[Path]


def export_store(store: str | Path, folder: str | Path, *, with_model: bool = False, reports: Sequence[Path] = ()) -> None:
    """Write the datastore at ``store`` as a new ``folder``; it is there as a whole or not at all.

    ``with_model``: the base model too, loaded once more from where the manifest says and saved in the checkpoint's dtype.
    ``reports``: of ``knnlm compare`` (.json, .html; one of each). Raises :class:`InvalidInput` for a folder that holds
    something, :class:`StoreError` for a datastore whose files still hold removed text, :class:`StoreDamaged` for a file
    that is not what the manifest says.
    """
    source, target = Path(store), Path(folder).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInput("to", f"is {target}, which is there already; give a new folder.")
    names = _report_names(reports)
    opened = Datastore.open(source)
    manifest = opened.manifest
    if manifest.removed is not None:
        raise StoreError(
            f"{source}: the text of {counted(manifest.removed.documents, 'removed document')} still lies in its files and would "
            f"be handed on; take it out first with: knnlm compact {source}"
        )
    try:
        with made_aside(target) as aside:
            _fill(aside, opened, with_model=with_model, reports=dict(zip(names, reports, strict=True)))
    except BaseException:
        shutil.rmtree(target.with_name(target.name + ".tmp"), ignore_errors=True)
        raise


def _fill(folder: Path, store: Datastore, *, with_model: bool, reports: Mapping[str, Path]) -> None:
    manifest = store.manifest
    _copy_store(store.path, manifest, folder / DATASTORE)
    if with_model:
        _save_model(manifest, folder / MODEL)
    for name, report in reports.items():
        shutil.copyfile(report, folder / name)
    config = json.dumps(_config(manifest, with_model=with_model), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    card = model_card(manifest, Profile.read(store.path), store.size_bytes(), with_model=with_model, reports=list(reports))
    (folder / CARD).write_text(card, encoding="utf-8")


def read_hub_folder(folder: str | Path) -> HubFolder:
    """What lies in ``folder``, which :func:`export_store` wrote and anything may have copied since.

    Raises :class:`StoreNotFound` for a folder that is none, :class:`StoreVersion` for a layout of a later version and
    :class:`StoreMismatch` where the datastore is not the one that ``config.json`` speaks of.
    """
    root = Path(folder)
    said = _read_config(root)
    found = Manifest.read(root / DATASTORE).fingerprint
    if found != said.get("datastore_fingerprint"):
        raise StoreMismatch(
            f"{root / DATASTORE} is another datastore ({found[:12]}) than {root / CONFIG} speaks of "
            f"({str(said.get('datastore_fingerprint'))[:12]}); get the whole folder again, or export it again after a change."
        )
    base = said.get("base_model")
    if not isinstance(base, dict):
        raise StoreDamaged(f"{root / CONFIG} is damaged: it does not say which base model the datastore belongs to.")
    included = bool(base.get("included"))
    if included and not (root / MODEL).is_dir():
        raise StoreDamaged(f"{root / MODEL} is missing, but {root / CONFIG} says that the base model is included; get the folder again.")
    return HubFolder(root / DATASTORE, root / MODEL if included else None, [root / n for n in REPORTS.values() if (root / n).is_file()])


def _read_config(root: Path) -> dict[str, Any]:
    path = root / CONFIG
    if not path.is_file():
        raise StoreNotFound(f"There is no exported kNN-LM at {root}: it holds no {CONFIG}; this folder only, nothing is downloaded.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, said = content.get("model_type"), content.get("knnlm")
    except (ValueError, AttributeError) as error:
        raise StoreDamaged(f"{path} is damaged: it is no JSON object ({error}).") from error
    if kind != MODEL_TYPE or not isinstance(said, dict):
        raise StoreNotFound(f"{root} is no exported kNN-LM: {CONFIG} says model type {kind!r}, not {MODEL_TYPE!r}.")
    if said.get("layout") != LAYOUT:
        raise StoreVersion(f"{path} has layout {said.get('layout')}, but this knnlm reads layout {LAYOUT}; use the version that wrote it.")
    return said


def _config(manifest: Manifest, *, with_model: bool) -> dict[str, Any]:
    model = manifest.model
    facts = {
        "name": public_name(model.name),
        "revision": model.revision,
        "included": with_model,
        "fingerprint": vars(model.fingerprint),
        "vocabulary_size": model.vocabulary_size,
    }
    layout = {"layout": LAYOUT, "datastore": DATASTORE, "datastore_fingerprint": manifest.fingerprint, "base_model": facts}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["KNNLMForCausalLM"],
        "knnlm_version": manifest.knnlm_version,
        "knnlm": layout,
    }


def _copy_store(source: Path, manifest: Manifest, target: Path) -> None:
    """Copy every file of the datastore; what the manifest lists is compared with it afterwards."""
    for name in _names(source, manifest):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with named(place):
                shutil.copyfile(source / name, place)
        except FileNotFoundError as error:
            raise StoreError(f"{source} changed while it was copied: {name} is gone; run the command again.") from error
        expected = manifest.files.get(name)
        if expected is not None and (found := file_facts(place)) != expected:
            raise StoreDamaged(f"{source / name} is damaged: its content gives xxh3 {found.xxh3}, but the manifest says {expected.xxh3}.")
    if Manifest.read(target).fingerprint != manifest.fingerprint:
        raise StoreError(f"{source} changed while it was copied; run the command again.")


def _names(source: Path, manifest: Manifest) -> Iterator[str]:
    yield from manifest.files
    receipts = (f"shards/{shard.name}/{RECEIPT}" for shard in manifest.shards)  # version 1 does not list them
    for name in (MANIFEST, PROFILE, AUDIT_LOG, *receipts):
        if name not in manifest.files and (source / name).is_file():
            yield name


def _save_model(manifest: Manifest, target: Path) -> None:
    """Save the base model and its tokenizer, and prove that what was saved is the model that the datastore was built with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from knnlm.model import not_loaded
    from knnlm.model_source import ModelSource

    facts = manifest.model
    options = {"revision": facts.revision, "trust_remote_code": facts.trust_remote_code}
    try:
        AutoModelForCausalLM.from_pretrained(facts.name, dtype="auto", **options).save_pretrained(target)
        AutoTokenizer.from_pretrained(facts.name, **options).save_pretrained(target)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise not_loaded("model", facts.name, error) from error
    ModelSource.of(manifest, model=str(target), device="cpu", dtype=None, trust_remote_code=facts.trust_remote_code).load()


def _report_names(reports: Sequence[Path]) -> list[str]:
    names = []
    for report in reports:
        name = REPORTS.get(report.suffix)
        if name is None or name in names:
            raise InvalidInput("report", f"is {report}, but can be one .json and one .html file, as knnlm compare writes them.")
        if not report.is_file():
            raise InvalidInput("report", f"is {report}, but there is no such file.")
        names.append(name)
    return names

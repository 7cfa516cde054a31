"""What ``knnlm inspect`` and ``knnlm verify`` show: facts of a datastore, where an entry came from, damaged files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knnlm import console
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.profile import Profile
from knnlm.datastore.reader import Datastore, damaged_files
from knnlm.errors import StoreDamaged
from knnlm.index import read_index_facts


def facts(store: Datastore) -> dict[str, Any]:
    """Everything that ``inspect`` says, as JSON."""
    manifest = store.manifest
    index = read_index_facts(store.path / manifest.index)
    index_bytes = sum(file.bytes for name, file in manifest.files.items() if name.startswith(f"{manifest.index}/"))
    profile = store.profile
    return {
        "path": str(store.path),
        "format_version": manifest.format_version,
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
        "knnlm_version": manifest.knnlm_version,
        "model": asdict(manifest.model),
        "key": asdict(manifest.key),
        "text": asdict(manifest.text),
        "windowing": asdict(manifest.windowing),
        "counts": asdict(manifest.counts),
        "shards": len(manifest.shards),
        "index": {**asdict(index), "bytes": index_bytes},
        "bytes": store.size_bytes(),
        "profile": None if profile is None else {**asdict(profile.mixture), "source": profile.source},
    }


def show(store: Datastore, *, as_json: bool) -> None:
    """Print :func:`facts`."""
    said = facts(store)
    if as_json:
        console.print_json(said)
        return
    model, key, text, counts, index = said["model"], said["key"], said["text"], said["counts"], said["index"]
    special = ", ".join(f"{name} {text[f'{name}_id']}" for name in ("bos", "eos") if text[f"{name}_id"] is not None)
    profile = said["profile"]
    rows = [
        ("model", f"{model['name']} ({model['dtype']}; weights {model['fingerprint']['weights'][:12]})"),
        ("key layer", f"{key['layer']['kind']} ({key['layer']['module']}{', normalized' if key['layer']['normalized'] else ''})"),
        ("keys", f"width {key['dimension']}, stored as {key['dtype']}"),
        ("documents", f"{counts['documents']:,}"),
        ("tokens", f"{counts['tokens']:,}" + (" (from token arrays)" if text["pretokenized"] else "")),
        ("entries", f"{counts['entries']:,} in {said['shards']} shards"),
        ("special tokens", special or "none"),
        ("windows", f"{said['windowing']['max_length']} tokens, stride {said['windowing']['stride']}"),
        ("index", f"{index['factory']}, {console.size(index['bytes'])} ({index['bytes'] / counts['entries']:.0f} bytes an entry)"),
        (
            "mixture",
            f"k={profile['k']}, temperature={profile['temperature']:g}, weight={profile['weight']:g}" if profile else "not calibrated",
        ),
        ("size", f"{console.size(said['bytes'])} ({said['bytes'] / counts['entries']:.0f} bytes an entry)"),
        (
            "made",
            f"{said['created']} by knnlm {said['knnlm_version']}, format {said['format_version']}, fingerprint {said['fingerprint'][:12]}",
        ),
    ]
    console.out.print(console.table(str(store.path), ["", ""], rows, right=False))


def show_entry(store: Datastore, entry: int, *, as_json: bool) -> None:
    """Print document, place and left context (as token ids: no model is loaded) of an entry."""
    evidence = store.evidence(entry)
    document = {name: value for name, value in asdict(evidence.document).items() if name != "line_starts"}
    if as_json:
        console.print_json({**asdict(evidence), "document": document})
        return
    where = (
        "no character offsets"
        if evidence.characters is None
        else f"characters {evidence.characters[0]}-{evidence.characters[1]}, line {evidence.line}"
    )
    rows = [
        ("value token", str(evidence.token_id)),
        ("document", evidence.document.id),
        ("source", evidence.document.source),
        ("place", where),
        ("left context", " ".join(map(str, evidence.left_context))),
        ("metadata", str(evidence.document.metadata or "none")),
    ]
    console.out.print(console.table(f"entry {entry}", ["", ""], rows, right=False))


def verify(path: Path, *, as_json: bool) -> int:
    """Print the damaged files of the store at ``path``; exit status 0 if there are none, else 1."""
    manifest = Manifest.read(path)
    damage = [*damaged_files(path, manifest), *_damaged_profile(path)]
    if as_json:
        console.print_json({"files": len(manifest.files), "damaged": damage})
    elif damage:
        for sentence in damage:
            console.out.print(sentence, soft_wrap=True)
    else:
        Datastore.open(path)
        console.out.print(
            f"{path}: {len(manifest.files)} files, {console.size(sum(f.bytes for f in manifest.files.values()))}, all as the manifest says"
        )
    return 1 if damage else 0


def _damaged_profile(path: Path) -> Iterator[str]:
    """The profile may change after the build, so the manifest does not list it; it has a checksum of its own."""
    try:
        Profile.read(path)
    except StoreDamaged as damage:
        yield str(damage)

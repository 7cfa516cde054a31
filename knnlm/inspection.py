"""What ``knnlm inspect``, ``knnlm verify`` and ``knnlm remove`` show: facts of a datastore, its documents, where an
entry came from, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knnlm import console
from knnlm.datastore.audit import logged_operations
from knnlm.datastore.checking import Progress, store_problems
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore, Evidence, signature_of
from knnlm.datastore.removal import Removal
from knnlm.datastore.selection import as_text, matching_rows
from knnlm.errors import KNNLMError, StoreLocked
from knnlm.gate import Gate
from knnlm.index import read_index_facts

LISTED_AT_MOST = 1_000
NAMED_AT_MOST = 20
BIG_STORE = 1 << 28
FACT_COLUMNS = ("fact", "value")


def facts(store: Datastore) -> dict[str, Any]:
    """Everything that ``inspect`` says, as JSON."""
    manifest = store.manifest
    index = read_index_facts(store.path / manifest.index)
    index_bytes = sum(file.bytes for name, file in manifest.files.items() if name.startswith(f"{manifest.index}/"))
    profile, removed = store.profile, manifest.removed
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
        "removed": {"documents": removed.documents if removed else 0, "entries": removed.entries if removed else 0},
        "shards": len(manifest.shards),
        "index": {**asdict(index), "bytes": index_bytes},
        "search": manifest.search,
        "bytes": store.size_bytes(),
        "profile": None if profile is None else {**asdict(profile.mixture), "source": profile.source, "gate": _gate(profile.gate)},
        "audit_log_lines": logged_operations(store.path),
    }


def _gate(gate: Gate | None) -> dict[str, Any] | None:
    """What is said of a profile's gate; ``skip_below`` None: every token is searched for."""
    if gate is None:
        return None
    return {"kind": gate.content()["kind"], "floor": gate.floor, "skip_below": None if gate.skip is None else gate.skip.threshold}


def show(store: Datastore, *, as_json: bool) -> None:
    """Print :func:`facts`."""
    said = facts(store)
    if as_json:
        console.print_json(said)
        return
    rows = [*_model_rows(said), *_content_rows(said), *_search_rows(said)]
    rows += [
        ("size", _size(said["bytes"], said["counts"]["entries"])),
        ("audit log", console.counted(said["audit_log_lines"], "line")),
        (
            "made",
            f"{said['created']} by knnlm {said['knnlm_version']}, format {said['format_version']}, fingerprint {said['fingerprint'][:12]}",
        ),
    ]
    console.out.print(console.table(str(store.path), FACT_COLUMNS, rows, right=False))


def _model_rows(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, key, text, windowing = said["model"], said["key"], said["text"], said["windowing"]
    special = ", ".join(f"{name} {text[f'{name}_id']}" for name in ("bos", "eos") if text[f"{name}_id"] is not None)
    stored = "not stored, so distances come from the index" if key["dtype"] == "none" else f"stored as {key['dtype']}"
    return [
        ("model", f"{model['name']} ({model['dtype']}; weights {model['fingerprint']['weights'][:12]})"),
        ("key layer", f"{key['layer']['kind']} ({key['layer']['module']}{', normalized' if key['layer']['normalized'] else ''})"),
        ("keys", f"width {key['dimension']}, {stored}"),
        ("special tokens", special or "none"),
        ("windows", f"{console.counted(windowing['max_length'], 'token')}, stride {windowing['stride']}"),
    ]


def _content_rows(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts, removed = said["counts"], said["removed"]

    def live(name: str) -> str:
        if not removed["documents"]:
            return f"{counts[name]:,}"
        return f"{counts[name] - removed[name]:,} live, {removed[name]:,} removed"

    return [
        ("documents", live("documents")),
        ("tokens", f"{counts['tokens']:,}" + (" (from token arrays)" if said["text"]["pretokenized"] else "")),
        ("entries", f"{live('entries')}, in {console.counted(said['shards'], 'shard')}"),
    ]


def _search_rows(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    index, profile = said["index"], said["profile"]
    mixture = f"k={profile['k']}, temperature={profile['temperature']:g}, weight={profile['weight']:g}" if profile else "not calibrated"
    gate = profile["gate"] if profile else None
    return [
        ("index", f"{index['factory']}, {_size(index['bytes'], said['counts']['entries'])}"),
        ("search settings", said["search"] or "by rule, not measured"),
        ("mixture", mixture),
        ("adaptive weight", "none" if gate is None else _gate_line(gate)),
    ]


def _gate_line(gate: Mapping[str, Any]) -> str:
    skip = (
        f"no search where less than {gate['skip_below']:g} is expected" if gate["skip_below"] is not None else "every token is searched for"
    )
    return f"{gate['kind'].replace('_', ' ')}, 0 below {gate['floor']:g}, {skip}"


def _size(count: int, entries: int) -> str:
    return f"{console.size(count)} ({count / max(entries, 1):.0f} bytes an entry)"


def show_documents(store: Datastore, where: Mapping[str, str], *, as_json: bool) -> None:
    """Print the documents that meet the conditions ``where``, with the number of their entries; a table is cut, and says so."""
    table = store.documents
    rows = matching_rows(table, where)
    removed = set(store.tombstones.documents.tolist())
    shown = rows if as_json else rows[:LISTED_AT_MOST]
    columns = (table.texts("id", shown), table.texts("source", shown), (table.token_counts[shown] - 1).tolist(), shown.tolist())
    listed = [(name, source, entries, row in removed) for name, source, entries, row in zip(*columns, strict=True)]
    if as_json:
        console.print_json({"documents": [dict(zip(("id", "source", "entries", "removed"), document, strict=True)) for document in listed]})
        return
    cells = [(name, source, f"{entries:,}", "yes" if gone else "no") for name, source, entries, gone in listed]
    console.out.print(console.table(str(store.path), ("document", "source", "entries", "removed"), cells, right=False))
    if len(rows) > len(shown):
        console.messages.print(f"and {console.counted(len(rows) - len(shown), 'document')} more; --json lists all")


def show_entry(store: Datastore, entry: int, *, model: str | None = None, as_json: bool) -> None:
    """Print document, place and left context of an entry; of a removed one, only that it is removed.

    Tokens are shown as text where the store's tokenizer is on this machine (``model``: where it lies now).
    """
    if store.is_removed(entry):
        if as_json:
            console.print_json({"entry": entry, "removed": True})
        else:
            console.out.print(console.table(f"entry {entry:,}", FACT_COLUMNS, [("removed", "yes, with its document")], right=False))
        return
    evidence = store.evidence(entry)
    said = {**asdict(evidence), "removed": False, **_texts(store.manifest, evidence, model)}
    del said["document"]["line_starts"]
    if as_json:
        console.print_json(said)
        return
    console.out.print(console.table(f"entry {entry:,}", FACT_COLUMNS, _entry_rows(evidence, said), right=False))


def _texts(manifest: Manifest, evidence: Evidence, model: str | None) -> dict[str, str | None]:
    """Token and left context as text; None for both, and why, where there is no tokenizer for them."""
    from knnlm.opening import load_tokenizer

    console.quiet_transformers()
    try:
        tokenizer = load_tokenizer(manifest, model)
    except KNNLMError as error:
        return {"token_text": None, "left_context_text": None, "no_text_because": str(error)}
    return {
        "token_text": tokenizer.token_text(evidence.token_id),
        "left_context_text": tokenizer.decode(evidence.left_context),
        "no_text_because": None,
    }


def _entry_rows(evidence: Evidence, said: Mapping[str, Any]) -> list[tuple[str, str]]:
    document, characters = evidence.document, evidence.characters
    where = "no character offsets" if characters is None else f"characters {characters[0]:,} to {characters[1]:,}, line {evidence.line:,}"
    token, context = str(evidence.token_id), " ".join(map(str, evidence.left_context))
    if said["no_text_because"] is None:
        token, context = f"{said['token_text']!r} (id {token})", said["left_context_text"]
    rows = [
        ("value token", token),
        ("left context", context),
        ("document", document.id),
        ("source", document.source),
        ("place", where),
        *((f"metadata: {name}", as_text(value)) for name, value in document.metadata.items()),
    ]
    if said["no_text_because"] is not None:
        rows.append(("token ids, since", said["no_text_because"]))
    return rows


def show_removal(path: Path, removal: Removal, *, dry_run: bool, as_json: bool) -> None:
    """Print what a removal came to, or would come to (``dry_run``)."""
    if as_json:
        console.print_json({**asdict(removal), "dry_run": dry_run})
    else:
        verb = "would be removed" if dry_run else "removed"
        done = f"{_amount(len(removal.removed), removal.entries)} {verb}" if removal.removed else "nothing to remove"
        console.out.print(f"{path}: {done}; {_amount(removal.documents_left, removal.entries_left)} left", soft_wrap=True, markup=False)
        _name(verb, removal.removed)
        _name("already removed", removal.already_removed)
    if not removal.documents_left:
        console.messages.print("warning: no document is left, so the datastore has no neighbours and every answer is the base LM's.")


def _amount(documents: int, entries: int) -> str:
    return f"{console.counted(documents, 'document')} with {console.counted(entries, 'entry', 'entries')}"


def _name(what: str, ids: list[str]) -> None:
    for name in ids[:NAMED_AT_MOST]:
        console.out.print(f"{what}: {name}", soft_wrap=True, markup=False)
    if len(ids) > NAMED_AT_MOST:
        console.out.print(f"{what}: {len(ids) - NAMED_AT_MOST:,} more; --json lists all")


def verify(path: Path, *, as_json: bool) -> int:
    """Print the problems of the store at ``path``; exit status 0 if there are none, else 1."""
    before = signature_of(path)
    manifest = Manifest.read(path)
    size = sum(facts.bytes for facts in manifest.files.values())
    with _progress(size) as progress:
        problems = list(store_problems(path, manifest, progress))
    if problems and signature_of(path) != before:
        raise StoreLocked(f"{path} was changed by another process while it was read; run knnlm verify again.")
    if as_json:
        console.print_json({"files": len(manifest.files), "problems": problems})
    elif problems:
        for sentence in problems:
            console.out.print(sentence, soft_wrap=True, markup=False)
    else:
        console.out.print(f"{path}: {console.counted(len(manifest.files), 'file')}, {console.size(size)}, all as the manifest says")
    return 1 if problems else 0


@contextmanager
def _progress(size: int) -> Iterator[Progress]:
    """Progress where there is time to look at it."""
    if size < BIG_STORE:
        yield lambda stage, done, total: None
        return
    with console.progress() as reporter:
        yield reporter.update

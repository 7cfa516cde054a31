"""The manifest: what was written is read, and whatever was changed since is refused in words."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knnlm.datastore.files import FileFacts, file_facts, read_json_with_checksum, write_json_with_checksum
from knnlm.datastore.manifest import (
    BUILD_FOLDER,
    FORMAT_VERSION,
    MANIFEST,
    Counts,
    KeyFacts,
    Manifest,
    ModelFacts,
    RemovedFacts,
    ShardFacts,
    TextFacts,
)
from knnlm.datastore.profile import PROFILE, Profile
from knnlm.errors import StoreDamaged, StoreError, StoreIncomplete, StoreMismatch, StoreNotFound, StoreVersion
from knnlm.mixture import Mixture
from knnlm.model import KeyLayer, ModelFingerprint
from knnlm.windows import Windowing


def manifest() -> Manifest:
    return Manifest(
        knnlm_version="0.1.0",
        created="2026-01-01T00:00:00+00:00",
        model=ModelFacts("models/größe", None, False, "float32", ModelFingerprint("c" * 32, "t" * 32, "w" * 32), 300),
        key=KeyFacts(KeyLayer("last_ffn_input", "transformer.h.1.mlp", True), 32, "float16"),
        text=TextFacts("auto", False, 0, None, r"^= .* =$", False),
        windowing=Windowing(64, 32),
        counts=Counts(documents=2, tokens=30, entries=28),
        shards=[ShardFacts("00000", 0, 20, 0, 19), ShardFacts("00001", 20, 10, 19, 9)],
        documents=["documents/00000.arrow"],
        next_serial=3,
        index="index/00000",
        corpus_xxh3="0" * 32,
        files={"documents/00000.arrow": FileFacts(10, "a" * 32), "shards/00000/keys.npy": FileFacts(20, "b" * 32)},
        search="search/00000.json",
        removed=RemovedFacts("removed/00001.npy", 1, 12),
        audit=FileFacts(5, "c" * 32),
        appended=["1" * 32],
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    manifest().write(tmp_path)
    return tmp_path


def read_or_refusal(store: Path) -> Manifest | None:
    try:
        return Manifest.read(store)
    except StoreError:
        return None


def rewrite(store: Path, change: Any) -> None:
    """Change the manifest and give it a right checksum again."""
    content = read_json_with_checksum(store / MANIFEST)
    change(content)
    write_json_with_checksum(store / MANIFEST, content)


@pytest.mark.parametrize("name", ["../out", "shards/../../out", "/tmp/out", ""])
@pytest.mark.parametrize("field", ["files", "shards", "documents", "index", "search", "removed"])
def test_places_outside_of_the_datastore_are_refused(store: Path, field: str, name: str) -> None:
    def change(content: dict[str, Any]) -> None:
        if field == "files":
            content["files"][name] = content["files"].pop("documents/00000.arrow")
        elif field == "shards":
            content["shards"][1]["name"] = name
        elif field == "documents":
            content["documents"] = [name]
        elif field == "removed":
            content["removed"]["file"] = name
        else:
            content[field] = name

    rewrite(store, change)
    with pytest.raises(StoreDamaged, match="is no place in the datastore"):
        Manifest.read(store)


def test_round_trip(store: Path) -> None:
    assert Manifest.read(store) == manifest()


def test_written_whole_or_not_at_all(store: Path) -> None:
    assert [file.name for file in store.iterdir()] == [MANIFEST]


def test_fingerprint_leaves_out_time_audit_log_and_receipts() -> None:
    one = manifest()
    assert replace(one, created="later", audit=None).fingerprint == one.fingerprint
    receipts = {**one.files, "shards/00000/receipt.json": FileFacts(3, "d" * 32)}
    assert replace(one, files=receipts).fingerprint == one.fingerprint
    assert replace(one, removed=None).fingerprint != one.fingerprint
    assert replace(one, corpus_xxh3="1" * 32).fingerprint != one.fingerprint
    assert replace(one, counts=Counts(2, 31, 29)).fingerprint != one.fingerprint


def test_no_folder_no_manifest_and_an_interrupted_build_are_three_things(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=r"no such folder.*knnlm build"):
        Manifest.read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreNotFound):
        Manifest.read(tmp_path / "file")
    with pytest.raises(StoreNotFound, match=MANIFEST):
        Manifest.read(tmp_path)
    (tmp_path / BUILD_FOLDER).mkdir()
    with pytest.raises(StoreIncomplete, match="interrupted"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '"text"', "{}", '{"format_version": 1}', "[" * 100_000, "\ufeff{}"])
def test_what_is_no_manifest_is_damaged(store: Path, content: str) -> None:
    (store / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(StoreDamaged, match=MANIFEST):
        Manifest.read(store)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found(store: Path, data: st.DataObject) -> None:
    manifest().write(store)
    content = bytearray((store / MANIFEST).read_bytes())
    place = data.draw(st.integers(0, len(content) - 2))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (store / MANIFEST).write_bytes(bytes(content))
    # Only the space between JSON's words may change, and only without a change of meaning.
    if read_or_refusal(store) != manifest():
        with pytest.raises(StoreError, match=MANIFEST):
            Manifest.read(store)


@pytest.mark.parametrize("cut", [1, 2, 100, 0.5])
def test_a_truncated_manifest_is_damaged(store: Path, cut: float) -> None:
    content = (store / MANIFEST).read_bytes()
    (store / MANIFEST).write_bytes(content[: int(cut * len(content)) if cut < 1 else -int(cut)])
    with pytest.raises(StoreDamaged, match=MANIFEST):
        Manifest.read(store)


def test_a_changed_value_with_the_old_checksum_is_damaged(store: Path) -> None:
    content = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
    content["counts"]["entries"] += 1
    (store / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StoreDamaged, match="checksum"):
        Manifest.read(store)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None, True, 1.5, []])
def test_another_format_version_is_refused_with_both_versions(store: Path, version: object) -> None:
    rewrite(store, lambda content: content.update(format_version=version))
    with pytest.raises(StoreError, match=MANIFEST) as refused:
        Manifest.read(store)
    if isinstance(version, int) and not isinstance(version, bool):
        assert isinstance(refused.value, StoreVersion)
        assert f"version {version}" in str(refused.value)
        assert f"versions 1 to {FORMAT_VERSION}" in str(refused.value)


def test_an_unknown_required_feature_is_refused_by_name(store: Path) -> None:
    rewrite(store, lambda content: content.update(requires=["tombstones", "other"]))
    with pytest.raises(StoreVersion, match="other, tombstones"):
        Manifest.read(store)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all fields of dataclasses within the manifest's JSON."""
    if isinstance(value, list):
        return places(value[0], (*path, 0)) if value else []
    if not isinstance(value, dict):
        return []
    own = [] if path == ("files",) else [(*path, name) for name in value]
    first = dict(list(value.items())[:1]) if path == ("files",) else value
    return own + [place for name, item in first.items() for place in places(item, (*path, name))]


def example() -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(manifest())


@pytest.mark.parametrize("place", places(example()), ids=lambda place: ".".join(map(str, place)))
def test_every_field_is_required_and_typed(store: Path, place: tuple[Any, ...]) -> None:
    def owner(content: Any) -> Any:
        for step in place[:-1]:
            content = content[step]
        return content

    def remove(content: Any) -> None:
        del owner(content)[place[-1]]

    def spoil(content: Any) -> None:
        owner(content)[place[-1]] = {"neither": [1.5]}

    original = copy.deepcopy(read_json_with_checksum(store / MANIFEST))
    for change in (remove, spoil):
        write_json_with_checksum(store / MANIFEST, original)
        rewrite(store, change)
        if place == ("requires",) and change is remove:
            continue
        with pytest.raises(StoreError, match=MANIFEST) as refused:
            Manifest.read(store)
        assert str(place[-1]).removesuffix("_version") in str(refused.value) or change is spoil


@pytest.mark.parametrize(
    ("field", "value"),
    [("counts", {"documents": True, "tokens": 3, "entries": 2}), ("counts", {"documents": "2", "tokens": 3, "entries": 2}), ("requires", 5),
     ("requires", [{}]), ("requires", [1]), ("shards", {}), ("files", []), ("windowing", {"max_length": 1, "stride": 1}),
     ("windowing", {"max_length": 8, "stride": 9})],
)  # fmt: skip
def test_wrong_values_are_damage_and_nothing_else(store: Path, field: str, value: object) -> None:
    rewrite(store, lambda content: content.update({field: value}))
    with pytest.raises(StoreError, match=MANIFEST):
        Manifest.read(store)


class AnyModel:
    """As much of a model as the manifest compares."""

    def __init__(self, **facts: Any) -> None:
        made = manifest()
        self.name, self.fingerprint = "other/place", made.model.fingerprint
        self.key_layer, self.key_dimension = made.key.layer, made.key.dimension
        self.__dict__.update(facts)


def test_the_same_model_elsewhere_is_accepted() -> None:
    manifest().require_model(AnyModel())  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["configuration", "tokenizer", "weights"])
def test_another_model_is_refused_with_both_sides_named(part: str) -> None:
    other = AnyModel(fingerprint=replace(manifest().model.fingerprint, **{part: "0123456789abcdef"}))
    with pytest.raises(StoreMismatch, match=part) as refused:
        manifest().require_model(other)  # type: ignore[arg-type]
    for named in ("models/größe", "other/place", "0123456789ab"):
        assert named in str(refused.value)


@pytest.mark.parametrize("facts", [{"key_layer": KeyLayer("last_hidden", "transformer", True)}, {"key_dimension": 64}])
def test_another_key_is_refused_with_both_sides_named(facts: dict[str, Any]) -> None:
    with pytest.raises(StoreMismatch, match=r"transformer\.h\.1\.mlp.*width 32.*but the model gives") as refused:
        manifest().require_model(AnyModel(**facts))  # type: ignore[arg-type]
    assert "last_hidden" in str(refused.value) or "width 64" in str(refused.value)


def test_file_facts_are_size_and_checksum(tmp_path: Path) -> None:
    import xxhash

    content = bytes(range(256)) * 40_000
    (tmp_path / "file").write_bytes(content)
    assert file_facts(tmp_path / "file") == FileFacts(len(content), xxhash.xxh3_128(content).hexdigest())


def test_profile_round_trip_and_absence(tmp_path: Path) -> None:
    assert Profile.read(tmp_path) is None
    profile = Profile(Mixture(k=7, temperature=2.5, weight=0.3), "exact", "held-out.txt")
    profile.write(tmp_path)
    assert Profile.read(tmp_path) == profile


@pytest.mark.parametrize("change", [{"k": 0}, {"weight": 2}, {"temperature": 0}, {"k": "many"}, {"k": None}, {"weight": []}])
def test_a_profile_that_makes_no_sense_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    Profile(Mixture(), "exact", "held-out.txt").write(tmp_path)
    content = read_json_with_checksum(tmp_path / PROFILE)
    write_json_with_checksum(tmp_path / PROFILE, {**content, **change})
    with pytest.raises(StoreDamaged, match=PROFILE):
        Profile.read(tmp_path)
    write_json_with_checksum(tmp_path / PROFILE, {name: value for name, value in content.items() if name not in change})
    with pytest.raises(StoreDamaged, match=PROFILE):
        Profile.read(tmp_path)

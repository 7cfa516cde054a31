"""Finding the files of a corpus: which of those below a path are read, and what is left out by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knnlm.errors import CorpusError, KNNLMError
from knnlm.inputs.files import Format, InputFile, format_of, is_binary
from knnlm.inputs.ignoring import GITIGNORE, IgnoreRules
from knnlm.inputs.places import Pattern, Place, as_glob
from knnlm.inputs.problems import LeftOut, Problems

BINARY, IGNORED, LINKS = "binary files", "files and folders of .gitignore", "links to folders, broken links and devices"
DATASET_FILES = {"state.json", "dataset_info.json"}
DATASET_DICT = "dataset_dict.json"

Info = dict[str, Any]
Parts = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The files of a corpus in the order they are read, and what is left out of it."""

    files: list[InputFile] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def find_files(paths: Sequence[str | Path], problems: Problems, *, gitignore: bool = True) -> Found:
    """The files of paths, each a file, folder, glob or URL, in the order given; those of a folder sorted by name.

    A file's name is its path below the folder that was given, after the folder's own name if several paths are given.
    Raises :class:`CorpusError` for a path where nothing is, :class:`MissingDependency` for a URL of an unknown package.
    """
    found = Found()
    for given in paths:
        place = Place.of(str(given))
        info, pattern = place.info(), None
        if info is None and (glob := as_glob(place)) is not None:
            place, pattern = glob
            info = place.info()
            if info is not None and info["type"] != "directory":
                info = None
        if info is None:
            raise CorpusError(f"There is no file or folder {place}.")
        if info["type"] == "directory":
            label = (place.name,) if len(paths) > 1 else ()
            _Search(place, label, pattern, gitignore, found, problems).run()
        elif info["type"] == "other" and not place.remote:
            raise CorpusError(f"{place} is a pipe or device, which can be read once only; write its text to a file.")
        else:
            found.files.append(_file(place, place.name, (), place.path, info.get("size"), format_of(place.name)))
    return found


def _file(place: Place, name: str, parts: Parts, path: str, size: int | None, kind: Format) -> InputFile:
    return InputFile(name, place.at(parts), place.filesystem, path, size, kind, place.remote)


class _Search:
    """The search through one folder; ``label`` stands before the names of its files."""

    def __init__(self, place: Place, label: Parts, pattern: Pattern | None, gitignore: bool, found: Found, problems: Problems) -> None:
        self._place, self._label, self._pattern, self._gitignore = place, label, pattern, gitignore
        self._found, self._problems = found, problems

    def run(self) -> None:
        """Take what is to be read."""
        self._folder(self._place.path, (), IgnoreRules(), wanted=self._pattern is None)

    def _folder(self, path: str, parts: Parts, rules: IgnoreRules, *, wanted: bool) -> None:
        """Take the files of a folder and of those below it: all if it is ``wanted``, else those that the pattern means."""
        try:
            entries = self._entries(path)
            rules = self._more_rules(entries, parts, rules)
        except KNNLMError:
            raise
        except Exception as error:  # of the network library below a filesystem
            self._problems.found("unreadable folders", f"{self._place.at(parts)} can't be read: {error}")
            return
        if {name for name, _ in entries} >= DATASET_FILES:
            if wanted:
                size = sum(info.get("size") or 0 for name, info in entries if name.endswith(".arrow"))
                self._found.files.append(_file(self._place, self._name(parts) or self._place.name, parts, path, size, "dataset"))
            return
        for name, info in entries:
            if not name.startswith(".") and name != DATASET_DICT:
                here = (*parts, name)
                self._entry(here, info, rules, wanted=wanted or (self._pattern is not None and self._pattern.matches(here)))

    def _entry(self, parts: Parts, info: Info, rules: IgnoreRules, *, wanted: bool) -> None:
        kind, size, is_link = info["type"], info.get("size"), info.get("islink", False)
        if is_link and kind == "other":
            kind, size = self._behind(info)
        is_folder = kind == "directory" and not is_link
        if not wanted and not (is_folder and self._pattern is not None and self._pattern.may_match_in(parts)):
            return
        name = self._name(parts)
        if rules.ignores(parts, folder=is_folder):
            self._found.left_out.add(IGNORED, name + "/" * is_folder)
        elif is_folder:
            self._folder(info["name"], parts, rules, wanted=wanted)
        elif kind != "file":
            self._found.left_out.add(LINKS, name)
        else:
            self._take(_file(self._place, name, parts, info["name"], size, format_of(name)))

    def _take(self, file: InputFile) -> None:
        if file.format == "text" and is_binary(file):
            self._found.left_out.add(BINARY, file.name)
        else:
            self._found.files.append(file)

    def _name(self, parts: Parts) -> str:
        return "/".join([*self._label, *parts])

    def _entries(self, path: str) -> list[tuple[str, Info]]:
        """What is in a folder, sorted by name; some stores of objects list the folder itself, too."""
        listed = self._place.filesystem.ls(path, detail=True)
        found = [(info["name"].rstrip("/").rpartition("/")[2], info) for info in listed if info["name"].strip("/") != path.strip("/")]
        return sorted(found, key=lambda entry: (entry[0], entry[1]["type"] == "directory"))

    def _more_rules(self, entries: list[tuple[str, Info]], parts: Parts, rules: IgnoreRules) -> IgnoreRules:
        path = next((info["name"] for name, info in entries if name == GITIGNORE and info["type"] == "file"), None)
        if path is None or not self._gitignore:
            return rules
        return rules.with_file(len(parts), self._place.filesystem.cat_file(path), self._place.at((*parts, GITIGNORE)))

    def _behind(self, info: Info) -> tuple[str, int | None]:
        """What a link of a local folder leads to."""
        try:
            target = self._place.filesystem.info(info["name"])
        except OSError:
            return "other", None
        return target["type"], target["size"]

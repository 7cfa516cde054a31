"""The demo's text: documentation that ships inside every CPython, cut into documents and split by document.

Knows nothing of models, datastores or servers. Two disjoint bodies of text come out of one standard library:

- :func:`demo_documents`: the language reference (``pydoc_data.topics``) and the docstrings of the modules in
  :data:`DEMO_MODULES`. ``knnlm demo`` builds its datastore from most of them and compares perplexities on the rest.
- :func:`training_documents`: the sources of every other module. The demo's language model learnt from these alone.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEMO_MODULES = frozenset(
    """
    argparse bisect calendar collections _collections_abc concurrent configparser contextlib copy csv dataclasses
    datetime difflib enum fnmatch fractions functools getopt glob graphlib hashlib heapq inspect ipaddress json keyword
    locale logging numbers operator os pathlib pprint queue random re reprlib sched secrets selectors shelve shlex
    shutil signal socket socketserver statistics string subprocess tempfile textwrap threading _threading_local timeit
    tokenize traceback types typing uuid warnings weakref zipfile
    """.split()  # noqa: SIM905 - a list of sixty names reads better as text
)
"""Top-level standard-library modules whose docstrings belong to the demo, and never to its language model."""

EXCLUDED = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__", "pdb.py", "lib2to3"})
"""Left out of both: tests, tables, ``pdb`` and ``lib2to3``, which repeat the topic ``debugger`` and the module ``tokenize``."""


SHARED_PARAGRAPH_CHARACTERS = 60
HELD_OUT_ONE_IN = 6


@dataclass(frozen=True)
class Document:
    """One document: ``name`` is its path within the corpus (``topics/try.txt``), ``text`` what it says."""

    name: str
    text: str


@dataclass(frozen=True)
class Split:
    """The demo's documents, divided by document: no document stands on both sides."""

    datastore: list[Document]
    held_out: list[Document]


def training_documents() -> Iterator[Document]:
    """Sources of the modules outside :data:`DEMO_MODULES`, then the docstrings of each once more, as prose."""
    for name, path in _library_sources():
        if name.parts[0].removesuffix(".py") in DEMO_MODULES or name.name.startswith("_sysconfigdata"):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        yield Document(str(name), source)
        docstrings = _docstrings(source)
        if docstrings:
            yield Document(f"{name}:docstrings", docstrings)


def demo_documents() -> list[Document]:
    """Language-reference topics and docstrings of :data:`DEMO_MODULES`, sorted by name.

    Topics that mostly repeat a longer one (``attribute-access`` stands inside ``specialnames``) are left out.
    """
    documents = _distinct_topics()
    for name, path in _library_sources():
        if name.parts[0].removesuffix(".py") in DEMO_MODULES:
            text = _docstrings(path.read_text(encoding="utf-8", errors="replace"))
            if len(text) >= 400:
                documents.append(Document(f"docstrings/{'.'.join(name.with_suffix('').parts)}.txt", text))
    return sorted(documents, key=lambda document: document.name)


def split_documents(documents: list[Document]) -> Split:
    """Hold out about one document in six, by a checksum of its name.

    A document that shares a paragraph of 60 characters or more with another one is never held out: its text would
    stand in the datastore, and perplexity would look better than it is.
    """
    owners: dict[str, set[str]] = {}
    for document in documents:
        for paragraph in _paragraphs(document.text):
            owners.setdefault(paragraph, set()).add(document.name)
    sharing = {name for names in owners.values() if len(names) > 1 for name in names}
    split = Split([], [])
    for document in documents:
        chosen = zlib.crc32(document.name.encode()) % HELD_OUT_ONE_IN == 0 and document.name not in sharing
        (split.held_out if chosen else split.datastore).append(document)
    return split


def _library_sources() -> Iterator[tuple[Path, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not EXCLUDED.intersection(name.parts):
            yield name, path


def _distinct_topics() -> list[Document]:
    from pydoc_data.topics import topics

    kept: list[Document] = []
    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = _paragraphs(text)
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if 2 * repeated < sum(map(len, paragraphs)):
            kept.append(Document(f"topics/{name}.txt", text.strip() + "\n"))
            seen.update(paragraphs)
    return kept


def _paragraphs(text: str) -> list[str]:
    return [p for p in text.split("\n\n") if len(p) >= SHARED_PARAGRAPH_CHARACTERS]


def _docstrings(source: str) -> str:
    """All docstrings of a module in source order, each under the name of what it documents."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    parts: list[str] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                docstring = ast.get_docstring(child)
                if docstring:
                    kind = "class" if isinstance(child, ast.ClassDef) else "function"
                    parts.append(f"{kind} {name}\n\n{docstring.strip()}\n")
                visit(child, f"{name}.")
            else:
                visit(child, prefix)

    module_docstring = ast.get_docstring(tree)
    if module_docstring:
        parts.append(module_docstring.strip() + "\n")
    visit(tree, "")
    return "\n".join(parts)

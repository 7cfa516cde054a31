"""Every command and every Python block of the documentation runs, and ``docs/cli.md`` is what the commands say.

Fences of README.md, the other pages at the top and ``docs/``:

- ``console``: lines that begin with ``$ `` are commands (``\\`` at the end goes on in the next line); other lines are
  output and are not compared. They run in order, in one folder for each page, that holds ``corpus/``, ``more/`` (JSON
  lines with a ``license``), ``heldout.txt`` and ``store/`` (made of the first, unless the page itself builds it).
  ``--model NAME`` finds a tiny model at NAME. ``knnlm serve`` runs in the background until the page ends, unless it is
  given ``--check``; the ports 50051, 50052 and 9090 become free ones. ``make TARGET`` must be a target of the Makefile
  and is not run here, and neither is ``knnlm demo``: ``make demo`` does. ``buf`` is a client from elsewhere.
- ``python``: blocks run in order, in one namespace for each page and the same folder, with ``STORE`` and ``MODEL`` set.
- either with `` not-run: REASON`` after it is left out.
- ``bash``, ``sh`` and ``shell`` are refused, so that no command escapes.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from transformers import GPT2Config, GPT2LMHeadModel

from knnlm import cli
from knnlm.model import HFLanguageModel
from tests.stores import build, environment, text_folder
from tests.tiny import VOCABULARY, save, tiny_corpus, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")})
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+)(?P<info>[^`\n]*)$")
PORTS = ("50051", "50052", "9090")
SECONDS = 300
LICENSES = ("CC-BY-4.0", "internal")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, why it is not run (None: it is), and its text."""

    page: Path
    line: int
    language: str
    not_run: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    opening: re.Match[str] | None = None
    start, lines = 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = FENCE.match(line)
        if opening is None and fence:
            opening, start, lines = fence, number, []
        elif opening is not None and fence and not fence["info"] and len(fence["ticks"]) >= len(opening["ticks"]):
            language, _, rest = opening["info"].strip().partition(" ")
            reason = rest.removeprefix("not-run:").strip() if rest.startswith("not-run:") else None
            indent = len(opening["indent"])
            found.append(Block(page, start, language, reason, "\n".join(text[indent:] for text in lines) + "\n"))
            opening = None
        elif opening is not None:
            lines.append(line)
    assert opening is None, f"{page}:{start}: a fence that is not closed"
    return found


def commands(block: Block) -> list[str]:
    """The lines of a console block that begin with ``$``, continued ones joined, comments cut off."""
    joined = re.sub(r"\\\n\s*>?", " ", block.text)
    return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_fences_follow_the_convention(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language not in ("bash", "sh", "shell", "zsh", "shell-session"), f"{where}: use console, so that it is run"
        assert block.not_run != "", f"{where}: not-run without a reason"
        if block.language != "console" or block.not_run is not None:
            continue
        assert commands(block), f"{where}: a console block without a command; lines with commands begin with '$ '"
        for line in commands(block):
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert set(words[1:]) <= targets, f"{where}: {line} is no target of the Makefile"
            else:
                assert "knnlm" in words or words[0] == "buf", (
                    f"{where}: only knnlm, buf and make are run here; fence it as 'console not-run: REASON'"
                )


def executed(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("console", "python") and block.not_run is None]


RUN = [page for page in PAGES if executed(page)]


class Folder:
    """The folder that a page's blocks run in, and what runs there."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path = path
        self.names: dict[str, Any] = {"__name__": "__main__", "STORE": str(path / "store"), "MODEL": str(model)}
        self._model = model
        self._servers: list[subprocess.Popen[str]] = []
        with ExitStack() as sockets:
            free = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
            self._ports = {port: str(one.getsockname()[1]) for port, one in zip(PORTS, free, strict=True)}

    def python(self, block: Block) -> None:
        """Run a block with its lines numbered as in the page, so that an error names them."""
        text = "\n" * block.line + self._with_free_ports(block.text)
        exec(compile(text, str(block.page), "exec"), self.names)

    def command(self, line: str) -> None:
        line = self._with_free_ports(line)
        words = shlex.split(line, comments=True)
        if words[0] == "make" or words[:2] == ["knnlm", "demo"]:
            return
        self._place_models(words)
        if words[:2] == ["knnlm", "serve"] and "--check" not in words:
            self._serve([word for word in words if word != "&"])
            return
        done = subprocess.run(["bash", "-c", line], cwd=self.path, env=self._environment(), capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    def close(self) -> None:
        for server in self._servers:
            server.terminate()
            _, err = server.communicate(timeout=SECONDS)
            assert server.returncode == 0, err

    def _with_free_ports(self, text: str) -> str:
        return re.sub("|".join(rf"\b{port}\b" for port in PORTS), lambda found: self._ports[found[0]], text)

    def _place_models(self, words: list[str]) -> None:
        for option, name in itertools.pairwise(words):
            place = self.path / name
            if option == "--model" and not Path(name).is_absolute() and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(self._model, target_is_directory=True)

    def _serve(self, words: list[str]) -> None:
        server = subprocess.Popen(words, cwd=self.path, env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._servers.append(server)
        assert server.stdout is not None
        if not server.stdout.readline().startswith("listening on "):
            pytest.fail(f"{shlex.join(words)}\n{server.communicate(timeout=SECONDS)}")

    def _environment(self) -> dict[str, str]:
        return {**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for the completions that pages ask for by default."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=0)
    return save(GPT2LMHeadModel(config).eval(), tiny_tokenizer(), tmp_path_factory.mktemp("models") / "roomy")


@pytest.fixture(scope="module")
def prepared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    text_folder(folder / "corpus", tiny_corpus(30))
    (folder / "heldout.txt").write_text("".join(tiny_corpus(3, seed=50)))
    (folder / "more").mkdir()
    texts = tiny_corpus(len(LICENSES), seed=7)
    notes = [{"id": f"note-{text[:9]}", "text": text, "license": license} for text, license in zip(texts, LICENSES, strict=True)]
    (folder / "more" / "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    build(folder / "corpus", folder / "store", HFLanguageModel.load(model))
    return folder


@pytest.fixture
def folder(prepared: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    path = Path(shutil.copytree(prepared, tmp_path / "work"))
    monkeypatch.chdir(path)
    running = Folder(path, model)
    yield running
    running.close()


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_runs(page: Path, folder: Folder) -> None:
    found = executed(page)
    builds = [
        words
        for block in found
        if block.language == "console"
        for words in map(shlex.split, commands(block))
        if words[:2] == ["knnlm", "build"]
    ]
    if any(name.rstrip("/") == "store" for words in builds for option, name in itertools.pairwise(words) if option == "--store"):
        shutil.rmtree(folder.path / "store")
    for block in found:
        if block.language == "python":
            folder.python(block)
        else:
            for line in commands(block):
                folder.command(line)


def load(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> Any:
    return load(ROOT / "scripts" / "generate_cli_docs.py")


def test_the_page_of_commands_is_up_to_date(generator: Any) -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == generator.render(), "run: python scripts/generate_cli_docs.py"


def test_the_page_of_commands_does_not_depend_on_the_terminal(generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generator.render()
    for name, value in {"COLUMNS": "30", "TERMINAL_WIDTH": "30", "FORCE_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    assert generator.render() == expected


def command_names() -> list[str]:
    return [info.name or info.callback.__name__ for info in cli.load_commands().registered_commands if info.callback]


@pytest.mark.parametrize("name", sorted(set(command_names())))
def test_help_says_what_the_page_says(name: str, generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    invoke: Callable[..., Any] = typer.testing.CliRunner().invoke
    said = re.sub(r"\x1b\[[\d;]*m", "", invoke(cli.app, [name, "--help"]).output)
    section = (ROOT / "docs" / "cli.md").read_text().split(f"## knnlm {name}\n")[1].split("\n## ")[0]
    options = re.findall(r"^\| `(--[\w-]+)`", section, re.MULTILINE)
    assert options or name == "demo"
    for option in options:
        assert option in said
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", said)) - {"--help"} <= {*options, *re.findall(r"--[\w-]+", section)}


@pytest.mark.parametrize("name", sorted(set(command_names())))
def test_every_command_is_on_the_page(name: str) -> None:
    assert f"\n## knnlm {name}\n" in (ROOT / "docs" / "cli.md").read_text()

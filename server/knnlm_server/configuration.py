"""Where ``knnlm serve`` takes its settings from: flags, then environment variables, then a TOML file, then defaults.

The order and the reading are click's own (``auto_envvar_prefix``, ``default_map``). What is added here: nothing that is
misspelt or of a wrong type goes unnoticed, and the source of each value is known.
"""

from __future__ import annotations

import difflib
import inspect
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo, OptionInfo

from knnlm.errors import InvalidInput

PREFIX = "KNNLM_SERVE"
"""Of the environment variables: KNNLM_SERVE_PORT is ``--port``."""

UNSET = "unset"
_FILE_OPTION = "config"
_SOURCES = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}
_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")


@dataclass(frozen=True)
class Setting:
    """What a parameter of a command takes. ``choices``: where it is one of some words. ``table``: NAME=VALUE, several times."""

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    table: bool = False
    minimum: float | None = None
    maximum: float | None = None

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"{PREFIX}_{self.name.upper()}"

    def from_file(self, value: Any) -> Any:
        """A value of a TOML file as click takes it; raises ValueError, whose text says what it must be."""
        if self.table:
            if not isinstance(value, dict) or any(isinstance(item, dict | list) for item in value.values()):
                raise ValueError("a table of names and values")
            return [f"{name}={item}" for name, item in value.items()]
        right = isinstance(value, int | float) if self.kind is float else isinstance(value, str if self.kind is Path else self.kind)
        if not right or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError(self._wanted())
        return self._in_range(value)

    def from_variable(self, text: str) -> None:
        """Check the text of an environment variable; raises ValueError, whose text says what it must be."""
        if self.table:
            if not all("=" in part for part in text.split()):
                raise ValueError("NAME=VALUE, several of them with spaces between")
        elif self.kind is bool:
            if text.strip().lower() not in (*_TRUE, *_FALSE):
                raise ValueError("true or false")
        elif self.kind in (int, float):
            try:
                self._in_range(self.kind(text))
            except ValueError:
                raise ValueError(self._wanted()) from None
        else:
            self._in_range(text)

    def _in_range(self, value: Any) -> Any:
        if self.choices and value not in self.choices:
            raise ValueError(self._wanted())
        outside = (self.minimum is not None and value < self.minimum) or (self.maximum is not None and value > self.maximum)
        if outside or value != value:
            raise ValueError(self._wanted())
        return value

    def _wanted(self) -> str:
        kinds: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path, as text"}
        if self.choices:
            return " or ".join(self.choices)
        at_least = [f"at least {self.minimum:g}"] if self.minimum is not None else []
        at_most = [f"at most {self.maximum:g}"] if self.maximum is not None else []
        return ", ".join([kinds[self.kind], " and ".join(at_least + at_most)]).removesuffix(", ")


def settings_of(command: Callable[..., Any]) -> dict[str, Setting]:
    """What a command's parameters take, by name, from the signature of its function."""
    hints = typing.get_type_hints(command, include_extras=True)
    names = [name for name in inspect.signature(command).parameters if hints[name] is not typer.Context]
    return {name: _setting(name, *typing.get_args(hints[name])[:2]) for name in names}


def _setting(name: str, hint: Any, said: OptionInfo | ArgumentInfo) -> Setting:
    inner = next((part for part in typing.get_args(hint) if part is not type(None)), hint)
    if typing.get_origin(hint) is typing.Literal:
        return Setting(name, str, typing.get_args(hint))
    if typing.get_origin(inner) is list:
        return Setting(name, str, table=True)
    return Setting(name, inner, minimum=said.min, maximum=said.max)


def read_configuration(command: Callable[..., Any], context: typer.Context, path: Path | None, environment: Mapping[str, str]) -> None:
    """Give the values of the file at ``path`` to click, and check them and the variables of ``environment``.

    To be called before click looks at any other parameter. Raises :class:`InvalidInput`.
    """
    settings = settings_of(command)
    _check_environment(settings, environment)
    if path is not None:
        context.default_map = _read_file(path, {name: setting for name, setting in settings.items() if name != _FILE_OPTION})


def _check_environment(settings: Mapping[str, Setting], environment: Mapping[str, str]) -> None:
    known = {setting.variable: setting for setting in settings.values()}
    for name, text in environment.items():
        if not name.startswith(f"{PREFIX}_") or (name in known and text == ""):
            continue
        if name not in known:
            raise InvalidInput(name, f"is an environment variable that no setting has; {_near(name, known)}")
        try:
            known[name].from_variable(text)
        except ValueError as error:
            raise InvalidInput(name, f"is {text!r}, but must be {error}.") from error


def _read_file(path: Path, settings: Mapping[str, Setting]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(_FILE_OPTION, f"is {path}, which can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise InvalidInput(_FILE_OPTION, f"is {path}, which is not a TOML file: {error}.") from error
    values = {}
    for key, value in content.items():
        if key not in settings:
            raise InvalidInput(_FILE_OPTION, f"is {path}, whose key {key!r} is no setting; {_near(key, settings)}")
        try:
            values[key] = settings[key].from_file(value)
        except ValueError as error:
            raise InvalidInput(_FILE_OPTION, f"is {path}, whose key {key!r} is {value!r}, but must be {error}.") from error
    return values


def _near(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {found[0]}?" if found else f"there are {', '.join(sorted(names))}."


def resolved(context: typer.Context) -> dict[str, str]:
    """Every setting with its value and, in brackets, its source: flag, environment, file or default.

    There is no secret among them: tokens and keys stand in files, and only their paths are settings.
    """
    return {name: f"{_shown(value)} ({_source(context, name)})" for name, value in sorted(context.params.items())}


# Errors name these settings as the option that gives one value of several.
_ONE_OF_SEVERAL = {"limit": "limits", "datastore": "datastores"}


@contextmanager
def blaming_the_source(context: typer.Context) -> Iterator[None]:
    """Name a setting that can't be used by where its value came from: the variable, or the file and its key."""
    try:
        yield
    except InvalidInput as error:
        name = _ONE_OF_SEVERAL.get(error.field, error.field)
        source = _source(context, name) if name in context.params else None
        if source == "environment":
            raise InvalidInput(f"{PREFIX}_{name.upper()}", error.problem) from error
        if source == "file":
            raise InvalidInput(f"{context.params[_FILE_OPTION]}: {name}", error.problem) from error
        raise


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return _SOURCES[source.name] if source is not None else _SOURCES["DEFAULT"]


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or UNSET
    return UNSET if value is None else str(value).lower() if isinstance(value, bool) else str(value)

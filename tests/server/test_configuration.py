"""Settings of ``knnlm serve``: where they may come from, which one wins, and what is refused by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm import cli
from knnlm.errors import InvalidInput
from knnlm_server import app, serve_command
from knnlm_server.configuration import settings_of
from knnlm_server.serve_options import chosen_limits, named_datastores

Serve = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Run the command up to the point where the engine would be made; what it was called with, and the exit status."""

    def run(*arguments: object, **environment: str) -> tuple[int, dict[str, Any]]:
        called: dict[str, Any] = {}

        async def instead(engine_factory: Any, host: str, port: int, **options: Any) -> None:
            called.update(options, host=host, port=port)

        with monkeypatch.context() as patch:
            patch.setattr(app, "serve", instead)
            patch.setattr(serve_command, "_serve", kept(serve_command._serve, called))
            for name, value in environment.items():
                patch.setenv(name, value)
            status = cli.run(cli.load_commands(), ["serve", *map(str, arguments)])
        return status, called

    return run


def kept(serve: Callable[..., None], called: dict[str, Any]) -> Callable[..., None]:
    """``serve``, of which ``called`` keeps the resolved settings if it succeeds."""

    def run(stores: Any, given: Any, resolved: dict[str, str]) -> None:
        serve(stores, given, resolved)
        called["resolved"] = resolved

    return run


def settings(called: dict[str, Any]) -> dict[str, str]:
    """What was resolved, as the log has it."""
    found: dict[str, str] = called["resolved"]
    return found


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(content: str) -> Path:
        path = tmp_path / "serve.toml"
        path.write_text(content)
        return path

    return write


def test_a_flag_wins_over_the_environment_and_that_over_the_file_and_that_over_the_default(serve: Serve, file: Any) -> None:
    path = file("port = 1\ngrace = 1\nstall_seconds = 1.0\nstore = 'a'")
    status, called = serve("--config", path, "--port", 3, KNNLM_SERVE_PORT="2", KNNLM_SERVE_GRACE="2")
    assert status == 0
    assert (called["port"], called["grace"], called["border"].stall_seconds, called["host"]) == (3, 2.0, 1.0, "127.0.0.1")
    shown = settings(called)
    assert shown["port"] == "3 (flag)"
    assert shown["grace"] == "2.0 (environment)"
    assert shown["stall_seconds"] == "1.0 (file)"
    assert shown["host"] == "127.0.0.1 (default)"
    assert shown["store"] == "a (file)"
    assert shown["metrics_port"] == "unset (default)"


def test_the_file_may_be_named_by_the_environment(serve: Serve, file: Any) -> None:
    status, called = serve("store", KNNLM_SERVE_CONFIG=str(file("port = 7")))
    assert (status, called["port"]) == (0, 7)


def test_several_values_come_from_tables_and_from_the_environment(serve: Serve, file: Any) -> None:
    content = "[datastores]\nwiki = 'stores/wiki'\nnews = 'stores/news'\n[limits]\nmax_k = 9\nmax_seconds = 2.5\n"
    _, called = serve("--config", file(content))
    assert settings(called)["datastores"] == "wiki=stores/wiki news=stores/news (file)"
    assert settings(called)["limits"] == "max_k=9 max_seconds=2.5 (file)"
    _, called = serve(KNNLM_SERVE_DATASTORES="a=x b=y", KNNLM_SERVE_LIMITS="max_k=3")
    assert settings(called)["datastores"] == "a=x b=y (environment)"
    assert settings(called)["limits"] == "max_k=3 (environment)"


def test_clients_know_the_settings_but_no_paths_of_the_machine(serve: Serve, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nroles = ["generate"]\n')
    arguments = ["--datastore", "wiki=secret-folder/wiki", "--model", "secret-folder/lm", "--tokens", tokens, "--port", 7]
    _, called = serve("secret-folder/store", *arguments, KNNLM_SERVE_TLS_KEY="")
    assert "secret-folder/wiki" in settings(called)["datastores"]
    told: dict[str, str] = called["border"].settings
    assert told["port"] == "7 (flag)"
    assert not {"tokens", "tls_key", "tls_cert", "tls_client_ca", "config"} & set(told)
    assert not [value for value in told.values() if "secret-folder" in value or str(tmp_path) in value]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prot = 1", "whose key 'prot' is no setting; did you mean port?"),
        ("max-concurrent = 1", "whose key 'max-concurrent' is no setting; did you mean max_concurrent?"),
        ("xyzzy = 1", "whose key 'xyzzy' is no setting; there are admin_host"),
        ("config = 'other'", "whose key 'config' is no setting"),
        ("port = '50051'", "whose key 'port' is '50051', but must be a whole number, at least 0 and at most 65535."),
        ("port = 65536", "whose key 'port' is 65536, but must be a whole number"),
        ("port = 1.5", "whose key 'port' is 1.5, but must be a whole number"),
        ("port = true", "whose key 'port' is True, but must be a whole number"),
        ("grace = 'long'", "whose key 'grace' is 'long', but must be a number, at least 0."),
        ("grace = nan", "whose key 'grace' is nan, but must be a number"),
        ("verify = 1", "whose key 'verify' is 1, but must be true or false."),
        ("host = 1", "whose key 'host' is 1, but must be a text."),
        ("tokens = ['a']", "whose key 'tokens' is ['a'], but must be a path, as text."),
        ("log_format = 'xml'", "whose key 'log_format' is 'xml', but must be text or json."),
        ("datastores = 'a=b'", "whose key 'datastores' is 'a=b', but must be a table of names and values."),
        ("[datastores]\na = ['b']", "but must be a table of names and values."),
        ("port 1", "which is not a TOML file"),
    ],
)
def test_a_file_with_anything_wrong_is_refused_in_one_sentence(
    serve: Serve, file: Any, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(content)
    status, called = serve("store", "--config", path)
    said = capsys.readouterr().err
    assert (status, called) == (2, {})
    assert said.startswith(f"error: --config is {path}, ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("KNNLM_SERVE_PROT", "1", "is an environment variable that no setting has; did you mean KNNLM_SERVE_PORT?"),
        (
            "KNNLM_SERVE_PORT",
            "tcp://10.0.0.1:50051",
            "is 'tcp://10.0.0.1:50051', but must be a whole number, at least 0 and at most 65535.",
        ),
        ("KNNLM_SERVE_PORT", "70000", "is '70000', but must be a whole number"),
        ("KNNLM_SERVE_GRACE", "nan", "is 'nan', but must be a number"),
        ("KNNLM_SERVE_VERIFY", "perhaps", "is 'perhaps', but must be true or false."),
        ("KNNLM_SERVE_LOG_FORMAT", "xml", "is 'xml', but must be text or json."),
        ("KNNLM_SERVE_DATASTORES", "wiki", "is 'wiki', but must be NAME=VALUE, several of them with spaces between."),
    ],
)
def test_a_variable_with_anything_wrong_is_refused_by_its_name(
    serve: Serve, name: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, called = serve("store", **{name: value})
    assert (status, called) == (2, {})
    assert capsys.readouterr().err.startswith(f"error: {name} {words}")


def test_an_empty_variable_is_an_unset_one(serve: Serve) -> None:
    status, called = serve("store", KNNLM_SERVE_PORT="")
    assert (status, settings(called)["port"]) == (0, "50051 (default)")


def test_every_setting_can_come_from_a_file() -> None:
    """Each is of a kind that the reader of files knows; tables are those with several values."""
    found = settings_of(serve_command.serve)
    assert {name for name, setting in found.items() if setting.table} == {"datastores", "limits"}
    assert {setting.kind for setting in found.values()} == {bool, int, float, str, Path}
    assert found["port"].variable == "KNNLM_SERVE_PORT"


def test_the_store_is_called_default_and_comes_first() -> None:
    assert list(named_datastores(Path("a"), ["wiki=b/c=d"]).items()) == [("default", Path("a")), ("wiki", Path("b/c=d"))]
    assert list(named_datastores(None, ["wiki=b", "news=c"])) == ["wiki", "news"]


@pytest.mark.parametrize(
    ("store", "given", "words"),
    [
        (None, [], "is not given"),
        (None, ["wiki"], "must be NAME=VALUE"),
        (None, ["wiki="], "must be NAME=VALUE"),
        (None, ["=b"], "must be NAME=VALUE"),
        (None, [".wiki=b"], "letters, digits"),
        (None, [f"{'a' * 65}=b"], "1 to 64"),
        (Path("a"), ["default=b"], "already, at a"),
        (None, ["a=b", "a=c"], "already, at b"),
    ],
)
def test_datastores_that_cannot_be_told_apart_are_refused(store: Path | None, given: list[str], words: str) -> None:
    with pytest.raises(Exception, match=words):
        named_datastores(store, given)


@given(st.integers(1, 2**31 - 1))
def test_limits_are_whole_numbers(value: int) -> None:
    assert chosen_limits([f"max_k={value}"]) == {"max_k": value}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["max_kk=3"], "did you mean max_k"),
        (["xyzzy=3"], "there are max_k"),
        (["max_k"], "must be NAME=VALUE"),
        (["max_k=0"], "a whole number from 1"),
        (["max_k=1.5"], "a whole number from 1"),
        (["max_k=2147483648"], "a whole number from 1"),
        (["max_k=many"], "a whole number from 1"),
        (["max_seconds=0"], "a number above 0"),
        (["max_seconds=nan"], "a number above 0"),
        (["max_seconds=inf"], "a number above 0"),
        (["context=64"], "has the option --max-context"),
        (["max_concurrent=4"], "has the option --max-concurrent"),
        (["max_k=3", "max_k=4"], "twice"),
    ],
)
def test_limits_that_are_none_are_refused(given: list[str], words: str) -> None:
    with pytest.raises(Exception, match=words):
        chosen_limits(given)


def test_seconds_may_be_a_part_of_one() -> None:
    assert chosen_limits(["max_seconds=0.5"]) == {"max_seconds": 0.5}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tls-key", "k.pem"], "--tls-cert is not given"),
        (["--tls-cert", "c.pem"], "--tls-key is not given"),
        (["--tls-client-ca", "ca.pem"], "--tls-cert is not given"),
        (["--memory", "much"], "--memory is 'much', but must be a size"),
        (["--prefix-cache", "much"], "--prefix-cache is 'much', but must be a size"),
        (["--tokens", "nowhere"], "--tokens is nowhere, which can't be read"),
        (["--limit", "max_k=0"], "--limit is max_k=0"),
    ],
)
def test_options_that_cannot_be_used_are_named(serve: Serve, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, called = serve("store", *arguments)
    assert (status, called) == (2, {})
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[limits]\nmax_kk = 3", "limits is max_kk=3, but there is no such limit; did you mean max_k?"),
        ("[datastores]\n'a b' = 'x'", "datastores is 'a b=x', but a name has 1 to 64"),
        ("memory = 'much'", "memory is 'much', but must be a size"),
        ("tokens = 'nowhere'", "tokens is nowhere, which can't be read"),
    ],
)
def test_a_value_of_the_file_that_cannot_be_used_is_blamed_on_the_file_and_its_key(
    serve: Serve, file: Any, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(content)
    assert serve("store", "--config", path) == (2, {})
    assert capsys.readouterr().err.startswith(f"error: {path}: {words}")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("KNNLM_SERVE_LIMITS", "max_k=0", "is max_k=0, but must be a whole number from 1"),
        ("KNNLM_SERVE_DATASTORES", ".a=x", "is '.a=x', but a name has"),
        ("KNNLM_SERVE_PREFIX_CACHE", "much", "is 'much', but must be a size"),
    ],
)
def test_a_value_of_a_variable_that_cannot_be_used_is_blamed_on_the_variable(
    serve: Serve, name: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve("store", **{name: value}) == (2, {})
    assert capsys.readouterr().err.startswith(f"error: {name} {words}")


def test_a_flag_that_cannot_be_used_is_blamed_also_where_the_file_has_the_key(
    serve: Serve, file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve("store", "--config", file("[limits]\nmax_k = 3"), "--limit", "max_k=0") == (2, {})
    assert capsys.readouterr().err.startswith("error: --limit is max_k=0")


def test_what_the_engine_finds_wrong_is_blamed_on_the_source_too(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    from knnlm_server import engine_opening

    def refuse(**_: Any) -> None:
        raise InvalidInput("weight", "is 2.0, but must be from 0 to 1.")

    async def load(engine_factory: Any, *_: Any, **__: Any) -> None:
        engine_factory()

    monkeypatch.setattr(engine_opening, "build_async_engine", refuse)
    monkeypatch.setattr(app, "check", load)
    assert serve("store", "--check", KNNLM_SERVE_WEIGHT="2") == (2, {})
    assert "error: KNNLM_SERVE_WEIGHT is 2.0, but must be from 0 to 1.\n" in capsys.readouterr().err


def test_what_the_engine_is_told_and_the_log(monkeypatch: pytest.MonkeyPatch, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    from knnlm_server import engine_opening

    told: dict[str, Any] = {}
    monkeypatch.setattr(engine_opening, "build_async_engine", lambda **options: told.update(options))

    async def load(engine_factory: Any, *_: Any, **__: Any) -> None:
        await asyncio.to_thread(engine_factory)

    monkeypatch.setattr(app, "check", load)
    arguments = ["--check", "--memory", "8GB", "--prefix-cache", "0", "--max-context", 64, "--step-tokens", 32, "--limit", "max_k=9"]
    assert serve("store", "--datastore", "wiki=w", *arguments, KNNLM_SERVE_LOG_FORMAT="json")[0] == 0
    assert told["stores"] == {"default": Path("store"), "wiki": Path("w")}
    assert (told["memory_bytes"], told["prefix_cache_bytes"], told["context"], told["step_tokens"]) == (8 * 10**9, 0, 64, 32)
    assert told["limits"] == {"max_k": 9}
    assert "max_concurrent" not in told  # left to the engine
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["settings"]["memory"] == "8GB (flag)"
    assert line["settings"]["log_format"] == "json (environment)"

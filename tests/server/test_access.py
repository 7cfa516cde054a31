"""Who may call: tokens files that can be used and those that can't, roles, and files that change."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from knnlm.errors import InvalidInput
from knnlm_server.access import ADMIN, GENERATE, OpenAccess, TokenAccess, certified_name
from knnlm_server.errors import RoleMissing, TokenMissing

ALICE, BOB = "alice-0123456789-token", "bob-0123456789-token"


def tokens_file(folder: Path, content: str) -> Path:
    """Replaced as a whole, as an operator's tools do."""
    path, aside = folder / "tokens.toml", folder / "aside.toml"
    aside.write_text(content)
    aside.replace(path)
    return path


def table(name: str, token: str, *roles: str) -> str:
    return f'[[tokens]]\nname = "{name}"\ntoken = "{token}"\nroles = {list(roles)}\n'


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def test_each_token_has_its_own_name_and_roles(tmp_path: Path) -> None:
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    hashed = f'[[tokens]]\nname = "bob"\nsha256 = "{digest}"\nroles = ["generate", "admin"]\n'
    access = TokenAccess(tokens_file(tmp_path, table("alice", ALICE, GENERATE) + hashed))
    alice, bob = access.caller(bearer(ALICE)), access.caller(bearer(BOB))
    assert (alice.name, alice.roles) == ("alice", {GENERATE})
    assert (bob.name, bob.roles) == ("bob", {GENERATE, ADMIN})
    bob.require(ADMIN)
    alice.require(GENERATE)
    with pytest.raises(RoleMissing, match="'alice' has not the role 'admin'"):
        alice.require(ADMIN)


def test_a_hash_in_the_file_is_no_token(tmp_path: Path) -> None:
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    access = TokenAccess(tokens_file(tmp_path, f'[[tokens]]\nname = "a"\nsha256 = "{digest}"\nroles = ["generate"]\n'))
    with pytest.raises(TokenMissing):
        access.caller(bearer(digest))


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", ALICE)],
        [("authorization", f"Basic {ALICE}")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {ALICE}x")],
        [("authorization", f"Bearer {ALICE[:-1]}")],
        [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {ALICE}")],
    ],
)
def test_a_call_without_a_known_token_is_refused(tmp_path: Path, metadata: list[tuple[str, str | bytes]]) -> None:
    access = TokenAccess(tokens_file(tmp_path, table("alice", ALICE, GENERATE)))
    with pytest.raises(TokenMissing, match="token"):
        access.caller(metadata)


def test_a_token_that_is_taken_out_is_refused_from_the_next_call_on(tmp_path: Path) -> None:
    access = TokenAccess(tokens_file(tmp_path, table("alice", ALICE, GENERATE)))
    tokens_file(tmp_path, table("bob", BOB, GENERATE))
    with pytest.raises(TokenMissing):
        access.caller(bearer(ALICE))
    assert access.caller(bearer(BOB)).name == "bob"


def test_a_change_that_cannot_be_used_leaves_the_tokens_in_force_and_is_logged_once_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    access = TokenAccess(tokens_file(tmp_path, table("alice", ALICE, GENERATE)))
    path = tokens_file(tmp_path, table("bob", BOB, GENERATE) + 'token = "half a li')
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert access.caller(bearer(ALICE)).name == "alice"
        assert len(caplog.records) == 1
        assert BOB not in caplog.text
        path.unlink()
        assert access.caller(bearer(ALICE)).name == "alice"
        tokens_file(tmp_path, table("bob", BOB, GENERATE))
        assert access.caller(bearer(BOB)).name == "bob"
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]


def test_a_file_behind_a_link_that_is_swapped_is_seen(tmp_path: Path) -> None:
    # As Kubernetes renews a mounted secret.
    for name, token in (("one", ALICE), ("two", BOB)):
        (tmp_path / name).mkdir()
        tokens_file(tmp_path / name, table(name, token, GENERATE))
    link, path = tmp_path / "data", tmp_path / "data" / "tokens.toml"
    link.symlink_to(tmp_path / "one")
    access = TokenAccess(path)
    (tmp_path / "new").symlink_to(tmp_path / "two")
    (tmp_path / "new").replace(link)
    assert access.caller(bearer(BOB)).name == "two"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "at least one"),
        ("tokens = 3", "at least one"),
        ("other = 3\n" + table("a", ALICE, GENERATE), "nothing else"),
        ("[[tokens]", "not a TOML file"),
        ('[[tokens]]\ntoken = "0123456789abcdef"\nroles = ["generate"]', "number 1 has no name"),
        (table("a", ALICE, GENERATE) + table("b", BOB, "root"), "number 2 must have roles"),
        (table("a", ALICE), "number 1 must have roles"),
        (table("a", "short", GENERATE), "at least 16"),
        (table("a", " 0123456789abcdef", GENERATE), "at least 16"),
        ('[[tokens]]\nname = "a"\nroles = ["generate"]', "either a token or its sha256"),
        ('[[tokens]]\nname = "a"\nsha256 = "abc"\nroles = ["generate"]', "64 hexadecimal digits"),
        (table("a", ALICE, GENERATE) + 'rolls = ["x"]', "unknown key rolls"),
        (table("a", ALICE, GENERATE) + table("a", BOB, GENERATE), "the same name"),
        (table("a", ALICE, GENERATE) + table("b", ALICE, GENERATE), "the same token"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence_without_its_tokens(tmp_path: Path, content: str, problem: str) -> None:
    path = tokens_file(tmp_path, content)
    with pytest.raises(InvalidInput, match=problem) as caught:
        TokenAccess(path)
    assert caught.value.field == "tokens"
    assert str(path) in caught.value.problem
    assert ALICE not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.toml, which can't be read: No such file"):
        TokenAccess(tmp_path / "nowhere.toml")


def test_open_access_lets_everyone_do_everything() -> None:
    caller = OpenAccess().caller([])
    caller.require(ADMIN)
    caller.require(GENERATE)


def test_a_certified_name_can_write_no_line_of_its_own_into_the_log() -> None:
    assert certified_name({"x509_common_name": [b"a\nb\xff"]}) == r"a\nb\xff"
    assert certified_name({"x509_common_name": [b""], "x509_subject_alternative_name": [b"x.example", b"y"]}) == "x.example"
    assert certified_name({"transport_security_type": [b"ssl"]}) == ""

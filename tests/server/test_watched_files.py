"""Files that are read again when they change: what happens where they can't be read at that moment."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from knnlm_server.watched_files import WatchedFiles


def test_a_file_that_vanishes_while_it_is_read_leaves_what_was_there_and_is_read_once_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    watched = WatchedFiles([path], path.read_text)
    path.unlink()
    with caplog.at_level(logging.ERROR):
        assert (watched.current(), watched.current()) == ("one", "one")
    assert len(caplog.records) == 1
    path.write_text("two, longer")
    assert watched.current() == "two, longer"

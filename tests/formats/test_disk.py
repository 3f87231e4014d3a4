"""Files and folders are flushed to the disk in the way that each operating system provides."""

import os

import pytest

from headstart.formats import disk


@pytest.fixture
def synced(monkeypatch):
    """(path, flags) of every file and folder that was opened and flushed."""
    opened, flushed = {}, []

    def opening(path, flags):
        handle = 1000 + len(opened)
        opened[handle] = (path, flags)
        return handle

    monkeypatch.setattr(disk.os, "open", opening)
    monkeypatch.setattr(disk.os, "fsync", lambda handle: flushed.append(opened[handle]))
    monkeypatch.setattr(disk.os, "close", lambda handle: None)
    return flushed


def test_files_and_folders_are_flushed(tmp_path, synced):
    for path in (tmp_path / "file", tmp_path):
        disk.sync(path)
    assert synced == [(tmp_path / "file", os.O_RDONLY), (tmp_path, os.O_RDONLY)]


def test_windows_flushes_files_open_for_writing_and_no_folders(tmp_path, synced, monkeypatch):
    monkeypatch.setattr(disk.os, "name", "nt")
    file = tmp_path / "file"
    monkeypatch.setattr(type(file), "is_dir", lambda self: self == tmp_path)
    for path in (file, tmp_path):
        disk.sync(path)
    assert synced == [(file, os.O_RDWR)]


def test_a_disk_that_refuses_raises_an_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        disk.sync(tmp_path / "nothing")

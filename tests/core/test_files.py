"""Files written whole: old or new, never a part, whoever else writes at the same time."""

import os
import threading

import pytest

from zipr1.core import files
from zipr1.core.errors import InputError
from zipr1.core.files import check_folder, replacing, write_whole


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_text_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with path.open(encoding="utf-8") as reader:  # opened before the new text comes
        write_whole(path, "nëw")
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8") == "nëw" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"whole")

    def half():
        with replacing(path) as temporary:
            temporary.write_bytes(b"ha")
            raise error

    with pytest.raises(error):
        half()
    assert path.read_bytes() == b"whole" and names(tmp_path) == ["clip.mp4"]


def test_a_writer_sees_the_suffix_and_the_folder(tmp_path):
    """Encoders choose their format by the suffix, and a rename is whole only within one file system."""
    with replacing(tmp_path / "clip.mp4") as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == tmp_path
        assert temporary.name.startswith(".tmp-")  # what run folders take for leftovers
        temporary.touch()


def test_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.txt"
    meet = threading.Barrier(2, timeout=10)
    failed = []

    def write(text):
        try:
            with replacing(path) as temporary:
                temporary.write_text(text)
                meet.wait()  # both have written, none has replaced
                assert temporary.read_text() == text
        except Exception as error:  # noqa: BLE001  told by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text * 1000,)) for text in "ab"]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert failed == [] and path.read_text() in ("a" * 1000, "b" * 1000)
    assert names(tmp_path) == ["a.txt"]


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda d: order.append("sync") or sync(d))
    monkeypatch.setattr(files.os, "replace", lambda a, b: order.append("name") or replace(a, b))
    write_whole(tmp_path / "a.txt", "x")
    assert order == ["sync", "name"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    asked = []

    def refuse(path, rights):
        asked.append((path, rights))
        return False

    check_folder(tmp_path / "a" / "b", "--output")
    monkeypatch.setattr(files.os, "access", refuse)  # the user may be root, who may write anywhere
    for folder in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(InputError) as told:
            check_folder(folder, "--output")
        assert str(told.value) == (
            f"--output {folder}: cannot be written (no right to write in {tmp_path}); give another folder"
        )
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2 and names(tmp_path) == []

"""A folder follows its files, and a broken file keeps what it said when it was whole."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from pykmesh.manifests import folder as folders
from pykmesh.manifests.folder import Content, Folder

from .manifest_texts import pod, service, write


def _read(folder: Folder) -> Content:
    return folder.read(folder.look())


def _names(content: Content) -> list[str]:
    return [located.object.name for located in content.objects]


def test_files_of_all_subfolders_are_read_and_hidden_and_other_ones_are_not(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", pod("a"))
    write(tmp_path / "deep" / "er" / "b.yml", pod("b"))
    write(tmp_path / ".hidden" / "c.yaml", pod("c"))
    write(tmp_path / "d.json", pod("d"))
    write(tmp_path / ".e.yaml", pod("e"))
    assert _names(_read(Folder(tmp_path))) == ["a", "b"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "sub" / "a.yaml", pod("a"))
    (tmp_path / "sub" / "loop").symlink_to(tmp_path / "sub")
    assert _names(_read(Folder(tmp_path))) == ["a"]


def test_a_mounted_config_map_is_read_through_its_links(tmp_path: Path) -> None:
    write(tmp_path / "..2026" / "a.yaml", pod("a"))
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    folder = Folder(tmp_path)
    assert _names(_read(folder)) == ["a"]

    write(tmp_path / "..2027" / "a.yaml", pod("b"))
    (tmp_path / "..new").symlink_to("..2027")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert folder.has_changed(folder.look())
    assert _names(_read(folder)) == ["b"]


def test_new_changed_renamed_and_deleted_files_are_followed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert _names(_read(folder)) == []
    write(tmp_path / "a.yaml", pod("a"))
    assert _names(_read(folder)) == ["a"]
    write(tmp_path / "a.yaml", pod("a2"))  # renamed over
    assert _names(_read(folder)) == ["a2"]
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
    assert _names(_read(folder)) == ["a2"]
    write(tmp_path / "sub" / "c.yaml", pod("c"))
    assert _names(_read(folder)) == ["a2", "c"]
    (tmp_path / "sub").rename(tmp_path / ".away")
    (tmp_path / "b.yaml").unlink()
    assert _names(_read(folder)) == []


def test_a_folder_at_rest_has_not_changed(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", pod("a"))
    os.utime(tmp_path / "a.yaml", (1, 1))  # long ago: not just written
    folder = Folder(tmp_path)
    _read(folder)
    assert not folder.has_changed(folder.look())


def test_a_file_written_again_within_a_tick_of_its_clock_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    write(path, pod("a"))
    folder = Folder(tmp_path)
    _read(folder)
    found = path.stat()
    path.write_text(path.read_text().replace('"a"', '"b"'))  # same size, same inode
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))
    assert folder.has_changed(folder.look())
    assert _names(_read(folder)) == ["b"]


@pytest.mark.parametrize("broken", ["a: b\n  c: d\n", '{"apiVersion": "v1", "kind": "Pod"}', "\t"])
def test_a_broken_file_keeps_its_last_good_state_and_says_what_is_wrong(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "a.yaml"
    write(path, pod("a"))
    write(tmp_path / "b.yaml", pod("b"))
    folder = Folder(tmp_path)
    _read(folder)

    path.write_text(broken)
    content = _read(folder)
    assert _names(content) == ["a", "b"]
    assert [error.file for error in content.errors] == ["a.yaml"]

    write(path, pod("a2"))
    assert _read(folder) == Folder(tmp_path).read(folder.look())
    assert _names(_read(folder)) == ["a2", "b"]


def test_a_file_broken_at_first_contributes_nothing_and_the_rest_is_served(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{")
    write(tmp_path / "b.yaml", pod("b"))
    content = _read(Folder(tmp_path))
    assert _names(content) == ["b"]
    assert [error.file for error in content.errors] == ["a.yaml"]
    assert content.refused == content.errors


def test_a_broken_file_that_is_deleted_takes_its_objects_and_errors_along(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", pod("a"))
    folder = Folder(tmp_path)
    _read(folder)
    (tmp_path / "a.yaml").write_text("{")
    _read(folder)
    (tmp_path / "a.yaml").unlink()
    assert _read(folder) == Content()


def test_a_folder_that_is_gone_keeps_its_state_until_there_is_a_file_in_another(tmp_path: Path) -> None:
    path = tmp_path / "config"
    write(path / "sub" / "a.yaml", pod("a"))
    folder = Folder(path)
    _read(folder)
    path.rename(tmp_path / "away")
    content = _read(folder)
    assert _names(content) == ["a"]
    assert str(content.errors[0]) == ".:0: The folder cannot be listed: No such file or directory"
    path.mkdir()
    assert folder.has_changed(folder.look())
    content = _read(folder)
    assert _names(content) == ["a"]
    assert str(content.refused[0]).startswith(".:0: Another folder, and empty: ")
    assert not folder.has_changed(folder.look())
    write(path / "b.yaml", pod("b"))
    assert folder.has_changed(folder.look())
    content = _read(folder)
    assert (_names(content), content.errors) == (["b"], ())
    (path / "b.yaml").unlink()
    assert _read(folder) == Content()


def test_what_goes_between_look_and_read_counts_as_it_did_until_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "config"
    write(path / "a.yaml", pod("a"))
    folder = Folder(path)
    _read(folder)
    write(path / "a.yaml", pod("a2"))
    write(path / "b.yaml", pod("b"))
    sight = folder.look()
    path.rename(tmp_path / "away")
    path.mkdir()
    content = folder.read(sight)
    assert (_names(content), content.errors) == (["a"], ())
    (error,) = _read(folder).errors
    assert str(error).startswith(".:0: Another folder, and empty: ")


def test_a_folder_that_is_back_as_it_was_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config"
    write(path / "a.yaml", pod("a"))
    folder = Folder(path)
    _read(folder)
    path.rename(tmp_path / "away")
    _read(folder)
    (tmp_path / "away" / "a.yaml").unlink()
    (tmp_path / "away").rename(path)
    assert _read(folder) == Content()


@pytest.mark.kernel
def test_a_volume_that_is_unmounted_takes_nothing_along(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True)
    folder = Folder(path)
    try:
        write(path / "a.yaml", pod("a"))
        assert _names(_read(folder)) == ["a"]
    finally:
        subprocess.run(["umount", str(path)], check=True)
    assert list(path.iterdir()) == []
    content = _read(folder)
    assert _names(content) == ["a"]
    assert len(content.refused) == 1


def test_a_link_to_nothing_is_a_broken_file_and_not_one_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path / "away" / "a", pod("a"))
    config = tmp_path / "config"
    config.mkdir()
    (config / "a.yaml").symlink_to("../away/a")
    (config / "notes.txt").symlink_to("../nothing")
    folder = Folder(config)
    assert _read(folder).errors == ()
    (tmp_path / "away").rename(tmp_path / "farther")
    assert folder.has_changed(folder.look())
    content = _read(folder)
    assert _names(content) == ["a"]
    assert [str(error) for error in content.refused] == [
        "a.yaml:0: Cannot be read: No such file or directory"
    ]
    (config / "a.yaml").unlink()
    assert _read(folder) == Content()


def test_a_file_whose_name_is_no_text_has_errors_that_are(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.yaml")).write_text("{")
    (error,) = _read(Folder(tmp_path)).errors
    assert error.file == "\ufffd.yaml"


def _places(content: Content) -> dict[str, str]:
    return {located.object.name: located.file for located in content.objects}


def _told(content: Content) -> list[str]:
    assert content.refused == content.errors
    return [f"{error.file}: {error.why.partition(',')[0]}" for error in content.errors]


@pytest.mark.parametrize("second", ["a.yaml", "z.yaml"])
def test_an_object_stays_with_the_file_that_had_it_and_the_other_counts_as_it_was(
    tmp_path: Path, second: str
) -> None:
    folder = Folder(tmp_path)
    write(tmp_path / "b.yaml", service("web", clusterIP="10.0.0.1"))
    write(tmp_path / second, service("api"))
    _read(folder)
    write(tmp_path / second, service("api2"), service("web", clusterIP="10.0.0.2"))
    for _ in range(2):
        content = _read(folder)
        assert _places(content) == {"web": "b.yaml", "api": second}
        assert _told(content) == [f"{second}: Service shop/web is also in b.yaml:1"]
    write(tmp_path / "b.yaml", service("db"))
    content = _read(folder)
    assert _places(content) == {"db": "b.yaml", "api2": second, "web": second}
    assert not content.errors


def test_of_two_files_that_are_new_the_first_has_the_object(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", service("web"))
    write(tmp_path / "b.yaml", service("web"), service("api"))
    folder = Folder(tmp_path)
    content = _read(folder)
    assert _places(content) == {"web": "a.yaml"}
    assert _told(content) == ["b.yaml: Service shop/web is also in a.yaml:1"]
    (tmp_path / "a.yaml").unlink()
    content = _read(folder)
    assert (_places(content), content.errors) == ({"web": "b.yaml", "api": "b.yaml"}, ())


def test_objects_that_move_between_files_in_one_edit_are_no_duplicates(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write(tmp_path / "a.yaml", service("web"), service("api"))
    write(tmp_path / "b.yaml", service("db"))
    _read(folder)
    write(tmp_path / "a.yaml", service("db"), service("api"))
    write(tmp_path / "b.yaml", service("web"))
    content = _read(folder)
    assert _places(content) == {"db": "a.yaml", "api": "a.yaml", "web": "b.yaml"}
    assert not content.errors
    (tmp_path / "b.yaml").rename(tmp_path / "0.yaml")
    assert _places(_read(folder))["web"] == "0.yaml"


def test_a_file_that_is_put_back_keeps_what_another_would_take_meanwhile(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write(tmp_path / "a.yaml", service("web"))
    write(tmp_path / "b.yaml", service("db"))
    _read(folder)
    write(tmp_path / "b.yaml", service("web"))  # refused, so that it keeps db
    write(tmp_path / "0.yaml", service("db"))
    content = _read(folder)
    assert _places(content) == {"web": "a.yaml", "db": "b.yaml"}
    assert _told(content) == [
        "0.yaml: Service shop/db is also in b.yaml:1",
        "b.yaml: Service shop/web is also in a.yaml:1",
    ]


def test_kinds_that_are_not_read_are_logged_once_by_name(tmp_path: Path) -> None:
    write(
        tmp_path / "a.yaml",
        {"apiVersion": "apps/v1", "kind": "Deployment"},
        {"apiVersion": "v1", "kind": "Secret"},
    )
    folder = Folder(tmp_path)
    with capture_logs() as logs:
        _read(folder)
        write(tmp_path / "b.yaml", {"apiVersion": "v1", "kind": "Secret"})
        _read(folder)
    assert [entry["kinds"] for entry in logs] == [["Secret", "apps/Deployment"]]


def test_what_counts_of_each_file_counts_for_who_comes_after(tmp_path: Path) -> None:
    folder, keep = tmp_path / "manifests", tmp_path / "kept"
    folder.mkdir()

    def anew() -> tuple[list[str], bool]:
        content = _read(Folder(folder, keep=keep))
        return _names(content), content.is_known

    write(folder / "a.yaml", pod("a"))
    write(folder / "b.yaml", pod("b"))
    assert anew() == (["a", "b"], True)
    (folder / "a.yaml").write_text("{")
    assert anew() == (["a", "b"], True)
    write(folder / "c.yaml", pod("b"), pod("c"))
    assert anew() == (["a", "b"], False), "nobody knows what c was"
    write(folder / "c.yaml", pod("c"))
    assert anew() == (["a", "b", "c"], True)
    write(folder / "c.yaml", pod("a"))
    assert anew() == (["a", "b", "c"], True), "a is the file's that had it"
    (folder / "a.yaml").unlink()
    (folder / "b.yaml").unlink()
    assert anew() == (["a"], True)
    assert len([*keep.iterdir()]) == 1


def test_of_a_file_that_is_wrong_and_was_never_read_nothing_is_known(tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    write(folder / "a.yaml", pod("a"))
    (folder / "b.yaml").write_text("{")
    for keep in (None, tmp_path / "kept"):
        assert not _read(Folder(folder, keep=keep)).is_known
    assert not _read(Folder(tmp_path / "none", keep=tmp_path / "kept")).is_known


def test_what_comes_and_is_wrong_from_the_start_counts_for_nothing_also_for_who_comes_after(
    tmp_path: Path,
) -> None:
    """Where all else is known: else it may be what guarded before."""
    path, keep = tmp_path / "manifests", tmp_path / "kept"
    path.mkdir()
    write(path / "a.yaml", pod("a"))
    folder = Folder(path, keep=keep)
    assert _read(folder).is_known
    (path / "b.yaml").write_text("{")
    write(path / "c.yaml", pod("a"))
    content = _read(folder)
    assert (_names(content), content.is_known) == (["a"], False)
    content = _read(Folder(path, keep=keep))
    assert (_names(content), content.is_known) == (["a"], True)


def test_what_is_kept_stays_while_the_folder_cannot_be_seen(tmp_path: Path) -> None:
    path, keep = tmp_path / "manifests", tmp_path / "kept"
    path.mkdir()
    write(path / "a.yaml", pod("a"))
    _read(Folder(path, keep=keep))
    path.rename(tmp_path / "away")
    folder = Folder(path, keep=keep)
    assert not _read(folder).is_known
    (tmp_path / "away").rename(path)
    (path / "a.yaml").write_text("{")
    content = _read(folder)
    assert (_names(content), content.is_known) == (["a"], True)


def test_what_could_not_be_kept_is_kept_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no room", str(path))

    path, keep = tmp_path / "manifests", tmp_path / "kept"
    path.mkdir()
    write(path / "a.yaml", pod("a"))
    folder = Folder(path, keep=keep)
    _read(folder)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_whole", full)
        write(path / "a.yaml", pod("a2"))
        _read(folder)
    write(path / "b.yaml", pod("b"))
    _read(folder)
    (path / "a.yaml").write_text("{")
    assert _names(_read(Folder(path, keep=keep))) == ["a2", "b"]

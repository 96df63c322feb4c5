"""A folder of YAML files, watched: which files changed, what they say now, and what they said last.

A `Folder` is driven from outside (`look`, then `read`), by one thread at a time, and never raises: what goes
wrong becomes an error in its content. A file that cannot be read keeps the objects it had when it last could;
one that never could has none, and is told apart (`Content.refused`) from one that says nothing. The same
goes for a file with an object that another file has: the object stays with the file that had it first.

What each file counts as can be kept elsewhere (`keep`), so that it also counts for who comes after.

Files that are removed are gone, all of them too. But when the folder itself went, and none or an empty one
is in its place (a volume that was unmounted), nothing was removed: what was read still counts. And one that
is empty from the start has not been read: it may be a volume that is not mounted yet.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec
import structlog

from pykmesh.files import write_whole
from pykmesh.manifests.objects import ObjectRef, ref_of
from pykmesh.manifests.parse import ConfigError, Located, Parsed, parse, without_duplicates

log = structlog.get_logger(__name__)

_SUFFIXES = (".yaml", ".yml")
_REPLACED = "Another folder, and empty: what was in the one before counts until there is a file"
_FOR_NOTHING = "(for an empty mesh: one with a comment)"
_RACY_NS = 50_000_000
"""A file written this short before it was read may change again unseen: file clocks tick coarsely."""


class Signature(msgspec.Struct, frozen=True):
    """Differs whenever a file was written, replaced or renamed over."""

    mtime_ns: int
    size: int
    inode: int


class Sight(msgspec.Struct, frozen=True):
    """What one look at the folder has seen."""

    files: Mapping[str, Signature]
    """By path below the folder."""
    unreadable: Mapping[str, str]
    """Folders that could not be listed and files that could not be looked at; "" is the folder itself."""
    identity: tuple[int, int] | None
    """Device and inode of the folder itself; None if it could not be looked at."""


class Content(msgspec.Struct, frozen=True):
    """What the folder says, all files together."""

    objects: tuple[Located, ...] = ()
    errors: tuple[ConfigError, ...] = ()
    refused: tuple[ConfigError, ...] = ()
    """Those of the errors for which a file or a folder counts as it last was, or not at all."""
    ignored: frozenset[str] = frozenset()
    """Kinds that are not read, with their groups."""
    is_known: bool = True
    """Nothing of the folder counts not at all: what is refused counts as it last was."""


class _File(msgspec.Struct, frozen=True):
    signature: Signature | None
    """None if it may have changed unseen."""
    digest: bytes | None
    """Of the content that was read; None if it could not be."""
    good: Parsed
    """What it said when it was last without errors."""
    errors: tuple[ConfigError, ...]


class Folder:
    """The YAML files below a directory; hidden files and directories are left alone."""

    def __init__(self, path: Path, *, may_be_empty: bool = False, keep: Path | None = None) -> None:
        """`may_be_empty`: from the start, as a folder of our own is. `keep`: a directory of its own."""
        self._path = path
        self._keep = keep
        self._fresh: dict[str, bytes] = {}
        """Files without errors of which it is not yet said in `keep` what they say."""
        self._is_awaited = not may_be_empty
        """It was never whole."""
        self._files: dict[str, _File] = {}
        self._counted: dict[str, Parsed] = {}
        """Of each file what counts; no object is in two of them."""
        self._was_known = False
        """All were, at some time: so what comes then and is wrong from the start counts for nothing."""
        self._known: set[str] = set()
        """Files that counted as they were at some time: those that are refused now count as they did then."""
        self._identity: tuple[int, int] | None = None
        """Of the folder that the files were in."""
        self._folder_errors: tuple[ConfigError, ...] = ()
        self._logged_errors: frozenset[ConfigError] = frozenset()
        self._ignored: frozenset[str] = frozenset()

    def look(self) -> Sight:
        """Lists all files; cheap, nothing is opened."""
        files: dict[str, Signature] = {}
        unreadable: dict[str, str] = {}
        _list(self._path, "", files, unreadable, set())
        identity = _identity(self._path)
        if self._files and identity != self._identity and not (files or unreadable):
            unreadable[""] = _REPLACED
        return Sight(files, unreadable, identity)

    def has_changed(self, sight: Sight) -> bool:
        """Whether `read` may find something new."""
        known = {name: file.signature for name, file in self._files.items()}
        return known != self._expected(sight) or _errors_of(sight) != self._folder_errors

    def read(self, sight: Sight) -> Content:
        """Reads the files that changed and forgets those that are gone."""
        files = self._expected(sight)
        if not self._files:
            self._counted = {name: good for name in files if (good := self._kept(name)) is not None}
            self._known = {*self._counted}
        for name in self._files.keys() - files.keys():
            del self._files[name]
            self._fresh.pop(name, None)
            self._known.discard(name)
        for name, signature in files.items():
            before = self._files.get(name)
            if not signature or (before and before.signature == signature):
                continue
            if (found := self._read_file(name, signature, before)) is not None:
                self._files[name] = found
        self._folder_errors = _errors_of(sight)
        if "" not in sight.unreadable:
            self._identity = sight.identity
        content = self._content()
        self._keep_all()
        return content

    def _kept(self, name: str) -> Parsed | None:
        """What a file counted as when somebody else read it."""
        if self._keep is None:
            return None
        try:
            parsed = parse((self._keep / _kept_as(name)).read_bytes(), _shown(name))
        except OSError:
            return None
        return None if parsed.errors else parsed

    def _keep_all(self) -> None:
        """Of files that count as they are, or, where the others are known, not at all.

        What cannot be written is tried again, when something is read. Nothing goes that may only not be seen.
        """
        if self._keep is None:
            return
        try:
            self._keep.mkdir(exist_ok=True)
            for name in [name for name in self._fresh if name in self._files]:
                if self._counted.get(name) is self._files[name].good:
                    write_whole(self._keep / _kept_as(name), self._fresh[name], mode=0o600)
                    del self._fresh[name]
            for name in self._files.keys() - self._known if self._was_known else ():
                if not (kept := self._keep / _kept_as(name)).exists():
                    write_whole(kept, b"", mode=0o600)
            self._was_known |= self._files.keys() <= self._known and bool(self._files)
            if self._folder_errors or not self._files:
                return
            there = {_kept_as(name) for name in self._files}
            for path in self._keep.iterdir():
                if path.name not in there:
                    path.unlink()
        except OSError as error:
            log.warning("config_not_kept", path=str(self._keep), error=str(error))

    def _expected(self, sight: Sight) -> dict[str, Signature | None]:
        """The files that should be held: those seen, and those of which nothing could be seen."""
        expected: dict[str, Signature | None] = dict(sight.files)
        for name, file in self._files.items():
            if any(name.startswith(place) for place in sight.unreadable):
                expected.setdefault(name, file.signature)
        return expected

    def _read_file(self, name: str, signature: Signature, before: _File | None) -> _File | None:
        """None when it went since it was seen: the next look says what became of it."""
        good = before.good if before else self._counted.get(name, Parsed())
        now_ns = time.time_ns()
        try:
            content = (self._path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            errors = (ConfigError(_shown(name), 0, "", f"Cannot be read: {error.strerror}"),)
            return _File(None, None, good, errors)
        settled = signature if now_ns - signature.mtime_ns > _RACY_NS else None
        digest = hashlib.blake2b(content).digest()
        if before and before.digest == digest:
            return msgspec.structs.replace(before, signature=settled)
        parsed = parse(content, _shown(name))
        if self._keep is not None and not parsed.errors:
            self._fresh[name] = content
        return _File(settled, digest, good if parsed.errors else parsed, parsed.errors)

    def _content(self) -> Content:
        in_order = [self._files[name] for name in sorted(self._files)]
        said = {name: self._files[name].good for name in sorted(self._files)}
        self._counted, clashes = _without_clashes(said, self._counted)
        objects, duplicates = without_duplicates(
            obj for file in self._counted.values() for obj in file.objects
        )
        ignored = frozenset[str]().union(*(file.good.ignored for file in in_order))
        self._log_ignored(ignored)
        for name, file in self._files.items():
            if not file.errors and self._counted[name] is file.good:
                self._known.add(name)
        is_missing = self._is_awaited and not (self._files or self._folder_errors)
        if is_missing:
            clashes = [ConfigError(".", 0, "", f"No YAML file in {self._path} yet {_FOR_NOTHING}")]
        errors = [*clashes, *(error for file in in_order for error in file.errors)]
        content = Content(
            objects,
            errors=(*self._folder_errors, *sorted((*errors, *duplicates))),
            refused=(*self._folder_errors, *sorted(errors)),
            ignored=ignored,
            is_known=not (self._folder_errors or is_missing) and self._files.keys() <= self._known,
        )
        self._is_awaited &= bool(content.refused)
        self._log_new_errors(content.errors)
        return content

    def _log_new_errors(self, errors: tuple[ConfigError, ...]) -> None:
        for error in errors:
            if error not in self._logged_errors:
                log.warning(
                    "config_refused", file=error.file, line=error.line, field=error.field, why=error.why
                )
        self._logged_errors = frozenset(errors)

    def _log_ignored(self, ignored: frozenset[str]) -> None:
        if ignored - self._ignored:
            log.info("config_kinds_ignored", kinds=sorted(ignored))
        self._ignored = ignored


def _without_clashes(
    said: Mapping[str, Parsed], before: Mapping[str, Parsed]
) -> tuple[dict[str, Parsed], list[ConfigError]]:
    """What counts of each file, when a file with an object that is another's counts as it did `before`.

    In `before` no object is in two files, so a file that was put back is not refused again, and this ends.
    """
    counted, errors = dict(said), list[ConfigError]()
    while refused := _clashes(counted, before):
        counted |= {name: before.get(name, Parsed()) for name in refused}
        errors += refused.values()
    return counted, errors


def _clashes(files: Mapping[str, Parsed], before: Mapping[str, Parsed]) -> dict[str, ConfigError]:
    """An error for each file with an object of another: of the one that had it, or the first by name."""
    shared = _shared(files)
    held = {
        name: {ref_of(located.object) for located in before.get(name, Parsed()).objects}
        for name in {name for places in shared.values() for name in places}
    }
    errors: dict[str, ConfigError] = {}
    for ref, places in shared.items():
        keeper = min(places, key=lambda name: (ref not in held[name], name))
        for name in places.keys() - {keeper}:
            errors.setdefault(name, _clash(ref, places[name], places[keeper]))
    return errors


def _shared(files: Mapping[str, Parsed]) -> dict[ObjectRef, dict[str, Located]]:
    """The objects that are in several files, with where they are in each."""
    first: dict[ObjectRef, tuple[str, Located]] = {}
    shared: dict[ObjectRef, dict[str, Located]] = {}
    for name, parsed in files.items():
        for located in parsed.objects:
            ref = ref_of(located.object)
            other, place = first.setdefault(ref, (name, located))
            if other != name:
                shared.setdefault(ref, {other: place}).setdefault(name, located)
    return shared


def _clash(ref: ObjectRef, located: Located, kept: Located) -> ConfigError:
    why = f"{ref} is also in {kept.file}:{kept.line}, which keeps it; this file counts as it last was"
    return ConfigError(located.file, located.line, "metadata.name", why)


def _list(
    folder: Path,
    prefix: str,
    files: dict[str, Signature],
    unreadable: dict[str, str],
    above: set[tuple[int, int]],
) -> None:
    """Follows links, but not in circles; `above` are the folders on the way here, by device and inode."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        unreadable[prefix] = f"The folder cannot be listed: {error.strerror}"
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            found = entry.stat()
        except OSError as error:
            gone = error.errno == errno.ENOENT and not entry.is_symlink()
            if entry.name.endswith(_SUFFIXES) and not gone:
                unreadable[prefix + entry.name] = f"Cannot be read: {error.strerror}"
            continue
        identity = (found.st_dev, found.st_ino)
        if stat.S_ISDIR(found.st_mode) and identity not in above:
            _list(folder / entry.name, f"{prefix}{entry.name}/", files, unreadable, above | {identity})
        elif stat.S_ISREG(found.st_mode) and entry.name.endswith(_SUFFIXES):
            files[prefix + entry.name] = Signature(found.st_mtime_ns, found.st_size, found.st_ino)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _errors_of(sight: Sight) -> tuple[ConfigError, ...]:
    return tuple(ConfigError(_shown(place) or ".", 0, "", why) for place, why in sight.unreadable.items())


def _kept_as(name: str) -> str:
    return hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()


def _shown(name: str) -> str:
    """Names of files are bytes; a text that goes out as JSON is UTF-8."""
    return os.fsencode(name).decode(errors="replace")


Sights: TypeAlias = tuple[Sight, ...]


class Folders:
    """Several folders as one: an object that two of them have is that of the first, which is the user's."""

    def __init__(self, path: Path, own: Iterable[Path] = ()) -> None:
        """`own`: others, that may be empty."""
        self._folders = [Folder(path), *(Folder(each, may_be_empty=True) for each in own)]

    def look(self) -> Sights:
        return tuple(folder.look() for folder in self._folders)

    def has_changed(self, sights: Sights) -> bool:
        return any(folder.has_changed(sight) for folder, sight in zip(self._folders, sights, strict=True))

    def read(self, sights: Sights) -> Content:
        contents = [folder.read(sight) for folder, sight in zip(self._folders, sights, strict=True)]
        objects, duplicates = without_duplicates(obj for content in contents for obj in content.objects)
        return Content(
            objects,
            errors=(*(error for content in contents for error in content.errors), *duplicates),
            refused=tuple(error for content in contents for error in content.refused),
        )

"""YAML to objects, with errors that say file, line and field.

A file is taken as a whole: with one error in it, none of its objects counts (the caller keeps what it had).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import msgspec
import yaml
from yaml.constructor import SafeConstructor

from pykmesh.manifests.objects import KINDS, Object, from_plain, ref_of
from pykmesh.manifests.unknown import unknown_fields

_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_PATH_IN_MESSAGE = re.compile(r"(?P<why>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_PATH_STEP = re.compile(r"\.(?P<name>[^.\[]+)|\[(?P<index>\d+)\]")


_MERGE = "tag:yaml.org,2002:merge"
_NO_OBJECT = "Expected an object with apiVersion, kind and metadata"
_NO_FIELD = "There is no such field, or it is not known here"
_LONGEST_QUOTE = 60
_TOO_DEEP = "Nested too deeply"
_ALIASED_NODES_MAX = 100_000
_TOO_MUCH = f"Aliases expand to more than {_ALIASED_NODES_MAX} values"


class ConfigError(msgspec.Struct, frozen=True, order=True):
    """What is wrong with a file, and where. `line` 0 is the file as a whole, `field` may be ""."""

    file: str
    line: int
    field: str
    why: str

    def __str__(self) -> str:
        field = f" {self.field}:" if self.field else ""
        return f"{self.file}:{self.line}:{field} {self.why}"


class Located(msgspec.Struct, frozen=True):
    """An object and where it is written."""

    object: Object
    file: str
    line: int


class Parsed(msgspec.Struct, frozen=True):
    """The content of one file. With `errors` there are no `objects`."""

    objects: tuple[Located, ...] = ()
    errors: tuple[ConfigError, ...] = ()
    ignored: frozenset[str] = frozenset()
    """Kinds that were found and are not read."""


def parse(content: bytes, file: str) -> Parsed:
    """Reads one file of YAML documents; never raises."""
    try:
        documents = list(yaml.compose_all(content.decode(), _Loader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        return Parsed(errors=(_syntax_error(error, content, file),))
    reader, expansion = _Reader(file), _Expansion()
    for document in documents:
        try:
            if (too_large := expansion.add(document)) is not None:
                reader.refuse(too_large, "", _TOO_MUCH)
                break
            reader.read(document)
        except RecursionError:
            reader.refuse(document, "", _TOO_DEEP)
    if reader.errors:
        return Parsed(errors=tuple(reader.errors))
    return Parsed(objects=tuple(reader.objects), ignored=frozenset(reader.ignored))


def without_duplicates(objects: Iterable[Located]) -> tuple[tuple[Located, ...], tuple[ConfigError, ...]]:
    """Of the objects that are written twice only the first counts; the error names both places."""
    first: dict[object, Located] = {}
    errors = []
    for located in objects:
        ref = ref_of(located.object)
        kept = first.setdefault(ref, located)
        if kept is not located:
            why = f"{ref} is also in {kept.file}:{kept.line}, which is used"
            errors.append(ConfigError(located.file, located.line, "metadata.name", why))
    return tuple(first.values()), tuple(errors)


class _Expansion:
    """How many nodes a file comes to when each is read as often as aliases name it.

    Aliases of aliases multiply: a few lines can stand for more than any machine can read.
    """

    def __init__(self) -> None:
        self._sizes: dict[yaml.Node, int] = {}
        self._total = 0
        self._too_large: yaml.Node | None = None

    def add(self, document: yaml.Node) -> yaml.Node | None:
        """Returns the first node, if any, for which aliases add more than they may. RecursionError."""
        self._total += self._size(document)
        self._check(document, self._total)
        return self._too_large

    def _size(self, node: yaml.Node) -> int:
        size = self._sizes.get(node)
        if size is None:
            self._sizes[node] = 1  # for a node within itself, of which reading finds no end
            size = self._sizes[node] = min(1 + sum(map(self._size, _children(node))), sys.maxsize)
            self._check(node, size)
        return size

    def _check(self, node: yaml.Node, size: int) -> None:
        written = len(self._sizes)
        if self._too_large is None and size - written > max(_ALIASED_NODES_MAX, written):
            self._too_large = node


class _Reader:
    """Collects the objects and errors of one file."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.objects: list[Located] = []
        self.errors: list[ConfigError] = []
        self.ignored: set[str] = set()

    def read(self, document: yaml.Node) -> None:
        """Raises RecursionError."""
        if _is_null(document):
            return
        if not isinstance(document, yaml.MappingNode):
            self.refuse(document, "", _NO_OBJECT)
            return
        try:
            plain = _Constructor().construct_document(document)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or document.start_mark
            self.errors.append(ConfigError(self._file, mark.line + 1, "", str(error.problem)))
            return
        self._read_plain(document, plain, "")

    def _read_plain(self, node: yaml.Node, plain: Any, prefix: str) -> None:
        """A document in plain types, or an item of a List (`prefix` is its path in the document)."""
        if not isinstance(plain, dict):
            self.refuse(node, prefix, _NO_OBJECT)
            return
        api_version, kind = plain.get("apiVersion"), plain.get("kind")
        if not isinstance(api_version, str) or not isinstance(kind, str):
            missing = "kind" if isinstance(api_version, str) else "apiVersion"
            self.refuse(node, f"{prefix}{missing}", "Expected a text here")
        elif kind.endswith("List") and isinstance(plain.get("items"), list):
            self._read_items(_child(node, "items"), plain["items"], prefix)
        else:
            self._read_object(node, prefix, plain, (api_version.rpartition("/")[0], kind))

    def _read_items(self, node: yaml.Node | None, items: list[Any], prefix: str) -> None:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else ()
        for index, (item, plain) in enumerate(zip(nodes, items, strict=False)):
            if plain is not None:
                self._read_plain(item, plain, f"{prefix}items[{index}].")

    def _read_object(
        self, node: yaml.Node, prefix: str, plain: dict[str, Any], kind: tuple[str, str]
    ) -> None:
        if kind not in KINDS:
            self.ignored.add("/".join(filter(None, kind)))
            return
        try:
            obj = from_plain(plain, KINDS[kind])
        except msgspec.ValidationError as error:
            match = _PATH_IN_MESSAGE.fullmatch(str(error))
            path = (match and match["path"]) or ""
            why = match["why"] if match else str(error)
            self.refuse(_follow(node, path), prefix + path.removeprefix("."), why)
            return
        for path in unknown_fields(plain, KINDS[kind]):
            self.refuse(_follow(node, path), prefix + path.removeprefix("."), _NO_FIELD)
        self.objects.append(Located(obj, self._file, node.start_mark.line + 1))

    def refuse(self, node: yaml.Node, field: str, why: str) -> None:
        """Notes an error at a node."""
        self.errors.append(ConfigError(self._file, node.start_mark.line + 1, field, why))


class _Constructor(SafeConstructor):
    """Plain types as the API server takes them: null is absent, times are texts, a key is given once."""

    yaml_constructors = SafeConstructor.yaml_constructors | {
        "tag:yaml.org,2002:timestamp": SafeConstructor.construct_yaml_str
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Raises only `MarkedYAMLError` and `RecursionError`; PyYAML lets out whatever `int(text)` raises."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            what = _shortened(repr(node.value)) if isinstance(node, yaml.ScalarNode) else "this"
            problem = f"Cannot read {what} as {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="Expected an object", problem_mark=node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="Expected a text as key", problem_mark=key.start_mark)
            if key.value in seen and key.tag != _MERGE:
                problem = f"{key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        made = super().construct_mapping(node, deep)
        return {_as_text(key): value for key, value in made.items() if value is not None}


def _as_text(key: Any) -> str:
    """A key that YAML takes for a number or a truth (`on`), as JSON has it."""
    return key if isinstance(key, str) else json.dumps(key, default=str)


def _syntax_error(
    error: yaml.YAMLError | UnicodeDecodeError | RecursionError, content: bytes, file: str
) -> ConfigError:
    line = 0
    match error:
        case UnicodeDecodeError():
            line, why = content.count(b"\n", 0, error.start) + 1, "Not UTF-8"
        case yaml.reader.ReaderError():
            line = content.decode()[: error.position].count("\n") + 1
            why = f"Not YAML: a character that may not be in it: U+{error.character:04X}"
        case yaml.MarkedYAMLError():
            line = error.problem_mark.line + 1 if error.problem_mark else 0
            why = f"Not YAML: {', '.join(_parts(error))}"
        case RecursionError():
            why = _TOO_DEEP
        case _:
            why = f"Not YAML: {error}"
    return ConfigError(file, line, "", why)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def _parts(error: yaml.MarkedYAMLError) -> Iterator[str]:
    if error.problem:
        yield error.problem
    if error.context:
        where = f" that starts at line {error.context_mark.line + 1}" if error.context_mark else ""
        yield f"{error.context}{where}"


def _follow(node: yaml.Node, path: str) -> yaml.Node:
    """The node at a path like `.spec.ports[0]`, or the last one on the way that exists."""
    for step in _PATH_STEP.finditer(path):
        if step["name"]:
            child = _child(node, step["name"])
        else:
            child = node.value[int(step["index"])] if isinstance(node, yaml.SequenceNode) else None
        if child is None:
            break
        node = child
    return node


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    match node:
        case yaml.MappingNode():
            yield from chain.from_iterable(node.value)
        case yaml.SequenceNode():
            yield from node.value


def _child(node: yaml.Node, name: str) -> yaml.Node | None:
    """The last one of that name: what is merged in stands before what it gives way to."""
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for key, value in reversed(node.value) if key.value == name), None)


def _is_null(node: yaml.Node | None) -> bool:
    return node is None or node.tag == "tag:yaml.org,2002:null"

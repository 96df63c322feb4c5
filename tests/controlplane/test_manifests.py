"""Errors in YAML say file, line and field; what is well-formed becomes objects."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykmesh.controlplane.control_plane import translate_content
from pykmesh.controlplane.settings import AddressRanges, MeshSettings
from pykmesh.controlplane.snapshot import Snapshot
from pykmesh.manifests.addresses import IP
from pykmesh.manifests.folder import Content
from pykmesh.manifests.objects import Pod, Service
from pykmesh.manifests.parse import Parsed, parse, without_duplicates

SERVICE = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: web-1}\n"
ROUTE = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: a}\nspec:\n"
POLICY = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec:\n"

BROKEN = {
    "bad indentation": ("a: b\n  c: d\n", "f.yaml:2: Not YAML: mapping values are not allowed"),
    "a bracket left open": (
        "kind: Pod\na: [1\nb: 2\n",
        "f.yaml:3: Not YAML: did not find expected ',' or ']', while parsing a flow sequence",
    ),
    "a control character": ("a: \x01\n", "f.yaml:1: Not YAML: a character that may not be in it: U+0001"),
    "not UTF-8": (b"a: b\nc: \xff\n", "f.yaml:2: Not UTF-8"),
    "a number as text": (
        f"{SERVICE}spec:\n  ports:\n  - port: 80\n  - port: '81'\n",
        "f.yaml:7: spec.ports[1].port: Expected `int`, got `str`",
    ),
    "a port out of range": (
        f"{SERVICE}spec:\n  ports:\n  - {{port: 99999}}\n",
        "f.yaml:6: spec.ports[0].port: Expected `int` <= 65535",
    ),
    "an unknown word": (
        f"{SERVICE}spec:\n  ipFamilies: [ipv4]\n",
        "f.yaml:5: spec.ipFamilies[0]: Invalid enum value 'ipv4'",
    ),
    "no IP address": (
        f"{POD}status:\n  podIPs:\n  - ip: 10.0.0.300\n",
        "f.yaml:6: status.podIPs[0].ip: Not an IP address: '10.0.0.300'",
    ),
    "a label that is a number": (
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  labels:\n    version: 1\n",
        "f.yaml:6: metadata.labels[...]: Expected `str`, got `int`",
    ),
    "a name that is none": (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a/b}\n",
        "f.yaml:3: metadata.name: Expected `str` matching regex",
    ),
    "no name": (
        "apiVersion: v1\nkind: Pod\nmetadata: {}\n",
        "f.yaml:3: metadata: Object missing required field",
    ),
    "no kind": ("apiVersion: v1\n", "f.yaml:1: kind: Expected a text here"),
    "no object": ("- a\n- b\n", "f.yaml:1: Expected an object with apiVersion, kind and metadata"),
    "a key twice": ("apiVersion: v1\nkind: Pod\nkind: Pod\n", "f.yaml:3: 'kind' is given twice"),
    "the second document": (f"{POD}---\n{SERVICE}spec: 5\n", "f.yaml:8: spec: Expected `object`, got `int`"),
    "an item of a list": (
        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata:\n    name: []\n",
        "f.yaml:7: items[0].metadata.name: Expected `str`, got `array`",
    ),
    "a Python object": ("a: !!python/object:os.system {}\n", "f.yaml:1: could not determine a constructor"),
    "a circle": ("a: &a [*a]\n", "f.yaml:1: found unconstructable recursive node"),
    "a list as key": ("? [1]\n: 2\n", "f.yaml:1: Expected a text as key"),
    "a field that there is not": (
        f"{ROUTE}  rules:\n  - matches: []\n    backends: []\n",
        "f.yaml:7: spec.rules[0].backends: There is no such field",
    ),
    "a field that a policy has not": (
        f"{POLICY}  rules: [form: []]\n",
        "f.yaml:5: spec.rules[0]: Object contains unknown field `form`",
    ),
    "brackets without end": ("[" * 5000, "f.yaml:1: Not YAML: exceeded maximum nesting depth"),
}


@pytest.mark.parametrize(("text", "error"), BROKEN.values(), ids=BROKEN)
def test_an_error_says_where_it_is_and_what(text: str | bytes, error: str) -> None:
    parsed = parse(text if isinstance(text, bytes) else text.encode(), "f.yaml")
    assert str(parsed.errors[0]).startswith(error)
    assert not parsed.objects


def test_every_document_with_an_error_is_named() -> None:
    parsed = parse(f"{SERVICE}spec: 1\n---\n{POD}\n---\n{POD}spec: 2\n".encode(), "f.yaml")
    assert [error.line for error in parsed.errors] == [4, 14]
    assert not parsed.objects


def test_documents_lists_and_empty_documents_are_read_and_other_kinds_named() -> None:
    text = f"""
# a comment
---
{SERVICE}
---
null
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {{name: a, creationTimestamp: 2026-01-01T00:00:00Z, labels: null}}
- {{apiVersion: apps/v1, kind: Deployment, metadata: {{name: d}}}}
---
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {{name: of another group}}
"""
    parsed = parse(text.encode(), "f.yaml")
    assert not parsed.errors
    assert [(type(located.object), located.line) for located in parsed.objects] == [(Service, 4), (Pod, 14)]
    assert parsed.objects[1].object.metadata.creation_timestamp == "2026-01-01T00:00:00Z"
    assert parsed.ignored == {"apps/Deployment", "serving.knative.dev/Service"}


def test_anchors_and_merged_keys_are_read_as_yaml_means_them() -> None:
    text = f"""
x-status: &status {{phase: Running, podIP: 10.0.0.1}}
{POD}
status:
  <<: *status
  podIP: 10.0.0.2
"""
    (located,) = parse(text.encode(), "f.yaml").objects
    assert isinstance(located.object, Pod)
    assert located.object.ips == (IP("10.0.0.2"),)
    assert located.object.status.phase == "Running"


def test_an_object_written_twice_counts_once_and_the_error_names_both_places() -> None:
    first = parse(f"---\n{SERVICE}spec: {{clusterIP: 10.0.0.1}}\n".encode(), "a.yaml").objects
    second = parse(f"{POD}---\n{SERVICE}".encode(), "b.yaml").objects
    objects, (error,) = without_duplicates((*first, *second))
    assert [type(located.object) for located in objects] == [Service, Pod]
    assert objects[0].file == "a.yaml"
    assert str(error) == ("b.yaml:5: metadata.name: Service default/web is also in a.yaml:2, which is used")


TAGS = "int float bool null timestamp binary omap pairs set seq map str merge value python/object:os.system"
VALUES = ("abc", '""', "'\\0'", "{}", "[]", "[a]", "{a: b}", "[a: b]", "[[a]]", "-", "0x_", "~", "1:99:99")
PLACES = {
    "a field that is not read": f"{POD}x: %s\n",
    "a field that is read": "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: %s\n",
    "a key": f"{POD}? %s\n: 1\n",
    "a document": "%s\n",
    "its kind": "apiVersion: v1\nkind: %s\n",
    "its items": "apiVersion: v1\nkind: List\nitems: %s\n",
    "an item": "apiVersion: v1\nkind: List\nitems:\n- %s\n",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("tag", TAGS.split())
def test_any_tag_on_any_value_is_read_or_an_error_with_its_line(tag: str, place: str) -> None:
    for value in VALUES:
        text = place % f"!!{tag} {value}"
        _check(parse(text.encode(), "f.yaml"), text)


def test_a_value_that_its_tag_cannot_be_is_named_with_its_line() -> None:
    for tag, value in (("int", "abc"), ("int", ""), ("float", "abc"), ("bool", "abc")):
        (error,) = parse(f"{POD}x:\n- !!{tag} '{value}'\n".encode(), "f.yaml").errors
        assert str(error) == f"f.yaml:5: Cannot read {value!r} as {tag}"
    (error,) = parse(f"{POD}x: {'1' * 5000}\n".encode(), "f.yaml").errors  # more digits than Python reads
    assert str(error).startswith("f.yaml:4: Cannot read '1111")
    assert len(str(error)) < 150


@pytest.mark.parametrize(
    "text",
    [
        f"{POD}x: {'[' * 900}{']' * 900}\n",
        "&a {apiVersion: v1, kind: List, items: [*a]}\n",
        "&a {apiVersion: v1, kind: List, items: [*a, *a]}\n",
    ],
)
def test_what_is_nested_without_end_is_an_error_with_its_line(text: str) -> None:
    (error,) = parse(text.encode(), "f.yaml").errors
    assert str(error) == "f.yaml:1: Nested too deeply"


def aliases_of_aliases(levels: int, width: int, innermost: str, around: str) -> str:
    """A List with an item for each level, which has the one before `width` times in it."""
    lines = ["apiVersion: v1", "kind: List", "items:", f"- &a0 {innermost}"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"- &a{level} {around.replace('...', inner)}")
    return "\n".join(lines) + "\n"


A_POD = "{apiVersion: v1, kind: Pod, metadata: {name: a}}"
A_LIST = "{apiVersion: v1, kind: List, items: [...]}"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (aliases_of_aliases(9, 9, A_POD, A_LIST), 9),
        (aliases_of_aliases(200, 9, A_POD, A_LIST), 9),
        (aliases_of_aliases(30, 9, "{a: b}", "{<<: [...]}"), 9),
        (aliases_of_aliases(30, 9, "[lol]", "[...]"), 9),
        (aliases_of_aliases(30, 9, "{a: b}", "{metadata: {labels: [...]}}"), 9),
        (f"{aliases_of_aliases(5, 7, A_POD, A_LIST)}---\n" * 100, 28),  # each of them is small enough
    ],
)
def test_aliases_that_multiply_are_an_error_with_its_line_at_once(text: str, line: int) -> None:
    (error,) = parse(text.encode(), "f.yaml").errors
    assert str(error) == f"f.yaml:{line}: Aliases expand to more than 100000 values"


def test_aliases_that_do_not_multiply_are_read() -> None:
    labels = "labels: &labels {app: web, version: v1, tier: front}"
    head = "apiVersion: v1\nkind: List\nitems:\n"
    head += f"- {{apiVersion: v1, kind: Pod, metadata: {{name: p, {labels}}}}}\n"
    pods = "".join(
        f"- {{apiVersion: v1, kind: Pod, metadata: {{name: p-{n}, labels: *labels}}}}\n" for n in range(2000)
    )
    found = parse((head + pods).encode(), "f.yaml")
    assert not found.errors
    assert {str(located.object.labels) for located in found.objects} == {
        "{'app': 'web', 'version': 'v1', 'tier': 'front'}"
    }
    assert [located.line for located in found.objects] == list(range(4, 2005))


def test_what_is_large_without_aliases_is_read() -> None:
    pods = f"{A_POD}\n---\n" * 12_000  # of ten values each
    assert len(parse(pods.encode(), "f.yaml").objects) == 12_000


@pytest.mark.timeout(20)
def test_lists_in_lists_are_read_once_each() -> None:
    found = parse(aliases_of_aliases(120, 1, A_POD, A_LIST).encode(), "f.yaml")
    assert len(found.objects) == 120
    assert not found.errors


def test_items_of_a_list_give_way_to_those_written_over_the_merged_ones() -> None:
    text = (
        "apiVersion: v1\nkind: List\nitems:\n"
        "- &base {apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod, metadata: {name: a}}]}\n"
        "- <<: *base\n  items:\n  - {apiVersion: v1, kind: Pod, metadata: {name: b}}\n"
        "  - {apiVersion: v1, kind: Pod, metadata: {name: c/d}}\n"
    )
    (error,) = parse(text.encode(), "f.yaml").errors
    assert str(error).startswith("f.yaml:8: items[1].items[1].metadata.name: ")
    found = parse(text.replace("c/d", "c").encode(), "f.yaml")
    assert [(located.object.name, located.line) for located in found.objects] == [
        ("a", 4),
        ("b", 7),
        ("c", 8),
    ]


def test_an_error_in_one_document_does_not_hide_those_of_the_next() -> None:
    text = f"{POD}x: !!int a\n---\n{POD}x: {'[' * 900}{']' * 900}\n---\n{POD}y: !!float b\n"
    assert [error.line for error in parse(text.encode(), "f.yaml").errors] == [4, 6, 14]


MANIFESTS = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  clusterIPs: [10.96.0.10, "fd96::10"]
  ipFamilies: [IPv4, IPv6]
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http, protocol: TCP}
---
apiVersion: v1
kind: Pod
metadata:
  name: web-1
  namespace: shop
  labels: {app: web}
  creationTimestamp: 2026-01-01T00:00:00Z
spec:
  nodeName: node-a
  hostNetwork: false
  containers:
  - ports: [{name: http, containerPort: 8080}]
status: &status
  phase: Running
  podIPs: [{ip: 10.244.1.1}]
  conditions:
  - {type: Ready, status: "True"}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: out, namespace: shop}
spec:
  hosts: [out.example.com]
  addresses: [10.0.0.0/24]
  ports: [{number: 443, name: tls, protocol: TLS}]
  resolution: STATIC
  endpoints:
  - {address: 10.9.9.9, ports: {tls: 8443}, weight: 3, locality: a/b/c}
---
apiVersion: v1
kind: List
items:
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}
  addressType: IPv4
  endpoints: [{addresses: [10.7.7.7], conditions: {ready: true}}]
  ports: [{name: http, port: 8080, protocol: TCP}]
- apiVersion: v1
  kind: Node
  metadata: {name: node-a, labels: {topology.kubernetes.io/region: eu}}
  status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
"""

_WORDS = re.compile(r"[^\s,\[\]{}]+")
_odd = st.one_of(
    st.sampled_from([f"!!{tag} " for tag in TAGS.split()]),
    st.sampled_from(["-1", "0", "65536", "4294967296", "1" * 30, "0x_", ".inf", ".nan", "~", "''", "'\\0'"]),
    st.sampled_from(
        ["[]", "{}", "[1]", "{a: 1}", "*status", "<<: *status", "&status ", "? ", "- ", "...", "#"]
    ),
    st.sampled_from(
        ["::", "10.0.0.256", "10.0.0.1/33", "::1%eth0", "None", "a/b", "*.example.com", "é", "😀"]
    ),
    st.text(max_size=5),
)


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    """The manifests with some of their words replaced, put an odd text before, or taken out."""
    text = MANIFESTS
    for _ in range(draw(st.integers(1, 3))):
        words = list(_WORDS.finditer(text))
        word, odd = draw(st.sampled_from(words)), draw(_odd)
        change = draw(st.sampled_from([odd, f"{odd}{word[0]}", ""]))
        text = text[: word.start()] + change + text[word.end() :]
    return text


@given(text=_mutated())
@settings(max_examples=300, deadline=None)
def test_a_mutated_file_is_read_or_refused_and_never_more(text: str) -> None:
    parsed = parse(text.encode(), "f.yaml")
    _check(parsed, text)
    objects, _ = without_duplicates(parsed.objects)
    resources = translate_content(Content(objects), AddressRanges(), MeshSettings()).resources
    Snapshot.of(resources, version="1", says_versions=True)  # all can be said, too


@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    _check(parse(content, "f.yaml"), content.decode(errors="replace"))


def _check(parsed: Parsed, text: str) -> None:
    """Objects or errors, and the errors lie in the file."""
    assert not (parsed.objects and parsed.errors)
    for error in parsed.errors:
        assert error.file == "f.yaml"
        assert 1 <= error.line <= len(text.splitlines()) + 1
        assert error.why

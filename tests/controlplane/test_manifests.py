"""Errors in YAML say file, line and field; what is well-formed becomes objects."""

from __future__ import annotations

import pytest

from pykmesh.controlplane.addresses import IP
from pykmesh.controlplane.manifests import parse, without_duplicates
from pykmesh.controlplane.objects import Pod, Service

SERVICE = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: web-1}\n"

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

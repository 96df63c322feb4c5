"""A client of the Kubernetes API server: objects as `kubectl apply` and a kubelet write them."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from typing import Any, Final

Object = dict[str, Any]
TIMEOUT_S: Final = 30.0
ISTIO_AUDIENCE: Final = "istio-ca"
_OF_NO_NAMESPACE: Final = {"CustomResourceDefinition", "GatewayClass", "Namespace", "Node"}
_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"


class ApiError(OSError):
    """The API server refused a request: its HTTP status and its words."""

    def __init__(self, request: str, status: int, words: str) -> None:
        super().__init__(f"{request}: {status} {words}")
        self.status = status


class ApiServer:
    """One connection a request, with a bearer token."""

    def __init__(self, port: int, token: str, ca_file: Path) -> None:
        self._port = port
        self._token = token
        self._tls = ssl.create_default_context(cafile=str(ca_file))

    def request(self, method: str, path: str, body: object = None, kind: str = "application/json") -> Any:
        """What the server answers, as JSON or text. ApiError when it refuses."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self._port, timeout=TIMEOUT_S, context=self._tls
        )
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise ApiError(f"{method} {path}", response.status, text[:600])
        return json.loads(text) if response.headers.get_content_type() == "application/json" else text

    def get(self, found: Object) -> Object:
        """The object of this kind and name, as it is now."""
        whole: Object = self.request("GET", _path(found))
        return whole

    def apply(self, wanted: Object) -> Object:
        """Creates or changes; a status, which no kubelet and no controller writes here, is set then."""
        main = {key: value for key, value in wanted.items() if key != "status"}
        made: Object = self.request("PATCH", f"{_path(wanted)}?fieldManager=tests&force=true", main, _APPLY)
        if "status" in wanted:
            made = self.request("PATCH", f"{_path(wanted)}/status", {"status": wanted["status"]}, _MERGE)
        return made

    def delete(self, unwanted: Object) -> None:
        """At once, as a kubelet ends a pod's deletion. One that is gone is fine."""
        try:
            self.request("DELETE", f"{_path(unwanted)}?gracePeriodSeconds=0")
        except ApiError as error:
            if error.status != http.HTTPStatus.NOT_FOUND:
                raise

    def token(self, pod: Object, audience: str = ISTIO_AUDIENCE) -> str:
        """Of the pod's service account, bound to the pod as a projected volume's is."""
        made = self.get(pod)
        account = _object("ServiceAccount", made["spec"]["serviceAccountName"], made["metadata"]["namespace"])
        bound = {"kind": "Pod", "apiVersion": "v1", "name": made["metadata"]["name"]}
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [audience],
                "boundObjectRef": {**bound, "uid": made["metadata"]["uid"]},
            },
        }
        token: str = self.request("POST", f"{_path(account)}/token", request)["status"]["token"]
        return token


def _object(kind: str, name: str, namespace: str) -> Object:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}}


def _path(found: Object) -> str:
    """Where an object is: the kinds that are used here have regular plurals."""
    version, kind, metadata = found["apiVersion"], found["kind"], found["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    namespace = "" if kind in _OF_NO_NAMESPACE else f"/namespaces/{metadata['namespace']}"
    return f"{root}{namespace}/{_plural(kind.lower())}/{metadata['name']}"


def _plural(word: str) -> str:
    if word[-1] == "y" and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    if word[-1] == "s":
        return f"{word}es"
    return f"{word}s"

"""The CRDs in crds/ and the Structs of domain/api.py say the same."""

from __future__ import annotations

import copy
import functools
import textwrap
import types
import typing
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from certbotk8s.domain import api
from certbotk8s.domain.bindings import Shape

CRDS = Path(__file__).parents[2] / "crds"
KINDS: dict[str, api.Kind[Any]] = {
    "certificates": api.CERTIFICATE,
    "issuers": api.ISSUER,
    "clusterissuers": api.CLUSTER_ISSUER,
}
SCALARS = {str: "string", int: "integer", bool: "boolean", datetime: "string"}
# SecretKeyRef serves in two places with a default each, so that its Struct has none.
DEFAULTS_BY_PLACE = {
    "spec.acme.privateKeySecretRef.key": "tls.key",
    "spec.acme.externalAccountBinding.keySecretRef.key": "secret",
    "spec.acme.bindings[].externalAccountBinding.keySecretRef.key": "secret",
}
# The values that the controller compares with, where the schema has to name every one of them.
ENUMS = {
    "spec.issuerRef.kind": set(api.ISSUER_KINDS),
    "spec.privateKey.encoding": {"PKCS1", "PKCS8"},
    "spec.privateKey.rotationPolicy": {"Always", "Never"},
    "spec.acme.externalAccountBinding.keyAlgorithm": {"HS256", "HS384", "HS512"},
    "spec.acme.commonName": {"Auto", "Never", "First"},
    "spec.acme.accountKeyAlgorithm": {"ECDSA", "RSA"},
    "spec.acme.bindings[].shapes[]": set(Shape),
    "spec.policy.rules[].namespaceSelector.matchExpressions[].operator": {"In", "NotIn", "Exists", "DoesNotExist"},
}
STANDARD = {"apiVersion", "kind", "metadata"}


@functools.cache
def crd(plural: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((CRDS / f"{plural}.yaml").read_text(encoding="utf-8"))
    return document


@functools.cache
def schema(plural: str) -> dict[str, Any]:
    (version,) = crd(plural)["spec"]["versions"]
    root: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return root


def walk(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below `node` with its path, array items as `[]`, values of a map as `{}`; standard members apart."""
    for name, child in node.get("properties", {}).items():
        if path or name not in STANDARD:
            below = f"{path}.{name}" if path else name
            yield below, child
            yield from walk(child, below)
    for mark, keyword in (("[]", "items"), ("{}", "additionalProperties")):
        if keyword in node:
            yield f"{path}{mark}", node[keyword]
            yield from walk(node[keyword], f"{path}{mark}")


SCHEMAS = {plural: dict(walk(schema(plural))) for plural in KINDS}
FIELDS = [(plural, path) for plural in KINDS for path in SCHEMAS[plural]]


def differences(struct: type[msgspec.Struct], node: dict[str, Any], path: str = "") -> Iterator[str]:
    """Sentences on all that the Struct and the schema of the same object do not share."""
    hints = typing.get_type_hints(struct, vars(api))
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct) if field.name != "metadata"}
    properties = {name: child for name, child in node.get("properties", {}).items() if path or name not in STANDARD}
    for name in properties.keys() - fields.keys():
        yield f"{path}{name} is in the CRD only"
    for name in fields.keys() - properties.keys():
        yield f"{path}{name} is in {struct.__name__} only"
    wanted = {name for name, field in fields.items() if field.required}
    if (required := set(node.get("required", ()))) != wanted:
        yield f"{path or 'the object'}: the CRD requires {sorted(required)}, {struct.__name__} {sorted(wanted)}"
    for name in sorted(properties.keys() & fields.keys()):
        field, child, below = fields[name], properties[name], f"{path}{name}"
        yield from type_differences(hints[field.name], child, below)
        default = DEFAULTS_BY_PLACE.get(below) or schema_default(field, child)
        if child.get("default") != default:
            yield f"{below}: default {child.get('default')!r} in the CRD, {default!r} in {struct.__name__}"


def schema_default(field: Any, node: dict[str, Any]) -> Any:
    """The default that the schema has to have: none where absent and empty are the same.

    An object needs `{}` where its members have defaults, else they would not come into being.
    """
    if isinstance(field.default, msgspec.Struct):
        return {} if any("default" in child for child in node["properties"].values()) else None
    return None if field.default is msgspec.NODEFAULT else field.default or None


def type_differences(hint: Any, node: dict[str, Any], path: str) -> Iterator[str]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
    if typing.get_origin(hint) is tuple:
        if node["type"] != "array":
            yield f"{path}: {node['type']} in the CRD, an array in the Struct"
        else:
            yield from type_differences(typing.get_args(hint)[0], node["items"], f"{path}[]")
    elif typing.get_origin(hint) is dict:
        yield from type_differences(typing.get_args(hint)[1], node["additionalProperties"], f"{path}{{}}")
    elif isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        if node["type"] != "object":
            yield f"{path}: {node['type']} in the CRD, an object in the Struct"
        yield from differences(hint, node, f"{path}.")
    else:
        if node["type"] != SCALARS[hint]:
            yield f"{path}: {node['type']} in the CRD, {hint.__name__} in the Struct"
        if (node.get("format") == "date-time") != (hint is datetime):
            yield f"{path}: format {node.get('format')} in the CRD, {hint.__name__} in the Struct"


@pytest.mark.parametrize("plural", KINDS)
def test_structs_and_schema_have_the_same_fields(plural: str) -> None:
    """Names, types, required fields and defaults are the same in the CRD and in the Struct.

    Fails when a field of a Struct is renamed, or PrivateKeySpec.algorithm defaults to ECDSA.
    """
    assert list(differences(KINDS[plural].type, schema(plural))) == []


def test_a_difference_is_found() -> None:
    """The comparison sees a field, a default, a type and a requirement that only one side has.

    Fails when `differences` returns at once.
    """
    node = copy.deepcopy(schema("certificates"))
    before = set(differences(api.Certificate, node))
    spec = node["properties"]["spec"]
    spec["properties"]["suspend"] = {"type": "boolean"}
    spec["properties"]["privateKey"]["properties"]["algorithm"]["default"] = "ECDSA"
    del spec["properties"]["profile"], spec["properties"]["privateKey"]["default"]
    spec["properties"]["dnsNames"]["items"]["type"] = "integer"
    spec["required"] = ["secretName"]
    assert set(differences(api.Certificate, node)) - before == {
        "spec.suspend is in the CRD only",
        "spec.profile is in CertificateSpec only",
        "spec.: the CRD requires ['secretName'], CertificateSpec ['issuerRef', 'secretName']",
        "spec.dnsNames[]: integer in the CRD, str in the Struct",
        "spec.privateKey: default None in the CRD, {} in CertificateSpec",
        "spec.privateKey.algorithm: default 'ECDSA' in the CRD, 'RSA' in PrivateKeySpec",
    }


@pytest.mark.parametrize("plural", KINDS)
def test_crd_is_that_of_the_kind(plural: str) -> None:
    """Group, version, names, scope and the status subresource are those that the code addresses.

    Fails when the status subresource is removed, or when ClusterIssuer becomes namespaced.
    """
    kind, document = KINDS[plural], crd(plural)["spec"]
    (version,) = document["versions"]
    assert crd(plural)["metadata"]["name"] == f"{kind.plural}.{kind.group}"
    assert (document["group"], document["names"]["plural"], document["names"]["kind"]) == (
        kind.group,
        plural,
        kind.kind,
    )
    assert document["scope"] == ("Namespaced" if kind.namespaced else "Cluster")
    assert (version["name"], version["served"], version["storage"]) == (kind.version, True, True)
    assert version["subresources"] == {"status": {}}
    assert document["names"]["categories"] == ["certbotk8s"]


def test_clusterissuer_differs_from_issuer_only_where_it_must() -> None:
    """A ClusterIssuer has the fields of an Issuer; only sentences, and the policy, differ.

    Fails when a limit is changed in issuers.yaml alone.
    """

    def bare(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                key: bare(value) for key, value in node.items() if not isinstance(value, str) or key != "description"
            }
        return [bare(item) for item in node] if isinstance(node, list) else node

    issuer, cluster_issuer = bare(schema("issuers")), bare(schema("clusterissuers"))
    (rule,) = cluster_issuer["properties"]["spec"].pop("x-kubernetes-validations")
    assert rule["rule"] == "has(self.policy) || (has(self.acme.solvers) && size(self.acme.solvers) > 0)"
    assert cluster_issuer["properties"]["spec"]["properties"].pop("policy")
    assert cluster_issuer == issuer


@pytest.mark.parametrize(("plural", "path"), FIELDS)
def test_field_is_described_in_three_lines(plural: str, path: str) -> None:
    """`kubectl explain` shows every field with at most three lines, which name its default.

    Fails when a description is removed or says another default than the schema's.
    """
    node = SCHEMAS[plural][path]
    parent, _, name = path.rpartition(".")
    required = name in SCHEMAS[plural].get(parent, schema(plural)).get("required", ())
    description = node["description"]
    # The width that kubectl explain wraps to.
    assert 1 <= len(textwrap.wrap(description, 76)) <= 3
    assert description.endswith(".")
    if isinstance(node.get("default"), str):
        assert f"Default: {node['default']}." in description
    elif path.startswith("spec.") and required:
        assert description.endswith("Required, no default.")
    elif parent and not path.endswith(("[]", "{}")) and not required:
        assert "Default: " in description or "Required, no default." in description


@pytest.mark.parametrize(("plural", "path"), FIELDS)
def test_field_is_bounded(plural: str, path: str) -> None:
    """Every string, array and map has an upper bound, every list of status is atomic, and nothing unknown is kept.

    Fails when a maxLength or maxItems is removed.
    """
    node = SCHEMAS[plural][path]
    if node["type"] == "string" and "enum" not in node and node.get("format") != "date-time":
        assert node["maxLength"] > 0
    if node["type"] == "array":
        assert node["maxItems"] > 0
        assert node["x-kubernetes-list-type"] == "atomic"
    assert "additionalProperties" not in node or node["maxProperties"] > 0
    assert "x-kubernetes-preserve-unknown-fields" not in node


@pytest.mark.parametrize("path", ENUMS)
def test_enum_lists_what_the_code_knows(path: str) -> None:
    """The values that the schema allows are those that the code tells apart.

    Fails when a value is added to an enum in the YAML alone.
    """
    (enum,) = {tuple(sorted(fields[path]["enum"])) for fields in SCHEMAS.values() if path in fields}
    assert set(enum) == ENUMS[path]

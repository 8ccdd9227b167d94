"""Kubernetes' OpenAPI v3 schemas as JSON schemas that refuse what the API server would silently drop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def crd_schema(path: Path, version: str = "v1") -> dict[str, Any]:
    """The schema of one version of a custom resource definition."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # many thousand lines
    definition = yaml.load(path.read_text(), Loader=loader)
    (found,) = [one for one in definition["spec"]["versions"] if one["name"] == version]
    schema = strict(found["schema"]["openAPIV3Schema"])
    assert isinstance(schema, dict)
    # The definition says nothing of metadata, which Kubernetes checks itself.
    names = {"name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, "namespace": {"type": "string"}}
    words = {"type": "object", "additionalProperties": {"type": "string"}}
    schema["properties"]["metadata"] = _closed(
        {"properties": names | {"labels": words, "annotations": words}, "required": ["name"]}
    )
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return schema


def strict(schema: Any) -> Any:
    """A node of an OpenAPI schema, with unknown fields refused and Kubernetes' own words put into JSON schema's."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | {key: schema[key] for key in ("pattern",) if key in schema}
    made = {
        key: {name: strict(one) for name, one in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key not in ("format", "nullable", "description", "default")
    }
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        return _closed(made)
    return made


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, **schema}

"""A configuration as the YAML that a person wrote, before it is checked; reading it imports no science library."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fastgda_core.errors import UsageError


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key that is written twice, where others take the later value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # what is merged in may be overridden
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # which the base class refuses
            if key in lines:
                raise UsageError(f"{key!r} stands twice, in lines {lines[key]} and {line}: remove one")
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_document(path: Path) -> dict[str, Any]:
    """Read the mapping that a YAML file holds.

    Raises:
        UsageError: the file is unreadable, names a key twice, or holds something else.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UsageError(f"config {path} does not exist: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"config {path} is not readable YAML: {' '.join(str(error).split())}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"config {path} is not a mapping of sections: see deployments/openmoji.yaml")
    return document


def workspace_of(path: Path) -> str:
    """Return the folder or URL of a config's workspace, whatever else is in the config.

    Raises:
        UsageError: the file is no config, or names no workspace.
    """
    workspace = read_document(path).get("workspace")
    if not isinstance(workspace, str) or not workspace:
        raise UsageError(f"{path}: workspace: is missing: add it")
    return workspace_from(path, workspace)


def workspace_from(path: Path, workspace: str) -> str:
    """Return a workspace that a config names, seen from the config's own folder."""
    return workspace if "://" in workspace else str(path.resolve().parent / workspace)

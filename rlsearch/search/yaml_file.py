"""Reading and writing YAML strictly: no code, no duplicate keys, errors with their line; and ``--set key=value``."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from rlsearch.errors import ConfigError, Problem


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file: plain types only.

    Raises:
        ConfigError: the file cannot be read, is no YAML (with line and column), or holds a key twice (with its lines).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        message = (
            f"cannot be read: {error.strerror or error}; give the path of a search space such as search_spaces/x.yaml"
        )
        raise ConfigError([Problem("", message)], str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", f"is not UTF-8 text ({error})")], str(path)) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The content of YAML text; raises as `read_yaml` does, naming ``source``."""
    try:
        loader = _StrictLoader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError([Problem("", f"is not valid YAML: {error}")], source) from None
    try:
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ConfigError([Problem("", _describe(error))], source) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        # ValueError: PyYAML lets those of its scalars through (a date such as 2026-99-99).
        raise ConfigError([Problem("", f"is not valid YAML: {error}")], source) from None
    finally:
        loader.dispose()
    if loader.duplicates:
        raise ConfigError(loader.duplicates, source)
    return content


def override(content: Any, settings: Iterable[str], problems: list[Problem]) -> Any:
    """``content`` with ``dotted.key=value`` settings put in; values are YAML. The argument is not changed.

    Args:
        content: what the file holds.
        settings: as given to ``--set``; later ones win.
        problems: what is wrong with a setting is added here, under its dotted key.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            problems.append(Problem("--set", f"must be dotted.key=value, as in training.epochs=3, got {setting!r}"))
            continue
        try:
            value = parse_yaml(text, f"--set {key}")
        except ConfigError as error:
            problems.extend(Problem(f"--set {key.strip()}", problem.message) for problem in error.problems)
            continue
        content = _put(content, names, value, key.strip(), problems)
    return content


def _put(content: Any, names: list[str], value: Any, key: str, problems: list[Problem]) -> Any:
    if not names:
        return value
    inner = {} if content is None else content
    if not isinstance(inner, dict):
        outer = key.removesuffix("." + ".".join(names))
        message = f"{outer} is {content!r}, which holds no keys; set {outer} as a whole, as in {outer}={{...}}"
        problems.append(Problem(f"--set {key}", message))
        return content
    return {**inner, names[0]: _put(inner.get(names[0]), names[1:], value, key, problems)}


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that notices a key written twice in one mapping; YAML itself lets the last one win in silence."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[Problem] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                first = seen[key_node.value]
                self.duplicates.append(
                    Problem(str(key_node.value), f"stands twice, in lines {first} and {line}; keep one of the two")
                )
            seen.setdefault(key_node.value, line)
        return super().construct_mapping(node, deep=deep)


def _describe(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"is not valid YAML: {where}{error.problem or error.context}"

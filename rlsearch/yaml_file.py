"""Reading YAML strictly: no code, no duplicate keys, nothing that grows when it is read, errors with their line; and
``--set key=value``."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from rlsearch.errors import ConfigError, Problem

# Far above what any search space needs; PyYAML reads so much in some seconds.
_MOST_BYTES = 2**18
_MOST_VALUES = 10_000
_MOST_LEVELS = 40
# A path is the longest text there is, and Python itself refuses to print numbers of more than 4,300 digits.
_LONGEST_TEXT, _LONGEST_OTHER = 4096, 400
_TEXT = "tag:yaml.org,2002:str"


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file: plain types only.

    Raises:
        ConfigError: the file cannot be read, is no YAML (with line and column), holds a key twice (with its lines), or
            more values, levels or characters than any search space has, aliases written out.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError([Problem("", f"is larger than {_MOST_BYTES // 1024} KiB: no search space")], str(path))
        text = content.decode("utf-8")
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
        self._num_values = 0
        self._level = 0

    def get_single_node(self) -> yaml.Node | None:
        """The document; of limited size when aliases are written out, as messages and files would have it."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self._size(node, {})
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One value, if it is within the limits."""
        mark = self.peek_event().start_mark
        self._num_values += 1
        self._level += 1
        if self._num_values > _MOST_VALUES:
            raise _too_much(f"holds more than {_MOST_VALUES:,} values", mark)
        if self._level > _MOST_LEVELS:
            raise _too_much(f"is nested deeper than {_MOST_LEVELS} levels", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._level -= 1
        if isinstance(node, yaml.ScalarNode):
            longest = _LONGEST_TEXT if node.tag == _TEXT else _LONGEST_OTHER
            if len(node.value) > longest:
                raise _too_much(f"holds a value of more than {longest} characters", mark)
        return node

    def _size(self, node: yaml.Node, known: dict[int, int | None]) -> int:
        """How many values a node holds with all aliases written out; ``known``: of nodes by id, None within itself."""
        if id(node) in known:
            size = known[id(node)]
            if size is None:
                raise _too_much("holds an alias that refers to itself", node.start_mark)
            return size
        known[id(node)], size = None, 1
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        for child in children:
            size += sum(self._size(part, known) for part in (child if isinstance(child, tuple) else (child,)))
        if size > _MOST_VALUES:
            raise _too_much(f"holds more than {_MOST_VALUES:,} values, aliases written out", node.start_mark)
        known[id(node)] = size
        return size

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


def _too_much(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"{what}: no search space", problem_mark=mark)


def _describe(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"is not valid YAML: {where}{error.problem or error.context}"

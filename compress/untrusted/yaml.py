"""YAML from outside, read to plain data: within the limits on depth and size, aliases counted as often as they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import yaml

from compress.untrusted.limits import limits
from compress.untrusted.reading import check_plain, printable


class YamlError(Exception):
    """A text that is no YAML or goes past a limit; `line` counts from 1, 0 where none is known."""

    def __init__(self, problem: str, line: int = 0) -> None:
        self.problem = problem
        self.line = line
        super().__init__(f"line {line}: {problem}" if line else problem)


@dataclass(frozen=True)
class Parsed:
    """A YAML text: the plain `data`, and the tree of nodes it came from, which know their lines; None for an empty text."""

    data: Any
    root: yaml.Node | None


def parse_yaml(text: str) -> Parsed:
    """Read a YAML text; only plain data is ever built from it.

    Raises:
        YamlError: it is no YAML, or goes past a limit, or holds what no reader of plain data could bear.
    """
    if (size := len(text.encode("utf-8", "surrogatepass"))) > limits().yaml_bytes:
        raise YamlError(f"has {size:,} bytes ({limits().set_by('yaml_bytes')})")
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        data: object = None if root is None else loader.construct_document(root)
        check_plain(data)
    except yaml.MarkedYAMLError as fault:
        tab = "; indent with spaces" if "'\\t'" in str(fault.problem) else ""
        raise YamlError(
            f"{printable(str(fault.problem))}{tab}", fault.problem_mark.line + 1 if fault.problem_mark else 1
        ) from fault
    except RecursionError as fault:
        raise YamlError(f"nests too deep ({limits().set_by('json_depth')})") from fault
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as fault:  # a date of month 13, 5,000 digits
        raise YamlError(printable(str(fault).partition("\n")[0])) from fault
    finally:
        if loader is not None:
            loader.dispose()
    return Parsed(data, root)


class _Loader(yaml.SafeLoader):
    """Counts while it composes, before anything is built; a node's size is that of what its aliases stand for too."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._limits = limits()
        self._depth = 0
        self._values = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node.

        Raises:
            MarkedYAMLError: it goes past a limit, or an alias stands within what it stands for.
        """
        mark = cast("Any", self.peek_event()).start_mark
        # While nodes are composed: once an aliased tree is constructed, the memory is taken.
        aliased = self.check_event(yaml.AliasEvent)
        before = self._values
        self._depth += 1
        if self._depth > self._limits.json_depth + 1:
            raise yaml.MarkedYAMLError(problem=f"nests too deep ({self._limits.set_by('json_depth')})", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if aliased and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias stands within what it stands for", problem_mark=mark)
        # An alias counts as all that it stands for: nine lists of nine aliases each are a "billion laughs" of 400 million values.
        self._values += self._sizes[id(node)] if aliased else 1
        if self._values > self._limits.yaml_values:
            problem = f"has too many values, aliases counted ({self._limits.set_by('yaml_values')})"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        if not aliased:
            self._sizes[id(node)] = self._values - before
        return node

"""Options in YAML text, such as a configuration file and the ``args.yaml`` of a run."""

from __future__ import annotations

from typing import Any

import yaml

from mulki.choices.options import field_name

# Characters of the longest whole number; Python turns thousands of digits into none.
_LONGEST = 40


class _Loader(yaml.SafeLoader):
    """As safe as yaml's own: it only refuses more.

    That is, a key that is given twice, and an alias: a few lines of them stand for a list of
    billions.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"{_line(event)}: the alias *{event.anchor}; write out its value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if field_name(key) in map(field_name, keys[:place]):
                where = _line(node.value[place][0])
                raise yaml.YAMLError(f"{where}: the option {key} is given twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _LONGEST:
            raise yaml.YAMLError(f"{_line(node)}: a number of {len(node.value)} characters")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _line(place: yaml.Node | yaml.Event) -> str:
    assert place.start_mark is not None  # what is parsed has a place
    return f"line {place.start_mark.line + 1}"


def options_in(text: str) -> dict[str, Any]:
    """The options in YAML text, by their names there; none in an empty one.

    Raises:
        ValueError: it is not YAML, or not a mapping of names. The message is one line, for the
            message of whoever knows where the text is from.
    """
    try:
        data = yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # of many kinds, such as that of a date that there is not
        raise ValueError(" ".join(str(error).split())) from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError("no mapping; write lines such as 'lr: 1.0e-4'")
    return data

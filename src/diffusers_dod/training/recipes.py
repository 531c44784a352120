"""Recipes: YAML without what makes it grow or hides a line."""

import re
from typing import Any

import yaml


BOOLEAN = "tag:yaml.org,2002:bool"


class _RecipeLoader(yaml.SafeLoader):
    """Refuses aliases, of which a few lines can stand for gigabytes, and keys that are given twice.

    Booleans are those of YAML 1.2: `no` is a text, such as that of `mixed_precision`.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOLEAN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not allowed", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", mark)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(BOOLEAN, re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_recipe(text: str) -> Any:
    """What a recipe holds.

    Raises:
        yaml.YAMLError: for text that is no YAML, aliases, or a key that is given twice.
    """
    return yaml.load(text, _RecipeLoader)  # noqa: S506 - a safe loader

"""Recipes: YAML without what makes it grow or hides a line."""

from typing import Any

import yaml


class _RecipeLoader(yaml.SafeLoader):
    """Refuses aliases, of which a few lines can stand for gigabytes, and keys that are given twice."""

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


def load_recipe(text: str) -> Any:
    """What a recipe holds.

    Raises:
        yaml.YAMLError: for text that is no YAML, aliases, or a key that is given twice.
    """
    return yaml.load(text, _RecipeLoader)  # noqa: S506 - a safe loader

"""From `train_*.py recipe.yaml key=value` to a checked recipe, or to all of its mistakes at once."""

import argparse
import difflib
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sail_rl.config_data import SOURCE_TAGS, expand_source

RecipeType = TypeVar("RecipeType", bound=BaseModel)
EXIT_BAD_INPUT = 2


class BadInput(Exception):
    """A mistake of the user's: its text names file, key or row, value and fix. Never shown with a traceback."""


class RecipeLoader(yaml.SafeLoader):
    """YAML without its two traps: `1e-5` is a number, and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_command_line(recipe_type: type[RecipeType], description: str) -> RecipeType:
    """The checked recipe of this launch. `--help`, `--dry-run` and every mistake end the program here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change, such as trainer.max_steps=2"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    parser.epilog = "sections and keys:\n" + "\n".join(describe_keys(recipe_type))
    arguments = parser.parse_intermixed_args()
    try:
        recipe = load_recipe(recipe_type, arguments.recipe, arguments.overrides)
    except BadInput as mistake:
        fail(mistake)
    if arguments.dry_run:
        print(recipe_text(recipe), end="")
        sys.exit(0)
    return recipe


def fail(mistake: BadInput) -> NoReturn:
    """Print a mistake of the user's and leave with the documented code."""
    print(f"error: {mistake}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def load_recipe(recipe_type: type[RecipeType], path: str | Path, overrides: list[str] | None = None) -> RecipeType:
    """Read and check a recipe file; raises BadInput with all mistakes."""
    values = read_yaml(Path(path))
    for override in overrides or []:
        apply_override(values, override)
    try:
        return recipe_type.model_validate(values)
    except ValidationError as error:
        lines = [describe_mistake(recipe_type, mistake) for mistake in error.errors()]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise BadInput(f"{path} has {count}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The recipe file as plain values."""
    if not path.is_file():
        nearby = sorted(str(file) for file in (Path("recipes").glob("*.yaml") if Path("recipes").is_dir() else []))
        near = difflib.get_close_matches(str(path), nearby, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"{path}: there is no such recipe{hint}")
    try:
        values = yaml.load(path.read_text(), RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} is not a recipe: it holds {type(values).__name__}, not a mapping of sections")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in place; list items are addressed by number (`rewards.0.weight=1`)."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise BadInput(f"override {override!r}: write it as key.sub=value")
    try:
        value = yaml.load(text, RecipeLoader)
    except yaml.YAMLError:
        raise BadInput(f"override {override!r}: the value is not valid YAML") from None
    *parents, last = dotted.split(".")
    node: Any = values
    for depth, key in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        node = child(node, key, override, here)
        if not isinstance(node, dict | list):
            raise BadInput(f"override {override!r}: {here} is {shown(node)}, which has no keys")
    if isinstance(node, list):
        child(node, last, override, dotted)
        node[int(last)] = value
    else:
        node[last] = value


def child(node: Any, key: str, override: str, dotted: str) -> Any:
    """The container under `key`, made when missing, opened up when it is a shorthand text."""
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise BadInput(f"override {override!r}: {dotted} is not one of the {len(node)} entries (0 is the first)")
        return node[int(key)]
    if not isinstance(node.get(key), dict | list):
        node[key] = expand_shorthand(key, node.get(key))
    return node[key]


def expand_shorthand(key: str, value: Any) -> dict[str, Any]:
    """The mapping that a text stands for, so that an override of one key keeps the rest."""
    if not isinstance(value, str):
        return {}
    return {"path": value} if key == "model" else expand_source(value)


def describe_mistake(recipe_type: type[BaseModel], mistake: Any) -> str:
    """One line: dotted key, value, what is wrong, what is allowed, the nearest key."""
    location = written_location(mistake["loc"])
    key = ".".join(str(part) for part in location)
    if mistake["type"] == "extra_forbidden":
        allowed = keys_at(recipe_type, mistake["loc"][:-1])
        return f"{key} = {shown(mistake['input'])}: unknown key; {suggest(key, allowed, recipe_type)}"
    if mistake["type"] == "missing":
        return f"{key}: this key is required"
    if mistake["type"] == "union_tag_invalid":
        return f"{key}.source = {shown(mistake['input']['source'])}: input should be {mistake['ctx']['expected_tags']}"
    message = mistake["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{key} = {shown(mistake['input'])}: {message}" if key else message


def written_location(location: tuple) -> list[Any]:
    """A place as the recipe has it: pydantic also names the kind of each source of data.train and data.eval."""
    if location[:2] not in (("data", "train"), ("data", "eval")):
        return list(location)
    tags = 2 if location[2:3] == ("list",) else 1
    behind = [part for place, part in enumerate(location[2:]) if not (part in SOURCE_TAGS and place <= tags)]
    return [*location[:2], *behind]


def suggest(key: str, allowed: list[str], recipe_type: type[BaseModel]) -> str:
    """The section that has the key, the nearest key of this section, and all that is allowed."""
    name = key.split(".")[-1]
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    known = all_keys(recipe_type)  # among them the keys of other kinds of source at this very place
    elsewhere = [] if key in known else [path for path in known if path.split(".")[-1] == name]
    hints = elsewhere[:1] + near
    hint = f"did you mean {' or '.join(hints)}? " if hints else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def shown(value: Any) -> str:
    """A value as it is quoted in a message."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def nested_sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType, list):
        return [section for part in typing.get_args(annotation) for section in nested_sections(part)]
    return []


def keys_at(recipe_type: type[BaseModel], location: tuple) -> list[str]:
    """Keys that are allowed at a place of the recipe, as pydantic names places (tags of unions among them)."""
    sections = [recipe_type]
    for part in location:
        tagged = [section for section in sections if getattr(section.model_fields.get("source"), "default", 0) == part]
        if tagged:
            sections = tagged
        elif isinstance(part, str) and part != "list":
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [nested for field in fields for nested in nested_sections(field.annotation)]
    return sorted({name for section in sections for name in section.model_fields})


def all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that a recipe of this type may have."""
    keys = []
    for name, field in section.model_fields.items():
        inner = nested_sections(field.annotation)
        keys += [key for nested in inner for key in all_keys(nested, f"{prefix}{name}.")] or [prefix + name]
    return keys


def describe_keys(recipe_type: type[BaseModel]) -> list[str]:
    """A line per section for `--help`."""
    lines = []
    for name, _field in recipe_type.model_fields.items():
        keys = [key.removeprefix(f"{name}.") for key in all_keys(recipe_type) if key.startswith(f"{name}.")]
        lines.append(f"  {name}: {', '.join(dict.fromkeys(keys))}" if keys else f"  {name}")
    return lines


def recipe_text(recipe: BaseModel) -> str:
    """The resolved recipe, defaults included, as YAML that loads again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

"""Faults of a recipe in words: the field's path, what came, what is allowed, the closest name."""

import difflib
import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from condzoo.training.schema import Recipe

LONGEST = 60  # signs of what came
# pydantic's error type -> what is allowed, in a recipe's own words
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "list_type": "a list [...]",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


class RecipeError(ValueError):
    """A recipe that cannot be used; one line a fault, each with its field."""


def describe_errors(error: ValidationError, given: Mapping[str, Any]) -> list[str]:
    """One line for each fault that pydantic found in `given`."""
    lines = []
    for fault in error.errors(include_url=False):
        quoted = next((part for part in fault["loc"] if isinstance(part, str) and "." in part), None)
        if quoted is not None and fault["type"] == "extra_forbidden":
            lines.append(f"{quoted!r}: unknown field; a name in quotes is no path: write {quoted} without quotes")
            continue
        path = _field_path(fault["loc"], given)
        if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
            path += ".name"
        lines.append(f"{path}: {_in_words(fault, path, given)}")
    return lines


def field_paths(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path, variant) of every field, e.g. ("optim.betas", "adam"); variant is "" outside optim and schedule."""
    for name, field in model.model_fields.items():
        sections = list(_sections_in(field.annotation))
        if not sections:
            yield prefix + name, ""
        for section in sections:
            variant = ""
            if len(sections) > 1:
                (variant,) = typing.get_args(section.model_fields["name"].annotation)
            yield from ((path, variant) for path, _ in field_paths(section, f"{prefix}{name}."))


def kinds_of(name_path: str) -> list[str]:
    """The names of a table that has several kinds: "optim.name" -> sgd, gd, adam, adamw."""
    return [variant for path, variant in field_paths() if path == name_path]


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The tables a field can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _field_path(loc: Iterable[str | int], given: Mapping[str, Any]) -> str:
    """`optim.betas[1]` of pydantic's location, without the variant's and types' names it mixes in."""
    path, at = "", given
    tables = {"optim", "schedule"}
    parts = list(loc)
    for position, part in enumerate(parts):
        if position == 1 and parts[0] in tables and isinstance(at, Mapping) and part == at.get("name"):
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(at, Mapping):
            path += f".{part}" if path else part
        else:
            continue  # which type of a union was tried
        if isinstance(at, Mapping):
            at = at.get(part)  # type: ignore[assignment, arg-type]
    return path


def _in_words(fault: ErrorDetails, path: str, given: Mapping[str, Any]) -> str:
    kind, got, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown field" + _closest_field(path, given)
    if kind == "missing":
        return "missing; it has no default"
    if kind == "union_tag_not_found":
        return f"missing; must be one of: {', '.join(kinds_of(path))}"
    if kind == "union_tag_invalid":
        allowed = context["expected_tags"].replace("'", "")
        return _wrong_choice(got["name"], allowed)
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ").replace("True, False", "true, false")
        return _wrong_choice(got, allowed)
    if kind == "less_than_equal":  # pydantic writes 1e30 with every zero
        return f"got {shown(got)}, must be less than or equal to {context['le']:g}"
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"got {shown(got)}, must be a list of {bound}"
    expected = _EXPECTED.get(kind)
    if expected:
        form = f", such as {path}={_as_list(got)}" if kind == "list_type" and isinstance(got, str) else ""
        return f"got {shown(got)}, must be {expected}{form}"
    message = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"got {shown(got)}, must be {message}"


def _wrong_choice(got: Any, allowed: str) -> str:
    close = _closest(str(got), allowed.split(", "))
    hint = f"; did you mean {close!r}?" if close else ""
    return f"got {shown(got)}, must be one of: {allowed}{hint}"


def _closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like one, in capitals or not."""
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return lower[close[0]] if close else None


def _closest_field(path: str, given: Mapping[str, Any]) -> str:
    """`; did you mean 'optim.lr'?`: the closest field of the same table, as its name says it, or of any."""
    table, _, name = path.rpartition(".")
    every = list(field_paths())
    owners = [variant for known, variant in every if known == path and variant]
    if owners:
        return f" of this kind; it belongs to: {', '.join(owners)}; leave it out (--set {path}=none)"
    kind = given[table]["name"] if any(kinds_of(f"{table}.name")) else ""
    own = {known for known, variant in every if variant in ("", kind)}
    known = dict.fromkeys(known for known, _ in every if known in own or known.rpartition(".")[0] != table)
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == table}
    if not table:
        siblings |= {k.partition(".")[0]: k.partition(".")[0] for k in known}
    anywhere = {k.rpartition(".")[2]: k for k in known}
    for names in (siblings, anywhere):
        close = _closest(name, names)
        if close:
            return f"; did you mean {names[close]!r}?"
    return f"; {table or 'a recipe'} has: {', '.join(siblings)}" if siblings else ""


def _as_list(text: str) -> str:
    """The list that a text was meant for, as TOML writes it: conv1*,fc.* -> ["conv1*", "fc.*"], 40,60 -> [40,60]."""
    return f"[{text}]" if set(text) <= set("0123456789,. ") else json.dumps(text.split(","))


def shortened(fault: str, given: Any) -> str:
    """A fault with the long texts of the tables that it is of, names of fields among them, cut off."""
    left = [given]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and len(value) > LONGEST:
            fault = fault.replace(repr(value), shown(value)).replace(value, cut_off(value))
    return fault


def shown(value: Any) -> str:
    """A value as it came, cut off where it is long; of any kind that TOML has."""
    try:
        if isinstance(value, bool):
            return "true" if value else "false"
        text = value.isoformat() if isinstance(value, date | time) else repr(value)  # as TOML writes them
    except (ValueError, RecursionError):  # a number of more digits, or more tables in one another, than Python writes
        text = "what is too long to be shown"
    return cut_off(text)


def cut_off(text: str) -> str:
    """A text, or its beginning where it is long."""
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."

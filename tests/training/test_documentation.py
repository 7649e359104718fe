"""The documented fields are those of the code, all of them, and docs/recipes.md is up to date."""

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from condzoo.training import Recipe, recipe_files
from condzoo.training.documentation import PAGE, json_schema, recipe_fields, schema_text, with_fields
from condzoo.training.recipe_errors import field_paths

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert page == with_fields(page), "python -m condzoo.training.documentation writes it again"
    with pytest.raises(ValueError, match=r"the marks .* are missing"):
        with_fields("# Recipes")


def test_every_field_is_there_and_says_what_it_means() -> None:
    fields = recipe_fields()
    documented = {(f"{field.section}.{field.name}".strip("."), field.kind) for field in fields}
    known = {(path, kind) for path, kind in field_paths()}
    assert documented == known
    assert all(field.meaning and field.type for field in fields)


def test_types_bounds_and_defaults_as_a_recipe_has_them() -> None:
    fields = {(field.section, field.kind, field.name): field for field in recipe_fields()}
    assert fields["", "", "seed"].type == f"whole number >= 0, < {2**63}"
    assert fields["", "", "ema"].type == "number > 0, < 1"
    assert fields["", "", "channels_last"].type == 'true or false or "auto"'
    assert fields["optim", "adam", "betas"].type == "list of number >= 0, < 1"
    assert fields["optim", "sgd", "lr"].default == "required"
    assert fields["optim", "adam", "betas"].default == "[0.9, 0.999]"
    assert fields["schedule", "constant", "name"].default == "required"
    assert fields["schedule", "cosine", "name"].meaning.startswith("Half a cosine")
    assert fields["", "", "grad_clip"].default == ""


def test_the_text_has_a_line_a_field() -> None:
    lines = schema_text().splitlines()
    assert sum(line.startswith("  ") for line in lines) == len(recipe_fields())
    assert '[optim] name = "adamw"' in lines
    assert (
        "  seed               whole number >= 0, < 9223372036854775808, default 0: of initialization, order,"
        in "".join(lines)
    )


def test_the_json_schema_is_that_of_the_model_and_its_variants() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {*Recipe.model_fields, "variants"}
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Constant"]["required"] == ["name"]
    with pytest.raises(ValidationError):
        Recipe.model_validate({"epochs": "x"})


def test_the_published_schema_takes_every_recipe_that_comes_with_condzoo() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    for path in set(recipe_files().values()):
        validator.validate(tomllib.loads(path.read_text(encoding="utf-8")))
    with pytest.raises(jsonschema.ValidationError, match="'variant' was unexpected"):
        validator.validate({"variant": {}})

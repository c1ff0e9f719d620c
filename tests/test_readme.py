from pathlib import Path

import pytest

from optimizer.catalogue import installed
from optimizer.generated import README, SCHEMA, schema_text, with_table
from optimizer.schema import pass_table

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / README).exists(), reason="README.md is not written yet")
def test_readme_has_the_current_table_of_passes() -> None:
    readme = (ROOT / README).read_text(encoding="utf-8")
    assert with_table(readme, pass_table(installed())) == readme, "run: python -m optimizer.generated"


@pytest.mark.skipif(not (ROOT / SCHEMA).exists(), reason="recipe.schema.json is not written yet")
def test_schema_beside_the_recipes_is_current() -> None:
    assert (ROOT / SCHEMA).read_text(encoding="utf-8") == schema_text(), "run: python -m optimizer.generated"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipe_names_its_schema_first(recipe: Path) -> None:
    assert recipe.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")

from pathlib import Path

import pytest

from optimizer.catalogue import installed
from optimizer.generated import README, with_table
from optimizer.schema import pass_table

ROOT = Path(__file__).parents[1]


def test_readme_has_the_current_table_of_passes() -> None:
    readme = (ROOT / README).read_text(encoding="utf-8")
    assert with_table(readme, pass_table(installed())) == readme, "run: python -m optimizer.generated"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipe_names_its_schema_first(recipe: Path) -> None:
    assert recipe.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")

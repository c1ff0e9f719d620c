"""What is written from the code and checked by tests: README's table of passes, JSON Schemas of what is read and told.

`python -m optimizer.generated` writes them, from the project's folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from optimizer.catalogue import installed
from optimizer.errors import CommandError
from optimizer.schema import compare_schema, pass_table, recipe_schema, run_schema

BEGIN, END = "<!-- passes -->", "<!-- /passes -->"
README, SCHEMA = Path("README.md"), Path("recipes/recipe.schema.json")
RUN_SCHEMA, COMPARE_SCHEMA = Path("docs/run.schema.json"), Path("docs/compare.schema.json")


def with_table(readme: str, table: str) -> str:
    """Return the text with what stands between the two markers replaced.

    Raises:
        CommandError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CommandError(f"{README}: expected {BEGIN} and, after it, {END}")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def schema_text() -> str:
    """Return the schema of a recipe as `optimize schema` prints it."""
    return json.dumps(recipe_schema(installed()), indent=1, ensure_ascii=False) + "\n"


def run_schema_text() -> str:
    """Return the schema of a run as `optimize schema --run` prints it."""
    return json.dumps(run_schema(), indent=1, ensure_ascii=False) + "\n"


def compare_schema_text() -> str:
    """Return the schema of a comparison as `optimize schema --compare` prints it."""
    return json.dumps(compare_schema(), indent=1, ensure_ascii=False) + "\n"


def write(root: Path) -> None:
    """Write all of it below the project's folder."""
    readme = root / README
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), pass_table(installed())), encoding="utf-8")
    (root / SCHEMA).write_text(schema_text(), encoding="utf-8")
    (root / RUN_SCHEMA).write_text(run_schema_text(), encoding="utf-8")
    (root / COMPARE_SCHEMA).write_text(compare_schema_text(), encoding="utf-8")


if __name__ == "__main__":
    write(Path.cwd())

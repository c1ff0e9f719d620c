"""What is written from the code and checked by tests: README's table of passes, JSON Schemas of what is read and told.

`python -m optimizer.generated` writes them, from the project's folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from optimizer.catalogue import installed
from optimizer.errors import CommandError
from optimizer.schema import JsonSchema, compare_schema, pass_table, plan_schema, recipe_schema, run_schema

BEGIN, END = "<!-- passes -->", "<!-- /passes -->"
README = Path("README.md")
SCHEMAS: Mapping[str, tuple[Path, Callable[[], JsonSchema]]] = {
    "recipe": (Path("recipes/recipe.schema.json"), lambda: recipe_schema(installed())),
    "run": (Path("docs/run.schema.json"), run_schema),
    "compare": (Path("docs/compare.schema.json"), compare_schema),
    "plan": (Path("docs/plan.schema.json"), plan_schema),
}
"""What is described -> file, and what makes it."""


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


def schema_text(of: str = "recipe") -> str:
    """Return one of `SCHEMAS` as `optimize schema` prints it."""
    return json.dumps(SCHEMAS[of][1](), indent=1, ensure_ascii=False) + "\n"


def write(root: Path) -> None:
    """Write all of it below the project's folder."""
    readme = root / README
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), pass_table(installed())), encoding="utf-8")
    for name, (path, _) in SCHEMAS.items():
        (root / path).write_text(schema_text(name), encoding="utf-8")


if __name__ == "__main__":
    write(Path.cwd())

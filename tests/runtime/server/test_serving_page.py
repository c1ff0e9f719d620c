"""docs/serving.md names every route, option and metric that there is, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_page_names_every_route(client: Any) -> None:
    paths = set(client.get("/openapi.json").json()["paths"]) - {
        "/v1/models/{name}",
        "/v1/rerank",
        "/v2/rerank",
    }
    named = set(re.findall(r"`(?:GET |POST )?(/[a-z0-9/]*)`", PAGE.split("\n## ")[0]))
    assert paths | {"/"} == named - {"/openapi.json", "/health"}


def test_the_page_names_metrics_that_there_are(client: Any) -> None:
    client.post("/v1/completions", json={"prompt": "the", "max_tokens": 4})
    text = client.get("/metrics").text
    found = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    named = set(re.findall(r"`((?:vllm:|optimize_)\w+)`", PAGE)) - {"optimize_cost_dollars_total"}
    assert {name.removesuffix("_total") for name in named} <= {name.removesuffix("_total") for name in found}
    vllm = {name for name in found if name.startswith("vllm:") and not name.endswith("_created")}
    assert {name.removesuffix("_total") for name in vllm} <= {name.removesuffix("_total") for name in named}


def test_the_page_names_options_that_there_are() -> None:
    from optimizer.cli import app

    command: Any = typer.main.get_command(app)
    options = {name for parameter in command.commands["serve"].params for name in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= options


@pytest.mark.parametrize("name", ["timeout_s", "drain_s", "queue", "max_body_bytes", "slow_reader_s"])
def test_the_page_has_the_defaults(name: str) -> None:
    from runtime.server.settings import Settings

    value = getattr(Settings(), name)
    shown = f"{value >> 20} MiB" if name == "max_body_bytes" else f"{value:g}"
    assert shown in PAGE

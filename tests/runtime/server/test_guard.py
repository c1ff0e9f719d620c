"""Who may ask, what is measured before it is parsed, and what every response says."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import SettingsError
from runtime.server import guard
from runtime.server.guard import is_nested_deeper
from runtime.server.log import JsonLines
from runtime.server.settings import Settings, is_loopback, read_api_keys

Make = Callable[..., Any]
SECRET = "sk-a-secret"
ASK = {"prompt": "the", "max_tokens": 2}


@pytest.fixture(scope="module")
def keyed(app_of: Make, client_of: Make) -> Iterator[Any]:
    settings = Settings(
        api_keys=("other", SECRET),
        allow_hosts=("models.example",),
        allow_origins=("https://app.example",),
        max_body_bytes=4096,
    )
    with client_of(app_of(settings)) as made:
        yield made


def bearer(key: str = SECRET) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def error(response: Any) -> dict[str, Any]:
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return dict(found)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/readyz", "/health", "/openapi.json", "/v1/nothing"])
def test_every_route_but_livez_asks_for_a_key(keyed: Any, path: str) -> None:
    assert keyed.get("/livez").status_code == 200
    assert keyed.get(path).status_code == 401
    for wrong in ({"Authorization": SECRET}, bearer("sk-a-secre"), bearer(""), {"Authorization": f"Basic {SECRET}"}):
        response = keyed.get(path, headers=wrong)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert error(response)["code"] == "invalid_api_key"
    assert keyed.get(path, headers=bearer()).status_code in (200, 404)
    assert keyed.get(path, headers=bearer("other")).status_code in (200, 404)


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.1.7", True),
        ("models.example", True),
        ("models.example.:80", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_the_server_is_called_by_a_name_it_knows(keyed: Any, host: str, is_known: bool) -> None:
    response = keyed.get("/livez", headers={"Host": host})
    assert response.status_code == (200 if is_known else 403)
    assert is_known or "--allow-host" in error(response)["message"]


def test_pages_of_other_sites_are_kept_out_unless_they_are_allowed(keyed: Any) -> None:
    for origin in ("https://evil.example", "null", "http://app.example", "http://localhost:1"):
        assert keyed.get("/livez", headers={"Origin": origin}).status_code == 403
    assert keyed.get("/livez", headers={"Origin": "http://localhost"}).status_code == 200  # its own
    allowed = keyed.get("/v1/models", headers={"Origin": "https://app.example", **bearer()})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://app.example"


def test_a_browser_may_ask_beforehand_for_an_allowed_page(keyed: Any) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    response = keyed.options("/v1/completions", headers=asked)
    assert response.status_code == 204
    assert "authorization" in response.headers["access-control-allow-headers"]


def test_every_response_forbids_what_a_browser_might_do_with_it(keyed: Any) -> None:
    for response in (keyed.get("/livez"), keyed.get("/nothing"), keyed.post("/v1/completions", json={})):
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"


def test_a_request_id_is_kept_if_it_is_sane_and_made_otherwise(keyed: Any) -> None:
    assert keyed.get("/livez", headers={"X-Request-Id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for strange in ("", "a b", "x" * 65, 'a"b'):
        assert keyed.get("/livez", headers={"X-Request-Id": strange}).headers["x-request-id"].startswith("req-")


def test_a_body_that_is_too_large_is_refused_before_it_is_read(keyed: Any) -> None:
    body = json.dumps({"prompt": "x" * 5000})
    headers = {"content-type": "application/json", **bearer()}
    told = keyed.post("/v1/completions", content=body, headers=headers)
    untold = keyed.post("/v1/completions", content=iter([body.encode()]), headers=headers)
    for response in (told, untold):
        assert response.status_code == 413 and "at most 4096 bytes" in error(response)["message"]


def test_bodies_of_all_requests_together_are_bounded(keyed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_HELD_BYTES", 1000)
    for size, status in ((2000, 429), (100, 200), (2000, 429), (800, 200)):  # what ended counts no longer
        body = json.dumps({**ASK, "user": "x"}) + " " * size
        headers = {"content-type": "application/json", **bearer()}
        response = keyed.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == status
    assert "retry-after" not in response.headers


def test_a_body_must_be_called_json(keyed: Any) -> None:
    response = keyed.post("/v1/completions", content="{}", headers={"content-type": "text/plain", **bearer()})
    assert response.status_code == 415 and "expected application/json" in error(response)["message"]
    for body, message in (("{", "is not JSON"), ("", "missing"), ("[1]", "valid dictionary")):
        headers = {"content-type": "application/json; charset=utf-8", **bearer()}
        response = keyed.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == 400 and message in error(response)["message"]


def test_a_body_that_is_nested_deeply_is_refused_before_it_is_parsed(keyed: Any) -> None:
    for body in ('{"prompt":' + "[" * 1000, '{"prompt":' + "[" * 40 + "]" * 40 + "}"):
        headers = {"content-type": "application/json", **bearer()}
        response = keyed.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == 400 and "nested deeper than 32" in error(response)["message"]


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


texts = st.text(alphabet='"\\[]{}\n\t/a日', max_size=6)
nested = st.recursive(texts | st.none(), lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=12)


@given(nested, st.integers(1, 4), st.booleans())
def test_nesting_is_counted_outside_strings(value: Any, most: int, is_ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii).encode()
    assert is_nested_deeper(body, most) == (_depth(value) > most)


def test_a_public_address_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", "models.example"):
        with pytest.raises(SettingsError, match=f"host: {host} can be reached from other machines"):
            Settings(host=host)
        assert Settings(host=host, api_keys=("k",)).host == host
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))


@pytest.mark.parametrize("name", ["max_body_bytes", "queue", "queue_tokens", "timeout_s", "slow_reader_s"])
def test_settings_that_let_nothing_through_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: got 0, expected more than 0"):
        dataclasses.replace(Settings(), **{name: 0})


def test_a_drain_that_has_no_length_is_refused() -> None:
    for wrong in (-1.0, float("nan")):
        with pytest.raises(SettingsError, match="drain_s: got"):
            Settings(drain_s=wrong)


def test_keys_come_from_a_file_and_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\n\nfirst \nsecond\n")
    assert read_api_keys(file, "third, ,fourth") == ("third", "fourth", "first", "second")
    assert read_api_keys(None) == ()
    file.write_text("# none\n")
    for path, message in ((file, "holds no API key"), (tmp_path / "missing", "cannot be read")):
        with pytest.raises(SettingsError, match=message):
            read_api_keys(path)


def test_a_request_is_logged_with_what_it_cost_and_without_its_text(
    keyed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "runtime.server"):
        headers = {"X-Request-Id": "mine", **bearer()}
        keyed.post("/v1/completions", json={**ASK, "prompt": "a secret plan"}, headers=headers)
        keyed.post("/v1/completions", json={**ASK, "prompt": ["a secret plan", 7]}, headers=bearer())
        keyed.get("/livez")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    first, second = (line for line in lines if line["event"] == "request")
    known = {"request_id": "mine", "method": "POST", "route": "/v1/completions", "status": 200, "model": "artifact-v1"}
    assert known.items() <= first.items()
    assert first["completion_tokens"] == 2 and first["prompt_tokens"] > 2 and first["ms"] > 0
    assert second["status"] == 400
    assert "secret" not in json.dumps(lines)


def test_a_bug_is_answered_and_logged_without_what_the_exception_says(
    app_of: Make, client_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_of()

    def break_down(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret plan")

    app.state.service.find = break_down
    with client_of(app) as client, caplog.at_level(logging.INFO, "runtime.server"):
        response = client.post("/v1/completions", json=ASK)
    assert response.status_code == 500 and "a bug" in error(response)["message"]
    line = json.loads(JsonLines().format(next(record for record in caplog.records if record.exc_info)))
    assert line["error"] == "RuntimeError" and "break_down" in line["at"][-1] and "secret" not in json.dumps(line)


def test_a_body_that_never_ends_is_given_up(app_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.01)
    import asyncio

    async def main() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        await app_of().build_middleware_stack()(
            {**scope, "query_string": b"", "root_path": "", "app": None}, receive, send
        )
        return sent

    assert asyncio.run(main())[0]["status"] == 408

"""Chat templates render as in transformers, and cannot reach outside."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from runtime.chat_template import ChatTemplate
from runtime.errors import ArtifactError, PromptError

USER = [{"role": "user", "content": "hi <b>"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(USER, **variables)


def test_a_template_sees_messages_special_tokens_and_the_generation_prompt() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] }}{% endfor %} {{ add_generation_prompt }}"
    )
    assert render(source) == "<s>user: hi <b> True"


def test_blocks_leave_no_blank_lines_behind() -> None:
    assert render("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n") == "x\n"


def test_tojson_writes_plain_json() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi <b>"}]'
    assert render("{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 1,\n "b": "é"\n}'


def test_a_template_can_refuse_a_conversation() -> None:
    with pytest.raises(PromptError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_the_date_is_at_hand() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_loop_controls_generation_blocks_and_namespaces_work() -> None:
    source = (
        "{% set ns = namespace(n=0) %}"
        "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}"
        "{% generation %}{{ ns.n }}{% endgeneration %}{{ dict(a=1).a }}"
    )
    assert render(source) == "31"


def test_further_variables_reach_the_template() -> None:
    assert render("{{ enable_thinking }} {{ tools }}", enable_thinking=False) == "False None"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__call__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% include 'secret' %}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) }}",
        "{% if %}",
        "{{ undefined_name.field }}",
    ],
)
def test_a_template_that_reaches_out_or_breaks_ends_in_one_error(source: str) -> None:
    with pytest.raises(PromptError, match="chat template: cannot render"):
        render(source)


def test_the_jinja_file_comes_before_the_configuration(tmp_path: Path) -> None:
    config = {"chat_template": "old {{ eos_token }}", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    old = ChatTemplate.load(tmp_path)
    assert old is not None and old.render([]) == "old </s>"
    (tmp_path / "chat_template.jinja").write_text("new")
    new = ChatTemplate.load(tmp_path)
    assert new is not None and new.render([]) == "new"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None and template.source == "d"


def test_no_template_is_no_error_but_a_broken_file_is(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        ChatTemplate.load(tmp_path)

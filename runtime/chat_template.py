"""Render a conversation into the text a model was trained on.

A chat template is a program that came with somebody's weights, so it runs in jinja2's immutable sandbox, with the names
that transformers gives its templates (`transformers.utils.chat_template_utils`) and none besides.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ArtifactError, PromptError

if TYPE_CHECKING:
    import jinja2

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_FAILURES = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)  # of a template's code

Message = Mapping[str, Any]


class ChatTemplate:
    """A chat template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Return the template in `chat_template.jinja` or `tokenizer_config.json`; None without one."""
        config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = next((item["template"] for item in source if item["name"] == "default"), None)
        if not isinstance(source, str):
            return None
        return cls(source, {name: _content(config[name]) for name in _SPECIAL if config.get(name) is not None})

    def render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """Return the prompt for a conversation, ending where the assistant's answer begins.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            variables: further names the template knows, such as `tools` or `enable_thinking`.

        Raises:
            PromptError: when the template refuses the conversation.
        """
        import jinja2

        known = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return self._template.render({**self.special_tokens, **known, **variables})
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise PromptError(f"chat template: cannot render these messages: {error}") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2
        import jinja2.sandbox

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_namespace(), dict=_NewDict()
        )
        return environment.from_string(self.source)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is not JSON ({error}); build the artifact again") from None
    return content if isinstance(content, dict) else {}


def _content(token: object) -> str:
    """Return a special token's text, which older files wrap in `{"content": ...}`."""
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON; jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _NewDict:
    """`dict` as templates use it, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace() -> type:
    """Return jinja2's `namespace` without names that begin with an underscore."""
    import jinja2
    import jinja2.utils

    class PlainNamespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # a template may write namespace(self=...)
            jinja2.utils.Namespace.__init__(*args, **kwargs)
            for name in dict(*args[1:], **kwargs):
                _refuse_private(name)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    return PlainNamespace


def _refuse_private(name: object) -> None:
    import jinja2.exceptions

    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")


def _generation_tag() -> type[jinja2.ext.Extension]:
    """Return the tag {% generation %}, which marks the assistant's words for training and changes nothing here."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser

    class GenerationTag(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationTag

"""What OpenAI's clients send, checked strictly: a field is understood, known to be harmless, or refused by its name.

`null` means a field was not given. Fields of vLLM that have an effect here (`top_k`, `min_p`, `repetition_penalty`,
`stop_token_ids`, `min_tokens`, `ignore_eos`, `chat_template_kwargs`) have its meaning.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from runtime.logprobs import MOST_LOGPROBS
from runtime.request import Options
from runtime.sampler import LEAST_TEMPERATURE, SamplingParams
from runtime.server.errors import ApiError
from runtime.server.settings import MAX_CHOICES, MAX_TEXTS

_SEEDS: Final = 1 << 64
_MOST_FIELDS: Final = 64  # of one object; each one that is wrong costs an error before the first is told
_MOST_IDS: Final = 1 << 18


def _at_most(most: int) -> Callable[[Any], Any]:
    """Return a validator that counts an object's entries before they are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError(
                "entries", "got {got} entries, expected at most {most}", {"got": len(value), "most": most}
            )
        return value

    return check


def _own(variables: dict[str, Any]) -> dict[str, Any]:
    """Refuse a variable that would take the place of the conversation."""
    if "messages" in variables:
        raise PydanticCustomError("variables", "got messages, which have a field of their own")
    return variables


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Name = Annotated[str, Field(max_length=512)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]

_NO_TOOLS: Final[dict[str, tuple[object, ...]]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
_NO_MODES: Final[dict[str, tuple[object, ...]]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}


def _one_of(expected: str) -> Callable[[Any, ValidatorFunctionWrapHandler], Any]:
    """Return a validator that tells of a union as a whole, not of each thing that a value is not."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("union", f"expected {expected}") from None

    return check


class Body(BaseModel):
    """A JSON object whose fields are all known.

    Attributes:
        unsupported: fields of OpenAI's that are refused by name, and the values that change nothing and so pass.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        if len(content) > _MOST_FIELDS:
            raise PydanticCustomError(
                "fields", "got an object of {got} fields, which are too many", {"got": len(content)}
            )
        given = {name: value for name, value in content.items() if value is not None}
        for name in cls.unsupported.keys() & given.keys():
            if given.pop(name) not in cls.unsupported[name]:
                raise PydanticCustomError(
                    "unsupported", "is not supported by this server; leave it out", {"field": name}
                )
        return given


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generation(Body):
    """What both ways to ask for text have in common."""

    model: Name | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=1024), BeforeValidator(_at_most(1024))] = {}
    seed: Annotated[int, Field(ge=-(1 << 63), lt=_SEEDS)] | None = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=64)],
        WrapValidator(_one_of("a text or at most 64 texts, each of 1 to 1024 characters")),
    ] = []
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=256)] = []
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    user: Name = Field("", description="Of no effect.")
    metadata: Annotated[dict[str, str], Field(max_length=16), BeforeValidator(_at_most(16))] = Field(
        {}, description="Of no effect."
    )
    store: bool = Field(False, description="Of no effect: nothing is stored.")
    service_tier: Literal["auto", "default", ""] = Field("", description="Of no effect.")

    def sampling(self, defaults: Mapping[str, float]) -> SamplingParams:
        """Return how tokens are drawn; what was not said is as the model's own file has it, else as OpenAI does.

        Raises:
            ApiError: a key of `logit_bias` is no token id.
            SamplingError: a value is out of range.
        """

        def choose(name: str, otherwise: float) -> Any:
            given = getattr(self, name)
            return defaults.get(name, otherwise) if given is None else given

        temperature = choose("temperature", 1.0)
        return SamplingParams(
            temperature=0.0 if 0 < temperature < LEAST_TEMPERATURE else temperature,  # as good as greedy, and meant so
            top_k=max(choose("top_k", 0), 0),
            top_p=choose("top_p", 1.0),
            min_p=choose("min_p", 0.0),
            repetition_penalty=choose("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((_token_id(key), bias) for key, bias in self.logit_bias.items()),
            seed=(secrets.randbits(63) if self.seed is None else self.seed) % _SEEDS,
        )

    def options(self, defaults: Mapping[str, float]) -> Options:
        """Return what the engine is to be told, but for the number of tokens and the logprobs."""
        return {
            "sampling": self.sampling(defaults),
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
        }


TemplateVariables = Annotated[
    dict[str, str | bool | int | float], Field(max_length=32), BeforeValidator(_at_most(32)), AfterValidator(_own)
]


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 18:
        raise ApiError(400, f"logit_bias: got the key {key[:40]!r}, expected a token id", param="logit_bias")
    return int(key)


class CompletionBody(Generation):
    """What `/v1/completions` takes."""

    unsupported = {"suffix": (), **_NO_MODES}
    prompt: Annotated[
        str | Ids | Annotated[Texts, Field(min_length=1)] | Annotated[list[Ids], Field(fail_fast=True, min_length=1)],
        WrapValidator(_one_of("a text, token ids, or a list of texts or of token ids")),
    ]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, one or several."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given

    @model_validator(mode="after")
    def _consistent(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise _field("best_of", "got {got}, expected n, which is {n}", got=self.best_of, n=self.n)
        if self.max_tokens == 0 and not self.echo:
            raise _field("max_tokens", "got 0, expected at least 1, or echo")
        if self.stream and self.echo and self.logprobs is not None:
            raise _field("logprobs", "got it with echo and stream; a prompt's logprobs come with the whole alone")
        if len(self.prompts) * self.n > MAX_CHOICES:
            text = "got {prompts} with n = {n}, expected at most {most} answers in all"
            raise _field("prompt", text, prompts=len(self.prompts), n=self.n, most=MAX_CHOICES)
        return self


def _text(content: Any) -> Any:
    """Return the text of a message; parts are joined by newlines."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str) or part.keys() > {"type", "text"}:
            text = "got a part of type {kind}, expected text with its type and text alone; nothing else can be read"
            raise PydanticCustomError("content", text, {"kind": repr(kind)[:40]})
        texts.append(part["text"])
    return "\n".join(texts)


_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}


class ChatMessage(Body):
    """One turn of a conversation."""

    unsupported = {"tool_calls": ([],), "function_call": (), "audio": (), "refusal": ("",), "annotations": ([],)}
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text), WithJsonSchema(_CONTENT)] | None = None
    name: Name | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content", "content is missing")
        return self

    @property
    def message(self) -> dict[str, str]:
        """As chat templates read it; they know no developers."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content or ""}
        return message if self.name is None else message | {"name": self.name}


class ChatBody(Generation):
    """What `/v1/chat/completions` takes."""

    unsupported = {**_NO_TOOLS, **_NO_MODES}
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    parallel_tool_calls: bool = Field(True, description="Of no effect.")
    chat_template_kwargs: TemplateVariables = {}

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise _field(
                "top_logprobs", "got {got} without logprobs, expected logprobs to be true", got=self.top_logprobs
            )
        return self

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages, as chat templates read them."""
        return [message.message for message in self.messages]

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of an answer; None for as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeBody(Body):
    """What `/tokenize` takes: a prompt, or messages for the chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: TemplateVariables = {}

    @model_validator(mode="after")
    def _consistent(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise _field("prompt", "expected either a prompt or messages")
        return self


class DetokenizeBody(Body):
    """What `/detokenize` takes."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, max_length=_MOST_IDS)]


class EncoderBody(Body):
    """What all routes of encoders take."""

    model: Name | None = None
    truncate_prompt_tokens: Literal[-1] | None = Field(None, description="-1 cuts texts to what the model reads.")
    user: Name = Field("", description="Of no effect.")
    priority: int = Field(0, description="Of no effect.")


class TextsBody(EncoderBody):
    """Texts, or token ids as they are."""

    input: Annotated[
        str
        | Ids
        | Annotated[Texts, Field(min_length=1, max_length=MAX_TEXTS)]
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)],
        WrapValidator(_one_of(f"a text, token ids, or a list of 1 to {MAX_TEXTS} of either")),
    ]

    @property
    def texts(self) -> Sequence[str | list[int]]:
        """One text or several."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class EmbeddingBody(TextsBody):
    """What `/v1/embeddings` takes."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    prompt_name: Name | None = Field(None, description="A prompt of the model's own, put before each text.")


class ClassifyBody(TextsBody):
    """What `/classify` takes."""


class Document(Body):
    """A document in an object of its own."""

    text: str


class RerankBody(EncoderBody):
    """What `/rerank` takes."""

    unsupported = {"rank_fields": (), "max_chunks_per_doc": (), "max_tokens_per_doc": ()}
    query: str
    documents: Annotated[list[str | Document], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool = True

    @property
    def texts(self) -> list[str]:
        """The documents."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


def _field(name: str, text: str, **values: object) -> PydanticCustomError:
    return PydanticCustomError("value", text, {"field": name, **values})

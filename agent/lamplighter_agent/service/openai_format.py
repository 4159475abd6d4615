"""OpenAI's requests and answers: bytes to a typed request and back, no IO.

Fields that OpenAI defines and that mean nothing on one box (``user``, ``metadata``, …) are accepted and ignored. Fields
that change what the answer is and that this agent does not have (``tools``, ``suffix``, …) are refused by name, as is
every field that OpenAI does not define, except the engine's own options, which are taken as extensions.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from lamplighter_agent.engine.params import EarlyStopping, GenerationParams
from lamplighter_agent.errors import LamplighterError, RequestError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.service.message_codec import error_reply
from lamplighter_agent.service.worker_messages import Prompt

_UNKNOWN_FIELD = re.compile(r"unknown field `(.*?)`")
_AT_PATH = re.compile(r"at `\$\.?(\w+)")
# What a request may name as the engine does; its deadline is a duration here and a time there.
_ENGINE_OPTIONS: Final = frozenset(GenerationParams.__struct_fields__) - {"deadline_s"}

# Fields that mean something else there, or that only one kind of request has.
_DIFFERENT: Final = frozenset({"logprobs", "echo", "max_tokens"})

MAX_EMBEDDED_TEXTS: Final = 256

JsonObject = dict[str, object]
_T = TypeVar("_T")


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a streamed answer."""

    include_usage: bool = False


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message; only text is understood."""

    type: str
    text: str | None = None


class ApiMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | tuple[ContentPart, ...] | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True, rename={"schema_": "schema"}):
    """A JSON Schema that the answer fits; it always fits, ``strict`` or not."""

    schema_: JsonObject
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The kind of text that is wanted: ``text``, ``json_object`` or ``json_schema``."""

    type: str = "text"
    json_schema: JsonSchemaFormat | None = None

    def guided_json(self) -> JsonObject | None:
        """Return the schema that the answer must fit, or None for any text.

        Raises:
            RequestError: If the type is unknown or the schema missing.
        """
        match self.type:
            case "text":
                return None
            case "json_object":
                return {"type": "object"}
            case "json_schema" if self.json_schema is not None:
                return self.json_schema.schema_
            case "json_schema":
                raise RequestError("response_format 'json_schema' has no json_schema.schema", param="response_format")
            case kind:
                raise RequestError(
                    f"response_format {kind[:40]!r} is not known",
                    param="response_format",
                    hint="use text, json_object or json_schema",
                )


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of request have; ``user``, ``metadata`` and ``store`` have no effect here."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: JsonObject | None = None
    store: bool | None = None
    # Extensions: the engine's own options, by their names in GenerationParams.
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: tuple[str, ...] | None = None
    banned_words: tuple[str, ...] | None = None
    forced_prefix: str | None = None
    forced_words: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    cache_prompt: bool | None = None
    speculation: bool | None = None
    on_context_full: Literal["stop", "slide"] | None = None
    keep_tokens: int | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None

    @property
    def streams(self) -> bool:
        """True if the answer is to be sent as server-sent events."""
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        """True if the stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, **given_otherwise: int | bool | None) -> GenerationParams:
        """Return the generation options.

        Args:
            given_otherwise: Options whose fields differ between the kinds of request.

        Raises:
            RequestError: If one is out of range or not supported.
        """
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if name not in _DIFFERENT}
        given["logit_bias"] = _logit_bias(self.logit_bias)
        given["stop"] = (self.stop,) if isinstance(self.stop, str) else self.stop
        schema = None if self.response_format is None else self.response_format.guided_json()
        if schema is not None:
            if self.guided_json is not None:
                raise RequestError("response_format and guided_json exclude each other", param="guided_json")
            given["guided_json"] = schema
        given |= given_otherwise
        options = {name: given[name] for name in _ENGINE_OPTIONS if given.get(name) is not None}
        params = GenerationParams(**options)
        params.validate()
        return params


class ChatRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/v1/chat/completions``."""

    messages: tuple[ApiMessage, ...]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: tuple[JsonObject, ...] | None = None
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    functions: tuple[JsonObject, ...] | None = None
    modalities: tuple[str, ...] | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None

    def to_prompt(self) -> Prompt:
        """Return the conversation.

        Raises:
            RequestError: If it asks for something that this box does not have.
        """
        if self.tools or self.functions:
            raise RequestError("tools are not supported", param="tools" if self.tools else "functions")
        if self.modalities and set(self.modalities) != {"text"}:
            raise RequestError("the only modality is 'text'", param="modalities")
        return Prompt(messages=tuple(_message(message) for message in self.messages))

    def to_params(self) -> GenerationParams:
        """Return the generation options; ``max_completion_tokens`` is the newer name of ``max_tokens``.

        Raises:
            RequestError: If one is out of range.
        """
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        newer = self.max_completion_tokens
        return self.params(
            max_tokens=self.max_tokens if newer is None else newer,
            logprobs=self.top_logprobs or 0 if self.logprobs else None,
        )


class CompletionRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/v1/completions``: text, or token ids, to continue as they are."""

    prompt: str | tuple[str | int, ...]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: int | None = None

    def to_prompt(self) -> Prompt:
        """Return the text or the tokens.

        Raises:
            RequestError: If it asks for something that this box does not have.
        """
        if self.suffix:
            raise RequestError("suffix is not supported", param="suffix")
        if self.best_of not in {None, 1, self.n}:
            raise RequestError("best_of other than n is not supported", param="best_of", hint="use num_beams")
        if isinstance(self.prompt, str):
            return Prompt(text=self.prompt, raw=True)
        texts = [item for item in self.prompt if isinstance(item, str)]
        if len(texts) == len(self.prompt) == 1:
            return Prompt(text=texts[0], raw=True)
        if texts or not self.prompt:
            raise RequestError("prompt must be one text or the token ids of one", param="prompt")
        return Prompt(tokens=tuple(item for item in self.prompt if isinstance(item, int)))

    def to_params(self) -> GenerationParams:
        """Return the generation options.

        Raises:
            RequestError: If one is out of range.
        """
        return self.params(max_tokens=self.max_tokens, logprobs=self.logprobs, echo=self.echo)


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/v1/embeddings``: a text, a list of texts, the token ids of one, or a list of lists of them."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    def to_prompts(self) -> list[Prompt]:
        """Return each text.

        Raises:
            RequestError: If there is none or too many, kinds are mixed, or other dimensions are asked for.
        """
        if self.dimensions is not None:
            raise RequestError("dimensions cannot be chosen: the model decides", param="dimensions")
        items = [self.input] if isinstance(self.input, str) else self.input
        if not 1 <= len(items) <= MAX_EMBEDDED_TEXTS and not isinstance(items[0] if items else "", int):
            raise RequestError(f"input must have 1 to {MAX_EMBEDDED_TEXTS} texts", param="input")
        ids = tuple(item for item in items if isinstance(item, int))
        if ids:
            if len(ids) != len(items):
                raise RequestError("input mixes token ids and texts", param="input")
            return [Prompt(tokens=ids)]
        return [
            Prompt(text=item, raw=True) if isinstance(item, str) else Prompt(tokens=tuple(item))
            for item in items
            if not isinstance(item, int)
        ]


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/tokenize``: a text, or a conversation as the chat format renders it."""

    prompt: str | None = None
    messages: tuple[ApiMessage, ...] | None = None
    model: str | None = None

    def to_prompt(self) -> Prompt:
        """Return what to tokenize.

        Raises:
            RequestError: If it is not exactly one of the two.
        """
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give exactly one of 'prompt' and 'messages'", param="prompt")
        if self.messages is not None:
            return Prompt(messages=tuple(_message(message) for message in self.messages))
        return Prompt(text=self.prompt, raw=True)


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/detokenize``: token ids."""

    tokens: tuple[int, ...]
    model: str | None = None


def decode_body(body: bytes, kind: type[_T]) -> _T:
    """Read a request's body.

    Raises:
        RequestError: If it is not well-formed; ``param`` names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = str(error)
        found = _UNKNOWN_FIELD.search(text) or _AT_PATH.search(text)
        raise RequestError(f"the body cannot be read: {text}", param=found[1] if found else None) from error


def error_object(error: LamplighterError) -> tuple[int, JsonObject]:
    """Return the HTTP status and the body in OpenAI's shape for an error."""
    reply = error_reply(error, None)
    message = f"{reply.message} ({reply.hint})" if reply.hint else reply.message
    kinds = {404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}
    kind = kinds.get(reply.code, "invalid_request_error" if 400 <= reply.code < 500 else "server_error")
    return reply.code, {"error": {"message": message, "type": kind, "param": reply.param, "code": reply.reason}}


def _message(message: ApiMessage) -> ChatMessage:
    content = message.content
    if content is None:
        raise RequestError("a message has no content", param="messages")
    if not isinstance(content, str):
        for part in content:
            if part.type != "text" or part.text is None:
                raise RequestError(
                    f"a message has a part of type {part.type!r}; only text is understood", param="messages"
                )
        content = "".join(part.text or "" for part in content)
    match message.role:
        case "system" | "developer":
            return ChatMessage("system", content)
        case "user":
            return ChatMessage("user", content)
        case "assistant":
            return ChatMessage("assistant", content)
        case role:
            raise RequestError(
                f"a message has the role {role[:40]!r}", param="messages", hint="use system, user, assistant"
            )


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        return {int(token): value for token, value in (bias or {}).items()}
    except ValueError as error:
        raise RequestError("logit_bias must map token ids to numbers", param="logit_bias") from error

"""OpenAI's requests and answers: bytes to a typed request and back, no IO.

Fields that OpenAI defines and that mean nothing on one box (``user``, ``metadata``, …) are accepted and ignored. Fields
that change what the answer is and that this agent does not have (``tools``, ``suffix``, …) are refused by name, as is
every field that OpenAI does not define, except the engine's own options, which are taken as extensions.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from lamplighter_agent.engine.params import EarlyStopping, GenerationParams
from lamplighter_agent.errors import ContextOverflowError, LamplighterError, RequestError
from lamplighter_agent.service.json_faults import explain
from lamplighter_agent.service.message_codec import error_reply
from lamplighter_agent.service.openai_messages import NO_TOOLS, TOOLS_HINT, ApiMessage, conversation
from lamplighter_agent.service.worker_messages import Prompt

# What a request may name as the engine does; its deadline is a duration here and a time there.
_ENGINE_OPTIONS: Final = frozenset(GenerationParams.__struct_fields__) - {"deadline_s"}

# Fields that mean something else there, or that only one kind of request has.
_DIFFERENT: Final = frozenset({"logprobs", "echo", "max_tokens"})

MAX_EMBEDDED_TEXTS: Final = 256
_SEEDS: Final = 2**63

JsonObject = dict[str, object]
_T = TypeVar("_T")


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a streamed answer."""

    include_usage: bool = False


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
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
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
        if self.seed is not None and -_SEEDS <= self.seed < 0:
            given["seed"] = self.seed + _SEEDS  # OpenAI's are signed
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
    function_call: object = None
    modalities: tuple[str, ...] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: JsonObject | None = None

    def to_prompt(self) -> Prompt:
        """Return the conversation.

        Raises:
            RequestError: If it asks for something that this box does not have.
        """
        asked = {
            "tools": self.tools,
            "functions": self.functions,
            "tool_choice": _chosen(self.tool_choice),
            "function_call": _chosen(self.function_call),
        }
        for name, value in asked.items():
            if value:
                raise RequestError(NO_TOOLS, param=name, hint=TOOLS_HINT)
        if self.modalities and set(self.modalities) != {"text"}:
            raise RequestError("the only modality is 'text'", param="modalities")
        return Prompt(messages=conversation(self.messages))

    def to_params(self) -> GenerationParams:
        """Return the generation options; ``max_completion_tokens`` is the newer name of ``max_tokens``.

        Raises:
            RequestError: If one is out of range.
        """
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        newer = self.max_completion_tokens
        try:
            return self.params(
                max_tokens=self.max_tokens if newer is None else newer,
                logprobs=self.top_logprobs or 0 if self.logprobs else None,
            )
        except RequestError as error:
            names = {"logprobs": "top_logprobs"} | ({} if newer is None else {"max_tokens": "max_completion_tokens"})
            name = names.get(error.param or "")
            if name is None:
                raise
            raise RequestError(f"{name}: {error.message}", param=name, hint=error.hint) from error


class CompletionRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``/v1/completions``: text, or token ids, to continue as they are."""

    prompt: str | tuple[str | int | tuple[int, ...], ...]
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
        match self.prompt:
            case [str(text)]:
                return Prompt(text=text, raw=True)
            case [tuple(tokens)] if tokens:
                return Prompt(tokens=tokens)
        tokens = tuple(item for item in self.prompt if isinstance(item, int))
        if not tokens or len(tokens) != len(self.prompt):
            raise RequestError(
                "prompt must be one text or the token ids of one",
                param="prompt",
                hint="send more in requests of their own",
            )
        return Prompt(tokens=tokens)

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
            return Prompt(messages=conversation(self.messages))
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
        fault = explain(error, body)
        raise RequestError(f"the body cannot be read: {fault.text}", param=fault.param) from error


def error_object(error: LamplighterError) -> tuple[int, JsonObject]:
    """Return the HTTP status and the body in OpenAI's shape for an error.

    A prompt that does not fit has the status and the code that clients of OpenAI look for to shorten it.
    """
    reply = error_reply(error, None)
    if isinstance(error, ContextOverflowError):
        reply = msgspec.structs.replace(reply, code=400, reason="context_length_exceeded")
    message = f"{reply.message} ({reply.hint})" if reply.hint else reply.message
    kinds = {404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}
    kind = kinds.get(reply.code, "invalid_request_error" if 400 <= reply.code < 500 else "server_error")
    return reply.code, {"error": {"message": message, "type": kind, "param": reply.param, "code": reply.reason}}


def _chosen(choice: object) -> object:
    """Return who is to choose a tool; ``none`` and ``auto`` ask for nothing where there are no tools."""
    return None if choice in (None, "none", "auto") else choice


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        return {int(token): value for token, value in (bias or {}).items()}
    except ValueError as error:
        raise RequestError("logit_bias must map token ids to numbers", param="logit_bias") from error

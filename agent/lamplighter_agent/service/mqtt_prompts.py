"""Prompts on MQTT: they come by a connection of their own, so that a flood keeps no command waiting."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Final

from lamplighter_agent.config import AgentConfig
from lamplighter_agent.engine.events import TextDelta
from lamplighter_agent.errors import LamplighterError, RequestError
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.answer_memory import AnswerMemory
from lamplighter_agent.service.answers import Answer
from lamplighter_agent.service.delta_batch import DeltaBatches
from lamplighter_agent.service.message_codec import decode_cancel, decode_prompt, encode, encode_final, error_reply
from lamplighter_agent.service.messages import DeltaReply, FinalChoice, FinalReply, PromptMessage
from lamplighter_agent.service.mqtt import MqttConnection
from lamplighter_agent.service.mqtt_actions import Return
from lamplighter_agent.service.mqtt_replies import Replies, id_of
from lamplighter_agent.service.mqtt_types import Incoming, MqttHandlers, Subscription
from lamplighter_agent.service.ticket import GenerationRequest, Ticket
from lamplighter_agent.service.topics import Topics
from lamplighter_agent.service.worker_messages import Prompt

logger = logging.getLogger(__name__)

_LEFT_RETRY_S: Final = 1.0
_BUSY: Final = 429


class MqttPrompts:
    """Takes prompts and cancels, and answers.

    Args:
        config: The whole configuration.
        requests: Takes prompts.
        topics: Of this device.
        answers: The connection by which answers leave; prompts wait at the broker while too many do.
        changed: Called when the connection of prompts comes or goes.

    Attributes:
        connection: That by which prompts come.

    Raises:
        ConfigError: If the password or a TLS file cannot be read.
    """

    def __init__(
        self,
        config: AgentConfig,
        requests: RequestQueue,
        topics: Topics,
        answers: MqttConnection,
        changed: Callable[[], None],
    ) -> None:
        self._config = config
        self._requests = requests
        self._topics = topics
        self._tasks: set[asyncio.Task[None]] = set()
        self._memory = AnswerMemory()
        groups = {topics.group_prompt(group): topics.group_filter(group) for group in config.device.groups}
        self._handlers = {
            topics.device("cancel"): self._on_cancel,
            **dict.fromkeys([topics.device("prompt"), *groups], self._on_prompt),
        }
        subscriptions = [
            Subscription(topics.device("prompt"), 1, stored=False),
            Subscription(topics.device("cancel"), 0, stored=False),
            *(Subscription(shared, 1) for shared in groups.values()),
        ]
        handlers = MqttHandlers(
            will=lambda _number: None,
            connected=lambda _number: changed(),
            disconnected=lambda _reason: changed(),
            message=self.take,
            braked=lambda: answers.crowded,
        )
        self.connection = MqttConnection(
            config.mqtt, f"lamplighter-{config.device.id}-prompts", subscriptions, handlers
        )
        self._answers = answers
        self._replies = Replies(answers, topics)

    async def stop(self, timeout_s: float) -> None:
        """Disconnect; answers under way must be over before."""
        await self.connection.stop(timeout_s)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish_answers(self, timeout_s: float) -> None:
        """Wait until every answer that is over has been handed to the connection."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def take(self, message: Incoming) -> None:
        """Handle a message: answer it, refuse it, or ignore it."""
        handler = self._handlers.get(message.topic)
        try:
            if handler is None:
                self._leave(message.topic)
            else:
                handler(message)
        except LamplighterError as error:
            # A flood would fill the journal with what the counters tell.
            busy = isinstance(error, RequestError) and error.code == _BUSY
            level = logging.DEBUG if busy else logging.INFO
            logger.log(level, "refused a message on %s: %s", message.topic, error.message)
            self._replies.refuse(message, error)

    def _leave(self, topic: str) -> None:
        """End what an earlier configuration subscribed to: the broker keeps that with the session.

        Raises:
            RequestError: For a group's prompt, which another box should answer.
        """
        self.connection.unsubscribe(self._topics.filter_of(topic))
        group = self._topics.group_of(topic)
        if group is not None:
            raise RequestError(
                f"{self._topics.device_id} is in the group {group!r} no more",
                code=503,
                retry_after_s=_LEFT_RETRY_S,
                hint="send it again: another box of the group gets it",
            )

    def _on_prompt(self, message: Incoming) -> None:
        if message.retain:
            logger.warning("ignored a retained prompt on %s: prompts must not be retained", message.topic)
            return
        prompt = decode_prompt(message.payload, content_type=message.content_type)
        back = self._replies.way(message, prompt.reply_to, prompt.correlation)
        given_id = prompt.id or id_of(message)
        request = self._request(prompt, given_id, back, message.expiry_s)
        if given_id is None and self._memory.is_repeated(
            (back.topic.encode(), message.topic.encode(), message.payload), duplicate=message.duplicate
        ):
            logger.info("ignored a prompt that the broker delivered twice")
            return
        ticket = self._requests.submit(request)
        if ticket is None:
            self._answer_again(request.id, back)
            return
        task = asyncio.create_task(self._answer(ticket, back, stream=prompt.stream), name=f"mqtt-answer-{request.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answer_again(self, request_id: str, back: Return) -> None:
        """A known request came again: an answer that left by an earlier connection may be lost, and is sent again."""
        payload = self._memory.lost(back.topic, request_id, self._answers.connections)
        if payload is None:
            logger.info("ignored request %s: it is known already", request_id)
        else:
            self._replies.send(back, payload, qos=1)

    def _request(
        self, prompt: PromptMessage, given_id: str | None, back: Return, expiry_s: int | None
    ) -> GenerationRequest:
        deadlines = [
            float(value)
            for value in (prompt.deadline_s or self._config.requests.default_deadline_s, expiry_s)
            if value is not None
        ]
        if min(deadlines) <= 0:
            raise RequestError("the prompt expired before it arrived", code=408)
        messages = prompt.messages
        if prompt.prompt is not None and self._config.log.prompts:
            logger.info("prompt: %s", prompt.prompt)
        return GenerationRequest(
            id=given_id or uuid.uuid4().hex,
            sender=back.topic,
            client=self._topics.client_of(back.topic),
            prompt=Prompt(text=prompt.prompt, messages=messages, raw=prompt.raw),
            params=prompt.params(),
            model=prompt.model,
            deadline_s=min(deadlines),
            idempotent=given_id is not None,
        )

    async def _answer(self, ticket: Ticket, back: Return, *, stream: bool) -> None:
        request_id = ticket.request.id
        deltas = DeltaBatches(
            self._config.mqtt.delta_interval_s, lambda seq, index, text: self._delta(request_id, back, seq, index, text)
        )
        try:
            async for event in ticket:
                if isinstance(event, TextDelta):
                    if stream:
                        deltas.add(event.index, event.text)
                    continue
                for alternative in event.alternatives if stream else ():
                    deltas.add(alternative.index, alternative.tail)
                deltas.close()
                self._end(ticket, back, encode_final(self._final(event, request_id, back, deltas.sent)))
        except LamplighterError as error:
            deltas.close()
            self._end(ticket, back, encode(error_reply(error, request_id, back.correlation)))
        finally:
            deltas.close()
            ticket.cancel()

    def _end(self, ticket: Ticket, back: Return, payload: bytes) -> None:
        request = ticket.request
        if request.idempotent:
            connection = self._answers.connections if self._answers.connected else 0
            until_s = ticket.arrived_s + (request.deadline_s or self._config.requests.default_deadline_s)
            self._memory.keep(back.topic, request.id, payload, connection, until_s)
        self._replies.send(back, payload, qos=1)

    def _final(self, answer: Answer, request_id: str, back: Return, sent: int) -> FinalReply:
        return FinalReply(
            id=request_id,
            seq=sent,
            text=answer.text,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
            timings=answer.timings,
            model=answer.package,
            device=self._topics.device_id,
            logprobs=answer.alternatives[0].logprobs,
            choices=_choices(answer),
            correlation=back.correlation,
        )

    def _delta(self, request_id: str, back: Return, seq: int, index: int, text: str) -> None:
        delta = DeltaReply(id=request_id, seq=seq, index=index, text=text, correlation=back.correlation)
        self._replies.send(back, encode(delta), qos=0)

    def _on_cancel(self, message: Incoming) -> None:
        cancel = decode_cancel(message.payload)
        self._requests.cancel(cancel.id, message.response_topic or cancel.reply_to)


def _choices(answer: Answer) -> tuple[FinalChoice, ...] | None:
    """Return all answers where there are several, or beams."""
    if len(answer.alternatives) == 1 and answer.alternatives[0].score is None:
        return None
    return tuple(
        FinalChoice(
            index=one.index,
            text=one.text,
            finish_reason=one.finish_reason,
            generated_tokens=one.generated_tokens,
            score=one.score,
            logprobs=one.logprobs,
        )
        for one in answer.alternatives
    )

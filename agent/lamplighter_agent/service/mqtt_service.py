"""What the agent says and hears on MQTT: prompts and answers, cancel, commands, desired, status. No sockets here."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable
from typing import Final

import msgspec

import lamplighter_agent
from lamplighter_agent.config import AgentConfig
from lamplighter_agent.engine.events import TextDelta
from lamplighter_agent.errors import LamplighterError, RequestError
from lamplighter_agent.service.admission import GenerationRequest, RequestQueue, Ticket
from lamplighter_agent.service.answer_memory import AnswerMemory
from lamplighter_agent.service.answers import Answer
from lamplighter_agent.service.delta_batch import DeltaBatches
from lamplighter_agent.service.message_codec import (
    decode_cancel,
    decode_command,
    decode_desired,
    decode_from_device,
    decode_prompt,
    encode,
    encode_final,
    error_reply,
)
from lamplighter_agent.service.messages import (
    CommandMessage,
    DeltaReply,
    EventMessage,
    FinalChoice,
    FinalReply,
    PromptMessage,
    ReportedMessage,
    ResultReply,
    StatusMessage,
)
from lamplighter_agent.service.mqtt import MqttConnection
from lamplighter_agent.service.mqtt_actions import Actions, Envelope, Return
from lamplighter_agent.service.mqtt_types import Incoming, MqttHandlers, Outgoing, Subscription, Will
from lamplighter_agent.service.topics import Topics
from lamplighter_agent.service.worker_messages import Prompt

logger = logging.getLogger(__name__)

MAX_COMMANDS: Final = 16
_STOP_TIMEOUT_S: Final = 5.0
_BUSY: Final = 429


class MqttService:
    """The device on MQTT.

    Args:
        config: The whole configuration.
        requests: Takes prompts.
        actions: Takes everything else.
        boot: Starts of the agent so far.

    Raises:
        ConfigError: If the password or a TLS file cannot be read.
    """

    def __init__(self, config: AgentConfig, requests: RequestQueue, actions: Actions, boot: int) -> None:
        self._config = config
        self._requests = requests
        self._actions = actions
        self._boot = boot
        self._topics = Topics(config.mqtt.prefix, config.device.id)
        self._tasks: set[asyncio.Task[None]] = set()
        self._commands: asyncio.Queue[tuple[CommandMessage, Return]] = asyncio.Queue(MAX_COMMANDS)
        self._status = b""
        self._memory = AnswerMemory()
        self._handlers = {
            self._topics.device("prompt"): self._on_prompt,
            self._topics.device("cancel"): self._on_cancel,
            self._topics.device("command"): self._on_command,
            self._topics.device("desired"): self._on_desired,
            self._topics.device("status"): self._on_own_status,
        }
        subscriptions = [
            Subscription(self._topics.device("prompt"), 1, stored=False),
            Subscription(self._topics.device("cancel"), 0, stored=False),
            Subscription(self._topics.device("command"), 1, stored=False),
            Subscription(self._topics.device("desired"), 1),
            Subscription(self._topics.device("status"), 1, stored=False),
        ]
        for group in config.device.groups:
            subscriptions.append(Subscription(self._topics.group_filter(group), 1))
            self._handlers[self._topics.group_prompt(group)] = self._on_prompt
        handlers = MqttHandlers(self._will, self._on_connected, self._on_disconnected, self._on_message)
        self.connection = MqttConnection(config.mqtt, f"lamplighter-{config.device.id}", subscriptions, handlers)

    @property
    def is_connected(self) -> bool:
        """True while messages can leave the device."""
        return self.connection.connected

    def start(self) -> None:
        """Begin to connect."""
        self._spawn(self._run_commands(), "mqtt-commands")
        self.connection.start()

    async def stop(self) -> None:
        """Say goodbye and disconnect; answers under way must be over before."""
        self._publish_status("offline", reason="shutdown")
        await self.connection.stop(_STOP_TIMEOUT_S)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish_answers(self, timeout_s: float) -> None:
        """Wait until every answer that is over has been handed to the connection."""
        answers = [task for task in self._tasks if task.get_name().startswith("mqtt-answer")]
        if answers:
            await asyncio.wait(answers, timeout=timeout_s)

    def publish_status(self) -> None:
        """Publish that the device is online, with the package that is active now."""
        self._publish_status("online", self._actions.concern())

    def publish_reported(self, report: ReportedMessage) -> None:
        """Publish the state of the update, retained."""
        self._publish("reported", encode(report), qos=1, retain=True)

    def publish_event(self, name: str, message: str) -> None:
        """Publish that something happened."""
        self._publish("event", encode(EventMessage(name=name, message=message, time_unix_s=time.time())), qos=1)

    def publish_telemetry(self, sample: bytes, *, qos: int = 0) -> bool:
        """Publish a sample; False if it was not taken."""
        return self._publish("telemetry", sample, qos=qos)

    def _publish(self, leaf: str, payload: bytes, *, qos: int, retain: bool = False) -> bool:
        topic = f"{self._topics.prefix}/device/{self._topics.device_id}/{leaf}"
        return self.connection.publish(Outgoing(topic=topic, payload=payload, qos=qos, retain=retain))

    def _publish_status(self, state: str, reason: str | None = None) -> None:
        if not self.connection.connected:
            return  # the birth message of the next connection will say it
        self._status = encode(
            StatusMessage(
                state="online" if state == "online" else "offline",
                boot=self._boot,
                connection=self.connection.connections,
                agent=lamplighter_agent.__version__,
                package=self._actions.package(),
                groups=self._config.device.groups,
                reason=reason,
            )
        )
        self._publish("status", self._status, qos=1, retain=True)

    def _will(self, connection: int) -> Will:
        status = StatusMessage(
            state="offline",
            boot=self._boot,
            connection=connection,
            agent=lamplighter_agent.__version__,
            groups=self._config.device.groups,
            reason="connection_lost",
        )
        return Will(self._topics.device("status"), encode(status))

    def _on_connected(self, _connection: int) -> None:
        self.publish_status()
        self._actions.connected()

    def _on_disconnected(self, reason: str) -> None:
        logger.debug("MQTT is down: %s", reason)

    def _on_message(self, message: Incoming) -> None:
        handler = self._handlers.get(message.topic)
        if handler is None:
            return
        try:
            handler(message)
        except LamplighterError as error:
            logger.info("refused a message on %s: %s", message.topic, error.message)
            self._refuse(message, error)

    def _on_prompt(self, message: Incoming) -> None:
        if message.retain:
            logger.warning("ignored a retained prompt on %s: prompts must not be retained", message.topic)
            return
        prompt = decode_prompt(message.payload, content_type=message.content_type)
        back = self._return(message, prompt.reply_to, prompt.correlation)
        given_id = prompt.id or (message.correlation.hex()[:128] if message.correlation else None)
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
        self._spawn(self._answer(ticket, back, stream=prompt.stream), f"mqtt-answer-{request.id}")

    def _answer_again(self, request_id: str, back: Return) -> None:
        """A known request came again: an answer that left by an earlier connection may be lost, and is sent again."""
        payload = self._memory.lost(back.topic, request_id, self.connection.connections)
        if payload is None:
            logger.info("ignored request %s: it is known already", request_id)
        else:
            self._reply(back, payload, qos=1)

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
            connection = self.connection.connections if self.connection.connected else 0
            until_s = ticket.arrived_s + (request.deadline_s or self._config.requests.default_deadline_s)
            self._memory.keep(back.topic, request.id, payload, connection, until_s)
        self._reply(back, payload, qos=1)

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
        self._reply(back, encode(delta), qos=0)

    def _reply(self, back: Return, payload: bytes, *, qos: int) -> None:
        self.connection.publish(Outgoing(topic=back.topic, payload=payload, qos=qos, correlation=back.correlation_data))

    def _return(self, message: Incoming, reply_to: str | None, correlation: str | None) -> Return:
        """Return where the answer goes; an MQTT property wins over its JSON field.

        Raises:
            RequestError: If answers may not be sent there.
        """
        topic = message.response_topic or reply_to or self._topics.device("reply")
        return Return(self._topics.check_reply(topic), message.correlation, correlation)

    def _refuse(self, message: Incoming, error: LamplighterError) -> None:
        try:
            envelope = msgspec.json.decode(message.payload, type=Envelope)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            envelope = Envelope()
        request_id = envelope.id or (message.correlation.hex() if message.correlation else None)
        try:
            back = self._return(message, envelope.reply_to, envelope.correlation)
        except RequestError:
            back = Return(self._topics.device("reply"), message.correlation, envelope.correlation)
        busy = isinstance(error, RequestError) and error.code == _BUSY and self.connection.crowded
        self._reply(back, encode(error_reply(error, request_id, back.correlation)), qos=0 if busy else 1)

    def _on_cancel(self, message: Incoming) -> None:
        cancel = decode_cancel(message.payload)
        self._requests.cancel(cancel.id, message.response_topic or cancel.reply_to)

    def _on_command(self, message: Incoming) -> None:
        if message.retain:
            logger.warning("ignored a retained command: it would run again at every connection")
            return
        command = decode_command(message.payload)
        back = self._return(message, command.reply_to, None)
        try:
            self._commands.put_nowait((command, back))
        except asyncio.QueueFull as error:
            raise RequestError(f"{MAX_COMMANDS} commands are waiting already", code=429, retry_after_s=1.0) from error

    async def _run_commands(self) -> None:
        while True:
            command, back = await self._commands.get()
            try:
                done = await self._actions.command(command)
                payload = encode(ResultReply(id=command.id, message=done.message, data=done.data))
            except LamplighterError as error:
                payload = encode(error_reply(error, command.id))
            self._reply(back, payload, qos=1)

    def _on_desired(self, message: Incoming) -> None:
        if not message.payload:
            return  # the retained wish was cleared: what runs goes on running
        try:
            self._actions.desired(decode_desired(message.payload))
        except RequestError as error:
            logger.warning("ignored what is desired: %s", error.message)
            self.publish_event("desired_invalid", error.message)

    def _on_own_status(self, message: Incoming) -> None:
        """Repair the retained status when a will that came late has overwritten it."""
        if not message.payload or message.payload == self._status:
            return
        try:
            status = decode_from_device(message.payload, StatusMessage)
        except RequestError:
            status = None
        if self._status and (status is None or status.state == "offline"):
            self.publish_status()

    def _spawn(self, work: Awaitable[None], name: str) -> None:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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

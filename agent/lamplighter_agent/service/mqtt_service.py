"""The device on MQTT: status, what is desired, commands, events; ``mqtt_prompts`` answers. No sockets here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Final

import lamplighter_agent
from lamplighter_agent.config import AgentConfig
from lamplighter_agent.errors import EngineError, LamplighterError, RequestError
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.message_codec import (
    decode_command,
    decode_desired,
    decode_from_device,
    encode,
    error_reply,
)
from lamplighter_agent.service.messages import CommandMessage, EventMessage, ReportedMessage, ResultReply, StatusMessage
from lamplighter_agent.service.mqtt import MqttConnection
from lamplighter_agent.service.mqtt_actions import Actions, Return
from lamplighter_agent.service.mqtt_prompts import MqttPrompts
from lamplighter_agent.service.mqtt_replies import Replies
from lamplighter_agent.service.mqtt_types import Incoming, MqttHandlers, Outgoing, Subscription, Will
from lamplighter_agent.service.topics import Topics

logger = logging.getLogger(__name__)

MAX_COMMANDS: Final = 16
_STOP_TIMEOUT_S: Final = 5.0
NO_PROMPTS: Final = "no_prompts"
_PROMPTS_GRACE_S: Final = 5.0


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
        self._actions = actions
        self._boot = boot
        self._topics = Topics(config.mqtt.prefix, config.device.id)
        self._commands: asyncio.Queue[tuple[CommandMessage, Return]] = asyncio.Queue(MAX_COMMANDS)
        self._command_task: asyncio.Task[None] | None = None
        self._status = b""
        self._born = 0
        self._grace: asyncio.TimerHandle | None = None
        self._handlers = {
            self._topics.device("command"): self._on_command,
            self._topics.device("desired"): self._on_desired,
            self._topics.device("status"): self._on_own_status,
        }
        subscriptions = [
            Subscription(self._topics.device("command"), 1, stored=False),
            Subscription(self._topics.device("desired"), 1),
            Subscription(self._topics.device("status"), 1, stored=False),
        ]
        handlers = MqttHandlers(self._will, self._on_connected, self._on_disconnected, self._on_message)
        self.connection = MqttConnection(config.mqtt, f"lamplighter-{config.device.id}", subscriptions, handlers)
        self.prompts = MqttPrompts(config, requests, self._topics, self.connection, self._show_presence)
        self._replies = Replies(self.connection, self._topics, urgent=True)

    @property
    def is_connected(self) -> bool:
        """True while messages can leave the device."""
        return self.connection.connected

    @property
    def connections(self) -> int:
        """Connections of the device to the broker since the agent's start."""
        return self.connection.connections

    @property
    def dropped(self) -> int:
        """Messages that found no room, or no connection."""
        return self.connection.dropped + self.prompts.connection.dropped

    @property
    def silent_s(self) -> float:
        """How long a network thread has given no sign of life."""
        return max(self.connection.silent_s, self.prompts.connection.silent_s)

    def start(self) -> None:
        """Begin to connect."""
        self._command_task = asyncio.create_task(self._run_commands(), name="mqtt-commands")
        self.connection.start()

    async def stop(self) -> None:
        """Say goodbye and disconnect; answers under way must be over before."""
        await self.prompts.stop(_STOP_TIMEOUT_S)
        self._cancel_grace()
        self._publish_status("offline", reason="shutdown")
        await self.connection.stop(_STOP_TIMEOUT_S)
        if self._command_task is not None:
            self._command_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._command_task

    def publish_status(self) -> None:
        """Publish that the device is online, with the package that is active now."""
        if self._born == self.connection.connections:  # otherwise the birth message will say it
            missing = None if self.prompts.connection.connected else NO_PROMPTS
            self._publish_status("online", self._actions.concern() or missing)

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
        return self.connection.publish(Outgoing(topic=topic, payload=payload, qos=qos, retain=retain, urgent=True))

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
        self.prompts.connection.start()  # not before the first one: what is wrong with the broker is said once
        self._show_presence()

    def _on_disconnected(self, reason: str) -> None:
        logger.debug("MQTT is down: %s", reason)
        self._show_presence()

    def _show_presence(self) -> None:
        """Publish the birth message once prompts can be taken too, or after a while, that they cannot."""
        if not self.connection.connected:
            self._cancel_grace()
        elif self.prompts.connection.connected:
            self._cancel_grace()
            self._say_online()
        elif self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(_PROMPTS_GRACE_S, self._say_online)

    def _cancel_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _say_online(self) -> None:
        self._grace = None
        is_birth = self._born != self.connection.connections
        self._born = self.connection.connections
        self.publish_status()
        if is_birth:
            self._actions.connected()

    def _on_message(self, message: Incoming) -> None:
        handler = self._handlers.get(message.topic)
        if handler is None:
            self._on_stray(message)
            return
        try:
            handler(message)
        except LamplighterError as error:
            logger.info("refused a message on %s: %s", message.topic, error.message)
            self._replies.refuse(message, error)

    def _on_stray(self, message: Incoming) -> None:
        """End a subscription of an agent that had one connection for everything; its session outlives it."""
        self.connection.unsubscribe(self._topics.filter_of(message.topic))
        if self._topics.group_of(message.topic) is not None:
            self.prompts.take(message)  # the broker chose this connection, and asks no other one

    def _on_command(self, message: Incoming) -> None:
        if message.retain:
            logger.warning("ignored a retained command: it would run again at every connection")
            return
        command = decode_command(message.payload)
        back = self._replies.way(message, command.reply_to, None)
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
            except Exception as error:  # a boundary: the next command must find somebody who carries it out
                logger.exception("the command %s failed", command.command)
                failure = EngineError(f"the command failed in the agent: {type(error).__name__}")
                payload = encode(error_reply(failure, command.id))
            self._replies.send(back, payload)

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

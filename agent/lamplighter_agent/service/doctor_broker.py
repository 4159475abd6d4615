"""The doctor's look at the broker: does it let this device in, and what to do when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

from lamplighter_agent.config import AgentConfig
from lamplighter_agent.service.findings import Finding, failure, ok, warning
from lamplighter_agent.service.mqtt import MqttConnection
from lamplighter_agent.service.mqtt_types import Incoming, MqttHandlers, Subscription, Will
from lamplighter_agent.service.topics import Topics

_TIMEOUT_S: Final = 8.0
_POLL_S: Final = 0.05
_USER: Final = "check mqtt.username and the password in mqtt.password_file, and that the broker knows this user"
_AUTHORITY: Final = "mqtt.tls.ca_file must be the authority that signed the broker's certificate"
_NAME: Final = "set mqtt.host to a name that stands in the broker's certificate, or give the broker one with this name"
_ADVICE: Final = {
    "Not authorized": _USER,
    "Bad user name or password": _USER,
    "not known": "check mqtt.host, and the name server of this box",
    "name resolution": "check mqtt.host, and the name server of this box",
    "No address": "check mqtt.host, and the name server of this box",
    "refused": "is the broker running, and are mqtt.host and mqtt.port right? A firewall may refuse as well",
    "unreachable": "check mqtt.host, and the route and the link of this box",
    "timed out": "check mqtt.host and mqtt.port, the route, and firewalls on the way",
    "no answer": "check mqtt.host and mqtt.port, the route, and firewalls on the way",
    "mismatch": _NAME,
    "self-signed": _AUTHORITY,
    "self signed": _AUTHORITY,
    "issuer": _AUTHORITY,
    "has expired": "renew the broker's certificate; if it is valid, this box's clock is wrong",
    "not yet valid": "set this box's clock; if it is right, the broker's certificate is not",
    "WRONG_VERSION": "this port does not speak TLS: leave mqtt.tls out, or set mqtt.port to the one that does",
    "reset by peer": "does this port speak TLS? If it does not, leave mqtt.tls out; if it does, set it",
    "without an answer": (
        "a port for TLS needs mqtt.tls; a broker that asks for certificates needs a cert_file and key_file that its "
        "authority signed, and that have not expired"
    ),
}
_OTHERWISE: Final = "check mqtt.host, port, username, tls, and the broker's log"


def examine_broker(config: AgentConfig) -> Iterator[Finding]:
    """Yield whether the broker lets this device in.

    Raises:
        ConfigError: If the password or a TLS file cannot be read.
    """
    mqtt = config.mqtt
    where = f"{mqtt.host}:{mqtt.port}"
    if not mqtt.enabled:
        yield ok("broker", "mqtt.enabled is false")
        return
    fault = asyncio.run(_try_broker(config))
    if fault is None:
        yield ok("broker", f"{where} lets {config.device.id} in{' over TLS' if mqtt.tls else ''}")
    else:
        yield failure("broker", f"{where}: {fault}", advice_for(fault))
    if mqtt.tls is None and mqtt.host not in {"127.0.0.1", "localhost", "::1"}:
        yield warning("broker", f"{where} is reached without TLS", "set mqtt.tls: others can read along")


def advice_for(fault: str) -> str:
    """Return what to do about a fault that the connection or the broker named."""
    return next((advice for sign, advice in _ADVICE.items() if sign in fault), _OTHERWISE)


async def _try_broker(config: AgentConfig) -> str | None:
    """Connect as a client of another id; return None, or why it does not work."""
    topics = Topics(config.mqtt.prefix, config.device.id)
    up = asyncio.Event()

    def ignore(_message: Incoming) -> None:
        """Retained messages are not what is looked for."""

    handlers = MqttHandlers(
        will=lambda _number: Will(topics.device("event"), b"{}"),
        connected=lambda _number: up.set(),
        disconnected=lambda _reason: None,
        message=ignore,
    )
    subscriptions = [Subscription(topics.device("desired"), 0)]
    connection = MqttConnection(config.mqtt, f"lamplighter-doctor-{config.device.id}", subscriptions, handlers)
    connection.start()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            while not up.is_set() and not connection.failure:  # noqa: ASYNC110 (the network thread has no event for it)
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        return f"no answer within {_TIMEOUT_S:g} s"
    finally:
        await connection.stop(1.0)
    return None if up.is_set() else connection.failure

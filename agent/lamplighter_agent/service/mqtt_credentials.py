"""Secrets for the broker: the password file and the TLS context."""

from __future__ import annotations

import ssl

from lamplighter_agent.config import MqttConfig
from lamplighter_agent.errors import ConfigError


def read_password(config: MqttConfig) -> str | None:
    """Return the password without its line end, or None when no file is configured.

    Raises:
        ConfigError: If the file cannot be read.
    """
    if config.password_file is None:
        return None
    try:
        return config.password_file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"mqtt.password_file {config.password_file} cannot be read: {error}") from error


def tls_context(config: MqttConfig) -> ssl.SSLContext | None:
    """Return the context for TLS to the broker, or None when it is not configured.

    Raises:
        ConfigError: If a certificate or key cannot be loaded.
    """
    if config.tls is None:
        return None
    try:
        context = ssl.create_default_context(cafile=config.tls.ca_file)
        if config.tls.cert_file is not None:
            context.load_cert_chain(config.tls.cert_file, config.tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"mqtt.tls: the certificates cannot be loaded: {error}") from error
    return context

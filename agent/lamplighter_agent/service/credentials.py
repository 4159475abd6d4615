"""Secrets: where they lie, and the TLS context for the broker.

systemd hands secrets to a unit as files in a folder of their own (``LoadCredential``), whose place it tells in the
environment. A relative path in the configuration names a file there, so that the same configuration works whatever
the unit is called; the unit loads a whole folder under the name ``lamplighter``, which systemd turns into a prefix.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Final

from lamplighter_agent.config import LocalApiConfig, MqttConfig
from lamplighter_agent.errors import ConfigError

FOLDER_VARIABLE: Final = "CREDENTIALS_DIRECTORY"
_SOURCE: Final = Path("/etc/lamplighter/credentials")
_PREFIX: Final = "lamplighter_"


def secret_path(path: Path) -> Path:
    """Return where a secret lies: a relative path is looked for among the unit's credentials first."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if path.is_absolute():
        return path
    if not folder:  # by hand, as with doctor: where systemd takes them from, or just here
        source = _SOURCE / path
        return source if source.exists() else path
    for candidate in (Path(folder) / f"{_PREFIX}{path}", Path(folder) / path):
        if candidate.exists():
            return candidate
    return Path(folder) / f"{_PREFIX}{path}"


def read_secret(path: Path, setting: str) -> str:
    """Return a secret without its line end.

    Args:
        path: Value of the setting.
        setting: Its name, for the error.

    Raises:
        ConfigError: If the file cannot be read.
    """
    place = secret_path(path)
    try:
        return place.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{setting} {place} cannot be read: {error}",
            hint="under systemd, put it into /etc/lamplighter/credentials and name it without a folder",
        ) from error


def read_password(config: MqttConfig) -> str | None:
    """Return the password, or None when no file is configured.

    Raises:
        ConfigError: If the file cannot be read.
    """
    return None if config.password_file is None else read_secret(config.password_file, "mqtt.password_file")


def read_token(config: LocalApiConfig) -> str:
    """Return what TCP clients must show.

    Raises:
        ConfigError: If there is no file for it, or the file cannot be read or is empty.
    """
    if config.token_file is None:
        raise ConfigError(
            "local_api.tcp_port needs local_api.token_file", hint="write a long random word into a file of mode 0600"
        )
    token = read_secret(config.token_file, "local_api.token_file")
    if not token:
        raise ConfigError(f"local_api.token_file {config.token_file} is empty")
    return token


def tls_context(config: MqttConfig) -> ssl.SSLContext | None:
    """Return the context for TLS to the broker, or None when it is not configured.

    Raises:
        ConfigError: If a certificate or key cannot be loaded.
    """
    tls = config.tls
    if tls is None:
        return None
    if (tls.cert_file is None) != (tls.key_file is None):
        raise ConfigError("mqtt.tls: cert_file and key_file go together")
    try:
        context = ssl.create_default_context(cafile=None if tls.ca_file is None else secret_path(tls.ca_file))
        if tls.cert_file is not None and tls.key_file is not None:
            context.load_cert_chain(secret_path(tls.cert_file), secret_path(tls.key_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"mqtt.tls: the certificates cannot be loaded: {error}",
            hint="its three files must be PEM that the agent may read, and the key the certificate's own",
        ) from error
    return context

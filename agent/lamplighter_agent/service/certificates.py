"""Until when a certificate is valid: as much of X.509 as that takes, because the agent brings no crypto library."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from lamplighter_agent.errors import ConfigError

_END: Final = "-----END CERTIFICATE-----"
_RENEW: Final = "put the PEM file that the authority gave out in its place"
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_EXPLICIT_VERSION: Final = 0xA0
_SEQUENCE: Final = 0x30
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18


def valid_until(path: Path) -> datetime:
    """Return when the first of a PEM file's certificates expires (RFC 5280, 4.1: ``tbsCertificate.validity``).

    Raises:
        ConfigError: If the file cannot be read or holds no certificate.
    """
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}",
            hint="put the certificate there; under systemd into /etc/lamplighter/credentials, named without a folder",
        ) from error
    begin = text.find(_BEGIN)
    end = text.find(_END, begin)
    if begin < 0 or end < 0:
        raise ConfigError(f"{path}: holds no PEM certificate", hint=_RENEW)
    try:
        der = ssl.PEM_cert_to_DER_cert(text[begin : end + len(_END)])
        return _expiry(der)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{path}: is not a certificate: {error}", hint=_RENEW) from error


def _expiry(der: bytes) -> datetime:
    _, certificate, _ = _element(der, 0)
    _, body, _ = _element(certificate, 0)
    offset = 0
    if body[0] == _EXPLICIT_VERSION:
        _, _, offset = _element(body, 0)
    for _ in range(3):  # serial number, signature algorithm, issuer
        _, _, offset = _element(body, offset)
    tag, validity, _ = _element(body, offset)
    if tag != _SEQUENCE:
        raise ValueError("no validity where it should be")
    _, _, offset = _element(validity, 0)
    tag, value, _ = _element(validity, offset)
    text = value.decode("ascii")
    if tag == _UTC_TIME:
        return datetime.strptime(text, "%y%m%d%H%M%SZ").replace(tzinfo=UTC)
    if tag == _GENERALIZED_TIME:
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    raise ValueError(f"a time of an unknown kind {tag}")


def _element(data: bytes, offset: int) -> tuple[int, bytes, int]:
    """Return tag and content of the DER element at ``offset``, and the offset behind it."""
    tag, length, begin = data[offset], data[offset + 1], offset + 2
    if length & 0x80:
        count = length & 0x7F
        length = int.from_bytes(data[begin : begin + count])
        begin += count
    end = begin + length
    if end > len(data):
        raise ValueError("an element is longer than what holds it")
    return tag, data[begin:end], end

"""What a server may be told, checked once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.errors import SettingsError

MAX_CHOICES: Final = 256  # prompts times n of one request
MAX_TEXTS: Final = 2048  # of one request to an encoder


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server listens and what it lets in.

    Attributes:
        host: address to listen at; only a loopback address may do without a key.
        port: 0 takes a free one.
        api_keys: a request must bring one of them; none asks for none.
        allow_hosts: names, beside IP addresses, localhost and `host`, that a request may call the server by; `*` any.
        allow_origins: web origins whose pages may ask, beside the server's own.
        max_body_bytes: of a request.
        queue: most requests that may wait for their first token.
        queue_tokens: most tokens of their prompts together.
        timeout_s: after so long an answer ends where it is.
        drain_s: how long running answers may go on once the server was told to end.
        slow_reader_s: how long a client may leave what it was sent unread.
        dollars_per_hour: what the machine costs, for the metrics; None tells no cost.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    queue: int = 256
    queue_tokens: int = 1 << 18
    timeout_s: float = 600.0
    drain_s: float = 30.0
    slow_reader_s: float = 30.0
    dollars_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "queue", "queue_tokens", "timeout_s", "slow_reader_s"):
            value = getattr(self, name)
            if not value > 0:
                raise SettingsError(f"{name}: got {value}, expected more than 0")
        if not self.drain_s >= 0:
            raise SettingsError(f"drain_s: got {self.drain_s}, expected at least 0")
        if not 0 <= self.port < 1 << 16:
            raise SettingsError(f"port: got {self.port}, expected 0 to 65535")
        if not self.api_keys and not is_loopback(self.host):
            raise SettingsError(
                f"host: {self.host} can be reached from other machines, and there is no API key; give --api-key-file "
                "or OPTIMIZE_API_KEYS, or listen at 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_api_keys(file: Path | None, variable: str = "") -> tuple[str, ...]:
    """Return the keys in a file, one a line (# begins a remark), and in a variable, between commas.

    Raises:
        SettingsError: the file cannot be read or holds none.
    """
    keys = [key.strip() for key in variable.split(",") if key.strip()]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{file}: cannot be read ({error}); expected API keys, one a line") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise SettingsError(f"{file}: holds no API key, expected one a line")
        keys += found
    return tuple(keys)

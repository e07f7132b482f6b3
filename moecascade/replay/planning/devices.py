"""Devices: what a data sheet says. Rates are of dense matrices, links one way."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from moecascade.core.settings import from_mapping
from moecascade.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Device:
    """One card, or one socket.

    Attributes:
        name: Its name here.
        memory_gb: Memory, 10^9 bytes.
        bandwidth_gbps: What can be read of it, 10^9 bytes a second.
        bf16_tflops: 10^12 operations a second on dense matrices.
        fp8_tflops: Likewise in 8 bits, None where the device has no such units.
        link_gbps: To another one, 10^9 bytes a second one way.
        source: Where these are from.
        cpu: Whether it is a processor.
    """

    name: str
    memory_gb: float
    bandwidth_gbps: float
    bf16_tflops: float
    link_gbps: float
    source: str
    fp8_tflops: float | None = None
    cpu: bool = False


@cache
def _known() -> tuple[dict[str, Device], dict[str, str]]:
    """Return the devices that come with this package, and their other names."""
    text = (resources.files(__package__) / "devices.json").read_text(encoding="utf-8")
    found, aliases = {}, {}
    for name, values in json.loads(text).items():
        for alias in (name, *values.pop("aliases", ())):
            aliases[_plain(alias)] = name
        found[name] = _device({"name": name, **values}, name)
    return found, aliases


def names() -> tuple[str, ...]:
    """Return the names of the devices that are known."""
    return tuple(_known()[0])


def find(name: str) -> Device:
    """Return a device by its name, by what its driver calls it, or from a JSON file.

    Raises:
        ConfigError: An unknown device, or a file that describes none.
    """
    found, aliases = _known()
    if _plain(name) in aliases:
        return found[aliases[_plain(name)]]
    if name.endswith(".json"):
        try:
            values = json.loads(Path(name).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"device {name!r}: cannot be read ({error})") from None
        return _device({"name": Path(name).stem, "source": name, **values}, name)
    raise ConfigError(
        f"unknown device {name!r}{nearest(name, found)}; known: {', '.join(found)}; or a JSON file "
        f"with {', '.join(field.name for field in fields(Device))}"
    )


def _device(values: dict[str, Any], where: str) -> Device:
    given = {name: value for name, value in values.items() if value is not None}
    device = from_mapping(Device, given, f"device {where!r}")
    for name in ("memory_gb", "bandwidth_gbps", "bf16_tflops", "link_gbps", "fp8_tflops"):
        value = getattr(device, name)
        if value is not None and not value > 0:
            raise ConfigError(f"device {where!r}: {name} must be above 0, got {value}")
    return device


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())

"""Starting and stopping instances: one verb each, whatever the machines are."""

from __future__ import annotations

from typing import Protocol

from polyserve.core.types import InstanceId


class LaunchError(Exception):
    """An instance could not be started; the message says why in one line."""


class Launcher(Protocol):
    """Starts instances under names that the brain gives, and stops them."""

    async def start(self, instance: InstanceId) -> str:
        """The URL of a new instance that answers; raises `LaunchError`."""
        ...

    async def stop(self, instance: InstanceId) -> None:
        """End an instance, also one that is still starting; does nothing when there is none of that name."""
        ...

    async def close(self) -> None:
        """End all of them."""
        ...

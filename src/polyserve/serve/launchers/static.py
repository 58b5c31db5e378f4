"""No launcher: the fleet is what the config says."""

from __future__ import annotations

from polyserve.core.types import InstanceId
from polyserve.serve.launchers import LaunchError


class StaticLauncher:
    """Starts nothing, and leaves alone what it did not start."""

    async def start(self, instance: InstanceId) -> str:
        raise LaunchError(f"instance {instance}: there is no launcher; the config key `launcher` names one")

    async def stop(self, instance: InstanceId) -> None:
        pass

    async def close(self) -> None:
        pass

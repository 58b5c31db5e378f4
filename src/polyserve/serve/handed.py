"""What a gateway process is handed by whoever started it: sockets that listen already, and a line to its supervisor.

Sockets come from `polyserve serve --supervise` or from systemd (`LISTEN_FDS`, sd_listen_fds(3)). Over the line a
process says that it is ready and hands its sockets up, so that the supervisor has them for the next one, and hears that
it is to retire. A supervisor that dies is heard too: the line ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence

from polyserve.serve.plan import Address

SOCKETS = "POLYSERVE_SOCKETS"  # file descriptors of sockets that listen
CONTROL = "POLYSERVE_CONTROL"  # file descriptor of the line to the supervisor
READY, RETIRE = b"ready\n", b"retire\n"
MOST_SOCKETS = 16
_FIRST_OF_SYSTEMD = 3


class Sockets:
    """Sockets that were handed down, each to be taken once."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._left = list(sockets)

    @classmethod
    def from_environment(cls) -> Sockets:
        """Those that the environment names; processes that we start do not get them too."""
        given = os.environ.pop(SOCKETS, "")
        numbers = [int(one) for one in given.split(",") if one]
        # systemd's are for the process that it started, not for that one's children.
        if os.environ.pop("LISTEN_PID", "") == str(os.getpid()):
            count = int(os.environ.pop("LISTEN_FDS", "0"))
            numbers += range(_FIRST_OF_SYSTEMD, _FIRST_OF_SYSTEMD + count)
            os.environ.pop("LISTEN_FDNAMES", None)
        for number in numbers:
            os.set_inheritable(number, False)
        return cls([socket.socket(fileno=number) for number in numbers])

    def take(self, address: Address) -> socket.socket | None:
        """The socket that listens there, if it was handed down."""
        for one in self._left:
            port = one.getsockname()[1] if one.family in (socket.AF_INET, socket.AF_INET6) else None
            if port is not None and address.port in (0, port):
                self._left.remove(one)
                return one
        return None

    def all(self) -> list[socket.socket]:
        """Take all that are left."""
        taken, self._left = self._left, []
        return taken

    def drop_rest(self) -> list[str]:
        """Let go of those that nobody took; where they listened."""
        names = [str(one.getsockname()) for one in self._left]
        for one in self._left:
            one.close()
        self._left.clear()
        return names


class Line:
    """A process's line to its supervisor."""

    def __init__(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control

    @classmethod
    def from_environment(cls) -> Line | None:
        number = os.environ.pop(CONTROL, "")
        if not number:
            return None
        os.set_inheritable(int(number), False)
        return cls(socket.socket(fileno=int(number)))

    def ready(self, sockets: Sequence[socket.socket]) -> None:
        """Say that this process serves, and hand its sockets up."""
        with contextlib.suppress(OSError):  # a supervisor that has gone is told of by `listen`
            socket.send_fds(self._control, [READY], [one.fileno() for one in sockets])

    def listen(self, retire: Callable[[], None], alone: Callable[[], None]) -> None:
        """Call `retire` when the supervisor says so, and `alone` when it has gone."""
        loop = asyncio.get_running_loop()

        def hear() -> None:
            try:
                said = self._control.recv(4096)
            except BlockingIOError:
                return
            except OSError:
                said = b""
            if not said:
                loop.remove_reader(self._control.fileno())
                alone()
            elif RETIRE in said:
                retire()

        loop.add_reader(self._control.fileno(), hear)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()

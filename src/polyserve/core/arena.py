"""Where the books of a whole fleet lie: a few arrays with one slot per instance, so that one compiled loop walks it.

A `Books` works on views of its slot; when the arrays grow, or it moves into a fleet's, it takes its views anew.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from polyserve.core.kernels import AWAY, G_ROWS, I_COLUMNS, I_TIER, R_COLUMNS, Matrix, Vector

FIRST_ROWS = 32


class Tenant(Protocol):
    """Who lives in a slot."""

    def rebind(self) -> None:
        """Take the views of the slot again: the arrays were replaced."""
        ...


class Arena:
    """Slots for instances: `insts` (columns `kernels.I_*`), `rows` of residents, `gauges`, and packed `profiles`."""

    def __init__(self, grid_points: int, slots: int = 1) -> None:
        self.insts: Matrix = np.zeros((slots, I_COLUMNS))
        self.rows: NDArray[np.float64] = np.zeros((slots, FIRST_ROWS, R_COLUMNS))
        self.gauges: NDArray[np.float64] = np.zeros((slots, G_ROWS, grid_points))
        self.profiles: Matrix = np.zeros((0, 0))
        self.insts[:, I_TIER] = AWAY
        self.tenants: list[Tenant | None] = [None] * slots

    @property
    def slots(self) -> int:
        return len(self.tenants)

    def profile(self, packed: Vector) -> int:
        """The row of a packed profile, added if it is not there yet; shorter ones are padded, which nobody reads."""
        for at, row in enumerate(self.profiles):
            if len(row) >= len(packed) and np.array_equal(row[: len(packed)], packed) and not row[len(packed) :].any():
                return at
        wide = max(self.profiles.shape[1], len(packed))
        profiles = np.zeros((len(self.profiles) + 1, wide))
        profiles[:-1, : self.profiles.shape[1]] = self.profiles
        profiles[-1, : len(packed)] = packed
        self.profiles = profiles
        return len(profiles) - 1

    def take(self, tenant: Tenant) -> int:
        """A free slot for a tenant."""
        if None not in self.tenants:
            self._resize(2 * self.slots, self.rows.shape[1])
        slot = self.tenants.index(None)
        self.tenants[slot] = tenant
        return slot

    def give_back(self, slot: int) -> None:
        self.tenants[slot] = None
        self.insts[slot, I_TIER] = AWAY

    def widen(self) -> None:
        """Room for twice as many residents in every slot."""
        self._resize(self.slots, 2 * self.rows.shape[1])

    def _resize(self, slots: int, width: int) -> None:
        old, had = self.slots, self.rows.shape[1]
        insts, rows, gauges = self.insts, self.rows, self.gauges
        self.insts = np.zeros((slots, I_COLUMNS))
        self.rows = np.zeros((slots, width, R_COLUMNS))
        self.gauges = np.zeros((slots, *gauges.shape[1:]))
        self.insts[:, I_TIER] = AWAY
        self.insts[:old], self.rows[:old, :had], self.gauges[:old] = insts, rows, gauges
        self.tenants += [None] * (slots - old)
        for tenant in self.tenants:
            if tenant is not None:
                tenant.rebind()

"""Requests between their arrival and their answer.

A ticket belongs to the task that answers its client. The brain's actions reach that task in one of two ways: an answer
to `decision`, or, while it reads from an engine, an interruption that is thrown into it. Whatever happens, `close`
runs and leaves nothing behind, neither here nor in the brain's books.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from polyserve.core.forecast import Forecast
from polyserve.core.types import (
    Arrived,
    Broken,
    Cancelled,
    Corrected,
    Dispatch,
    Finished,
    FirstToken,
    InstanceId,
    Refuse,
    Request,
    RequestId,
    TierName,
)
from polyserve.serve.driver import Driver

if TYPE_CHECKING:
    from polyserve.serve.fleet import Node
    from polyserve.serve.wire import Answer

# A count closer than this to what the brain believes is no news to it.
CORRECTED_BY = 0.02

Message = dict[str, Any]
Send = Callable[[Any], Awaitable[None]]
Interruption = Literal["lost", "evicted", "moved", "silent"]
Outcome = Literal["ok", "refused", "cancelled", "rejected", "failed"]


class Foreseen(NamedTuple):
    """What was predicted of a request."""

    ttft_s: float | None
    peak_s: float | None  # longest pure-decode iteration to come


class Ticket:
    """One request on its way; made and closed by the task that answers it."""

    def __init__(self, request: Request, client_id: bytes, inflight: Inflight, driver: Driver) -> None:
        self.request = request
        self.client_id = client_id  # the request's id as the client knows it
        self.dispatch: Dispatch | None = None  # the latest
        self.node: Node | None = None  # that is serving it now
        self.events = 0  # of the present stream that carried a token
        self.tokens = 0  # per choice since the request arrived, as far as events tell
        self.base = 0  # of these, before the present stream
        self.continues = False  # the present stream goes on where the client's answer stopped
        self.boarded_at = 0.0
        self.first_at: float | None = None
        self.last_at = request.arrived_at  # when the client, or the engine, last moved
        self.lateness_s = -math.inf  # of the latest token against its deadline, the worst so far
        self.outcome: Outcome | None = None  # set once: the brain knows of the end
        self.refused_by: TierName | None = None
        self.code: str | None = None  # of the error that the client was told
        self.foreseen: Foreseen | None = None  # by the latest dispatch from the first token on
        self.path: list[InstanceId] = []  # every instance that it was sent to
        self.continuations = 0  # streams that went on where another one broke
        self.queue_s: float | None = None  # from arrival to the first dispatch
        self.gone = False  # the client has left
        self.mute = False  # nothing comes of it before its end
        self.sending = False  # the client is being sent something, and takes its time
        self.reading: Answer | None = None  # what the present stream comes from
        self._inflight = inflight
        self._driver = driver
        self._task = self._owner()
        self._decision: Dispatch | Refuse | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._interruption: Interruption | None = None
        self._thrown = False  # and the task was cancelled for it
        self._clock = driver.clock
        self._epoch = driver.epoch
        self._n = request.n
        slo = request.slo
        self._tpot_s = slo.tpot_s if slo else 0.0
        self._due_at = slo.due_at(request.arrived_at, 0) if slo else math.inf

    def __repr__(self) -> str:
        return f"<ticket {self.request.id} on {self.node}, {self.tokens} tokens, {self.outcome or 'open'}>"

    def _owner(self) -> asyncio.Task[Any]:
        task = asyncio.current_task()
        assert task is not None, "a ticket belongs to a task"
        return task

    @property
    def unread(self) -> bool:
        """Whether the engine has said more than the client has taken: then its silence is not the engine's."""
        return self.reading is not None and self.reading.unread > 0

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first."""
        if self.first_at is None or self.tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.tokens - 1)

    def decided(self, now: float, decision: Dispatch | Refuse, forecast: Forecast | None) -> None:
        """Note what was decided and foreseen, for whoever asks later."""
        if self.queue_s is None:
            self.queue_s = max(0.0, now - self.request.arrived_at)
        if isinstance(decision, Dispatch):
            self.path.append(decision.instance)
            if not decision.resume_from:
                self.foreseen = Foreseen(decision.predicted_ttft_s, forecast.peak_s if forecast else None)

    async def decision(self) -> Dispatch | Refuse:
        """What the brain says next of this request."""
        if self._decision is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        decision, self._decision = self._decision, None
        assert decision is not None
        if isinstance(decision, Dispatch):
            self.dispatch = decision
        else:
            self.outcome, self.refused_by = "refused", decision.tier
        return decision

    def answer(self, decision: Dispatch | Refuse) -> None:
        """Take the brain's decision to the task."""
        self._decision = decision
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        elif self.node is not None:
            self.interrupt("moved")

    def interrupt(self, why: Interruption) -> None:
        """Make the task leave the engine it reads from, once the client has what is being sent to it."""
        if self.node is not None and self._interruption is None and self.outcome is None:
            self._interruption = why
            if not self.sending:
                self._thrown = True
                self._task.cancel()

    async def pass_on(self, send: Send, message: Message) -> None:
        """Send the client something, whole: an interruption waits, since what is sent is not made again."""
        self.sending = True
        await send(message)
        self.sending = False
        if self._interruption is not None:
            raise asyncio.CancelledError

    def leave(self) -> None:
        """The client has gone: make the task stop, wherever it is."""
        if self.outcome is None and not self.gone:
            self.gone = True
            self._task.cancel()

    def interruption(self) -> Interruption | None:
        """Why `CancelledError` was thrown into the task; None: somebody else wants it to end, or the client has gone.

        A reason is given once, and takes the cancellation back.
        """
        why, self._interruption = self._interruption, None
        if self._thrown:
            self._task.uncancel()
            self._thrown = False
        return None if self.gone or self._task.cancelling() else why

    def board(self, node: Node, base: int = 0, continues: bool = False) -> None:
        """The engine has the request from now on; `base` tokens were made before, which it may continue from."""
        self.node = node
        self.events = 0
        self.tokens = self.base = base
        self.continues = continues
        self.continuations += continues
        self.last_at = self.boarded_at = self._driver.now()
        node.tickets[self.request.id] = self

    def alight(self) -> None:
        """The engine has it no longer."""
        if self.node is not None:
            self.node.forget(self.request.id)
            self.node = None

    def advance(self, events: int) -> None:
        """So many token events have arrived; runs for every chunk of every stream."""
        node = self.node
        assert node is not None, "tokens come from an engine"
        if not self.events:
            self._first(self._driver.now(), node)
        now = self._clock() - self._epoch
        self.events += events
        if self._n == 1 and node.tokens_per_event == 1.0:
            tokens = self.base + self.events
            moved = True
        else:
            tokens = self.base + max(1, int(self.events * node.tokens_per_event / self._n))
            moved, events = tokens != self.tokens, 1
        # Of tokens that come together the first is the latest against its deadline.
        late = now - self._due_at - self.tokens * self._tpot_s
        self.tokens = tokens
        if moved and not node.tells:
            node.progress.token(now, self.request.id, tokens, events)
        if late > self.lateness_s:
            self.lateness_s = late
        self.last_at = node.moved_at = now

    def finish(self, tokens: int | None, prompt_tokens: int | None = None) -> None:
        """The stream has come to its end, with exact counts where the engine gave them."""
        now = self._driver.now()
        node = self.node
        assert node is not None, "an end comes from an engine"
        made = self.tokens - self.base
        if tokens:
            node.learn(self.events, tokens)
            made = max(1, tokens // self.request.n)
        self.tokens = made + (self.base if self.continues else 0)
        if prompt_tokens and abs(prompt_tokens - self.request.prompt_tokens) > CORRECTED_BY * prompt_tokens:
            self._driver.post(Corrected(now, self.request.id, prompt_tokens))
        if not self.events:
            self._first(now, node)
        self.outcome = "ok"
        self._driver.post(Finished(now, self.request.id, node.id, self.tokens))
        self.alight()

    def _first(self, now: float, node: Node) -> None:
        if not self.continues:
            self.first_at = now
        self._driver.post(FirstToken(now, self.request.id, node.id))

    def broke(self, tokens: int, fault: bool = True) -> None:
        """The stream ended before its end; the brain decides where it goes on.

        `tokens` need not be made again, in all: the client has them, or will get them. `fault`: the engine's.
        """
        node = self.node
        assert node is not None, "what breaks is a stream from an engine"
        self._driver.post(Broken(self._driver.now(), self.request.id, node.id, tokens, fault))
        self.alight()

    def complete(self) -> None:
        """All tokens were there before the stream broke: wherever the brain has the request by now, it is done."""
        self.finish(None)
        self._driver.post(Cancelled(self._driver.now(), self.request.id))

    def broke_off(self, dispatch: Dispatch) -> None:
        """The request could not be given to the instance."""
        self._driver.post(Broken(self._driver.now(), self.request.id, dispatch.instance, dispatch.resume_from, False))

    def close(self) -> None:
        """Forget the request; if the brain does not know of its end yet, it is told that nobody waits for it."""
        if not self._inflight.remove(self):
            return
        if self.outcome in (None, "failed", "rejected"):
            self.outcome = self.outcome or "cancelled"
            self._driver.post(Cancelled(self._driver.now(), self.request.id))
        self.alight()


class Inflight:
    """All open tickets."""

    def __init__(self, driver: Driver, most: int) -> None:
        self._driver = driver
        self.most = most
        self._tickets: dict[RequestId, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._tickets

    def __repr__(self) -> str:
        return f"<{len(self)} requests in flight>"

    def get(self, request: RequestId) -> Ticket | None:
        return self._tickets.get(request)

    def open(self, request: Request, client_id: bytes) -> Ticket | None:
        """Tell the brain of a request; None when there are too many already. Answer it, then `Ticket.close`."""
        assert request.id not in self._tickets, "the brain knows requests by their id"
        if len(self._tickets) >= self.most or not self._driver.offer(Arrived(self._driver.now(), request)):
            return None
        ticket = self._tickets[request.id] = Ticket(request, client_id, self, self._driver)
        return ticket

    def adopt(self, ticket: Ticket) -> bool:
        """Tell the brain of a request that another process answers; whether there is room for it."""
        request = ticket.request
        taken = request.id in self._tickets or len(self._tickets) >= self.most
        if taken or not self._driver.offer(Arrived(self._driver.now(), request)):
            return False
        self._tickets[request.id] = ticket
        return True

    def remove(self, ticket: Ticket) -> bool:
        """Forget a ticket; whether it was still known."""
        return self._tickets.pop(ticket.request.id, None) is not None

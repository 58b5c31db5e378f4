"""Which row of a simulated engine's arrays holds what.

`ints` and `floats` have a column per slot (one request each), `lists` holds ordered slot numbers, `state` the engine's
counters and limits, `clock` its times and ratios; `work` is scratch for one iteration. What every iteration changes of
every decode lies side by side in the order of DECODING, so that a loop over it is as fast as memory allows; it is
written back to the slot's own column when it stops decoding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntVector = NDArray[np.int64]
IntMatrix = NDArray[np.int64]

# Rows of `ints`: PROMPT without and TARGET with the tokens generated before it was queued; ADMITTED is the
# number of its admission; RELEGATED, whether it waits behind all that can still be in time; BROUGHT, whether its KV
# came along and waits with it.
(PROMPT, TARGET, COMPUTED, GENERATED, OUTPUT, BLOCKS, SEQUENCE, RUNS, ADMITTED, CHUNK, RELEGATED, BROUGHT,
 INT_ROWS) = range(13)  # fmt: skip
# Rows of `floats`: BASE is when token 0 is due, infinite (like TPOT) without an SLO. Then, by place in DECODING: tokens
# generated, when the next is due, that token 0's due time and pace, and the worst lateness.
BASE, TPOT, WORST, FIRST_AT, P_MADE, P_DUE, P_BASE, P_TPOT, P_WORST, FLOAT_ROWS = range(10)
# Rows of `lists`, with their lengths in `state`: QUEUE is everybody who does not decode, in order.
DECODING, QUEUE, CHUNKED, TOKENS, FIRST, FINISHED, PREEMPTED, LISTS = range(8)
# Then, by place in DECODING: the iteration that makes its last token, and what its last block has room for.
P_LAST, P_ROOM, LIST_ROWS = range(LISTS, LISTS + 3)
# Rows of `work`.
SLACKS, REMAINING, PAST, CHUNKS, QUEUED, WORK_ROWS = range(6)
# `state` beyond those lengths: what is free and held (READ of it by decodes); the limits; profiles by row; whether an
# iteration runs, and its shape (JOINED of the decodes brought their KV and decode here for the first time); counters;
# when the next decode ends, as an iteration's number; what `turns` keeps.
(
    FREE, RUNNING, HELD, READ, ADMISSIONS, BLOCK, SEATS, BY_DEADLINE, RELEGATES, KIND, LAW_TOKENS, SPEND, FLOOR, TRUE,
    BELIEVED, LEARNS, BUSY, PREFILL, DECODES, KV, JOINED, ITERATIONS, PREEMPTIONS, FORCED_CHUNKS, NEXT_LAST,
    BEGUN, PLACE, LENGTHS, JITTERS, DRAWN, STATE_LENGTH,
) = range(LISTS, LISTS + 31)  # fmt: skip
# `clock`: the pace, and the tightest of the decodes; observed over believed iteration time, what slacks are divided by
# besides, and its variance, with the spreads that the margin counts; of the iteration that runs: what its true time is
# stretched by, its end, its length, and its true over its believed time; seconds busy so far; and of `turns`: when
# tokens came last, and a report.
(PACE, TIGHTEST, RATIO, MARGIN, VARIANCE, SIGMAS, STRETCH, ENDS_AT, LENGTH, OFF, BUSY_S, TOKENS_AT, REPORTED_AT,
 CLOCK_LENGTH) = range(14)  # fmt: skip

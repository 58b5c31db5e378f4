"""What the kernels' arrays hold, column by column.

A profile travels as one float64 vector (`Profile.packed`): the header `P_*`, then the knots, then the values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

P_KNOTS, P_DECODE, P_KV, P_ATTENTION, P_MIXED_KV, P_MIXED_DECODE, P_HOST, P_HEADER = range(8)
# How an engine sizes its chunks, and how those of an iteration came about.
DYNAMIC, FIXED = 0, 1
FITS, WAITS, FORCED = 0, 1, 2

# One resident, as a row of the books. MADE is what the forecast believes of this dispatch, SEEN what was reported since
# the request arrived, BASE what earlier dispatches had delivered; FROM: iterations that begin before leave it out;
# RUN: prompt tokens of the running iteration's chunk; SOLO: seconds that the prompt takes on an idle instance; LESS:
# seconds of its deadline that are kept for what follows its prompt on another instance. A candidate that has nothing
# LEFT had its prompt computed elsewhere, or will have: its KV is here SOLO seconds from now, or at FROM.
(
    R_PROMPT, R_LEFT, R_MADE, R_CAP, R_BAND, R_DUE, R_TPOT, R_KEY, R_BASE, R_SEEN, R_FROM, R_RUN, R_SOLO, R_LESS,
    R_COLUMNS,
) = range(15)  # fmt: skip
# When a dynamic chunk goes beyond the pace into the slack that decodes have banked.
NEVER, ALWAYS, IF_NEEDED = range(3)
PROMISED = -1.0  # in LEFT: a place is kept for it, and its KV is still to come
# One instance, as the forecast sees it; then how far its books are: ENDS when the running iteration does (below 0: none
# runs), ROLLED the time they stand at, GAUGED the version of the length table that the gauge was made with (below 0: it
# is to be made again), PEAK of it in seconds, and its point; COUNT residents; TIER by index, or POOL or AWAY; RANK
# among all names; PROFILE its row in the arena; WAITS whether the running iteration is charged; FCFS its order;
# CLEAR when the prompts queued there are computed (below 0: not known), and LAST the last key among them; BEGAN when
# the running iteration did.
(
    I_KIND, I_TOKENS, I_SPEND, I_FLOOR, I_PACE, I_KV, I_SEQS, I_BLOCK, I_SCALE, I_FREE, I_SIGMA, I_MARGIN,
    I_ENDS, I_ROLLED, I_GAUGED, I_PEAK, I_POINT, I_COUNT, I_TIER, I_RANK, I_PROFILE, I_WAITS, I_FCFS,
    I_CLEAR, I_LAST, I_BEGAN, I_COLUMNS,
) = range(27)  # fmt: skip
POOL, AWAY = -1.0, -2.0  # ready without a tier; starting or draining
# The rows of a gauge, each over the grid of future iterations. MOST is the KV if nobody ends before its cap.
G_BATCH, G_KV, G_VARIANCE, G_MOST, G_DECODES, G_DECODE_KV, G_ROWS = range(7)
# Which tests a forecast makes, as bits.
TEST_MEMORY, TEST_PACE, TEST_PREFILL, TEST_TOKEN1, ALL_TESTS = 1, 2, 4, 8, 15
# The answer of a forecast.
F_MEMORY, F_SEQS, F_PACE, F_PREFILL, F_TOKEN1, F_QUEUED, F_DECODES, F_FIRST, F_PEAK, F_COLUMNS = range(10)

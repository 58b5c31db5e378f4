"""A profile's two faces: what prompt tokens cost in an iteration, and what decodes do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from polyserve.core.profile import Profile, ProfileError, attention_work
from polyserve.profiles.describe import CONTEXTS, PACES_MS

# From short to long contexts; told apart by people who see few colours as well (Okabe and Ito's palette).
HUES = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00")


def draw_profile(profile: Profile, path: str | Path) -> None:
    """Write a PNG: iteration time over chunk size, alone and beside decodes, and over decodes by context."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    chunks = np.arange(1, profile.limits.max_num_batched_tokens + 1)
    some = min(64, profile.limits.max_num_seqs)
    for decodes, hue, label in ((0, HUES[1], "alone"), (some, HUES[4], f"beside {some} decodes of 1,024")):
        times = [profile.iteration_s(c, decodes, decodes * 1024, attention_work(c, 0)) * 1e3 for c in chunks.tolist()]
        left.plot(chunks, times, color=hue, label=label)
    left.set_xlabel("prompt tokens in the iteration")
    left.set_title("A chunk", loc="left", fontsize=10)
    for context, hue in zip(CONTEXTS, HUES, strict=True):
        most = min(profile.limits.max_num_seqs, profile.limits.kv_tokens // context)
        times = [profile.iteration_s(0, n, n * context) * 1e3 for n in range(1, most + 1)]
        right.plot(range(1, most + 1), times, color=hue, label=f"{context:,}")
    top = right.get_ylim()[1]
    for pace in (pace for pace in PACES_MS if pace < top):
        right.axhline(pace, color="#BBBBBB", linewidth=0.7, zorder=0)
    right.set_xlabel("decodes in the iteration, by their context; grey: paces of 10 to 100 ms")
    right.set_title("Decodes alone", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_ylabel("ms")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{profile.name}: one iteration", x=0.01, ha="left", fontsize=12, fontweight="bold")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be drawn: {error}") from None

"""The picture of a run shows the gradient: bands of one hue that fade downwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from polyserve.plot import PlotError, carpet, draw_loads, ranked
from polyserve.report import Facts

TIERS = ("20", "100")


@dataclass(frozen=True)
class Look:
    at: float
    instance: str
    tier: str | None
    load: float


LOOKS = [
    Look(0.0, "i0", "100", 0.2),
    Look(0.0, "i1", "20", 0.1),
    Look(0.0, "i2", None, 0.0),
    Look(0.0, "i3", "20", 0.9),
    Look(0.0, "i4", "100", 0.7),
    Look(0.0, "i5", "20", 0.5),
]


def test_tiers_are_bands_from_tight_to_loose_the_fullest_on_top_and_the_pool_last() -> None:
    assert [look.instance for look in ranked(LOOKS, TIERS)] == ["i3", "i5", "i1", "i4", "i0", "i2"]


def test_a_fuller_instance_is_darker_and_tiers_differ_in_hue() -> None:
    picture = carpet([ranked(LOOKS, TIERS)], 7, TIERS)
    brightness = picture[:, 0].sum(axis=1)
    assert brightness[0] < brightness[1] < brightness[2]
    assert brightness[3] < brightness[4]
    assert picture[1, 0].argmax() == 0, "the tight tier is warm"
    assert picture[3, 0].argmax() == 2, "the loose one is cold"
    assert picture[6, 0].tolist() == [1.0, 1.0, 1.0], "where there is no instance it is white"


def test_the_picture_is_a_png_of_a_sensible_size(tmp_path: Path) -> None:
    looks = [Look(float(at), look.instance, look.tier, look.load) for at in range(5) for look in LOOKS]
    draw_loads(looks, TIERS, tmp_path / "p.png", Facts("polyserve", "small", "uniform:9/9", instances=6))
    image = matplotlib.image.imread(tmp_path / "p.png")
    assert image.shape[0] > 400
    assert image.shape[1] > 1000
    assert len(np.unique((image[::7, ::7, :3] * 255).round() @ [65536, 256, 1])) > 10


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match="too short"):
        draw_loads([], TIERS, tmp_path / "p.png", Facts("polyserve"))

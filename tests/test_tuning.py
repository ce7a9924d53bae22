"""Choosing strengths from noisy rates."""

from __future__ import annotations

import pytest

from emocircuits.demo_tuning import choose, gain


def row(strength: float, coherent: float, perplexity: float = 10.0, layers: tuple[int, ...] = (1, 2)) -> dict:
    return {"layers": list(layers), "strength": strength, "gain": coherent, "perplexity": perplexity}


def test_a_lonely_peak_loses_against_a_plateau() -> None:
    rates = [0.1, 0.9, 0.1, 0.75, 0.8, 0.75]
    assert choose([row(i, r) for i, r in enumerate(rates)])["strength"] == 4


def test_neighbours_are_of_the_same_band_whatever_the_order() -> None:
    wide = [row(s, c) for s, c in ((0.3, 0.4), (0.1, 0.4), (0.2, 0.6))]
    narrow = [row(s, c, layers=(5,)) for s, c in ((0.15, 1.0), (0.05, 0.0), (0.25, 0.0))]
    assert choose(wide + narrow)["strength"] == 0.2


@pytest.mark.parametrize("costs", [(9.0, 30.0), (30.0, 9.0)])
def test_ties_go_to_the_cheaper_text(costs: tuple[float, float]) -> None:
    assert choose([row(0.1, 0.7, costs[0]), row(0.2, 0.7, costs[1])])["perplexity"] == 9.0


def test_a_text_that_names_or_loops_gains_nothing() -> None:
    verdict = {"target_probability": 0.8, "named": False, "degenerate": False}
    assert gain([verdict, {**verdict, "named": True}, {**verdict, "degenerate": True}, verdict]) == 0.4

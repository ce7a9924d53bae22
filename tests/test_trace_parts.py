"""Measured traces on disk and what people call what was measured: sizes, older runs, long ones, words, rings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_studies import write_anchors

from emocircuits.artefact import write_json_atomic
from emocircuits.errors import EmocircuitsError
from emocircuits.reasoning import findings, plots
from emocircuits.reasoning.names import NAMES, PUSHES, name_of
from emocircuits.reasoning.parts import Lower, matrices, read, window, write


def square(n: int) -> list[list[float | None]]:
    """Numbers below the diagonal only, one of them undefined."""
    made: list[list[float | None]] = [[10.0 * i + j if j < i else None for j in range(n)] for i in range(n)]
    made[n - 1][0] = None
    return made


def as_an_older_run(path: Path) -> Path:
    """The trace with all its matrices in the JSON, as it was written before."""
    part = read(path)
    kl: Lower = part["suppression"]["kl"]
    part["suppression"]["kl"] = [[None if np.isnan(v) else v for v in row] for row in kl.block()]
    part["receivers"]["vertical"] = part["receivers"]["vertical"].tolist()
    matrices(path).unlink()
    return write_json_atomic(path, part)


def test_blocks_are_those_of_the_square() -> None:
    whole = np.array(square(7), dtype=float)
    lower = Lower.of(square(7))
    assert lower.values.size == 21
    for start, stop in ((0, 7), (2, 5), (6, 7), (0, 0)):
        np.testing.assert_array_equal(np.array(lower.block(start, stop)).ravel(), whole[start:stop, start:stop].ravel())
    with pytest.raises(EmocircuitsError, match="7 steps have 21 effects"):
        Lower(lower.values[1:], 7)


def test_a_trace_is_read_as_it_was_written_and_as_older_runs_wrote_it(tmp_path: Path) -> None:
    file = write_anchors(tmp_path / "run", steps=6, n=1) / "trace_p0.json"
    part = read(file)
    part["suppression"]["kl"] = Lower.of(square(6))
    part["receivers"]["vertical"][:, :, -2:] = np.nan
    write(file, part)
    assert "kl" not in json.loads(file.read_text())["suppression"]
    again = read(file)
    older = read(as_an_older_run(file))
    for found in (again, older):
        np.testing.assert_array_equal(found["suppression"].pop("kl").block(), np.array(square(6), dtype=float))
        np.testing.assert_array_equal(found["receivers"].pop("vertical"), part["receivers"]["vertical"])
    assert again == older


def test_a_long_trace_is_small_on_disk(tmp_path: Path) -> None:
    file = write_anchors(tmp_path / "run", steps=600, n=1) / "trace_p0.json"
    assert matrices(file).stat().st_size < 5 * 600 * 600 / 2
    assert file.stat().st_size < 600 * 2500


def test_missing_and_damaged_matrices_are_named(tmp_path: Path) -> None:
    file = write_anchors(tmp_path / "run", n=1) / "trace_p0.json"
    matrices(file).write_bytes(b"not it")
    with pytest.raises(EmocircuitsError, match=r"trace_p0\.safetensors"):
        read(file)
    matrices(file).unlink()
    with pytest.raises(EmocircuitsError, match=r"trace_p0\.safetensors"):
        read(file)


def test_a_window_holds_the_chosen_step() -> None:
    for n, chosen in ((5, 4), (100, 0), (100, 50), (100, 99)):
        start, stop = window(n, chosen)
        assert start <= chosen < stop
        assert stop - start == min(n, 60)


# ------------------------------------------------------------------------------------------------ figures


def test_figures_of_a_window_count_steps_as_the_trace_does() -> None:
    steps, rows = ["a", "b", "c"], [{"value": 0.1, "p": 0.5}] * 3
    places: list[tuple[Any, list[int]]] = [
        (plots.importance_along(steps, rows, first=7), [7, 8, 9]),
        (plots.answers_along({"x": [0, 1]}, first=7), [7, 8]),
        (plots.step_lines(steps, {"x": [0, 1, 2]}, "", first=7), [7, 8, 9]),
        (plots.effect_matrix(square(3), steps, first=7), [7, 8, 9]),
    ]  # fmt: skip
    for fig, numbers in places:
        assert list(fig.data[0].x) == numbers
    graph: Any = plots.step_graph(square(3), steps, first=7)
    assert list(graph.data[-1].x) == [7, 8, 9]
    ends = {(t.x[0], t.x[24]) for t in graph.data[:-1] if t.x}
    assert ends <= {(7, 8), (7, 9), (8, 9)}
    assert ends


def test_a_long_trace_is_drawn_in_part_in_the_report(tmp_path: Path) -> None:
    page = (write_anchors(tmp_path / "run", steps=900, n=1) / "report.html").read_text()
    assert "of 900, around the most important one" in page
    assert page.count("<li>Step ") == 60


# ------------------------------------------------------------------------------------------------ receiver heads


def receivers(best: float) -> dict[str, Any]:
    return {"receivers": {"kurtosis": [[None, 2.0], [best, -1.4]], "heads": [[1, 0], [1, 1]], "split_half": []}}


def rings(fig: Any) -> list[tuple[int, str]]:
    return [(x, y) for t in fig.data[1:] for x, y in zip(t.x, t.y)]


def test_heads_that_are_no_sharper_than_even_wear_no_ring() -> None:
    flat, sharp = receivers(-1.3), receivers(0.7)
    drawn = [plots.receiver_map(f["receivers"]["kurtosis"], f["receivers"]["heads"]) for f in (flat, sharp)]
    assert [rings(fig) for fig in drawn] == [[], [(0, "1")]]
    assert "No head is sharper than even" in findings.sharpness(flat)
    assert "(the greatest is −1.30)" in findings.sharpness(flat)
    assert "the 1 sharpest" in findings.sharpness(sharp)
    assert "none has a kurtosis" in findings.sharpness({"receivers": {"kurtosis": [[None]], "heads": []}})


def test_the_report_of_flat_heads_says_so(tmp_path: Path) -> None:
    found = json.loads((write_anchors(tmp_path / "run", n=1) / "anchors.json").read_text())
    assert "No head is sharper than even" in findings.page(found | receivers(-1.3), [], "x")
    assert "No head is sharper than even" not in findings.page(found | receivers(0.7), [], "x")


# ------------------------------------------------------------------------------------------------ words


def test_every_measure_has_words_of_its_own() -> None:
    assert set(NAMES) == set(findings.MEASURES)
    assert len(set(NAMES.values())) == len(NAMES)
    assert name_of("of_another_version") == "of_another_version"


def test_report_and_tables_name_no_key(tmp_path: Path) -> None:
    path = write_anchors(tmp_path / "run")
    found = json.loads((path / "anchors.json").read_text())
    assert set(found["measures"]) == set(NAMES)
    for text in (findings.markdown(found, "x"), findings.page(found, [], "x").split("const figures")[0]):
        for key in ("pushed_random", "carried_other", "control_everywhere", ">forced<", "| forced"):
            assert key not in text
        for words in (*(NAMES[k] for k in found["measures"]), *PUSHES.values()):
            assert words in text

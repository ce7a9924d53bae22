"""The explorer's pure parts: folders, words, units, mixing, records, comparison, and two tabs on one model."""

from __future__ import annotations

import hashlib
import io
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import letters, write_balance, write_run

pytest.importorskip("streamlit", reason="streamlit is not installed: emocircuits[dashboard]")

from dashboards import comparing, findings, folders, mixing, modality, records
from dashboards.exports import figure_csv
from dashboards.livemodel import Live
from dashboards.words import file_name, md, plain
from emocircuits import cli, live, plots
from emocircuits.artefact import write_json_atomic
from emocircuits.demo import Plan
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError
from emocircuits.generation import Decoding
from emocircuits.models.load import Loaded
from emocircuits.multimodal import plots as balance_plots
from emocircuits.report import read_run
from emocircuits.runs import Run
from emocircuits.steering import Steerer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts") / "runs"
    write_run(root / "a", layers=4)
    write_run(root / "b", layers=4, seed=5)
    write_balance(root / "balance")
    (root / "notes").mkdir()
    return root


def directions() -> DirectionSet:
    made = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 4, 32, generator=made)
    return DirectionSet(("anger", "fear"), "resid_post", (0, 1, 2, 3), vectors, torch.ones(4), torch.zeros(4, 32))


# ------------------------------------------------------------------------------------------------ folders


def test_a_run_is_found_with_its_neighbours_and_a_folder_with_its_runs(home: Path) -> None:
    assert folders.find(home / "b").names == ("b", "a", "balance")
    assert folders.find(home) == folders.Place(home.resolve(), ("a", "b", "balance"))
    (home / "file").write_text("")
    for wrong in ("none", "notes", "file"):
        with pytest.raises(InputError):
            folders.find(home / wrong)


def test_each_kind_of_folder_opens(home: Path, tmp_path: Path) -> None:
    results = Path(__file__).parents[1] / "experiments" / "results"
    kinds = {home / "a": "run", home / "balance": "modality", results / "demo": "run", results / "circuits": "circuits",
             results / "nano_mllm": "modality"}  # fmt: skip
    for folder, kind in kinds.items():
        assert folders.kind(folder) == kind
        assert folders.open_run(folder).path == folder
    alone = folders.open_run(results / "circuits")
    assert alone.circuits
    assert alone.evaluation is None  # the circuits' own evaluation is not the run's
    assert (alone.model, alone.emotions[0]) == ("gemma-3-270m (demo)", "anger")
    assert folders.circuit_folder(alone) == results / "circuits"


@pytest.mark.parametrize("plan", [Plan(), Plan("org/model; rm -rf x", seed=3), Plan.small("tiny")])
def test_the_command_that_resumes_a_run_has_the_settings_of_the_run(tmp_path: Path, plan: Plan) -> None:
    from dataclasses import asdict

    Run(tmp_path / "a run", asdict(plan))
    command = folders.how_to_finish(read_run(tmp_path / "a run"))
    args = cli.parser().parse_args(shlex.split(command)[1:])
    again = Plan.small(args.model) if args.small else Plan(args.model, seed=args.seed)
    assert (again, args.out) == (plan, tmp_path / "a run")


def test_names_from_files_never_lead_out_of_a_folder(tmp_path: Path) -> None:
    assert folders.inside(tmp_path, "fear.safetensors") == tmp_path / "fear.safetensors"
    for name in ("../x", "/etc/passwd", "..", "a/b", "", "."):
        assert folders.inside(tmp_path, name) is None


# ------------------------------------------------------------------------------------------------ words


@given(st.text(max_size=80))
def test_escaping_adds_backslashes_only_and_leaves_no_markup(text: str) -> None:
    escaped = md(text)
    kept, at = [], 0
    while at < len(escaped):
        if escaped[at] == "\\":
            at += 1
        else:
            assert escaped[at] not in "`*_{}[]()<>#+|~$:&"
        kept.append(escaped[at])
        at += 1
    assert "".join(kept) == " ".join(text.split())


def test_words_of_the_reports_html() -> None:
    assert plain('80% <span class="ci">[75, 85]</span> &lt;b&gt;') == "80% [75, 85] <b>"
    assert file_name("Fear: how it works / 3") == "fear-how-it-works-3"
    assert file_name("???") == "figure"


# ------------------------------------------------------------------------------------------------ mixing


def test_a_mix_is_the_weighted_sum_and_its_file_holds_it() -> None:
    saved = {e: directions().steerer(e, 0.5, [1, 2]) for e in ("anger", "fear")}
    mixed = mixing.mix(saved, {"anger": 1.0, "fear": -0.5, "joy": 3.0}, 2.0, "generated")
    assert mixed.name.startswith("2 anger+-1 fear")
    model = zoo.build("llama")
    assert {t.positions for t in mixed.terms} == {"generated"}
    wanted, ids = 2.0 * saved["anger"] + -1.0 * saved["fear"], torch.tensor([[1, 5, 6]])
    with torch.no_grad(), mixed.at("all").attach(model):
        found = model(ids).logits
    with torch.no_grad(), wanted.attach(model):
        assert torch.allclose(model(ids).logits, found, atol=1e-6)
    assert mixing.mix(saved, {"anger": 0.0}, 2.0, "all") is None
    assert mixing.mix(saved, {"anger": 1.0}, 0.0, "all") is None


def test_a_downloaded_steerer_is_the_one_on_the_page(tmp_path: Path) -> None:
    saved = {"fear": directions().steerer("fear", 0.5, [1, 2])}
    mixed = mixing.mix(saved, {"fear": 1.5}, 1.0, "all")
    (tmp_path / "x.safetensors").write_bytes(mixing.as_file(mixed))
    again = Steerer.load(tmp_path / "x.safetensors")
    assert (again.name, again.strength, again.provenance) == (mixed.name, mixed.strength, mixed.provenance)
    assert torch.equal(again.terms[0].vectors, mixed.terms[0].vectors)


def test_steerers_come_at_the_settings_that_tuning_chose(home: Path) -> None:
    data = read_run(home / "a")
    made = mixing.from_directions(data, directions())
    assert set(made) == {"anger", "fear"}
    for steerer in made.values():  # tuning chose layers that these four-layer directions lack: the cautious default
        assert steerer.strength * len(steerer.terms[0].layers) == pytest.approx(mixing.TOTAL)


def test_fluency_uses_the_runs_rule(home: Path, tmp_path: Path) -> None:
    data = read_run(home / "a")
    texts, odd = ["a plain and simple text of words", "no no no no no no no no"], [12.0, 30.0]
    assert [f.limit for f in mixing.fluency(texts, odd, data)] == [None, None]
    write_json_atomic(tmp_path / "manifest.json", {"settings": {}, "stages": {}})
    write_json_atomic(tmp_path / "thresholds.json", {"perplexity": 20.0, "repetition": 0.4})
    fine, broken = mixing.fluency(texts, odd, read_run(tmp_path))
    assert fine.reason == ""
    assert "loop" in broken.reason
    assert "perplexity 30" in broken.reason


def test_two_tabs_that_steer_at_once_do_not_mix() -> None:
    tab = Live(Loaded(zoo.build("llama"), letters(), "tiny"))
    steerers = [None, directions().steerer("anger", 3.0), directions().steerer("fear", 3.0)] * 3
    decoding = Decoding(10, 2)
    alone = [live.write(tab.loaded.model, tab.loaded.tokenizer, "one day", [s], decoding=decoding) for s in steerers]
    found: list[Any] = [None] * len(steerers)
    waits: list[int] = []

    def press(i: int) -> None:
        with tab.alone(lambda: waits.append(i)) as loaded:
            found[i] = live.write(loaded.model, loaded.tokenizer, "one day", [steerers[i]], decoding=decoding)

    threads = [threading.Thread(target=press, args=(i,)) for i in range(len(steerers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert len({a[0] for a in alone}) == 3


def test_a_tab_that_is_closed_while_waiting_or_writing_lets_the_next_one_in() -> None:
    tab = Live(None)

    class Closed(BaseException):
        pass

    def close() -> None:
        raise Closed

    def wait() -> None:
        with pytest.raises(Closed), tab.alone(close):
            pass

    def write() -> None:
        with tab.alone():
            waiting = threading.Thread(target=wait)
            waiting.start()
            waiting.join()
            raise Closed

    with pytest.raises(Closed):
        write()
    entered = []

    def enter() -> None:
        with tab.alone(close):
            entered.append(True)

    last = threading.Thread(target=enter)
    last.start()
    last.join()
    assert entered == [True]


# ------------------------------------------------------------------------------------------------ rows


def test_records_notice_changed_missing_and_foreign_files(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"one").hexdigest()
    for name, content in (("same", b"one"), ("changed", b"two")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    (tmp_path / "outside").write_bytes(b"one")
    states = {n: records.state(tmp_path / "run", n, digest) for n in ("same", "changed", "gone", "../outside")}
    assert states == {"same": "as written", "changed": "changed", "gone": "missing", "../outside": "outside the run"}


def test_a_real_runs_files_are_as_written(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {"model": "demo"})
    run.json_stage("norms", lambda: [1.0, 2.0])
    manifest = read_run(tmp_path / "run").manifest
    assert {n: records.state(run.path, n, d) for n, d in records.files(manifest).items()} == {
        "norms.json": "as written"
    }
    assert [row["stage"] for row in records.stage_rows(manifest)] == ["norms"]


def test_a_count_that_is_not_set_means_all() -> None:
    settings = {"n_train": None, "n_validation": 3, "demo": {"n_heldout": None, "scenarios": None}, "rate": None}
    rows = {row["setting"]: row["value"] for row in records.setting_rows({"settings": settings})}
    assert rows == {"n train": "all", "n validation": "3", "demo n heldout": "all", "demo scenarios": "all of ours",
                    "rate": "n/a (not defined by the data)"}  # fmt: skip


def test_comparison_shows_both_runs_and_only_what_differs(home: Path) -> None:
    a, b = read_run(home / "a"), read_run(home / "b")
    names = ("a", "b")
    assert {r["setting"]: (r["a"], r["b"]) for r in comparing.different_settings(a, b, names)} == {"seed": ("0", "5")}
    assert comparing.different_settings(a, a, names) == []
    keys = {r["measure"]: r for r in comparing.key_rows(a, b, names)}
    assert keys["Coherent, steered"]["a"] == "80% [75, 85]"
    sets, layers = comparing.layer_tests(a, b, names) or ({}, [])
    assert [t["name"] for t in sets["tests"]] == ["a", "b"]
    assert layers == [0, 1, 2, 3]


def test_a_token_table_keeps_surprise_apart_from_surprisal() -> None:
    found = SimpleNamespace(
        pieces=("a", "b"), emotions=("fear", "surprise"), surprise=torch.tensor([3.0, 4.0]),
        at=lambda layer: torch.tensor([[0.1, 0.2], [0.3, 0.4]]) * layer,
    )  # fmt: skip
    assert findings.token_rows(found, 2)[1] == pytest.approx(
        {"token": "b", "fear": 0.6, "surprise": 0.8, "surprisal, nats": 4.0}
    )


def test_a_figures_numbers_are_saved_as_they_are_drawn() -> None:
    lines = plots.quality_by_layer({"tests": [{"name": "<b>", "rows": [
        {"layer": 0, "accuracy": 0.5, "low": 0.4, "high": 0.7}, {"layer": 1, "accuracy": 0.8, "low": 0.7, "high": 0.9},
    ]}]}, [0, 1], 0.5)  # fmt: skip
    rows = pd.read_csv(io.StringIO(figure_csv(lines)))
    mine = rows[rows["series"] == "<b>"]
    assert list(mine["y"].dropna())[-2:] == [0.5, 0.8]
    heat = pd.read_csv(io.StringIO(figure_csv(plots.geometry_map([[1.0, 0.5], [0.5, 1.0]], ["fear", "joy"]))))
    assert {(r.x, r.y): r.value for r in heat.itertuples()}["fear", "joy"] == 0.5
    bars = balance_plots.changed_bars({"less": [{"estimate": 0.25, "low": 0.2, "high": 0.5}]}, {"less": [0.5]})
    row = pd.read_csv(io.StringIO(figure_csv(bars))).iloc[0]
    assert (row["x"], row["y"], row["y_plus"]) == ("less 0.5", 0.25, 0.25)


def test_balance_is_said_as_the_report_says_it(home: Path) -> None:
    kind, found = modality.read(home / "balance")
    assert kind == "balance"
    assert "6 prompts" in modality.verdicts(found)[0]
    assert modality.verdicts(found)[1].endswith("audio drives the answers more.")


def test_the_published_test_bed_has_rows_for_every_table() -> None:
    kind, found = modality.read(Path(__file__).parents[1] / "experiments" / "results" / "nano_mllm")
    assert kind == "testbed"
    for rows in (modality.score_rows, modality.curve_rows, modality.held_out, modality.policy_rows, modality.knob_rows):
        assert len(rows(found)) > 4
    assert "n/a" not in str(modality.score_rows(found))


def test_verdicts_on_texts_say_what_the_judge_saw() -> None:
    row = {
        "emotion": "fear",
        "coherent": False,
        "predicted": "anger",
        "named": True,
        "degenerate": True,
        "reason": "loop",
    }
    assert findings.verdict(row | {"perplexity": None}) == (
        "no coherent expression; read as anger; names the emotion; degenerate (loop); perplexity n/a"
    )

"""`emocircuits sae demo`: a small SAE of the demo model's emotional texts and reasoning, what its latents mean, and
whether one of them steers.

Found on training scenarios, confirmed on held-out themes, steered beside latents of like sparsity and maximum, and
beside random directions of the same norm. The report says so when nothing passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from scipy import sparse

from emocircuits._figures import number
from emocircuits.activations.sites import Key, expand_layers
from emocircuits.activations.store import ActivationStore
from emocircuits.artefact import write_json_atomic, write_text_atomic
from emocircuits.card import fluency_limits, scenario_prompts, written
from emocircuits.data.emotions import EKMAN6
from emocircuits.data.problems import few_shot_prompt, load_problems
from emocircuits.data.prompts import SPEECH
from emocircuits.data.scenarios import ScenarioSet, discovery, heldout
from emocircuits.evaluation import scoring
from emocircuits.evaluation.fluency import FluencyThresholds
from emocircuits.evaluation.judges import EmbeddingJudge
from emocircuits.evaluation.statistics import holm, paired_test, rank_correlation
from emocircuits.generation import Decoding
from emocircuits.models.anatomy import resolve
from emocircuits.models.fingerprint import fingerprint
from emocircuits.models.load import Loaded
from emocircuits.reasoning.steps import split
from emocircuits.reasoning.traces import Steps, Trace
from emocircuits.runs import Run
from emocircuits.steering import Steerer

from .collect import collect
from .features import Activity, Enrichment, encode_all, enrichment, logit_lens, top_steps
from .geometry import coactivation, layout, separation
from .metrics import baselines, quality, stability
from .recipe import Recipe
from .splice import recovery
from .steering import latent_steerer, matched_latents
from .tables import markdown
from .train import Trained, train
from .vectors import Vectors, is_sink, stored, without_sinks

DOSES = (-1.0, -0.5, 0.5, 1.0, 1.5)
SPLICED = 6
"""Held-out scenarios whose loss is measured with the SAE spliced in, at most."""


@dataclass(frozen=True)
class Plan:
    """All that determines a run. layer: of resid_post. seeds: dictionaries trained, the first one is read and steered.

    scenarios: so many training scenarios (None: all). steer: held-out scenarios per dose; 0 leaves steering out.
    samples: texts of each of the other scenarios, at the chosen dose.
    """

    layer: int = 12
    width: int = 1024
    k: int = 16
    epochs: int = 30
    seeds: int = 3
    scenarios: int | None = None
    shuffles: int = 500
    steer: int = 10
    matched: int = 2
    samples: int = 3
    max_new_tokens: int = 26
    seed: int = 0


def emotion_traces(scenarios: ScenarioSet, n: int | None = None) -> list[Trace]:
    """Each reply to a scenario in each emotion as a trace: its label is the emotion, its id scenario/emotion.

    The scenario itself is left out: what a reply says is all that there is to read.
    """
    return [
        Trace(SPEECH.lstrip(), steps, labels=(emotion,) * len(steps), id=f"{group.skeleton_id}/{emotion}")
        for group, replies in scenarios.reply_groups()[:n]
        for emotion, reply in replies.items()
        for steps in [split(reply)]
    ]


def reasoning_traces() -> list[Trace]:
    """The hand-written solutions of the emotional problems, with the appraisal of every sentence."""
    made = []
    for problem in load_problems():
        steps, prompt = Steps.of(f" {sentence}" for sentence in problem.sentences), few_shot_prompt(problem, ())
        made.append(Trace(prompt, steps, labels=problem.labels, id=f"problem/{problem.id}"))
    return made


# ---------------------------------------------------------------- steps of a store as rows of codes


@dataclass(frozen=True)
class Coded:
    """One row of codes [n, d_sae] per step (its tokens' maximum), with label, trace and text of each."""

    codes: Any
    records: list[Mapping[str, Any]]

    def only(self, prefix: str, without: bool = False) -> Coded:
        """Steps of the traces whose id begins with `prefix` (or, `without`, of the others)."""
        kept = [i for i, r in enumerate(self.records) if str(r["trace"]).startswith(prefix) != without]
        return Coded(self.codes[kept], [self.records[i] for i in kept])

    def whole_texts(self) -> Coded:
        """One row per trace instead, the maximum over its steps: steps of one reply are not independent."""
        return _pooled(self.codes, self.records, [str(r["trace"]) for r in self.records])


def coded(sae: Any, store: ActivationStore, key: tuple[str, int]) -> Coded:
    """Codes of a store with a row per token, pooled by step; sinks are left out, as in training."""
    x = store[key][:].float()
    keep = (~is_sink(x)).nonzero()[:, 0].tolist()
    records = [store.meta[i] for i in keep]
    return _pooled(encode_all(sae, x[keep]), records, [f"{r['trace']}\0{r['step']}" for r in records])


def _pooled(codes: Any, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Coded:
    _, first, group = np.unique(np.array(names), return_index=True, return_inverse=True)
    ordered = np.argsort(group, kind="stable")
    cuts = np.searchsorted(group[ordered], np.arange(len(first) + 1))
    rows = [codes[ordered[a:b]].max(0) for a, b in zip(cuts, cuts[1:])]
    return Coded(sparse.vstack(rows, format="csr"), [records[i] for i in first])


def scenario_of(record: Mapping[str, Any]) -> str:
    """What a row's label is shuffled within: its scenario, so that no topic counts as an emotion."""
    return str(record["trace"]).rpartition("/")[0]


# ---------------------------------------------------------------- the run


def run_demo(loaded: Loaded, out: str | Path, plan: Plan | None = None, progress: Progress | None = None) -> Path:
    """Collect, train, read and steer into the run folder `out`; returns sae.json, the tables of it all.

    An interrupted run goes on where it was. Raises InputError for a layer that the model does not have.
    """
    plan = Plan() if plan is None else plan
    expand_layers([plan.layer], resolve(loaded.model).n_layers)  # raises InputError for a layer that is not there
    run = Run(out, {"kind": "sae", "model": fingerprint(loaded.model), "plan": asdict(plan)})
    key = ("resid_post", plan.layer)
    replies = emotion_traces(discovery(), plan.scenarios)
    stores = {
        "train": _collected(run, loaded, "train", [*replies, *reasoning_traces()], plan, progress),
        "heldout": _collected(run, loaded, "heldout", emotion_traces(heldout(), plan.scenarios), plan, progress),
    }
    trained = [_trained(run, stores["train"], plan, seed) for seed in range(plan.seeds)]
    sae = trained[0].sae
    known, unseen = (coded(sae, stores[name], key) for name in ("train", "heldout"))
    emotional = cache(partial(_emotional, known.only("problem/", without=True), plan))
    report = {
        "plan": asdict(plan), "quality": run.json_stage("quality", lambda: _quality(loaded, trained, stores, plan)),
        "features": run.json_stage("features", lambda: _features(loaded, sae, known, unseen, plan, emotional)),
        "geometry": run.json_stage("geometry", lambda: _geometry(sae, known, plan, emotional)),
    }  # fmt: skip
    found = report["features"]["emotions"]
    chosen = {e: rows[0]["latent"] for e, rows in found.items() if rows and rows[0]["replicates"]}
    if plan.steer:
        activity, settings = Activity.of(known.codes), plan
        write = partial(
            written, model=loaded.model, tokenizer=loaded.tokenizer, batch_size=48, seed=plan.seed,
            decoding=Decoding(plan.max_new_tokens, 12), progress=progress,
        )  # fmt: skip
        limits = cache(partial(fluency_limits, write, plan.steer))  # of the unsteered model: the same for all latents

        def steered(emotion: str, latent: int) -> dict[str, Any]:
            arms = _Arms.of(loaded, sae, key, latent, emotion, activity, found, write, limits, settings)
            first = run.json_stage(f"steer_{emotion}", lambda: _steered(arms))
            return {
                **first,
                "confirmed": run.json_stage(f"confirm_{emotion}", lambda: _confirmed(arms, first["best_dose"])),
            }

        report["steering"] = {emotion: steered(emotion, latent) for emotion, latent in chosen.items()}
    return run.stage(
        "sae", ["sae.json", "sae.md"], lambda: _write(run, report, loaded.name), lambda: run.file("sae.json")
    )  # fmt: skip


def _write(run: Run, report: Mapping[str, Any], model: str) -> None:
    write_json_atomic(run.file("sae.json"), report)
    write_text_atomic(run.file("sae.md"), markdown(report, model))


def _collected(
    run: Run, loaded: Loaded, name: str, traces: Sequence[Trace], plan: Plan, progress: Progress | None
) -> ActivationStore:
    path = run.file(f"store_{name}")
    return collect(
        loaded.model, loaded.tokenizer, traces, path, layers=[plan.layer], reduce="all", resume=True, progress=progress
    )


def _trained(run: Run, store: ActivationStore, plan: Plan, seed: int) -> Trained:
    recipe = Recipe("topk", plan.width, plan.k, epochs=plan.epochs, seed=seed)
    vectors: list[Vectors] = [without_sinks(v) for v in stored(store)]
    return train(vectors, recipe, run.file(f"saes/seed_{seed}"), resume=True, progress=False)["resid_post", plan.layer]


def _quality(
    loaded: Loaded, trained: Sequence[Trained], stores: Mapping[str, ActivationStore], plan: Plan
) -> dict[str, Any]:
    """Held-out themes, baselines on the same vectors, agreement of seeds, and the loss when spliced into the model."""
    key = ("resid_post", plan.layer)
    fit, test = (without_sinks(stored(stores[name])[0]).read() for name in ("train", "heldout"))
    traces = emotion_traces(heldout(), min(SPLICED, plan.scenarios or SPLICED))
    spliced = recovery(loaded.model, loaded.tokenizer, traces, trained[0].sae, key, at="all")
    decoders = [t.sae.W_dec.detach() for t in trained]
    agree = stability(decoders, plan.seed) if len(decoders) > 1 else None
    return {
        "vectors": len(fit), "held_out_themes": quality(trained[0].sae, test).as_dict(),
        "baselines": {name: q.as_dict() for name, q in baselines(fit, test, plan.width, plan.k, plan.seed).items()},
        "stability": {"mean_matched_cosine": agree.mean, "random": agree.null} if agree else None,
        "recovered": spliced.recovered, "kl_recovered": spliced.kl_recovered, "tokens_scored": spliced.n,
    }  # fmt: skip


def _features(
    loaded: Loaded, sae: Any, known: Coded, unseen: Coded, plan: Plan, emotional: Callable[[], Enrichment]
) -> dict[str, Any]:
    """Latents that go with an emotion on training scenarios, whether they do so on held-out themes, and appraisals."""
    found, again = emotional(), _emotional(unseen, plan)
    steps = known.only("problem/")
    appraisal = enrichment(
        steps.codes, [r["label"] for r in steps.records], [r["trace"] for r in steps.records],
        shuffles=plan.shuffles, seed=plan.seed,
    )  # fmt: skip
    best = {emotion: found.of(emotion)[:8] for emotion in found.labels if emotion in EKMAN6}
    kinds = {label: appraisal.of(label)[:4] for label in appraisal.labels}
    shown = sorted({i for latents in (*best.values(), *kinds.values()) for i in latents})
    rows = sae.W_dec[shown].detach().float()
    lens = logit_lens(loaded.model, loaded.tokenizer, rows, 8) if shown else []
    words = {i: [word for word, _ in said] for i, said in zip(shown, lens)}
    return {
        "emotions": {e: [_row(known, i, e, words[i], found, again) for i in latents] for e, latents in best.items()},
        "counts": {e: len(found.of(e)) for e in found.labels},
        "appraisals": {
            label: [{"latent": i, "q": float(appraisal.q[i, c]), "lift": float(appraisal.lift[i, c]),
                     "words": words[i][:6]} for i in kinds[label]]
            for c, label in enumerate(appraisal.labels)
        },
    }  # fmt: skip


def _geometry(sae: Any, known: Coded, plan: Plan, emotional: Callable[[], Enrichment]) -> dict[str, Any]:
    """A map of the decoder, whether latents of one emotion lie together, and latents that fire together."""
    steps = known.only("problem/", without=True)
    found = emotional()
    significant = np.where(found.q <= 0.05, found.z, -np.inf)
    kinds = [found.labels[i] if z[i] > 0 else None for z in significant for i in [int(z.argmax())]]
    rows = sae.W_dec.detach().float()
    apart = len({kind for kind in kinds if kind is not None}) > 1
    pairs = coactivation(steps.codes, [r["trace"] for r in steps.records], rows, top=20)
    return {
        "places": layout(rows, seed=plan.seed).round(3).tolist(), "kinds": kinds,
        "separation": asdict(separation(rows, kinds, shuffles=plan.shuffles, seed=plan.seed)) if apart else None,
        "together": [{**asdict(pair), "lift": pair.lift} for pair in pairs],
    }  # fmt: skip


def _emotional(given: Coded, plan: Plan) -> Enrichment:
    whole = given.whole_texts()
    return enrichment(
        whole.codes, [r["label"] for r in whole.records], [scenario_of(r) for r in whole.records],
        shuffles=plan.shuffles, seed=plan.seed,
    )  # fmt: skip


def _row(
    known: Coded, latent: int, emotion: str, words: Sequence[str], found: Enrichment, again: Enrichment
) -> dict[str, Any]:
    here, there = found.labels.index(emotion), again.labels.index(emotion)
    p, top = float(again.p[latent, there]), top_steps(known.codes, known.records, latent, 5)
    return {
        "latent": latent, "lift": float(found.lift[latent, here]), "z": float(found.z[latent, here]),
        "q": float(found.q[latent, here]), "held_out_lift": number(float(again.lift[latent, there])),
        "held_out_p": number(p), "replicates": p <= 0.05 and bool(again.z[latent, there] > 0), "words": list(words),
        "top": [{"activation": a, "label": r["label"], "text": r["text"]} for a, r in top],
    }  # fmt: skip


@dataclass(frozen=True)
class _Arms:
    """A latent's steerer beside its controls, and how their texts are written and scored."""

    emotion: str
    latent: int
    others: list[int]
    steerers: Mapping[str, Steerer]
    write: Callable[..., list[Any]]
    limits: Callable[[], FluencyThresholds]
    plan: Plan

    @classmethod
    def of(
        cls, loaded: Loaded, sae: Any, key: Key, latent: int, emotion: str, activity: Activity,
        features: Mapping[str, Sequence[Mapping[str, Any]]], write: Callable[..., list[Any]],
        limits: Callable[[], FluencyThresholds], plan: Plan,
    ) -> _Arms:  # fmt: skip
        same = [row["latent"] for row in features[emotion]]
        others = matched_latents(sae, activity, latent, plan.matched, exclude=same, seed=plan.seed)
        made = {i: latent_steerer(loaded.model, sae, key, i, activity, positions="all") for i in (latent, *others)}
        arms = {"steered": made[latent], "random": made[latent].randomised(plan.seed)}
        arms |= {f"matched {i}": made[i] for i in others}
        return cls(emotion, latent, others, arms, write, limits, plan)

    def scored(self, prompts: Sequence[dict[str, Any]], doses: Sequence[float]) -> dict[tuple[str, float], list[Any]]:
        """Scored texts of every arm at every dose, and of no steering, in the order of the prompts."""
        cells = [("none", 0.0, None), *((name, d, d * s) for d in doses for name, s in self.steerers.items())]
        rows = [{**p, "method": m, "dose": d, "emotion": self.emotion} for m, d, _ in cells for p in prompts]
        rows = self.write(rows, [s for *_, s in cells for _ in prompts], title=f"latent {self.latent}")
        found, n = scoring.score_rows(rows, EmbeddingJudge(seed=self.plan.seed), self.limits()), len(prompts)
        return {(m, d): found[i * n : (i + 1) * n] for i, (m, d, _) in enumerate(cells)}


def _steered(arms: _Arms) -> dict[str, Any]:
    """Dose-response of a latent, of a random direction of its norm, and of latents like it that mean something else."""
    found = arms.scored(scenario_prompts(heldout(), arms.plan.steer), DOSES)
    cells = {(m, d): _cell(rows, m, d, arms.plan.seed) for (m, d), rows in found.items()}
    doses = sorted({*DOSES, 0.0})
    rates = [cells["steered" if d else "none", d]["expression"]["estimate"] for d in doses]
    return {
        "latent": arms.latent, "matched": arms.others, "cells": list(cells.values()),
        "rises": number(rank_correlation(doses, rates)),
        "best_dose": max((d for d in DOSES if d > 0), key=lambda d: cells["steered", d]["coherent"]["estimate"] or 0.0),
    }  # fmt: skip


def _confirmed(arms: _Arms, dose: float) -> dict[str, Any]:
    """The chosen dose on the held-out scenarios that did not choose it: paired tests by scenario (Holm)."""
    used = {p["skeleton_id"] for p in scenario_prompts(heldout(), arms.plan.steer)}
    fresh = [p for p in scenario_prompts(heldout(), 10**6) if p["skeleton_id"] not in used]
    prompts = [p for p in fresh for _ in range(arms.plan.samples)]
    found = arms.scored(prompts, [dose])
    clusters = [p["skeleton_id"] for p in prompts]
    own, *rivals = [("steered", dose), ("none", 0.0), *((n, dose) for n in arms.steerers if n != "steered")]
    rates = {m: np.array([float(r["coherent"]) for r in found[m, d]]) for m, d in (own, *rivals)}
    tests = {m: paired_test(rates["steered"], rates[m], clusters, seed=arms.plan.seed) for m, _ in rivals}
    p = dict(zip(tests, holm([t.p for t in tests.values()]).tolist()))
    return {
        "dose": dose, "scenarios": len(fresh), "texts": len(prompts),
        "cells": [_cell(found[m, d], m, d, arms.plan.seed) for m, d in (own, *rivals)],
        "differences": {m: {"p": p[m], **asdict(t.difference)} for m, t in tests.items()},
        "survives_every_control": all(p[m] <= 0.05 and t.difference.estimate > 0 for m, t in tests.items()),
    }  # fmt: skip


def _cell(rows: Sequence[dict[str, Any]], method: str, dose: float, seed: int) -> dict[str, Any]:
    rates = (("coherent", "coherent"), ("expression", "expressed"), ("degenerate", "degenerate"))
    return {
        "method": method, "dose": dose, **{name: scoring.interval(rows, key, seed) for name, key in rates},
        "perplexity": scoring.median(rows), "example": str(rows[0]["text"]).strip(),
    }  # fmt: skip

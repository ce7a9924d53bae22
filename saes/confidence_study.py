"""`emocircuits sae confidence`: what a confidence vector does to entropy and to answers, beside controls of its norm.

Answers are those to our emotional problems that nothing was learned from: likelihood of the six emotions behind the
hand-written reasoning, with the ends of its steps pushed. Doses are in residual norms, five of either sign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import normalize

from emocircuits.activations import Add, edit
from emocircuits.activations.sites import Key
from emocircuits.activations.upper import UpperLayers
from emocircuits.artefact import write_json_atomic, write_text_atomic
from emocircuits.data.emotions import EKMAN6
from emocircuits.data.scenarios import discovery
from emocircuits.evaluation.statistics import clustered_bootstrap, holm, paired_test
from emocircuits.models.fingerprint import fingerprint
from emocircuits.models.load import Loaded
from emocircuits.multimodal.balance import Answers
from emocircuits.reasoning.prefixes import Prefixes
from emocircuits.reasoning.study import Plan as ProblemPlan
from emocircuits.reasoning.study import emotional_answers, problem_traces
from emocircuits.reasoning.tokens import trace_tokens
from emocircuits.reasoning.traces import Trace
from emocircuits.runs import Run
from emocircuits.serving.batch import Decoder

from . import study
from .collect import collect
from .confidence import Confidence, Settings, agreement, confidence_vector
from .mixture import fitted
from .recipe import Recipe
from .steering import unit
from .tables import confidence_markdown
from .tokens import place_steps
from .train import Trained, train
from .vectors import stored, without_sinks

DOSES = tuple(sign * size for sign in (-1, 1) for size in (0.05, 0.1, 0.2, 0.4, 0.8))


@dataclass(frozen=True)
class Plan:
    """All that determines a run. learned: its `top` latents steer, too. seeds: vectors learned, the first one steers.

    draws: random directions beside it. mixed: latents of the mixture. problems: at most so many (None: all that
    nothing was learned from). layer, width, k, epochs, scenarios: of the small SAE that is trained where none is given.
    """

    learned: Settings = field(default_factory=lambda: Settings(iterations=100, batch=32, held_out=0.5, draws=3))
    seeds: int = 2
    doses: tuple[float, ...] = DOSES
    draws: int = 2
    mixed: int = 3
    problems: int | None = None
    layer: int = 12
    width: int = 512
    k: int = 16
    epochs: int = 15
    scenarios: int = 30
    seed: int = 0


def run_confidence(
    loaded: Loaded,
    out: str | Path,
    *,
    sae: str | Path | None = None,
    traces: Sequence[Trace] | None = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Path:
    """Learn, measure and steer into the run folder `out`; returns confidence.json, the tables of it all.

    sae: folder of a trained one (default: a small one of our texts is trained). traces: to learn from (default: the
    solutions of our emotional problems). An interrupted run goes on where it was.
    """
    plan = plan or Plan()
    given = {"sae": None if sae is None else str(sae), "texts": None if traces is None else [t.id for t in traces]}
    run = Run(out, {"kind": "confidence", "model": fingerprint(loaded.model), "plan": asdict(plan), **given})
    trained = Trained.load(sae) if sae is not None else _small_sae(run, loaded, plan, progress)
    steps = study.reasoning_traces() if traces is None else list(traces)
    found = [_learned(run, loaded, steps, trained, plan, seed, progress) for seed in range(plan.seeds)]
    report = {
        "plan": asdict(plan),
        "sae": {"site": trained.key[0], "layer": trained.key[1], **{n: trained.quality[n] for n in QUALITY}},
        "vector": _described(found, trained.sae, plan),
        "said": run.json_stage("said", lambda: _said(loaded, found[0], steps)),
        "answers": run.json_stage("answers", lambda: _answers(loaded, found[0], trained, steps, plan, progress)),
    }

    def write() -> None:
        write_json_atomic(run.file("confidence.json"), report)
        write_text_atomic(run.file("confidence.md"), confidence_markdown(report, loaded.name))

    return run.stage("confidence", ["confidence.json", "confidence.md"], write, lambda: run.file("confidence.json"))


QUALITY = ("n", "explained_variance", "l0", "dead")


def _small_sae(run: Run, loaded: Loaded, plan: Plan, progress: Progress | None) -> Trained:
    traces = [*study.emotion_traces(discovery(), plan.scenarios), *study.reasoning_traces()]
    store = collect(
        loaded.model, loaded.tokenizer, traces, run.file("store"), layers=[plan.layer], reduce="all", resume=True,
        progress=progress,
    )  # fmt: skip
    recipe = Recipe("topk", plan.width, plan.k, epochs=plan.epochs, seed=plan.seed)
    vectors = [without_sinks(v) for v in stored(store)]
    return train(vectors, recipe, run.file("sae"), resume=True, progress=False)["resid_post", plan.layer]


def _learned(
    run: Run, loaded: Loaded, traces: Sequence[Trace], trained: Trained, plan: Plan, seed: int,
    progress: Progress | None,
) -> Confidence:  # fmt: skip
    settings = Settings(**{**asdict(plan.learned), "seed": seed})
    name = f"vector_{seed}.safetensors"

    def make() -> None:
        made = confidence_vector(
            loaded.model, loaded.tokenizer, traces, trained.sae, trained.key, settings, progress=progress
        )
        made.save(run.file(name))

    return run.stage(f"vector_{seed}", [name], make, lambda: Confidence.load(run.file(name)))


def _described(found: Sequence[Confidence], sae: Any, plan: Plan) -> dict[str, Any]:
    first = found[0]
    top, whole = first.direction(sae, plan.learned.top), first.direction(sae)
    cosines = agreement(found)
    return {
        "length": first.length, "norm": first.norm, "cosines": dict(first.cosines),
        "seeds": [float(cosines[i, j]) for j in range(len(found)) for i in range(j)],
        "effects": {part: {n: asdict(e) for n, e in arms.items()} for part, arms in first.effects.items()},
        "history": [first.history[0], first.history[-1]],
        "top": [{"latent": i, "offset": s, "share": share} for i, s, share in first.top(sae, plan.learned.top)],
        "top_cosine": float(top @ whole),
    }  # fmt: skip


@torch.no_grad()
def _said(loaded: Loaded, found: Confidence, traces: Sequence[Trace]) -> dict[str, Any]:
    """The likeliest next tokens at held-out step ends, and how many stay the same: sure of what?"""
    items = [i for i in place_steps(loaded.model, loaded.tokenizer, traces, "closing") if i.trace in found.held_out]
    upper = UpperLayers.read(loaded.model, found.key, [i.ids for i in items], [[a for a, _ in i.read] for i in items])
    dense = found.vector.norm() * normalize(found.dense, dim=0)
    arms = {"none": 0 * dense, "offset": found.vector, "mirrored": -found.vector, "dense": dense}
    parts = torch.arange(len(upper)).split(32)
    top = {
        name: torch.cat([upper.logits(i, upper.residual[i].float() + v).argmax(-1).cpu() for i in parts])
        for name, v in ((name, v.to(upper.residual.device)) for name, v in arms.items())
    }
    return {
        name: {
            "unchanged": float((tokens == top["none"]).double().mean()),
            "distinct": len(set(tokens.tolist())),
            "common": [
                {"token": loaded.tokenizer.decode([token]), "share": n / len(upper)}
                for token, n in Counter(tokens.tolist()).most_common(3)
            ],
        }
        for name, tokens in top.items()
    }


# ---------------------------------------------------------------- answers


@dataclass(frozen=True)
class Asked:
    """A problem before its answer: tokens, the closing tokens of its steps, where its reasoning begins, the answer."""

    ids: list[int]
    ends: list[tuple[int, int]]
    start: int
    truth: str
    theme: str

    @classmethod
    def of(cls, loaded: Loaded, trace: Trace, theme: str) -> Asked:
        stem = emotional_answers().stem
        ids, bounds = trace_tokens(loaded.tokenizer, trace, stem)
        whole = Trace(trace.prompt, trace.steps, stem, id=trace.id)
        (placed,) = place_steps(loaded.model, loaded.tokenizer, [whole], "closing")
        return cls(ids, placed.read, bounds[0], str(trace.truth), theme)


@torch.no_grad()
def ask(
    loaded: Loaded, asked: Sequence[Asked], vectors: Sequence[Tensor], key: Key, progress: Progress | None = None
) -> Tensor:
    """Log-probabilities [problems, rows, 6] of the emotions, with each row [d] of a problem's vectors at step ends.

    Nothing of a problem is computed twice: what comes before its reasoning is read once, for all rows.
    """
    answers = Answers.of_words(loaded.tokenizer, dict(zip(EKMAN6, emotional_answers().texts)))
    prefixes, found = Prefixes(Decoder(loaded.model)), []
    task = progress.add_task("answers", total=len(asked)) if progress else None
    for one, rows in zip(asked, vectors):
        n = len(rows)
        inputs = {
            "input_ids": torch.tensor([one.ids[one.start :]]).expand(n, -1),
            "attention_mask": torch.ones(n, len(one.ids), dtype=torch.long),
            "past_key_values": prefixes.rows(prefixes.read(one.ids[: one.start]), n),
            "use_cache": True,
        }
        with edit(loaded.model, [Add(site=key[0], layer=key[1], vector=rows, positions=[one.ends] * n)]):
            found.append(answers.scores(loaded.model, inputs).float().cpu())
        if progress is not None and task is not None:
            progress.advance(task)
    return torch.stack(found)


def _answers(
    loaded: Loaded, found: Confidence, trained: Trained, steps: Sequence[Trace], plan: Plan, progress: Progress | None
) -> dict[str, Any]:
    """Accuracy, chance of the right answer and entropy of the answers, by dose, for the vector and its controls."""
    from emocircuits.data.problems import load_problems

    themes = {p.id: p.theme for p in load_problems()}
    learned_from = {t.id.removeprefix("problem/") for t in steps if t.id not in found.held_out}
    traces = [t for t in problem_traces(loaded, ProblemPlan(seed=plan.seed), None, "written")]
    traces = [t for t in traces if t.id not in learned_from][: plan.problems]
    asked = [Asked.of(loaded, t, themes[t.id]) for t in traces]
    w = torch.stack([found.direction(trained.sae), found.direction(trained.sae, plan.learned.top)])
    noise = torch.randn(plan.draws, w.shape[1], generator=torch.Generator().manual_seed(plan.seed))
    doses, w = torch.tensor(plan.doses)[:, None], torch.cat([w, normalize(noise, dim=-1)])
    shared = found.norm * torch.cat([torch.zeros(1, w.shape[1]), *(doses * row for row in w)])
    mixed, coefficients = _mixed(loaded, found, trained, asked, plan)
    scores = ask(loaded, asked, [torch.cat([shared, own]) for own in mixed], found.key, progress)
    none, steered = scores[:, [0]], scores[:, 1 : len(shared)].unflatten(1, (len(w), len(plan.doses)))
    arms = {"vector": steered[:, :1], "top latents": steered[:, 1:2], "random": steered[:, 2:]}
    measure = _Measured.of(asked, plan.seed)
    cells = [measure.cell("none", 0.0, none)]
    cells += [measure.cell(n, dose, x[:, :, i]) for n, x in arms.items() for i, dose in enumerate(plan.doses)]
    names = ("mixture", "another problem's weights", "random directions")
    cells += [measure.cell(n, None, scores[:, [len(shared) + i]]) for i, n in enumerate(names)]
    return {
        "n": len(asked), "themes": len({a.theme for a in asked}), "cells": cells,
        "tests": measure.against(none, arms, plan.doses),
        "coefficients": {"mean": coefficients.mean(0).tolist(), "sd": coefficients.std(0).tolist()},
    }  # fmt: skip


def _mixed(
    loaded: Loaded, found: Confidence, trained: Trained, asked: Sequence[Asked], plan: Plan
) -> tuple[list[Tensor], Tensor]:
    """[3, d_model] per problem: its own mixture of the top latents, another problem's, and its weights on noise."""
    latents = [i for i, _, _ in found.top(trained.sae, plan.mixed)]
    units = unit(loaded.model, found.key, trained.sae.W_dec[latents])
    prompts = [a.ids[: a.start] for a in asked]
    upper = UpperLayers.read(loaded.model, found.key, prompts, [[len(p) - 1] for p in prompts], batch_size=4)
    own = fitted(upper, found.norm * units)
    noise = normalize(torch.randn(units.shape, generator=torch.Generator().manual_seed(plan.seed + 1)), dim=-1)
    each = torch.stack([own @ units, own.roll(1, 0) @ units, own @ noise], 1) * found.norm
    return list(each), own


@dataclass(frozen=True)
class _Measured:
    """What is read off log-probabilities [problems, draws, 6]; draws are averaged within a problem."""

    truth: Tensor
    themes: list[str]
    seed: int

    @classmethod
    def of(cls, asked: Sequence[Asked], seed: int) -> _Measured:
        return cls(torch.tensor([EKMAN6.index(a.truth) for a in asked]), [a.theme for a in asked], seed)

    def correct(self, scores: Tensor) -> np.ndarray:
        """[problems] share of draws whose likeliest answer is right."""
        return (scores.argmax(-1) == self.truth[:, None]).double().mean(1).numpy()

    def cell(self, method: str, dose: float | None, scores: Tensor) -> dict[str, Any]:
        p = scores.exp()
        chance = p.gather(2, self.truth[:, None, None].expand(-1, p.shape[1], 1))[..., 0].mean(1)
        values: dict[str, Callable[[], Any]] = {
            "accuracy": lambda: self.correct(scores),
            "right": lambda: chance.double().numpy(),
            "entropy": lambda: -(p * scores).sum(-1).mean(1).double().numpy(),
        }
        found = {n: asdict(clustered_bootstrap(v(), self.themes, seed=self.seed)) for n, v in values.items()}
        return {"method": method, "dose": dose, **found}

    def against(self, none: Tensor, arms: Mapping[str, Tensor], doses: Sequence[float]) -> list[dict[str, Any]]:
        """Accuracy of what was learned less that of nothing and of random directions, paired; Holm over all of them."""
        made = []
        for name in (n for n in arms if n != "random"):
            for i, dose in enumerate(doses):
                own = self.correct(arms[name][:, :, i])
                for rival, other in (("none", none), ("random", arms["random"][:, :, i])):
                    test = paired_test(own, self.correct(other), self.themes, seed=self.seed)
                    made.append(
                        {"method": name, "dose": dose, "rival": rival, "raw_p": test.p, **asdict(test.difference)}
                    )
        p = holm([row["raw_p"] for row in made])
        return [{**row, "p": float(value)} for row, value in zip(made, p)]

"""The main job, on any model: find emotion directions, test them, steer with them, and say honestly what it costs.

Every stage writes its result into the run folder and is skipped when it is already there, so an interrupted run
resumes and a second run only reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from . import artefact
from .data.emotions import EKMAN6
from .data.prompts import PINNED_DATE, WORDINGS, completion_prompt
from .data.scenarios import ScenarioSet, discovery, heldout, load_sev
from .directions import DirectionSet, fit
from .evaluation import scoring
from .evaluation.fluency import FluencyThresholds, fit_thresholds, kl_on_neutral, perplexity
from .examples import one_valence, prompt_examples, reply_examples, without_opening
from .generation import Decoding, generate
from .models.fingerprint import fingerprint
from .models.load import Loaded, load
from .reading import Example, Features, read, residual_norms
from .runs import Run
from .steering import Steerer

if TYPE_CHECKING:
    from .circuit_study import CircuitPlan

LEXICAL = tuple(w for w in WORDINGS if w.lexical)
NOUN_FREE = tuple(w for w in WORDINGS if not w.lexical)
DOSES = (-1.0, -0.5, 0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Plan:
    """All that determines a run. Strengths are in units of the residual norm, per layer."""

    model: str = "demo"
    emotions: tuple[str, ...] = EKMAN6
    bands: tuple[tuple[float, float], ...] = ((0.2, 0.75),)
    """Layer bands to try, as shares of the model's depth."""
    doses: tuple[float, ...] = (0.09, 0.12, 0.15, 0.19)
    """Total strengths to try, shared evenly between the layers of a band."""
    n_train: int | None = None
    n_validation: int = 12
    n_heldout: int | None = None
    n_baseline: int | None = 20
    """Held-out scenarios on which prompting and the random direction are run; paired with the same steered ones."""
    scenarios: str | None = None
    """SEV file whose scenarios are steered instead of our held-out ones, say a local copy of the public test set."""
    max_new_tokens: int = 26
    batch_size: int = 60
    seed: int = 0
    date: str = PINNED_DATE

    @classmethod
    def small(cls, model: str = "demo") -> Plan:
        """A few scenarios only, for tests: runs through every stage in seconds on a tiny model."""
        return cls(model, n_train=16, n_validation=2, n_heldout=4, doses=(0.2, 0.4), max_new_tokens=6)


class Demo:
    """The stages of one run; each property reads its file, making it first when it is not there."""

    def __init__(
        self, out: str | Path, plan: Plan, loaded: Loaded | None = None, progress: Progress | None = None
    ) -> None:
        self.plan, self.progress = plan, progress or bars()
        self.run = Run(out, asdict(plan))
        self._loaded = loaded
        self._judge: Any = None
        self.decoding = Decoding(plan.max_new_tokens, min(12, plan.max_new_tokens))
        train, self.validation = discovery().split(by="theme", fraction=0.25, seed=plan.seed)
        self.train = spread(train, plan.n_train)
        self.heldout = spread(heldout(), plan.n_heldout)
        self.written_on = spread(load_sev(plan.scenarios), plan.n_heldout) if plan.scenarios else self.heldout

    @property
    def loaded(self) -> Loaded:
        """The model, loaded when the first stage needs it."""
        if self._loaded is None:
            self._loaded = load(self.plan.model)
        return self._loaded

    @property
    def judge(self) -> Any:
        """The judge of expression; it reads texts only and never the target."""
        if self._judge is None:
            from .evaluation.judges import EmbeddingJudge

            self._judge = EmbeddingJudge(seed=self.plan.seed)
        return self._judge

    def execute(self, circuits: CircuitPlan | None = None) -> Path:
        """Run every stage and write report.html; returns its path. circuits: settings of the circuit part."""
        from .circuit_study import CircuitPlan, CircuitStudy
        from .report import write_report

        with self.progress:
            self.quality()
            self.tuning()
            self.texts()
            self.evaluation()
            self.dose()
            self.steerers()
            CircuitStudy(self, circuits or CircuitPlan()).execute()

        return write_report(self.run.path)

    # -- reading -------------------------------------------------------------------------------------------------

    def features(self, name: str, examples: Callable[[], list[Example]], position: str) -> Features:
        """Readings of one example set at resid_post of every layer, kept in the run folder."""
        file = f"features/{name}.safetensors"

        def make() -> None:
            model, tokenizer = self.loaded
            found = read(model, tokenizer, examples(), position=position, progress=self.progress)
            save_features(self.run.file(file), found)

        return self.run.stage(f"features.{name}", [file], make, lambda: load_features(self.run.file(file)))

    def replies(self, held_out: bool) -> Features:
        """Mean over the tokens of replies that never name their emotion."""
        source = self.heldout if held_out else self.train
        name = f"replies_{'heldout' if held_out else 'train'}"
        return self.features(name, lambda: reply_examples(source, self.plan.emotions), "response_mean")

    def reply_tails(self) -> Features:
        """Held-out replies read after their first three words."""
        examples = lambda: without_opening(reply_examples(self.heldout, self.plan.emotions))  # noqa: E731
        return self.features("replies_tails", examples, "response_mean")

    def prompts(self, which: str) -> Features:
        """Last prompt token of prompts that ask for the emotion: "train", "heldout", or "nounfree" (held out)."""
        source = self.train if which == "train" else self.heldout
        wordings = NOUN_FREE if which == "nounfree" else LEXICAL
        return self.features(
            f"prompts_{which}", lambda: prompt_examples(source, self.plan.emotions, wordings), "last_prompt"
        )

    def norms(self) -> Tensor:
        """Mean residual norm of a token at each layer [n_layers]: the unit of strength."""

        def make() -> list[float]:
            texts = [e.prompt + e.response for e in reply_examples(self.train, self.plan.emotions)[:64]]
            return residual_norms(self.loaded.model, self.loaded.tokenizer, texts).tolist()

        return torch.tensor(self.run.json_stage("norms", make))

    def directions(self, name: str = "response_mean") -> DirectionSet:
        """Directions fitted on the training themes only; "response_mean" steers, "last_prompt" is the published way."""
        file = f"directions_{name}.safetensors"

        def make() -> None:
            features = self.replies(False) if name == "response_mean" else self.prompts("train")
            made = fit(features, self.plan.emotions, norms=self.norms(), fingerprint=fingerprint(self.loaded.model))
            made.save(self.run.file(file))

        return self.run.stage(f"directions.{name}", [file], make, lambda: DirectionSet.load(self.run.file(file)))

    def quality(self) -> dict[str, Any]:
        """Direction quality by layer: held-out themes, unseen wordings, transfer, nulls, reliability, confounds."""
        from .demo_quality import measure

        return self.run.json_stage("quality", lambda: measure(self))

    # -- steering ------------------------------------------------------------------------------------------------

    def layers(self, band: tuple[float, float]) -> list[int]:
        """Layers of a band given as shares of the depth."""
        n = len(self.directions().layers)
        return list(range(round(band[0] * n), max(round(band[1] * n), round(band[0] * n) + 1)))

    def prompts_of(self, scenarios: ScenarioSet, n: int | None = None) -> list[dict[str, Any]]:
        """Prompt rows, one per scenario, valences taking turns; n of them are the same rows as among all of them."""
        groups = one_valence(scenarios)
        groups = groups if n is None or n >= len(groups) else [groups[i] for i in evenly(len(groups), n)]
        keep = ("skeleton_id", "theme", "valence")
        return [{**{k: getattr(g, k) for k in keep}, "prompt": completion_prompt(g), "group": g} for g in groups]

    def write(self, rows: list[dict[str, Any]], steerers: Sequence[Steerer | None], title: str) -> list[dict[str, Any]]:
        """Rows with `text` and its perplexity under the unsteered model given the plain prompt."""
        model, tokenizer = self.loaded
        asked = [row.get("asked", row["prompt"]) for row in rows]
        texts = generate(
            model, tokenizer, asked, steerers, decoding=self.decoding, batch_size=self.plan.batch_size,
            seed=self.plan.seed, progress=self.progress, title=title,
        )  # fmt: skip
        ppl = perplexity(model, tokenizer, [r["prompt"] for r in rows], texts)
        hidden = ("asked", "group")
        return [
            {**{k: v for k, v in row.items() if k not in hidden}, "text": text, "perplexity": scoring.number(p)}
            for row, text, p in zip(rows, texts, ppl)
        ]

    def thresholds(self) -> FluencyThresholds:
        """The coherence gate, fixed on unsteered texts of the validation scenarios before anything is steered."""

        def make() -> dict[str, Any]:
            rows = self.prompts_of(self.validation)
            rows = self.write(rows, [None] * len(rows), "unsteered (validation)")
            limits = fit_thresholds([r["text"] for r in rows], [r["perplexity"] for r in rows])
            return asdict(limits)

        return FluencyThresholds(**self.run.json_stage("thresholds", make))

    def scored(
        self, rows: list[dict[str, Any]], steerers: Sequence[Steerer | None], title: str
    ) -> list[dict[str, Any]]:
        """Write, then judge."""
        limits = self.thresholds()
        return scoring.score_rows([_nan(r) for r in self.write(rows, steerers, title)], self.judge, limits)

    def tuning(self) -> dict[str, Any]:
        """Layers and strength of each emotion, and the wording of the prompting baseline, on validation scenarios."""
        from .demo_tuning import tune

        return self.run.json_stage("tuning", lambda: tune(self))

    def steerer(self, emotion: str, relative: float = 1.0) -> Steerer:
        """The emotion's steerer at `relative` x its chosen strength."""
        chosen = self.tuning()["chosen"][emotion]
        return self.directions().steerer(emotion, relative * chosen["strength"], chosen["layers"])

    def random_steerer(self, emotion: str) -> Steerer:
        """The control: a random direction at the same layers with the same norms."""
        return self.steerer(emotion).randomised(self.plan.seed * 1000 + self.plan.emotions.index(emotion))

    def texts(self) -> list[dict[str, Any]]:
        """Held-out texts of all four methods, with verdicts; each method is a stage of its own."""
        methods = [self._texts_of(m) for m in ("unsteered", "steered", "random", "prompted")]
        file = "texts.jsonl"

        def make() -> None:
            artefact.write_jsonl_atomic(self.run.file(file), [row for rows in methods for row in rows])

        return self.run.stage("texts", [file], make, lambda: artefact.read_jsonl(self.run.file(file)))

    def _texts_of(self, method: str) -> list[dict[str, Any]]:
        file = f"texts/{method}.jsonl"

        def make() -> None:
            self.run.file(file).parent.mkdir(exist_ok=True)
            rows, steerers = self._method_rows(method)
            artefact.write_jsonl_atomic(self.run.file(file), self.scored(rows, steerers, method))

        return self.run.stage(f"texts.{method}", [file], make, lambda: artefact.read_jsonl(self.run.file(file)))

    def _method_rows(self, method: str) -> tuple[list[dict[str, Any]], list[Steerer | None]]:
        """Prompt rows of one method with the steerer of each."""
        n = self.plan.n_baseline if method in ("random", "prompted") else None
        base = [{**r, "method": method} for r in self.prompts_of(self.written_on, n)]
        if method == "unsteered":
            return [{**r, "emotion": None} for r in base], [None] * len(base)
        rows = [{**r, "emotion": e} for e in self.plan.emotions for r in base]
        if method == "prompted":
            wording = next(w for w in WORDINGS if w.name == self.tuning()["prompting"]["wording"])
            asked = [completion_prompt(r["group"], wording.text(r["emotion"])) for r in rows]
            return [{**r, "asked": a} for r, a in zip(rows, asked)], [None] * len(rows)
        build = self.steerer if method == "steered" else self.random_steerer
        by_emotion = {e: build(e) for e in self.plan.emotions}
        return rows, [by_emotion[r["emotion"]] for r in rows]

    def evaluation(self) -> dict[str, Any]:
        """The scores of all methods with intervals, their paired differences, and the judge's own reliability."""
        from .demo_quality import evaluate

        return self.run.json_stage("evaluation", lambda: evaluate(self))

    def steerers(self) -> list[Path]:
        """steerers/EMOTION.safetensors at the chosen strengths, with what each gained and cost on held-out texts."""
        files = [f"steerers/{e}.safetensors" for e in self.plan.emotions]

        def make() -> None:
            found = self.evaluation()
            for emotion, file in zip(self.plan.emotions, files):
                held_out = found["methods"]["steered"]["by_emotion"][emotion]
                cost = {"held_out": held_out, "kl_on_neutral": found["kl_on_neutral"].get(emotion)}
                replace(self.steerer(emotion), cost=cost).save(self.run.file(file))

        return self.run.stage("steerers", files, make, lambda: [self.run.file(f) for f in files])

    def dose(self) -> dict[str, Any]:
        """Expression and cost at five doses of both signs, on validation scenarios."""
        from .demo_tuning import doses

        return self.run.json_stage("dose", lambda: doses(self, DOSES))

    def kl(self) -> dict[str, float | None]:
        """Mean KL(unsteered || steered) per token on neutral texts, per emotion (nats)."""
        from .evaluation.judges import corpus_rows

        model, tokenizer = self.loaded
        neutral = [r["text"] for r in corpus_rows() if r["emotion"] == "neutral" and r["style"] == "plain"][:12]
        return {
            e: scoring.number(kl_on_neutral(model, tokenizer, neutral, partial(self.steerer(e).attach, model)))
            for e in self.plan.emotions
        }


def bars() -> Progress:
    """The progress bars of a run, on standard error."""
    from rich.console import Console

    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def spread(scenarios: ScenarioSet, n: int | None) -> ScenarioSet:
    """`n` scenarios evenly over the set (and so over its themes); all of them when n is None."""
    if n is None or n >= len(scenarios):
        return scenarios
    rows = list(scenarios)
    return ScenarioSet(tuple(rows[i] for i in evenly(len(rows), n)))


def evenly(total: int, n: int) -> list[int]:
    """n of `total` places, spread over them."""
    return [round(i) for i in np.linspace(0, total - 1, n)]


def _nan(row: dict[str, Any]) -> dict[str, Any]:
    return row if row["perplexity"] is not None else {**row, "perplexity": float("nan")}


def save_features(path: Path, features: Features) -> None:
    """Readings as one artefact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {n: getattr(features, n) for n in ("labels", "groups", "themes", "clusters", "site", "layers", "position")}
    artefact.save(path, "features", {"x": features.x}, header)


def load_features(path: Path) -> Features:
    """Readings saved by `save_features`; raises ArtefactError for a damaged file."""
    tensors, h = artefact.load(path, "features")
    names = {n: tuple(h[n]) for n in ("labels", "groups", "themes", "clusters", "layers")}
    return Features(x=tensors["x"], site=h["site"], position=h["position"], **names)

"""The circuit part of the main job: discover circuits, test them against controls, steer with them, compare fairly.

Lives in the `circuits/` folder of a run as a run of its own, so that it resumes and its settings are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import artefact
from .circuits.assemble import Circuit, random_like, top
from .circuits.gradients import attribution
from .circuits.heads import total_effects
from .circuits.influence import reference, sublayer_influence
from .circuits.modulation import all_units, circuit_steerer, norm_matched, written
from .circuits.readout import Readout
from .circuits.units import Units, collect
from .demo import Demo, evenly, spread
from .directions import DirectionSet
from .errors import HookError, unknown
from .examples import one_valence, reply_examples
from .reading import Example, pad
from .runs import Run
from .steering.steerer import Steerer

SAME_SITES = "directions, same sites"
METHODS = ("circuit", "random units", "all units", SAME_SITES)
RULES = ("direct", "attribution")


@dataclass(frozen=True)
class CircuitPlan:
    """Settings of the circuit part. Sizes are shares of all heads and of all neurons."""

    sizes: tuple[tuple[float, float], ...] = ((0.02, 0.001), (0.06, 0.004), (0.25, 0.06))
    chosen: int = 2
    """Which of the sizes steers (a quarter of the heads, as published)."""
    n_read: int | None = 60
    """Training scenarios whose replies give the units' means; all of them when None."""
    n_effect_scenarios: int = 2
    n_curve_scenarios: int = 3
    n_influence_scenarios: int = 8
    strengths: tuple[float, ...] = (1.0, 2.0)
    """Doses to try, in units of the emotion's own mean difference."""
    direction_strengths: tuple[float, ...] = (0.15, 0.3)
    """The same for plain directions, which break the text long before they push as far as the circuit does."""
    methods: tuple[str, ...] = ("circuit", "random units", SAME_SITES)
    n_draws: int = 3
    """Draws of random units; scenarios take turns."""
    n_validation: int = 3
    n_heldout: int = 8
    graph_size: tuple[int, int] = (4, 6)
    """Heads and neurons in each emotion's graph."""
    ks: tuple[int, ...] = ()
    """Numbers of best units whose ablation and enhancement are drawn, anywhere and in each layer."""
    n_stability: int = 0
    """Training scenarios from which circuits are found again, for each other choice of texts; 0: not done."""

    @classmethod
    def full(cls) -> CircuitPlan:
        """The comparison table on all held-out scenarios with every control; about half an hour on two cores."""
        return cls(
            sizes=((0.02, 0.001), (0.06, 0.004), (0.125, 0.016), (0.25, 0.06), (0.5, 0.25)), chosen=3,
            n_read=None, n_effect_scenarios=4, n_curve_scenarios=6, n_influence_scenarios=20,
            strengths=(0.7, 1.0, 1.4, 2.0), direction_strengths=(0.1, 0.2, 0.3), methods=METHODS,
            n_validation=6, n_heldout=40, graph_size=(6, 10), ks=(1, 2, 4, 8, 16, 32, 64, 128),
            n_stability=60,
        )  # fmt: skip

    @classmethod
    def small(cls) -> CircuitPlan:
        """For tests: every stage in seconds on a tiny model."""
        return cls(
            sizes=((0.1, 0.02), (0.4, 0.1)), chosen=1, n_effect_scenarios=1, n_curve_scenarios=2, n_validation=1,
            n_influence_scenarios=2, strengths=(0.5, 1.0), direction_strengths=(0.2,), n_heldout=2,
            graph_size=(2, 3), ks=(1, 4), n_stability=2,
        )  # fmt: skip


class CircuitStudy:
    """The circuit stages of one run; each method reads its file, making it first when it is not there."""

    def __init__(self, demo: Demo, plan: CircuitPlan | None = None) -> None:
        self.demo, self.plan = demo, plan or CircuitPlan()
        self._units: Units | None = None
        settings = asdict(self.plan) | {"demo": asdict(demo.plan)}
        self.run = Run(demo.run.path / "circuits", settings)

    def execute(self) -> None:
        """Run every stage; on a model whose units cannot be told apart, write the reason and stop.

        That is a model without per-head z (linear attention) or without down_proj modules (fused experts).
        """
        try:
            self.units()
        except HookError as error:
            reason = str(error)
            self.run.json_stage("skipped", lambda: {"reason": reason})
            return
        self.discovery()
        self.graphs()
        self.stability()
        self.validation()
        self.evaluation()

    # -- discovery -----------------------------------------------------------------------------------------------

    def units(self) -> Units:
        """Means of all heads and neurons over the training replies, and their exact direct effects."""

        def make() -> None:
            model, tokenizer = self.demo.loaded
            texts = reply_examples(spread(self.demo.train, self.plan.n_read), self.demo.plan.emotions)
            found = collect(
                model, tokenizer, texts, self.demo.directions(), position="response_mean", progress=self.demo.progress
            )
            found.save(self.run.file("units.safetensors"))

        file = "units.safetensors"
        if self._units is None:
            self._units = self.run.stage("units", [file], make, lambda: Units.load(self.run.file(file)))
        return self._units

    def readout(self) -> Readout:
        """The emotion score: projection on the directions at their best layer."""
        quality = self.demo.quality()["sets"][0]
        return Readout.of_directions(self.demo.directions(), quality["best_layer"])

    def texts(self, n: int, held_out: bool = False) -> list[Example]:
        """Replies in every emotion to n scenarios of the validation (or held-out) themes."""
        found = reply_examples(self.demo.heldout if held_out else self.demo.validation, self.demo.plan.emotions)
        names = list(dict.fromkeys(e.cluster for e in found))
        keep = {names[i] for i in evenly(len(names), min(n, len(names)))}
        return [e for e in found if e.cluster in keep]

    def effects(self) -> dict[str, Tensor]:
        """What units do to their texts' own emotion score: heads "exact" [E, L, heads] and by "gradient", "neurons".

        "exact" takes heads out one by one (total effect); the other two are first-order, "neurons" [E, L, d_mlp]. NaN
        in layers after the readout.
        """

        file = "effects.safetensors"

        def make() -> None:
            examples, readout = self.texts(self.plan.n_effect_scenarios), self.readout()
            labels = [self.demo.plan.emotions.index(e.label) for e in examples]
            found = {n: _per_emotion(x, labels)[:, : readout.layer + 1] for n, x in self._effects(examples).items()}
            artefact.save(self.run.file(file), "effects", found, {"readout": readout.what})

        found = self.run.stage("effects", [file], make, lambda: artefact.load(self.run.file(file), "effects")[0])
        later = len(self.demo.directions().layers) - found["exact"].shape[1]
        return {n: torch.nn.functional.pad(x, (0, 0, 0, later), value=torch.nan) for n, x in found.items()}

    def _effects(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        model, readout, units = self.demo.loaded.model, self.readout(), self.units()
        baselines = {site: units.baseline(site) for site in ("z", "mlp_post")}
        parts: dict[str, list[Tensor]] = {"exact": [], "gradient": [], "neurons": []}
        batches, progress = self.batches([e.prompt + e.response for e in examples], 6), self.demo.progress
        task = progress.add_task("ablating heads", total=len(batches)) if progress else None
        for inputs in batches:
            exact = total_effects(
                model, inputs, readout, mode="mean", baseline=baselines["z"], seed=self.demo.plan.seed
            )
            first = attribution(model, inputs, readout, baselines)
            for name, value in (("exact", exact), ("gradient", first["z"]), ("neurons", first["mlp_post"])):
                parts[name].append(value)
            if progress and task is not None:
                progress.advance(task)
        return {name: torch.cat(values) for name, values in parts.items()}

    def batches(self, texts: Sequence[str], size: int) -> list[dict[str, Tensor]]:
        from .data.prompts import encode_prompt

        tokenizer = self.demo.loaded.tokenizer
        ids = [encode_prompt(tokenizer, text) for text in texts]
        out = []
        for start in range(0, len(ids), size):
            rows, mask = pad(ids[start : start + size], "left", 0)
            out.append({"input_ids": rows, "attention_mask": mask})
        return out

    def scores(self, rule: str = "direct", folds: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Heads [E, L, heads] and neurons [E, L, d_mlp] by one of `RULES`.

        "direct": what a unit adds along the emotion's direction, as a share of the residual norm there, so that layers
        compare (the residual of the demo model grows two hundredfold). "attribution": what it does to the
        emotion score, everything downstream included, to first order.
        """
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        if rule == "attribution":
            effects = self.effects()
            return effects["gradient"], effects["neurons"]
        units, norms = self.units(), self.demo.norms()[:, None]
        return units.heads(folds=folds) / norms, units.neurons(folds=folds) / norms

    def counts(self, size: int | None = None) -> list[int]:
        """Heads and neurons of a circuit at one of the plan's sizes (the one that steers when None)."""
        shares = self.plan.sizes[self.plan.chosen if size is None else size]
        return [max(1, round(share * s[0].numel())) for share, s in zip(shares, self.scores())]

    def circuits(self, size: int | None = None, rule: str = "direct") -> dict[str, Circuit]:
        """Each emotion's circuit at one of the plan's sizes; the one by direct effect steers."""
        units, scores, counts = self.units(), self.scores(rule), self.counts(size)
        made = {"fingerprint": units.fingerprint, "provenance": {"seed": self.demo.plan.seed, "ranked_by": rule}}
        return {e: top(e, scores[0][i], scores[1][i], *counts, **made) for i, e in enumerate(units.emotions)}

    def discovery(self) -> dict[str, Any]:
        """circuits.json: scores of heads and neurons, influence of sublayers, overlaps, stability."""
        import json

        from .circuit_results import discovered

        def make() -> None:
            for emotion, circuit in self.circuits().items():
                circuit.save(self.run.file(f"{emotion}.safetensors"))
            artefact.write_json_atomic(self.run.file("circuits.json"), discovered(self))

        files = ["circuits.json", *(f"{e}.safetensors" for e in self.demo.plan.emotions)]
        return self.run.stage("circuits", files, make, lambda: json.loads(self.run.file("circuits.json").read_text()))

    def attention_directions(self) -> DirectionSet:
        """Directions after attention; where attention and MLP are parallel, those after the block."""
        try:
            return self.units().attention_directions(self.demo.directions())
        except HookError:
            return self.demo.directions()

    def influence(self) -> Any:
        """Sublayer influence on neutral prompts, read out with the published kind of reference (five upper layers)."""
        directions = self.demo.directions()
        sets = {"attn": self.attention_directions(), "mlp": directions}
        n = len(directions.layers)
        upper = list(range(round(0.75 * n), max(round(0.93 * n), round(0.75 * n) + 1)))
        texts = [g.text for g in one_valence(self.demo.validation)][: self.plan.n_influence_scenarios]
        model = self.demo.loaded.model
        return sublayer_influence(model, self.batches(texts, 8), sets, reference(list(sets.values()), upper))

    # -- validation and control ----------------------------------------------------------------------------------

    def validation(self) -> dict[str, Any]:
        """curves.json: faithfulness, completeness and enhancement over sizes, beside random and foreign circuits."""
        from .circuit_curves import curves, rank_curves

        if self.plan.ks:
            self.run.json_stage("rank_curves", lambda: rank_curves(self))
        return self.run.json_stage("curves", lambda: curves(self))

    def graphs(self) -> dict[str, Any]:
        """graphs.json: for each emotion how the units that its score needs most feed each other."""
        from .circuit_results import graphs

        return self.run.json_stage("graphs", lambda: graphs(self))

    def stability(self) -> dict[str, Any] | None:
        """stability.json: circuits found again from other scenarios, wordings and readings; None when not planned."""
        from .circuit_stability import stability

        return self.run.json_stage("stability", lambda: stability(self)) if self.plan.n_stability else None

    def random_circuit(self, circuit: Circuit, sizes: bool = False, draw: int = 0) -> Circuit:
        """The control of a circuit: as many other units in the same layers, of the same activation size if asked."""
        units = self.units()
        widths = {"heads": units.z.shape[3], "neurons": units.mlp_post.shape[-1]}
        activity = {"heads": units.mean("z").norm(dim=-1).mean(0), "neurons": units.neuron_size} if sizes else None
        seed = self.demo.plan.seed * 1000 + draw
        return random_like(circuit, widths, units.z.shape[2], sizes=activity, seed=seed)

    def steerer(self, method: str, emotion: str, strength: float, draw: int = 0) -> Steerer:
        """The steerer of one method of the comparison at a multiple of the emotion's own difference."""
        units, circuit = self.units(), self.circuits()[emotion]
        if method == SAME_SITES:
            model = self.demo.loaded.model
            directions = {"attn_out": self.attention_directions(), "mlp_out": self.demo.directions()}
            return norm_matched(circuit, units, model, directions, strength=strength)
        made = {
            "circuit": lambda: circuit,
            "random units": lambda: self.random_circuit(circuit, draw=draw),
            "all units": lambda: all_units(emotion, units),
        }[method]()
        if method == "random units":  # other units differ less between emotions; push as far as the circuit does
            model = self.demo.loaded.model
            own, others = (_norm(written(c, units, model)) for c in (circuit, made))
            strength *= own / others
        return circuit_steerer(made, units, strength=strength)

    def _steerers(self, method: str, emotion: str, strength: float, n: int) -> list[Steerer]:
        """One steerer for each of n scenarios; several draws of random units take turns."""
        draws = self.plan.n_draws if method == "random units" else 1
        made = [self.steerer(method, emotion, strength, draw) for draw in range(min(draws, n))]
        return [made[i % len(made)] for i in range(n)]

    def tuning(self, method: str) -> dict[str, Any]:
        """Each emotion's best strength for one method on validation scenarios, by the rule the demo uses."""
        from .demo_tuning import choose, grouped, summary

        def make() -> dict[str, Any]:
            base = self.demo.prompts_of(self.demo.validation, self.plan.n_validation)
            rows, steerers = [], []
            for strength in self.plan.direction_strengths if method == SAME_SITES else self.plan.strengths:
                for emotion in self.demo.plan.emotions:
                    rows += [{**r, "emotion": emotion, "layers": [], "strength": strength} for r in base]
                    steerers += self._steerers(method, emotion, strength, len(base))
            scored = self.demo.scored(rows, steerers, f"strengths, {method}")
            found = [summary(group) for group in grouped(scored, ("emotion", "strength"))]
            best = {e: choose([c for c in found if c["emotion"] == e])["strength"] for e in self.demo.plan.emotions}
            return {"candidates": found, "chosen": best}

        return self.run.json_stage(f"tuning_{_slug(method)}", make)

    def method_texts(self, method: str) -> list[dict[str, Any]]:
        """Held-out texts of one method at its chosen strengths, with verdicts."""
        file = f"texts_{_slug(method)}.jsonl"

        def make() -> None:
            chosen = self.tuning(method)["chosen"]
            base = self._heldout_prompts()
            rows = [{**r, "method": method, "emotion": e} for e in self.demo.plan.emotions for r in base]
            steerers = [s for e in self.demo.plan.emotions for s in self._steerers(method, e, chosen[e], len(base))]
            artefact.write_jsonl_atomic(self.run.file(file), self.demo.scored(rows, steerers, method))

        return self.run.stage(f"texts.{method}", [file], make, lambda: artefact.read_jsonl(self.run.file(file)))

    def _heldout_prompts(self) -> list[dict[str, Any]]:
        """Rows of the comparison; when they are few, of those that the demo's baselines have too."""
        n, baseline = self.plan.n_heldout, self.demo.plan.n_baseline
        few = baseline if baseline is not None and n < baseline else None
        rows = self.demo.prompts_of(self.demo.written_on, few)
        return rows if n >= len(rows) else [rows[i] for i in evenly(len(rows), n)]

    def evaluation(self) -> dict[str, Any]:
        """evaluation.json: every method on the same held-out scenarios, with paired tests against the circuit."""
        from .circuit_results import evaluate

        return self.run.json_stage("evaluation", lambda: evaluate(self))


def _per_emotion(effects: Tensor, labels: Sequence[int]) -> Tensor:
    """[N, L, heads, E] -> [E, L, heads]: mean effect on the own emotion's score less that on the others'."""
    n = effects.shape[-1]
    own = torch.stack(
        [effects[i, ..., e] - (effects[i].sum(-1) - effects[i, ..., e]) / (n - 1) for i, e in enumerate(labels)]
    )
    return torch.stack([own[[i for i, lab in enumerate(labels) if lab == e]].mean(0) for e in range(n)])


def _norm(pushes: dict[str, Tensor]) -> float:
    return float(torch.cat([p.flatten() for p in pushes.values()]).norm())


def _slug(method: str) -> str:
    return method.replace(",", "").replace(" ", "_")

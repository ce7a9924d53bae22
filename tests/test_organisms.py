"""Discovery finds every planted unit and rejects the distractor that only correlates."""

from __future__ import annotations

import numpy as np
import organisms
import pytest
import torch

from emocircuits.circuits.assemble import by_counts, random_like, top
from emocircuits.circuits.heads import attended_tokens, attribution, total_effects
from emocircuits.circuits.neurons import attribution as neuron_attribution
from emocircuits.circuits.readout import Readout
from emocircuits.circuits.units import collect
from emocircuits.circuits.validate import Condition, ratio_interval, scores
from emocircuits.directions import fit
from emocircuits.errors import InputError
from emocircuits.evaluation.statistics import auroc
from emocircuits.reading import Example, read


def texts(n: int = 24, seed: int = 0) -> list[Example]:
    """Groups that differ in one emotion token, a few words before the end."""
    rng = np.random.default_rng(seed)
    out = []
    for g in range(n):
        words = [f"w{rng.integers(30)}" for _ in range(8)]
        for e in organisms.EMOTIONS:
            text = " ".join([*words[:5], e, *words[5:]])
            out.append(Example(text, e, f"g{g}", theme=f"t{g % 3}", cluster=f"g{g}"))
    return out


@pytest.fixture(scope="module")
def found():
    organism = organisms.planted()
    model, tokenizer = organism.model, organism.tokenizer
    directions = fit(read(model, tokenizer, texts(), position="last_prompt"), organisms.EMOTIONS)
    units = collect(model, tokenizer, texts(), directions)
    behaviour = Readout.of_words(model, tokenizer, {e: [f"={e}"] for e in organisms.EMOTIONS})
    return organism, directions, units, behaviour


def batch(organism, seed: int = 5) -> tuple[dict, list[int]]:
    rows = texts(6, seed)
    ids = [organism.tokenizer(r.prompt)["input_ids"] for r in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long)}, [
        organisms.EMOTIONS.index(r.label) for r in rows
    ]


def mean_own(effects: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """[L, units] mean effect on the text's own emotion."""
    return torch.stack([effects[i, ..., e] for i, e in enumerate(labels)]).mean(0)


def test_the_organism_behaves(found) -> None:
    organism, _, _, behaviour = found
    inputs, labels = batch(organism)
    with torch.no_grad():
        logits = organism.model(**inputs).logits[:, -1, organisms.LABEL : organisms.LABEL + 3]
    assert logits.argmax(-1).tolist() == labels
    assert behaviour.weights.shape == (3, organisms.D_MODEL)


@pytest.mark.parametrize("how", ["zero", "mean", "resample", "gradient"])
def test_total_effects_rank_planted_heads_first(found, how: str) -> None:
    organism, _, units, behaviour = found
    inputs, labels = batch(organism)
    if how == "gradient":
        effects = attribution(organism.model, inputs, behaviour, baseline=units.baseline("z"))
    else:
        effects = total_effects(organism.model, inputs, behaviour, mode=how, baseline=units.baseline("z"))
    own = mean_own(effects, labels)
    truth = np.zeros(own.shape, dtype=bool)
    for head in organism.heads:
        truth[head] = True
    assert auroc(own.flatten().numpy(), truth.flatten()) == 1.0
    assert abs(float(own[organism.distractor])) < 0.02 * float(own[organism.heads[0]])


def test_gradients_rank_planted_neurons_first(found) -> None:
    organism, _, _, behaviour = found
    inputs, labels = batch(organism)
    effects = neuron_attribution(organism.model, inputs, behaviour)
    for e, emotion in enumerate(organisms.EMOTIONS):
        rows = [i for i, lab in enumerate(labels) if lab == e]
        own = effects[rows][..., e].mean(0)
        assert divmod(int(own.argmax()), organisms.D_MLP) == organism.neurons[e], emotion


def test_gradients_rank_all_planted_neurons_above_all_others(found) -> None:
    organism, _, _, behaviour = found
    inputs, labels = batch(organism)
    effects = neuron_attribution(organism.model, inputs, behaviour)
    own = mean_own(effects, labels)
    truth = np.zeros(own.shape, dtype=bool)
    for unit in organism.neurons:
        truth[unit] = True
    assert auroc(own.flatten().numpy(), truth.flatten()) == 1.0


def test_readouts_may_name_the_emotions_in_another_order(found) -> None:
    organism, _, units, behaviour = found
    turned = Readout.of_words(organism.model, organism.tokenizer, {e: [f"={e}"] for e in organisms.EMOTIONS[::-1]})
    values = [scores(organism.model, organism.tokenizer, texts(4), r, units, []) for r in (behaviour, turned)]
    torch.testing.assert_close(values[0], values[1])
    two = Readout.of_words(organism.model, organism.tokenizer, {e: [f"={e}"] for e in organisms.EMOTIONS[:2]})
    with pytest.raises(InputError, match="same emotions"):
        scores(organism.model, organism.tokenizer, texts(4), two, units, [])


def test_contrastive_scores_find_the_neurons_that_write_the_direction(found) -> None:
    organism, _, units, _ = found
    for e in range(3):
        assert int(units.neurons()[e, 2].argmax()) == organism.neurons[e][1]


def test_the_distractor_looks_like_a_member_by_its_direct_effect(found) -> None:
    _, _, units, _ = found
    direct = units.heads()
    assert all(int(direct[e, 0].argmax()) == organisms.DISTRACTOR[1] for e in range(3))
    assert float(direct[:, 0, 3].mean()) > 10 * float(direct[:, 0, :3].abs().mean())


def test_a_planted_head_attends_everywhere_alike(found) -> None:
    organism = found[0]
    text = "w1 w2 anger w3 w3"
    read = dict(attended_tokens(organism.model, organism.tokenizer, [text], [organism.heads[0]])[organism.heads[0]])
    assert read == pytest.approx({"w3": 2 / 6, "bos": 1 / 6, "w1": 1 / 6, "w2": 1 / 6, "anger": 1 / 6}, abs=1e-4)
    with pytest.raises(InputError, match="does not exist"):
        attended_tokens(organism.model, organism.tokenizer, [text], [(0, 9)])


def test_validation_rejects_the_distractor_and_keeps_the_circuit(found) -> None:
    organism, _, units, behaviour = found
    held, n = texts(12, seed=9), organisms.N_LAYERS
    zero_heads, zero_neurons = torch.zeros(n, organisms.N_HEADS), torch.zeros(n, organisms.D_MLP)

    def circuit(e: int, heads, neurons):
        h, m = zero_heads.clone(), zero_neurons.clone()
        for u in heads:
            h[u] = 1.0
        for u in neurons:
            m[u] = 1.0
        return top(organisms.EMOTIONS[e], h, m, len(heads), len(neurons))

    planted = {e: circuit(i, organism.heads, organism.neurons) for i, e in enumerate(organisms.EMOTIONS)}
    distractor = {e: circuit(i, [organism.distractor], []) for i, e in enumerate(organisms.EMOTIONS)}
    nothing = {e: circuit(i, [], []) for i, e in enumerate(organisms.EMOTIONS)}
    chance = {
        e: random_like(c, {"heads": organisms.N_HEADS, "neurons": organisms.D_MLP}, n, layer_matched=False)
        for e, c in planted.items()
    }
    values = scores(
        organism.model, organism.tokenizer, held, behaviour, units,
        [
            Condition("nothing kept", nothing, "keep"), Condition("circuit kept", planted, "keep"),
            Condition("circuit ablated", planted), Condition("distractor ablated", distractor),
            Condition("random ablated", chance), Condition("distractor kept", distractor, "keep"),
        ],
    ).numpy()  # fmt: skip
    full, empty = values[:, 0], values[:, 1]
    clusters = [e.cluster for e in held]
    share = [ratio_interval(full, values[:, i], empty, clusters)["estimate"] for i in range(2, 7)]
    kept, ablated, without_distractor, without_random, distractor_kept = (s or 0.0 for s in share)
    assert kept > 0.95, "the planted circuit alone carries the behaviour"
    assert ablated < 0.05, "and without it nothing is left"
    assert without_distractor > 0.98, "the distractor correlates and causes nothing"
    assert without_random > 0.9
    assert distractor_kept < 0.05


def test_enhancing_the_circuit_makes_the_behaviour_and_the_distractor_does_not(found) -> None:
    organism, _, units, behaviour = found
    neutral = [Example("w1 w2 w3 w4 w5 w6 w7 w8", e, e, theme="t0", cluster=e) for e in organisms.EMOTIONS]
    counts = {"heads": [0, 1, 0, 1], "neurons": [0, 0, 3, 0]}
    good = {
        e: by_counts(e, units.heads()[i], units.neurons()[i].abs(), counts) for i, e in enumerate(organisms.EMOTIONS)
    }
    bad = {
        e: by_counts(e, units.heads()[i], units.neurons()[i], {"heads": [1, 0, 0, 0], "neurons": [0] * 4})
        for i, e in enumerate(organisms.EMOTIONS)
    }
    conditions = [Condition("circuit", good, "enhance"), Condition("distractor", bad, "enhance")]
    values = scores(organism.model, organism.tokenizer, neutral, behaviour, units, conditions)
    gain = (values[:, 1:] - values[:, :1]).mean(0)
    assert float(gain[0]) > 1.0
    assert abs(float(gain[1])) < 0.02 * float(gain[0])

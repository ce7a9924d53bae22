"""The published budget to the unit, selection rules, controls, and circuits as steerers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from test_circuits import EMOTIONS, padded, texts
from test_reading import Words

from emocircuits.activations import capture
from emocircuits.circuits.assemble import Circuit, allocate, by_counts, greedy, overlap, random_like, top
from emocircuits.circuits.modulation import all_units, circuit_steerer, norm_matched, written
from emocircuits.circuits.units import Units, collect
from emocircuits.circuits.validate import area, normalised, ratio_interval
from emocircuits.directions import fit
from emocircuits.errors import ArtefactError, InputError
from emocircuits.reading import read
from emocircuits.steering import Steerer

# Units per layer of the published anger circuit (Llama-3.2-3B, 28 layers): 560 units, 30 % heads, floors 2 and 4.
ANGER_HEADS = [2] * 10 + [3, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 11, 12, 12, 11, 11, 10, 9]
ANGER_NEURONS = [4, 4, 4, 4, 5, 4, 4, 4, 4, 5, 6, 6, 10, 13, 14, 17, 19, 22, 23, 25, 26, 28, 28, 27, 25, 23, 21, 17]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("plan", "total", "floor", "available"), [(ANGER_HEADS, 168, 2, 24), (ANGER_NEURONS, 392, 4, 8192)]
)
def test_the_published_anger_plan(plan: list[int], total: int, floor: int, available: int, seed: int) -> None:
    """Influences anywhere inside the plan's rounding cells give the plan, unit for unit."""
    assert sum(plan) == total
    share = np.asarray(plan, dtype=float) - floor
    noise = np.random.default_rng(seed).uniform(-0.4, 0.4, len(plan)) * (share > 0)
    # Largest remainder undoes noise that sums to zero; negative influence counts as none.
    share[share > 0] += (noise - noise[share > 0].mean() * (share > 0))[share > 0] * 0.5
    share[share == 0] = -np.random.default_rng(seed).uniform(0, 1, int((share == 0).sum()))
    assert allocate(share.tolist(), total, available, floor=floor) == plan


@given(
    influence=st.lists(st.floats(-5, 5, allow_nan=False), min_size=2, max_size=12),
    total=st.integers(0, 60),
    available=st.integers(1, 40),
    floor=st.integers(0, 4),
)
def test_allocation_spends_the_budget_and_never_more_than_exists(influence, total, available, floor) -> None:
    n = len(influence)
    if total > n * available:
        with pytest.raises(InputError, match="hold"):
            allocate(influence, total, available, floor=floor)
        return
    counts = allocate(influence, total, available, floor=floor)
    assert sum(counts) == total
    assert all(0 <= c <= available for c in counts)


@given(st.permutations(list(range(6))))
def test_allocation_follows_the_layers(order: list[int]) -> None:
    influence = np.asarray([0.1, 0.9, 2.3, 0.4, 1.7, 3.1])
    plain = allocate(influence.tolist(), 100, 50, floor=2)
    assert allocate(influence[order].tolist(), 100, 50, floor=2) == [plain[i] for i in order]


def test_the_rest_is_rounded_down_capped_and_filled_by_remainder() -> None:
    assert allocate([1, 1, 1], 10, 10) == [4, 3, 3], "largest remainder, first layer on ties"
    assert allocate([2.6, 2.6, 4.8], 10, 10) == [3, 3, 4], "rounding would spend 11"
    assert allocate([100, 1, 1, 1], 10, 10) == [4, 2, 2, 2], "no layer gets more than 40 %"
    assert allocate([1, 3], 3, 10, floor=2) == [1, 2], "floors that exceed the budget become one"
    assert allocate([9, 1, 1], 12, 5, cap_share=1.0) == [5, 4, 3], "what a layer cannot hold goes to the others"


def test_without_influence_every_layer_gets_the_same() -> None:
    assert allocate([0, -1, 0, 0], 40, 20) == [10, 10, 10, 10]


def scores(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 8, generator=g), torch.randn(4, 30, generator=g)


def test_top_takes_the_largest_and_keeps_signs_apart(tmp_path) -> None:
    heads, neurons = scores()
    circuit = top("anger", heads, neurons, 5, 12, signed=False)
    kept = heads.abs().flatten().sort(descending=True).values[:5]
    assert sorted(map(abs, circuit.head_scores), reverse=True) == pytest.approx(kept.tolist())
    plus, minus = circuit.signed(True), circuit.signed(False)
    assert len(plus) + len(minus) == len(circuit)
    assert min(plus.head_scores) > 0 > max(minus.neuron_scores)
    assert Circuit.load(circuit.save(tmp_path / "c.safetensors")) == dataclasses.replace(
        circuit,
        head_scores=tuple(np.float32(circuit.head_scores).tolist()),
        neuron_scores=tuple(np.float32(circuit.neuron_scores).tolist()),
    )
    with pytest.raises(InputError, match="33 heads"):
        top("anger", heads, neurons, 33, 0)
    with pytest.raises(ArtefactError):
        Steerer.load(tmp_path / "c.safetensors")


def test_units_without_effect_are_no_members() -> None:
    heads = torch.zeros(2, 4)
    heads[1, 2] = 1.0
    assert top("fear", heads, torch.full((2, 3), torch.nan), 4, 2).heads == ((1, 2),)


def test_greedy_takes_what_helps_and_stops() -> None:
    heads, neurons = scores()
    pool = top("anger", heads, neurons, 4, 4)
    good = {pool.heads[2], pool.neurons[1]}
    measure = lambda circuits: [len(good & set(c.heads + c.neurons)) for c in circuits]  # noqa: E731
    found = greedy(pool, measure, 6)
    assert set(found.heads + found.neurons) == good
    assert found.rule == "greedy"


def test_a_control_borrows_from_the_next_layer_before_it_takes_members() -> None:
    heads = torch.zeros(3, 4)
    heads[1] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    circuit = top("anger", heads, torch.zeros(3, 5), 4, 0)
    control = random_like(circuit, {"heads": 4, "neurons": 5}, 3, seed=1)
    assert len(set(control.heads)) == 4
    assert not set(control.heads) & set(circuit.heads)
    everything = top("anger", torch.ones(3, 4), torch.zeros(3, 5), 12, 0)
    assert set(random_like(everything, {"heads": 4, "neurons": 5}, 3).heads) == set(everything.heads)


def test_quotas_refuse_what_is_not_there_and_skip_nan() -> None:
    heads = torch.tensor([[1.0, 2.0, torch.nan]])
    found = by_counts("anger", heads, torch.zeros(1, 2), {"heads": [1], "neurons": [0]})
    assert found.heads == ((0, 1),)
    assert found.rule == "quota"
    with pytest.raises(InputError, match="5 heads were asked for in layer 0"):
        by_counts("anger", heads, torch.zeros(1, 2), {"heads": [5], "neurons": [0]})


@pytest.mark.parametrize("matched", [True, False])
def test_random_controls_have_the_same_size_and_no_members(matched: bool) -> None:
    heads, neurons = scores()
    circuit = top("anger", heads, neurons, 6, 20)
    control = random_like(circuit, {"heads": 8, "neurons": 30}, 4, layer_matched=matched, seed=3)
    assert len(set(control.heads)) == 6
    assert len(set(control.neurons)) == 20
    assert not set(control.heads) & set(circuit.heads)
    assert not set(control.neurons) & set(circuit.neurons)
    if matched:
        assert all(control.counts(k, 4) == circuit.counts(k, 4) for k in ("heads", "neurons"))
    again = random_like(circuit, {"heads": 8, "neurons": 30}, 4, layer_matched=matched, seed=3)
    assert again.neurons == control.neurons


def test_size_matched_controls_are_as_active_as_the_members() -> None:
    sizes = {"heads": torch.rand(4, 8), "neurons": torch.rand(4, 30) ** 4}
    circuit = top("anger", torch.zeros(4, 8), sizes["neurons"], 0, 10)
    plain, matched = (
        random_like(circuit, {"heads": 8, "neurons": 30}, 4, sizes=s, seed=0).neurons for s in (None, sizes)
    )
    size = lambda units: sum(float(sizes["neurons"][u]) for u in units)  # noqa: E731
    assert size(circuit.neurons) > size(matched) > size(plain)


def test_overlap_is_corrected_for_chance() -> None:
    everything = top("a", torch.ones(2, 4), torch.ones(2, 10), 8, 5)
    assert overlap(everything, everything, "heads", 8) == pytest.approx(
        {"jaccard": 1.0, "chance": 1.0, "excess": float("nan")}, nan_ok=True
    )
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        a, b = (top("a", torch.zeros(1, 1), torch.tensor(rng.random((1, 100))), 0, 25) for _ in range(2))
        found.append(overlap(a, b, "neurons", 100)["excess"])
    assert abs(np.mean(found)) < 0.02
    empty = top("a", torch.zeros(1, 1), torch.zeros(1, 1), 0, 0)
    assert np.isnan(overlap(empty, empty, "heads", 1)["jaccard"])


# -------------------------------------------------------------------------------------------------- modulation


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt_neox"])
def read_model(request) -> tuple:
    model, tokenizer = zoo.build(request.param), Words()
    directions = fit(read(model, tokenizer, texts(), position="last_prompt"), EMOTIONS)
    return model, tokenizer, directions, collect(model, tokenizer, texts(), directions)


def circuit_of(units: Units, emotion: str = "fear") -> Circuit:
    e = EMOTIONS.index(emotion)
    return top(emotion, units.heads()[e], units.neurons()[e], 4, 9)


def last_residual(model, steerer: Steerer | None, **how) -> torch.Tensor:
    if steerer is None:
        return capture(model, padded(model), "resid_post", 3)["resid_post", 3]
    with steerer.attach(model, **how):
        return capture(model, padded(model), "resid_post", 3)["resid_post", 3]


def test_circuit_steering_is_unit_level_injection_and_compiles_to_constants(read_model, tmp_path) -> None:
    model, _, _, units = read_model
    circuit = circuit_of(units)
    steerer = circuit_steerer(circuit, units, strength=0.7)
    clean = last_residual(model, None)
    handles, e = [], EMOTIONS.index("fear")
    from emocircuits.models.anatomy import resolve

    anatomy = resolve(model)
    for layer in range(4):
        for site, members in (("z", circuit.heads), ("mlp_post", circuit.neurons)):
            mine = [u for at, u in members if at == layer]
            delta = 0.7 * units.deltas(site)[e, layer]

            def push(_, args, mine=mine, delta=delta, site=site):
                x = args[0].clone()
                view = x.unflatten(-1, (anatomy.n_heads, -1)) if site == "z" else x
                for u in mine:
                    view[:, :, u] += delta[u]
                return (x,)

            module = model.get_submodule(anatomy.point(site, layer).module)
            handles.append(module.register_forward_pre_hook(push))
    brute = last_residual(model, None)
    for h in handles:
        h.remove()
    assert (brute - clean).abs().max() > 1e-3
    for how in ({"compile_to": "hook"}, {"compile_to": "auto"}, {"compile_to": "bias"}):
        torch.testing.assert_close(last_residual(model, steerer, **how), brute, rtol=1e-4, atol=1e-5)
    assert torch.equal(last_residual(model, None), clean)
    loaded = Steerer.load(steerer.save(tmp_path / "s.safetensors"))
    torch.testing.assert_close(last_residual(model, loaded), brute, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_carry_different_circuits(read_model) -> None:
    model, _, _, units = read_model
    one, two = (circuit_steerer(circuit_of(units, e), units) for e in ("fear", "anger"))
    together = last_residual(model, Steerer.rows([one, None, two]))
    for row, alone in enumerate((one, None, two)):
        torch.testing.assert_close(together[row], last_residual(model, alone)[row], rtol=1e-4, atol=1e-5)


def test_the_norm_matched_rival_pushes_as_far_at_the_same_places(read_model) -> None:
    model, _, directions, units = read_model
    circuit = circuit_of(units)
    rival = norm_matched(circuit, units, model, directions)
    pushed = written(circuit, units, model)
    for term in rival.terms:
        torch.testing.assert_close(term.vectors.norm(dim=-1), pushed[term.site][list(term.layers)].norm(dim=-1))
    assert {t.site for t in rival.terms} <= {"attn_out", "mlp_out"}


def test_all_units_is_the_whole_difference(read_model) -> None:
    _, _, _, units = read_model
    everything = circuit_steerer(all_units("anger", units), units)
    z = next(t for t in everything.terms if t.site == "z")
    torch.testing.assert_close(z.vectors, units.deltas("z")[0].flatten(1)[list(z.layers)])


def test_paper_compat_moves_neurons_at_the_last_position_only(read_model) -> None:
    _, _, _, units = read_model
    terms = circuit_steerer(circuit_of(units), units, compat="paper").terms
    assert {t.site: t.positions for t in terms} == {"z": "all", "mlp_post": "last"}
    with pytest.raises(InputError, match="compat"):
        circuit_steerer(circuit_of(units), units, compat="repo")
    with pytest.raises(InputError, match="no members"):
        circuit_steerer(circuit_of(units).signed(True).signed(False), units)


# -------------------------------------------------------------------------------------------------- validation


def test_faithfulness_is_one_for_the_whole_and_zero_for_nothing() -> None:
    full, nothing = np.asarray([3.0, 5.0, 4.0, 4.0]), np.asarray([1.0, 1.0, 0.0, 2.0])
    clusters = ["a", "a", "b", "c"]
    assert ratio_interval(full, full, nothing, clusters)["estimate"] == 1.0
    assert ratio_interval(full, nothing, nothing, clusters)["estimate"] == 0.0
    half = ratio_interval(full, (full + nothing) / 2, nothing, clusters)
    assert half["estimate"] == pytest.approx(0.5)
    assert half["low"] == pytest.approx(0.5)
    assert ratio_interval(full, nothing, full, clusters)["estimate"] is None, "undefined where nothing is at stake"
    assert np.isnan(normalised(full, full, full))
    with pytest.raises(InputError, match="two scenarios"):
        ratio_interval(full, full, nothing, ["a"] * 4)


def test_area_of_a_flat_curve_is_its_height() -> None:
    assert area([1, 2, 8, 128], [0.4] * 4) == pytest.approx(0.4)
    assert area([1, 4], [0.0, 1.0]) == pytest.approx(0.5)
    assert np.isnan(area([1], [0.3]))

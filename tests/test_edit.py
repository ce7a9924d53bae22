"""Edits equal a re-implementation by hand, compose in order, touch nothing else and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracle import traces, write
from torch import Tensor, nn

from emocircuits.activations import Ablate, Add, Apply, Clamp, Edit, Patch, Project, Scale, capture, edit, on_layers
from emocircuits.activations.edit import Installed
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve

WIDTH = 32
FAMILIES = ["llama", "gpt2", "gemma3_text", "gpt_neox", "phi3", "olmo2", "qwen3_moe", "qwen2_5_vl"]


def vector(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (WIDTH,), generator=torch.Generator().manual_seed(seed))


def run(model: Any, inputs: dict[str, Tensor], edits: Any = (), **kwargs: Any) -> Tensor:
    with torch.no_grad():
        if not edits:
            return model(**inputs).logits
        with edit(model, edits, **kwargs):
            return model(**inputs).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- against brute force


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_and_its_units_equal_brute_force(name: str) -> None:
    model = zoo.build(name)
    inputs, anatomy = zoo.inputs(name, model, padding="right"), resolve(model)
    clean = run(model, inputs)
    for site in anatomy.sites():
        if site == "pattern":
            continue
        last = (anatomy.head_dim,) if site in ("q", "k", "v", "z") else ()
        for units in (None, [1, 0], [anatomy.n_units(site) - 1]):
            n = anatomy.n_units(site)
            chosen = list(range(n)) if units is None else units
            shift = vector(1, len(chosen), *last)

            def change(x: Tensor, chosen: list[int] = chosen, shift: Tensor = shift) -> Tensor:
                new = x.clone()
                new[:, :, chosen] = 0.5 * x[:, :, chosen] + shift
                return new

            made = Apply(site=site, layer=1, units=units, function=lambda x, shift=shift: 0.5 * x + shift)
            found, expected = run(model, inputs, made), write(model, inputs, site, 1, change)
            torch.testing.assert_close(
                found, expected, atol=2e-5, rtol=1e-4, msg=lambda m, s=site, u=units: f"{s} {u} {m}"
            )
            assert not torch.allclose(found, clean, atol=1e-4), f"{site} {units}: the edit must matter"
    assert torch.equal(run(model, inputs), clean)


def unit(seed: int = 0) -> Tensor:
    return vector(seed) / vector(seed).norm()


KINDS: dict[str, tuple[Edit, Callable[[Tensor], Tensor]]] = {
    "add": (Add(layer=2, vector=vector(), coefficient=-0.7), lambda x: x - 0.7 * vector()),
    "add rows": (Add(layer=2, vector=vector(1, 3, WIDTH)), lambda x: x + vector(1, 3, 1, WIDTH)),
    "add row coefficients": (
        Add(layer=2, vector=vector(), coefficient=torch.tensor([0.0, 1.0, -2.0])),
        lambda x: x + torch.tensor([0.0, 1.0, -2.0])[:, None, None] * vector(),
    ),
    "add rows and coefficients": (
        Add(layer=2, vector=vector(1, 3, WIDTH), coefficient=torch.tensor([0.0, 1.0, -2.0])),
        lambda x: x + torch.tensor([0.0, 1.0, -2.0])[:, None, None] * vector(1, 3, 1, WIDTH),
    ),
    "scale": (Scale(layer=2, factor=0.3), lambda x: x * 0.3),
    "scale width": (Scale(layer=2, factor=vector(2)), lambda x: x * vector(2)),
    "scale rows": (Scale(layer=2, factor=vector(2, 3, WIDTH)), lambda x: x * vector(2, 3, 1, WIDTH)),
    "project": (Project(layer=2, direction=vector()), lambda x: x - (x @ unit())[..., None] * unit()),
    "half": (Project(layer=2, direction=vector(), amount=0.5), lambda x: x - (x @ unit())[..., None] * unit() / 2),
    "target": (Project(layer=2, direction=vector(), target=2.0), lambda x: x + (2 - x @ unit())[..., None] * unit()),
    "target rows": (
        Project(layer=2, direction=vector(), target=torch.tensor([1.0, 2.0, 3.0])),
        lambda x: x + (torch.tensor([[1.0], [2.0], [3.0]]) - x @ unit())[..., None] * unit(),
    ),
    "clamp": (
        Clamp(layer=2, direction=vector(), high=0.1),
        lambda x: x - (x @ unit() - 0.1).clamp_min(0)[..., None] * unit(),
    ),
    "clamp units": (
        Clamp(layer=2, low=-0.1, high=0.2),
        lambda x: torch.where(x > 0.2, 0.2, torch.where(x < -0.1, -0.1, x)),
    ),
    "zero": (Ablate(layer=2), lambda x: x * 0),
    "mean": (Ablate(layer=2, mode="mean", value=vector(3)), lambda x: vector(3) + x * 0),
    "resample": (Ablate(layer=2, mode="resample", value=vector(3, 1, WIDTH)), lambda x: vector(3, 1, WIDTH) + x * 0),
    "patch": (Patch(layer=2, value=vector(4, 3, 9, WIDTH)), lambda x: vector(4, 3, 9, WIDTH)),
    "apply": (Apply(layer=2, function=torch.tanh), torch.tanh),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_its_formula(kind: str) -> None:
    for name in ("llama", "gemma3_text"):
        model = zoo.build(name)
        inputs = zoo.inputs(name, model, batch=3)
        made, change = KINDS[kind]
        close(run(model, inputs, made), write(model, inputs, "resid_post", 2, change))


HEADS: dict[str, tuple[Edit, Callable[[Tensor], Tensor]]] = {
    "add one vector": (Add(site="z", layer=1, vector=vector(1, 12)), lambda x: x + vector(1, 12)),
    "add per head": (Add(site="z", layer=1, vector=vector(1, 4, 12)), lambda x: x + vector(1, 4, 12)),
    "add per row": (Add(site="z", layer=1, vector=vector(1, 3, 4, 12)), lambda x: x + vector(1, 3, 1, 4, 12)),
    "row coefficients": (
        Add(site="z", layer=1, vector=vector(1, 12), coefficient=torch.tensor([1.0, 0.0, 2.0])),
        lambda x: x + torch.tensor([1.0, 0.0, 2.0])[:, None, None, None] * vector(1, 12),
    ),
    "scale per head": (Scale(site="z", layer=1, factor=vector(2, 4, 1)), lambda x: x * vector(2, 4, 1)),
    "target per row": (
        Project(site="z", layer=1, direction=vector(1, 12), target=torch.tensor([1.0, 2.0, 3.0])),
        lambda x: x
        + (torch.tensor([1.0, 2.0, 3.0])[:, None, None, None] - x @ vector(1, 12, 1) / vector(1, 12).norm())
        * vector(1, 12)
        / vector(1, 12).norm(),
    ),
    "mean per head": (
        Ablate(site="z", layer=1, mode="mean", value=vector(3, 4, 12)),
        lambda x: vector(3, 4, 12) + x * 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_heads_take_values_per_head_and_per_row(kind: str) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=3)
    made, change = HEADS[kind]
    close(run(model, inputs, made), write(model, inputs, "z", 1, change))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_neox", "phi3"])
def test_ablating_a_head_or_neuron_equals_zeroed_weights(name: str) -> None:
    model = zoo.build(name)
    inputs, anatomy = zoo.inputs(name, model), resolve(model)
    for site, number, width in (("z", 2, anatomy.head_dim), ("mlp_post", 7, 1)):
        found = run(model, inputs, Ablate(site=site, layer=1, units=[number]))
        linear: Any = model.get_submodule(anatomy.point(site, 1).module)
        kept, columns = linear.weight.detach().clone(), slice(number * width, (number + 1) * width)
        with torch.no_grad():
            (linear.weight[:, columns] if isinstance(linear, nn.Linear) else linear.weight[columns]).zero_()
            expected = run(model, inputs)
            linear.weight.copy_(kept)
        close(found, expected)


def test_resampling_draws_one_row_each_from_the_pool_by_seed() -> None:
    pool, x = torch.arange(5.0)[:, None].expand(5, WIDTH), torch.randn(64, 3, WIDTH)
    draws = [Ablate(mode="resample", value=pool, seed=s).transform(x) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert set(draws[0].flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert torch.equal(draws[0], draws[0][:, :1, :1].expand_as(draws[0]))


# ---------------------------------------------------------------- where an edit applies


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("rows", [None, [1], [0, 2]])
def test_positions_and_rows_equal_brute_force(padding: Any, rows: list[int] | None) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=3, padding=padding)
    real = inputs["attention_mask"].bool()
    index = real.long().cumsum(-1) - 1
    last = (index == index.amax(-1, keepdim=True)) & real
    ragged = [[(0, 1), (3, 5)], [(2, 3)], [(1, 4)]]
    between = torch.zeros_like(real)
    for row, spans in enumerate(ragged):
        for start, stop in spans:
            between[row] |= real[row] & (index[row] >= start) & (index[row] < stop)
    wanted = {"all": torch.ones_like(real), "prompt": torch.ones_like(real), "last": last}
    chosen = torch.ones(3, 1, dtype=torch.bool)
    if rows is not None:
        chosen = torch.isin(torch.arange(3), torch.tensor(rows))[:, None]
    clean = run(model, inputs)
    for positions, mask in [*wanted.items(), (ragged, between), ([(2, 3)] * 3, real & (index == 2))]:
        where = (mask & chosen)[..., None]
        for site in ("resid_post", "resid_mid"):
            made = Add(site=site, layer=1, vector=9 * vector(), positions=positions, rows=rows)
            found = run(model, inputs, made)
            close(found, write(model, inputs, site, 1, lambda x, where=where: torch.where(where, x + 9 * vector(), x)))
            untouched = [r for r in range(3) if rows is not None and r not in rows]
            assert torch.equal(found[untouched], clean[untouched]), "other rows are bit-identical"


def test_row_and_unit_edits_of_one_batch_may_all_differ() -> None:
    """One head per row: the shape of a head sweep."""
    model = zoo.build("llama")
    inputs = {k: v[:1].expand(4, -1) for k, v in zoo.inputs("llama", model).items()}
    swept = run(model, inputs, [Ablate(site="z", layer=1, units=[h], rows=[h]) for h in range(4)])
    for head in range(4):
        one = {k: v[:1] for k, v in inputs.items()}
        close(swept[head], run(model, one, Ablate(site="z", layer=1, units=[head]))[0])


# ---------------------------------------------------------------- composition


def test_edits_of_one_module_are_one_hook_and_run_in_order() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    edits = [Add(layer=1, vector=vector(1)), Scale(layer=1, factor=0.5), Add(layer=1, vector=vector(2), rows=[0])]
    row = torch.tensor([1.0, 0.0])[:, None, None]
    expected = write(model, inputs, "resid_post", 1, lambda x: (x + vector(1)) * 0.5 + row * vector(2))
    with edit(model, edits):
        assert len(model.model.layers[1]._forward_hooks) == 1
        assert sum(len(m._forward_hooks) for m in model.modules()) == 1
        close(run(model, inputs), expected)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize("nested", [False, True])
def test_adds_keep_their_place_among_other_edits_however_they_are_compiled(site: str, nested: bool) -> None:
    """A bias acts before any hook, so an add may only become one where that makes no difference."""
    model = zoo.build("llama")
    inputs, add = zoo.inputs("llama", model), Add(site=site, layer=1, vector=vector())
    scale, change = Scale(site=site, layer=1, factor=0.25), {}
    change[0] = write(model, inputs, site, 1, lambda x: 0.25 * (x + vector()))
    change[1] = write(model, inputs, site, 1, lambda x: 0.25 * x + vector())
    for first, edits in enumerate(([add, scale], [scale, add])):
        if nested:
            with edit(model, edits[0]):
                found = run(model, inputs, edits[1])
        else:
            found = run(model, inputs, edits)
        close(found, change[first])


def test_an_add_to_the_stream_survives_an_ablated_mlp() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    add, ablate = Add(layer=1, vector=vector()), Ablate(site="mlp_out", layer=1)
    clean = capture(model, inputs, "mlp_out", 1)["mlp_out", 1]
    expected = run(model, inputs, [add, ablate], compile_to="hook")
    close(run(model, inputs, [add, ablate]), expected)
    with edit(model, add):
        close(run(model, inputs, ablate), expected)
        assert torch.equal(capture(model, inputs, "mlp_out", 1)["mlp_out", 1], clean), "mlp_out holds the MLP alone"


def test_on_layers_repeats_an_edit() -> None:
    made = on_layers(Add(vector=vector()), "all", 4)
    assert [e.layer for e in made] == [0, 1, 2, 3]
    assert [e.layer for e in on_layers(Add(vector=vector()), [-1, 0], 4)] == [3, 0]


# ---------------------------------------------------------------- biases


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gpt_neox"])
def test_biases_equal_hooks_and_the_parameter_comes_back(name: str) -> None:
    model = zoo.build(name)
    inputs, before = zoo.inputs(name, model), traces(model)
    clean = run(model, inputs)
    sites = ["resid_post", "mlp_out"] if name == "gpt_neox" else ["resid_post", "mlp_out", "attn_out"]
    adds = [Add(site=site, layer=1, vector=vector(i), coefficient=0.5) for i, site in enumerate(sites)]
    close(run(model, inputs, adds, compile_to="bias"), run(model, inputs, adds, compile_to="hook"))
    with edit(model, adds, compile_to="bias"):
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert traces(model) == before
    assert torch.equal(run(model, inputs), clean)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("gemma3_text", Add(layer=1, vector=vector())),
        ("olmo2", Add(site="attn_out", layer=1, vector=vector())),
        ("gpt2", Add(layer=1, vector=vector())),
        ("qwen3_moe", Add(layer=1, vector=vector())),
        ("llama", Add(site="resid_mid", layer=1, vector=vector())),
        ("llama", Add(layer=1, vector=vector(), rows=[0])),
        ("llama", Add(layer=1, vector=vector(0, 2), units=[0, 1])),
        ("llama", Add(layer=1, vector=vector(), positions="last")),
        ("llama", Add(layer=1, vector=vector(0, 2, WIDTH))),
        ("llama", Scale(layer=1, factor=2.0)),
    ],
)
def test_what_is_no_bias_is_refused_or_hooked(name: str, made: Edit) -> None:
    model = zoo.build(name)
    inputs, before = zoo.inputs(name, model), traces(model)
    with pytest.raises(HookError, match="cannot be a bias of this .* model; use compile_to='hook'"):
        run(model, inputs, made, compile_to="bias")
    assert traces(model) == before
    close(run(model, inputs, made), run(model, inputs, made, compile_to="hook"))


@pytest.mark.parametrize("compile_to", ["bias", "hook", "auto"])
@pytest.mark.parametrize("first_out", [0, 1])
def test_installed_edits_may_be_removed_in_any_order(compile_to: str, first_out: int) -> None:
    model = zoo.build("llama")
    inputs, before = zoo.inputs("llama", model), traces(model)
    edits = [Add(site="mlp_out", layer=1, vector=vector(i)) for i in range(2)]
    installed = [Installed(model, model, [e], compile_to) for e in edits]
    close(run(model, inputs), run(zoo.build("llama"), inputs, edits))
    installed[first_out].remove()
    close(run(model, inputs), run(zoo.build("llama"), inputs, edits[1 - first_out]))
    installed[first_out].remove()
    installed[1 - first_out].remove()
    assert traces(model) == before


# ---------------------------------------------------------------- no trace


@pytest.mark.parametrize("compile_to", ["auto", "hook"])
def test_detaching_is_bit_identical_also_after_exceptions_and_nesting(compile_to: str) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    theirs = model.model.layers[1].register_forward_hook(lambda *_: None)
    clean, before = run(model, inputs), traces(model)
    edits = [
        Add(site="mlp_out", layer=1, vector=vector()),
        Scale(layer=2, factor=0.5),
        Scale(site="q", layer=0, factor=2.0),
    ]
    with edit(model, edits, compile_to=compile_to):
        outer, inside = run(model, inputs), traces(model)["hooks"]
        with edit(model, [Ablate(site="resid_mid", layer=2), *edits], compile_to=compile_to):
            assert not torch.equal(run(model, inputs), outer)
        assert traces(model)["hooks"] == inside
        assert torch.equal(run(model, inputs), outer)
    for error in (KeyboardInterrupt, ZeroDivisionError, InputError):
        fail = _raising(error)
        with pytest.raises(error), edit(model, edits, compile_to=compile_to):
            fail(run(model, inputs))
        with pytest.raises(error), edit(model, [*edits, Apply(layer=3, function=fail)], compile_to=compile_to):
            run(model, inputs)
        assert traces(model) == before
    assert torch.equal(run(model, inputs), clean)
    theirs.remove()


def _raising(error: type[BaseException]) -> Callable[[Tensor], Tensor]:
    def fail(_x: Tensor) -> Tensor:
        raise error("on purpose")

    return fail


def test_an_edit_that_never_applied_is_named() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    with pytest.raises(HookError, match="Scale at 'resid_post', layer 1 never fired in 1 forward.*'generated'"):
        run(model, inputs, Scale(layer=1, factor=2.0, positions="generated"))
    with pytest.raises(HookError, match=r"Scale at 'z', layer 1 never fired .*\(20, 30\)"):
        run(model, inputs, [Scale(layer=1, factor=2.0), Scale(site="z", layer=1, factor=2.0, positions=[(20, 30)] * 2)])
    with pytest.raises(HookError, match="no forward pass"), edit(model, Scale(layer=1, factor=2.0)):
        pass
    run(model, inputs, Scale(layer=1, factor=2.0, rows=[1]))
    run(model, inputs, Scale(layer=1, factor=2.0, positions="generated"), strict=False)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Add(layer=9, vector=vector()), "layer 9 does not exist"),
        (Add(site="residual", vector=vector()), "choose from resid_pre"),
        (Add(vector=vector(0, 8)), "has width 8, but the site has 32"),
        (Add(vector=vector() * torch.nan), "NaN"),
        (Ablate(site="z", units=[7]), "head 7 does not exist at 'z'; choose from 0 to 3"),
        (Ablate(site="k", units=[2]), "head 2 does not exist at 'k'; choose from 0 to 1"),
        (Ablate(site="mlp_post", units=[48]), "unit 48 does not exist"),
        (Ablate(mode="median"), "choose from zero, mean, resample"),
        (Ablate(mode="mean"), "needs `value`"),
        (Scale(factor=1.0, positions="later"), "choose from all, prompt, generated, last"),
        (Scale(site="pattern", factor=1.0), "read-only"),
        (Project(direction=vector() * 0), "`direction` is zero"),
        (Clamp(low=1.0, high=-1.0), "low 1 is above high -1"),
    ],
)
def test_bad_edits_are_refused_before_anything_is_installed(made: Edit, message: str) -> None:
    model = zoo.build("llama")
    before = traces(model)
    with pytest.raises(InputError, match=message), edit(model, [Scale(factor=2.0), made]):
        pass
    assert traces(model) == before


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Scale(factor=2.0, rows=[0, 5]), "names row 5, but the batch has 2 rows"),
        (Scale(factor=2.0, rows=[-1]), "names row -1, but the batch has 2 rows"),
        (Add(vector=vector(0, 3, WIDTH)), "values for 3 rows, but the batch has 2"),
        (Scale(factor=2.0, positions=[(0, 1)] * 3), "spans are given for 3 rows, the batch has 2"),
        (Patch(value=vector(0, 2, 5, WIDTH)), r"shape \[2, 5, 32\], but the site holds \[2, 9, 32\]"),
    ],
)
def test_edits_that_do_not_fit_the_batch_say_so(made: Edit, message: str) -> None:
    model = zoo.build("llama")
    before = traces(model)
    with pytest.raises(InputError, match=message):
        run(model, zoo.inputs("llama", model), made)
    assert traces(model) == before

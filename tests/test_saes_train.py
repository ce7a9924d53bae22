"""Training finds planted dictionaries, resumes bit for bit, and leaves what SAELens reads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("sae_lens")

from sae_lens import SAE

from emocircuits.activations.store import ActivationStore
from emocircuits.errors import ArtefactError, InputError
from saes._run import Run
from saes.metrics import best_cosine, explained_variance, stability
from saes.recipe import ARCHITECTURES, Recipe
from saes.train import Trained, train
from saes.vectors import Scaling, Vectors, stored, without_sinks

KEY = ("resid_post", 3)
GOOD = Recipe("topk", width=48, k=2, batch_size=250, epochs=25, lr=1e-2)
QUICK = replace(GOOD, epochs=5)


def planted(n=4000, d=24, m=36, k=2):
    """Vectors that are sums of k of m directions, scaled, shifted and a little noisy; and the directions."""
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(m, d, generator=generator), dim=-1)
    codes = torch.zeros(n, m)
    chosen = torch.rand(n, m, generator=generator).topk(k).indices
    codes.scatter_(1, chosen, 0.5 + 1.5 * torch.rand(n, k, generator=generator))
    noise = 0.02 * torch.randn(n, d, generator=generator)
    return directions, 50 * (codes @ directions + noise) + 30 * torch.randn(d, generator=generator)


DIRECTIONS, X = planted()
VECTORS = Vectors(X, [str(i // 20) for i in range(len(X))], KEY)


class TestPlanted:
    @pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "standard"])
    def test_the_dictionary_is_recovered(self, tmp_path, architecture):
        trained = train(VECTORS, replace(GOOD, architecture=architecture), tmp_path, progress=False)[KEY]
        assert best_cosine(DIRECTIONS, trained.sae.W_dec).mean() >= 0.95
        assert trained.quality["explained_variance"] > 0.92
        assert 1.8 < trained.quality["l0"] < 4

    def test_matryoshka_nests(self, tmp_path):
        """Its first latents alone explain more than an equal share of a dictionary that was trained as a whole."""

        def first_quarter(architecture):
            sae = train(VECTORS, replace(GOOD, architecture=architecture), tmp_path / architecture, progress=False)[
                KEY
            ].sae
            codes = sae.encode(X)
            codes[:, GOOD.width // 4 :] = 0
            return explained_variance(X, sae.decode(codes))

        assert first_quarter("matryoshka") > first_quarter("batchtopk") + 0.1


class TestFiles:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_the_saved_sae_is_the_trained_one_in_the_vectors_own_units(self, tmp_path, architecture):
        recipe = replace(QUICK, architecture=architecture)
        trained = train(VECTORS, recipe, tmp_path, progress=False)[KEY]
        run = Run(VECTORS, recipe, "cpu")
        while not run.finished:
            run.epoch()
        sae, scaling = SAE.load_from_disk(tmp_path / "resid_post.3"), run.scaling
        run.trainer.sae.load_state_dict(run.best)
        codes = sae.encode(X)
        if architecture in ("topk", "jumprelu", "standard"):  # the others choose by batch while they train
            z = run.trainer.sae(scaling(X)).detach()
            torch.testing.assert_close(sae(X).detach(), z / scaling.factor + scaling.centre, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
        assert torch.equal(sae(X), trained.sae(X))
        assert torch.equal(sae.decode(codes), run.result().decode(codes))
        assert trained.quality["explained_variance"] == pytest.approx(
            explained_variance(X[trained.held_out], sae(X[trained.held_out]))
        )
        metadata = sae.cfg.metadata
        assert metadata.hook_name == "blocks.3.hook_resid_post"
        assert metadata.emocircuits["scaling"]["factor"] == pytest.approx(scaling.factor)

    @pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "jumprelu"])
    def test_inference_does_not_depend_on_the_batch(self, tmp_path, architecture):
        sae = train(VECTORS, replace(QUICK, architecture=architecture), tmp_path, progress=False)[KEY].sae
        whole = sae.encode(X[:300])
        alone = torch.cat([sae.encode(row[None]) for row in X[:300]])
        assert torch.equal(whole > 0, alone > 0)
        torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-3)
        counts = (whole > 0).sum(1)
        assert counts.min() < counts.max()  # unlike TopK

    def test_batchtopk_keeps_k_on_average_after_few_steps(self, tmp_path):
        trained = train(VECTORS, replace(QUICK, architecture="batchtopk", epochs=2), tmp_path, progress=False)[KEY]
        assert trained.quality["l0"] == pytest.approx(2, rel=0.15)

    def test_several_layers(self, tmp_path):
        others = [
            replace(VECTORS, rows=X @ torch.eye(24).roll(layer, 0), key=("resid_post", layer)) for layer in (3, 5)
        ]
        trained = train(others, QUICK, tmp_path, progress=False)
        assert [t.key for t in trained.values()] == list(trained) == [KEY, ("resid_post", 5)]
        assert trained[KEY].held_out == trained["resid_post", 5].held_out
        assert Trained.load(tmp_path / "resid_post.5") == trained["resid_post", 5]


class TestResume:
    @pytest.mark.parametrize(("architecture", "stop"), [*((name, 3) for name in ARCHITECTURES), ("topk", 1)])
    def test_bit_for_bit(self, tmp_path, architecture, stop):
        recipe = replace(QUICK, architecture=architecture)

        def interrupt(key, record):
            if record["epoch"] == stop:
                raise KeyboardInterrupt

        train(VECTORS, recipe, tmp_path / "whole", progress=False)
        torch.manual_seed(1)
        with pytest.raises(KeyboardInterrupt):
            train(VECTORS, recipe, tmp_path / "parts", checkpoint_every=2, report=interrupt, progress=False)
        torch.manual_seed(2)
        train(VECTORS, recipe, tmp_path / "parts", resume=True, progress=False)
        for file in ("sae_weights.safetensors", "cfg.json", "training.json"):
            parts, whole = (tmp_path / name / "resid_post.3" / file for name in ("parts", "whole"))
            assert parts.read_bytes() == whole.read_bytes()
        assert not list(tmp_path.rglob("checkpoint*"))

    def test_finished_layers_are_kept(self, tmp_path):
        first = train(VECTORS, QUICK, tmp_path, progress=False)
        before = (tmp_path / "resid_post.3" / "sae_weights.safetensors").stat().st_mtime_ns
        assert train(VECTORS, QUICK, tmp_path, resume=True, progress=False) == first
        assert (tmp_path / "resid_post.3" / "sae_weights.safetensors").stat().st_mtime_ns == before

    def test_only_with_the_same_vectors_and_recipe(self, tmp_path):
        def interrupt(key, record):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(VECTORS, QUICK, tmp_path, checkpoint_every=1, report=interrupt, progress=False)
        with pytest.raises(InputError, match="holds a run already"):
            train(VECTORS, QUICK, tmp_path, progress=False)
        with pytest.raises(ArtefactError, match="made with another recipe"):
            train(VECTORS, replace(QUICK, lr=1e-3), tmp_path, resume=True, progress=False)
        with pytest.raises(ArtefactError, match="made with another data"):
            train(replace(VECTORS, rows=X + 1), QUICK, tmp_path, resume=True, progress=False)
        train(VECTORS, QUICK, tmp_path, resume=True, progress=False)
        with pytest.raises(InputError, match="trained by another recipe"):
            train(VECTORS, replace(QUICK, seed=1), tmp_path, resume=True, progress=False)


class TestEarlyStop:
    def test_keeps_the_best_epoch(self, tmp_path):
        """Noise has nothing to generalise: the held-out loss turns up, training stops, and the best epoch is kept."""
        noise = Vectors(torch.randn(300, 24, generator=torch.Generator().manual_seed(0)), key=KEY)
        recipe = Recipe("topk", width=200, k=8, batch_size=100, epochs=100, patience=4, warm_up=0.02, lr=1e-2)
        trained = train(noise, recipe, tmp_path, progress=False)[KEY]
        losses = [record["held_out_loss"] for record in trained.history]
        assert len(losses) == trained.best_epoch + 5 < 100
        assert losses[trained.best_epoch] == min(losses[2:])
        best = trained.history[trained.best_epoch]["explained_variance"]
        assert trained.quality["explained_variance"] == pytest.approx(best, abs=1e-4)

    def test_whole_traces_are_held_out(self):
        kept, out = VECTORS.split(0.1, seed=0)
        assert {i // 20 for i in kept}.isdisjoint({i // 20 for i in out})
        assert sorted([*kept, *out]) == list(range(len(X)))
        assert len(out) == 400


class TestBadInput:
    @pytest.mark.parametrize(
        ("vectors", "recipe", "message"),
        [
            (VECTORS, replace(QUICK, width=5000), "too few for a dictionary of width 5,000"),
            (replace(VECTORS, rows=X.clone().index_fill_(0, torch.tensor([7]), torch.nan)), QUICK, "vector 7 .* NaN"),
            (replace(VECTORS, rows=torch.ones(4000, 24)), QUICK, "all the same"),
            (replace(VECTORS, traces=["one"] * 4000), QUICK, "from one trace"),
            (VECTORS, replace(QUICK, k=30), "span all 24 dimensions"),
            (VECTORS, replace(QUICK, options={"bandwidth": 1}), "unknown option of a topk SAE 'bandwidth'"),
            ([VECTORS, VECTORS], QUICK, "same site and layer"),
        ],
    )
    def test_says_so_before_anything_is_written(self, tmp_path, vectors, recipe, message):
        with pytest.raises(InputError, match=message):
            train(vectors, recipe, tmp_path, progress=False)
        assert not list(tmp_path.rglob("*.safetensors"))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [({"architecture": "relu"}, "unknown architecture"), ({"k": 0}, "k must be"), ({"k": 49}, "cannot be active"),
         ({"lr": 0}, "lr must"), ({"held_out": 1}, "held_out is a share"), ({"options": {"a": {1}}}, "plain values")],
    )  # fmt: skip
    def test_recipes(self, setting, message):
        with pytest.raises(InputError, match=message):
            replace(GOOD, **setting).as_dict()

    def test_vectors(self):
        with pytest.raises(InputError, match="matrix"):
            Vectors(torch.zeros(0, 4))
        with pytest.raises(InputError, match="one per vector"):
            Vectors(X, ["a"])

    def test_a_run_that_diverges_stops(self, tmp_path):
        with pytest.raises(InputError, match="lower lr"):
            train(VECTORS, replace(QUICK, lr=1e20, options={"aux_loss_coefficient": 0.0}), tmp_path, progress=False)


def test_stored_vectors_name_their_traces(tmp_path):
    with ActivationStore.create(tmp_path, {KEY: 24, ("resid_post", 4): 24}, header={"reduce": "closing"}) as store:
        store.append({KEY: X[:40], ("resid_post", 4): X[40:80]}, [{"trace": f"t{i % 3}"} for i in range(40)])
    first, second = stored(ActivationStore.open(tmp_path))
    assert torch.equal(first.read(), X[:40])
    assert torch.equal(second.read(), X[40:80])
    assert list(first.traces or ())[:4] == ["t0", "t1", "t2", "t0"]
    assert first.source == {"reduce": "closing"}
    with pytest.raises(InputError, match="unknown place in this store"):
        stored(ActivationStore.open(tmp_path), [("resid_post", 9)])


def test_scaling():
    scaling = Scaling.of(X)
    z = scaling(X)
    torch.testing.assert_close(z.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    assert float(z.norm(dim=1).mean()) == pytest.approx(24**0.5)


def test_history_is_json(tmp_path):
    train(VECTORS, QUICK, tmp_path, progress=False)
    record = json.loads((tmp_path / "resid_post.3" / "training.json").read_text())
    assert record["n_train"] + len(record["held_out"]) == len(X)
    assert len(record["history"]) == 5
    assert sum(record["quality"]["density_histogram"]["counts"]) == round(48 * (1 - record["quality"]["dead"]))


def test_sinks_are_left_out_and_counted():
    x = X.clone()
    x[[3, 30]] *= 50
    kept = without_sinks(replace(VECTORS, rows=x))
    assert len(kept) == len(X) - 2
    assert kept.source["sinks_left_out"] == 2
    assert torch.equal(kept.read(), x[[i for i in range(len(X)) if i not in (3, 30)]])
    assert (kept.traces or ())[3 : 3 + 17] == ["0"] * 16 + ["1"]


def test_seeds_share_the_split_and_find_the_same_dictionary(tmp_path):
    seeds = [train(VECTORS, replace(GOOD, seed=s, epochs=15), tmp_path / str(s), progress=False)[KEY] for s in (0, 1)]
    assert seeds[0].held_out == seeds[1].held_out
    first, second = (t.sae.W_dec for t in seeds)
    assert not torch.equal(first, second)
    found = stability([first, second])
    assert found.mean > found.null + 0.2

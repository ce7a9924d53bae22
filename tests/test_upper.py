"""The upper layers alone say what the whole model says with one token edited, on every architecture."""

from __future__ import annotations

import pytest
import torch
import zoo

from emocircuits.activations import Add, edit
from emocircuits.activations.upper import UpperLayers
from emocircuits.errors import HookError, InputError

KEYS = [("resid_post", 1), ("resid_post", 3), ("resid_pre", 2)]
AT = [[3, 8], [], [0, 6, 13], [4]]
EVERYWHERE = [n for n in zoo.ONE_STREAM if n != "minicpmv4_6"]  # whose layers are recurrent


def texts(lengths=(9, 3, 14, 5)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 100, (n,), generator=generator).tolist() for n in lengths]


def edited(model, key, ids, position, added):
    """The whole model's logits [vocabulary] with `added` at one token: the oracle."""
    with edit(model, [Add(site=key[0], layer=key[1], vector=added, positions=[[(position, position + 1)]])]):
        return model(torch.tensor([ids])).logits[0, position]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_equals_the_whole_model_with_that_token_edited(name):
    model = zoo.build(name)
    for key in KEYS:
        upper = UpperLayers.read(model, key, texts(), AT, batch_size=2)
        added = torch.randn(len(upper), upper.residual.shape[1], generator=torch.Generator().manual_seed(1))
        assert upper.text.tolist() == [0, 0, 2, 2, 2, 3]
        with torch.no_grad():
            found = upper.logits(torch.arange(len(upper)), upper.residual + added)
            for i, (t, p) in enumerate(zip(upper.text.tolist(), upper.position.tolist())):
                want = edited(model, key, texts()[t], p, added[i])
                assert torch.isfinite(want).all()
                torch.testing.assert_close(found[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
def test_gradients_are_those_of_the_whole_model(name):
    model, key = zoo.build(name), ("resid_post", 1)
    upper = UpperLayers.read(model, key, texts(), AT)
    ours, whole = (torch.zeros(upper.residual.shape[1], requires_grad=True) for _ in range(2))
    upper.logits(torch.arange(len(upper)), upper.residual + ours).logsumexp(-1).sum().backward()
    for t, p in zip(upper.text.tolist(), upper.position.tolist()):
        edited(model, key, texts()[t], p, whole).logsumexp(-1).backward()
    torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-3, atol=1e-4)


def test_rows_do_not_depend_on_each_other_and_nothing_stays_on_the_model():
    model = zoo.build("gemma2")
    clean = model(torch.tensor([texts()[0]])).logits
    upper = UpperLayers.read(model, ("resid_post", 0), texts(), AT)
    with torch.no_grad():
        every = upper.logits(torch.arange(6), upper.residual)
        for i in range(6):
            alone = upper.logits(torch.tensor([i]), upper.residual[i : i + 1])[0]
            torch.testing.assert_close(alone, every[i], rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(torch.tensor([texts()[0]])).logits, clean)


@pytest.mark.parametrize(
    ("key", "at", "message"),
    [
        (("resid_pre", 0), AT, "between two blocks, not at resid_pre 0"),
        (("mlp_out", 1), AT, "between two blocks, not at mlp_out 1"),
        (("resid_post", 9), AT, "layer 9 does not exist"),
        (("resid_post", 1), [[]] * 4, "no token to run"),
        (("resid_post", 1), [[9], [], [], []], "text 0 has 9 tokens"),
    ],
)
def test_bad_input(key, at, message):
    with pytest.raises(InputError, match=message):
        UpperLayers.read(zoo.build("llama"), key, texts(), at)


def test_models_that_cannot():
    with pytest.raises(InputError, match="training mode"):
        UpperLayers.read(zoo.build("llama").train(), ("resid_post", 1), texts(), AT)
    with pytest.raises(HookError, match="no attention whose keys"):
        UpperLayers.read(zoo.build("minicpmv4_6"), ("resid_post", 1), texts(), AT)

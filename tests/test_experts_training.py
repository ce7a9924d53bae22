"""MoSE in training: where gradients go, the balance loss, the plain Trainer, gradient checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo

pytest.importorskip("peft")

from experts_cases import NAME, SMALL, gates_by_hand, labelled, layers_of, logits, seen, text_only, wrapped

from emocircuits.errors import HookError
from emocircuits.models.anatomy import resolve
from emocircuits.models.spans import placeholders
from emocircuits.steering import experts


def gradients(made: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    made.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in made.tensors() if p.grad is not None}


def only(modality: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same batch with the other modality's tokens replaced by text."""
    marks, prefix = {
        "audio": ((zoo.VISION_START, zoo.IMAGE, zoo.VISION_END), ("pixel", "image")),
        "image": ((zoo.AUDIO_START, zoo.AUDIO, zoo.AUDIO_END), ("input_f", "feature")),
    }[modality]
    kept, ids = {k: v for k, v in inputs.items() if not k.startswith(prefix)}, inputs["input_ids"]
    return {**kept, "input_ids": torch.where(torch.isin(ids, torch.tensor(marks)), 5, ids)}


def test_gradients_go_where_the_tokens_are() -> None:
    made, inputs = wrapped()
    made.train()
    assert all("lora_" in name for name, p in made.named_parameters() if p.requires_grad)
    made.set_requires_grad("default", False)  # peft's own switch knows all of them
    assert not any(p.requires_grad for p in made.parameters())
    made.set_requires_grad("default", True)
    assert all(p.requires_grad for _, p in made.tensors())
    text = text_only(made)
    found = gradients(made, made(**text, labels=text["input_ids"]).loss)
    assert {name.split(".lora_")[1] for name in found} == {"A.weight", "B.weight"}
    assert made.last_balance is None
    for mine, modality in enumerate(SMALL.modalities or ()):
        found = gradients(made, made(**labelled(only(modality, inputs))).loss)
        for part in ("experts", "gate"):
            parts = [grad for name, grad in found.items() if part in name]
            assert len(parts) == 8
            assert all(float(grad[1 - mine].abs().max()) == 0 for grad in parts)
            assert sum(float(grad[mine].abs().max()) > 0 for grad in parts) >= 7  # the last queries have no label
    found = gradients(made, made(**labelled(inputs)).loss)
    assert len(found) == len(dict(made.tensors()))
    assert all(float(grad.abs().max()) > 0 for name, grad in found.items() if "layers.3.self_attn.q_proj" not in name)


def test_balance_loss_is_the_formula_and_only_in_training() -> None:
    made, inputs = wrapped()
    given, layers = labelled(inputs), layers_of(made)
    plain = made(**given).loss
    assert made.last_balance is None
    made.train()
    watched = {path: seen(layer) for path, layer in layers.items()}
    records = {path: watch.__enter__() for path, watch in watched.items()}
    loss = made(**given).loss
    for watch in watched.values():
        watch.__exit__(None, None, None)
    tokens, per_layer = placeholders(made), []
    for path, layer in layers.items():
        x, per_modality = records[path][0][0], []
        for number, name in enumerate(("audio", "image")):
            with torch.no_grad():
                rows = [gates_by_hand(layer, t, number) for t in x[inputs["input_ids"] == tokens[name]]]
            top = [max(range(3), key=lambda e: float(g[e])) for g in rows]
            shares = [top.count(e) / len(top) for e in range(3)]
            means = [sum(float(g[e]) for g in rows) / len(rows) for e in range(3)]
            per_modality.append(3 * sum(f * p for f, p in zip(shares, means)))
        per_layer.append(sum(per_modality) / 2)
    expected = sum(per_layer) / len(per_layer)
    assert made.last_balance == pytest.approx(expected, rel=1e-5)
    assert float(loss) == pytest.approx(float(plain) + 0.1 * expected, rel=1e-5)
    as_tuple = made(**given, return_dict=False)
    assert float(as_tuple[0]) == pytest.approx(float(loss), rel=1e-6)
    half = made(**given, num_items_in_batch=2 * int((given["labels"][:, 1:] != -100).sum()))
    assert float(half.loss) == pytest.approx(float(loss) / 2, rel=1e-5)
    with experts.off(made):
        made(**given)
    assert made.last_balance is None


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    from emocircuits.steering._mose_layers import balance

    assert float(balance(torch.full((12, 4), 0.25))) == pytest.approx(1)
    assert float(balance(torch.eye(4).repeat(3, 1))) == pytest.approx(1)
    assert float(balance(torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 5))) == pytest.approx(4)
    made, inputs = wrapped()
    made.train()
    ids, layers = inputs["input_ids"], layers_of(made)
    sound, picture = (ids == placeholders(made)[n] for n in ("audio", "image"))
    with torch.no_grad():
        for name, parameter in made.tensors():
            if "lora_gate" in name:
                parameter.zero_()
    made(**labelled(inputs))
    assert made.last_balance == pytest.approx(1)
    first = next(iter(layers.values()))  # its inputs do not depend on gates, so they can be aimed at all of its tokens
    with seen(first) as found, torch.no_grad():
        made(**labelled(inputs))
        x = found[0][0]
        for number, places in enumerate((sound, picture)):
            tokens = x[places].double()
            aim = torch.linalg.lstsq(tokens, torch.ones(len(tokens), 1, dtype=torch.double), driver="gelsd").solution
            first.lora_gate["default"][number, 1] = 1e3 * aim[:, 0].float()
    made(**labelled(inputs))
    n = len(layers)
    assert made.last_balance == pytest.approx((3 + (n - 1)) / n, rel=1e-4)


def test_without_labels_the_balance_loss_is_handed_out() -> None:
    made, inputs = wrapped()
    made.train()
    with pytest.warns(UserWarning, match="balance_loss"):
        made(**inputs)
    gradient = gradients(made, made.balance_loss)
    assert all("gate" in name or float(g.abs().max()) >= 0 for name, g in gradient.items())
    assert max(float(g.abs().max()) for n, g in gradient.items() if "gate" in n) > 0
    assert float(made.balance_loss) == pytest.approx(0.1 * made.last_balance)


class Rows(torch.utils.data.Dataset):
    """One batch, row by row, with its features."""

    def __init__(self, given: dict[str, Any], n: int = 2) -> None:
        self.given, self.n = given, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"row": index}

    def together(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        index = torch.tensor([r["row"] for r in rows])
        patches = self.given["pixel_values"].view(self.n, 16, -1)
        made = {k: v[index] for k, v in self.given.items() if k != "pixel_values"}
        return {**made, "pixel_values": patches[index].flatten(0, 1)}


def trainer(made: Any, data: Rows, folder: Any, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), **{"per_device_train_batch_size": 2, "max_steps": 12, "learning_rate": 2e-2, "use_cpu": True,
        "report_to": [], "remove_unused_columns": False, "logging_steps": 1, "save_strategy": "no", "seed": 1,
        "disable_tqdm": True, "lr_scheduler_type": "constant", **more}
    )  # fmt: skip
    return Trainer(made, arguments, train_dataset=data, eval_dataset=data, data_collator=data.together)


def losses(done: Any) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_the_plain_trainer_trains_the_experts_and_nothing_else(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = zoo.build(NAME)
    inputs = zoo.multimodal_inputs(NAME, model)
    clean = copy.deepcopy(model.state_dict())
    made = experts.wrap(model, SMALL)
    start = {n: p.detach().clone() for n, p in made.tensors()}
    made.train()
    first = float(made(**labelled(inputs)).loss)
    done = trainer(made, Rows(labelled(inputs)), tmp_path)
    done.train()
    assert losses(done)[0] == pytest.approx(first, rel=1e-4), "the logged loss holds the balance loss"
    assert losses(done)[-1] < 0.9 * first
    for name, parameter in made.get_base_model().named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, clean[name.replace(".base_layer", "")]), name
    still = {n.split("layers.")[1] for n, p in made.tensors() if torch.equal(p, start[n])}
    last = "3.self_attn.q_proj.lora"  # queries whose tokens have no label and that nothing reads
    assert still == {f"{last}_experts", f"{last}_modality"}
    assert 1 <= (made.last_balance or 0) <= 3


def test_accumulated_batches_count_as_one(tmp_path: Any) -> None:
    found = []
    for size, steps in ((2, 1), (1, 2)):
        made, inputs = wrapped()
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        done = trainer(made, Rows(labelled(inputs)), tmp_path, **arguments)
        done.train()
        found.append(losses(done)[0])
    # The balance of two halves is not that of the whole, but near it; counted twice, it would be 0.1 away and more.
    assert found[0] == pytest.approx(found[1], abs=0.03)


def test_trainer_goes_on_from_its_checkpoint(tmp_path: Any) -> None:
    made, inputs = wrapped()
    data = Rows(labelled(inputs))
    whole = trainer(made, data, tmp_path / "a", max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    again, _ = wrapped(seed=7)
    resumed = trainer(again, data, tmp_path / "a", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, a), (_, b) in zip(made.tensors(), again.tensors()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    best, _ = wrapped(seed=7)
    experts.reload(best, tmp_path / "a" / "checkpoint-4")
    assert torch.equal(logits(best.eval(), inputs), logits(made.eval(), inputs))


def test_trainer_checkpoints_gradients_and_loads_the_best_model(tmp_path: Any) -> None:
    found = []
    for again in (False, True):
        made, inputs = wrapped()
        data = Rows(labelled(inputs))
        more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        more |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        done = trainer(made, data, tmp_path / str(again), gradient_checkpointing=again, **more)
        done.train()
        evaluated = {e["step"]: e["eval_loss"] for e in done.state.log_history if "eval_loss" in e}
        assert float(made.eval()(**labelled(inputs)).loss) == pytest.approx(max(evaluated.values()), rel=1e-5)
        assert evaluated[4] < max(evaluated.values()), "the best one, here the first, is not the last"
        found.append(losses(done))
    assert found[0] == found[1]


def checkpointed(made: Any, **keywords: Any) -> Any:
    made.get_base_model().activation_checkpointing_enable(keywords)
    return made.train()


def test_gradient_checkpointing_is_exact_also_when_passes_cross() -> None:
    """Two passes before one backward: the recomputation of the first must see its own tokens."""
    other: dict[str, torch.Tensor] = {}
    for again in (False, True):
        made, inputs = wrapped()
        made.train()
        runs: list[int] = []
        next(iter(layers_of(made).values())).base_layer.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        if again:
            checkpointed(made, use_reentrant=False)
        text = only("image", inputs)
        loss = made(**labelled(inputs)).loss + 0.5 * made(**labelled(text)).loss
        before = len(runs)
        found = gradients(made, loss)
        assert len(runs) - before == (2 if again else 0), "checkpointing must compute the layer again"
        if again:
            for name, gradient in found.items():
                assert torch.equal(gradient, other[name]), name
        other = found


def test_reentrant_checkpointing_is_refused() -> None:
    made, inputs = wrapped()
    checkpointed(made, use_reentrant=True)
    with pytest.raises(HookError, match="use_reentrant"):
        made(**labelled(inputs))
    made.eval()
    made(**labelled(inputs))
    made, inputs = wrapped()
    made.train()
    block = made.get_base_model().get_submodule(resolve(made.get_base_model()).blocks[0])
    forward = block.forward
    block.forward = (
        lambda *a, **k: torch.utils.checkpoint.checkpoint(  # by hand, where no setting shows it
            lambda x: forward(x, *a[1:], **k), a[0].requires_grad_(), use_reentrant=True
        )
    )
    with pytest.raises(HookError, match="use_reentrant"):
        made(**labelled(inputs))

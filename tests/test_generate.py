"""Reading and writing under generate(): every cache, beams, assistants and chunks equal plain whole-sequence passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from oracle import read, traces, writing
from torch import Tensor

from emocircuits.activations import Ablate, Add, Edit, Patch, Scale, capture, edit, record
from emocircuits.errors import HookError, InputError

WIDTH, NEW = 32, 4
STATIC = {"cache_implementation": "static", "disable_compile": True}
CACHES: dict[str, dict[str, Any]] = {"dynamic": {}, "static": STATIC, "none": {"use_cache": False}}


def vector(seed: int = 0) -> Tensor:
    return 4 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def generate(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    """Greedy (unless told otherwise), with the scores of every step."""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**options, **kwargs})


def scores(out: Any) -> Tensor:
    """[steps, B, vocabulary]."""
    return torch.stack(out.scores)


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor], site: str, where: Any, steps: int = NEW) -> tuple[Tensor, Tensor]:
    """The oracle: whole-sequence passes without a cache; where(columns, step) says which columns get the vector."""
    ids, mask, found = inputs["input_ids"], inputs["attention_mask"], []
    for step in range(steps):
        columns = torch.arange(ids.shape[1])
        chosen = where(columns, step)
        chosen = chosen[None] if chosen.dim() == 1 else chosen

        def change(x: Tensor, chosen: Tensor = chosen) -> Tensor:
            return torch.where(chosen[..., None], x + vector(), x)

        with writing(model, site, 1, change):
            found.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids, torch.stack(found)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_phases_equal_whole_passes(name: str, positions: str, cache: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, length=8, padding="left")
    n = 8

    def where(columns: Tensor, step: int) -> Tensor:
        # Under a cache, "last" is every token once, when it was the newest; without, only the newest of each pass.
        newest = columns == n + step - 1 if cache == "none" else columns >= n - 1
        return {"all": columns >= 0, "prompt": columns < n, "generated": columns >= n, "last": newest}[positions]

    for site in ("resid_post", "resid_mid"):
        ids, expected = greedy(model, inputs, site, where)
        with edit(model, Add(site=site, layer=1, vector=vector(), positions=positions)):
            out = generate(model, inputs, **CACHES[cache])
            again = generate(model, inputs, **CACHES[cache])
        assert torch.equal(out.sequences, ids)
        close(scores(out), expected)
        assert torch.equal(scores(again), scores(out)), "a second call in one block starts afresh"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_spans_count_real_tokens_also_beyond_the_prompt_and_the_window(name: str, cache: str) -> None:
    """Sliding windows hide old columns from late masks, which must not shift the count."""
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, length=7, padding="left")
    index = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1).cumsum(-1) - 1
    spans = [[(1, 3), (8, 10)], [(4, 7)]]

    def where(columns: Tensor, step: int) -> Tensor:
        at = index[:, : len(columns)]
        inside = [(at[0] >= 1) & (at[0] < 3) | (at[0] >= 8) & (at[0] < 10), (at[1] >= 4) & (at[1] < 7)]
        return torch.stack(inside) & (torch.stack([at[0], at[1]]) >= 0)

    ids, expected = greedy(model, inputs, "resid_post", where, steps=6)
    with edit(model, Add(layer=1, vector=vector(), positions=spans)):
        out = generate(model, inputs, max_new_tokens=6, **CACHES[cache])
    assert torch.equal(out.sequences, ids)
    close(scores(out), expected)


@pytest.mark.parametrize("site", ["q", "k", "v", "z", "attn_out", "mlp_post", "mlp_out", "resid_pre", "final_norm"])
def test_every_site_is_edited_in_every_pass(site: str) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, length=6, padding="left")
    made = Scale(site=site, layer=1, factor=0.2)
    with edit(model, made):
        cached, whole = generate(model, inputs), generate(model, inputs, use_cache=False)
    close(scores(cached), scores(whole))
    with torch.no_grad(), writing(model, site, 1, lambda x: 0.2 * x):
        ids = cached.sequences[:, :-1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW - 1, dtype=torch.long)], 1)
        close(cached.scores[-1], model(input_ids=ids, attention_mask=mask).logits[:, -1])


@pytest.mark.parametrize("cache", CACHES)
def test_rows_and_vectors_of_rows_equal_separate_runs(cache: str) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=3, length=6, padding="left")
    clean = generate(model, inputs, **CACHES[cache])
    alone = []
    for seed in range(3):
        with edit(model, Add(layer=1, vector=vector(seed))):
            alone.append(generate(model, inputs, **CACHES[cache]))
    with edit(model, Add(layer=1, vector=torch.stack([vector(seed) for seed in range(3)]))):
        together = generate(model, inputs, **CACHES[cache])
    with edit(model, Add(layer=1, vector=vector(), coefficient=torch.tensor([1.0, 0.0, 0.0]))):
        by_coefficient = generate(model, inputs, **CACHES[cache])
    with edit(model, Add(layer=1, vector=vector(2), rows=[2])):
        by_row = generate(model, inputs, **CACHES[cache])
    for row in range(3):
        close(scores(together)[:, row], scores(alone[row])[:, row])
        close(scores(by_coefficient)[:, row], scores(alone[0] if row == 0 else clean)[:, row])
        close(scores(by_row)[:, row], scores(alone[2] if row == 2 else clean)[:, row])
    assert torch.equal(scores(by_row)[:, :2], scores(clean)[:, :2]), "other rows are bit-identical"


BEAMS: dict[str, dict[str, Any]] = {
    "cached": {}, "uncached": {"use_cache": False}, "several": {"num_return_sequences": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", BEAMS)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_under_beams_a_row_is_a_row_of_the_batch_that_was_given(kind: str, positions: str) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=3, length=6, padding="left")
    beams = {"num_beams": 3, "return_dict_in_generate": False, "output_scores": False, **BEAMS[kind]}
    clean, per = generate(model, inputs, **beams), beams.get("num_return_sequences", 1)
    with edit(model, Add(layer=1, vector=vector(), positions=positions)):
        steered = generate(model, inputs, **beams)
    assert not torch.equal(steered, clean)
    vectors = torch.stack([0 * vector(), vector(), 0 * vector()])
    for made in (
        Add(layer=1, vector=vector(), rows=[1], positions=positions),
        Add(layer=1, vector=vectors, positions=positions),
    ):
        with edit(model, made):
            found = generate(model, inputs, **beams)
        expected = clean.clone()
        expected[per : 2 * per] = steered[per : 2 * per]
        assert torch.equal(found, expected)
    with edit(model, Add(layer=1, vector=vector(), positions=positions)):
        assert torch.equal(generate(model, inputs, **{**beams, "use_cache": False}), steered), "a cache changes nothing"


def test_a_forward_after_beams_sees_plain_rows_again() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=3, length=6)
    with torch.no_grad():
        clean = model(**inputs).logits
        with edit(model, Scale(layer=1, factor=0.0, rows=[1])):
            generate(model, inputs, num_beams=3)
            found = model(**inputs).logits
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert not torch.equal(found[1], clean[1])


def test_rows_beyond_the_given_batch_are_refused_under_beams() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=2)
    made = Scale(factor=0.5, rows=[2])
    with pytest.raises(InputError, match="names row 2, but the batch has 2 rows"), edit(model, made):
        generate(model, inputs, num_beams=3)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_assisted_decoding_equals_plain_decoding(positions: str) -> None:
    """The first pass holds the prompt and the first candidates at once."""
    model, helper = zoo.build("llama"), zoo.build("llama")
    helper.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
    inputs = zoo.inputs("llama", model, batch=1, length=6)
    made = Add(layer=1, vector=vector(), positions=positions)
    with edit(model, made):
        plain = generate(model, inputs, max_new_tokens=8)
    for assistance in ({"assistant_model": helper}, {"prompt_lookup_num_tokens": 3}):
        with edit(model, made):
            for _ in range(2):
                out = generate(model, inputs, max_new_tokens=8, **assistance)
                assert torch.equal(out.sequences, plain.sequences)
                close(scores(out), scores(plain))


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_a_prompt_in_chunks_equals_a_whole_one(positions: str) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, length=9, padding="left")
    with edit(model, Add(layer=1, vector=vector(), positions=positions)):
        whole, chunked = generate(model, inputs), generate(model, inputs, prefill_chunk_size=4)
    close(scores(chunked), scores(whole))


@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_a_second_turn_on_the_same_cache_has_its_own_prompt(positions: str) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=1, length=6)
    with edit(model, Add(layer=1, vector=vector(), positions=positions)):
        one = generate(model, inputs)
        said = torch.cat([one.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = {"input_ids": said, "attention_mask": torch.ones_like(said)}
        two = generate(model, turn, past_key_values=one.past_key_values)
    # In the cache are 6 prompt columns and 3 generated ones; the fourth generated token is read with the second prompt.
    n, cached = said.shape[1], 6 + NEW - 1

    def where(columns: Tensor, step: int) -> Tensor:
        generated = ((columns >= 6) & (columns < cached)) | (columns >= n)
        return generated if positions == "generated" else ~generated

    ids, expected = greedy(model, turn, "resid_post", where)
    assert torch.equal(two.sequences, ids)
    close(scores(two), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_loops_of_the_users_own_have_phases_too(use_cache: bool) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, length=6)
    _, expected = greedy(model, inputs, "resid_post", lambda columns, _step: columns >= 6)
    with torch.no_grad(), edit(model, Add(layer=1, vector=vector(), positions="generated")):
        for _ in range(2):
            ids, cache, found = inputs["input_ids"], None, []
            for _step in range(NEW):
                fed = ids if cache is None else ids[:, -1:]
                out = model(input_ids=fed, past_key_values=cache, use_cache=use_cache)
                cache = out.past_key_values if use_cache else None
                found.append(out.logits[:, -1])
                ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], 1)
            close(torch.stack(found), expected)


def test_prompts_given_as_embeddings_or_by_position_have_phases_too() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, length=6, padding="left")
    with edit(model, Add(layer=1, vector=vector(), positions="generated", rows=[1])):
        expected = scores(generate(model, inputs))
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        embeds = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
        close(scores(generate(model, embeds)), expected)
        out = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=NEW, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        close(scores(out), expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "voxtral"])
def test_pictures_and_sound_are_part_of_the_prompt(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.multimodal_inputs(name, model)
    clean = generate(model, inputs)
    with edit(model, Add(layer=1, vector=vector(), positions="generated")):
        late = generate(model, inputs)
    with edit(model, Add(layer=1, vector=vector(), positions="prompt", rows=[1])):
        early = generate(model, inputs)
    close(late.scores[0], clean.scores[0])
    assert not torch.allclose(late.scores[1], clean.scores[1], atol=1e-2)
    assert torch.equal(scores(early)[:, 0], scores(clean)[:, 0])
    assert not torch.allclose(early.scores[0][1], clean.scores[0][1], atol=1e-2)


def test_a_patch_of_the_prompt_is_not_asked_to_fit_later_passes() -> None:
    model = zoo.build("llama")
    inputs, other = (zoo.inputs("llama", model, length=6, seed=seed) for seed in (0, 1))
    value = capture(model, other, "resid_post", 3, positions="all")["resid_post", 3]
    with edit(model, Patch(layer=3, value=value, positions="prompt")):
        out = generate(model, inputs)
    close(out.scores[0], generate(model, other).scores[0])


# ---------------------------------------------------------------- compiled by generate itself


@pytest.mark.parametrize("compiled_first", [True, False])
def test_the_call_that_generate_compiles_for_static_caches_notices_edits(compiled_first: bool) -> None:
    """On a CPU transformers compiles only when told to; on a GPU it does so by default."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, plain = zoo.build("llama"), zoo.build("llama")
    for each in (model, plain):
        each.model.layers, each.config.num_hidden_layers = each.model.layers[:1], 1
    inputs = zoo.inputs("llama", model, length=5, padding="left")
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 3}
    made = [Add(vector=vector(), positions="generated"), Scale(site="z", factor=0.5)]
    clean = scores(generate(plain, inputs, max_new_tokens=3))
    with edit(plain, made):
        expected = scores(generate(plain, inputs, max_new_tokens=3))
    if compiled_first:
        close(scores(generate(model, inputs, **compiled)), clean)
    with edit(model, made):
        close(scores(generate(model, inputs, **compiled)), expected)
    assert "_compiled_call" in vars(model), "the test must really reach the compiled call"
    close(scores(generate(model, inputs, **compiled)), clean)
    torch._dynamo.reset()


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("cache", CACHES)
def test_record_keeps_every_pass(cache: str) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, length=6, padding="left")
    with record(model, ["resid_post", "z", "pattern"], 1) as steps:
        out = generate(model, inputs, **CACHES[cache])
    assert len(steps) == NEW
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW - 1, dtype=torch.long)], 1)
    for step, acts in enumerate(steps):
        whole = {"input_ids": out.sequences[:, : 6 + step], "attention_mask": mask[:, : 6 + step]}
        expected = read(model, whole)
        for site in ("resid_post", "z"):
            torch.testing.assert_close(acts[site, 1], expected[site, 1][:, -1], atol=1e-5, rtol=1e-4)
        seen = acts["pattern", 1][:, :, -1, : 6 + step]
        torch.testing.assert_close(seen, expected["pattern", 1][:, :, -1], atol=1e-5, rtol=1e-4)


def test_record_under_beams_keeps_every_beam() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=2, length=6, padding="left")
    with record(model, "resid_post", 1) as steps:
        generate(model, inputs, num_beams=3)
    assert [acts["resid_post", 1].shape for acts in steps] == [(6, WIDTH)] * NEW
    prompt = capture(model, inputs, "resid_post", 1)["resid_post", 1]
    torch.testing.assert_close(steps[0]["resid_post", 1], prompt.repeat_interleave(3, 0), atol=1e-5, rtol=1e-4)


def test_record_sees_what_an_edit_wrote() -> None:
    model = zoo.build("llama")
    with edit(model, Ablate(layer=1)), record(model, "resid_post", 1) as steps:
        generate(model, zoo.inputs("llama", model, length=6))
    assert not any(acts["resid_post", 1].any() for acts in steps)


# ---------------------------------------------------------------- no trace


@pytest.mark.parametrize("made", [Scale(layer=1, factor=0.5), Add(site="mlp_out", layer=1, vector=vector())])
def test_generation_is_bit_identical_after_the_block(made: Edit) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, padding="left")
    clean, before = scores(generate(model, inputs)), traces(model)
    with edit(model, made), record(model, "pattern", 1):
        assert not torch.equal(scores(generate(model, inputs)), clean)
    assert traces(model) == before
    assert torch.equal(scores(generate(model, inputs)), clean)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), edit(model, made), record(model, "pattern", 1):
        generate(model, inputs)
    handle.remove()
    assert traces(model) == before
    assert torch.equal(scores(generate(model, inputs)), clean)


def test_a_generated_edit_that_saw_only_a_prompt_is_named() -> None:
    model = zoo.build("llama")
    made = Scale(layer=1, factor=0.5, positions="generated")
    with pytest.raises(HookError, match="layer 1 never fired in 1 forward"), edit(model, made):
        generate(model, zoo.inputs("llama", model), max_new_tokens=1)

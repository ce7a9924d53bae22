"""`emocircuits balance`: what drives a model's answers on prepared batches, written as JSON and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from .. import artefact
from .._report_html import Page, esc, interval, num, table
from ..errors import InputError
from ..evaluation.scoring import number
from ..evaluation.statistics import clustered_bootstrap
from ..models.fingerprint import fingerprint
from ..models.load import Loaded
from ..runs import Run
from . import plots
from .balance import MODES, Answers, Balance, measure, spans_of
from .sweep import sweep, ways

Found = Mapping[str, Any]


def read_batch(path: str | Path) -> dict[str, Tensor]:
    """One batch of processor outputs from a safetensors file; raises InputError for another file, or no input_ids."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        batch = load_file(Path(path).expanduser())
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} as safetensors ({error}); save what your processor returns") from error
    if "input_ids" not in batch:
        raise InputError(
            f"{path} has no input_ids, only {', '.join(sorted(batch))}; save all that the processor returns"
        )
    return batch


def run_balance(
    loaded: Loaded, files: Sequence[str | Path], words: Mapping[str, str], out: str | Path, *, seed: int = 0,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Measure every batch; write balance.json, reallocation.json and report.html into `out`, and return the page.

    words: {label: the word that answers}. An interrupted run resumes with the batches that are left, and one made
    before reallocation was measured gets it. Raises InputError for batches whose prompts hold no modality.
    """
    answers = Answers.of_words(loaded.tokenizer, words)
    names = [str(Path(f).expanduser().resolve()) for f in files]
    run = Run(out, {"model": fingerprint(loaded.model), "batches": names, "answers": dict(words), "seed": seed})
    task = progress.add_task("measuring", total=3 * len(names)) if progress else None

    def each(stage: str, make: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
        parts = []
        for i, name in enumerate(names):
            parts.append(run.json_stage(f"{stage}_{i}", lambda n=name: make(n)))
            if progress is not None and task is not None:
                progress.advance(task)
        return parts

    parts = each("batch", lambda n: _plain(_measured(loaded.model, n, answers, seed)))
    found = run.json_stage("balance", lambda: summary(parts, seed))
    swept = each("swept", lambda n: _swept(loaded.model, n, answers))
    dealt = each("dealt", lambda n: _swept(loaded.model, n, answers, seed))
    moved = run.json_stage("reallocation", lambda: reallocated(parts, swept, dealt, names, seed))
    return artefact.write_text_atomic(run.file("report.html"), page(found, moved, loaded.name))


def _measured(model: Any, path: str, answers: Answers, seed: int) -> Balance:
    batch = read_batch(path)
    modes = MODES if len(batch["input_ids"]) > 1 else tuple(m for m in MODES if m != "resample")
    return measure(model, batch, answers, modes=modes, seed=seed)


def _swept(model: Any, path: str, answers: Answers, dealt: int | None = None) -> dict[str, Any]:
    """Answers under every reallocation; dealt: a seed, for the control with random spans."""
    batch = read_batch(path)
    spans = spans_of(model, batch)
    if dealt is not None:
        if len(spans.present()) < 2:
            return {}  # dealing out one modality changes nothing, so there is no such control
        spans = spans.dealt(torch.Generator().manual_seed(dealt))
    return {way: p.tolist() for way, p in sweep(model, batch, answers, spans=spans).items()}


def _plain(found: Balance) -> dict[str, Any]:
    return {
        "modalities": list(found.modalities), "answers": list(found.answers), "scores": found.scores.tolist(),
        "effects": {m: e.tolist() for m, e in found.effects.items()}, "gradient": found.gradient.tolist(),
        "changed": {m: c.float().tolist() for m, c in found.changed.items()}, "prior": found.prior.tolist(),
        "mass": {n: [[[number(v) for v in r] for r in x] for x in m.tolist()] for n, m in found.mass.items()},
    }  # fmt: skip


def _balance(part: Found) -> Balance:
    return Balance(
        tuple(part["modalities"]), tuple(part["answers"]), torch.tensor(part["scores"]),
        {m: torch.tensor(e) for m, e in part["effects"].items()}, torch.tensor(part["gradient"]),
        {n: torch.tensor(np.array(m, dtype=float)) for n, m in part["mass"].items()},
        {m: torch.tensor(c) for m, c in part["changed"].items()}, torch.tensor(part["prior"]),
    )  # fmt: skip


def summary(parts: Sequence[Found], seed: int = 0) -> dict[str, Any]:
    """All batches as one: means with intervals over rows, agreement, and what the text alone explains.

    Raises InputError when batches hold different modalities.
    """
    if len({tuple(p["modalities"]) for p in parts}) != 1:
        raise InputError("the batches hold different modalities; measure them in runs of their own")
    found = [_balance(p) for p in parts]
    names = found[0].modalities
    modes = [m for m in MODES if all(m in b.effects for b in found)]
    whole = Balance(
        names, found[0].answers, torch.cat([b.scores for b in found]),
        {m: torch.cat([b.effects[m] for b in found]) for m in modes}, torch.cat([b.gradient for b in found]),
        {n: torch.cat([b.mass[n] for b in found]) for n in found[0].mass},
        {m: torch.cat([b.changed[m] for b in found]) for m in modes}, torch.cat([b.prior for b in found]),
    )  # fmt: skip

    def mean(values: Tensor) -> dict[str, Any]:
        return _mean(values.numpy(), seed)

    every = {**whole.effects, "gradient": whole.gradient}
    return {
        "n_rows": len(whole.scores), "modalities": list(names), "answers": list(whole.answers),
        "effects": {m: {n: mean(e[:, i]) for i, n in enumerate(names)} for m, e in every.items()},
        "differences": {m: {n: mean(e[:, 0] - e[:, i]) for i, n in enumerate(names) if i} for m, e in every.items()},
        "changed": {m: {n: mean(c[:, i]) for i, n in enumerate(names)} for m, c in whole.changed.items()},
        "mass": {n: [[number(v) for v in row] for row in m.nanmean(0).tolist()] for n, m in whole.mass.items()},
        "mass_mean": {n: number(m.nanmean()) for n, m in whole.mass.items()},
        "agreement": {k: number(v) for k, v in whole.agreement().items()},
        "text_reliance": number(whole.text_reliance()),
    }  # fmt: skip


def _mean(values: np.ndarray, seed: int) -> dict[str, Any]:
    found = asdict(clustered_bootstrap(values, [str(i) for i in range(len(values))], seed=seed))
    return {k: number(v) if isinstance(v, float) else v for k, v in found.items()}


def reallocated(
    parts: Sequence[Found], swept: Sequence[Found], dealt: Sequence[Found], names: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Every prompt's answers without and with reallocation, and how often each way and strength changes them.

    dealt: the same with modalities dealt out at random among their tokens; "random" says how often that changes the
    answer, "beyond_random" the paired difference. Both are empty when all prompts hold one modality only.
    """
    strengths = {way.name: list(way.strengths) for way in ways(parts[0]["modalities"])}
    rows, stems = [], [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        stems = [f"{stem} {k}" for k, stem in enumerate(stems)]
    for part, after, stem in zip(parts, swept, stems):
        for i, scores in enumerate(part["scores"]):
            moved = {way: [p[i] for p in after[way]] for way in strengths}
            rows.append({"name": f"{stem}, row {i}", "before": np.exp(scores).tolist(), "after": moved})
    before = np.array([row["before"] for row in rows]).argmax(-1)

    def changed(found: Sequence[Found], way: str) -> np.ndarray:
        """[strengths, rows] 1 where the answer is another one."""
        return (np.concatenate([p[way] for p in found], 1).argmax(-1) != before).astype(float)

    def means(of: Callable[[str], np.ndarray]) -> dict[str, list[dict[str, Any]]]:
        return {way: [_mean(row, seed) for row in of(way)] for way in strengths}

    random = all(dealt)
    return {
        "answers": list(parts[0]["answers"]), "strengths": strengths, "rows": rows,
        "changed": means(lambda way: changed(swept, way)),
        "random": means(lambda way: changed(dealt, way)) if random else {},
        "beyond_random": means(lambda way: changed(swept, way) - changed(dealt, way)) if random else {},
    }  # fmt: skip


def page(found: Found, moved: Found, model: str) -> str:
    """balance.json and reallocation.json as one self-contained HTML document."""
    made = Page(f"What drives the answers of {model}")
    made.add("effects", "What the answer needs", _effects(made, found))
    made.add("attention", "Where the last token looks", _attention(made, found))
    bars = plots.changed_bars(moved["changed"], moved["strengths"], moved.get("random"))
    said = (
        "Share of prompts whose likeliest answer is another one when attention is moved before it answers; pale: the"
        " same with the modalities dealt out at random among their tokens."
    )
    made.add("reallocation", "What moves the answer", made.figure(bars, "Answers changed by reallocation", said))
    rows = [[esc(k), num(v)] for k, v in found["agreement"].items()]
    words = (
        "Spearman correlation over prompts and modalities. Attention says where a model looks; only taking something "
        "out says what the answer needs."
    )
    made.add("agreement", "Do the measures agree?", table(words, ["measures", "correlation"], rows, wide=False))
    return made.render(f"<h1>{esc(made.title)}</h1>{''.join(f'<p>{s}</p>' for s in sentences(found))}")


def sentences(found: Found) -> list[str]:
    """The findings of balance.json in sentences of HTML, whichever way they came out."""
    first, *others = found["modalities"]
    without = " and ".join(map(esc, found["modalities"]))
    said = [
        f"{found['n_rows']} prompts. Without {without} the answer stays the same in "
        f"{num(found['text_reliance'], '.0%')} of them: that much the text alone explains."
    ]
    for other in others:
        gaps = {m: d[other] for m, d in found["differences"].items() if m != "gradient"}
        signs = {_sign(g) for g in gaps.values()}
        words = "; ".join(f"{esc(m)} {interval(g, '.2f')}" for m, g in gaps.items())
        verdict = "no clear preference"
        if signs in ({1}, {-1}):
            verdict = f"{esc(first if signs == {1} else other)} drives the answers more"
        said.append(f"Log-odds that {esc(first)} gives minus those of {esc(other)}: {words}. So: {verdict}.")
    return said


def _effects(made: Page, found: Found) -> str:
    caption = "Its tokens replaced by their mean, by another clip's, hidden from all later tokens, or to first order."
    names = found["modalities"]
    rows = [[esc(m), *(interval(c[n]) for n in names)] for m, c in found["changed"].items()]
    bars = made.figure(plots.effect_bars(found["effects"]), "Effect of each modality", caption)
    return bars + table("How often the answer changes.", ["taken out by", *map(esc, names)], rows, wide=False)


def _attention(made: Page, found: Found) -> str:
    rows = [[esc(n), num(v, ".1%")] for n, v in found["mass_mean"].items()]
    maps = (made.figure(plots.mass_map(m, n), f"{n}: attention of the last token") for n, m in found["mass"].items())
    shares = table("Mean over layers and heads.", ["modality", "share"], rows, wide=False)
    return f'{shares}<div class="grid">{"".join(maps)}</div>'


def _sign(found: Found) -> int:
    low, high = number(found.get("low")), number(found.get("high"))
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0

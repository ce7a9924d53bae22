"""Pages of latents as files that others read: SAEDashboard's batches for Neuronpedia, and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emocircuits._report_html import Page, esc, note, num, table
from emocircuits.activations.sites import Key
from emocircuits.artefact import write_json_atomic, write_text_atomic
from emocircuits.errors import InputError

from .lens import hook_name
from .pages import Context, Group, LatentPage
from .plots import bars

PER_FILE = 128
GROUND = "107, 79, 216"


def neuronpedia(
    pages: Sequence[LatentPage], folder: str | Path, *, model_id: str, key: Key, name: str, dataset: str = ""
) -> list[Path]:
    """Write batch-0.json, ... in the format of SAEDashboard's Neuronpedia runner, from which it makes uploads.

    model_id: Neuronpedia's name of the model; name: of the set of SAEs. Neighbours are latents (by Pearson's r, and
    cosine of decoder rows); neurons that correlate are left empty, for a residual stream has none. Raises InputError
    for no pages.
    """
    hook_name(key)  # raises InputError for a place that the format cannot name
    if not pages:
        raise InputError("there are no pages to write; name at least one latent")
    written = []
    for i in range(0, len(pages), PER_FILE):
        batch = {
            "model_id": model_id, "layer": key[1], "sae_set": name, "sae_id_suffix": None,
            "features": [_feature(page, dataset) for page in pages[i : i + PER_FILE]],
        }  # fmt: skip
        written.append(write_json_atomic(Path(folder) / f"batch-{i // PER_FILE}.json", batch))
    return written


def _feature(page: LatentPage, dataset: str) -> dict[str, Any]:
    contexts = [c for g in page.groups for c in g.contexts]
    return {
        "feature_index": page.latent,
        "neuron_alignment_indices": [i for i, _, _ in page.aligned],
        "neuron_alignment_values": _rounded(v for _, v, _ in page.aligned),
        "neuron_alignment_l1": _rounded(s for _, _, s in page.aligned),
        "correlated_neurons_indices": [], "correlated_neurons_l1": [], "correlated_neurons_pearson": [],
        "correlated_features_indices": [i for i, _, _ in page.beside],
        "correlated_features_l1": _rounded(c for _, _, c in page.beside),
        "correlated_features_pearson": _rounded(r for _, r, _ in page.beside),
        "neg_str": [w for w, _ in page.suppressed], "neg_values": _rounded(v for _, v in page.suppressed),
        "pos_str": [w for w, _ in page.promoted], "pos_values": _rounded(v for _, v in page.promoted),
        "frac_nonzero": page.density,
        "freq_hist_data_bar_values": _rounded(page.activations.middles),
        "freq_hist_data_bar_heights": list(page.activations.counts),
        "logits_hist_data_bar_heights": list(page.logits.counts),
        "logits_hist_data_bar_values": _rounded(page.logits.middles),
        "n_prompts_total": page.n_texts,
        "n_tokens_in_prompt": max((len(c.tokens) for c in contexts), default=0),
        "dataset": dataset, "decoder_weights_dist": [], "vector": [],
        "activations": [_activation(c, g) for g in page.groups for c in g.contexts],
    }  # fmt: skip


def _activation(context: Context, group: Group) -> dict[str, Any]:
    """The format marks the strongest contexts by -1 for the lower end and for the share."""
    strongest = group.share is None
    return {
        "bin_min": -1 if strongest else round(group.low, 3), "bin_max": round(group.high, 3),
        "bin_contains": -1 if strongest else group.share, "qualifying_token_index": context.peak,
        "tokens": list(context.tokens), "values": _rounded(context.values),
    }  # fmt: skip


def _rounded(values: Any) -> list[float]:
    return [round(float(v), 3) for v in values]


# ------------------------------------------------------------------------------------------------ one page


def html_page(pages: Sequence[LatentPage], path: str | Path, title: str) -> Path:
    """Write one self-contained page with what SAEDashboard shows of each latent; tokens are text, never markup.

    Raises InputError for no pages.
    """
    if not pages:
        raise InputError("there are no pages to write; name at least one latent")
    made = Page(title)
    for page in pages:
        name = f": {page.name}" if page.name else ""
        made.add(f"latent-{page.latent}", f"Latent {page.latent}{name}", _section(made, page))
    words = f"<h1>{esc(title)}</h1><p>{len(pages)} latents. Darker tokens activate a latent more.</p>"
    return write_text_atomic(Path(path), made.render(words))


def _section(made: Page, page: LatentPage) -> str:
    fires = f"Fires at {num(page.density, '.3%')} of {page.n_tokens:,} tokens; maximum {num(page.maximum, '.3g')}."
    if not page.groups:
        return note(f"Never fires on these texts ({page.n_tokens:,} tokens).") + _logits(made, page)
    beside = table(
        "Latents whose activations go with it", ["latent", "Pearson", "cosine of decoder rows"],
        [[str(i), num(r), num(c)] for i, r, c in page.beside], wide=False,
    )  # fmt: skip
    groups = "".join(_group(g, page.maximum) for g in page.groups if g.contexts)
    drawn = made.figure(bars(page.activations.middles, page.activations.counts, "activation"), "Activations")
    return f"<p>{fires}</p>" + drawn + _logits(made, page) + beside + groups


def _logits(made: Page, page: LatentPage) -> str:
    words = table(
        "Words by the direct path to the logits", ["raised", "by", "lowered", "by"],
        [[f"<code>{esc(a)}</code>", num(x), f"<code>{esc(b)}</code>", num(y)]
         for (a, x), (b, y) in zip(page.promoted, page.suppressed)], wide=False,
    )  # fmt: skip
    return made.figure(bars(page.logits.middles, page.logits.counts, "change of logit"), "All words") + words


def _group(group: Group, maximum: float) -> str:
    share = "" if group.share is None else f", {num(group.share, '.1%')} of firing tokens"
    title = "Strongest" if group.share is None else f"From {num(group.low, '.3g')} to {num(group.high, '.3g')}{share}"
    lines = "".join(f'<p class="context">{_marked(c, maximum)}</p>' for c in group.contexts)
    return f"<details{' open' if group.share is None else ''}><summary>{title}</summary>{lines}</details>"


def _marked(context: Context, maximum: float) -> str:
    def shown(i: int, token: str, value: float) -> str:
        word = esc(token).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
        if value <= 0:
            return word
        ground = f"background:rgba({GROUND},{0.1 + 0.6 * value / maximum:.2f})"
        weight = ";font-weight:600" if i == context.peak else ""
        return f'<span style="{ground}{weight}" title="{value:.3g}">{word}</span>'

    return "".join(shown(i, t, v) for i, (t, v) in enumerate(zip(context.tokens, context.values)))

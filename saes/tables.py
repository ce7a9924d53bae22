"""The study's tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emocircuits._figures import number
from emocircuits._markdown import markdown_table

Row = Mapping[str, Any]


def markdown(report: Row, model: str) -> str:
    """What sae.json holds, for reading: reconstruction, latents of emotions and appraisals, and what steering did."""
    plan, quality = report["plan"], report["quality"]
    said = [
        f"# A step SAE of {model}",
        f"TopK, {plan['width']} latents, {plan['k']} active, resid_post {plan['layer']}, {quality['vectors']:,}"
        " token vectors of emotional replies and reasoning. Scores are on themes that nothing was trained on.",
        markdown_table(
            ["", "explained variance", "L0", "dead"],
            [[name, _n(q["explained_variance"]), _n(q["l0"], ".1f"), _n(q["dead"], ".0%")]
             for name, q in {"this SAE": quality["held_out_themes"], **quality["baselines"]}.items()],
        ),
        f"Spliced into the model it keeps {_n(quality['recovered'], '.0%')} of the loss that zeros cost"
        f" ({quality['tokens_scored']} tokens).",
    ]  # fmt: skip
    if stable := quality.get("stability"):
        said.append(
            f"Dictionaries of other seeds match with a mean cosine of {_n(stable['mean_matched_cosine'])}"
            f" (random ones: {_n(stable['random'])})."
        )
    rows = [
        [emotion, str(r["latent"]), _n(r["lift"], ".1f"), _n(r["held_out_lift"], ".1f"), _n(r["held_out_p"], ".1g"),
         ", ".join(w.strip() for w in r["words"])]
        for emotion, latents in report["features"]["emotions"].items()
        for r in latents[:3]
    ]  # fmt: skip
    said.append("Latents that fire more at an emotion's replies than with labels shuffled within scenarios (FDR 5 %).")
    said.append(
        markdown_table(["emotion", "latent", "lift", "on held-out themes", "p there", "words on the direct path"], rows)
    )
    counts = ", ".join(f"{e} {n}" for e, n in report["features"]["counts"].items())
    said.append(f"So many of {plan['width']} pass for each label: {counts}.")
    if report.get("steering"):
        said += ["Steering by each emotion's first latent, doses in its own maximum:", _steering(report["steering"])]
    return "\n\n".join(said) + "\n"


def _steering(steering: Mapping[str, Row]) -> str:
    rows = []
    for emotion, found in steering.items():
        again, controls = found["confirmed"], []
        cells = {c["method"]: c for c in again["cells"]}
        for name, d in again["differences"].items():
            controls.append(f"{name} {_rate(cells[name])}, p = {_n(d['p'], '.2g')}")
        rows.append([
            emotion, str(found["latent"]), _n(found["rises"]), _n(found["best_dose"], ".1f"), str(again["scenarios"]),
            _rate(cells["steered"]), "; ".join(controls), "yes" if again["survives_every_control"] else "no",
        ])  # fmt: skip
    heads = ["emotion", "latent", "dose ~ expression", "best dose", "other scenarios", "coherent expression there",
             "controls there (paired test, Holm)", "survives all"]  # fmt: skip
    return markdown_table(heads, rows)


def injection(report: Row) -> str:
    """What injection.json holds: what each latent's tokens do in neutral texts, and its own steps do without them."""
    of = {latent: emotion for emotion, latents in reversed(report["emotions"].items()) for latent in latents}
    rows = [
        [of[f["latent"]], str(f["latent"]), ", ".join(repr(c["text"]) for c in f["cues"]), _n(f["genuine"], ".3g"),
         *(_share(f[name]) for name in ("untouched", "random", "injected")), _n(f["p"], ".2g"),
         *(_share(f[name]) for name in ("removed_random", "removed")), f["removed"]["n"], f["verdict"]]
        for f in report["latents"]
    ]  # fmt: skip
    heads = ["emotion", "latent", "its tokens", "own activation", "neutral texts", "+ random tokens", "+ its tokens",
             "p (Holm)", "own steps less random tokens", "less its n-grams", "steps", "verdict"]  # fmt: skip
    return "\n\n".join([
        f"# Are the emotion latents of {report['model']} about a few tokens?",
        f"{report['site']} {report['layer']}. The n-grams of a latent's strongest tokens that drive it most, put into"
        f" {report['neutral_texts']} neutral replies of held-out themes: largest activation there over that at the"
        " latent's own strongest steps (held-out themes, too), with random n-grams of the same lengths at the same"
        " places beside it. Then all n-grams that were tried are taken out of those steps of its own that hold one:"
        " what is left of the activation at the steps' other tokens. 95 % intervals over scenarios (there: replies).",
        markdown_table(heads, rows),
    ]) + "\n"  # fmt: skip


def _share(found: Row) -> str:
    return f"{_n(found['estimate'])} [{_n(found['low'])}, {_n(found['high'])}]"


def _rate(found: Row) -> str:
    c = found["coherent"]
    return f"{_n(c['estimate'], '.0%')} [{_n(c['low'], '.0%')}, {_n(c['high'], '.0%')}]"


def _n(value: Any, form: str = ".2f") -> str:
    found = number(value)
    return "n/a" if found is None else format(found, form)

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
    if apart := report.get("geometry", {}).get("separation"):
        said.append(
            f"Silhouette of the decoder rows of the {apart['n']} latents that go with a label:"
            f" {_n(apart['silhouette'], '.3f')} (labels shuffled: {_n(apart['null_mean'], '.3f')},"
            f" 95th percentile {_n(apart['null_high'], '.3f')}, p = {_n(apart['p'], '.2g')}). At 0 they lie no nearer"
            " to their own label than to the next one; 1 would be clusters of their own."
        )
    if report.get("steering"):
        said += ["Steering by each emotion's first latent, doses in its own maximum:", _steering(report["steering"])]
    return "\n\n".join(said) + "\n"


def confidence_markdown(report: Row, model: str) -> str:
    """What confidence.json holds, for reading: entropy beside controls, the vector, and what answers become."""
    sae, vector, learned = report["sae"], report["vector"], report["plan"]["learned"]
    said = [
        f"# A confidence vector of {model}",
        f"{sae['site']} {sae['layer']}, an SAE with explained variance {_n(sae['explained_variance'])} and L0"
        f" {_n(sae['l0'], '.1f')}; {learned['iterations']} iterations of {learned['batch']} step ends, Adam lr"
        f" {learned['lr']:g}. The offset is {_n(vector['length'])} residual norms long. Sure is not right.",
    ]
    for part, title in (("held_out", "traces that nothing was learned from"), ("train", "training traces")):
        rows = [[name, _n(e["entropy"]), f"{_n(e['change'], '+.2f')} [{_n(e['low'], '+.2f')}, {_n(e['high'], '+.2f')}]",
                 _n(e["kl"]), str(e["n"])] for name, e in vector["effects"][part].items()]  # fmt: skip
        said.append(f"Entropy of the next token at the step ends of {title}, in nats:")
        said.append(markdown_table(["added", "entropy", "change", "KL to unsteered", "steps"], rows))
    rows = [
        [name, _n(e["unchanged"], ".0%"), str(e["distinct"]),
         ", ".join(f"{c['token']!r} {c['share']:.0%}" for c in e["common"])] for name, e in report["said"].items()
    ]  # fmt: skip
    said.append("Likeliest next token at the step ends that nothing was learned from:")
    said.append(markdown_table(["added", "as unsteered", "distinct", "most common"], rows))
    cosines = {**vector["cosines"], f"its {learned['top']} top latents alone": vector["top_cosine"]}
    told = [f"{name} {_n(c, '+.2f')}" for name, c in cosines.items()]
    seeds = ", ".join(_n(c, "+.2f") for c in vector["seeds"]) or "n/a"
    shares = ", ".join(f"{t['latent']} ({'+' if t['offset'] > 0 else '-'}, {t['share']:.1%})" for t in vector["top"])
    said += [f"Cosines: {'; '.join(told)}; other seeds {seeds}.", f"Top latents, sign and share: {shares}."]
    return "\n\n".join([*said, *_answered(report["answers"])]) + "\n"


def _answered(answers: Row) -> list[str]:
    heads = ["method", "dose", "accuracy", "probability of the right answer", "entropy of the answer"]
    rows = [
        [c["method"], "fitted" if c["dose"] is None else f"{c['dose']:+g}", _interval(c["accuracy"], ".0%"),
         _interval(c["right"], ".0%"), _interval(c["entropy"], ".2f")]
        for c in answers["cells"]
    ]  # fmt: skip
    named = [
        f"{t['method']} {t['dose']:+g} against {t['rival']} ({_n(t['estimate'], '+.0%')}, p = {_n(t['p'], '.2g')})"
        for t in answers["tests"]
        if t["p"] <= 0.05
    ]
    return [
        f"Answers to {answers['n']} problems that nothing was learned from, steered at the ends of reasoning steps"
        " along the whole vector and its top latents; doses in residual norms, 95 % intervals over themes:",
        markdown_table(heads, rows),
        f"Accuracy beyond chance (paired, Holm over {len(answers['tests'])}): {'; '.join(named) or 'none'}.",
    ]


def _interval(found: Row, form: str) -> str:
    return f"{_n(found['estimate'], form)} [{_n(found['low'], form)}, {_n(found['high'], form)}]"


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


def driven(report: Row) -> str:
    """What driven.json holds: how much of an emotion's latents its circuit drives, beside random units and others'."""
    rows = [
        [r["emotion"], str(r["latent"]), _n(r["whole"], ".3g"), _share(r["lost"]), _share(r["random"]),
         _n(r["p"], ".2g"), ", ".join(f"{e} {_n(v)}" for e, v in r["others"].items())]
        for r in report["rows"]
    ]  # fmt: skip
    heads = ["emotion", "latent", "activation per token", "lost without its circuit", "without random units",
             "p (Holm)", "without other emotions' circuits"]  # fmt: skip
    sizes = "; ".join(f"{e} {c['heads']} heads and {c['neurons']} neurons" for e, c in report["circuits"].items())
    return "\n\n".join([
        f"# Do the circuits of {report['model']} drive its emotion latents?",
        f"{report['site']} {report['layer']}. Share of a latent's activation, summed over the tokens of"
        f" {report['texts']} replies to {report['scenarios']} scenarios of held-out themes, that is lost when the"
        " circuit's heads and neurons below hold their mean; random: as many others of the same layers, mean of"
        f" {report['draws']} draws."
        " 95 % intervals over scenarios. A negative share: the latent fires more without them.",
        f"Circuits, all layers: {sizes}.",
        markdown_table(heads, rows),
    ]) + "\n"  # fmt: skip


def _share(found: Row) -> str:
    return f"{_n(found['estimate'])} [{_n(found['low'])}, {_n(found['high'])}]"


def _rate(found: Row) -> str:
    return _interval(found["coherent"], ".0%")


def _n(value: Any, form: str = ".2f") -> str:
    found = number(value)
    return "n/a" if found is None else format(found, form)

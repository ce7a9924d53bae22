"""What `emocircuits sae demo` and `sae confidence` write, as rows of text and of figures. No Streamlit in here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dashboards import folders
from dashboards.folders import CONFIDENCE, SAE
from dashboards.words import num, p_value, rate
from emocircuits.artefact import read_json

Row = dict[str, Any]
ADDED = {"none": "nothing", "offset": "the vector", "mirrored": "the vector, mirrored", "top": "its top latents alone",
         "random": "random, same norm", "dense": "low less high entropy, same norm"}  # fmt: skip
MEASURES = {"accuracy": "accuracy", "right": "probability of the right answer"}
COMMAND = "emocircuits sae demo"
Found = Mapping[str, Any]


def read(folder: Path) -> Found | None:
    """The tables of the study, None where it has none yet; raises InputError for a damaged file."""
    return read_json(folder / SAE) if (folder / SAE).is_file() else None


def confidence(folder: Path) -> Found | None:
    """The same of the study of a confidence vector."""
    return read_json(folder / CONFIDENCE) if (folder / CONFIDENCE).is_file() else None


def command(folder: Path) -> str:
    """The command that goes on with an unfinished study, without the options that it was given."""
    return "emocircuits sae confidence" if folders.studied(folder) == "confidence" else COMMAND


def figures(folder: Path) -> dict[str, str]:
    """{measure: value} of what a folder found, to stand beside another one."""
    found, sure, said = read(folder), confidence(folder), {}
    if found is not None:
        said = {k: v for k, v in quality_rows(found)[0].items() if k != "what"}
        said["loss recovered"] = rate(found["quality"]["recovered"])
        said |= {f"latents of {e}": str(n) for e, n in found["features"]["counts"].items()}
        for emotion, steered in (found.get("steering") or {}).items():
            beats = steered["confirmed"]["survives_every_control"]
            said[f"steering {emotion} beats every control"] = "yes" if beats else "no"
    for row in entropy_rows(sure) if sure is not None else ():
        said[f"entropy in nats, {row['added']}"] = row["entropy"]
    return said


def quality_rows(found: Found) -> list[Row]:
    """The SAE beside its baselines, on vectors of held-out themes."""
    quality = found["quality"]
    return [
        {"what": name, "explained variance": num(q.get("explained_variance"), ".3f"), "L0": num(q.get("l0"), ".1f"),
         "dead": rate(q.get("dead")), "nearest decoder cosine": num(q.get("max_cosine_mean"))}
        for name, q in {"this SAE": quality["held_out_themes"], **quality["baselines"]}.items()
    ]  # fmt: skip


def emotion_rows(found: Found) -> list[Row]:
    """Latents that go with an emotion, and whether they do so again on held-out themes."""
    return [
        {"emotion": emotion, "latent": r["latent"], "lift": num(r["lift"], ".1f"), "q": p_value(r["q"]),
         "held-out lift": num(r["held_out_lift"], ".1f"), "held-out p": p_value(r["held_out_p"]),
         "again on held-out themes": "yes" if r["replicates"] else "no", "words it writes": ", ".join(r["words"])}
        for emotion, rows in found["features"]["emotions"].items()
        for r in rows
    ]  # fmt: skip


def matching(found: Found, words: str) -> list[tuple[str, Row]]:
    """(label, latent's row) of those whose label, words or top steps hold all of the words asked for.

    Labels are emotions and kinds of reasoning steps; for the latter no top steps are stored.
    """
    asked, tables = words.casefold().split(), found["features"]
    every = [(e, r) for part in ("emotions", "appraisals") for e, rows in tables[part].items() for r in rows]

    def told(label: str, row: Found) -> str:
        texts = (t["text"] for t in row.get("top") or [])
        return " ".join([label, str(row["latent"]), *row["words"], *texts]).casefold()

    return [(e, r) for e, r in every if all(word in told(e, r) for word in asked)]


def top_rows(row: Found) -> list[Row]:
    """The steps that drive a latent most."""
    return [{"activation": t["activation"], "label": t["label"], "text": t["text"]} for t in row.get("top") or []]


def appraisal_rows(found: Found) -> list[Row]:
    """Latents that go with a kind of reasoning step."""
    return [
        {"step": label, "latent": r["latent"], "lift": num(r["lift"], ".1f"), "q": p_value(r["q"]),
         "words it writes": ", ".join(r["words"])}
        for label, rows in found["features"]["appraisals"].items()
        for r in rows
    ]  # fmt: skip


def verdict(steered: Found) -> str:
    """What the steering of one latent showed, whichever way it came out."""
    trend = f"rank correlation of dose and expression {num(steered['rises'])}"
    again = steered["confirmed"]
    where = f"at dose {num(steered['best_dose'], '.1f')} on {again['scenarios']} scenarios that did not choose it"
    if again["survives_every_control"]:
        return f"It beats the unsteered texts, random directions and matched latents {where} (paired, Holm); {trend}."
    names = {"none": "the unsteered texts", "random": "random directions"}
    weak = ", ".join(
        f"{names.get(m, m)} (p = {num(d['p'], '.2g')})" for m, d in again["differences"].items() if d["p"] > 0.05
    )
    return f"It does not beat every control {where}: {weak or 'a difference is negative'}; {trend}."


def pair_rows(found: Found) -> list[Row]:
    """Latents that fire at the same steps more often than their texts explain."""
    return [
        {"latents": f"{p['a']}, {p['b']}", "steps with both": p["both"], "by chance": num(p["expected"], ".1f"),
         "Jaccard": num(p["jaccard"]), "decoder cosine": num(p["cosine"]), "q": p_value(p["q"])}
        for p in found["together"]
    ]  # fmt: skip


def separation(found: Found) -> str:
    """Whether decoder rows of one label lie together, beside shuffled labels."""
    apart = found["separation"]
    if apart is None:
        return "Too few latents go with a label to say whether those of one lie together."
    return (
        f"Silhouette of the {apart['n']} latents that go with a label: {num(apart['silhouette'], '.4f')}; labels "
        f"shuffled {num(apart['null_mean'], '.4f')}, 95th percentile {num(apart['null_high'], '.4f')} "
        f"(p = {num(apart['p'], '.2g')})."
    )


# ------------------------------------------------------------------------------------------------ confidence


def entropy_rows(found: Found, part: str = "held_out") -> list[Row]:
    """Entropy of the next token at step ends with something added to the residual stream there."""
    return [
        {"added": ADDED.get(name, name), "entropy": num(e["entropy"]),
         "change": rate({**e, "estimate": e["change"]}, "+.2f"), "KL to unsteered": num(e["kl"]), "steps": e["n"]}
        for name, e in found["vector"]["effects"][part].items()
    ]  # fmt: skip


def answer_rows(found: Found) -> list[Row]:
    """What answers become when steps end steered; doses in residual norms."""
    return [
        {"method": c["method"], "dose": "fitted" if c["dose"] is None else num(c["dose"], "+g"),
         "accuracy": rate(c["accuracy"]), "probability of the right answer": rate(c["right"]),
         "entropy of the answer": rate(c["entropy"], ".2f")}
        for c in found["answers"]["cells"]
    ]  # fmt: skip

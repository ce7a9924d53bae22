"""What `emocircuits sae ...` does with its arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from emocircuits.activations.store import ActivationStore
from emocircuits.artefact import read_json, read_jsonl, write_json_atomic
from emocircuits.commands import parse_numbers
from emocircuits.demo import bars
from emocircuits.errors import InputError
from emocircuits.models.load import load
from emocircuits.reasoning.steps import read_trace, split
from emocircuits.reasoning.traces import Trace
from emocircuits.serving.run import api_key

from .collect import collect
from .confidence import Settings
from .confidence_study import Plan as ConfidencePlan
from .confidence_study import run_confidence
from .features import Activity, encode_all, enrichment, top_steps
from .interop import load_sae, stated_place
from .naming import ChatNamer, name_latents
from .pages import latent_pages
from .publish import html_page, neuronpedia
from .recipe import Recipe
from .steering import latent_steerer
from .study import Plan, run_demo
from .train import Trained, train
from .vectors import Vectors, is_sink, stored, without_sinks

MOST_SHOWN = 200


def run_demo_command(args: argparse.Namespace) -> None:
    """`emocircuits sae demo`"""
    plan = Plan(args.layer, seed=args.seed)
    if args.small:
        plan = Plan(
            args.layer, 256, 8, 5, 2, scenarios=12, shuffles=100, steer=2, samples=1, max_new_tokens=12, seed=args.seed
        )
    loaded = load(args.model)
    with bars() as progress:
        _say(f"tables: {run_demo(loaded, args.out, plan, progress)}")


def run_collect(args: argparse.Namespace) -> None:
    """`emocircuits sae collect`"""
    traces = read_texts(args.texts)
    layers = parse_numbers(args.layers) if args.layers else None
    loaded = load(args.model)
    with bars() as progress:
        store = collect(
            loaded.model, loaded.tokenizer, traces, args.output, layers=layers, reduce=args.reduce, resume=True,
            progress=progress,
        )  # fmt: skip
    places = ", ".join(f"{site} {layer}" for site, layer in store.keys)
    _say(f"{len(store)} vectors at {places}: {args.output}")


def run_train(args: argparse.Namespace) -> None:
    """`emocircuits sae train`"""
    recipe = Recipe(args.architecture, args.width, args.k, epochs=args.epochs, seed=args.seed)
    vectors = [without_sinks(v) for v in stored(ActivationStore.open(args.store))]
    for (site, layer), trained in train(vectors, recipe, args.output, resume=True).items():
        q = trained.quality
        said = f"explained variance {q['explained_variance']:.3f}, L0 {q['l0']:.1f}, dead {q['dead']:.0%}"
        _say(f"{site} {layer}: {said} on held-out traces: {trained.path}")


def run_features(args: argparse.Namespace) -> None:
    """`emocircuits sae features`"""
    trained, codes, records = _coded(args)
    labels = [r.get("label") for r in records]
    found: dict[str, Any] = {"sae": str(trained.path), "rows": len(records), "latents": {}}
    shown = range(codes.shape[1]) if args.latent is None else [args.latent]
    if len({x for x in labels if x is not None}) > 1:
        named = enrichment(codes, labels, [r["trace"] for r in records], seed=args.seed)
        found["enriched"] = {label: named.of(label)[: args.top] for label in named.labels}
        if args.latent is None:
            shown = sorted({i for latents in found["enriched"].values() for i in latents})
    for latent in shown:
        rows = top_steps(codes, records, latent, args.top)
        if rows:
            found["latents"][str(latent)] = [
                {"activation": a, "label": r.get("label"), "trace": r["trace"], "text": r["text"]} for a, r in rows
            ]
    _say(f"{len(found['latents'])} latents with their top steps: {write_json_atomic(args.output, found)}")


def run_name(args: argparse.Namespace) -> None:
    """`emocircuits sae name`"""
    namer = ChatNamer(args.server, args.judge_model, api_key=api_key(args.api_key_env))
    namer.chat.check()
    trained, codes, records = _coded(args)
    labels = [r.get("label") for r in records]
    if args.latents:
        latents = parse_numbers(args.latents, "latents")
        if max(latents) >= codes.shape[1]:
            raise InputError(f"--latents {args.latents!r}: give numbers from 0 to {codes.shape[1] - 1}, such as 17,31")
    elif len({x for x in labels if x is not None}) > 1:
        found = enrichment(codes, labels, [r["trace"] for r in records], seed=args.seed)
        latents = sorted({i for label in found.labels for i in found.of(label)[: args.top]})
    else:
        raise InputError("the store has no labels to choose latents by; name them: --latents 17,31")
    about = {"sae": str(trained.path), "store": str(args.store), "judge": args.judge_model, "rows": len(records)}
    report = name_latents(codes, records, latents, namer, args.output, seed=args.seed, about=about)
    rows = [report["latents"][str(i)] for i in latents]
    score = report["summary"]["balanced_accuracy"]
    _say(f"{sum('score' in r for r in rows)} of {len(rows)} latents named and scored: {args.output}")
    if score["own_name"] is not None:
        _say(f"balanced accuracy {score['own_name']:.2f}, with another latent's name {score['other_name']:.2f}")


def run_steer(args: argparse.Namespace) -> None:
    """`emocircuits sae steer`"""
    trained, vectors, _ = _matched(args.sae, args.store)
    activity = Activity.of(encode_all(trained.sae, vectors.read()))
    loaded = load(args.model)
    made = latent_steerer(
        loaded.model, trained.sae, trained.key, args.latent, activity, dose=args.dose, positions="all"
    )
    maximum = made.provenance["maximum"]
    _say(f"latent {args.latent}, {args.dose:g} x its maximum of {maximum:.3g}: {made.save(args.output)}")


def run_pages(args: argparse.Namespace) -> None:
    """`emocircuits sae pages`"""
    sae, traces = load_sae(args.sae), read_texts(args.texts)
    key, width = stated_place(sae), sae.W_dec.shape[0]
    if key is None:
        raise InputError(f"{args.sae} does not say where it sits; write it anew with saes.interop.export(place=...)")
    latents = parse_numbers(args.latents, "latents") if args.latents else list(range(width))
    names = _names(args.names) if args.names else {}
    loaded = load(args.model)
    with bars() as progress:
        pages = latent_pages(
            loaded.model, loaded.tokenizer, sae, key, traces, latents, names=names, seed=args.seed, progress=progress
        )
    name, data = f"{key[1]}-{args.sae.name}", args.texts.name
    written = neuronpedia(pages, args.output, model_id=loaded.name, key=key, name=name, dataset=data)
    _say(f"{len(pages)} latents for Neuronpedia: {', '.join(map(str, written))}")
    if len(pages) <= MOST_SHOWN:
        _say(f"to look at: {html_page(pages, args.output / 'latents.html', f'Latents of {args.sae.name}')}")
    else:
        _say(f"one page shows at most {MOST_SHOWN} latents; choose some with --latents to get it")


def _names(path: Path) -> dict[int, str]:
    """{latent: name} of a file that says just that, or of one that `emocircuits sae name` wrote."""
    found = read_json(path)
    if "latents" in found:
        found = {latent: row["name"] for latent, row in found["latents"].items() if row.get("name")}
    try:
        return {int(latent): str(name) for latent, name in found.items()}
    except ValueError as error:
        raise InputError(f'{path} should hold a name for each latent\'s number, such as {{"17": "relief"}}') from error


def run_confidence_command(args: argparse.Namespace) -> None:
    """`emocircuits sae confidence`"""
    given = ("lr", "iterations", "batch", "held_out")
    learned = Settings(**{name: getattr(args, name) for name in given}, draws=3)
    plan = ConfidencePlan(learned, args.seeds, problems=args.problems, layer=args.layer, seed=args.seed)
    traces = None if args.texts is None else read_texts(args.texts)
    loaded = load(args.model)
    with bars() as progress:
        made = run_confidence(loaded, args.out, sae=args.sae, traces=traces, plan=plan, progress=progress)
    _say(f"tables: {made}")


def read_texts(path: Path) -> list[Trace]:
    """Traces of a JSONL file: "text", or "prompt" and "completion"; "id" and "label" are kept.

    Raises InputError that names the row it cannot use.
    """
    traces = []
    for i, row in enumerate(read_jsonl(path)):
        name, label = str(row.get("id", i)), row.get("label")
        if isinstance(row.get("completion"), str):
            trace = read_trace(str(row.get("prompt", "")), row["completion"], id=name)
        elif isinstance(row.get("text"), str) and row["text"].strip():
            trace = Trace("", split(row["text"]), id=name)
        else:
            raise InputError(f"{path}, row {name!r}: give a text, or a prompt and a completion")
        labels = None if label is None else (str(label),) * len(trace)
        traces.append(Trace(trace.prompt, trace.steps, trace.ending, labels=labels, id=name))
    return traces


def _coded(args: argparse.Namespace) -> tuple[Trained, Any, list[dict[str, Any]]]:
    """The SAE, its codes of the store's vectors without the sinks, and their records."""
    trained, vectors, store = _matched(args.sae, args.store)
    x = vectors.read()
    keep = (~is_sink(x)).nonzero()[:, 0].tolist()
    return trained, encode_all(trained.sae, x[keep]), [store.meta[i] for i in keep]


def _matched(sae: Path, store: Path) -> tuple[Trained, Vectors, ActivationStore]:
    """The SAE and the vectors of its place in a store."""
    trained, opened = Trained.load(sae), ActivationStore.open(store)
    (vectors,) = stored(opened, [trained.key])
    return trained, vectors, opened


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")

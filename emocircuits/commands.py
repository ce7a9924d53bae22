"""What each verb of the command line does; heavy imports happen inside, so that --help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError, MissingPackageError


def run_demo(args: argparse.Namespace) -> None:
    """`emocircuits demo`"""
    from .circuit_study import CircuitPlan
    from .demo import Demo, Plan

    plan = Plan.small(args.model) if args.small else Plan(args.model, seed=args.seed)
    report = Demo(args.out, plan).execute(CircuitPlan.small() if args.small else None)
    _say(f"report: {report}")


def run_circuit(args: argparse.Namespace) -> None:
    """`emocircuits circuit`"""
    from .circuit_study import CircuitPlan
    from .demo import Demo, Plan

    scenarios = str(args.scenarios.resolve()) if args.scenarios else None
    plan = Plan(args.model, seed=args.seed, scenarios=scenarios)
    report = Demo(args.out, plan).execute(CircuitPlan.full() if args.full else None)
    _say(f"report: {report}")


def run_inspect(args: argparse.Namespace) -> None:
    """`emocircuits models inspect`"""
    from .models.anatomy import resolve
    from .models.load import load

    loaded = load(args.model)
    anatomy = resolve(loaded.model)
    error = anatomy.validate(loaded.model)
    _say(f"{loaded.name}: {anatomy.family}, {anatomy.structure} blocks (checked: relative error {error:.1g})")
    for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "vocab_size"):
        _say(f"  {name:<11} {getattr(anatomy, name)}")
    _say(f"  sites of layer 0 (decoder at {anatomy.decoder!r}):")
    for site in anatomy.sites():
        point = anatomy.points.get((site, 0))
        where = f"{point.io} of {point.module}" if point else "attention interface"
        _say(f"    {site:<11} {where}")
    for site, reason in anatomy.missing.items():
        _say(f"    {site:<11} not defined: {reason}")


def run_directions(args: argparse.Namespace) -> None:
    """`emocircuits directions`"""
    from .data.emotions import label_set
    from .data.scenarios import discovery
    from .demo import bars
    from .directions import fit_examples
    from .examples import reply_examples
    from .models.load import load
    from .reading import Example

    _writable(args.output)
    emotions = label_set(args.emotions.split(",")) if args.emotions else label_set("ekman6")
    if args.texts:
        from .data.loaders import load_texts

        texts = load_texts(args.texts)
        emotions = emotions if args.emotions else tuple(dict.fromkeys(str(t.label) for t in texts))
        examples = [
            Example(prompt="", label=str(t.label), group="all", response=t.text, cluster=str(i))
            for i, t in enumerate(texts)
        ]
    else:
        examples = reply_examples(discovery(), emotions)
    model, tokenizer = load(args.model)
    with bars() as progress:
        made, _ = fit_examples(
            model, tokenizer, examples, emotions, site=args.site, method=args.method, seed=args.seed, progress=progress
        )
    _say(f"directions of {', '.join(emotions)}: {made.save(args.output)}")


def run_steer(args: argparse.Namespace) -> None:
    """`emocircuits steer`"""
    from .artefact import write_jsonl_atomic
    from .data.loaders import load_prompts
    from .demo import bars
    from .directions import DirectionSet
    from .generation import Decoding, generate
    from .models.load import load

    rows = load_prompts(args.input)
    _writable(args.output)
    directions = DirectionSet.load(args.directions)
    layers = parse_numbers(args.layers) if args.layers else _middle(directions.layers)
    steerer = directions.steerer(args.emotion, args.strength, layers, args.positions)
    model, tokenizer = load(args.model)
    steerer.check(model)
    decoding = Decoding(args.max_new_tokens, min(4, args.max_new_tokens), args.temperature)
    with bars() as progress:
        texts = generate(
            model, tokenizer, [r["prompt"] for r in rows], steerer, decoding=decoding, batch_size=args.batch_size,
            seed=args.seed, progress=progress, title=args.emotion,
        )  # fmt: skip
    write_jsonl_atomic(args.output, [{**row, "text": text} for row, text in zip(rows, texts)])
    _say(f"{len(rows)} texts: {args.output}")


def run_evaluate(args: argparse.Namespace) -> None:
    """`emocircuits evaluate`"""
    from .evaluate import evaluate_file

    result = evaluate_file(args.input, args.emotion, args.model, args.seed)
    if args.output:
        from .artefact import write_json_atomic

        write_json_atomic(args.output, result)
        _say(f"scores: {args.output}")
    else:
        import json

        _say(json.dumps(result, indent=2))


def run_export(args: argparse.Namespace) -> None:
    """`emocircuits export`"""
    from .steering import Steerer
    from .steering.formats import write_steerer

    if args.format != "baked":
        _writable(args.output)
    steerer = Steerer.load(args.steerer)
    _say(f"{steerer.name} as {args.format}: {write_steerer(steerer, args.output, args.format, args.model)}")


def run_import(args: argparse.Namespace) -> None:
    """`emocircuits import`"""
    from .steering.formats import read_steerer

    _writable(args.output)
    steerer = read_steerer(args.file, args.format, parse_numbers(args.layer) if args.layer else (), args.site)
    where = "; ".join(f"{t.site} of layers {', '.join(map(str, t.layers))}" for t in steerer.terms)
    _say(f"{where}: {steerer.save(args.output)}")


def run_balance(args: argparse.Namespace) -> None:
    """`emocircuits balance`"""
    from .demo import bars
    from .models.load import load
    from .multimodal.study import read_batch, run_balance

    for file in args.inputs:
        read_batch(file)
    words = {w.strip(): args.prefix + w.strip() for w in args.answers.split(",") if w.strip()}
    if len(words) < 2:
        raise InputError("--answers needs at least two words, separated by commas")
    loaded = load(args.model)
    with bars() as progress:
        report = run_balance(loaded, args.inputs, words, args.out, seed=args.seed, progress=progress)
    _say(f"report: {report}")


def run_anchors(args: argparse.Namespace) -> None:
    """`emocircuits anchors`"""
    from .reasoning.command import anchors

    _say(f"report: {anchors(args)}")


def run_sae(args: argparse.Namespace) -> None:
    """`emocircuits sae ...`"""
    from importlib.util import find_spec

    if find_spec("sae_lens") is None:
        raise MissingPackageError("sparse autoencoders need another package: pip install 'emocircuits[sae]'")
    from saes import command

    if getattr(args, "output", None) is not None and args.call in ("run_features", "run_steer", "run_name"):
        _writable(args.output)
    getattr(command, args.call)(args)


def run_card(args: argparse.Namespace) -> None:
    """`emocircuits card`"""
    from dataclasses import replace

    from .card import measure, write_card
    from .demo import bars
    from .models.load import load
    from .steering import Steerer

    output = args.output or args.steerer.with_suffix(".md")
    steerer = Steerer.load(args.steerer)
    _writable(output)
    model, tokenizer = load(args.model)
    with bars() as progress:
        cost = measure(
            steerer, model, tokenizer, args.emotion or steerer.name, n_scenarios=args.scenarios, seed=args.seed,
            progress=progress,
        )  # fmt: skip
    made = replace(steerer, cost=cost)
    made.save(args.steerer)
    _say(f"cost card: {write_card(made, output)}")


def run_explore(args: argparse.Namespace) -> None:
    """`emocircuits explore`"""
    from .explore import explore

    explore(args.folder, args.port, not args.no_browser)


def run_serve(args: argparse.Namespace) -> None:
    """`emocircuits serve`"""
    from .serving.run import serve

    serve(args)


def parse_numbers(text: str, what: str = "layers") -> list[int]:
    """Whole numbers of "4-13" or "6,8,10"; raises InputError for anything else."""
    try:
        parts = [p.split("-") for p in text.split(",")]
        return [n for p in parts for n in range(int(p[0]), int(p[-1]) + 1)]
    except ValueError as error:
        raise InputError(f"cannot read {what} {text!r}; write them like 4-13 or 6,8,10") from error


def _middle(layers: Sequence[int]) -> list[int]:
    return list(layers[round(0.2 * len(layers)) : max(1, round(0.75 * len(layers)))])


def _writable(path: Path) -> None:
    """Refuse an output that cannot be written before any work is done."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    if not path.parent.exists():
        raise InputError(f"the folder {path.parent} does not exist; make it first")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")

"""The command line: one verb per stage. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import EmocircuitsError, InputError


def parser() -> argparse.ArgumentParser:
    """The argument parser of ``emocircuits``."""
    top = argparse.ArgumentParser(
        prog="emocircuits",
        description="Find, steer and understand emotion in language models.",
        epilog="example: emocircuits demo --out runs/demo",
    )
    verbs = top.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    _demo_parser(verbs)
    _models_parser(verbs)
    _directions_parser(verbs)
    _circuit_parser(verbs)
    _steer_parser(verbs)
    _evaluate_parser(verbs)
    _exchange_parsers(verbs)
    _card_parser(verbs)
    _serve_parser(verbs)
    return top


def _verb(verbs: argparse._SubParsersAction, name: str, what: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=what, description=what, epilog=f"example: {example}")


def _run_arguments(verb: argparse.ArgumentParser, out: str, resumes: str) -> None:
    verb.add_argument("--model", default="demo", help="hub id, folder, GGUF file or 'demo' (Gemma-3-270M)")
    verb.add_argument("--out", type=Path, default=Path(out), help=f"run folder; {resumes}")
    verb.add_argument("--seed", type=int, default=0)


def _demo_parser(verbs: argparse._SubParsersAction) -> None:
    demo = _verb(
        verbs, "demo", "find directions, steer and score, and write a report", "emocircuits demo --out runs/demo"
    )
    _run_arguments(demo, "runs/demo", "an interrupted run resumes")
    demo.add_argument("--small", action="store_true", help="a few scenarios only: a quick look, not a result")
    demo.set_defaults(run=run_demo)


def _models_parser(verbs: argparse._SubParsersAction) -> None:
    models = _verb(verbs, "models", "look at models", "emocircuits models inspect demo")
    actions = models.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = _verb(actions, "inspect", "print a model's anatomy", "emocircuits models inspect demo")
    inspect.add_argument("model", help="hub id, folder, GGUF file or 'demo'")
    inspect.set_defaults(run=run_inspect)


def _directions_parser(verbs: argparse._SubParsersAction) -> None:
    made = _verb(
        verbs,
        "directions",
        "fit emotion directions and save them",
        "emocircuits directions --model demo --output directions.safetensors",
    )
    made.add_argument("--model", default="demo")
    made.add_argument("--texts", type=Path, help="CSV, TSV or JSONL with columns text and label (default: our replies)")
    made.add_argument("--emotions", help="comma-separated labels (default: Ekman's six, or all labels of --texts)")
    made.add_argument("--site", default="resid_post")
    made.add_argument("--method", default="diff_means", help="diff_means, lda or logistic")
    made.add_argument("--output", type=Path, default=Path("directions.safetensors"))
    made.add_argument("--seed", type=int, default=0)
    made.set_defaults(run=run_directions)


def _circuit_parser(verbs: argparse._SubParsersAction) -> None:
    circuit = _verb(
        verbs,
        "circuit",
        "find emotion circuits, validate them and compare them with directions and prompting",
        "emocircuits circuit --out runs/circuits --full",
    )
    _run_arguments(circuit, "runs/circuits", "a demo run is continued")
    circuit.add_argument("--full", action="store_true", help="all scenarios, doses and controls; about half an hour")
    circuit.add_argument(
        "--scenarios", type=Path, help="SEV file (JSONL) to steer on instead of our held-out scenarios"
    )
    circuit.set_defaults(run=run_circuit)


def _steer_parser(verbs: argparse._SubParsersAction) -> None:
    steer = _verb(
        verbs,
        "steer",
        "generate with an emotion from a file of prompts",
        "emocircuits steer --model demo --directions directions.safetensors --emotion anger --strength 0.02"
        " --layers 4-13 --input prompts.jsonl --output out.jsonl",
    )
    steer.add_argument("--model", default="demo")
    steer.add_argument("--directions", type=Path, required=True)
    steer.add_argument("--emotion", required=True)
    steer.add_argument("--strength", type=float, default=0.02, help="share of the residual norm added at each layer")
    steer.add_argument("--layers", help="such as 4-13 or 6,8,10 (default: the middle half of the model)")
    steer.add_argument("--positions", default="all", help="all, prompt, generated or last")
    steer.add_argument("--input", type=Path, required=True, help="JSONL rows with 'prompt'; other keys are kept")
    steer.add_argument("--output", type=Path, required=True, help="the same rows plus 'text'")
    steer.add_argument("--max-new-tokens", type=int, default=40)
    steer.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    steer.add_argument("--batch-size", type=int, default=16)
    steer.add_argument("--seed", type=int, default=0)
    steer.set_defaults(run=run_steer)


def _card_parser(verbs: argparse._SubParsersAction) -> None:
    card = _verb(
        verbs, "card", "measure what a steerer does and what it costs", "emocircuits card fear.safetensors --model demo"
    )
    card.add_argument("steerer", type=Path, help="steerer file; the card is written into it, too")
    card.add_argument("--model", default="demo", help="hub id, folder, GGUF file or 'demo' (Gemma-3-270M)")
    card.add_argument("--emotion", help="what it should express (default: the steerer's name)")
    card.add_argument("--scenarios", type=int, default=8, help="held-out scenarios per strength")
    card.add_argument("--output", type=Path, help="Markdown file (default: beside the steerer, .md, and an .svg)")
    card.add_argument("--seed", type=int, default=0)
    card.set_defaults(run=run_card)


def _evaluate_parser(verbs: argparse._SubParsersAction) -> None:
    evaluate = _verb(
        verbs,
        "evaluate",
        "judge a file of texts",
        "emocircuits evaluate --input out.jsonl --emotion anger --output scores.json",
    )
    evaluate.add_argument(
        "--input", type=Path, required=True, help="JSONL rows with 'text' (and 'prompt' for perplexity)"
    )
    evaluate.add_argument("--emotion", help="the target of every row (default: each row's own 'emotion')")
    evaluate.add_argument("--model", default="demo", help="the unsteered model, for perplexity")
    evaluate.add_argument("--output", type=Path, help="where to write the scores as JSON (default: print)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.set_defaults(run=run_evaluate)


def _serve_parser(verbs: argparse._SubParsersAction) -> None:
    serve = _verb(
        verbs,
        "serve",
        "answer OpenAI's chat and completion requests, with steering per request",
        "emocircuits serve --model demo --steerer fear=fear.safetensors --port 8000",
    )
    serve.add_argument("--model", default="demo", help="hub id, folder, GGUF file or 'demo'")
    serve.add_argument("--name", help="the model's name for clients (default: --model, without its folder)")
    serve.add_argument("--steerer", action="append", default=[], metavar="NAME=FILE", help="may be repeated")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--max-batch", type=int, default=16, help="requests that are generated at once")
    serve.add_argument("--max-queue", type=int, default=64, help="requests that may wait; further ones get a 429")
    serve.add_argument("--max-tokens", type=int, default=512, help="the longest answer")
    serve.add_argument("--max-body-bytes", type=int, default=1 << 20, help="the longest request")
    serve.add_argument("--max-strength", type=float, default=4.0, help="the largest multiple of a steerer's strength")
    serve.add_argument("--api-key-env", help="environment variable with the key (default: EMOCIRCUITS_API_KEY, if set)")
    serve.add_argument("--allow-open", action="store_true", help="let others in without a key")
    serve.set_defaults(run=run_serve)


def _exchange_parsers(verbs: argparse._SubParsersAction) -> None:
    """`export` and `import`"""
    out = _verb(
        verbs,
        "export",
        "write a steerer for another engine",
        "emocircuits export fear.safetensors --format gguf --output fear.gguf",
    )
    out.add_argument("steerer", type=Path, help="a saved steerer")
    out.add_argument("--format", required=True, help="gguf, easysteer, baked or safetensors")
    out.add_argument("--model", help="baked: the model to write with the steerer in it")
    out.add_argument("--output", type=Path, required=True, help="a file; for baked, a new folder")
    out.set_defaults(run=run_export)
    into = _verb(
        verbs,
        "import",
        "make a steerer of another tool's vectors",
        "emocircuits import evil.pt --format persona --layer 16 --output evil.safetensors",
    )
    into.add_argument("file", type=Path)
    into.add_argument("--format", required=True, help="gguf, steering-vectors, persona or array")
    into.add_argument("--layer", help="such as 16, 4-13 or 6,8,10, counted from 0 (persona and array need it)")
    into.add_argument("--site", default="resid_post", help="where the vectors belong (array, steering-vectors)")
    into.add_argument("--output", type=Path, required=True)
    into.set_defaults(run=run_import)


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
    from .directions import fit
    from .examples import reply_examples
    from .models.fingerprint import fingerprint
    from .models.load import load
    from .reading import Example, read, residual_norms

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
        features = read(model, tokenizer, examples, site=args.site, progress=progress)
    norms = residual_norms(model, tokenizer, [e.prompt + e.response for e in examples[:64]], args.site)
    made = fit(features, emotions, norms=norms, method=args.method, fingerprint=fingerprint(model), seed=args.seed)
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
    layers = parse_layers(args.layers) if args.layers else _middle(directions.layers)
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
    steerer = read_steerer(args.file, args.format, parse_layers(args.layer) if args.layer else (), args.site)
    where = "; ".join(f"{t.site} of layers {', '.join(map(str, t.layers))}" for t in steerer.terms)
    _say(f"{where}: {steerer.save(args.output)}")


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


def run_serve(args: argparse.Namespace) -> None:
    """`emocircuits serve`"""
    from .serving.run import serve

    serve(args)


def parse_layers(text: str) -> list[int]:
    """Layers of "4-13" or "6,8,10"; raises InputError for anything else."""
    try:
        parts = [p.split("-") for p in text.split(",")]
        return [n for p in parts for n in range(int(p[0]), int(p[-1]) + 1)]
    except ValueError as error:
        raise InputError(f"cannot read layers {text!r}; write them like 4-13 or 6,8,10") from error


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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 2 for bad input (one sentence on stderr), 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = args.run
    try:
        command(args)
    except EmocircuitsError as error:
        sys.stderr.write(f"emocircuits: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("emocircuits: interrupted; what was finished is kept, run the same command to go on\n")
        return 130
    except OSError as error:
        if error.errno is None or error.filename is None and error.errno != 28:
            raise
        sys.stderr.write(f"emocircuits: {error.strerror}: {error.filename or 'while writing'}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

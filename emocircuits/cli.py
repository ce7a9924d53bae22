"""The command line: one verb per stage. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import commands
from .errors import EmocircuitsError


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
    _balance_parser(verbs)
    _anchors_parser(verbs)
    _sae_parser(verbs)
    _exchange_parsers(verbs)
    _card_parser(verbs)
    _serve_parser(verbs)
    _explore_parser(verbs)
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
    demo.set_defaults(run=commands.run_demo)


def _models_parser(verbs: argparse._SubParsersAction) -> None:
    models = _verb(verbs, "models", "look at models", "emocircuits models inspect demo")
    actions = models.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = _verb(actions, "inspect", "print a model's anatomy", "emocircuits models inspect demo")
    inspect.add_argument("model", help="hub id, folder, GGUF file or 'demo'")
    inspect.set_defaults(run=commands.run_inspect)


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
    made.set_defaults(run=commands.run_directions)


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
    circuit.set_defaults(run=commands.run_circuit)


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
    steer.set_defaults(run=commands.run_steer)


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
    card.set_defaults(run=commands.run_card)


def _balance_parser(verbs: argparse._SubParsersAction) -> None:
    balance = _verb(
        verbs,
        "balance",
        "measure how much audio, images and text each drive a multimodal model's answers",
        "emocircuits balance --model MODEL --inputs batch.safetensors --answers anger,sadness,fear --out runs/balance",
    )
    balance.add_argument("--model", required=True, help="hub id or folder of a multimodal model")
    balance.add_argument(
        "--inputs", type=Path, nargs="+", required=True, help="batches that a processor returned, as safetensors"
    )
    balance.add_argument("--answers", required=True, help="comma-separated words, one of which answers")
    balance.add_argument("--prefix", default="", help="what stands before the word, such as ' ' (default: nothing)")
    balance.add_argument("--out", type=Path, default=Path("runs/balance"), help="run folder")
    balance.add_argument("--seed", type=int, default=0)
    balance.set_defaults(run=commands.run_balance)


def _anchors_parser(verbs: argparse._SubParsersAction) -> None:
    anchors = _verb(
        verbs,
        "anchors",
        "find the steps of a model's reasoning that carry its answer",
        "emocircuits anchors --model demo --problems 12 --out runs/anchors",
    )
    _run_arguments(anchors, "runs/anchors", "an interrupted run resumes")
    anchors.add_argument("--problems", type=int, metavar="N", help="so many of our emotional problems (default: all)")
    anchors.add_argument("--source", default="model", help="whose reasoning on them: model (sampled) or written (ours)")
    anchors.add_argument(
        "--traces", type=Path, help="JSONL of your own instead: prompt, completion and, if known, truth and id"
    )
    anchors.add_argument("--answers", default="boxed", help="in --traces: boxed, labels:anger,fear or regex:PATTERN")
    anchors.add_argument("--directions", type=Path, help="emotion directions (default: fitted for our problems)")
    anchors.add_argument(
        "--layer", type=int, help="where steps are read and pushed (default: chosen on left-out themes)"
    )
    anchors.add_argument("--rollouts", type=int, default=12, help="at each boundary between steps; 0: white box only")
    anchors.add_argument("--max-new-tokens", type=int, default=96)
    anchors.set_defaults(run=commands.run_anchors)


def _sae_parser(verbs: argparse._SubParsersAction) -> None:
    sae = _verb(verbs, "sae", "sparse autoencoders on reasoning steps", "emocircuits sae demo --out runs/sae")
    actions = sae.add_subparsers(dest="action", metavar="ACTION", required=True)
    demo = _verb(
        actions, "demo", "collect, train, read and steer on our texts, with controls",
        "emocircuits sae demo --out runs/sae",
    )  # fmt: skip
    _run_arguments(demo, "runs/sae", "an interrupted run resumes")
    demo.add_argument("--layer", type=int, default=12, help="of resid_post")
    demo.add_argument("--small", action="store_true", help="a quick look, not a result")
    demo.set_defaults(run=commands.run_sae, call="run_demo_command")
    made = _verb(
        actions, "collect", "one vector per step, of every wanted layer",
        "emocircuits sae collect --model demo --texts texts.jsonl --layers 9,12 --output runs/steps",
    )  # fmt: skip
    made.add_argument("--model", default="demo")
    made.add_argument("--texts", type=Path, required=True, help="JSONL with text, or prompt and completion; id, label")
    made.add_argument("--layers", help="such as 9,12 (default: all)")
    made.add_argument("--reduce", default="closing", help="closing (a step's last token), mean, or all")
    made.add_argument("--output", type=Path, required=True, help="folder of the store; a stopped collection resumes")
    made.set_defaults(run=commands.run_sae, call="run_collect")
    fit = _verb(
        actions, "train", "train one SAE per layer of a store",
        "emocircuits sae train --store runs/steps --output runs/saes --width 2048 --k 32",
    )  # fmt: skip
    fit.add_argument("--store", type=Path, required=True)
    fit.add_argument("--output", type=Path, required=True, help="folder; training resumes bit for bit")
    fit.add_argument("--architecture", default="topk", help="topk, batchtopk, jumprelu, matryoshka or standard")
    fit.add_argument("--width", type=int, default=2048)
    fit.add_argument("--k", type=int, default=32)
    fit.add_argument("--epochs", type=int, default=100)
    fit.add_argument("--seed", type=int, default=0)
    fit.set_defaults(run=commands.run_sae, call="run_train")
    read = _verb(
        actions, "features", "top steps of latents, and which go with which label",
        "emocircuits sae features --sae runs/saes/resid_post.12 --store runs/steps --output features.json",
    )  # fmt: skip
    read.add_argument("--latent", type=int, help="this one only")
    read.add_argument("--top", type=int, default=10)
    read.add_argument("--seed", type=int, default=0)
    push = _verb(
        actions, "steer", "a latent as a steerer",
        "emocircuits sae steer --sae runs/saes/resid_post.12 --store runs/steps --latent 17 --output l17.safetensors",
    )  # fmt: skip
    push.add_argument("--model", default="demo")
    push.add_argument("--latent", type=int, required=True)
    push.add_argument("--dose", type=float, default=0.5, help="in units of the latent's maximum activation")
    sure = _verb(
        actions, "confidence", "an offset that makes the model surer at step ends, and what it does to answers",
        "emocircuits sae confidence --sae runs/saes/resid_post.12 --out runs/confidence",
    )  # fmt: skip
    _run_arguments(sure, "runs/confidence", "an interrupted run resumes")
    sure.add_argument(
        "--sae", type=Path, help="folder of one layer's SAE (default: a small one of our texts is trained)"
    )
    sure.add_argument("--layer", type=int, default=12, help="of the SAE that is trained where none is given")
    sure.add_argument("--texts", type=Path, help="JSONL to learn from (default: our emotional problems, solved)")
    sure.add_argument("--iterations", type=int, default=100, help="1000 in the paper")
    sure.add_argument("--batch", type=int, default=32, help="step ends of an iteration; 256 in the paper")
    sure.add_argument("--lr", type=float, default=0.01)
    sure.add_argument("--held-out", type=float, default=0.5, help="share of the traces that is only measured on")
    sure.add_argument("--seeds", type=int, default=2, help="vectors learned; the first one steers")
    sure.add_argument("--problems", type=int, help="at most so many for the answers (default: all not learned from)")
    sure.set_defaults(run=commands.run_sae, call="run_confidence_command")
    name = _verb(
        actions, "name", "names for latents from a chat model, and how well they tell where a latent fires",
        "emocircuits sae name --sae runs/saes/resid_post.12 --store runs/steps --server http://localhost:8000/v1"
        " --judge-model NAME -o names.json",
    )  # fmt: skip
    name.add_argument("--server", required=True, help="address of an OpenAI-compatible server")
    name.add_argument("--judge-model", required=True, help="what the server calls its model")
    name.add_argument("--api-key-env", help="environment variable with the server's key (default: EMOCIRCUITS_API_KEY)")
    name.add_argument("--latents", help="such as 17,31 (default: the first --top of each label)")
    name.add_argument("--top", type=int, default=5)
    name.add_argument("--seed", type=int, default=0)
    for verb, call in ((read, "run_features"), (push, "run_steer"), (name, "run_name")):
        verb.add_argument("--sae", type=Path, required=True, help="folder of one layer's SAE")
        verb.add_argument("--store", type=Path, required=True, help="its activations")
        verb.add_argument("-o", "--output", type=Path, required=True)
        verb.set_defaults(run=commands.run_sae, call=call)
    show = _verb(
        actions, "pages", "pages of latents: HTML, and JSON for Neuronpedia",
        "emocircuits sae pages --sae runs/saes/resid_post.12 --texts texts.jsonl --latents 17,40 --output runs/pages",
    )  # fmt: skip
    show.add_argument("--model", default="demo")
    show.add_argument("--sae", type=Path, required=True, help="folder of an SAE in SAELens's format")
    show.add_argument("--texts", type=Path, required=True, help="JSONL with text, or prompt and completion")
    show.add_argument("--latents", help="such as 17,40 (default: all, and then no HTML if there are more than 200)")
    show.add_argument("--names", type=Path, help="JSON of {latent: name}, or what sae name wrote")
    show.add_argument("--output", type=Path, required=True, help="folder")
    show.add_argument("--seed", type=int, default=0)
    show.set_defaults(run=commands.run_sae, call="run_pages")


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
    evaluate.set_defaults(run=commands.run_evaluate)


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
    serve.set_defaults(run=commands.run_serve)


def _explore_parser(verbs: argparse._SubParsersAction) -> None:
    explore = _verb(
        verbs, "explore", "look at runs, and steer the model by hand, in the browser", "emocircuits explore runs/demo"
    )
    explore.add_argument("folder", type=Path, nargs="?", default=Path("runs/demo"), metavar="RUN",
                         help="a run folder, or a folder of runs (default: runs/demo)")  # fmt: skip
    explore.add_argument("--port", type=int, help="default: the first free one from 8501 on")
    explore.add_argument("--no-browser", action="store_true", help="only serve; print the address")
    explore.set_defaults(run=commands.run_explore)


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
    out.set_defaults(run=commands.run_export)
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
    into.set_defaults(run=commands.run_import)


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

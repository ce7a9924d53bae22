"""The part of MoSE that stands on peft's private parts: the LoRA layer with experts, and the model that holds them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import ArtefactError, HookError, InputError
from ..models.anatomy import features, resolve
from ..models.fingerprint import fingerprint, keep
from ._mose_passes import Live, Pass

if TYPE_CHECKING:
    from .experts import MoSEConfig

ADAPTER = "default"
EXPERT_PARAMETERS = ("lora_experts", "lora_gate", "lora_modality")


@dataclass(frozen=True)
class Place:
    """Where a wrapped module stands: layer, its path inside the block, and how many experts it gets."""

    layer: int
    name: str
    n_experts: int


class MoSELinear(lora.Linear):
    """A Linear with one shared A, a B for text, and for each modality a gate over B's of its own.

    dy = (alpha / r) omega_m sum_e softmax(G_m x)_e B_{m,e} A x; text tokens: (alpha / r) B A x.
    """

    # What peft freezes, saves, moves and casts with an adapter.
    adapter_layer_names = (*lora.Linear.adapter_layer_names, *EXPERT_PARAMETERS)

    def __init__(self, base_layer: nn.Module, adapter_name: str, place: Place, live: Live, **kwargs: Any) -> None:
        self.place, self.live = place, live  # before peft builds the parameters, which need them
        super().__init__(base_layer, adapter_name, **kwargs)
        self.train(base_layer.training)  # or dropout would act in a model that is being used

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Make the parameters of an adapter; called by peft."""
        n_modalities, n_experts = len(self.live.modalities), self.place.n_experts
        n_in, n_out = features(self.get_base_layer())
        self.lora_experts = nn.ParameterDict()
        self.lora_gate = nn.ParameterDict()
        self.lora_modality = nn.ParameterDict()
        # Gates must start unequal: experts with equal gates and equal B get equal gradients for ever.
        gate = torch.empty(n_modalities, n_experts, n_in).uniform_(-1, 1) / n_in**0.5
        self.lora_experts[adapter_name] = nn.Parameter(torch.zeros(n_modalities, n_experts, n_out, r))
        self.lora_gate[adapter_name] = nn.Parameter(gate)
        self.lora_modality[adapter_name] = nn.Parameter(torch.zeros(n_modalities))
        super().update_layer(adapter_name, r, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]. Raises HookError outside a pass of the decoder, or when tokens were rearranged."""
        if kwargs.pop("adapter_names", None) is not None or kwargs.pop("alora_offsets", None) is not None:
            raise HookError("MoSE has one adapter for all rows; leave out adapter_names and alora_offsets")
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.live.off:
            return result
        return (result + self._delta(x) * self.scaling[ADAPTER]).to(result.dtype)

    def _delta(self, x: Tensor) -> Tensor:
        now, a = self.live.current(), self.lora_A[ADAPTER]
        assert isinstance(a.weight, Tensor)
        x = self._cast_input_dtype(x, a.weight.dtype)
        low = a(self.lora_dropout[ADAPTER](x))
        delta = self.lora_B[ADAPTER](low)
        if not now.index:
            return delta
        n_tokens = x.shape[:-1].numel()
        if n_tokens != now.n_tokens:
            raise HookError(
                f"{self.place.name} of layer {self.place.layer} got {n_tokens} tokens where the"
                f" pass has {now.n_tokens}, so their modality is unknown; leave it out of target_modules"
            )
        flat_x, flat_low, flat = (t.reshape(n_tokens, -1) for t in (x, low, delta))
        omega = len(self.live.modalities) * self.lora_modality[ADAPTER].float().softmax(0)
        balances = []
        for modality, places in now.index:
            places = places.to(x.device)
            gates = self._gates(modality, flat_x[places], balances)
            experts = self.lora_experts[ADAPTER][modality]
            weight = omega[modality] * self.live.factors.get((self.place.layer, modality), 1.0)
            mixed = torch.einsum("ne,nr,eor->no", gates.to(low.dtype), flat_low[places], experts.to(low.dtype))
            flat = flat.index_copy(0, places, (weight * mixed).to(flat.dtype))
        self._report(now, balances)
        return flat.view_as(delta)

    def _gates(self, modality: int, x: Tensor, balances: list[Tensor]) -> Tensor:
        """[n, E] of the modality's tokens x [n, in]."""
        clamped = self.live.clamped.get((self.place.layer, modality))
        if clamped is not None:
            gates = clamped.to(x.device).expand(len(x), -1)
        else:
            gates = (x @ self.lora_gate[ADAPTER][modality].to(x.dtype).T).float().softmax(-1)
            if self.training:
                balances.append(balance(gates))
        if self.live.usage is not None:
            key = (self.place.layer, self.place.name)
            self.live.usage.setdefault(key, {})[self.live.modalities[modality]] = gates.detach().mean(0)
        return gates

    def _report(self, now: Pass, balances: list[Tensor]) -> None:
        # Computed also when nobody listens: a checkpointed layer must do the same the second time.
        if balances:
            mean = torch.stack(balances).mean()
            if now.balances is not None:
                now.balances.append(mean)

    def merge(self, *_: Any, **__: Any) -> None:
        """Raises InputError: no single matrix does what the experts do."""
        raise InputError("MoSE cannot be merged into the weights, because its experts depend on the token; keep it on")

    def get_delta_weight(self, adapter: str) -> Tensor:  # noqa: ARG002
        """Raises InputError, as `merge` does."""
        raise InputError("MoSE has no single weight difference, because its experts depend on the token")

    def supports_lora_conversion(self, adapter_name: str = ADAPTER) -> bool:  # noqa: ARG002
        """False: a LoRA has one B."""
        return False


def balance(gates: Tensor) -> Tensor:
    """E sum_e f_e mean(g_e) of gates [n, E]: 1 when experts are used evenly, E when one takes everything."""
    n_experts = gates.shape[-1]
    top = nn.functional.one_hot(gates.detach().argmax(-1), n_experts).to(gates.dtype).mean(0)
    return n_experts * (top * gates.mean(0)).sum()


class MoSEModel(PeftModel):
    """A model with MoSE layers; made by `emocircuits.steering.experts.wrap`. Trains with the plain Trainer."""

    def __init__(self, model: Any, config: LoraConfig, live: Live, mose_config: MoSEConfig) -> None:
        made_for = fingerprint(model)  # before there are other parameters
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(model, config, ADAPTER)
        self.training = self.base_model.training = model.training
        self._trainable = trainable
        self.live, self.mose_config, self.made_for = live, mose_config, made_for
        self.balance_loss: Tensor | None = None
        """c L_bal of the last training pass when the model returned no loss to add it to, else None."""
        self._last: Tensor | None = None
        self._begin()

    def _begin(self) -> None:
        model = self.get_base_model()
        keep(model, self.made_for)
        self.live.install(model, resolve(model))

    def __deepcopy__(self, memo: dict[int, Any]) -> MoSEModel:
        """A copy that follows its own passes."""
        self.live.remove()
        self.balance_loss = None  # torch copies no tensor with a history
        try:
            made = self.__class__.__new__(self.__class__)
            memo[id(self)] = made
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        finally:
            self._begin()
        made._begin()
        return made

    @property
    def last_balance(self) -> float | None:
        """Mean balance loss of the last training pass (1 even, E collapsed); None when it had no such tokens."""
        return None if self._last is None else float(self._last)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; in training its loss is L + c L_bal. Raises HookError for reentrant checkpointing."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        self._watch_checkpoints()
        with self.live.collecting() as found:
            output = super().forward(*args, **kwargs)
        self._last = self.balance_loss = None
        return self._with_balance(output, found, kwargs) if found else output

    def _with_balance(self, output: Any, found: list[Tensor], given: Mapping[str, Any]) -> Any:
        if not all(one.requires_grad for one in found) and any(
            p.requires_grad for name, p in self.named_parameters() if ".lora_gate." in name
        ):
            raise HookError(_REENTRANT)
        mean = torch.stack([one.to(found[0].device) for one in found]).mean()
        self._last = mean.detach()
        if given.get("labels") is None:
            self.balance_loss = self.mose_config.balance * mean
            warnings.warn(
                "the model was trained without labels, so it returned no loss to add the balance loss to; add"
                " `model.balance_loss` to your own",
                stacklevel=3,
            )
            return output
        loss = output[0] if isinstance(output, tuple) else output["loss"]
        loss = loss + (self.mose_config.balance * _share(given) * mean).to(loss.device, loss.dtype)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    def _watch_checkpoints(self) -> None:
        """Have gradient checkpointing keep each pass's modalities; a later pass may run before the recomputation."""
        for module in self.get_base_model().modules():
            if not getattr(module, "gradient_checkpointing", False):
                continue
            function = getattr(module, "_gradient_checkpointing_func", None)
            keywords = getattr(function, "keywords", {})
            if keywords.get("use_reentrant", True):
                raise HookError(_REENTRANT)
            if "context_fn" not in keywords:
                module._gradient_checkpointing_func = partial(function, context_fn=self.live.contexts)  # type: ignore
            elif keywords["context_fn"] != self.live.contexts:
                raise HookError("MoSE needs gradient checkpointing's context_fn for itself; leave yours out")

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model inside, parameter) of everything MoSE adds."""
        for name, parameter in self.get_base_model().named_parameters():
            if ".lora_" in name:
                yield name.replace(f".{ADAPTER}", ""), parameter

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor], source: Any) -> None:
        """Put in saved tensors; raises ArtefactError, before changing any, when names or shapes differ."""
        mine = dict(self.tensors())
        for name in sorted(mine.keys() | tensors.keys()):
            here, there = (tuple(d[name].shape) if name in d else None for d in (mine, tensors))
            if here != there:
                raise ArtefactError(f"{source} does not fit: {name} has shape {there} there and {here} here")
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])

    def unload(self) -> Any:
        """The model as it was before, without MoSE."""
        self.live.remove()
        model: nn.Module = self.base_model.unload()  # type: ignore[operator]
        for name in self._trainable:
            model.get_parameter(name).requires_grad_(True)
        return model

    def save_pretrained(self, save_directory: str, *, is_main_process: bool = True, **_: Any) -> None:  # type: ignore[override]
        """Write MoSE's own folder, as `experts.save` does; this is what Trainer calls for a checkpoint."""
        from .experts import save

        if is_main_process:
            save(self, save_directory)

    def load_adapter(self, model_id: str, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Put in the tensors of a saved folder; this is what Trainer calls to go on from a checkpoint."""
        from .experts import reload

        reload(self, Path(model_id))

    def add_adapter(self, *_: Any, **__: Any) -> None:
        """Raises InputError: other adapters would be built from MoSE layers."""
        raise InputError("a MoSE model holds one adapter; wrap a fresh copy of the model for another one")


_REENTRANT = (
    "gradient checkpointing with use_reentrant=True silently drops the gradient of the balance loss; use"
    ' gradient_checkpointing_kwargs={"use_reentrant": False}'
)


def _share(given: Mapping[str, Any]) -> float | Tensor:
    """What this batch is of the step: Trainer sums the losses of a step's batches, each divided by all its tokens."""
    total = given.get("num_items_in_batch")
    return 1.0 if total is None else (given["labels"][..., 1:] != -100).sum() / total


def build(model: nn.Module, places: Mapping[str, Place], live: Live, config: MoSEConfig) -> MoSEModel:
    """Wrap the Linears at these paths. Raises InputError for a model that already carries adapters."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("this model already carries adapters; MoSE wraps a plain model, so merge or unload them first")
    alpha: Any = config.alpha  # peft says int, and divides by it
    plain = LoraConfig(r=config.r, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=list(places))
    plain._register_custom_module({nn.Linear: _maker(model, places, live)})  # type: ignore[dict-item]
    made = MoSEModel(model, plain, live, config)
    plain._custom_modules = None  # it knows the modules by id, which a copy does not share
    found = {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if found != set(places):  # peft rewrites names that meant an expert of a mixture in older transformers
        made.unload()
        odd = sorted(found ^ set(places))[0]
        raise InputError(f"peft cannot wrap just the modules asked for on this model ({odd}); choose attention's")
    return made


def _maker(model: nn.Module, places: Mapping[str, Place], live: Live) -> Callable[..., MoSELinear]:
    """peft says which module it replaces, not where it stands."""
    by_id = {id(model.get_submodule(path)): place for path, place in places.items()}

    def make(target: nn.Module, adapter_name: str, **kwargs: Any) -> MoSELinear:
        return MoSELinear(target, adapter_name, place=by_id[id(target)], live=live, **kwargs)

    return make

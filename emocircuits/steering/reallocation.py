"""Attention reallocation: give a modality more or less of the attention, at inference, without new parameters.

The family that contains any reallocation between spans (MoSEAR, arXiv 2508.01181; its own constants are not published),
with the sink-aware (VAR, arXiv 2503.03321) and score-boosting (PAI, arXiv 2407.21771) rivals. Nothing here knows which
modality a model trusts too much: measure it first (`multimodal.balance`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import artefact
from ..activations import reweigh
from ..activations.attention import Call, Proceed, around_attention, probabilities
from ..activations.forward import Forward, ForwardTracker, hook_point
from ..activations.ownership import holding
from ..activations.sites import expand_layers
from ..errors import ArtefactError, HookError, InputError, unknown
from ..models.anatomy import Anatomy, resolve, unwrap
from ..models.fingerprint import check_fits, fingerprint
from ..models.spans import LiveSpans, ModalitySpans, aligned, placeholders
from .policies import POLICIES, Boost, Multiply, Policy, Sinks

KIND = "reallocation"
QUERIES = ("all", "after", "last")


@dataclass(frozen=True)
class Reallocation:
    """A policy at chosen layers, heads and queries: ``with Reallocation(policy).attach(model): model.generate(...)``.

    layers: None for every layer with attention. heads: None for all, or {layer: heads}, which then also chooses the
    layers. queries: "all", "after" (behind the last token of the policy's spans), or "last" (the last real token of
    each pass; every generated token is one).
    """

    policy: Policy
    layers: tuple[int, ...] | None = None
    heads: Mapping[int, Sequence[int]] | None = None
    queries: str = "after"
    name: str = "reallocation"
    fingerprint: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.queries not in QUERIES:
            raise unknown("queries", self.queries, QUERIES)
        if self.layers is not None and self.heads is not None:
            raise InputError("give `layers` or `heads` ({layer: heads}), not both")

    def covered(self, model: Any) -> dict[int, tuple[int, ...]]:
        """{layer: heads} that this reaches in a model. Raises InputError for what does not exist.

        Layers without softmax attention (linear attention) are left out, or refused with a HookError when asked for.
        """
        anatomy = resolve(model)
        everything = tuple(range(anatomy.n_heads))
        if self.heads is not None:
            wanted = {expand_layers(n, anatomy.n_layers)[0]: tuple(h) for n, h in self.heads.items()}
        elif self.layers is not None:
            wanted = dict.fromkeys(expand_layers(self.layers, anatomy.n_layers), everything)
        else:
            wanted = {n: everything for n, path in enumerate(anatomy.attention) if path}
        for layer, heads in wanted.items():
            if not anatomy.attention[layer]:
                anatomy.point("pattern", layer)  # raises with the reason
            if bad := [h for h in heads if not 0 <= h < anatomy.n_heads]:
                raise InputError(
                    f"head {bad[0]} of layer {layer} does not exist; choose from 0 to {anatomy.n_heads - 1}"
                )
        if not wanted:
            raise InputError(
                f"{self.name!r} reaches no layer: there is none with softmax attention, or none was chosen"
            )
        return wanted

    @contextmanager
    def attach(self, model: Any, spans: ModalitySpans | None = None) -> Iterator[Reallocation]:
        """Reallocate in every forward pass inside the block; afterwards the model is bit-identical to before.

        spans: of the prompt; when None the placeholders of the model's own modalities are looked up in its ids. Works
        under generate() with any cache, beams and padding, and beside steerers. Raises InputError for names that the
        model or the spans do not have, ArtefactError for another model, HookError while another thread edits the model.
        """
        module = unwrap(model)
        if self.fingerprint:
            check_fits(self.fingerprint, module)
        anatomy, wanted = resolve(module), self.covered(module)
        tokens = placeholders(module) if spans is None else None
        known = spans.names if spans is not None else tuple(tokens or ())
        for name in self.policy.spans():
            if name not in known:
                raise unknown("modality", name, known)
        if self.policy.idle():
            yield self
            return
        live = _Live(self, module, anatomy, LiveSpans(tokens, spans), wanted)
        with holding(module, False, False), live.installed():
            yield self

    def of(self, model: Any) -> Reallocation:
        """The same, bound to a model by its fingerprint, so that a saved file knows where it belongs."""
        return replace(self, fingerprint=fingerprint(unwrap(model)))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header; atomic."""
        header = {
            "policy": {"kind": type(self.policy).__name__, **asdict(self.policy)},
            "layers": None if self.layers is None else list(self.layers),
            "heads": None if self.heads is None else [[n, list(h)] for n, h in self.heads.items()],
            "queries": self.queries, "name": self.name, "provenance": dict(self.provenance),
            "fingerprint": dict(self.fingerprint) if self.fingerprint else None,
        }  # fmt: skip
        return artefact.save(path, KIND, {}, header)

    @classmethod
    def load(cls, path: str | Path) -> Reallocation:
        """Read a saved one; raises ArtefactError for a damaged file, another kind, or a policy this version lacks."""
        _, h = artefact.load(path, KIND)
        given = dict(h["policy"])
        kind = given.pop("kind")
        if kind not in POLICIES:
            raise ArtefactError(f"{path} holds a policy {kind!r} that this version does not know; update emocircuits")
        heads = None if h["heads"] is None else {int(n): tuple(v) for n, v in h["heads"]}
        layers = None if h["layers"] is None else tuple(h["layers"])
        policy = POLICIES[kind].from_data(given)
        return cls(policy, layers, heads, h["queries"], h["name"], h["fingerprint"], h["provenance"])


class _Live:
    """One attached reallocation: follows the passes and rewrites the attention of its layers."""

    def __init__(
        self, made: Reallocation, module: nn.Module, anatomy: Anatomy, spans: LiveSpans,
        wanted: Mapping[int, tuple[int, ...]],
    ) -> None:  # fmt: skip
        self.policy, self.queries, self.spans, self.wanted = made.policy, made.queries, spans, wanted
        self.module, self.anatomy = module, anatomy
        self.tracker = ForwardTracker(module, anatomy)
        self.sinks: dict[int, Tensor] = {}
        self._pass: tuple[tuple[int, int], Tensor, bool] | None = None
        self._bias: tuple[tuple[int, int], Tensor] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in self.tracker.install():
                stack.callback(handle.remove)
            if isinstance(self.policy, Sinks):
                for layer in self.wanted:
                    point = self.anatomy.point("resid_pre", layer)
                    hook = hook_point(self.module.get_submodule(point.module), point.io, self._sink_reader(layer))
                    stack.callback(hook.remove)
            stack.enter_context(around_attention(self.module, self.anatomy, dict.fromkeys(self.wanted, self)))
            yield

    def _sink_reader(self, layer: int) -> Any:
        def read(x: Tensor) -> None:
            assert isinstance(self.policy, Sinks)
            forward = self.tracker.current
            found, old = self.policy.found(x), self.sinks.get(layer)
            if forward is not None and forward.past and old is not None and len(old) == len(found):
                found = torch.cat([old[:, : forward.past], found], dim=1)
            self.sinks[layer] = found

        return read

    def __call__(self, call: Call, proceed: Proceed) -> Any:
        regions, some = self._regions(call)
        if not some:  # no token of these modalities in this batch
            return proceed(call)
        policy, heads = self.policy, self._heads(call)
        softcap = bool(call.kwargs.get("softcap"))
        if call.query.shape[2] == 1:
            if isinstance(policy, Multiply) and not softcap:
                return proceed(self._masked(call, policy, regions, heads))
            return call.attended(self._attention(call, regions, heads)), None
        if self.queries == "last" or isinstance(policy, Boost):
            rows = self._forward().last(call.query.device)
            return reweigh.on_rows(call, proceed(call), rows, lambda one: self._attention(one, regions, heads))
        gate = self._queries(call, regions)[:, None].expand(-1, call.query.shape[1], -1)  # [B, H, Q]
        gate = gate if heads is None else gate & heads[:, None]
        if isinstance(policy, Multiply) and not softcap:
            return reweigh.biased(call, proceed, policy.log_weights(regions), gate.float())
        result, found = reweigh.with_masses(call, proceed, regions)
        weights = torch.where(gate[..., None], policy.weights(found), 1.0)
        return (reweigh.reweighted(call, result[0], found, regions, weights), *result[1:])

    def _forward(self) -> Forward:
        if self.tracker.current is None:
            raise HookError("attention ran outside the decoder's forward pass, so its tokens are unknown")
        return self.tracker.current

    def _regions(self, call: Call) -> tuple[Tensor, bool]:
        """The policy's regions [B, R, K] of this pass, and whether any key is in them; the same for all layers."""
        forward, width = self._forward(), call.key.shape[2]
        key = (self.tracker.count, width)
        if self._pass is not None and self._pass[0] == key and not isinstance(self.policy, Sinks):
            return self._pass[1:]
        if self._pass is None or self._pass[0][0] != key[0]:
            self.spans.follow(forward, call.query.device)
        masks = {name: self.spans.mask(name, width) for name in self.policy.spans()}
        regions = self.policy.regions(masks, self._sinks(call.layer, width))
        self._pass = (key, regions, bool(regions.any()))
        return self._pass[1:]

    def _heads(self, call: Call) -> Tensor | None:
        """[H] True on the heads of a layer, None when all are."""
        wanted, n = self.wanted[call.layer], call.query.shape[1]
        if len(set(wanted)) == n:
            return None
        return torch.tensor([h in wanted for h in range(n)], device=call.query.device)

    def _attention(self, call: Call, regions: Tensor, heads: Tensor | None) -> Tensor:
        changed = self.policy.attention(call, regions)
        return changed if heads is None else torch.where(heads[:, None, None], changed, probabilities(call))

    def _masked(self, call: Call, policy: Multiply, regions: Tensor, heads: Tensor | None) -> Call:
        """The call of one query with the log factors in its mask."""
        key = (self.tracker.count, call.key.shape[2])
        if self._bias is None or self._bias[0] != key:
            self._bias = (key, policy.log_weights(regions)[:, None, None])
        bias = self._bias[1] if heads is None else self._bias[1] * heads[:, None, None]
        given = call.bias()
        return replace(call, mask=(bias if given is None else bias + given).to(call.query.dtype))

    def _sinks(self, layer: int, width: int) -> Tensor | None:
        found = self.sinks.get(layer)
        return None if found is None else aligned(found, width)

    def _queries(self, call: Call, regions: Tensor) -> Tensor:
        """[B, Q] True where this pass's queries are gated: everywhere, or behind the last key of the regions."""
        forward = self._forward()
        left = max(0, forward.past + forward.length - regions.shape[-1])  # what a sliding window has left behind
        columns = forward.columns(call.query.device)[None] - left
        if self.queries == "all":
            return torch.ones_like(columns, dtype=torch.bool)
        keys = torch.arange(regions.shape[-1], device=regions.device)
        last = torch.where(regions.any(1), keys, -1).max(-1).values
        return columns > last[:, None]

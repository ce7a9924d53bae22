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
from ..activations.forward import ForwardTracker, hook_point
from ..activations.ownership import holding
from ..activations.sites import expand_layers
from ..errors import ArtefactError, HookError, InputError, unknown
from ..models.anatomy import Anatomy, resolve, unwrap
from ..models.fingerprint import check_fits, fingerprint
from ..models.spans import LiveSpans, ModalitySpans, placeholders
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
        self.followed = -1
        self.sinks: dict[int, Tensor] = {}

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
        forward = self.tracker.current
        if forward is None:
            raise HookError("attention ran outside the decoder's forward pass, so its tokens are unknown")
        if self.followed != self.tracker.count:
            self.followed = self.tracker.count
            self.spans.follow(forward, call.query.device)
        width, policy = call.key.shape[2], self.policy
        masks = {name: self.spans.mask(name, width) for name in policy.spans()}
        regions = policy.regions(masks, self._sinks(call.layer, width))
        if not bool(regions.any()):  # no token of these modalities in this batch
            return proceed(call)
        heads = torch.zeros(call.query.shape[1], dtype=torch.bool, device=call.query.device)
        heads[list(self.wanted[call.layer])] = True
        if self.queries == "last" or call.query.shape[2] == 1 or isinstance(policy, Boost):
            return self._last(call, proceed, regions, heads)
        gate = heads[None, :, None] & self._queries(call, regions)[:, None]  # [B, H, Q]
        if isinstance(policy, Multiply) and not call.kwargs.get("softcap"):
            return reweigh.biased(call, proceed, policy.log_weights(regions), gate.float())
        result, found = reweigh.with_masses(call, proceed, regions)
        weights = torch.where(gate[..., None], policy.weights(found), 1.0)
        return (reweigh.reweighted(call, result[0], found, *policy.kept(regions, weights)), *result[1:])

    def _sinks(self, layer: int, width: int) -> Tensor | None:
        found = self.sinks.get(layer)
        return None if found is None else nn.functional.pad(found, (0, max(0, width - found.shape[1])))[:, :width]

    def _queries(self, call: Call, regions: Tensor) -> Tensor:
        """[B, Q] True where this pass's queries are gated: everywhere, or behind the last key of the regions."""
        forward = self.tracker.current
        assert forward is not None
        columns = forward.columns(call.query.device)[None]
        if self.queries == "all":
            return torch.ones_like(columns, dtype=torch.bool)
        keys = torch.arange(regions.shape[-1], device=regions.device)
        last = torch.where(regions.any(1), keys, -1).max(-1).values
        return columns > last[:, None]

    def _last(self, call: Call, proceed: Proceed, regions: Tensor, heads: Tensor) -> Any:
        forward = self.tracker.current
        assert forward is not None
        result = proceed(call)
        rows = forward.last(call.query.device)

        def change(one: Call) -> Tensor:
            return torch.where(heads[:, None, None], self.policy.attention(one, regions), probabilities(one))

        return reweigh.on_rows(call, result, rows, change)

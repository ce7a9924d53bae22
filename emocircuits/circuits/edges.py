"""Edges of a circuit: how much of what one member does reaches the score through another member, or directly.

Path attribution (edge attribution patching: Syed et al., arXiv 2310.10348): the first-order effect when only the
receiving unit sees its input without what the sending unit writes. Summed over all receivers of a model, and the direct
path, the edges of a unit are its attribution (`gradients.attribution`), so they say where an effect goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations import capture
from ..activations.forward import hook_point
from ..errors import InputError, unknown
from ..models.anatomy import resolve, unwrap
from .assemble import Circuit
from .gradients import frozen
from .readout import Readout
from .sublayers import Sublayer, attention_side, mlp_side

Node = tuple[str, int, int]
"""("heads" or "neurons", layer, unit)."""
SITE = {"heads": "z", "neurons": "mlp_post"}


@dataclass(frozen=True)
class Graph:
    """Members in the order in which the model computes them, and what flows between them, in units of the score.

    effects [n]: attribution of each member. edges [n, n]: row sends, column receives; 0 where no path exists.
    direct [n]: what reaches the score past every later unit.
    """

    nodes: tuple[Node, ...]
    effects: Tensor
    edges: Tensor
    direct: Tensor

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON and plots: nodes, and edges [sender, receiver, value] by place in `nodes`."""
        rows = zip(self.nodes, self.effects.tolist(), self.direct.tolist())
        nodes = [
            {"kind": kind, "layer": layer, "unit": unit, "effect": effect, "direct": direct}
            for (kind, layer, unit), effect, direct in rows
        ]
        return {"nodes": nodes, "edges": [[a, b, float(self.edges[a, b])] for a, b in self.edges.nonzero().tolist()]}


def graph(
    model: Any, inputs: Mapping[str, Any], readout: Readout, circuit: Circuit, baselines: Mapping[str, Tensor | None]
) -> Graph:
    """The graph of a circuit on texts of its emotion: one forward pass, and one block backwards for each member.

    The score is the readout of the circuit's emotion less the mean of the others', averaged over texts; what a unit
    writes counts less its baseline, {"z": [L, heads, head_dim], "mlp_post": [L, d_mlp]} (None: zero). Members after
    the readout are left out. Raises InputError when none is left.
    """
    if circuit.emotion not in readout.emotions:
        raise unknown("emotion", circuit.emotion, readout.emotions)
    trace = _Trace(model, readout, baselines)
    nodes = trace.order(circuit)
    if not nodes:
        raise InputError(f"no member of the circuit of {circuit.emotion} comes before the readout ({readout.what})")
    with frozen(trace.module), trace.hooked():
        acts = capture(trace.module, inputs, readout.site, readout.layer, positions="last", grad=True)
        values = readout(next(iter(acts.values())))
        own = values[:, readout.emotions.index(circuit.emotion)]
        score = (own - (values.sum(1) - own) / (values.shape[1] - 1)).mean()
        return trace.gradients(score, nodes)


class _Trace:
    """Tensors of one forward pass, and the local gradients through single units."""

    def __init__(self, model: Any, readout: Readout, baselines: Mapping[str, Tensor | None]) -> None:
        self.module, self.anatomy, self.baselines = unwrap(model), resolve(model), baselines
        self.last = self.anatomy.n_layers - 1 if readout.site == "final_norm" else readout.layer
        self.parallel = "resid_mid" in self.anatomy.missing
        self.held: dict[tuple[str, int], Tensor] = {}

    def order(self, circuit: Circuit) -> tuple[Node, ...]:
        nodes = [(kind, *unit) for kind in SITE for unit in circuit.units(kind) if unit[0] <= self.last]
        return tuple(sorted(nodes, key=lambda n: (n[1], n[0], n[2])))

    def hooked(self) -> ExitStack:
        """Keep every residual stream and every unit's values, in the graph."""
        stack = ExitStack()
        sites = ["resid_pre", "z", "mlp_post", *([] if self.parallel else ["resid_mid"])]
        for layer in range(self.last + 1):
            for site in (*sites, *(["resid_post"] if layer == self.last else [])):
                point = self.anatomy.point(site, layer)
                keep = self._keeper(site, layer)
                stack.callback(hook_point(self.module.get_submodule(point.module), point.io, keep).remove)
        return stack

    def _keeper(self, site: str, layer: int) -> Any:
        def keep(x: Tensor) -> None:
            self.held[site, layer] = x

        return keep

    def gradients(self, score: Tensor, nodes: tuple[Node, ...]) -> Graph:
        """All edges from one graph of the forward pass."""
        keys = sorted({(SITE[kind], layer) for kind, layer, _ in nodes})
        wanted = [self.held[k] for k in keys] + [self.held["resid_post", self.last]]
        *grads, end = torch.autograd.grad(score, wanted, retain_graph=True)
        at = dict(zip(keys, grads))
        writes, effects = zip(*(self._sent(node, at) for node in nodes))
        edges = torch.zeros(len(nodes), len(nodes))
        for j, node in enumerate(nodes):
            senders = [i for i in range(j) if self._before(nodes[i], node)]
            if senders:
                through = self._through(node, at)
                edges[senders, j] = torch.stack([(writes[i] * through).sum() for i in senders]).cpu()
        direct = torch.stack([(w * end).sum() for w in writes]).cpu()
        return Graph(nodes, torch.stack(effects).cpu(), edges, direct)

    def _before(self, sender: Node, receiver: Node) -> bool:
        if sender[1] != receiver[1]:
            return sender[1] < receiver[1]
        return sender[0] == "heads" and receiver[0] == "neurons" and not self.parallel

    def _sent(self, node: Node, at: Mapping[tuple[str, int], Tensor]) -> tuple[Tensor, Tensor]:
        """([B, T, d_model] what a unit adds to the residual stream beyond its baseline, its attribution)."""
        kind, layer, unit = node
        key = SITE[kind], layer
        point, value = self.anatomy.point(*key), self.held[key].detach()
        x, grad = point.read(value), point.read(at[key])
        base = self.baselines.get(SITE[kind])
        excess = (x if base is None else x - base[layer].to(x))[:, :, unit]
        effect = (grad[:, :, unit] * excess).sum()
        side = (attention_side if kind == "heads" else mlp_side)(self.module, layer)
        if kind == "heads":
            write = excess @ side.weight.unflatten(1, x.shape[2:])[:, unit].T.to(x)
        else:
            write = excess[..., None] * side.weight[:, unit].to(x)
        return _added(side, value, write), effect

    def _through(self, node: Node, at: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """[B, T, d_model] gradient of the score at the unit's input when only this unit sees the change."""
        kind, layer, unit = node
        key = SITE[kind], layer
        point = self.anatomy.point(*key)
        own = point.read(self.held[key])[:, :, unit]
        weight = point.read(at[key])[:, :, unit]
        source = "resid_pre" if kind == "heads" or self.parallel else "resid_mid"
        return torch.autograd.grad((own * weight).sum(), self.held[source, layer], retain_graph=True)[0]


def _added(side: Sublayer, value: Tensor, write: Tensor) -> Tensor:
    """A write as the residual stream gets it: to first order through the norm after the sublayer, if there is one."""
    if side.norm is None:
        return write
    with torch.no_grad():
        y = side.written(value)
    return torch.func.jvp(side.norm.forward, (y,), (write.to(y),))[1]

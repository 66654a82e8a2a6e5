"""Predicted peak memory."""
from __future__ import annotations
from .graph import HOST, trace, Graph
from .simplify import simplify
from .liveness import graph_lifetimes
from .rules import rules_for
import dataclasses

def predict_graph(graph, rules):
    block = simplify(graph)
    g = dataclasses.replace(graph, ops=block.ops, outputs=block.outputs)
    lives, aliases = graph_lifetimes(g, rules)
    args = sum(v.nbytes for v in g.inputs if v.space != HOST)
    outs = sum(v.nbytes for v in g.outputs if v.space != HOST) - sum(v.nbytes for v in aliases if v.space != HOST)
    return g, lives, args, outs

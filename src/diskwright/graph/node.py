"""Nodes and edges.  They live in the engine so that protocols, which are leaves of the graph, can
be nodes without importing the graph."""

from ..engine.node import Buffer, Edge, Node

__all__ = ["Buffer", "Edge", "Node"]

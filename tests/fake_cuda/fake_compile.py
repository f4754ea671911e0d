"""torch.compile on the fake CUDA device: the graphs that Inductor would get, kept, and run op by op.

As for Inductor, operations are decomposed and the partitioner chooses what the backward pass gets from the
forward pass and what it computes again.
"""

import functools
from collections.abc import Callable

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node

# Operations whose result shares its input's memory.
VIEWS = ("view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "split", "unsqueeze",
         "squeeze", "as_strided", "alias", "detach")  # fmt: skip


class Graphs:
    """Collects what torch.compile makes while this object is in use (`with`)."""

    def __init__(self, fullgraph: bool) -> None:
        self.kept: list[tuple[str, GraphModule]] = []
        self.compile = torch.compile
        self.options = {"backend": self._backend(), "fullgraph": fullgraph}

    def __enter__(self) -> "Graphs":
        torch._dynamo.reset()
        counters.clear()
        torch.compile = functools.partial(self.compile, **self.options)
        return self

    def __exit__(self, *_: object) -> None:
        torch.compile = self.compile
        self.n_dynamo = counters["stats"]["unique_graphs"]

    def _backend(self) -> Callable:
        def keep(kind: str, graph: GraphModule, inputs: list[Tensor]) -> Callable:
            self.kept.append((kind, graph))
            return make_boxed_func(graph.forward)

        return aot_autograd(
            fw_compiler=functools.partial(keep, "forward"),
            bw_compiler=functools.partial(keep, "backward"),
            inference_compiler=functools.partial(keep, "inference"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def report(self) -> dict[str, object]:
        """Numbers of graphs; of the last one for training what is saved, its tangents, and its peak bytes."""
        kinds = [kind for kind, _ in self.kept]
        found: dict[str, object] = {
            "graphs": self.n_dynamo,
            **{k: kinds.count(k) for k in sorted(set(kinds))},
        }
        if "backward" in kinds:
            forward, backward = (
                [g for k, g in self.kept if k == kind][-1] for kind in ("forward", "backward")
            )
            given = [n for n in backward.graph.find_nodes(op="placeholder")]
            found["tangents"] = [_describe(n) for n in given if "tangents" in n.name]
            found["backward_peak"] = peak_of_backward(backward)
            found["saved"] = [_describe(n) for n in saved_for_backward(forward, backward)]
        return found


def saved_for_backward(forward: GraphModule, backward: GraphModule) -> list[Node]:
    """List the tensors that forward saves for backward, without its own inputs, each memory once."""
    needed = {n.name for n in backward.graph.find_nodes(op="placeholder") if "tangents" not in n.name}
    (output,) = forward.graph.find_nodes(op="output")
    roots = {}
    for node in output.args[0]:
        if isinstance(node, Node) and node.name in needed and isinstance(node.meta.get("val"), Tensor):
            root = _memory_of(node)
            if root.op != "placeholder":
                roots[root] = None
    return list(roots)


def peak_of_backward(graph: GraphModule) -> int:
    """Bytes alive at the peak of a compiled backward pass: saved by the forward pass, and its own.

    Inductor stores the inputs and outputs of matrix products and attention, results, and tensors with several
    users that are computed from more than four stored ones. It fuses all others into these. Saved tensors are
    freed after their last use. Parameters are not counted.
    """
    nodes = list(graph.graph.nodes)
    stored = {_memory_of(n) for n in nodes if n.op == "placeholder" and not n.name.startswith("primals")}
    for node in nodes:
        if node.op == "output" or _is_kernel(node):
            stored |= {_memory_of(n) for n in node.all_input_nodes if not n.name.startswith("primals")}
            stored |= {node} if node.op != "output" else set()
    stored = {n for n in stored if isinstance(n.meta.get("val"), Tensor)}
    last_use: dict[Node, Node] = {}
    reads: dict[Node, set[Node]] = {}  # the stored memory behind a node
    for node in nodes:
        reads[node] = {m for n in node.all_input_nodes for m in ({n} if n in stored else reads[n])}
        last_use |= dict.fromkeys(reads[node], node)
        if len(reads[node]) > 4 and len(node.users) > 1 and isinstance(node.meta.get("val"), Tensor):
            stored.add(node)
    size = {n: _describe(n)["bytes"] for n in stored}
    live = peak = sum(size[n] for n in stored if n.op == "placeholder")
    for node in nodes:
        if node in stored and node.op != "placeholder":
            live += size[node]
        peak = max(peak, live)
        live -= sum(size[m] for m in reads[node] if last_use[m] is node)
    return peak


def _is_kernel(node: Node) -> bool:
    return node.op == "call_function" and any(word in str(node.target) for word in ("mm", "attention"))


def _memory_of(node: Node) -> Node:
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        name = getattr(node.target, "_opname", "")
        if name not in VIEWS:
            break
        node = node.args[0]
    return node


def _describe(node: Node) -> dict[str, object]:
    value = node.meta["val"]
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype)[6:],
        "elements": value.numel(),
        "bytes": value.numel() * value.element_size(),
        "operation": str(node.target),
    }

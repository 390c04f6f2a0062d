"""The trees that a draft model drafts: of a given shape, or grown where it is sure (EAGLE-2)."""

import dataclasses
import itertools
import json
import operator
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree (Li et al., 2024, section 4): grown and cut by the draft's own probabilities.

    At each depth the ``children`` most likely nodes, by the product of the probabilities down to
    them, get ``children`` children each. Of all these the ``nodes`` most likely are verified.

    Attributes:
        nodes: drafted nodes that are verified, at most.
        depth: of the deepest.
        children: of a node, and how many nodes of each depth get any.

    Raises:
        ValueError: a number is below 1, or there are fewer nodes than depths.
    """

    nodes: int = 48
    depth: int = 6
    children: int = 10

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if min(self.nodes, self.depth, self.children) < 1:
            raise ValueError(
                f"a tree of {self.nodes} nodes, depth {self.depth} and {self.children} children; "
                "expected at least 1 of each"
            )
        if self.nodes < self.depth:
            raise ValueError(
                f"a tree of depth {self.depth} with {self.nodes} nodes; expected at least one for "
                "each depth"
            )

    def __str__(self) -> str:
        """Such as ``best 48 nodes, 6 deep, 10 children``."""
        return f"best {self.nodes} nodes, {self.depth} deep, {self.children} children"


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A tree of one shape: which children of which nodes there are, by their rank.

    ``((0,), (1,), (0, 0))`` are the most and the second most likely token, and after the former
    its most likely child (Medusa's notation; Cai et al., 2024). When the verifier samples, and the
    draft does too, the child of rank r is the r-th that is drawn.

    Attributes:
        paths: a path of ranks from the root to each node.
        replacement: whether siblings are drawn with replacement, so that two may be the same.

    Raises:
        ValueError: there is none, one is there twice, or a node's parent or elder sibling is not.
    """

    paths: tuple[Path, ...]
    replacement: bool = False

    def __post_init__(self) -> None:
        """Checks that it is a tree."""
        known = {(), *self.paths}
        if not self.paths or len(known) != len(self.paths) + 1:
            raise ValueError(
                f"got {len(self.paths)} paths, {len(known) - 1} of them different; expected at "
                "least one, each once and none empty"
            )
        for path in self.paths:
            missing = [path[:-1]] if path[:-1] not in known else []
            if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in known:
                missing.append((*path[:-1], path[-1] - 1))
            if missing or path[-1] < 0:
                raise ValueError(
                    f"the path {path} is in the tree without {missing or 'a rank of 0 or more'}; "
                    "expected each node's parent, and its siblings of lower rank"
                )

    @classmethod
    def of_widths(cls, widths: Sequence[int], *, replacement: bool = False) -> "StaticTree":
        """Every node of depth d has ``widths[d]`` children; ``(4, 2, 1)`` has 4 + 8 + 8 nodes."""
        if not widths or min(widths) < 1:
            raise ValueError(f"got the widths {list(widths)}; expected one or more, each 1 or more")
        paths: list[Path] = []
        for depth in range(1, len(widths) + 1):
            paths += itertools.product(*(range(width) for width in widths[:depth]))
        return cls(tuple(paths), replacement)

    def __str__(self) -> str:
        """Such as ``20 nodes, 4 deep``."""
        return f"{self.nodes} nodes, {self.depth} deep"

    @property
    def depth(self) -> int:
        """Of the deepest node."""
        return max(len(path) for path in self.paths)

    @property
    def nodes(self) -> int:
        """Drafted nodes."""
        return len(self.paths)


Tree = DynamicTree | StaticTree


@dataclasses.dataclass(frozen=True)
class Level:
    """The nodes of one depth of a static tree, in the order of the draft.

    Attributes:
        parents: for each node, which of the nodes with children of the depth above is its parent.
        ranks: for each node, which child of it.
        of_rank: the nodes that are first children, those that are second ones, and so on.
        inner: which nodes have children themselves.
        sees: bool ``[R, D + R]``, which of the D inner nodes above and of its own R each inner node
            sees: its ancestors and itself.
    """

    parents: Tensor
    ranks: Tensor
    of_rank: tuple[Tensor, ...]
    inner: Tensor
    sees: Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """A static tree as tensors; nodes are numbered by depth, then by path, the root is node 0.

    Attributes:
        levels: of depth 1, 2, ...
        parents: int64 ``[N]``, -1 for the root.
        depths: int64 ``[N]``.
        sees: bool ``[N, N]``, ancestors and itself.
        inner: int64, the nodes that have children, sorted.
        inner_end: one more than the last of them.
    """

    levels: tuple[Level, ...]
    parents: Tensor
    depths: Tensor
    sees: Tensor
    inner: Tensor
    inner_end: int


def layout(tree: StaticTree, device: torch.device) -> Layout:
    """Lays a static tree out."""
    order = sorted(tree.paths, key=lambda path: (len(path), path))
    number = {(): 0} | {path: i + 1 for i, path in enumerate(order)}
    with_children = {path[:-1] for path in order}
    inner = [path for path in order if path in with_children]
    inner_numbers = [0, *(number[path] for path in inner)]
    levels = []
    for depth in range(1, tree.depth + 1):
        nodes = [path for path in order if len(path) == depth]
        above: list[Path] = [path for path in [(), *inner] if len(path) == depth - 1]
        rows = [path for path in nodes if path in with_children]
        ranks = torch.tensor([path[-1] for path in nodes])
        of_rank = [(ranks == rank).nonzero()[:, 0] for rank in range(int(ranks.max()) + 1)]
        known = [path for path in inner if len(path) <= depth]
        levels.append(
            Level(
                torch.tensor([above.index(path[:-1]) for path in nodes], device=device),
                ranks.to(device),
                tuple(children.to(device) for children in of_rank),
                torch.tensor([nodes.index(path) for path in rows], device=device).long(),
                torch.tensor(
                    [[row[: len(path)] == path for path in known] for row in rows], device=device
                ),
            )
        )
    all_nodes: list[Path] = [(), *order]
    return Layout(
        tuple(levels),
        torch.tensor([-1, *(number[path[:-1]] for path in order)], device=device),
        torch.tensor([len(path) for path in all_nodes], device=device),
        torch.tensor(
            [[node[: len(path)] == path for path in all_nodes] for node in all_nodes], device=device
        ),
        torch.tensor(inner_numbers, device=device),
        inner_numbers[-1] + 1,
    )


DYNAMIC = "dynamic"


def parse_tree(text: str, nodes: int, depth: int, children: int) -> Tree:
    """A tree as the command line names it.

    Args:
        text: ``"dynamic"``; or the children of each node by depth, such as ``"4,2,1"``; or a file
            of JSON with a list of paths, such as ``[[0], [1], [0, 0]]``.
        nodes: of a dynamic tree.
        depth: of a dynamic tree.
        children: of a node in a dynamic tree.

    Raises:
        ValueError: it is none of these, or no tree.
        OSError: the file cannot be read.
    """
    if text == DYNAMIC:
        return DynamicTree(nodes, depth, children)
    if all(width.strip().isdecimal() for width in text.split(",")):
        return StaticTree.of_widths([int(width) for width in text.split(",")])
    if not text.endswith(".json"):
        raise ValueError(
            f"the tree is {text!r}; expected {DYNAMIC}, the children of each node by depth such as "
            "4,2,1, or a .json file with a list of paths"
        )
    try:
        found: object = json.loads(pathlib.Path(text).read_text(encoding="utf-8"))
        paths = tuple(tuple(map(operator.index, path)) for path in found)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{text} is no tree ({error}); expected a list of paths, each a list of ranks, such as "
            "[[0], [1], [0, 0]]"
        ) from error
    return StaticTree(paths)

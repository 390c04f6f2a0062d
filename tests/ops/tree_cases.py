"""Random trees and logits, for the tests of the tree operators."""

import contextlib
import dataclasses

import torch
from torch import Tensor

from speculators.ops import backend
from speculators.ops.backend import Backend
from speculators.ops.draft_tree import DraftTree

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
COMPILED = {"cpu": Backend.CPU, "cuda": Backend.CUDA}


def random_parents(batch: int, nodes: int, generator: torch.Generator, missing: float) -> Tensor:
    """Parents of any shape of tree; some nodes are missing."""
    uniform = torch.rand(batch, nodes, generator=generator)
    parents = (uniform * torch.arange(nodes)).long()
    gone = torch.rand(batch, nodes, generator=generator) < missing
    gone[:, :1] = True
    return parents.masked_fill(gone, -1)


@dataclasses.dataclass
class Case:
    """Trees, of whose nodes two thirds are what their parent's row says, and what verifies them."""

    logits: Tensor
    tree: DraftTree
    uniforms: Tensor
    q: Tensor

    def to(self, device: str) -> "Case":
        """The same on a device."""
        tree = DraftTree(self.tree.tokens.to(device), self.tree.parents.to(device))
        tensors = (self.logits, self.uniforms, self.q)
        logits, uniforms, q = (tensor.to(device) for tensor in tensors)
        return Case(logits, tree, uniforms, q)


def make_case(
    seed: int,
    batch: int = 4,
    nodes: int = 9,
    width: int = 33,
    dtype: torch.dtype = torch.float32,
    masked: float = 0.0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, nodes, width, generator=generator)
    best = logits.argmax(-1, keepdim=True)
    logits = logits.scatter(2, best, logits.amax(-1, keepdim=True) + 3).to(dtype)
    if masked:
        cut = torch.rand(logits.shape, generator=generator) < masked
        logits = logits.masked_fill(cut, -torch.inf)
    parents = random_parents(batch, nodes, generator, 0.1)
    tokens = torch.randint(width, (batch, nodes), generator=generator)
    likely = logits.argmax(-1).gather(1, parents.clamp(min=0))
    tokens = torch.where(torch.rand(batch, nodes, generator=generator) < 0.67, likely, tokens)
    noise = torch.randn(batch, nodes, width, generator=generator)
    finite = logits.float().nan_to_num(nan=0, neginf=-5.0)
    q = (finite + noise).softmax(-1)
    uniforms = torch.rand(batch, nodes, generator=generator, dtype=torch.float64)
    return Case(logits, DraftTree(tokens, parents), uniforms, q)


def distinct_siblings(tree: DraftTree, width: int) -> DraftTree:
    """The tree with the tokens of siblings made different, as drawing without replacement does."""
    tokens = tree.tokens.clone()
    for row, parents in enumerate(tree.parents.tolist()):
        seen: dict[int, set[int]] = {}
        for node, parent in enumerate(parents):
            used = seen.setdefault(parent, set())
            token = int(tokens[row, node])
            while token in used and len(used) < width:
                token = (token + 1) % width
            used.add(token)
            tokens[row, node] = token
    return DraftTree(tokens, tree.parents)


def on_reference() -> contextlib.AbstractContextManager[None]:
    return backend.forced(Backend.REFERENCE)

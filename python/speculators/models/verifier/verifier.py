"""``Verifier``: a language model of transformers, as speculative decoding and training need it.

It runs the decoder, not the model around it: logits come from the ``VerifierHead`` and only for the
rows that are asked for, and residual streams from hooks, so that no copy of all layers is made. A
multimodal model's text part serves text; images are outside of this class.

What a model does between its layers and its logits is known from its forward alone. So a new
verifier is asked for four tokens, and its own logits must be those of the ``VerifierHead``.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from speculators.models.verifier import cache, rows
from speculators.models.verifier.architecture import (
    UnsupportedVerifierError,
    auto_class,
    default_aux_layer_ids,
    find_architecture,
    rotary_length,
)
from speculators.models.verifier.cache import VerifierState
from speculators.models.verifier.capture import residual_streams
from speculators.models.verifier.head import VerifierHead
from speculators.models.verifier.tree import TokenTree, keep_path, tree_masks

LogitRows = Literal["last", "all", "none"]
Text = TypeVar("Text", bound=Sized)


@dataclasses.dataclass(frozen=True)
class VerifierOutput:
    """One forward pass of a verifier.

    Attributes:
        logits: ``[B, 1 or T, V]`` in the head's dtype, or None where none were asked for. Row t is
            the distribution of token t + 1.
        captured: residual stream id to ``[B, T, H]``; rows of padding hold nothing meaningful.
        state: what ``step`` continues from; None after a pass without a cache.
    """

    logits: Tensor | None
    captured: dict[int, Tensor]
    state: VerifierState | None


class Verifier:
    """A causal language model with a cache that can be cropped, and with its residual streams.

    The model is frozen and switched to evaluation mode.

    Args:
        model: a causal language model, or an image-text-to-text model whose text part serves.
        tokenizer: its tokenizer, for callers that need one.

    Raises:
        UnsupportedVerifierError: the model keeps a recurrent state, or its parts are of an unknown
            kind, or its own logits are not those of its ``VerifierHead``.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        # Transformers' own flag for models whose state cannot go back; some keep none in the cache.
        if getattr(model, "_is_stateful", False):
            raise UnsupportedVerifierError(
                f"{type(model).__name__} keeps a recurrent state, from which rejected tokens "
                "cannot be taken back; expected a model with attention in every layer"
            )
        self._parts = find_architecture(model)
        cache.new_cache(self._parts.config)
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.head = VerifierHead.from_model(model)
        self._tokenizer = tokenizer
        self._load_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
        # Not known before a packed batch, or a tree, comes.
        self._packs: bool | None = None
        self._takes_trees: bool | None = None
        self._rotary = rotary_length(self.config)
        self._check_logits()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "Verifier":
        """Loads a checkpoint, quantised ones as transformers loads them.

        Args:
            path_or_id: a directory that ``save_pretrained`` wrote, or a model's name on the Hub.
            device: where the model shall lie; by default where transformers puts it.
            dtype: the weights' dtype; by default as stored.
            attn_implementation: ``"eager"``, ``"sdpa"``, ``"flash_attention_2"``, ...; by default
                the best that transformers finds.
            trust_remote_code: runs code that comes with the checkpoint.
            revision: a branch, tag or commit on the Hub.
            local_files_only: never asks the Hub.

        Raises:
            UnsupportedVerifierError: as for the class.
            ValueError: the checkpoint lacks weights, which transformers would fill at random.
        """
        hub: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        config = AutoConfig.from_pretrained(path_or_id, **hub)
        placed_on_load = device is not None and hasattr(config, "quantization_config")
        model, report = auto_class(config).from_pretrained(
            path_or_id,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            device_map={"": device} if placed_on_load else None,
            output_loading_info=True,
            **hub,
        )
        absent = sorted([*report["missing_keys"], *report["mismatched_keys"]])
        if absent:
            raise ValueError(
                f"{path_or_id} lacks {len(absent)} weights of {type(model).__name__}, or has them "
                f"in another shape: {', '.join(map(str, absent[:5]))}; expected a whole checkpoint"
            )
        if device is not None and not placed_on_load:
            model = model.to(device)
        verifier = cls(model)
        verifier._load_tokenizer = lambda: AutoTokenizer.from_pretrained(path_or_id, **hub)
        return verifier

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was given, or the checkpoint's, which is loaded when first asked for.

        Raises:
            ValueError: none was given, and the model came without a checkpoint's name.
            OSError: the checkpoint has none.
        """
        if self._tokenizer is None:
            if self._load_tokenizer is None:
                raise ValueError(
                    "this verifier was made without a tokenizer; expected Verifier(model, "
                    "tokenizer) or Verifier.from_pretrained"
                )
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the language model, for multimodal models the text part's."""
        return self._parts.config

    @property
    def hidden_size(self) -> int:
        """H, the width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V, the number of logits; it may exceed the tokenizer's."""
        return int(self.config.vocab_size)

    @property
    def num_layers(self) -> int:
        """n, the number of decoder layers, and the id of the last residual stream."""
        return len(self._parts.layers)

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return cast("Tensor", self.model.get_input_embeddings().weight).device

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: the generation configuration's, else the model's."""
        generation = getattr(self.model, "generation_config", None)
        for found in (getattr(generation, "eos_token_id", None), self.config.eos_token_id):
            if found is not None:
                return tuple(found) if isinstance(found, list | tuple) else (int(found),)
        return ()

    def is_long(self, length: int) -> bool:
        """Whether so many tokens get other rotary embeddings than fewer do: see growth_limit."""
        return self._rotary is not None and length > self._rotary[0]

    def readable_together(self, texts: Iterable[Text]) -> Iterator[list[Text]]:
        """Groups neighbours, such that no group has texts of which some are long and some not."""
        for _, alike in itertools.groupby(texts, lambda text: self.is_long(len(text))):
            yield list(alike)

    def growth_limit(self, lengths: Iterable[int]) -> int | None:
        """How long sequences that begin with prompts of these lengths can grow in one cache.

        Where rotary embeddings change with the length, a cache is void beyond. None: no limit but
        that of the positions.

        Raises:
            UnsupportedVerifierError: the prompts lie on both sides of that length, or beyond it
                embeddings go on changing.
        """
        if self._rotary is None:
            return None
        limit, stays = self._rotary
        beyond = [length > limit for length in lengths]
        if not any(beyond):
            return limit
        if stays and all(beyond):
            return None
        what = f"{type(self.model).__name__} changes its rotary embeddings at {limit} tokens"
        raise UnsupportedVerifierError(
            f"{what}, for all rows of a batch; read shorter and longer ones apart"
            if stays
            else f"{what}, and again with each length beyond; expected at most {limit} tokens"
        )

    def default_aux_layer_ids(self) -> tuple[int, int, int]:
        """The residual streams that a draft reads by default.

        See ``architecture.default_aux_layer_ids``.
        """
        return default_aux_layer_ids(self.num_layers)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        capture: Iterable[int] = (),
        logits: LogitRows = "last",
        use_cache: bool = True,
    ) -> VerifierOutput:
        """Reads prompts, or documents to train on.

        Prompts of different lengths are padded on the left. Documents can also be packed, several
        in a row, by ``cu_seqlens`` or ``position_ids``: each sees itself only, as if it were alone.
        A packed pass has no cache to continue from, and no last token.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 0 for padding on the left, then 1; None without padding.
            cu_seqlens: packs one row (B = 1): int ``[documents + 1]``, from 0 to T, where documents
                begin and end.
            position_ids: packs every row: int64 ``[B, T]``, counting up from 0 in each document.
            capture: ids of the residual streams wanted, from 0 (embedding) to n (before the norm).
            logits: for the ``"last"`` token of each row, for ``"all"``, or ``"none"``.
            use_cache: whether to keep keys and values for ``step``.

        Returns:
            ``logits`` ``[B, 1, V]``, ``[B, T, V]`` or None, streams, and the state for ``step``.

        Raises:
            ValueError: shapes, padding, packing or ids are wrong.
            UnsupportedVerifierError: documents are packed, and the model does not separate them.
        """
        rows.check_token_ids(input_ids)
        input_ids = input_ids.to(self.device)
        packed = cu_seqlens is not None or position_ids is not None
        if packed:
            positions = rows.packed_positions(input_ids, cu_seqlens, position_ids)
            if attention_mask is not None or logits == "last":
                raise ValueError(
                    "a packed row takes no attention mask and has no last token; expected "
                    "attention_mask=None and logits='all' or 'none'"
                )
            self._check_packing()
            if self._rotary is not None and int(positions.max()) >= self._rotary[0]:
                raise UnsupportedVerifierError(
                    f"{type(self.model).__name__} changes its rotary embeddings at "
                    f"{self._rotary[0]} tokens, for all documents of a row; pad them instead"
                )
            positions = self._packed(positions)
            return self._forward(input_ids, positions, None, None, capture, logits)
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device)
        lengths = rows.row_lengths(input_ids, attention_mask)
        host_lengths = lengths.tolist()
        self.growth_limit(host_lengths)
        state = VerifierState(cache.new_cache(self.config), lengths, host_lengths)
        positions = torch.arange(input_ids.shape[1], device=lengths.device)
        positions = positions - (input_ids.shape[1] - lengths[:, None])
        padded = min(state.host_lengths) < input_ids.shape[1]
        mask = attention_mask.bool() if padded and attention_mask is not None else None
        return self._forward(
            input_ids, positions.clamp(min=0), mask, state if use_cache else None, capture, logits
        )

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        state: VerifierState,
        *,
        tree: TokenTree | None = None,
        capture: Iterable[int] = (),
        logits: LogitRows = "all",
    ) -> VerifierOutput:
        """Continues each row with k tokens, such as a draft that is to be verified.

        Args:
            input_ids: int64 ``[B, k]``, k >= 1, no padding.
            state: of ``prefill`` or of the step before; changed in place. After a tree only
                ``keep_path`` may follow.
            tree: how the k tokens hang together; None: each follows the one before it.
            capture: ids of the residual streams wanted.
            logits: for the ``"last"`` token of each row, for ``"all"``, or ``"none"``.

        Returns:
            As ``prefill`` does, for the k tokens; ``state`` is the state that was given.

        Raises:
            ValueError: shapes or ids are wrong.
            UnsupportedVerifierError: there is a tree, and the model does not keep branches apart.
        """
        rows.check_token_ids(input_ids)
        input_ids = input_ids.to(self.device)
        if input_ids.shape[0] != len(state.lengths):
            raise ValueError(
                f"got {input_ids.shape[0]} rows of tokens for a state of {len(state.lengths)} rows"
            )
        k = input_ids.shape[1]
        mask: Tensor | dict[str, Tensor] | None
        if tree is None:
            positions = state.lengths[:, None] + torch.arange(k, device=state.lengths.device)
            mask = state.attention_mask(k)
        else:
            if tree.depths.shape != input_ids.shape or tree.sees.shape != (*input_ids.shape, k):
                raise ValueError(
                    f"got a tree with depths {list(tree.depths.shape)} and mask "
                    f"{list(tree.sees.shape)} for tokens {list(input_ids.shape)}; expected "
                    f"{list(input_ids.shape)} and {[*input_ids.shape, k]}"
                )
            self.check_trees()
            positions = state.lengths[:, None] + tree.depths
            mask = tree_masks(self.config, state, tree, self.model.dtype)
        output = self._forward(input_ids, positions, mask, state, capture, logits)
        state.lengths = state.lengths + k
        state.host_lengths = [length + k for length in state.host_lengths]
        return output

    def keep_path(
        self, state: VerifierState, nodes: int, path: Tensor, counts: Sequence[int]
    ) -> None:
        """Keeps a path of the tree that was read last, in place, and forgets its other nodes.

        Args:
            state: after the ``step`` with the tree.
            nodes: how many tokens that step had.
            path: int64 ``[B, R]``, the nodes to keep in each row, from the root on.
            counts: how many of them are real, the first ones, at least 1.

        Raises:
            ValueError: the shapes do not fit, or a count is out of its range.
        """
        keep_path(state, nodes, path, counts)

    def crop(self, state: VerifierState, lengths: int | Sequence[int] | Tensor) -> None:
        """Takes back the last tokens of each row, in place, such as rejected ones.

        Rows may lose different numbers of tokens; this copies the cache, losing equally many does
        not. Works beyond sliding windows too: the cache keeps all.

        Args:
            state: the state to change.
            lengths: how many tokens each row keeps, one number or one for each row; best no tensor
                on a device, which has to be waited for.

        Raises:
            ValueError: a row would keep fewer than 1 token, or more than it has.
        """
        cache.crop(state, lengths)

    def _forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        state: VerifierState | None,
        capture: Iterable[int],
        logits: LogitRows,
    ) -> VerifierOutput:
        if logits not in {"last", "all", "none"}:
            raise ValueError(f"logits={logits!r}; expected 'last', 'all' or 'none'")
        with residual_streams(self._parts, capture) as captured:
            outputs = self._parts.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=state.cache if state is not None else None,
                use_cache=state is not None,
            )
        normed = cast("Tensor", outputs[0])
        if logits == "last":
            normed = normed[:, -1:]
        return VerifierOutput(
            None if logits == "none" else self.head.logits(normed), captured, state
        )

    def _packed(self, position_ids: Tensor) -> Tensor:
        """Positions from which this model's decoder sees where documents begin."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if "mrope_section" in rope:
            # Text, time, height, width: the mask follows the first, and only if all four are given.
            return position_ids.expand(4, *position_ids.shape)
        return position_ids

    def _check_packing(self) -> None:
        """Asks the decoder, once, whether a packed document sees the one before it.

        It is transformers that separates them, where a position is not its predecessor's plus one;
        but some models (GPT-OSS in 5.19) make their masks without the positions, and say nothing.
        """
        if self._packs is None:
            chunked = "chunked_attention" in (getattr(self.config, "layer_types", None) or ())
            self._packs = not chunked and self._documents_are_separate()
        if not self._packs:
            raise UnsupportedVerifierError(
                f"{type(self._parts.decoder).__name__} does not separate packed documents in this "
                "version of transformers (they see each other, or attend in chunks that are "
                "counted from the row's begin); pad documents on the left instead"
            )

    def _documents_are_separate(self) -> bool:
        # Two rows of two documents; the rows differ in their first document only.
        input_ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 4, 5, 6]], device=self.device)
        input_ids = input_ids % self.vocab_size
        positions = self._packed(torch.tensor([[0, 1, 2] * 2] * 2, device=self.device))
        n = self.num_layers
        output = self._forward(input_ids, positions, None, None, [n], "none")
        second = output.captured[n][:, 3:].float()
        bound = _tolerance(output.captured[n]) * float(second.abs().max())
        return bool(((second[0] - second[1]).abs() <= bound).all())

    @torch.no_grad()
    def check_trees(self) -> None:
        """Asks the decoder, once, whether the branches of a tree do not see each other.

        Raises:
            UnsupportedVerifierError: they do, or some layer cannot be told which tokens to see.
        """
        if self._takes_trees is None:
            self._takes_trees = True  # for the pass below
            try:
                self._takes_trees = self._branches_are_separate()
            except BaseException:
                self._takes_trees = None
                raise
        if not self._takes_trees:
            raise UnsupportedVerifierError(
                f"{type(self._parts.decoder).__name__} does not keep the branches of a tree apart "
                "in this version of transformers or with this attention; draft chains instead, or "
                "load it with attn_implementation='sdpa' or 'eager'"
            )

    def _branches_are_separate(self) -> bool:
        # A root with two children, the first of which has a child; and both branches as chains.
        input_ids = torch.tensor([[1, 2, 3, 4, 5, 6]], device=self.device) % self.vocab_size
        sees = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]])
        tree = TokenTree(
            torch.tensor([[0, 1, 1, 2]], device=self.device), sees.bool().to(self.device)
        )

        def last(order: list[int], tree: TokenTree | None) -> Tensor:
            state = self.prefill(input_ids[:, :2]).state
            assert state is not None  # noqa: S101 - for the type checker
            output = self.step(input_ids[:, 2:][:, order], state, tree=tree)
            assert output.logits is not None  # noqa: S101
            return output.logits[0].float()

        found = last([0, 1, 2, 3], tree)
        expected = torch.stack([*last([0, 1, 3], None), last([0, 2], None)[1]])[[0, 1, 3, 2]]
        bound = _tolerance(next(self.model.parameters())) * float(expected.abs().max())
        return bool(((found - expected).abs() <= bound).all())

    @torch.no_grad()
    def _check_logits(self) -> None:
        if self.device.type == "meta":
            return
        input_ids = torch.arange(1, 5, device=self.device)[None] % self.vocab_size
        n = self.num_layers
        streams = self.prefill(input_ids, capture=range(n + 1), logits="none").captured
        found = self.head(streams[n]).float()
        expected = self.model(input_ids=input_ids, use_cache=False).logits.float().to(found.device)
        bound = _tolerance(streams[n]) * float(expected.abs().max().clamp(min=1e-3))
        if found.shape != expected.shape or bool(((found - expected).abs() > bound).any()):
            raise UnsupportedVerifierError(
                f"the logits of {type(self.model).__name__} are not those of its final norm "
                f"({type(self.head.final_norm).__name__}), head and {self.head.transform}; its "
                "forward does something else after its last layer, which is not supported"
            )


def _tolerance(computed: Tensor) -> float:
    """How far rounding may take two ways to the same numbers apart, relative to the largest."""
    return 1e-4 if computed.dtype in {torch.float32, torch.float64} else 3e-2

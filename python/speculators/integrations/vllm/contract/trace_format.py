"""What a trace is asked for with, and what it answers: JSON, checked on both sides.

The two sides may live in different environments, one with vLLM and one without, so this module
knows neither vLLM nor torch.
"""

from typing import Annotated, Any

import pydantic

Prompt = Annotated[list[int], pydantic.Field(min_length=1)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class TraceCase(_Strict):
    """One engine.

    Attributes:
        name: what the result is called by.
        draft: a draft's directory; None for the verifier alone.
        num_draft_tokens: drafted before each verification; None: as the draft's configuration says.
    """

    name: str
    draft: str | None = None
    num_draft_tokens: int | None = pydantic.Field(default=None, ge=1)


class TraceRequest(_Strict):
    """What to run.

    Attributes:
        verifier: a directory or Hub name.
        cases: run one after another, each in an engine of its own.
        prompts: token ids, the same for all cases.
        max_new_tokens: of each prompt.
        ignore_eos: whether texts go on behind an end-of-text token.
        dtype: of the verifier and the drafts.
        engine_options: further arguments of ``vllm.LLM``, which come before our own.
    """

    verifier: str
    cases: list[TraceCase]
    prompts: list[Prompt] = pydantic.Field(min_length=1)
    max_new_tokens: int = pydantic.Field(ge=1)
    ignore_eos: bool = True
    dtype: str = "float32"
    engine_options: dict[str, Any] = {}


class CaseResult(_Strict):
    """What one engine did; lists have one entry for each prompt.

    Attributes:
        name: the case's.
        error: why there is nothing else; None if all went well.
        token_ids: the new tokens.
        accepted: drafted tokens that each verification accepted, in order; empty without a draft.
        drafted: tokens that each verification was given.
        counters: vLLM's own, of all prompts, by name without ``vllm:spec_decode_``.
        seconds: for all of it, the start of the engine included.
    """

    name: str
    error: str | None = None
    token_ids: list[list[int]] = []
    accepted: list[list[int]] = []
    drafted: list[list[int]] = []
    counters: dict[str, float | list[float]] = {}
    seconds: float = 0.0


class TraceResult(_Strict):
    """The answer to a :class:`TraceRequest`.

    Attributes:
        vllm_version: of the vLLM that ran.
        speculators_version: of this library beside it.
        cases: in the order of the request.
    """

    vllm_version: str
    speculators_version: str
    cases: list[CaseResult]

"""What writes the verifier's hidden states inside vLLM: a connector for its KV cache.

vLLM's method ``extract_hidden_states`` keeps residual streams in blocks of the KV cache, as if they
were keys, so chunked prefill and preemption need no care here: when a request ends, its blocks hold
the states of all its tokens. vLLM's own ``ExampleHiddenStatesConnector`` reads them from there.
This one differs where a long run needs it:

- It runs without a GPU, where there are no streams, events and pinned memory.
- Files appear by a rename, whole or not at all, and need no locks. They are read at once and then
  removed, so they are not forced to the disk.
- Only requests that ask for states get them. The same server can write responses.
- The answer says which streams in which dtype are in the file, so that a reader of a server that
  was started for other streams finds out.
- A write that fails is said, beside where the file would be, not only in the server's log.

vLLM loads it by ``kv_connector_module_path``; ``source.server_command`` has the flags.
"""

import pathlib
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as stock
from vllm.v1.request import RequestStatus


class _Done:
    """Stands for a ``torch.cuda.Event`` that has happened."""

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class HiddenStatesConnector(stock.ExampleHiddenStatesConnector):  # type: ignore[misc]
    """Writes ``hidden_states`` ``[T, streams, H]`` and ``token_ids`` int64 ``[T]`` of a prompt.

    For requests with ``kv_transfer_params={"hidden_states": true}``. Their answer has
    ``kv_transfer_params={"hidden_states": {"path": ..., "layer_ids": [...], "dtype": ...}}``; the
    file may appear a little after the answer, or ``path + ".error"`` with a reason instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_lock = False
        draft = self._vllm_config.speculative_config.draft_model_config.hf_config
        self._description = {
            "layer_ids": list(draft.eagle_aux_hidden_state_layer_ids),
            "dtype": str(self._vllm_config.model_config.dtype).removeprefix("torch."),
        }

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Decides whether the blocks of a request are still needed, and what its answer says."""
        wanted = bool((request.kv_transfer_params or {}).get("hidden_states"))
        if not wanted or request.status == RequestStatus.FINISHED_ABORTED:
            self._request_filenames.pop(request.request_id, None)
            return False, None
        later, answer = super().request_finished(request, block_ids)
        if answer is None:
            return later, None
        path = answer["hidden_states_path"]
        return later, {"hidden_states": {"path": path, **self._description}}

    def _submit_async_write(self, pending: Any) -> None:
        if self._kv_cache is None or self._kv_cache.device.type != "cpu":
            super()._submit_async_write(pending)
            return
        if not self._is_tp_rank_zero:
            return
        count, size = len(pending.token_ids), self._block_size
        blocks = torch.tensor(pending.block_ids, dtype=torch.int64)
        slots = (torch.arange(size) + blocks[:, None] * size).flatten()
        # Indexing copies: the blocks are free for other requests at once.
        states = stock.extract_from_kv_cache(self._kv_cache, slots, count).contiguous()
        tensors = {"hidden_states": states, "token_ids": pending.token_ids.clone()}
        pathlib.Path(pending.filename).parent.mkdir(parents=True, exist_ok=True)
        event = _Done()
        future = self._executor.submit(self._write_tensors, tensors, event, pending.filename, None)
        self._req_copy_events[pending.req_id] = event
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))

    @staticmethod
    def _write_tensors(
        tensors: dict[str, Tensor], event: Any, filename: str, lock_fd: int | None
    ) -> None:
        del lock_fd  # there are none
        target = pathlib.Path(filename)
        partial_file = target.with_name(f".{target.name}.partial")
        try:
            event.synchronize()
            save_file(tensors, partial_file)
            partial_file.replace(target)
        except Exception as error:
            partial_file.unlink(missing_ok=True)
            target.with_name(f"{target.name}.error").write_text(f"{type(error).__name__}: {error}")
            raise

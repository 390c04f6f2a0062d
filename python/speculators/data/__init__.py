"""Data: from conversations to what a draft is trained on.

================  =================================================================================
``prepare``       conversations, texts or token ids -> a folder of token ids and loss masks (Arrow)
``parts``         some rows -> one Arrow file, from which ``prepare`` goes on when interrupted
``prepared``      ``PreparedDataset``, that folder read back, and the counts of its tokens
``chat``          a conversation -> token ids, and which of them the assistant said
``records``       one row of input -> a conversation, a text or token ids, or why it is malformed
``raw_rows``      rows out of JSON, JSON lines, Parquet and datasets, with file and line
``artifact``      content hashes: what a folder was made from, and whether it is stale
``sources``       where hidden states come from: the verifier in this process, or another back end
``generate``      prepared documents -> hidden states of the verifier, in a store
``regenerate``    the verifier writes the responses that a draft is to learn
``workload``      which documents ``generate`` computes
``ordering``      in which order and groups: by length, and reproducibly
``disk``          a disk that is too small, said before the work begins
``store``         hidden states on disk, read back document by document
``batch``         documents packed into rows of a batch
``loader``        a store -> packed batches, in a new order every epoch
================  =================================================================================

Everything here is unshifted: token t, its mask and its hidden states have one index. What a draft
is to predict from where is the objective's business, in ``speculators.models``.
"""

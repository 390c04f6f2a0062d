"""A tiny but real causal language model: the verifier of the tests and of the worked examples."""

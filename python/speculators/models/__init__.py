"""The models: one package per draft algorithm, and ``verifier``, the model they draft for."""

"""The ``speculators`` command: each subcommand a thin layer over a function of the library."""

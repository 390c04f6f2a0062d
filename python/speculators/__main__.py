"""``python -m speculators`` is the ``speculators`` command."""

from speculators.cli.app import main

main()

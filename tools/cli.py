"""``bazel run //tools:speculators -- ARGUMENTS``: the ``speculators`` command, from the sources."""

from speculators.cli.app import main

if __name__ == "__main__":
    main()

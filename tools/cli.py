"""``bazel run //tools:speculators -- ARGUMENTS``: the ``speculators`` command, from the sources.

The other targets here are its subcommands: ``//tools:train`` is ``//tools:speculators -- train``.
"""

import os

from speculators.cli.app import main

if __name__ == "__main__":
    # Bazel starts programs in a folder of its own; paths are meant from where the user is.
    os.chdir(os.environ.get("BUILD_WORKING_DIRECTORY", "."))
    main()

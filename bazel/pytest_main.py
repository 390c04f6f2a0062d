"""Runs pytest on the files given: the main program of every pytest_test."""

import os
import sys

import pytest

if __name__ == "__main__":
    # Looking through every installed package for plugins costs more than most tests.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # Caches, such as the kernels that vLLM compiles, go where a test may write.
    os.environ["XDG_CACHE_HOME"] = f"{os.environ['TEST_TMPDIR']}/cache"
    options = ["--quiet", "--strict-markers", "--color=no", "-p", "no:cacheprovider"]
    options += [f"--basetemp={os.environ['TEST_TMPDIR']}/pytest"]
    if selected := os.environ.get("TESTBRIDGE_TEST_ONLY"):  # bazel test --test_filter=...
        options += ["-k", selected]
    sys.exit(pytest.main([*options, *sys.argv[1:]]))

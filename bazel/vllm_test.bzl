"""vllm_test: a pytest_test beside vLLM, with the built wheel instead of the sources."""

load(":pytest_test.bzl", "pytest_test")

# What every run of vLLM has here: nothing is fetched or reported, a cache of 1 GiB, one thread, as
# two tests run at a time, and one process less in each server than by default.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

def vllm_test(name, deps = [], env = {}, tags = [], **kwargs):
    """A pytest_test in the environment of requirements-vllm.lock, tagged `vllm`.

    Args:
        name: of the target.
        deps: Python libraries; none of //python, whose packages are those of requirements.lock.
        env: further environment variables.
        tags: further tags.
        **kwargs: the rest of pytest_test's arguments.
    """
    pytest_test(
        name = name,
        env = _ENVIRONMENT | env,
        packages = "@vllm_pypi",
        tags = tags + ["vllm"],
        deps = deps + [
            "//:installed_wheel",
            "@vllm_pypi//vllm",
        ],
        **kwargs
    )

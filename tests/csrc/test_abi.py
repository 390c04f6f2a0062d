"""What the operator libraries need of torch and Python: the stable ABI of torch 2.10, the limited
API.
"""

import json
import pathlib
import subprocess
import sys

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

OPS = pathlib.Path("python/speculators/ops")
# Without CUDA (--config=cpu) there is only _C; which of the two cases it is, the build says.
LIBRARIES = sorted(OPS.glob("_C*.abi3.so"))


def test_the_libraries_are_there() -> None:
    names = [library.name for library in LIBRARIES]
    assert names in (["_C.abi3.so"], ["_C.abi3.so", "_C_cuda.abi3.so"])


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_the_stable_abi_of_torch_2_10(library: pathlib.Path) -> None:
    program = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "--check=both", "--json", str(library)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    (extension,) = json.loads(process.stdout)["extensions"]
    assert extension["torch"]["stable"]
    assert extension["torch"]["unknown_shim_symbols"] == []
    minimum = tuple(int(part) for part in extension["torch"]["min_torch_version"].split("."))
    assert minimum <= (2, 10, 0)


@pytest.mark.parametrize("library", LIBRARIES, ids=str)
def test_it_needs_libtorch_and_no_other_part_of_torch(library: pathlib.Path) -> None:
    """Through libtorch.so the loader finds the CPU or CUDA parts, whichever this torch has."""
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        assert isinstance(dynamic, DynamicSection)
        needed = {getattr(tag, "needed", "") for tag in dynamic.iter_tags("DT_NEEDED")}
        paths = [tag.entry.d_tag for tag in dynamic.iter_tags() if "PATH" in str(tag.entry.d_tag)]
    assert "libtorch.so" in needed
    assert not needed & {"libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libtorch_python.so"}
    assert not any(name.startswith(("libcudart", "libpython")) for name in needed)
    assert paths == [], "a path of the build machine has no place in a wheel"

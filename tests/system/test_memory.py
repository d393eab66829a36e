"""The C library keeps freed memory for the next step."""

import platform
import resource
import subprocess
import sys

import pytest

# Allocates 64 MB, writes to all of it and frees it, twice; prints the page faults of the second
# time, in a thread, as a framework's.
PROGRAM = """
import ctypes, resource, threading
{setting}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def use():
    block = ctypes.c_void_p(libc.malloc(2**26))
    libc.memset(block, 1, 2**26)
    libc.free(block)

def measure():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""
SETTING = "from lockstep.common.system import environment; environment.keep_memory()"
ACCEPTED = "import ctypes; print(ctypes.CDLL(None).mallopt(-3, 2**30))"  # the threshold for mmap


def run(program: str) -> int:
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
@pytest.mark.parametrize(("setting", "kept"), [(SETTING, True), ("", False)], ids=["on", "off"])
def test_a_large_block_is_not_cleared_again_when_memory_is_kept(setting, kept):
    if not run(ACCEPTED):
        pytest.skip("this glibc takes blocks above 32 MB from the system, whatever it is told")
    faults, pages = run(PROGRAM.format(setting=setting)), 2**26 // resource.getpagesize()
    assert (faults < pages / 100) == kept

"""The emulator notices wrong kernels, in the build named for each, and says nothing against right ones."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILDS = {"plain": ["-O1"], "address": ["-O1", "-fsanitize=address,undefined"], "thread": ["-O1", "-fsanitize=thread"]}
ENVIRONMENT = os.environ | {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0:atexit_sleep_ms=0:history_size=0",
    "LD_PRELOAD": "",
}
REPORTS = {
    "data race": "race",
    "AddressSanitizer": "address",
    "runtime error": "undefined",
    "\nwrong": "result",
    "\ncheck": "check",
    "\nright": "silent",
}

RACES = {"thread": "race"}
RACY_RESULTS = {"plain": "result", "thread": "race"}
RESULTS = {"plain": "result"}
CHECKS = {"plain": "check", "address": "check", "thread": "check"}
OVERRUNS = {"address": "address"}
UNDEFINED = {"address": "undefined"}
EXPECTED = {  # kernel -> build -> what notices it there
    "right_exchange": dict.fromkeys(BUILDS, "silent"),
    "right_atomic": dict.fromkeys(BUILDS, "silent"),
    "right_fence": dict.fromkeys(BUILDS, "silent"),
    "missing_barrier_before_read": RACY_RESULTS,
    "missing_barrier_before_overwrite": RACY_RESULTS,
    "missing_syncwarp": RACY_RESULTS,
    "shuffle_instead_of_syncwarp": RACES,
    "lost_update": RACES,
    "blocks_lost_update": RACES,
    "blocks_lost_update_behind_barriers": RACES,
    "missing_fence": RACES,
    "missing_copy_wait": RACY_RESULTS,
    "missing_barrier_after_copy_wait": RACY_RESULTS,
    "copy_into_buffer_being_read": RACY_RESULTS,
    "uninitialised_shared": RESULTS,
    "shared_memory_of_the_block_before": RESULTS,
    "aligned_only_by_luck": RESULTS,
    "shared_overrun": OVERRUNS,
    "dynamic_shared_overrun": OVERRUNS,
    "global_overrun": OVERRUNS,
    "copy_overruns_global": OVERRUNS,
    "misaligned_vector": UNDEFINED,
    "undefined_shift": UNDEFINED,
    "divergent_barrier": CHECKS,
    "barrier_after_return": CHECKS,
    "barrier_counts_differ": CHECKS,
    "barrier_lacks_threads": CHECKS,
    "mask_names_absent_lanes": CHECKS,
    "shuffle_reads_absent_lane": CHECKS,
    "lanes_at_different_collectives": CHECKS,
    "ldmatrix_from_global": CHECKS,
    "misaligned_ldmatrix": CHECKS,
    "copy_to_global": CHECKS,
    "misaligned_copy": CHECKS,
    "copy_in_flight_at_return": CHECKS,
    "too_much_shared": CHECKS,
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """build -> the program bugs.cu."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to build kernels for the emulator with")
    folder = tmp_path_factory.mktemp("bugs")

    def build(name):
        command = [
            "g++",
            "-std=c++20",
            "-w",
            "-g",
            f"-I{HERE.parent.parent / 'csrc'}",
            "-DKIMI_EMULATOR",
            *BUILDS[name],
        ]
        subprocess.run([*command, "-x", "c++", HERE / "bugs.cu", "-o", folder / name], check=True)
        return folder / name

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BUILDS, pool.map(build, BUILDS), strict=True))


def test_every_kernel_is_expected_to_do_something(programs):
    assert set(subprocess.run(programs["plain"], capture_output=True, text=True).stdout.split()) == set(EXPECTED)


@pytest.mark.parametrize(("kernel", "build"), [(k, b) for k, builds in EXPECTED.items() for b in builds])
def test_what_notices(programs, kernel, build):
    done = subprocess.run([programs[build], kernel], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    said = f"{done.stderr}\n{done.stdout}"
    reports = [report for sign, report in REPORTS.items() if sign in said]
    assert reports[:1] == [EXPECTED[kernel][build]], said
    assert (done.returncode == 0) == (reports == ["silent"])

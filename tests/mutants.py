"""Which faults in the CUDA kernels do the tests notice?

Puts faults into the kernels one at a time (mutations.py says which), runs in the emulator the tests of ops that reach
the fault, and reports what noticed it first: a wrong result, a check of the emulator, a crash, a loop without end or,
where nothing did, AddressSanitizer and UBSan, and for barriers and copies ThreadSanitizer, in builds of their own. It
needs no GPU and no nvcc, but g++ and the package installed with its build tools. It works on a copy; the checkout stays
as it is.

    python tests/mutants.py                     everything; writes docs/mutants.md
    python tests/mutants.py rope.cu rope.cuh    the mutants of these files; no report
    python tests/mutants.py --list [FILE...]    the mutants and their numbers
    python tests/mutants.py --mutant NUMBER     runs this one whatever is known of it, and shows what the tests say

Everything takes about an hour on two cores. What is known is kept in --scratch: the next run goes on where this
one was stopped, and tries again what survived if the kernel or a test has changed. What was noticed is not tried
again while its line stays as it is, until --scratch is deleted.

How: all mutants are in the build, each behind a test of its number. A process imports the tests once, then forks for
each mutant, wakes it and runs the tests that reach it, cheapest first. Why survivors survive: docs/cuda.md.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mutations

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
TESTS = ROOT / "tests"
WRAPPERS = {"ptx.cuh", "hopper.cuh"}  # the emulator stands in for what they hold
SIGNS = {  # in what a test process prints -> what noticed the fault
    "WARNING: ThreadSanitizer": "race",
    "ERROR: AddressSanitizer": "address",
    "runtime error: ": "undefined",
    "emu: ": "check",
    "\nFAILED ": "result",
}
NOTICED = ["result", "check", "crash", "timeout", "address", "undefined", "race"]
TITLES = ["wrong result", "emulator's check", "crash", "no end", "ASan", "UBSan", "TSan"]
BUILDS = {  # name -> seconds a mutant may take, tests to run, environment
    "plain": (60, "", {}),
    "address": (
        300,
        "random0",
        {
            "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
            "PYTHONMALLOC": "malloc",
            "PRELOAD": "libasan.so libstdc++.so",
        },
    ),
    "thread": (
        300,
        "random0",
        {
            "TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0:atexit_sleep_ms=0:history_size=0",
            "OPENBLAS_NUM_THREADS": "1",
            "PRELOAD": "libtsan.so libstdc++.so",
        },
    ),
}

HEADER = """#pragma once
namespace kimi {
extern unsigned awake_mutant;
extern bool recording_mutants;
void record_mutant(unsigned number);
inline bool mutant(unsigned number) {
  if (recording_mutants) record_mutant(number);
  return number == awake_mutant;
}
}  // namespace kimi
"""
SOURCE = """#include "cuda/mutant.h"
#include <unordered_set>
#define EXPORT extern "C" __attribute__((visibility("default")))
namespace kimi {
unsigned awake_mutant = 0;
bool recording_mutants = false;
static std::unordered_set<unsigned> reached;
void record_mutant(unsigned number) { reached.insert(number); }
}  // namespace kimi
EXPORT void wake_mutant(unsigned number) { kimi::awake_mutant = number; }
EXPORT int reached_mutants(unsigned* numbers, int most) {  // since the last call; from the first on they are recorded
  int n = 0;
  for (unsigned number : kimi::reached)
    if (n < most) numbers[n++] = number;
  kimi::reached.clear();
  kimi::recording_mutants = true;
  return n;
}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="of csrc/cuda, all if none is named")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument("--mutant", type=int, metavar="NUMBER", help="only this one, with the output of its tests")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time (1)")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "mutants", help="default: %(default)s")
    parser.add_argument("--within", choices=BUILDS, help=argparse.SUPPRESS)  # the process that imports the tests
    args = parser.parse_args()
    args.scratch = args.scratch.resolve()

    mutants = [m for m in all_mutants() if chosen(args, m)]
    if not mutants:
        sys.exit(f"no mutants there; files are {', '.join(kernel_files())}")
    if args.list:
        print(*(f"{m.number:10d} {m}" for m in mutants), sep="\n")
    elif args.within:
        return Runner(args, mutants).run()
    else:
        copy_tree(args.scratch / "tree")
        for build in BUILDS:
            if left(State(args.scratch), build, mutants) or args.mutant:
                compile_tree(args.scratch, build)
                run_within(args, build)
        known = State(args.scratch)
        survivors = [m for m in mutants if known.verdict(m)["by"] is None]
        print(f"{len(mutants)} mutants, {len(mutants) - len(survivors)} noticed; not noticed:", *survivors, sep="\n  ")
        if not args.files and not args.mutant:
            (ROOT / "docs" / "mutants.md").write_text(report(mutants, known))


def chosen(args, mutant):
    return mutant.number == args.mutant if args.mutant else not args.files or mutant.file in args.files


def kernel_files():
    found = [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("sm90/*.cu")]
    return sorted(str(f.relative_to(CUDA)) for f in found if f.name not in WRAPPERS)


def all_mutants():
    return [m for file in kernel_files() for m in mutations.find(file, (CUDA / file).read_text())]


# ---- what is known ----


class State:
    """Verdicts by mutant and build, in a file of the scratch folder."""

    def __init__(self, scratch):
        self.path = scratch / "state.json"
        self.known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.kernels = {f: digest([CUDA / f]) for f in kernel_files()}
        support = [TESTS / f"{name}.py" for name in ("arrays", "backends", "close", "conftest", "cublas")]
        support += TESTS.glob("reference/*.py")
        self.tests = {f"tests/ops/{f.name}": digest([f, *sorted(support)]) for f in TESTS.glob("ops/*.py")}

    def get(self, mutant, build):
        """The verdict of a build: by, what noticed it or None; test, which; tests, file -> digest of those that reach
        it. None where there is none or it is out of date."""
        verdict = self.known.get(f"{mutant.number} {build}")
        if not verdict or verdict["by"]:
            return verdict
        same = verdict["file"] == self.kernels[mutant.file]
        return verdict if same and all(self.tests.get(f) == d for f, d in verdict["tests"].items()) else None

    def verdict(self, mutant):
        """That of the first build which noticed it."""
        verdicts = [self.get(mutant, build) for build in BUILDS]
        return next((v for v in verdicts if v and v["by"]), next((v for v in verdicts if v), None))

    def set(self, mutant, build, by, test, tests):
        """tests: all that reach it."""
        self.known[f"{mutant.number} {build}"] = {
            "by": by,
            "test": test,
            "tests": {f: self.tests[f] for f in {t.split("::")[0] for t in tests}},
            "file": self.kernels[mutant.file],
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.known, indent=0))
        part.replace(self.path)


def digest(paths):
    return hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()[:16]


def left(state, build, mutants):
    """Those whose verdict is wanted of this build: no earlier one noticed them. What changes no order makes no race."""
    earlier = list(BUILDS)[: list(BUILDS).index(build)]
    return [
        m
        for m in mutants
        if (build != "thread" or m.kind in ("barrier", "copy"))
        and not state.get(m, build)
        and not any((state.get(m, b) or {"by": None})["by"] for b in earlier)
    ]


# ---- the build ----


def copy_tree(tree):
    """What git knows of, with the mutants in it; a file that does not change keeps its time."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    texts = {n: (ROOT / n).read_bytes() for n in names if n and (ROOT / n).is_file()}
    for file in kernel_files():
        text = (CUDA / file).read_text()
        texts[f"csrc/cuda/{file}"] = mutations.instrumented(text, mutations.find(file, text)).encode()
    texts |= {"csrc/cuda/mutant.h": HEADER.encode(), "csrc/cuda/mutant.cu": SOURCE.encode()}
    extension = Path(importlib.util.find_spec("kimi_native._C").origin)
    texts[f"python/kimi_native/{extension.name}"] = extension.read_bytes()
    for name, text in texts.items():
        path = tree / name
        if not path.exists() or path.read_bytes() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
    for path in tree.rglob("*"):
        if path.is_file() and str(path.relative_to(tree)) not in texts and path.suffix in (".py", ".cu", ".cuh", ".h"):
            path.unlink()


def compile_tree(scratch, build):
    folder, log = scratch / build, scratch / f"{build}.log"
    print(f"building with all mutants asleep: {build} (log: {log})", file=sys.stderr)
    nanobind = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True).stdout
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dnanobind_ROOT={nanobind.strip()}",
        f"-DKIMI_SANITIZE={'' if build == 'plain' else build}",
        "-DKIMI_CUDA=OFF",
        "-DKIMI_EMULATOR=ON",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    ]
    with log.open("w") as out:
        for command in (
            ["cmake", "-S", scratch / "tree", "-B", folder, "--compile-no-warning-as-error", *options],
            ["cmake", "--build", folder, "--target", "_E"],
        ):
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode:
                sys.exit(f"{log.read_text()[-3000:]}\nthe build failed: {log}")
    (extension,) = folder.glob("_E.*.so")
    shutil.copy(extension, scratch / "tree" / "python" / "kimi_native")


def run_within(args, build):
    """Runs the mutants that are left, in a process that has the build's sanitizer."""
    _, _, environment = BUILDS[build]
    environment = dict(environment)
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in environment.pop("PRELOAD", "").split()
    ]
    tree = args.scratch / "tree"
    environment |= {"LD_PRELOAD": " ".join(libraries), "PYTHONPATH": f"{tree / 'python'}"}
    command = [
        sys.executable,
        __file__,
        "--within",
        build,
        "--scratch",
        args.scratch,
        "--jobs",
        str(args.jobs),
        *args.files,
    ]
    if args.mutant:
        command += ["--mutant", str(args.mutant)]
    if subprocess.run(command, env=os.environ | environment, cwd=tree).returncode:
        sys.exit((args.scratch / "logs" / "pytest").read_text()[-3000:])


# ---- the tests ----


class Runner:
    """A plugin of pytest that runs the tests once for each mutant, in a process of its own."""

    def __init__(self, args, mutants):
        self.args, self.build, self.scratch = args, args.within, args.scratch
        self.limit, self.orders, _ = BUILDS[self.build]
        self.state = State(self.scratch)
        self.mutants = mutants if args.mutant else left(self.state, self.build, mutants)
        self.passed, self.failed = set(), None

    def run(self):
        import pytest

        (self.scratch / "logs").mkdir(exist_ok=True)
        self.say = os.fdopen(os.dup(2), "w", buffering=1)
        self.to_log("pytest")
        options = ["-q", "-s", "-p", "no:cacheprovider", "-o", "addopts=", "tests/ops"]
        return int(pytest.main(options, plugins=[self]))

    def to_log(self, name):
        sys.stdout.flush(), sys.stderr.flush()
        log = os.open(self.scratch / "logs" / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.close(log)

    def pytest_collection_modifyitems(self, items):
        items[:] = [i for i in items if "emulat" in i.nodeid or "emulator" in i.fixturenames]

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed = crash.message if crash else report.longreprtext
            print(f"\nFAILED {report.longreprtext if self.args.mutant else self.failed}", flush=True)

    def pytest_runtestloop(self, session):
        from kimi_native import _E

        self.library = ctypes.CDLL(_E.__file__)
        self.items = {i.nodeid: i for i in session.items}
        self.reach = self.measure()
        todo = sorted(self.mutants, key=lambda m: -sum(s for s, _ in self.tests_of(m)))  # the last first
        running, start, done, number = {}, time.monotonic(), 0, len(todo)
        while todo or running:
            if todo and len(running) < self.args.jobs:
                mutant = todo.pop()
                tests = [test for _, test in self.tests_of(mutant)]
                running[self.fork(str(mutant.number), tests, mutant.number)] = mutant, tests
                continue
            pid, status = os.wait()
            mutant, tests = running.pop(pid)
            minutes = (time.monotonic() - start) / (done + 1) * (number - done) / 60
            if self.judge(mutant, tests, status, f"{self.build} {done + 1}/{number}, {minutes:.0f} min left"):
                done += 1
            else:
                todo.append(mutant)
        return True

    def fork(self, log, tests, number=0):
        """A process that runs these tests; its status is 0 if all of them pass."""
        pid = os.fork()
        if pid == 0:
            signal.alarm(self.limit)
            self.to_log(log)
            self.library.wake_mutant(ctypes.c_uint(number))
            for test, after in zip(tests, [*tests[1:], None], strict=True):
                print(f"\nRUN {test}", flush=True)
                item = self.items[test]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=self.items.get(after))
                if self.failed:
                    os._exit(1)
            os._exit(0)
        return pid

    def judge(self, mutant, tests, status, progress):
        """Writes down what became of a mutant, unless it has to be run again."""
        log = (self.scratch / "logs" / str(mutant.number)).read_text(errors="replace")
        by = test = None
        if status:
            test = re.findall(r"^RUN (.*)", log, flags=re.M)[-1]
            stopped = (
                {signal.SIGALRM: "timeout"}.get(os.WTERMSIG(status), "crash") if os.WIFSIGNALED(status) else "crash"
            )
            by = next((noticed for sign, noticed in SIGNS.items() if sign in log), stopped)
            if not self.passes(test):
                return False
        if self.args.mutant:
            self.say.write(log)
        else:
            (self.scratch / "logs" / str(mutant.number)).unlink()
        self.state.set(mutant, self.build, by, test, tests)
        self.say.write(f"[{progress}] {mutant}: {f'{by}, {test}' if by else 'SURVIVED' if tests else 'NOT REACHED'}\n")
        return True

    def passes(self, test):
        """Whether a test passes without a mutant. One in which a sanitizer finds a fault as it is, is left out."""
        if test in self.items and test not in self.passed:
            if os.waitpid(self.fork("asleep", [test]), 0)[1]:
                self.say.write(f"{test} fails in this build without a mutant: left out\n")
                del self.items[test]
            else:
                self.passed.add(test)
        return test in self.items

    def tests_of(self, mutant):
        """(seconds, test) of those that reach it, cheapest first."""
        found = [(s, t) for t, (s, numbers) in self.reach.items() if mutant.number in numbers and self.orders in t]
        return sorted((s, t) for s, t in found if t in self.items)

    def measure(self):
        """test -> (its seconds, the mutants it reaches). In the plain build, which comes first."""
        path = self.scratch / "reach.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        kernels = sorted(self.state.kernels.values())
        wanted = {file: [digest, *kernels] for file, digest in self.state.tests.items()}
        known = {file: entry for file, entry in known.items() if entry["of"] == wanted.get(file)}
        new = [test for test in self.items if test.split("::")[0] not in known]
        if new:
            self.say.write(f"measuring which mutants {len(new)} tests reach\n")
            pid = os.fork()
            if pid == 0:
                self.to_log("reach")
                for test, found in self.record(new):
                    file = test.split("::")[0]
                    known.setdefault(file, {"of": wanted[file], "tests": {}})["tests"][test] = found
                if not self.failed:
                    path.write_text(json.dumps(known))
                os._exit(bool(self.failed))
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError(f"a test fails without a mutant: {self.scratch / 'logs' / 'reach'}")
            known = json.loads(path.read_text())
        tests = {test: found for entry in known.values() for test, found in entry["tests"].items()}
        return {test: (seconds, set(numbers)) for test, (seconds, numbers) in tests.items()}

    def record(self, tests):
        numbers = (ctypes.c_uint * 10000)()
        self.library.reached_mutants(numbers, 0)
        for test in tests:
            start, item = time.monotonic(), self.items[test]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            yield test, (time.monotonic() - start, numbers[: self.library.reached_mutants(numbers, len(numbers))])


# ---- the report ----


def report(mutants, state):
    lines = [
        "# Mutants of the CUDA kernels",
        "",
        "Written by `python tests/mutants.py`, which takes barriers, waits and bound checks out of the kernels one",
        "at a time and runs the emulated tests: what noticed the fault first, and which faults nothing noticed.",
        "[cuda.md](cuda.md) says why those are no gaps in the tests.",
        "",
        f"| file | mutants | {' | '.join(TITLES)} | survived |",
        "| --- |" + " --: |" * (len(TITLES) + 2),
    ]
    verdicts = {m: state.verdict(m)["by"] for m in mutants}
    for file in [*kernel_files(), None]:
        of = Counter(by for m, by in verdicts.items() if file in (m.file, None))
        if of:
            counts = [of.total(), *(of[by] for by in NOTICED), of[None]]
            lines.append(f"| {file or 'all'} | {' | '.join(str(n) if n else '' for n in counts)} |")
    lines += ["", "## Survivors", ""]
    for file in kernel_files():
        survivors = [m for m, by in verdicts.items() if by is None and m.file == file]
        if survivors:
            lines += [f"{file}:", ""]
            lines += [f"- line {m.line}: `{m.was}` → `{m.becomes}` in `{m.text}`" for m in survivors] + [""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())

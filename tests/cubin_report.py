"""What the compiler made of the CUDA kernels: registers, shared memory, blocks a multiprocessor holds, and faults.

Reads the machine code in the built extension, so it needs no GPU; needs cuobjdump and nvdisasm, from a toolkit or from
the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.

    python tests/cubin_report.py [--extension _C.so]           writes docs/cuda_resources.md
    python tests/cubin_report.py [--extension _C.so] --check   compares with it

Both fail on a kernel that keeps anything in local memory (spilled registers, arrays indexed at run time), lacks an
instruction it is written around, or has dynamic shared memory that KERNELS does not state.
"""

import argparse
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cuda_resources.md"
ARCHITECTURES = ["80", "86", "89", "90a", "120"]


@dataclass
class Chip:
    """What one multiprocessor has. Its registers are 65,536 on all of them, handed out by 256 to a warp."""

    architecture: str
    warps: int
    blocks: int
    shared: int  # bytes, of which a block takes 1 KiB beside its own


CHIPS = {
    "A100": Chip("80", 64, 32, 164 << 10),
    "L40S, RTX 4090": Chip("89", 48, 24, 100 << 10),
    "H100": Chip("90a", 64, 32, 228 << 10),
    "RTX 5090": Chip("120", 48, 24, 100 << 10),
}


@dataclass
class Stated:
    """What machine code does not say of a kernel, and what it must contain."""

    needs: str = ""  # instructions
    dynamic_shared: int = 0  # bytes, the most that a launch asks for


_TENSOR = "HMMA LDGSTS"  # mma.sync, cp.async
KERNELS = {  # by name; where template arguments matter, with them. Tables over experts: 384 of them.
    "attention_kernel": Stated(_TENSOR, 67584),
    "fused_moe_down_kernel": Stated(_TENSOR, 73728),
    "fused_moe_gate_up_kernel": Stated(_TENSOR, 73728),
    "grouped_gemm_int4_kernel": Stated("HGMMA UTMALDG", 204800),
    "grouped_stream_kernel": Stated(_TENSOR, 73728 + 1540),
    "grouped_tile_kernel<Bf16Tile, 32, false>": Stated(_TENSOR, 83460),
    "grouped_tile_kernel<Bf16Tile, 32, true>": Stated(_TENSOR, 83460),
    "grouped_tile_kernel<Int4Tile, 32, false>": Stated(_TENSOR, 71172),
    "grouped_tile_kernel<Int4Tile, 32, true>": Stated(_TENSOR, 71172),
    "grouped_tile_kernel<Int4Tile, 128, false>": Stated(_TENSOR, 85508),
    "grouped_tile_kernel<Int4Tile, 128, true>": Stated(_TENSOR, 85508),
    "mla_decode_tile_kernel<Widths<512, 64>, 1, 2>": Stated(_TENSOR, 81312),
    "mla_decode_tile_kernel<Widths<512, 64>, 1, 3>": Stated(_TENSOR, 118688),
    "mla_decode_tile_kernel<Widths<512, 64>, 2, 2>": Stated(_TENSOR, 87840),
    "mla_decode_tile_kernel<Widths<512, 64>, 2, 3>": Stated(_TENSOR, 125216),
    "mla_decode_tile_kernel<Widths<512, 64>, 4, 2>": Stated(_TENSOR, 100896),
    "mla_decode_tile_kernel<Widths<512, 64>, 4, 3>": Stated(_TENSOR, 138272),
    "mla_decode_tile_kernel<Widths<64, 16>, 1, 3>": Stated(_TENSOR, 32672),
    "mla_decode_tile_kernel<Widths<64, 16>, 2, 3>": Stated(_TENSOR, 39200),
    "mla_decode_tile_kernel<Widths<64, 16>, 4, 3>": Stated(_TENSOR, 52256),
    "mla_prefill_kernel": Stated(_TENSOR, 81920),
    "sort_by_expert_kernel": Stated("MATCH", 27648),
    "topk_sigmoid_kernel": Stated("REDUX"),
}


def stated(name):
    return KERNELS.get(name) or KERNELS.get(name.split("<")[0]) or Stated()


@dataclass
class Kernel:
    name: str
    registers: int
    shared: int
    threads: int
    instructions: Counter = field(repr=False)


def tool(name):
    """The path of a program of the CUDA toolkit or its wheels."""
    wheels = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")]
    found = shutil.which(name, path=os.pathsep.join([*wheels, os.environ["PATH"], "/usr/local/cuda/bin"]))
    if not found:
        sys.exit(f"no {name}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def run(*command, **options):
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, **options).stdout


def architecture_of(cubin):
    return cubin.suffixes[-2].removeprefix(".sm_")


def launch_bounds(cubin):
    """kernel -> threads of its largest block, from the attribute records of the ELF sections .nv.info.<kernel>."""
    data = cubin.read_bytes()
    table, size, count, names = struct.unpack_from("<Q10xHHH", data, 40)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, _, _, _, at, length in headers:
        section = data[strings + name : data.index(b"\0", strings + name)].decode()
        end = at + length
        while section.startswith(".nv.info._Z") and at < end:
            form, attribute, value = struct.unpack_from("<BBH", data, at)
            at += 4
            if form == 4:  # `value` bytes follow
                if attribute == 5:  # launch bounds
                    x, y, z = struct.unpack_from("<3I", data, at)
                    found[section.removeprefix(".nv.info.")] = x * y * z
                at += value
    return found


def short(demangled):
    """f_kernel<8, true> for void kimi::cuda::(...)::f_kernel<(int)8, true>(...)."""
    name = re.search(r"(\w+)(<.*>)?\(", re.sub(r"\((anonymous namespace|\w+)\)(::)?", "", demangled))
    return name[1] + re.sub(r"\b\w+::", "", name[2] or "")


def read(cubin):
    """The kernels of one file of machine code."""
    reserved = 0 if architecture_of(cubin) in ("80", "86", "89") else 1024  # counted as the kernel's where it has any
    bounds = launch_bounds(cubin)
    if not bounds and b".text._Z" not in cubin.read_bytes():
        return []
    usage = run(tool("cuobjdump"), "--dump-resource-usage", cubin)
    sass = run(tool("cuobjdump"), "-sass", cubin)
    bodies = {body.split()[0]: body for body in sass.split("Function : ")[1:]}
    kernels = []
    for name, registers, shared in re.findall(r"Function (\S+):\s+REG:(\d+).*?SHARED:(\d+)", usage):
        body = re.sub(r"@!U?PT .*", "", bodies[name])  # never executed
        instructions = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", body))
        plain = short(run("c++filt", name).strip())
        kernels.append(
            Kernel(plain, int(registers), int(shared) and int(shared) - reserved, bounds.get(name, 0), instructions)
        )
    return kernels


def all_kernels(extension):
    """(architecture -> kernel -> what it is, the compiler's version) of the extension module."""
    kernels = {architecture: {} for architecture in ARCHITECTURES}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        run(tool("cuobjdump"), "-xelf", "all", Path(extension).resolve(), cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        if not cubins:
            sys.exit(f"{extension} has no CUDA kernels: build with KIMI_CUDA=ON")
        compiler = re.search(rb"release (\d+\.\d+), V", cubins[0].read_bytes())[1].decode()
        for cubin, found in zip(cubins, pool.map(read, cubins), strict=True):
            kernels[architecture_of(cubin)] |= {k.name: k for k in found}
    return kernels, compiler


def blocks(kernel, chip):
    """Blocks of the kernel that a multiprocessor of the chip holds at once."""
    warps = -(-kernel.threads // 32)
    by_registers = 65536 // (256 * -(-kernel.registers // 8)) // 4 * 4 // warps
    shared = -(-(kernel.shared + stated(kernel.name).dynamic_shared) // 128) * 128 + 1024
    return min(chip.blocks, chip.warps // warps, by_registers, chip.shared // shared)


def with_dynamic_shared():
    """The kernels whose source declares dynamic shared memory."""
    found = set()
    for path in sorted((ROOT / "csrc" / "cuda").rglob("*.cu*")):
        for before in path.read_text().split("GPU_SHARED_DYNAMIC")[:-1]:
            names = re.findall(r"\b(\w+_kernel)\(", before)
            found |= set(names[-1:])
    return found


def faults(kernels):
    dynamic, known = with_dynamic_shared(), set()
    for architecture, of in kernels.items():
        for k in of.values():
            base = k.name.split("<")[0]
            known |= {k.name, base}
            expected = stated(k.name)
            local = k.instructions["STL"] + k.instructions["LDL"]
            if local:
                yield f"{k.name} on sm_{architecture}: {local} accesses to local memory"
            for needed in expected.needs.split():
                if not k.instructions[needed]:
                    yield f"{k.name} on sm_{architecture}: no {needed}"
            if not k.threads:
                yield f"{k.name} on sm_{architecture}: no __launch_bounds__"
            if base in dynamic and not expected.dynamic_shared:
                yield f"{k.name}: KERNELS does not state its dynamic shared memory"
    for name in KERNELS.keys() - known:
        yield f"{name}: stated in KERNELS, not in the extension"


def table(kernels, compiler):
    lines = [
        "# What the CUDA kernels take",
        "",
        f"As nvcc {compiler} compiles them; `python tests/cubin_report.py` writes this page from the built extension.",
        "Registers are a thread's; none is spilled. Shared memory is a block's, in bytes: static + dynamic, the most",
        "that a launch asks for. A column a chip: the blocks that one multiprocessor holds at once, by its threads,",
        "registers and shared memory; computed, not measured.",
        "",
        f"| kernel | threads | registers, sm_{' '.join(ARCHITECTURES)} | shared memory | {' | '.join(CHIPS)} |",
        "|---" * (4 + len(CHIPS)) + "|",
    ]
    for name in sorted(set().union(*kernels.values())):
        on = {architecture: of[name] for architecture, of in kernels.items() if name in of}
        registers = " ".join(str(on[a].registers) if a in on else "–" for a in ARCHITECTURES)
        any_of = next(iter(on.values()))
        dynamic = stated(name).dynamic_shared
        shared = " + ".join(str(n) for n in (max(k.shared for k in on.values()), dynamic) if n) or "0"
        held = " | ".join(str(blocks(on[c.architecture], c)) if c.architecture in on else "–" for c in CHIPS.values())
        lines.append(f"| `{name}` | {any_of.threads} | {registers} | {shared} | {held} |")
    return "\n".join(lines) + "\n"


def stale(old, new):
    """How the committed page differs. Another compiler may take other registers, but may not lower the blocks held."""
    if old.splitlines()[2:3] == new.splitlines()[2:3]:
        return [] if old == new else [f"{PAGE.relative_to(ROOT)} is stale"]
    held = [
        {r.split(" | ")[0]: r.strip(" |").split(" | ")[4:] for r in t.splitlines() if r[:3] == "| `"}
        for t in (old, new)
    ]
    if held[0].keys() != held[1].keys():
        return [f"{PAGE.relative_to(ROOT)} lists other kernels than the extension has"]
    return [
        f"{name[2:]}: {after} blocks a multiprocessor, {held[0][name]} in {PAGE.relative_to(ROOT)}"
        for name, after in held[1].items()
        if any(int(a) < int(b) for a, b in zip(after, held[0][name], strict=True) if a.isdigit())
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    parser.add_argument("--extension", help="the module _C to read; the installed one if not given")
    options = parser.parse_args()
    kernels, compiler = all_kernels(options.extension or importlib.util.find_spec("kimi_native._C").origin)
    page = table(kernels, compiler)
    wrong = list(dict.fromkeys(faults(kernels)))
    if options.check:
        wrong += stale(PAGE.read_text(), page)
    else:
        PAGE.write_text(page)
    print(page)
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()

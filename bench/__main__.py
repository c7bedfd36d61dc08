"""Time the kernels at the model's shapes: python -m bench [name ...]

One line a case:

  op         case        isa     median    spread  rate                      of roof  vs baseline
  gemm       o_proj T=1  avx512  5.96 ms   ±2%     19.7 GB/s, 19.7 GFLOP/s   53%      3.1x numpy

  median       of the repeats, each with cold caches and a warm thread pool
  spread       half the interquartile range over the median; repeat a run whose spread is wide
  rate         GB/s: the bytes that have to cross the memory bus (each weight, input and output once, a kernel's own
               scratch not counted); GFLOP/s: two operations a multiply-add. The one that limits the case comes first
  of roof      time the machine needs at the read bandwidth and float32 peak in the header, over the median
  vs baseline  how many times faster than the same maths in NumPy on the same stored arrays (bf16 or packed INT4,
               converted to float32 as part of the work)

With --peers, fused_moe, gemm, gemm_int4, mla_decode, mla_prefill, attention, muon, training, vision and generate run
others' code on the same weights too: ik-llama-cpp-python, llama-cpp-python, onnxruntime, openvino, torch, transformers
and kt-kernel, each if it is installed. Calls alternate with ours. A peer has a line of its own below ours, its name in
the place of isa; its last column says how many times faster we are and how far apart the results are (norm of the
difference over that of ours).

With --device cuda: CuPy arrays on the current GPU, activations in bf16, the shapes of the full model. Other columns:

  cold         median of the repeats: a CUDA graph of one call, timed by events, nothing of the case in the L2 cache
  chained      what one call adds to a graph of 20 that share the L2 cache; for calls under 100 us
  of copy      GB/s over the rate of a device-to-device copy (bytes read and written) in the header
  of bf16      TFLOP/s over the rate of a large bf16 product by cuBLAS in the header
  vs peers     how many times faster than others' code on the same arrays in the same run: PyTorch (cuBLAS, cuDNN,
               torch._grouped_mm) and a W4A16 product in Triton, where they are installed

A benchmark never passes or fails. Compare figures of one machine, one header and a quiet moment only. Other programs on
the same cores or the same memory bus can halve a rate while the spread stays small, and the roof is measured only once,
at the start: run twice, and believe what comes out twice.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

NAMES = sorted(file.stem.removeprefix("bench_") for file in Path(__file__).parent.glob("bench_*.py"))
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

EXAMPLES = """examples:
  python -m bench                            every benchmark, about 15 minutes on two cores, 4 GB of memory
  python -m bench fused_moe gemm_int4        two of them
  python -m bench --quick                    all, fewer repeats
  python -m bench fused_moe --peers          beside others' code
  python -m bench mla_decode --isa avx2      with the kernels of another instruction set
  python -m bench --device cuda              every benchmark on the GPU, meant for six minutes of an H100 and 45 GB
  python -m bench --device cuda --quick      a few cases of each
  python -m bench gemm --json > before.jsonl one JSON object a line: the header, then the cases, all seconds listed
  python -m bench gemm --compare before.jsonl  with the ratio to each case of that file
  python -m bench.plot before.jsonl rates.svg  rates over the number of tokens (matplotlib)
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="name", help="benchmarks to run (default: all; --list shows them)")
    add("--json", action="store_true", help="JSON lines instead of a table")
    add("--compare", metavar="FILE", help="what --json printed before: how many times faster each case is now")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the arrays lie (default: cpu)")
    add("--isa", metavar="NAME", help="instruction set of the kernels (default: the best this chip has)")
    add("--threads", type=int, metavar="N", help="threads of the kernels, of the roof and of NumPy's BLAS")
    add("--peers", action="store_true", help="time installed peers as well; on a GPU always")
    add("--quick", action="store_true", help="fewer repeats, on a GPU fewer cases")
    add("--list", action="store_true", help="print the names and stop")
    return parser


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    if args.device == "cuda" and (args.isa, args.threads, args.compare) != (None, None, None):
        arguments.error("--isa, --threads and --compare are for --device cpu")
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        arguments.error(f"unknown benchmark {unknown[0]!r}, expected one of: {', '.join(NAMES)}")
    if args.threads is not None:  # BLAS reads these once, when NumPy is imported
        os.environ.update(dict.fromkeys(BLAS_THREADS, str(args.threads)))
    modules = {name: importlib.import_module(f"bench.bench_{name}") for name in args.names or NAMES}
    if args.list:
        for name, module in modules.items():
            print(f"{name:23}{module.__doc__.splitlines()[0]}")
        return 0
    try:
        configure(args.isa, args.threads)
        harness = harness_for(args)
    except (ValueError, RuntimeError) as error:
        arguments.error(str(error))
    run(modules, harness)
    return 0


def configure(isa: str | None, threads: int | None) -> None:
    from kimi_native import ops

    if isa is not None:
        ops.set_isa(isa)
    if threads is not None:
        ops.set_num_threads(threads)


def harness_for(args):
    if args.device == "cuda":
        from bench.gpu import GpuHarness

        return GpuHarness(quick=args.quick, json_lines=args.json)
    from bench.harness import Harness
    from bench.results import medians

    before = medians(args.compare) if args.compare else None
    return Harness(quick=args.quick, json_lines=args.json, peers=args.peers, before=before)


def run(modules, harness) -> None:
    harness.header()
    for module in modules.values():
        module.bench(harness)
        harness.release()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

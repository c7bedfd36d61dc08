// Instructions of sm_90a: mbarrier, bulk tensor copies, wgmma. As in ptx.cuh, each for both compilers.
#pragma once

#include "cuda/ptx.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#else
struct CUtensorMap {  // of a bf16 matrix, in boxes 64 wide
  const kimi::bf16* base;
  int64_t stride;
  int rows, cols, box_rows;
};
#endif

namespace kimi::ptx {

PTX_FN void mbarrier_init(uint64_t* bar, int count PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
#else
  emu::mbarrier_init(bar, count, EMU_HERE);
#endif
}

// Makes initialised mbarriers visible to bulk copies; a barrier among the threads must follow.
PTX_FN void fence_mbarrier_init() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory");
#endif
}

PTX_FN void mbarrier_arrive(uint64_t* bar PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
#else
  emu::mbarrier_arrive(bar, 0, EMU_HERE);
#endif
}

// Arrives, and has the phase also wait for `bytes` from bulk copies.
PTX_FN void mbarrier_arrive_expect(uint64_t* bar, int bytes PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
#else
  emu::mbarrier_arrive(bar, bytes, EMU_HERE);
#endif
}

// Arrives when all cp.async that this thread has issued are done, without waiting for them. Orders nothing else.
PTX_FN void mbarrier_arrive_after_copies(uint64_t* bar PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
#else
  emu::mbarrier_arrive_after_copies(bar, EMU_HERE);
#endif
}

// Copies Bytes, 8 or 16, from global to shared memory, or zeros if not `valid`; brings the whole line of 128 bytes to
// the L2 cache, which is for neighbours that are read next.
template <int Bytes>
PTX_FN void cp_async_line(void* dst, const void* src, bool valid PTX_CALLER) {
#if defined(__CUDACC__)
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
                 "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(shared_address(dst)), "l"(src),
                 "n"(Bytes), "r"(valid ? Bytes : 0)
                 : "memory");
#else
  emu::copy_async(dst, src, Bytes, valid ? Bytes : 0, EMU_HERE);
#endif
}

// Waits until the phase of the given parity is complete.
PTX_FN void mbarrier_wait(uint64_t* bar, int parity PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}\n" ::"r"(
          shared_address(bar)),
      "r"(parity)
      : "memory");
#else
  emu::mbarrier_wait(bar, parity, EMU_HERE);
#endif
}

// Copies the map's box at (row, col) to dst, 128-byte rows swizzled, zeros outside the matrix; one thread.
PTX_FN void tensor_load(void* dst, const CUtensorMap* map, int row, int col, uint64_t* bar PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %2}], [%4];" ::
          "r"(shared_address(dst)),
      "l"(map), "r"(row), "r"(col), "r"(shared_address(bar))
      : "memory");
#else
  const CUtensorMap m = *map;
  emu::require(emu::in_shared(dst, m.box_rows * 128), "tensor_load: the box is not in the block's shared memory",
               EMU_HERE);
  emu::require(reinterpret_cast<uintptr_t>(dst) % 1024 == 0, "tensor_load: the box is not aligned to its swizzle",
               EMU_HERE);
  emu::bulk_copy(
      [=] {
        for (int r = 0; r < m.box_rows; ++r)
          for (int c = 0; c < 64; ++c) {
            const bool in = row + r >= 0 && row + r < m.rows && col + c >= 0 && col + c < m.cols;
            bf16* to = static_cast<bf16*>(dst) + r * 64 + ((c / 8) ^ (r % 8)) * 8 + c % 8;
            *to = in ? m.base[(row + r) * m.stride + col + c] : bf16{0};
          }
      },
      bar, m.box_rows * 128, EMU_HERE);
#endif
}

// Where wgmma finds a tile of bf16 rows of 64, swizzled as tensor_load leaves it.
#if defined(__CUDACC__)
using Tile = uint64_t;
PTX_FN Tile tile_at(const void* p) {
  return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
PTX_FN Tile tile_step(Tile t, int k) { return t + (k * 2 >> 4); }
#else
using Tile = uintptr_t;
PTX_FN Tile tile_at(const void* p) { return reinterpret_cast<uintptr_t>(p); }
PTX_FN Tile tile_step(Tile t, int k) { return t + k * 2; }
#endif

// Gives registers of this warpgroup back, or takes more: Count each thread, a multiple of 8. All its warps execute it.
template <int Count>
PTX_FN void give_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}
template <int Count>
PTX_FN void take_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// Between writes of registers and the wgmma that uses them.
PTX_FN void wgmma_fence() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emu::wgmma_fence();
#endif
}

PTX_FN void wgmma_commit(PTX_ONLY_CALLER) {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emu::group_collective("wgmma.commit_group", nullptr, EMU_HERE, [](emu::Group& g) {
    g.pending.push_back(std::move(g.open));
    g.open.clear();
  });
#endif
}

// Waits until at most N groups are in flight; only then may their results be read and their a be written.
template <int N>
PTX_FN void wgmma_wait(PTX_ONLY_CALLER) {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  emu::wgmma_wait(N, EMU_HERE);
#endif
}

// Stands for a use of registers here: put after a wait, it keeps the compiler from moving reads of results before it,
// and from giving the registers of operands in flight to others.
template <int N>
PTX_FN void hold([[maybe_unused]] float (&r)[N]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
#endif
}
template <int N>
PTX_FN void hold([[maybe_unused]] unsigned (&r)[N]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
#endif
}

#if defined(__CUDACC__)
#define KIMI_D8(i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define KIMI_D32(i) KIMI_D8(i), KIMI_D8(i + 8), KIMI_D8(i + 16), KIMI_D8(i + 24)
#define KIMI_R0                                                                                                        \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define KIMI_R32 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define KIMI_R48 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define KIMI_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#endif

// d += a * b^T, a 64x16 in registers, b a tile of N = 64, 96 or 128 rows, 16 deep. Of the warpgroup's thread i, with
// w = i/32, g = i%32/4, t = 2*(i%4): a = rows 16w+g, 16w+g+8, 16w+g, 16w+g+8 at k = t, t, t+8, t+8, two adjacent values
// each; d[4j], d[4j+1] = row 16w+g at 8j+t, 8j+t+1, then d[4j+2], d[4j+3] = row 16w+g+8. The whole warpgroup.
template <int N>
PTX_FN void wgmma_m64k16(float (&d)[N / 2], const unsigned (&a)[4], Tile b PTX_CALLER) {
  static_assert(N == 64 || N == 96 || N == 128);
#if defined(__CUDACC__)
  if constexpr (N == 64)
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" KIMI_R0
                 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                 : KIMI_D32(0)
                 : KIMI_A);
  else if constexpr (N == 96)
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" KIMI_R0 "," KIMI_R32
                 "}, {%48,%49,%50,%51}, %52, 1, 1, 1, 0;"
                 : KIMI_D32(0), KIMI_D8(32), KIMI_D8(40)
                 : KIMI_A);
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" KIMI_R0 "," KIMI_R32 "," KIMI_R48
                 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                 : KIMI_D32(0), KIMI_D32(32)
                 : KIMI_A);
#else
  emu::wgmma_m64k16<N>(d, a, b, EMU_HERE);
#endif
}

#if defined(__CUDACC__)
#undef KIMI_D8
#undef KIMI_D32
#undef KIMI_R0
#undef KIMI_R32
#undef KIMI_R48
#undef KIMI_A
#endif

}  // namespace kimi::ptx

namespace kimi::gpu {
// A map of a bf16 matrix for tensor_load, in boxes of box_rows x 64. base and stride (in elements) allow 16-byte loads.
inline CUtensorMap tensor_map(const bf16* base, int rows, int cols, int64_t stride, int box_rows) {
#if defined(__CUDACC__)
  CUtensorMap map;
  cuuint64_t size[2] = {cuuint64_t(cols), cuuint64_t(rows)}, step_bytes[1] = {cuuint64_t(stride) * 2};
  cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, step[2] = {1, 1};
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found),
        "driver");
  if (found != cudaDriverEntryPointSuccess) throw Error("the driver has no cuTensorMapEncodeTiled");
  const CUresult r = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16*>(base), size, step_bytes, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) throw Error("cuTensorMapEncodeTiled failed");
  return map;
#else
  return {base, stride, rows, cols, box_rows};
#endif
}
}  // namespace kimi::gpu

// Instructions of sm_90a: mbarrier, bulk tensor copies, wgmma. As in ptx.h, each for both compilers.
#pragma once

#include "cuda/ptx.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#else
struct CUtensorMap {  // of a bf16 matrix, in boxes 64 wide
  const kimi::bf16* base;
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
            *to = in ? m.base[size_t(row + r) * m.cols + col + c] : bf16{0};
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

PTX_FN void wgmma_fence() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
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

// Waits until at most N groups are in flight; only then may the results be read.
template <int N>
PTX_FN void wgmma_wait(PTX_ONLY_CALLER) {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  emu::group_collective("wgmma.wait_group", nullptr, EMU_HERE, [](emu::Group& g) {
    for (; g.pending.size() > N; g.pending.pop_front())
      for (auto& f : g.pending.front()) f();
  });
#endif
}

// d += a * b^T, a 64x16 and b 64x16. Thread i of the warpgroup has, with w = i/32, g = i%32/4, t = 2*(i%4):
// d[4j], d[4j+1] = row 16w+g at 8j+t, 8j+t+1, then d[4j+2], d[4j+3] = row 16w+g+8. The whole warpgroup.
PTX_FN void wgmma_m64n64k16(float (&d)[32], Tile a, Tile b PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b)
      : "memory");
#else
  emu::group_collective("wgmma", &d, EMU_HERE, [=](emu::Group& group) {
    std::array<float*, 128> out;
    for (int i = 0; i < 128; ++i) out[i] = static_cast<float*>(group.operand[i]);
    const auto run = [=] {
      static float A[64][16], B[16][64], D[64][64];
      const auto element = [](Tile tile, int row, int k) {
        uintptr_t at = tile + row * 128 + k * 2;
        at ^= (at >> 7 & 7) << 4;  // the 128-byte swizzle
        return to_float(*reinterpret_cast<const bf16*>(at));
      };
      for (int r = 0; r < 64; ++r)
        for (int k = 0; k < 16; ++k) A[r][k] = element(a, r, k), B[k][r] = element(b, r, k);
      const auto each = [&](auto f) {
        for (int i = 0; i < 128; ++i)
          for (int v = 0; v < 32; ++v)
            f(out[i][v], D[i / 32 * 16 + i % 32 / 4 + v % 4 / 2 * 8][v / 4 * 8 + i % 4 * 2 + v % 2]);
      };
      each([](float& d, float& at) { at = d; });
      for (int m = 0; m < 64; ++m)
        for (int k = 0; k < 16; ++k)
          for (int n = 0; n < 64; ++n) D[m][n] += A[m][k] * B[k][n];
      each([](float& d, float& at) { d = at; });
    };
    const bool now = emu::g.config.order == emu::Order::descending ||
                     (emu::g.config.order == emu::Order::random && group.open.empty() && group.pending.empty() &&
                      emu::g.random() % 2);
    if (now)
      run();
    else
      group.open.push_back(run);
  });
#endif
}

}  // namespace kimi::ptx

namespace kimi::gpu {
// A map of a row-major bf16 matrix for tensor_load, in boxes of box_rows x 64.
inline CUtensorMap tensor_map(const bf16* base, int rows, int cols, int box_rows) {
#if defined(__CUDACC__)
  CUtensorMap map;
  cuuint64_t size[2] = {cuuint64_t(cols), cuuint64_t(rows)}, stride[1] = {cuuint64_t(cols) * 2};
  cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, step[2] = {1, 1};
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("CUDA: no cuTensorMapEncodeTiled");
  const CUresult r = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16*>(base), size, stride, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) throw std::runtime_error("CUDA: cuTensorMapEncodeTiled failed");
  return map;
#else
  return {base, rows, cols, box_rows};
#endif
}
}  // namespace kimi::gpu

// PTX instructions that CUDA C++ has no name for. Each has an asm body for the GPU and a C++ body for
// the emulator, and says in its comment what it requires of the warp. Addresses are generic pointers.
#pragma once

#include "cuda/gpu.h"

#if defined(__CUDACC__)
#define PTX_FN __device__ __forceinline__
#define PTX_CALLER
#define PTX_ONLY_CALLER
#else
#define PTX_FN inline
#define PTX_CALLER , EMU_CALLER
#define PTX_ONLY_CALLER EMU_CALLER
#endif

namespace kimi::ptx {

#if defined(__CUDACC__)
PTX_FN unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
#endif

// Copies 16 bytes from global to shared memory: the first `bytes` from src, zeros after them.
PTX_FN void cp_async16(void* dst, const void* src, int bytes = 16 PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(bytes)
               : "memory");
#else
  emu::copy_async(dst, src, 16, bytes, EMU_HERE);
#endif
}

PTX_FN void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::copy_commit();
#endif
}

// Waits until at most N of this thread's groups are in flight. Other threads see the data after a barrier.
template <int N>
PTX_FN void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  emu::copy_wait(N);
#endif
}

#if !defined(__CUDACC__)
// Of both forms of ldmatrix: lane i gives row i%8 of matrix i/8.
template <bool Transposed>
void emulate_ldmatrix(unsigned (&r)[4], const void* row, emu::Site here) {
  struct Operand {
    uint16_t row[8];
    unsigned out[4];
    const void* at;
  } op;
  {
    emu::Quiet q;
    emu::require(emu::in_shared(row, 16), "ldmatrix: the row is not in the block's shared memory", here);
    emu::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix: misaligned row", here);
  }
  std::memcpy(op.row, row, 16);
  op.at = row;
  emu::collective(Transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, &op, here, [](void** ops, unsigned) {
    const auto operand = [&](int lane) { return static_cast<Operand*>(ops[lane]); };
    for (int m = 0; m < 4; ++m) {
      unsigned banks = 0, used[8] = {};
      for (int i = 0; i < 8; ++i) used[reinterpret_cast<uintptr_t>(operand(8 * m + i)->at) / 16 % 8]++;
      for (unsigned n : used) banks = std::max(banks, n);
      emu::g.stats.ldmatrix_conflicts += banks - 1;  // eight rows of four banks: one pass if they differ
      for (int lane = 0; lane < 32; ++lane) {
        const auto element = [&](int i) -> unsigned {
          return Transposed ? operand(8 * m + i)->row[lane / 4] : operand(8 * m + lane / 4)->row[i];
        };
        operand(lane)->out[m] = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
      }
    }
    ++emu::g.stats.ldmatrix;
  });
  std::memcpy(r, op.out, sizeof op.out);
}
#endif

// Loads four 8x8 matrices of 16-bit values. Lane i gives the address of row i%8 of matrix i/8. In r[j],
// lane i gets elements 2*(i%4) and 2*(i%4)+1 of row i/4 of matrix j. The whole warp.
PTX_FN void ldmatrix_x4(unsigned (&r)[4], const void* row PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulate_ldmatrix<false>(r, row, EMU_HERE);
#endif
}

// The same, transposed: lane i gets the elements of column i/4 of matrix j in rows 2*(i%4) and 2*(i%4)+1.
PTX_FN void ldmatrix_x4_trans(unsigned (&r)[4], const void* row PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulate_ldmatrix<true>(r, row, EMU_HERE);
#endif
}

// d += a * b, a 16x16 by rows, b 16x8 by columns. With g = lane/4 and t = 2*(lane%4), each register two
// adjacent elements: a = rows g, g+8, g, g+8 at k = t, t, t+8, t+8; b = column g at k = t, t+8;
// d = row g at n = t, t+1, then row g+8. The whole warp.
PTX_FN void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2] PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  struct Operand {
    unsigned a[4], b[2];
    float d[4];
  } op{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  emu::collective("mma.m16n8k16", ~0u, &op, EMU_HERE, [](void** ops, unsigned) {
    float A[16][16], B[16][8], D[16][8];
    const auto low = [](unsigned v) { return __uint_as_float(v << 16); };
    const auto high = [](unsigned v) { return __uint_as_float(v & 0xffff0000u); };
    for (int lane = 0; lane < 32; ++lane) {
      const Operand& o = *static_cast<Operand*>(ops[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        float* at = &A[g + i % 2 * 8][t + i / 2 * 8];
        at[0] = low(o.a[i]), at[1] = high(o.a[i]);
      }
      for (int i = 0; i < 2; ++i) B[t + 8 * i][g] = low(o.b[i]), B[t + 8 * i + 1][g] = high(o.b[i]);
      for (int i = 0; i < 4; ++i) D[g + i / 2 * 8][t + i % 2] = o.d[i];
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) D[m][n] += A[m][k] * B[k][n];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<Operand*>(ops[lane])->d[i] = D[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    ++emu::g.stats.mma;
  });
  std::memcpy(d, op.d, sizeof op.d);
#endif
}

// Two bf16 in a word, rounded to nearest even; NaN stays NaN.
PTX_FN unsigned pack_bf16(float low, float high) {
#if defined(__CUDACC__)
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return to_bf16(low).bits | unsigned(to_bf16(high).bits) << 16;
#endif
}
PTX_FN float low_bf16(unsigned v) { return __uint_as_float(v << 16); }
PTX_FN float high_bf16(unsigned v) { return __uint_as_float(v & 0xffff0000u); }

// Packed bf16, each half rounded once.
PTX_FN unsigned mul_bf16x2(unsigned a, unsigned b) {
#if defined(__CUDACC__)
  unsigned r;
  asm("{.reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 %0, %1, %2, z;}" : "=r"(r) : "r"(a), "r"(b));  // z: -0
  return r;
#else
  return pack_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b));
#endif
}
PTX_FN unsigned sub_bf16x2(unsigned a, unsigned b) {
#if defined(__CUDACC__)
  unsigned r;
  asm("{.reg .b32 m; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 %0, %2, m, %1;}" : "=r"(r) : "r"(a), "r"(b));  // m: -1
  return r;
#else
  return pack_bf16(low_bf16(a) - low_bf16(b), high_bf16(a) - high_bf16(b));
#endif
}

// Any function of three bits, applied bitwise: bit 4a+2b+c of Table is its value at (a, b, c).
template <int Table>
PTX_FN unsigned lop3(unsigned a, unsigned b, unsigned c) {
#if defined(__CUDACC__)
  unsigned r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return r;
#else
  unsigned r = 0;
  for (int i = 0; i < 8; ++i)
    if (Table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
#endif
}

// Barrier `id` of 1 to 15, for `threads` threads, a multiple of 32.
PTX_FN void barrier_sync(int id, int threads PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::barrier(id, threads, true, EMU_HERE, "barrier.sync");
#endif
}
PTX_FN void barrier_arrive(int id, int threads PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::barrier(id, threads, false, EMU_HERE, "barrier.arrive");
#endif
}

// 2^v, relative error 2^-22; results below 2^-126 are 0.
PTX_FN float exp2_approx(float v) {
#if defined(__CUDACC__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  const float r = exp2f(v);
  return r < 0x1p-126f ? 0.0f : r;
#endif
}

// Transposes an 8x8 matrix of 16-bit values: lane i gives, and gets, elements 2*(i%4) and 2*(i%4)+1 of row i/4. The
// whole warp.
PTX_FN unsigned transpose_8x8(unsigned v PTX_CALLER) {
#if defined(__CUDACC__)
  unsigned r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
#else
  struct Operand {
    unsigned in, out;
  } op{v, 0};
  emu::collective("movmatrix", ~0u, &op, EMU_HERE, [](void** ops, unsigned) {
    const auto at = [&](int row, int column) {
      return static_cast<Operand*>(ops[4 * row + column / 2])->in >> column % 2 * 16 & 0xffffu;
    };
    for (int i = 0; i < 32; ++i)
      static_cast<Operand*>(ops[i])->out = at(i % 4 * 2, i / 4) | at(i % 4 * 2 + 1, i / 4) << 16;
  });
  return op.out;
#endif
}

// Copies 8 or 16 bytes from global to shared memory, aligned to as many, zeros if `valid` is false. Keeps the line in
// the L1 cache: for rows of which each copy takes a small part.
template <int Bytes>
PTX_FN void cp_async_cached(void* dst, const void* src, bool valid PTX_CALLER) {
  static_assert(Bytes == 8 || Bytes == 16);
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(dst)), "l"(src), "n"(Bytes),
               "r"(valid ? Bytes : 0)
               : "memory");
#else
  emu::copy_async(dst, src, Bytes, valid ? Bytes : 0, EMU_HERE);
#endif
}

// How long lines that cp_async16_under brings shall stay in the L2 cache: out first, for data that is read once, or as
// any other.
PTX_FN uint64_t l2_policy([[maybe_unused]] bool evict_first) {
#if defined(__CUDACC__)
  uint64_t policy;
  if (evict_first)
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  return policy;
#else
  return 0;
#endif
}

// cp_async16 under an l2_policy.
PTX_FN void cp_async16_under([[maybe_unused]] uint64_t policy, void* dst, const void* src, int bytes = 16 PTX_CALLER) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(dst)), "l"(src),
               "r"(bytes), "l"(policy)
               : "memory");
#else
  emu::copy_async(dst, src, 16, bytes, EMU_HERE);
#endif
}

// 1 / v to the last bit or the one before it; 0 where that lies below 2^-126. No branch, unlike a division.
PTX_FN float reciprocal(float v) {
#if defined(__CUDACC__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  const float r = 1.0f / v;
  return std::fabs(r) < 0x1p-126f ? 0.0f : r;
#endif
}

// threadIdx.x % 32 where blocks are of one dimension, read anew at each call: what is computed from it in a loop is not
// kept in registers from one turn to the next.
PTX_FN int lane_id() {
#if defined(__CUDACC__)
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#else
  return int(threadIdx.x % 32);
#endif
}

}  // namespace kimi::ptx

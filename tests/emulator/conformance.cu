// What the emulator must share with a chip, bit for bit: prints a hash of what each instruction that kernels use gives
// the threads of a block, and with an argument the words themselves. conformance.txt holds the lines of one of the two.
//
//   nvcc -std=c++20 -I csrc -arch=sm_90a tests/emulator/conformance.cu csrc/cuda/gpu.cu -o conformance
//   g++ -std=c++20 -I csrc -DKIMI_EMULATOR -x c++ tests/emulator/conformance.cu csrc/cuda/gpu.cu -o conformance
//
// Matrices hold small integers, so that their products are exact, whatever the order and rounding of additions.
#include <cstdio>
#include <vector>

#include "cuda/hopper.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_SM90
#endif

namespace kimi {
namespace {

struct Out {  // of one thread: word after word, each a row over the threads of the block
  unsigned* at;
  PTX_FN explicit Out(unsigned* words) : at(words + threadIdx.x) {}
  PTX_FN void put(unsigned v) { *at = v, at += blockDim.x; }
  PTX_FN void put(float v) { put(__float_as_uint(v)); }
};

PTX_FN int small(int i) { return int((unsigned(i) * 2654435761u) >> 7 & 15) - 8; }
PTX_FN bf16 small_bf16(int i) { return to_bf16(float(small(i))); }

__global__ void shuffles(unsigned* words) {
  Out out(words);
  const unsigned lane = threadIdx.x, v = lane * 2654435761u;
  for (int width = 8; width <= 32; width *= 2)
    for (int arg = 0; arg < 32; arg += 5) {
      out.put(__shfl_sync(~0u, v, int(arg + lane), width));
      out.put(__shfl_up_sync(~0u, v, unsigned(arg), width));
      out.put(__shfl_down_sync(~0u, v, unsigned(arg), width));
      out.put(__shfl_xor_sync(~0u, v, arg, width));
    }
}

__global__ void votes_and_bits(unsigned* words) {
  Out out(words);
  const unsigned lane = threadIdx.x, v = lane * 2654435761u;
  out.put(__ballot_sync(~0u, v & 64));
  out.put(unsigned(__any_sync(~0u, lane == 7) << 1 | __all_sync(~0u, lane < 31)));
  out.put(__reduce_add_sync(~0u, v));
  out.put(unsigned(__reduce_min_sync(~0u, int(v))));
  out.put(__reduce_max_sync(~0u, v));
  out.put(__reduce_and_sync(~0u, v | 0xff00ff00u));
  out.put(__reduce_or_sync(~0u, v & 0x00ff00ffu));
  out.put(__reduce_xor_sync(~0u, v));
  out.put(__byte_perm(v, ~v * 7, 0x7214 + lane));
  out.put(unsigned(__popc(v) << 16 | __clz(int(v)) << 8 | __ffs(int(v))));
  out.put(ptx::lop3<0xE8>(v, v << 3, v >> 5));
  out.put(ptx::lop3<0x6A>(v, v << 3, v >> 5));
  out.put(ptx::lop3<0xEA>(v, v << 3, v >> 5));
}

__global__ void conversions(unsigned* words) {
  Out out(words);
  const unsigned lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) {
    // normal numbers of both signs and all low bits, ties among them; then both zeros, infinities and the largest
    const unsigned bits = (0x30000000u + (lane * 8 + i) * 0x00371234u) ^ (lane & 1) << 31;
    const unsigned edge[8] = {0,           0x80000000u, 0x7f800000u, 0xff800000u,
                              0x7f7fffffu, 0x3f808000u, 0x3f818000u, 0x3f808001u};
    const float v = __uint_as_float(bits), w = __uint_as_float(edge[(i + lane) % 8]);
    out.put(ptx::pack_bf16(v, w));
    out.put(unsigned(to_bf16(v).bits) << 16 | to_bf16(w).bits);
    const unsigned packed = ptx::pack_bf16(v, -v * 3), other = ptx::pack_bf16(float(i) + 0.5f, v * 0.0123f);
    out.put(ptx::low_bf16(packed) + ptx::high_bf16(packed));
    out.put(ptx::mul_bf16x2(packed, other));
    out.put(ptx::sub_bf16x2(packed, other));
    out.put(ptx::exp2_approx(float(small(int(lane) * 8 + i))));  // exact only of integers
    out.put(ptx::exp2_approx(-126.0f - float(lane)));
  }
}

__global__ void matrices(unsigned* words) {
  GPU_SHARED(s, bf16[32][40]);
  Out out(words);
  const int lane = threadIdx.x;
  for (int i = lane; i < 32 * 40; i += 32) s[i / 40][i % 40] = small_bf16(i);
  __syncwarp();
  unsigned a[4], b[4], c[4];
  ptx::ldmatrix_x4(a, &s[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix_x4(b, &s[16 + lane % 8][lane / 8 * 8]);
  ptx::ldmatrix_x4_trans(c, &s[lane % 16][16 + lane / 16 * 8]);
  for (int i = 0; i < 4; ++i) out.put(a[i]), out.put(b[i]), out.put(c[i]), out.put(ptx::transpose_8x8(a[i]));
  float d[4] = {float(lane), 0, -1, 2};
  ptx::mma_m16n8k16(d, a, {b[0], b[1]});
  for (float v : d) out.put(v);
  ptx::mma_m16n8k16(d, a, {b[2], b[3]});
  ptx::mma_m16n8k16(d, a, {c[0], c[1]});
  for (float v : d) out.put(v);
}

__global__ void copies(unsigned* words, const unsigned* from) {
  GPU_SHARED(s, uint4[8][32]);
  Out out(words);
  const int lane = threadIdx.x;
  const auto* line = reinterpret_cast<const uint4*>(from) + lane;
  for (auto& row : s) row[lane] = {1, 2, 3, 4};
  const uint64_t first = ptx::l2_policy(true), normal = ptx::l2_policy(false);
  ptx::cp_async16(&s[0][lane], line);
  ptx::cp_async16(&s[1][31 - lane], line, lane % 5 * 4);
  ptx::cp_async_commit();
  ptx::cp_async16_under(first, &s[2][lane], line);
  ptx::cp_async_cached<16>(&s[3][lane], line, lane % 3 != 0);
  ptx::cp_async_cached<8>(&s[4][lane], line, lane % 3 != 0);
  ptx::cp_async_commit();
  ptx::cp_async16_under(first, &s[5][lane], line, 16);
  ptx::cp_async16_under(normal, &s[6][lane], line, lane % 2 * 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<2>();
  __syncwarp();
  const auto put = [&](const uint4& v) { out.put(v.x), out.put(v.y), out.put(v.z), out.put(v.w); };
  for (int row = 0; row < 2; ++row) put(s[row][lane]);
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int row = 2; row < 8; ++row) put(s[row][lane]);
}

// Warps hand a word round: each waits for the barrier of its number and arrives at the next.
__global__ void barriers(unsigned* words) {
  GPU_SHARED(s, unsigned[32]);
  Out out(words);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0)
    s[lane] = lane;
  else
    ptx::barrier_sync(warp, 64);
  if (warp > 0) s[lane] = s[lane] * 5 + unsigned(warp);
  if (warp < 3) ptx::barrier_arrive(warp + 1, 64);
  __syncthreads();
  out.put(s[lane]);
}

constexpr int kRows = 128, kDepth = 128, kValidRows = 121, kValidDepth = 123;  // the map ends within the box

// One warpgroup multiplies 64 x 128 by the transpose of a tile of N rows that a tensor copy brings.
template <int N>
__global__ void __launch_bounds__(128)
    warpgroup([[maybe_unused]] unsigned* words, [[maybe_unused]] const __grid_constant__ CUtensorMap map,
              [[maybe_unused]] const unsigned* from) {
#if defined(HAS_SM90)
  GPU_SHARED_DYNAMIC(memory, 1024);
  GPU_SHARED(full, uint64_t[2]);
  GPU_SHARED(copied, uint2[128]);
  auto* const tile = reinterpret_cast<bf16(*)[N][64]>(memory);  // [kDepth / 64][N][64], swizzled
  Out out(words);
  const int i = threadIdx.x, g = i % 32 / 4, t = i % 4 * 2;
  if (i == 0) {
    ptx::mbarrier_init(&full[0], 1);
    ptx::mbarrier_init(&full[1], 128 + 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (i == 0) {
    ptx::mbarrier_arrive_expect(&full[0], kDepth * N * int(sizeof(bf16)));
    for (int part = 0; part < kDepth / 64; ++part) ptx::tensor_load(tile[part], &map, 8, 64 * part + 8, &full[0]);
    ptx::mbarrier_arrive(&full[1]);
  }
  ptx::cp_async_line<8>(&copied[i], from + 2 * i, i % 7 != 0);
  ptx::mbarrier_arrive_after_copies(&full[1]);
  ptx::mbarrier_wait(&full[0], 0);
  ptx::mbarrier_wait(&full[1], 0);
  out.put(copied[127 - i].x), out.put(copied[127 - i].y);
  for (int at = i; at < kDepth * N / 2; at += 128) out.put(reinterpret_cast<const unsigned*>(memory)[at]);

  float d[N / 2];
  for (int v = 0; v < N / 2; ++v) d[v] = float(v - i % 9);
  unsigned a[kDepth / 16][4];
  for (int step = 0; step < kDepth / 16; ++step)
    for (int v = 0; v < 4; ++v) {
      const int row = i / 32 * 16 + g + v % 2 * 8, k = step * 16 + t + v / 2 * 8;
      a[step][v] = ptx::pack_bf16(float(small(row * kDepth + k)), float(small(row * kDepth + k + 1)));
    }
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    ptx::wgmma_m64k16<N>(d, a[step], ptx::tile_step(ptx::tile_at(tile[step / 4]), step % 4 * 16));
    ptx::wgmma_commit();
  }
  ptx::wgmma_wait<0>();
  ptx::hold(d);
  for (float v : d) out.put(v);
#endif
}

template <class T>
T* on_device(const std::vector<T>& v) {
#if defined(__CUDACC__)
  T* p;
  gpu::check(cudaMalloc(&p, v.size() * sizeof(T)), "malloc");
  gpu::check(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  return p;
#else
  return (new std::vector<T>(v))->data();
#endif
}

bool print_words;

template <class... P, class... A>
void section(const char* name, void (*kernel)(P...), int threads, int shared, int lines, A... arguments) {
  std::vector<unsigned> words(threads * lines, 0xdeadbeef);
  unsigned* const out = on_device(words);
  gpu::launch(kernel, dim3(1), dim3(threads), shared, nullptr, out, arguments...);
#if defined(__CUDACC__)
  gpu::check(cudaMemcpy(words.data(), out, words.size() * sizeof(unsigned), cudaMemcpyDeviceToHost), name);
#else
  std::copy(out, out + words.size(), words.begin());
#endif
  for (int line = 0; line < lines; ++line) {
    const unsigned* of = &words[threads * line];
    uint64_t hash = 14695981039346656037u;
    for (int i = 0; i < threads; ++i) hash = (hash ^ of[i]) * 1099511628211u;
    std::printf("%s %d %016llx", name, line, static_cast<unsigned long long>(hash));
    for (int i = 0; print_words && i < threads; ++i) std::printf(" %08x", of[i]);
    std::puts("");
  }
}

template <int N>
void warpgroup_section(const char* name, const CUtensorMap& map, const unsigned* from) {
  section(name, warpgroup<N>, 128, kDepth * N * int(sizeof(bf16)), 2 + kDepth * N / 256 + N / 2, map, from);
}

void run() {
  section("shuffles", shuffles, 32, 0, 84);
  section("votes_and_bits", votes_and_bits, 32, 0, 13);
  section("conversions", conversions, 32, 0, 56);
  section("matrices", matrices, 32, 0, 24);
  std::vector<unsigned> given(256);
  for (int i = 0; i < 256; ++i) given[i] = unsigned(i) * 2654435761u;
  const unsigned* const from = on_device(given);
  section("copies", copies, 32, 0, 32, from);
  section("barriers", barriers, 128, 0, 1);
  if (gpu::device().compute_capability != 90) return;
  std::vector<bf16> matrix(kRows * kDepth);
  for (int i = 0; i < kRows * kDepth; ++i) matrix[i] = to_bf16(float(int((unsigned(i) * 2654435761u) >> 9 & 15) - 8));
  const bf16* const x = on_device(matrix);
  const auto map = [&](int rows) { return gpu::tensor_map(x, kValidRows, kValidDepth, kDepth, rows); };
  warpgroup_section<64>("warpgroup64", map(64), from);
  warpgroup_section<96>("warpgroup96", map(96), from);
  warpgroup_section<128>("warpgroup128", map(128), from);
}

}  // namespace
}  // namespace kimi

int main(int count, char**) {
  kimi::print_words = count > 1;
  try {
    kimi::run();
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    return 1;
  }
}

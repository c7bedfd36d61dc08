// out^T = W x^T by wgmma: weights, dequantised in registers, are the 64 rows of its first operand, rows of x ("tokens")
// the columns. One warpgroup brings tiles to shared memory, two multiply, so that each weight is dequantised once a
// tile.
#include "cuda/sm90/grouped_gemm_int4.h"

#include <string>

#include "cuda/device.cuh"
#include "cuda/hopper.cuh"

namespace kimi::cuda::sm90 {
namespace {

constexpr int kProducers = 128, kConsumers = 256, kThreads = kProducers + kConsumers;
constexpr int kFeatures = 256;  // outputs a tile: 128 a consuming warpgroup, 32 a warp
constexpr int kTokens = 128;    // at most, a tile
constexpr int kDepth = 128;     // inputs a stage
constexpr int kStages = 4;
constexpr int kMaxExperts = 512;
constexpr int kGroup = 32;  // inputs a scale
constexpr int kBoxRows = 32;

struct Stage {
  bf16 x[kDepth / 64][kTokens][64];          // as tensor_load leaves it
  uint4 weight[kDepth / kGroup][kFeatures];  // 32 values of a row of W; by slot
  uint2 scale[kFeatures];                    // of the row's four groups; by slot
};

// Rows of W lie in `slots`, in the order in which fragments want them: of 32 slots, bits 4, 3, 2-1 and 0 count wgmma
// (two a warp), half of its 16 rows a warp, lane / 8 and row parity. Then a thread's results of one token are 8 outputs
// in a row.
PTX_FN int feature_of(int slot) {
  return (slot & ~31) | (slot >> 1 & 3) << 3 | (slot >> 4 & 1) << 2 | (slot >> 3 & 1) << 1 | (slot & 1);
}

struct Rows {  // of x, those of an expert
  int begin, end;
  int first_tile;  // of all tiles of tokens
};

struct Tile {
  int expert, row, rows, feature;
  // Tokens that are multiplied: the fewest of which there is an instance.
  PTX_FN int width() const { return rows <= 64 ? 64 : rows <= 96 ? 96 : 128; }
};

struct Barriers {
  uint64_t full[kStages], empty[kStages];
};

struct Ring {  // the stages, in the order in which both sides walk through them
  Stage* stages;
  Barriers& barriers;
  int step = 0;

  PTX_FN Stage& stage() const { return stages[step % kStages]; }
  PTX_FN uint64_t* full() const { return &barriers.full[step % kStages]; }
  PTX_FN uint64_t* empty() const { return &barriers.empty[step % kStages]; }
  PTX_FN int parity() const { return step / kStages & 1; }
  // By each consuming warp, when it has read the stage before this one.
  PTX_FN void release_previous() const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(&barriers.empty[(step - 1) % kStages]);
  }
};

// Which rows are whose. Whatever offsets hold, rows lie in [0, M).
PTX_FN void find_rows(const int32_t* offsets, int E, int M, Rows* rows) {
  for (int e = threadIdx.x; e <= E; e += kThreads) {
    const int begin = min(max(offsets[e], 0), M);
    rows[e] = {begin, e < E ? max(begin, min(offsets[e + 1], M)) : M, 0};
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    int total = 0;
    for (int first = 0; first <= E; first += kWarp) {
      const int e = first + threadIdx.x, tiles = e < E ? (rows[e].end - rows[e].begin + kTokens - 1) / kTokens : 0;
      int sum = tiles;
#pragma unroll
      for (int d = 1; d < kWarp; d *= 2) {
        const int before = __shfl_up_sync(~0u, sum, d);
        if (int(threadIdx.x) >= d) sum += before;
      }
      if (e <= E) rows[e].first_tile = total + sum - tiles;
      total += __shfl_sync(~0u, sum, kWarp - 1);
    }
  }
  __syncthreads();
}

// Tile number `item`: those of the same tokens, then of the same expert, follow each other.
PTX_FN Tile tile_of(int item, int feature_tiles, const Rows* rows, int E) {
  const int tile = item / feature_tiles;
  int low = 0, high = E;  // rows[low].first_tile <= tile < rows[high].first_tile
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (rows[middle].first_tile <= tile ? low : high) = middle;
  }
  const int row = rows[low].begin + (tile - rows[low].first_tile) * kTokens;
  return {low, row, min(rows[low].end - row, kTokens), item % feature_tiles * kFeatures};
}

// ---- the producing warpgroup

struct Source {  // one expert's weights
  const uint32_t* weight;
  const bf16* scale;
  int n_out, n_in;
};

// A stage's weights and scales by asynchronous copies. Rows and groups of four scales are aligned, offsets have 32
// bits.
PTX_FN void copy_weights(const Source& of, int feature, int depth, Stage& stage, uint64_t* full) {
  const int chunk = threadIdx.x % (kDepth / kGroup), first = threadIdx.x / 4;
  const unsigned row_bytes = of.n_in / 2, row_scales = of.n_in / kGroup;
  const auto* weight = reinterpret_cast<const char*>(of.weight) + depth / 2 + 16 * chunk;
#pragma unroll 4
  for (int i = 0; i < kFeatures; i += 32) {
    const int row = feature + feature_of(first) + i;
    const bool valid = row < of.n_out;
    ptx::cp_async_line<16>(&stage.weight[chunk][first + i], weight + (valid ? row * row_bytes : 0), valid);
  }
#pragma unroll
  for (int slot = threadIdx.x; slot < kFeatures; slot += kProducers) {
    const int row = feature + feature_of(slot);
    const bool valid = row < of.n_out;
    ptx::cp_async_line<8>(&stage.scale[slot], of.scale + ((valid ? row * row_scales : 0) + depth / kGroup), valid);
  }
  ptx::mbarrier_arrive_after_copies(full);
}

// The same for any alignment and any number of groups: zeros after the last.
PTX_FN void load_weights(const Source& of, int feature, int depth, Stage& stage, uint64_t* full) {
  const int groups = of.n_in / kGroup;
  for (int slot = threadIdx.x; slot < kFeatures; slot += kProducers) {
    const int row = feature + feature_of(slot);
    unsigned scales[kDepth / kGroup];
    for (int chunk = 0; chunk < kDepth / kGroup; ++chunk) {
      const int group = depth / kGroup + chunk;
      const int64_t at = int64_t(row) * groups + group;
      const bool valid = row < of.n_out && group < groups;
      const uint32_t* from = of.weight + at * 4;
      stage.weight[chunk][slot] = valid ? uint4{from[0], from[1], from[2], from[3]} : uint4{0, 0, 0, 0};
      scales[chunk] = valid ? of.scale[at].bits : 0;
    }
    stage.scale[slot] = {scales[0] | scales[1] << 16, scales[2] | scales[3] << 16};
  }
  ptx::mbarrier_arrive(full);
}

PTX_FN void produce(const CUtensorMap* x, const ExpertWeights& experts, const Tile& tile, Ring& ring) {
  const Source of{static_cast<const uint32_t*>(experts.weight[tile.expert]), experts.scale[tile.expert], experts.n_out,
                  experts.n_in};
  const bool aligned =
      (reinterpret_cast<uintptr_t>(of.weight) % 16 | reinterpret_cast<uintptr_t>(of.scale) % 8 | of.n_in % kDepth) == 0;
  for (int depth = 0; depth < of.n_in; depth += kDepth, ++ring.step) {
    Stage& stage = ring.stage();
    ptx::mbarrier_wait(ring.empty(), ring.parity() ^ 1);
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(ring.full(), tile.width() * kDepth * int(sizeof(bf16)));
#pragma unroll 1
      for (int token = 0; token < tile.width(); token += kBoxRows)
        for (int part = 0; part < kDepth / 64; ++part)
          ptx::tensor_load(stage.x[part][token], x, tile.row + token, depth + 64 * part, ring.full());
    }
    if (aligned)
      copy_weights(of, tile.feature, depth, stage, ring.full());
    else
      load_weights(of, tile.feature, depth, stage, ring.full());
  }
}

// ---- the consuming warpgroups

// bf16(q * scale) of the low and the high nibble of byte `lane % 4` of a word, which `select` names: 128 + nibble is
// exact in bf16, so is -136, the product is rounded once.
PTX_FN unsigned dequantise(unsigned word, unsigned select, unsigned scale) {
  const unsigned spread = __byte_perm(word, word >> 4, select);
  return ptx::mul_bf16x2(ptx::sub_bf16x2(ptx::lop3<0xEA>(spread, 0x000f000fu, 0x43004300u), 0x43084308u), scale);
}

// A warpgroup's 128 outputs of N tokens, in registers.
template <int N>
struct Product {
  float sum[2][N / 2];  // of two wgmma of 64 outputs
  unsigned a[2][2][4];  // their operands, 32 deep: one is being multiplied while the other is made
  uint4 words[2];       // 32 values of rows g and g + 8, from which the next operand is made
  uint2 scale[2][2];    // of this stage; [wgmma][row]
  unsigned select;
  int slot;  // of row g of the first wgmma

  // Of a stage, operand `unit` is 32 deep at 32 * (unit / 2), of wgmma unit % 2.
  PTX_FN void load(const Stage& stage, int unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = slot + unit % 2 * 16 + half * 8;
      words[half] = stage.weight[unit / 2][at];
      if (unit < 2) scale[unit][half] = stage.scale[at];
    }
  }

  PTX_FN void make(int unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 four = scale[unit % 2][half];
      const unsigned s = __byte_perm(unit / 4 ? four.y : four.x, 0, unit / 2 % 2 ? 0x3232 : 0x1010);
      a[unit % 2][0][half] = dequantise(words[half].x, select, s);
      a[unit % 2][0][half + 2] = dequantise(words[half].y, select, s);
      a[unit % 2][1][half] = dequantise(words[half].z, select, s);
      a[unit % 2][1][half + 2] = dequantise(words[half].w, select, s);
    }
  }

  PTX_FN void multiply(const Stage& stage, int unit) {
    const int depth = unit / 2 * 32;
    const ptx::Tile x = ptx::tile_step(ptx::tile_at(stage.x[depth / 64]), depth % 64);
    ptx::wgmma_fence();
    ptx::wgmma_m64k16<N>(sum[unit % 2], a[unit % 2][0], x);
    ptx::wgmma_m64k16<N>(sum[unit % 2], a[unit % 2][1], ptx::tile_step(x, 16));
    ptx::wgmma_commit();
  }
};

struct Output {
  bf16* data;
  int64_t stride;
  int n_out;
  bool vector;  // rows allow 16-byte stores
};

// A thread's share: of each eight tokens one, of the warp's 32 outputs eight.
template <int N>
PTX_FN void store(const Product<N>& product, const Tile& tile, int warp, const Output& out) {
  const int lane = threadIdx.x % kWarp, feature = tile.feature + warp * 32 + lane % 4 * 8;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    unsigned v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* of = &product.sum[i / 2][4 * j + i % 2 * 2];
      v[i] = ptx::transpose_8x8(ptx::pack_bf16(of[0], of[1]));
    }
    const int token = 8 * j + lane / 4;
    if (token >= tile.rows) continue;
    bf16* to = out.data + (tile.row + token) * out.stride + feature;
    if (out.vector && feature + 8 <= out.n_out) {
      *reinterpret_cast<uint4*>(to) = {v[0], v[1], v[2], v[3]};
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (feature + i < out.n_out) to[i] = bf16{uint16_t(v[i / 2] >> i % 2 * 16)};
    }
  }
}

template <int N>
PTX_FN void consume(const Tile& tile, int steps, Ring& ring, const Output& out) {
  constexpr int kUnits = 2 * kDepth / 32;
  const int warp = threadIdx.x / kWarp - kProducers / kWarp, lane = threadIdx.x % kWarp;
  Product<N> product;
  for (auto& sum : product.sum)
    for (float& v : sum) v = 0;
  product.slot = warp * 32 + lane / 4;
  product.select = lane % 4 * 0x1111 + 0x4400;  // of (word, word >> 4): byte lane % 4 of each
  ptx::mbarrier_wait(ring.full(), ring.parity());
  product.load(ring.stage(), 0);
  product.make(0);
  for (int left = steps; left > 0; --left) {
    const Stage& stage = ring.stage();
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      product.multiply(stage, unit);
      if (unit + 1 < kUnits) {
        product.load(stage, unit + 1);
      } else {
        ++ring.step;
        if (left > 1) {
          ptx::mbarrier_wait(ring.full(), ring.parity());
          product.load(ring.stage(), 0);
        }
      }
      ptx::wgmma_wait<1>();  // not for this unit's: the next operand is made while they run
      ptx::hold(product.a[(unit + 1) % 2][0]);
      ptx::hold(product.a[(unit + 1) % 2][1]);
      if (unit == 0 && left < steps) ring.release_previous();
      product.make((unit + 1) % kUnits);
    }
  }
  ptx::wgmma_wait<0>();
  ptx::hold(product.sum[0]);
  ptx::hold(product.sum[1]);
  ring.release_previous();
  store(product, tile, warp, out);
}

// Rows of no expert.
PTX_FN void store_zeros(const Rows& rows, const Output& out) {
  for (int row = rows.begin + blockIdx.x; row < rows.end; row += gridDim.x) {
    bf16* to = out.data + row * out.stride;
    const int vectors = out.vector ? out.n_out / 8 : 0;
    for (int i = threadIdx.x; i < vectors; i += kThreads) reinterpret_cast<uint4*>(to)[i] = {0, 0, 0, 0};
    for (int i = 8 * vectors + threadIdx.x; i < out.n_out; i += kThreads) to[i] = bf16{0};
  }
}

// A persistent block walks through tiles of kTokens rows of an expert and kFeatures outputs.
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_int4_kernel(const __grid_constant__ CUtensorMap x, ExpertWeights experts, const int32_t* offsets,
                             int M, Output out) {
  GPU_SHARED_DYNAMIC(memory, 1024);
  GPU_SHARED(barriers, Barriers);
  GPU_SHARED(rows, Rows[kMaxExperts + 1]);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&barriers.full[s], kProducers + 1);  // and one arrival for the tensor copies
      ptx::mbarrier_init(&barriers.empty[s], kConsumers / kWarp);
    }
    ptx::fence_mbarrier_init();
  }
  find_rows(offsets, experts.E, M, rows);
  store_zeros(rows[experts.E], out);

  Ring ring{reinterpret_cast<Stage*>(memory), barriers};
  const int feature_tiles = (experts.n_out + kFeatures - 1) / kFeatures,
            tiles = rows[experts.E].first_tile * feature_tiles;
  if (threadIdx.x < kProducers) {
    ptx::give_registers<56>();
    for (int i = blockIdx.x; i < tiles; i += gridDim.x)
      produce(&x, experts, tile_of(i, feature_tiles, rows, experts.E), ring);
  } else {
    ptx::take_registers<224>();
    const int steps = (experts.n_in + kDepth - 1) / kDepth;
    for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
      const Tile tile = tile_of(i, feature_tiles, rows, experts.E);
      if (tile.width() == 64)
        consume<64>(tile, steps, ring, out);
      else if (tile.width() == 96)
        consume<96>(tile, steps, ring, out);
      else
        consume<128>(tile, steps, ring, out);
    }
  }
}

constexpr size_t kShared = kStages * sizeof(Stage);

}  // namespace

bool fits(const GroupedGemmParams<bf16>& p) {
  const ExpertWeights& w = p.experts;
  const int64_t most_tiles = int64_t(w.E) * ceil_div(p.M, kTokens) * ceil_div(w.n_out, kFeatures);
  return gpu::device().compute_capability == 90 &&
         size_t(gpu::device().shared_per_block) >= kShared + sizeof(Rows) * (kMaxExperts + 1) + sizeof(Barriers) &&
         w.E <= kMaxExperts && most_tiles < int64_t(1) << 31 && int64_t(w.n_out) * w.n_in < int64_t(1) << 32 &&
         w.n_in > 0 && aligned16(p.x) && p.x_stride % 8 == 0 && p.x_stride >= w.n_in;
}

void grouped_gemm_int4(const GroupedGemmParams<bf16>& p, Stream stream) {
  const int capability = gpu::device().compute_capability;
  if (capability != 90)
    throw gpu::Error("the GPU has compute capability " + std::to_string(capability / 10) + "." +
                     std::to_string(capability % 10) + ", the kernel for Hopper needs 9.0");
  if (!fits(p))
    throw gpu::Error("the kernel for Hopper needs rows of x that start at multiples of 16 bytes, at most " +
                     std::to_string(kMaxExperts) + " experts and " + std::to_string(kShared) +
                     " bytes of shared memory");
  if (p.M == 0) return;
  const Output out{p.out, p.out_stride, p.experts.n_out, aligned16(p.out) && p.out_stride % 8 == 0};
  gpu::launch(grouped_gemm_int4_kernel, dim3(gpu::device().multiprocessors), dim3(kThreads), kShared, stream,
              gpu::tensor_map(p.x, p.M, p.experts.n_in, p.x_stride, kBoxRows), p.experts, p.offsets, p.M, out);
}

}  // namespace kimi::cuda::sm90

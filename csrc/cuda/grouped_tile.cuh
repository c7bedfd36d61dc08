// Grouped GEMM for experts with many rows: a block of four warps computes 128 weight rows times N rows of x.
//
// Each warp has 32 weight rows, in SwiGLU 16 of gate and the same 16 of up, so that a thread holds both values of an
// element. Slabs of 128 inputs come by cp.async, several in flight. Of INT4 weights each thread copies what it will
// read. The N rows of x are shared by the warps; only as many groups of eight as have rows are computed.
#pragma once

#include "cuda/grouped.cuh"

namespace kimi::cuda {

constexpr int kTileThreads = 128, kTileRows = 128, kTileSlab = 128, kTileChunks = kTileSlab / 8;

// Where a thread finds its weights for one tile of the grid.
struct TileSource {
  const void* weight[2];  // of gate and up, or of the same matrix twice
  const bf16* scale[2];
  int row[2], n_out, n_in;  // first weight row of the m16 tiles of this warp
  bool fast;                // cp.async may copy

  PTX_FN int clamped(int m, int r) const { return min(row[m] + r, n_out - 1); }  // rows past the end are not stored
};

struct Int4Tile {
  struct Stage {
    uint4 words[4][kTileThreads];  // [16 * m16 tile + 8 * half][thread]
    uint2 scales[kTileRows];       // four groups of each row
  };
  static constexpr int kMaxStages = 4;

  static PTX_FN bool fast(const TileSource& s) {
    bool all = s.n_in % kTileSlab == 0;
    for (int m = 0; m < 2; ++m) all = all && aligned(s.weight[m], 16) && aligned(s.scale[m], 8);
    return all;
  }

  static PTX_FN void copy(Stage& stage, const TileSource& s, int slab, uint64_t policy) {
    if (!s.fast) return;
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto* row =
          static_cast<const unsigned char*>(s.weight[i / 2]) + int64_t(s.clamped(i / 2, g + i % 2 * 8)) * (s.n_in / 2);
      ptx::cp_async16_under(policy, &stage.words[i][threadIdx.x], row + slab * (kTileSlab / 2) + t * 16);
    }
    const int64_t row = lane < 16 ? s.clamped(0, lane) : s.clamped(1, lane - 16);
    const bf16* scales = (lane < 16 ? s.scale[0] : s.scale[1]) + row * (s.n_in / kInt4Group);
    ptx::cp_async_cached<8>(&stage.scales[threadIdx.x], scales + slab * (kTileSlab / kInt4Group), true);
  }

  uint4 words[4];
  unsigned scales[4];

  PTX_FN void read(const Stage& stage, const TileSource& s, int slab) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, local = threadIdx.x - lane;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (s.fast) {
        words[i] = stage.words[i][threadIdx.x];
        scales[i] = both_halves(reinterpret_cast<const bf16*>(&stage.scales[local + 8 * i + g])[t]);
      } else {
        const int64_t row = s.clamped(i / 2, g + i % 2 * 8), groups = s.n_in / kInt4Group;
        load_group(static_cast<const int32_t*>(s.weight[i / 2]) + row * groups * 4, s.scale[i / 2] + row * groups,
                   slab * 4 + t, int(groups), words[i], scales[i]);
      }
  }

  // Operand A of both steps of word w.
  PTX_FN void fragments(int w, unsigned (&a)[2][2][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned pairs[4];
      dequantize(word_of(words[i], w), scales[i], pairs);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i / 2][j / 2][i % 2 + j % 2 * 2] = pairs[j];
    }
  }

  static PTX_FN void pair(const uint4& x, unsigned (&b)[2][2]) { pair_like_int4(x, b); }
};

struct Bf16Tile {
  struct Stage {
    uint4 rows[kTileRows][kTileChunks];  // swizzled
  };
  static constexpr int kMaxStages = 2;

  static PTX_FN bool fast(const TileSource& s) {
    return s.n_in % 8 == 0 && aligned(s.weight[0], 16) && aligned(s.weight[1], 16);
  }

  // A warp's own rows, half a row of 16 chunks at a time.
  static PTX_FN void copy(Stage& stage, const TileSource& s, int slab, uint64_t policy) {
    const int lane = threadIdx.x % kWarp, local = threadIdx.x - lane, c = lane % kTileChunks;
    const int k = slab * kTileSlab + c * 8;
#pragma unroll
    for (int i = 0; i < kWarp / 2; ++i) {
      const int m = i / 8, r = i % 8 * 2 + lane / kTileChunks;
      const bf16* at = static_cast<const bf16*>(s.weight[m]) + int64_t(s.clamped(m, r)) * s.n_in + k;
      uint4* to = &stage.rows[local + m * 16 + r][swizzled(r, c)];
      if (s.fast && k < s.n_in)
        ptx::cp_async16_under(policy, to, at);
      else
        *to = load8(at, s.n_in - k, s.fast);
    }
  }

  const uint4* first;

  PTX_FN void read(const Stage& stage, const TileSource&, int) { first = stage.rows[threadIdx.x / kWarp * kWarp]; }

  PTX_FN void fragments(int w, unsigned (&a)[2][2][4]) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = first[(8 * i + g) * kTileChunks + swizzled(g, 4 * t + w)];
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i / 2][j / 2][i % 2 + j % 2 * 2] = word_of(v, j);
    }
  }

  static PTX_FN void pair(const uint4& x, unsigned (&b)[2][2]) {
    b[0][0] = x.x, b[0][1] = x.y, b[1][0] = x.z, b[1][1] = x.w;
  }
};

template <class Format, int N>
struct TileStage {
  typename Format::Stage weights;
  uint4 x[N][kTileChunks];  // swizzled
};

template <class Format, int N>
constexpr int kTileStages = N > 32 ? 2 : Format::kMaxStages;  // 99 KB is what every chip has

template <class Format, int N>
constexpr int tile_shared(int E) {
  return kTileStages<Format, N> * int(sizeof(TileStage<Format, N>)) + (E + 1) * 4;
}

// One slab: 4 words of 8 inputs a lane, two steps of k = 16 each.
template <class Format, int N>
PTX_FN void multiply_slab(const TileStage<Format, N>& stage, const TileSource& source, int slab, int live,
                          float (&d)[2][N / 8][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  Format weights;
  weights.read(stage.weights, source, slab);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint4* x = &stage.x[g][swizzled(g, 4 * t + w)];
    unsigned a[2][2][4];
    weights.fragments(w, a);
    uint4 next = *x;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      if (j * 8 >= live) break;
      unsigned b[2][2];
      Format::pair(next, b);
      if (j + 1 < N / 8) next = x[(j + 1) * 8 * kTileChunks];
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int m = 0; m < 2; ++m) ptx::mma_m16n8k16(d[m][j], a[m][s], b[s]);
    }
  }
}

template <class Format, int N, bool SwiGlu>
__global__ void __launch_bounds__(kTileThreads, 2) grouped_tile_kernel(Grouped p) {
  using Stage = TileStage<Format, N>;
  constexpr int kStages = kTileStages<Format, N>;
  constexpr int kOutRows = SwiGlu ? kTileRows / 2 : kTileRows, kPitch = kTileRows + 8;
  static_assert(N * kPitch * int(sizeof(bf16)) <= kStages * int(sizeof(Stage)));
  GPU_SHARED_DYNAMIC(shared, 16);
  auto* const stages = reinterpret_cast<Stage*>(shared);
  auto* const result = reinterpret_cast<bf16*>(shared);  // [N][kPitch], when the stages are done with
  auto* const table = reinterpret_cast<int*>(shared + kStages * sizeof(Stage));
  GPU_SHARED(part, int[kTileThreads / kWarp + 1]);
  GPU_SHARED(x_row, int[N]);
  GPU_SHARED(router_weight, float[N]);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int n_out = p.w[0].n_out, n_in = p.w[0].n_in, slabs = parts_of(n_in, kTileSlab);
  const int row_tiles = parts_of(n_out, kOutRows);
  const uint64_t policy = ptx::l2_policy(true);
  count_pieces<N, kTileThreads>(p, table, part);
  if (!SwiGlu) zero_rows_of_none(p);

  const int tiles = table[p.E] * row_tiles;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Piece piece = find_piece<N>(p, table, tile / row_tiles);
    const int row0 = tile % row_tiles * kOutRows;
    TileSource source{{}, {}, {}, n_out, n_in, false};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const Projection& w = p.w[SwiGlu ? m : 0];
      source.weight[m] = w.weight_of(piece.expert), source.scale[m] = w.scale_of(piece.expert);
      source.row[m] = row0 + (SwiGlu ? warp * 16 : warp * 32 + m * 16);
    }
    source.fast = Format::fast(source);

    __syncthreads();  // the tile before is stored
    for (int i = threadIdx.x; i < piece.rows; i += kTileThreads) {
      const int pair = p.pair ? p.pair[piece.first + i] : 0;
      x_row[i] = p.pair ? pair / p.K : piece.first + i;
      if (SwiGlu) router_weight[i] = p.weights[pair];
    }
    __syncthreads();

    const auto copy = [&](int slab) {
      if (slab < slabs) {
        Stage& stage = stages[slab % kStages];
        Format::copy(stage.weights, source, slab, policy);
        const int c = threadIdx.x % kTileChunks, k = slab * kTileSlab + c * 8;
        for (int i = threadIdx.x / kTileChunks; i < piece.rows; i += kTileThreads / kTileChunks) {
          const bf16* at = p.x + x_row[i] * p.x_stride + k;
          uint4* to = &stage.x[i][swizzled(i, c)];
          if (p.x_vector)
            ptx::cp_async16(to, k < n_in ? at : p.x, k < n_in ? 16 : 0);
          else
            *to = load8(at, n_in - k, false);
        }
      }
      ptx::cp_async_commit();
    };
    float d[2][N / 8][4] = {};
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) copy(s);
    for (int slab = 0; slab < slabs; ++slab) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      copy(slab + kStages - 1);
      multiply_slab<Format, N>(stages[slab % kStages], source, slab, piece.rows, d);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the stages are free for the result

#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = j * 8 + t * 2 + i % 2, r = i / 2 * 8 + g;
        if (n >= piece.rows) continue;
        if (SwiGlu)
          result[n * kPitch + warp * 16 + r] = to_bf16(silu(d[0][j][i]) * d[1][j][i] * router_weight[n]);
        else
#pragma unroll
          for (int m = 0; m < 2; ++m) result[n * kPitch + warp * 32 + m * 16 + r] = to_bf16(d[m][j][i]);
      }
    __syncthreads();
    constexpr int kChunks = kOutRows / 8;
    for (int i = threadIdx.x; i < piece.rows * kChunks; i += kTileThreads) {
      const int n = i / kChunks, r = i % kChunks * 8, valid = min(8, n_out - row0 - r);
      bf16* to = p.out + (piece.first + n) * p.out_stride + row0 + r;
      if (p.out_vector && valid == 8)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(result + n * kPitch + r);
      else
        for (int e = 0; e < valid; ++e) to[e] = result[n * kPitch + r + e];
    }
  }
}

template <class Format, int N, bool SwiGlu>
void launch_tiles(const Grouped& p, Stream stream) {
  constexpr int kRows = SwiGlu ? kTileRows / 2 : kTileRows;
  const int shared = tile_shared<Format, N>(p.E);
  const int64_t pieces = p.M / N + int64_t(std::min(p.E, p.M));
  const int resident =
      gpu::device().multiprocessors * std::max(1, gpu::device().shared_per_multiprocessor / (shared + 2048));
  const int64_t tiles = pieces * parts_of(p.w[0].n_out, kRows);
  gpu::launch(grouped_tile_kernel<Format, N, SwiGlu>, dim3(unsigned(std::min<int64_t>(tiles, resident))),
              dim3(kTileThreads), shared, stream, p);
}

}  // namespace kimi::cuda

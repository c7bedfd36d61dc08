// INT4 GEMM for at most eight rows of x an expert, where reading the weights is all: two times 16 weight rows a tile,
// in SwiGLU 16 of gate and the same 16 of up, whose inputs the four warps of a block share out in slabs of 256.
//
// A warp's weights come by cp.async, four slabs deep, and go on coming over the ends of experts and tiles. What a warp
// copies only it reads: nothing waits for the block but the sum over the warps at the end of a tile. x comes through
// the L1 cache, one half slab ahead of its use, each value to the one lane that needs it.
//
// Work is a struct of device functions:
//   int tiles(), segments()                     a tile sums over `segments` matrices, usually one
//   int n_in(), n_out()                         of each matrix
//   void source(tile, segment, m, weight, scale, row)   matrix and first row of the m16 tile m
//   const bf16* column(tile, segment, n)        row of x for column n, or null: a column of zeros
//   void store(tile, row, n, sums)              sums[m]: row `row` of 16 of the m16 tile m, column n of 8
#pragma once

#include "cuda/grouped.cuh"

namespace kimi::cuda {

constexpr int kStreamWarps = 4, kStreamThreads = kStreamWarps * kWarp, kStreamStages = 4;
constexpr int kStreamSlab = 256, kStreamTiles = 2, kStreamRows = 16, kStreamTokens = 8;
constexpr int kStreamPart = 2 * kStreamWarps * kStreamTiles * kStreamRows * kStreamTokens;  // floats

struct StreamStage {
  uint4 words[kStreamTiles][2][2][kWarp];    // [m16 tile][rows g, g + 8][half of the slab][lane]
  uint4 scales[kStreamTiles * kStreamRows];  // eight groups of each row
};

constexpr int kStreamShared = kStreamWarps * kStreamStages * int(sizeof(StreamStage));

// A slab of inputs of a segment of a tile. Warp w of a tile takes slabs w, w + 4, ... of its segments in a row.
struct Unit {
  int tile, segment, slab;
};

template <class Work>
class WeightStream {
 public:
  PTX_FN WeightStream(const Work& work, StreamStage* stages)
      : work_(work),
        stages_(stages + threadIdx.x / kWarp * kStreamStages),
        tiles_(work.tiles()),
        segments_(work.segments()),
        slabs_(parts_of(work.n_in(), kStreamSlab)),
        n_in_(work.n_in()),
        policy_(ptx::l2_policy(true)) {}

  // part: kStreamPart floats of shared memory, [2][kStreamWarps][kStreamTiles][kStreamRows, kStreamTokens]
  PTX_FN void run(float* part) {
    Unit now = settled({int(blockIdx.x), 0, warp()});
    ahead_ = now;
    enter_copy();
    for (int s = 0; s < kStreamStages - 1; ++s) copy(s);
    column_ = column_of(now);
    bool fast = fast_at(now);
    uint4 x[2][4];
    load_x(now, 0, x[0]);
    int stage = 0;
    for (int tile = blockIdx.x, turn = 0; tile < tiles_; tile += gridDim.x, turn ^= 1) {
      float d[kStreamTiles][4] = {};
      while (now.tile == tile) {
        ptx::cp_async_wait<kStreamStages - 2>();
        __syncwarp();  // the scales of this stage are there for all lanes, and the stage before is read
        copy((stage + kStreamStages - 1) % kStreamStages);
        load_x(now, 1, x[1]);
        multiply(now, 0, fast, stages_[stage], x[0], d);
        const Unit next = after(now);
        const bool entered = next.tile != now.tile || next.segment != now.segment;
        if (entered) column_ = column_of(next);
        load_x(next, 0, x[0]);
        multiply(now, 1, fast, stages_[stage], x[1], d);
        if (entered) fast = fast_at(next);
        now = next, stage = (stage + 1) % kStreamStages;
      }
      sum_warps(tile, part + turn * (kStreamPart / 2), d);
    }
    ptx::cp_async_wait<0>();
  }

 private:
  const Work& work_;
  StreamStage* const stages_;
  const int tiles_, segments_, slabs_, n_in_;
  const uint64_t policy_;
  const bf16* column_;  // of the unit whose x is loaded next
  Unit ahead_;          // the unit to copy next
  const unsigned char* words_[kStreamTiles][2];
  const bf16* scales_;
  bool fast_;

  static PTX_FN int warp() { return threadIdx.x / kWarp; }
  static PTX_FN int lane() { return threadIdx.x % kWarp; }

  PTX_FN Unit settled(Unit u) const {
    while (u.tile < tiles_) {
      while (u.slab >= slabs_ && u.segment < segments_) u.slab -= slabs_, ++u.segment;
      if (u.segment < segments_) break;
      u = {u.tile + int(gridDim.x), 0, warp()};
    }
    return u;
  }
  PTX_FN Unit after(Unit u) const { return settled({u.tile, u.segment, u.slab + kStreamWarps}); }

  PTX_FN const bf16* column_of(const Unit& u) const {
    return u.tile < tiles_ ? work_.column(u.tile, u.segment, lane() / 4) : nullptr;
  }

  // Weight row r of the m16 tile m, at the end of the matrix its last row, which is not stored.
  PTX_FN int64_t row_of(const Unit& u, int m, int r, const void*& weight, const bf16*& scale) const {
    int row;
    work_.source(u.tile, u.segment, m, weight, scale, row);
    return min(row + r, work_.n_out() - 1);
  }

  // Whether cp.async may copy the rows of this unit's matrices.
  PTX_FN bool fast_at(const Unit& u) const {
    bool fast = n_in_ % kStreamSlab == 0 && u.tile < tiles_;
#pragma unroll
    for (int m = 0; m < kStreamTiles && fast; ++m) {
      const void* weight;
      const bf16* scale;
      row_of(u, m, 0, weight, scale);
      fast = aligned(weight, 16) && aligned(scale, 16);
    }
    return fast;
  }

  PTX_FN void enter_copy() {
    if (ahead_.tile >= tiles_) return;
    const int g = lane() / 4, t = lane() % 4;
    const void* weight;
    const bf16* scale;
#pragma unroll
    for (int m = 0; m < kStreamTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = row_of(ahead_, m, g + 8 * i, weight, scale);
        words_[m][i] = static_cast<const unsigned char*>(weight) + row * (n_in_ / 2) + t * 16;
      }
    const int64_t row = row_of(ahead_, lane() / kStreamRows, lane() % kStreamRows, weight, scale);
    scales_ = scale + row * (n_in_ / kInt4Group);
    fast_ = fast_at(ahead_);
  }

  // The next unit to a stage; past the last one an empty group, so that the count of groups goes on.
  PTX_FN void copy(int stage) {
    if (ahead_.tile < tiles_) {
      if (fast_) {
        StreamStage& to = stages_[stage];
#pragma unroll
        for (int m = 0; m < kStreamTiles; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              ptx::cp_async16_under(policy_, &to.words[m][i][half][lane()],
                                    words_[m][i] + ahead_.slab * (kStreamSlab / 2) + half * (kStreamSlab / 4));
        ptx::cp_async_cached<16>(&to.scales[lane()], scales_ + ahead_.slab * (kStreamSlab / kInt4Group), true);
      }
      const Unit next = after(ahead_);
      const bool same = next.tile == ahead_.tile && next.segment == ahead_.segment;
      ahead_ = next;
      if (!same) enter_copy();
    }
    ptx::cp_async_commit();
  }

  // The 32 inputs of this lane's column and group; n_in is a whole number of groups.
  PTX_FN void load_x(const Unit& u, int half, uint4 (&x)[4]) const {
    const int k = u.slab * kStreamSlab + half * (kStreamSlab / 2) + lane() % 4 * kInt4Group;
    const bool any = u.tile < tiles_ && column_ && k < n_in_;
    if (work_.x_vector()) {
      const auto* at = reinterpret_cast<const uint4*>(any ? column_ + k : nullptr);
#pragma unroll
      for (int w = 0; w < 4; ++w) x[w] = any ? at[w] : uint4{0, 0, 0, 0};
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) x[w] = load8(any ? column_ + k + 8 * w : nullptr, any ? 8 : 0, false);
    }
  }

  PTX_FN void multiply(const Unit& u, int half, bool fast, const StreamStage& stage, const uint4 (&x)[4],
                       float (&d)[kStreamTiles][4]) const {
    const int g = lane() / 4, t = lane() % 4;
    uint4 words[kStreamTiles][2];
    unsigned scales[kStreamTiles][2];
#pragma unroll
    for (int m = 0; m < kStreamTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (fast) {
          words[m][i] = stage.words[m][i][half][lane()];
          const auto* row = reinterpret_cast<const bf16*>(&stage.scales[m * kStreamRows + 8 * i + g]);
          scales[m][i] = both_halves(row[half * 4 + t]);
        } else {
          const void* weight;
          const bf16* scale;
          const int64_t row = row_of(u, m, g + 8 * i, weight, scale);
          const int groups = n_in_ / kInt4Group;
          load_group(static_cast<const int32_t*>(weight) + row * groups * 4, scale + row * groups,
                     u.slab * 8 + half * 4 + t, groups, words[m][i], scales[m][i]);
        }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      unsigned b[2][2];
      pair_like_int4(x[w], b);
#pragma unroll
      for (int m = 0; m < kStreamTiles; ++m) {
        unsigned low[4], high[4];
        dequantize(word_of(words[m][0], w), scales[m][0], low);
        dequantize(word_of(words[m][1], w), scales[m][1], high);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const unsigned a[4] = {low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]};
          ptx::mma_m16n8k16(d[m], a, b[s]);
        }
      }
    }
  }

  // Adds the warps in their order. `part` is another one at the next tile, so one barrier does.
  PTX_FN void sum_warps(int tile, float* part, const float (&d)[kStreamTiles][4]) const {
    constexpr int kTile = kStreamRows * kStreamTokens;
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int m = 0; m < kStreamTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float2*>(part + (warp() * kStreamTiles + m) * kTile + (g + 8 * i) * kStreamTokens + 2 * t) = {
            d[m][2 * i], d[m][2 * i + 1]};
    __syncthreads();
    const int row = threadIdx.x % kStreamRows, n = threadIdx.x / kStreamRows;
    float sums[kStreamTiles] = {};
#pragma unroll
    for (int w = 0; w < kStreamWarps; ++w)
#pragma unroll
      for (int m = 0; m < kStreamTiles; ++m) sums[m] += part[(w * kStreamTiles + m) * kTile + row * kStreamTokens + n];
    work_.store(tile, row, n, sums);
  }
};

// The pieces of eight rows that a table of offsets gives, times all rows of their expert's matrices.
template <bool SwiGlu>
struct PieceWork {
  static constexpr int kRows = SwiGlu ? kStreamRows : kStreamTiles * kStreamRows;  // of the output, a tile
  const Grouped& p;
  const int* table;
  int row_tiles;

  PTX_FN int tiles() const { return table[p.E] * row_tiles; }
  PTX_FN int segments() const { return 1; }
  PTX_FN int n_in() const { return p.w[0].n_in; }
  PTX_FN int n_out() const { return p.w[0].n_out; }
  PTX_FN bool x_vector() const { return p.x_vector; }
  PTX_FN Piece piece(int tile) const { return find_piece<kStreamTokens>(p, table, tile / row_tiles); }

  PTX_FN void source(int tile, int, int m, const void*& weight, const bf16*& scale, int& row) const {
    const int e = piece(tile).expert;
    const Projection& w = p.w[SwiGlu ? m : 0];
    weight = w.weight_of(e), scale = w.scale_of(e);
    row = tile % row_tiles * kRows + (SwiGlu ? 0 : m * kStreamRows);
  }
  PTX_FN const bf16* column(int tile, int, int n) const {
    const Piece at = piece(tile);
    if (n >= at.rows) return nullptr;
    return p.x + (p.pair ? p.pair[at.first + n] / p.K : at.first + n) * p.x_stride;
  }
  PTX_FN void store(int tile, int r, int n, const float (&sums)[kStreamTiles]) const {
    const Piece at = piece(tile);
    const int row = tile % row_tiles * kRows + r;
    if (n >= at.rows) return;
    bf16* out = p.out + (at.first + n) * p.out_stride + row;
    if constexpr (SwiGlu) {
      if (row < n_out()) out[0] = to_bf16(silu(sums[0]) * sums[1] * p.weights[p.pair[at.first + n]]);
    } else {
      if (row < n_out()) out[0] = to_bf16(sums[0]);
      if (row + kStreamRows < n_out()) out[kStreamRows] = to_bf16(sums[1]);
    }
  }
};

template <bool SwiGlu>
__global__ void __launch_bounds__(kStreamThreads, 2) grouped_stream_kernel(Grouped p) {
  using Work = PieceWork<SwiGlu>;
  GPU_SHARED_DYNAMIC(shared, 16);
  GPU_SHARED(scan, int[kStreamWarps + 1]);
  GPU_SHARED(part, float[kStreamPart]);
  auto* const table = reinterpret_cast<int*>(shared + kStreamShared);
  count_pieces<kStreamTokens, kStreamThreads>(p, table, scan);
  if (!SwiGlu) zero_rows_of_none(p);
  const Work work{p, table, parts_of(p.w[0].n_out, Work::kRows)};
  WeightStream<Work>(work, reinterpret_cast<StreamStage*>(shared)).run(part);
}

// Blocks that fit the chip at once, at most as many as there are tiles; each has 14 KB of shared memory beside
// `shared`.
inline dim3 stream_grid(int64_t tiles, int shared) {
  const int fit = gpu::device().shared_per_multiprocessor / (shared + (14 << 10));
  return dim3(unsigned(std::min<int64_t>(tiles, int64_t(gpu::device().multiprocessors) * std::max(fit, 1))));
}

template <bool SwiGlu>
void launch_stream(const Grouped& p, Stream stream) {
  const int shared = kStreamShared + (p.E + 1) * 4;
  const int64_t pieces = p.M / kStreamTokens + int64_t(std::min(p.E, p.M));
  gpu::launch(grouped_stream_kernel<SwiGlu>,
              stream_grid(pieces * parts_of(p.w[0].n_out, PieceWork<SwiGlu>::kRows), shared), dim3(kStreamThreads),
              shared, stream, p);
}

}  // namespace kimi::cuda

#include "ops/mla_prefill.h"

#include <algorithm>

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

using Params = MlaPrefillParams<bf16>;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Consecutive queries of one sequence and the keys they may see.
struct Queries {
  int first, count;  // rows of q; none if count is 0
  int key, keys;     // rows of kv
  int visible;       // keys that query `first` sees, where positive; each later one sees one more, up to `keys`
  bool bad;          // the keys do not exist: the results are NaN

  PTX_FN int sees(int i) const { return min(max(visible + i, 0), keys); }
  // The keys that any of n queries from i on sees.
  PTX_FN int any_sees(int i, int n) const { return i < count ? sees(min(i + n, count) - 1) : 0; }
};

// The block of at most `rows` queries with this number, blocks counted sequence by sequence. A sequence whose queries
// do not exist has none. The whole warp; every lane gets the result.
PTX_FN Queries find_queries(const Params& p, int rows, int number) {
  const int lane = threadIdx.x % kWarp;
  for (int base = 0; base < p.B; base += kWarp) {
    const int b = base + lane;
    int first = 0, count = 0;
    if (b < p.B) {
      const int begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
      if (0 <= begin && begin <= end && end <= p.T) first = begin, count = end - begin;
    }
    const unsigned blocks = unsigned(count + rows - 1) / rows;
    unsigned sum = blocks;  // over this and the lower lanes
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const unsigned below = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += below;
    }
    const unsigned block = unsigned(number) - (sum - blocks);
    const unsigned hits = __ballot_sync(~0u, block < blocks);
    if (!hits) {
      number -= int(__shfl_sync(~0u, sum, kWarp - 1));
      continue;
    }
    const int hit = __ffs(int(hits)) - 1, begin = int(__shfl_sync(~0u, block, hit)) * rows;
    first = __shfl_sync(~0u, first, hit) + begin, count = __shfl_sync(~0u, count, hit) - begin;
    const int sequence = base + hit, key = p.cu_seqlens_k[sequence], end = p.cu_seqlens_k[sequence + 1];
    const bool bad = !(0 <= key && key <= end && end <= p.S);
    const int keys = bad ? 0 : end - key;
    const int64_t visible = int64_t(begin) + p.causal_offsets[sequence] + 1;
    return {first, min(count, rows), bad ? 0 : key, keys, int(max(int64_t(-rows), min(visible, int64_t(keys)))), bad};
  }
  return {};
}

// How a query's result over these keys joins what `lse_before` belongs to: out = here * sum(weights * values) +
// before * out_before. The largest score is given times log2(e), sum is of exp(score - largest).
struct Join {
  float here, before, lse;
};
PTX_FN Join join(float largest, float sum, float lse_before) {
  const float lse = sum == 0 ? -INFINITY : (largest + log2f(sum)) * kLn2, scale = sum == 0 ? 0.0f : 1.0f / sum;
  if (lse_before == -INFINITY) return {scale, 0, lse};
  const float top = fmaxf(lse, lse_before);
  const float here = ptx::exp2_approx((lse - top) * kLog2E), before = ptx::exp2_approx((lse_before - top) * kLog2E);
  const float total = here + before;
  return {scale * here / total, before / total, top + log2f(total) * kLn2};
}

// The largest score, joined with what was held. A weight of NaN, whose score is NaN or +inf, makes the sum NaN.
PTX_FN float join_largest(float largest, float sum, float held) {
  if (sum != sum) largest = sum;
  return held > largest || held != held ? held : largest;
}

// Any shape: a block a query and head, 128 keys at a time, a thread a key for the scores and a column for the values.
// Columns past the first pass compute the scores again.
__global__ void __launch_bounds__(kThreads) mla_prefill_plain_kernel(Params p) {
  constexpr int kPerThread = 4;  // columns
  GPU_SHARED(weight, float[kThreads]);
  GPU_SHARED(part, float[kWarps]);
  const int n = blockIdx.x % p.N, width = p.Dn + p.R;
  const Queries at = find_queries(p, 1, blockIdx.x / p.N);
  if (at.count == 0) return;
  const int keys = at.sees(0);
  const int64_t row = int64_t(at.first) * p.N + n;
  const bf16* q = p.q + at.first * p.q_stride_t + n * p.q_stride_n;
  const float scale = p.scale * kLog2E, lse_before = p.continue_state ? p.lse[row] : -INFINITY;
  Join joined{};

  for (int pass = 0; pass < p.Dv; pass += kThreads * kPerThread) {
    float value[kPerThread] = {}, largest = -INFINITY, sum = at.bad ? NAN : 0.0f;
    for (int first = 0; first < keys; first += kThreads) {
      const int count = min(kThreads, keys - first);
      float score = -INFINITY;
      if (int(threadIdx.x) < count) {
        const int64_t key = at.key + first + threadIdx.x;
        const bf16 *nope = p.kv + key * p.kv_stride_s + n * p.kv_stride_n, *pe = p.k_pe + key * p.k_pe_stride;
        score = 0;
        for (int i = 0; i < p.Dn; ++i) score += to_float(q[i]) * to_float(nope[i]);
        for (int i = p.Dn; i < width; ++i) score += to_float(q[i]) * to_float(pe[i - p.Dn]);
        score *= scale;
      }
      // its barriers also part the weights of this tile from the use of those of the last
      const float top = fmaxf(largest, block_reduce<kThreads>(score, -INFINITY, part, Max()));
      const float base = top == -INFINITY ? 0.0f : top, shrink = ptx::exp2_approx(largest - base);
      weight[threadIdx.x] = int(threadIdx.x) < count ? ptx::exp2_approx(score - base) : 0.0f;
      sum = sum * shrink + block_reduce<kThreads>(weight[threadIdx.x], 0.0f, part, Add());
      largest = top;
      for (int c = 0; c < kPerThread; ++c) {
        const int column = pass + c * kThreads + threadIdx.x;
        value[c] *= shrink;
        if (column >= p.Dv) continue;
        const bf16* v = p.kv + (at.key + first) * p.kv_stride_s + n * p.kv_stride_n + p.Dn + column;
        for (int j = 0; j < count; ++j) value[c] += weight[j] * to_float(v[j * p.kv_stride_s]);
      }
    }
    joined = join(largest == -INFINITY ? 0.0f : largest, sum, lse_before);
    if (p.max_logits && pass == 0 && threadIdx.x == 0)
      p.max_logits[row] = join_largest(largest * kLn2, sum, p.continue_state ? p.max_logits[row] : -INFINITY);
    for (int c = 0; c < kPerThread; ++c) {
      const int column = pass + c * kThreads + threadIdx.x;
      if (column >= p.Dv) continue;
      bf16* out = p.out + row * p.Dv + column;
      *out = to_bf16(joined.here * value[c] + (joined.before != 0 ? joined.before * to_float(*out) : 0.0f));
    }
  }
  __syncthreads();  // before lse changes that all have read
  if (threadIdx.x == 0) p.lse[row] = joined.lse;
}

// ---- the model's head sizes, by tensor cores ----
// A block takes 128 queries of one head, each of its 4 warps 32 of them, and 64 keys at a time. Those come as chunks of
// 64 columns through a ring of buffers: k_nope in two chunks, k_pe in one, v in two.
constexpr int kRows = 128, kWarpRows = kRows / kWarps, kKeys = 64;
constexpr int kDn = 128, kR = 64, kDv = 128;
constexpr int kColumns = 64, kKeyChunks = (kDn + kR) / kColumns, kChunks = kKeyChunks + kDv / kColumns;
constexpr int kStages = 4;

// Rows of kv or k_pe for the keys of a block.
struct Source {
  const bf16* data;
  int64_t stride;
};

// What a block works on, in shared memory: registers are short.
struct Block {
  Queries at;
  int n, keys;  // head, keys that any query sees
  Source kv, k_pe;
};

// Tiles of rows of 64 columns, 128 bytes, in dynamic shared memory: q by chunks, then the ring. Places are in bytes.
constexpr int kRowBytes = kColumns * sizeof(bf16), kSlotBytes = kKeys * kRowBytes,
              kQBytes = kKeyChunks * kRows * kRowBytes;
constexpr int kSharedBytes = kQBytes + kStages * kSlotBytes;

// The place of 8 columns in a tile: permuted, so that the same columns of 8 rows lie in different banks. Those of
// column group `eight ^ i`, for an i of 0 to 7, lie at the place ^ 16 i.
PTX_FN int tile_at(int row, int eight) { return row * kRowBytes + (eight ^ row % 8) * 16; }

// Rows past `rows` become zero: a weight of 0 times what lies there must be 0.
template <int Rows>
PTX_FN void load_tile(unsigned char* tile, const bf16* from, int64_t stride, int rows) {
  const int row = threadIdx.x / 8, eight = threadIdx.x % 8;
  from += row * stride + eight * 8, rows -= row;
#pragma unroll
  for (int i = 0; i < Rows; i += kThreads / 8)
    ptx::cp_async16(tile + tile_at(row, eight) + i * kRowBytes, from + i * stride, i < rows ? 16 : 0);
}

// score += q k^T over one chunk. The lane's part of score[m][j]: queries 16 m + lane / 4 and + 8, keys
// 8 j + lane % 4 * 2 and + 1.
PTX_FN void add_scores(float (&score)[2][8][4], const unsigned char* memory, int q, int k) {
  const int lane = threadIdx.x % kWarp;
  q += tile_at(lane % 16, lane / 16), k += tile_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int i = 0; i < kColumns / 16; ++i) {
    unsigned a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4(a[m], memory + (q ^ 32 * i) + m * 16 * kRowBytes);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      unsigned r[4];
      ptx::ldmatrix_x4(r, memory + (k ^ 32 * i) + j * 8 * kRowBytes);
#pragma unroll
      for (int m = 0; m < 2; ++m)
        ptx::mma_m16n8k16(score[m][j], a[m], {r[0], r[1]}), ptx::mma_m16n8k16(score[m][j + 1], a[m], {r[2], r[3]});
    }
  }
}

// value += weight v over one chunk. value[m][j]: queries as for the scores, columns 8 j + lane % 4 * 2 and + 1.
PTX_FN void add_values(float (&value)[2][8][4], const unsigned (&weight)[2][4][4], const unsigned char* memory, int v) {
  const int lane = threadIdx.x % kWarp;
  v += tile_at(lane % 16, lane / 16);
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      unsigned r[4];
      ptx::ldmatrix_x4_trans(r, memory + (v ^ 16 * j) + i * 16 * kRowBytes);
#pragma unroll
      for (int m = 0; m < 2; ++m)
        ptx::mma_m16n8k16(value[m][j], weight[m][i], {r[0], r[1]}),
            ptx::mma_m16n8k16(value[m][j + 1], weight[m][i], {r[2], r[3]});
    }
}

// The running softmax of a lane's four rows [m][h]: queries 16 m + 8 h + lane / 4.
struct Softmax {
  float largest[2][2];  // score
  float sum;            // of the weights of the row that is this lane's own: m = lane % 4 / 2, h = lane % 2
};

// The scores of queries from `row` on against keys from `key` on that they do not see become -inf.
PTX_FN void hide(float (&score)[2][8][4], const Queries& at, int row, int key) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (key + 8 * j + lane % 4 * 2 + i % 2 >= at.sees(row + 16 * m + i / 2 * 8 + lane / 4))
          score[m][j][i] = -INFINITY;
}

// Scores become weights, as bf16 in the layout of an mma operand; values so far shrink by what the largest score grew.
PTX_FN void weigh(float (&score)[2][8][4], float scale, Softmax& s, float (&value)[2][2][8][4],
                  unsigned (&weight)[2][4][4]) {
  const int lane = threadIdx.x % kWarp;
  float shrink[2][2], sum[2][2] = {};
  bool grew = false;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s.largest[m][h];
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(score[m][j][2 * h], score[m][j][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.0f : top * scale;
      shrink[m][h] = ptx::exp2_approx(s.largest[m][h] * scale - base);
      grew |= top != s.largest[m][h];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float low = ptx::exp2_approx(fmaf(score[m][j][2 * h], scale, -base));
        const float high = ptx::exp2_approx(fmaf(score[m][j][2 * h + 1], scale, -base));
        sum[m][h] += low + high;
        weight[m][j / 2][j % 2 * 2 + h] = ptx::pack_bf16(low, high);
      }
      s.largest[m][h] = top;
    }
  float half[2];  // sums over pairs of lanes, then over the four of a row
#pragma unroll
  for (int m = 0; m < 2; ++m)
    half[m] = (lane % 2 ? sum[m][1] : sum[m][0]) + __shfl_xor_sync(~0u, lane % 2 ? sum[m][0] : sum[m][1], 1);
  const float own = (lane & 2 ? half[1] : half[0]) + __shfl_xor_sync(~0u, lane & 2 ? half[0] : half[1], 2);
  const float own_shrink =
      lane & 2 ? (lane % 2 ? shrink[1][1] : shrink[1][0]) : (lane % 2 ? shrink[0][1] : shrink[0][0]);
  s.sum = s.sum * own_shrink + own;
  if (!__any_sync(~0u, grew)) return;
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) value[c][m][j][i] *= shrink[m][i / 2];
}

// Joins the warp's results with what was there, and writes them in rows of 16 bytes a lane.
PTX_FN void store_values(const Params& p, const Queries& at, int n, int row, float scale, const Softmax& s,
                         const float (&value)[2][2][8][4], unsigned char* memory) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + 16 * m + 8 * h + lane / 4;
      const int64_t place = (int64_t(at.first) + i) * p.N + n;
      const bool inside = i < at.count, speaks = inside && lane % 4 == 0;  // for the four lanes of the row
      float sum = __shfl_sync(~0u, s.sum, lane / 4 * 4 + 2 * m + h);
      if (at.bad) sum = NAN;
      float lse = p.continue_state && speaks ? p.lse[place] : -INFINITY;
      lse = __shfl_sync(~0u, lse, lane / 4 * 4);
      const Join joined = join(sum == 0 ? 0.0f : s.largest[m][h] * scale, sum, lse);
      if (speaks) p.lse[place] = joined.lse;
      if (speaks && p.max_logits)
        p.max_logits[place] =
            join_largest(s.largest[m][h] * p.scale, sum, p.continue_state ? p.max_logits[place] : -INFINITY);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int column = lane % 4 * 2;
          float low = joined.here * value[c][m][j][2 * h], high = joined.here * value[c][m][j][2 * h + 1];
          if (joined.before != 0 && inside) {
            const bf16* before = p.out + place * kDv + c * kColumns + 8 * j + column;
            low += joined.before * to_float(before[0]), high += joined.before * to_float(before[1]);
          }
          *reinterpret_cast<unsigned*>(memory + c * kRows * kRowBytes + tile_at(i, j) + column * 2) =
              ptx::pack_bf16(low, high);
        }
    }
  __syncwarp();
  for (int k = lane; k < kWarpRows * kDv / 8; k += kWarp) {
    const int i = row + k / (kDv / 8), eight = k % (kDv / 8);
    if (i >= at.count) continue;
    const int64_t place = (int64_t(at.first) + i) * p.N + n;
    *reinterpret_cast<uint4*>(p.out + place * kDv + eight * 8) =
        *reinterpret_cast<const uint4*>(memory + eight / 8 * kRows * kRowBytes + tile_at(i, eight % 8));
  }
}

__global__ void __launch_bounds__(kThreads, 2) mla_prefill_kernel(Params p, float scale) {
  GPU_SHARED_DYNAMIC(memory, 128);
  GPU_SHARED(block, Block);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = warp * kWarpRows;
  if (warp == 0) {
    const int n = blockIdx.x % p.N;
    const Queries at = find_queries(p, kRows, gridDim.x / p.N - 1 - blockIdx.x / p.N);  // most keys first
    if (lane == 0)
      block = {at,
               n,
               at.sees(at.count - 1),
               {p.kv + at.key * p.kv_stride_s + n * p.kv_stride_n, p.kv_stride_s},
               {p.k_pe + at.key * p.k_pe_stride, p.k_pe_stride}};
  }
  __syncthreads();
  const Queries& at = block.at;
  if (at.count == 0) return;

  const auto slot = [](int tile, int chunk) { return kQBytes + (tile * kChunks + chunk) % kStages * kSlotBytes; };
  const auto load = [&](int tile, int chunk) {
    const int rows = block.keys - tile * kKeys;
    if (rows > 0) {
      const bool pe = chunk == kKeyChunks - 1;
      const Source& from = pe ? block.k_pe : block.kv;
      const int64_t first = int64_t(tile) * kKeys * from.stride;
      const int column = pe ? 0 : (chunk < kKeyChunks ? chunk : chunk - 1) * kColumns;
      load_tile<kKeys>(memory + slot(tile, chunk), from.data + first + column, from.stride, rows);
    }
    ptx::cp_async_commit();  // also an empty group: they are counted
  };
  // Waits for a chunk and orders the one that takes the buffer of the chunk before it.
  const auto take = [&](int tile, int chunk) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the chunk is there for all, and nobody still reads the buffer that is loaded next
    load(tile + (chunk + kStages - 1) / kChunks, (chunk + kStages - 1) % kChunks);
    return slot(tile, chunk);
  };
  const bf16* q = p.q + at.first * p.q_stride_t + block.n * p.q_stride_n;
  for (int c = 0; c < kKeyChunks; ++c)
    load_tile<kRows>(memory + c * kRows * kRowBytes, q + c * kColumns, p.q_stride_t, at.count);
  for (int c = 0; c < kStages - 1; ++c) load(0, c);

  float value[2][2][8][4] = {};
  Softmax s{{{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, 0};
  int tile = 0;
  for (; tile * kKeys < at.any_sees(row, kWarpRows); ++tile) {
    float score[2][8][4] = {};
    unsigned weight[2][4][4];
#pragma unroll
    for (int c = 0; c < kKeyChunks; ++c) {
      const int k = take(tile, c);
      add_scores(score, memory, (c * kRows + row) * kRowBytes, k);
    }
    if ((tile + 1) * kKeys > at.sees(row)) hide(score, at, row, tile * kKeys);
    weigh(score, scale, s, value, weight);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int v = take(tile, kKeyChunks + c);
      add_values(value[c], weight, memory, v);
    }
  }
  for (; tile * kKeys < block.keys; ++tile)  // no query of this warp sees these keys, but others' do: it only loads
    for (int c = 0; c < kChunks; ++c) take(tile, c);
  ptx::cp_async_wait<0>();
  __syncthreads();  // q is there in any case: its rows are this warp's place to order the results
  store_values(p, at, block.n, row, scale, s, value, memory);
}

}  // namespace

void mla_prefill(const Params& p, Stream stream) {
  const bool fast = p.Dn == kDn && p.R == kR && p.Dv == kDv && p.scale > 0 && aligned16(p.q) && aligned16(p.kv) &&
                    aligned16(p.k_pe) && aligned16(p.out) && p.q_stride_t % 8 == 0 && p.q_stride_n % 8 == 0 &&
                    p.kv_stride_s % 8 == 0 && p.kv_stride_n % 8 == 0 && p.k_pe_stride % 8 == 0;
  if (fast) {
    const int blocks = p.T / kRows + std::min(p.T, p.B);  // each sequence has one that is not full at most
    gpu::launch(mla_prefill_kernel, dim3(unsigned(blocks) * p.N), dim3(kThreads), kSharedBytes, stream, p,
                p.scale * kLog2E);
  } else {
    gpu::launch(mla_prefill_plain_kernel, dim3(unsigned(p.T) * p.N), dim3(kThreads), 0, stream, p);
  }
}

}  // namespace kimi::cuda

#include "ops/mla_prefill_backward.h"

#include <utility>

#include "core/parallel.h"
#include "cpu/attend.h"
#include "ops/mla_prefill.h"

namespace kimi::cpu {
namespace {

using Params = MlaPrefillBackwardParams;

constexpr int kMaxQueries = 64, kMaxBlockKeys = 64;
constexpr int kQueryFloats = 64 * 834, kKeyFloats = 64 * 320;  // of a block with the model's heads: all stays in L2
constexpr int kMaxQueryFloats = kLanes * 3 * (kMaxMlaPrefillWidth + kStrip);  // of one strip of the widest heads
static_assert(kQueryFloats <= kMaxQueryFloats && kMaxMlaPrefillWidth <= kKeyFloats);

int whole_strips(int n) { return (n + kStrip - 1) / kStrip * kStrip; }

// out[c / kStrip][t][c % kStrip] = x[t][c] for t < count, c < columns; zero up to `rows` and whole strips.
void split_columns(const float* x, int64_t x_stride, int count, int columns, int rows, float* out) {
  if (count < rows || columns % kStrip) std::fill_n(out, whole_strips(columns) * rows, 0.0f);
  for (int t = 0; t < count; t++)
    for (int c = 0; c < columns; c += kStrip)
      std::copy_n(x + t * x_stride + c, std::min(kStrip, columns - c), out + c * rows + t * kStrip);
}

float dot(const float* a, const float* b, int n) {
  float sums[kLanes] = {}, total = 0;  // many at once: one alone would wait for each addition
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int r = 0; r < kLanes; r++) sums[r] += a[i + r] * b[i + r];
  for (; i < n; i++) sums[i % kLanes] += a[i] * b[i];
  for (const float sum : sums) total += sum;
  return total;
}

// A block of queries of one head, in the two forms that the products want: by lanes for those with keys and values, and
// in strips of columns for the sums over queries.
struct Queries {
  int size;                        // of the block: whole strips of kLanes
  float *q, *dq, *dout;            // [size / kLanes][key_dim or Dv][kLanes]
  float *nope, *pe, *dout_strips;  // [columns / kStrip][size][kStrip] of q and of dout
  float *lse, *mean;               // [size] to base 2; dout . out

  static int64_t floats(const Params& p) {  // of one query
    const int key_dim = p.Dn + p.R;
    return 2 * key_dim + p.Dv + whole_strips(p.Dn) + whole_strips(p.R) + whole_strips(p.Dv) + 2;
  }

  Queries(const Params& p, int queries, float* at) : size(queries) {
    const auto take = [&](int columns) { return std::exchange(at, at + columns * size); };
    q = take(p.Dn + p.R), dq = take(p.Dn + p.R), dout = take(p.Dv);
    nope = take(whole_strips(p.Dn)), pe = take(whole_strips(p.R)), dout_strips = take(whole_strips(p.Dv));
    lse = take(1), mean = take(1);
  }

  // Queries [first, first + count) of head n; the gradient of q begins at 0.
  void load(const Kernels& k, const Params& p, int64_t first, int count, int n) const {
    const int key_dim = p.Dn + p.R;
    const int64_t stride = int64_t(p.N) * p.Dv;
    const float* q_rows = p.q + first * p.q_stride_t + n * p.q_stride_n;
    const float *dout_rows = p.dout + first * stride + n * p.Dv, *out_rows = p.out + first * stride + n * p.Dv;
    std::fill_n(q, key_dim * size, 0.0f), std::fill_n(dq, key_dim * size, 0.0f), std::fill_n(dout, p.Dv * size, 0.0f);
    for (int i = 0; i < count; i += kLanes) {
      const int rows = std::min(kLanes, count - i);
      k.attention->transpose(q_rows + i * p.q_stride_t, p.q_stride_t, rows, key_dim, q + i * key_dim, kLanes);
      k.attention->transpose(dout_rows + i * stride, stride, rows, p.Dv, dout + i * p.Dv, kLanes);
    }
    split_columns(q_rows, p.q_stride_t, count, p.Dn, size, nope);
    split_columns(q_rows + p.Dn, p.q_stride_t, count, p.R, size, pe);
    split_columns(dout_rows, stride, count, p.Dv, size, dout_strips);
    std::fill_n(lse, size, 0.0f), std::fill_n(mean, size, 0.0f);
    for (int i = 0; i < count; i++) {
      const float natural = p.lse[(first + i) * p.N + n];
      lse[i] = natural == -kInfinity ? 0.0f : natural * kLog2E;
      mean[i] = dot(dout_rows + i * stride, out_rows + i * stride, p.Dv);
    }
  }

  void store(const Kernels& k, const Params& p, int64_t first, int count, int n) const {
    const int key_dim = p.Dn + p.R;
    const int64_t stride = int64_t(p.N) * key_dim;
    float* rows = p.dq + first * stride + n * key_dim;
    for (int i = 0; i < count; i += kLanes)
      k.attention->transpose(dq + i * key_dim, kLanes, key_dim, std::min(kLanes, count - i), rows + i * stride, stride);
  }
};

// Weights and gradients of scores of a block of queries and a block of keys. Keys from seen[s] on are seen by no query
// of strip s: there they are not written.
struct Products {
  alignas(64) float weights[kMaxBlockKeys * kMaxQueries], dscores[kMaxBlockKeys * kMaxQueries];  // [keys][size]
  int seen[kMaxQueries / kLanes];                                                                // ascending

  // rows[j][c] += sum over queries of x[j][query] * strips[query][c] for c < columns, j < seen[last]
  void add(const Kernels& k, const Queries& queries, const float* x, const float* strips, int columns, float* rows,
           int64_t stride) const {
    const int size = queries.size;
    for (int c = 0; c < columns; c += kStrip) {
      alignas(64) float sums[kMaxBlockKeys * kStrip] = {};
      int j = 0;
      for (int s = 0; s < size / kLanes; j = seen[s], s++)  // keys that the strips from s on see
        k.gemm->multiply(x + j * size + s * kLanes, size, seen[s] - j, strips + c * size + s * kLanes * kStrip,
                         size - s * kLanes, sums + j * kStrip, kStrip);
      for (int i = 0; i < j; i++)
        k.add_scaled(rows + i * stride + c, 1.0f, sums + i * kStrip, std::min(kStrip, columns - c));
    }
  }
};

// Head n of sequence b. Its gradients of k_pe go to the workspace.
void head_backward(const Kernels& k, const Params& p, int b, int n, int block_queries, int block_keys) {
  alignas(64) float scratch[kMaxQueryFloats], panel[kKeyFloats];
  alignas(64) float scores[kMaxBlockKeys * kLanes], dweights[kMaxBlockKeys * kLanes];
  Products products;
  const Queries block(p, block_queries, scratch);
  const int key_dim = p.Dn + p.R, width = key_dim + p.Dv;
  const int64_t stride = int64_t(p.N) * (p.Dn + p.Dv);
  const int64_t key_start = p.cu_seqlens_k[b], key_count = p.cu_seqlens_k[b + 1] - key_start;
  const float* kv = p.kv + key_start * p.kv_stride_s + n * p.kv_stride_n;
  const float* k_pe = p.k_pe + key_start * p.k_pe_stride;
  float* dkv = p.dkv + key_start * stride + n * (p.Dn + p.Dv);
  float* dk_pe = p.workspace + (int64_t(n) * p.S + key_start) * p.R;
  for (int64_t j = 0; j < key_count; j++) std::fill_n(dkv + j * stride, p.Dn + p.Dv, 0.0f);
  std::fill_n(dk_pe, key_count * p.R, 0.0f);
  float ones[kLanes];
  std::fill_n(ones, kLanes, 1.0f);

  for (int begin = p.cu_seqlens_q[b]; begin < p.cu_seqlens_q[b + 1]; begin += block.size) {
    const int count = std::min(block.size, p.cu_seqlens_q[b + 1] - begin);
    const int64_t visible = int64_t(begin) - p.cu_seqlens_q[b] + p.causal_offsets[b] + 1;
    const auto limit = [&](int i) { return i < count ? std::clamp<int64_t>(visible + i, 0, key_count) : 0; };
    block.load(k, p, begin, count, n);
    for (int64_t j0 = 0; j0 < limit(count - 1); j0 += block_keys) {
      const int keys = int(std::min<int64_t>(block_keys, limit(count - 1) - j0));
      for (int j = 0; j < keys; j++) {
        const float* row = kv + (j0 + j) * p.kv_stride_s;
        float* to = std::copy_n(row, p.Dn, panel + j * width);
        std::copy_n(row + p.Dn, p.Dv, std::copy_n(k_pe + (j0 + j) * p.k_pe_stride, p.R, to));
      }
      for (int s = 0; s < block.size / kLanes; s++) {
        const int first = s * kLanes, last = std::min(first + kLanes, count) - 1;
        const int seen = products.seen[s] = int(std::clamp<int64_t>(limit(last) - j0, 0, keys));
        k.attention->scores(block.q + first * key_dim, panel, width, seen, key_dim, p.scale * kLog2E, scores);
        for (int r = 0; r < kLanes; r++)
          for (int64_t j = std::max<int64_t>(0, limit(first + r) - j0); j < seen; j++)
            scores[j * kLanes + r] = -kInfinity;
        k.attention->scores(block.dout + first * p.Dv, panel + key_dim, width, seen, p.Dv, 1.0f, dweights);
        k.attention->soften_backward(scores, dweights, seen, block.lse + first, block.mean + first, p.scale,
                                     products.weights + first, products.dscores + first, block.size);
        k.attention->add_values(dweights, panel, width, seen, key_dim, ones, block.dq + first * key_dim);
      }
      float* rows = dkv + j0 * stride;
      products.add(k, block, products.dscores, block.nope, p.Dn, rows, stride);
      products.add(k, block, products.dscores, block.pe, p.R, dk_pe + j0 * p.R, p.R);
      products.add(k, block, products.weights, block.dout_strips, p.Dv, rows + p.Dn, stride);
    }
    block.store(k, p, begin, count, n);
  }
}

}  // namespace

// The gradient of k_pe by each head, [N, S, R].
size_t mla_prefill_backward_workspace(const Params& p) { return size_t(p.N) * p.S * p.R; }

void mla_prefill_backward(const Params& p) {
  const Kernels& k = kernels();
  const int strips = std::max<int>(1, kQueryFloats / (kLanes * Queries::floats(p)));
  const int queries = std::min(kMaxQueries, strips * kLanes);
  const int keys = std::min(kMaxBlockKeys, kKeyFloats / (p.Dn + p.R + p.Dv));
  parallel_for(int64_t(p.B) * p.N, 1,
               [&](int64_t item, int64_t) { head_backward(k, p, int(item / p.N), int(item % p.N), queries, keys); });
  parallel_for(p.S, 64, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * p.R, count = (end - begin) * p.R;
    std::fill_n(p.dk_pe + first, count, 0.0f);
    for (int64_t n = 0; n < p.N; n++) k.add_scaled(p.dk_pe + first, 1.0f, p.workspace + n * p.S * p.R + first, count);
  });
}

}  // namespace kimi::cpu

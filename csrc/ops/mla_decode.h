// Absorbed MLA attention: the last Q tokens of each sequence against its paged latent cache.
#pragma once
#include <cstddef>

#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation>
struct MlaDecodeParams {
  const Activation* q;  // [B, Q, N, C + R], projected into latent space; rope part last
  const void* cache;    // [pages, page_size, C + R], bf16 or float32
  DType cache_dtype;
  const int32_t* page_table;  // [B, max_pages]
  const int32_t* seq_lens;    // [B]: query i of sequence b sees the first seq_lens[b] - (Q - 1 - i) rows
  Activation* out;            // [B, Q, N, C]
  float* lse;                 // [B, Q, N], log of the sum of exp(score)
  float* workspace;           // mla_decode_workspace(p) floats
  int B, Q, N, C, R, pages, page_size, max_pages;
  int max_seq_len;  // the most that seq_lens may hold: max_pages * page_size
  float scale;
  bool integers;  // CPU, bf16 cache: products of 16-bit integers (see cpu/kernels.h)
};

namespace cpu {
constexpr int kMaxMlaDecodeWidth = 2048;  // of C + R
size_t mla_decode_workspace(const MlaDecodeParams<float>& p);
void mla_decode(const MlaDecodeParams<float>& p);
}  // namespace cpu
namespace cuda {
size_t mla_decode_workspace(const MlaDecodeParams<bf16>& p);
void mla_decode(const MlaDecodeParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi

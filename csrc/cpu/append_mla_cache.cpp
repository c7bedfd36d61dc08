#include "ops/append_mla_cache.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

void write_row(const Kernels& k, const float* latent, const float* k_pe, int C, int R, void* cache, DType dtype,
               int64_t slot) {
  if (dtype == DType::F32) {
    std::copy_n(k_pe, R, std::copy_n(latent, C, static_cast<float*>(cache) + slot * (C + R)));
  } else {
    bf16* out = static_cast<bf16*>(cache) + slot * (C + R);
    k.narrow(latent, out, C);
    k.narrow(k_pe, out + C, R);
  }
}

}  // namespace

void append_mla_cache(const AppendMlaCacheParams<float>& p) {
  const Kernels& k = kernels();
  for (int t = 0; t < p.T; t++)
    write_row(k, p.latent + t * p.latent_stride, p.k_pe + t * p.k_pe_stride, p.C, p.R, p.cache, p.cache_dtype,
              p.slots[t]);
}

void fused_append_mla_cache(const FusedAppendMlaCacheParams<float>& p) {
  const Kernels& k = kernels();
  const int64_t pairs = p.R / 2;
  parallel_for(p.T, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> row(p.C + p.R);
    for (int64_t t = begin; t < end; t++) {
      const float* kv = p.kv + t * p.kv_stride;
      const float mean = k.sum_squares(kv, p.C) / float(p.C);
      k.scale_by_weight(kv, p.weight, 1.0f / std::sqrt(mean + p.eps), row.data(), p.C);
      k.rope(kv + p.C, p.cos + p.positions[t] * pairs, p.sin + p.positions[t] * pairs, row.data() + p.C, pairs);
      write_row(k, row.data(), row.data() + p.C, p.C, p.R, p.cache, p.cache_dtype, p.slots[t]);
    }
  });
}

}  // namespace kimi::cpu

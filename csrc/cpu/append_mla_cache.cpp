#include "ops/append_mla_cache.h"

#include <algorithm>

#include "cpu/kernels.h"

namespace kimi::cpu {

void append_mla_cache(const AppendMlaCacheParams& p) {
  const Kernels& k = kernels();
  for (int t = 0; t < p.T; t++) {
    const float* latent = p.latent + t * p.latent_stride;
    const float* k_pe = p.k_pe + t * p.k_pe_stride;
    const int64_t row = p.slots[t] * (p.C + p.R);
    if (p.cache_dtype == DType::F32) {
      float* out = static_cast<float*>(p.cache) + row;
      std::copy_n(k_pe, p.R, std::copy_n(latent, p.C, out));
    } else {
      bf16* out = static_cast<bf16*>(p.cache) + row;
      k.narrow(latent, out, p.C);
      k.narrow(k_pe, out + p.C, p.R);
    }
  }
}

}  // namespace kimi::cpu

#include "bindings/args.h"
#include "bindings/register.h"
#include "ops/layer_norm.h"
#include "ops/rms_norm.h"

namespace kimi {
namespace {

template <class On>
void rms_norm(On on, Tensor x, Tensor weight, Tensor out, float eps) {
  using Activation = typename On::Activation;
  const Args a("rms_norm", on);
  Dim T{"T"}, H{"H"};
  RmsNormParams<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, H);
  p.weight = a.dense<const bf16>("weight", weight, H);
  p.out = a.strided<Activation>("out", out, T, H);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.H = H, p.eps = eps;
  KIMI_RUN(on, rms_norm, p);
}

template <class On>
void fused_add_rms_norm(On on, Tensor x, Tensor residual, Tensor weight, Tensor out, float eps) {
  using Activation = typename On::Activation;
  const Args a("fused_add_rms_norm", on);
  Dim T{"T"}, H{"H"};
  FusedAddRmsNormParams<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, H);
  p.residual = a.strided<float>("residual", residual, T, H);
  p.weight = a.dense<const bf16>("weight", weight, H);
  p.out = a.strided<Activation>("out", out, T, H);
  a.check_apart("out", out, "residual", residual);
  p.x_stride = x.stride[0], p.residual_stride = residual.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.H = H, p.eps = eps;
  KIMI_RUN(on, fused_add_rms_norm, p);
}

template <class On>
void layer_norm(On on, Tensor x, Tensor weight, Tensor bias, Tensor out, float eps) {
  using Activation = typename On::Activation;
  const Args a("layer_norm", on);
  Dim T{"T"}, H{"H"};
  LayerNormParams<Activation> p{};
  p.x = a.strided<const Activation>("x", x, T, H);
  p.weight = a.dense<const bf16>("weight", weight, H);
  p.bias = a.dense<const bf16>("bias", bias, H);
  p.out = a.strided<Activation>("out", out, T, H);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.H = H, p.eps = eps;
  KIMI_RUN(on, layer_norm, p);
}

}  // namespace

void register_norm(nb::module_& m) {
  KIMI_DEFINE(m, rms_norm);
  KIMI_DEFINE(m, fused_add_rms_norm);
  KIMI_DEFINE(m, layer_norm);
}

}  // namespace kimi

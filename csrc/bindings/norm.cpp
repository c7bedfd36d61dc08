#include "bindings/args.h"
#include "bindings/register.h"
#include "ops/layer_norm.h"
#include "ops/rms_norm.h"
#include "ops/rms_norm_backward.h"

namespace kimi {
namespace {

template <class Weight, class On>
void rms_norm_by(On on, Tensor x, Tensor weight, Tensor out, float eps) {
  using Activation = typename On::Activation;
  const Args a("rms_norm", on);
  Dim T{"T"}, H{"H"};
  RmsNormParams<Activation, Weight> p{};
  p.x = a.strided<const Activation>("x", x, T, H);
  p.weight = a.dense<const Weight>("weight", weight, H);
  p.out = a.strided<Activation>("out", out, T, H);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.H = H, p.eps = eps;
  KIMI_RUN(on, rms_norm, p);
}

template <class On>
void rms_norm(On on, Tensor x, Tensor weight, Tensor out, float eps) {
  if constexpr (kOnCpu<On>)
    if (weight.dtype == DType::F32) return rms_norm_by<float>(on, x, weight, out, eps);
  rms_norm_by<bf16>(on, x, weight, out, eps);
}

template <class On>
void rms_norm_backward(On on, Tensor x, Tensor weight, Tensor dout, Tensor dx, Tensor dweight, Tensor workspace,
                       float eps) {
  const Args a("rms_norm_backward", on);
  Dim T{"T"}, H{"H"};
  RmsNormBackwardParams p{};
  p.x = a.strided<const float>("x", x, T, H);
  p.weight = a.dense<const float>("weight", weight, H);
  p.dout = a.strided<const float>("dout", dout, T, H);
  p.dx = a.dense<float>("dx", dx, T, H);
  p.dweight = a.dense<float>("dweight", dweight, H);
  Dim pieces{"T / " + std::to_string(kBackwardRows), (T.size + kBackwardRows - 1) / kBackwardRows};
  p.workspace = a.dense<float>("workspace", workspace, pieces, H);
  p.x_stride = x.stride[0], p.dout_stride = dout.stride[0];
  p.T = T, p.H = H, p.eps = eps;
  KIMI_RUN_CPU(on, rms_norm_backward, p);
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
  KIMI_DEFINE_CPU(m, rms_norm_backward);
  KIMI_DEFINE(m, fused_add_rms_norm);
  KIMI_DEFINE(m, layer_norm);
}

}  // namespace kimi

#include "bindings/args.h"
#include "bindings/dispatch.h"
#include "bindings/register.h"
#include "ops/rms_norm.h"

namespace kimi {
namespace {

void rms_norm(Tensor x, Tensor weight, Tensor out, float eps) {
  const Args a("rms_norm");
  Dim T{"T"}, H{"H"};
  RmsNormParams p{};
  p.x = a.strided<const float>("x", x, T, H);
  p.weight = a.dense<const bf16>("weight", weight, H);
  p.out = a.strided<float>("out", out, T, H);
  p.x_stride = x.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.H = H, p.eps = eps;
  run(cpu::rms_norm, p);
}

void fused_add_rms_norm(Tensor x, Tensor residual, Tensor weight, Tensor out, float eps) {
  const Args a("fused_add_rms_norm");
  Dim T{"T"}, H{"H"};
  FusedAddRmsNormParams p{};
  p.x = a.strided<const float>("x", x, T, H);
  p.residual = a.strided<float>("residual", residual, T, H);
  p.weight = a.dense<const bf16>("weight", weight, H);
  p.out = a.strided<float>("out", out, T, H);
  a.check_apart("out", out, "residual", residual);
  p.x_stride = x.stride[0], p.residual_stride = residual.stride[0], p.out_stride = out.stride[0];
  p.T = T, p.H = H, p.eps = eps;
  run(cpu::fused_add_rms_norm, p);
}

}  // namespace

void register_norm(nb::module_& m) {
  define(m, "rms_norm", &rms_norm);
  define(m, "fused_add_rms_norm", &fused_add_rms_norm);
}

}  // namespace kimi

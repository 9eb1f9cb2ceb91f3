// The activations of the star and their derivatives, on float registers.
#pragma once

#include "device.cuh"

namespace sdan_fast::cuda {

// In the order of `activation_names` in torch_side.h.
enum Activation : int { kNone = 0, kGelu = 1, kRelu6 = 2, kRelu = 3, kSilu = 4 };

// erfc(z) for z >= 0, to 1.5e-7 (Abramowitz and Stegun 7.1.26); for 16-bit results only.
__device__ __forceinline__ float erfc_coarse(float z, float exp_minus_z2) {
  const float t = __fdividef(1.0f, fmaf(0.3275911f, z, 1.0f));
  float p = fmaf(1.061405429f, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f);
  return p * t * exp_minus_z2;
}

// The standard normal distribution's Phi(x) and x phi(x). Exact to float32 rounding, or (Coarse)
// good enough for 16-bit results.
template <bool Coarse>
__device__ __forceinline__ void normal(float x, float& cdf, float& x_pdf) {
  if constexpr (Coarse) {
    const float e = __expf(-0.5f * x * x);
    const float half_tail = 0.5f * erfc_coarse(0.70710678118654752f * fabsf(x), e);
    cdf = x < 0 ? half_tail : 1.0f - half_tail;
    x_pdf = fabsf(x) < 32.0f ? 0.39894228040143268f * x * e : 0.0f;  // inf * 0 would be NaN
  } else {
    cdf = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    x_pdf = fabsf(x) < 32.0f ? 0.39894228040143268f * x * expf(-0.5f * x * x) : 0.0f;
  }
}

template <bool Coarse>
__device__ __forceinline__ float gelu(float x) {
  if constexpr (Coarse) {
    const float half_tail =
        0.5f * erfc_coarse(0.70710678118654752f * fabsf(x), __expf(-0.5f * x * x));
    return x * (x < 0 ? half_tail : 1.0f - half_tail);
  } else {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  }
}

template <bool Coarse>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (Coarse) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

// v = f(v). The comparisons are written so that a NaN stays one, as in PyTorch.
template <bool Coarse, int N>
__device__ __forceinline__ void activate(int activation, float (&v)[N]) {
  switch (activation) {
    case kGelu:
      SDAN_UNROLL
      for (int i = 0; i < N; ++i) v[i] = gelu<Coarse>(v[i]);
      break;
    case kRelu6:
      SDAN_UNROLL
      for (int i = 0; i < N; ++i) v[i] = v[i] <= 0 ? 0.0f : (v[i] >= 6 ? 6.0f : v[i]);
      break;
    case kRelu:
      SDAN_UNROLL
      for (int i = 0; i < N; ++i) v[i] = v[i] <= 0 ? 0.0f : v[i];
      break;
    case kSilu:
      SDAN_UNROLL
      for (int i = 0; i < N; ++i) v[i] = v[i] * sigmoid<Coarse>(v[i]);
      break;
    default:
      break;
  }
}

// g = g f'(x) and x = f(x).
template <bool Coarse, int N>
__device__ __forceinline__ void activate_backward(int activation, float (&x)[N], float (&g)[N]) {
  switch (activation) {
    case kGelu:
      SDAN_UNROLL
      for (int i = 0; i < N; ++i) {
        float cdf, x_pdf;
        normal<Coarse>(x[i], cdf, x_pdf);
        g[i] *= cdf + x_pdf;
        x[i] *= cdf;
      }
      break;
    case kRelu6:
      SDAN_UNROLL
      for (int i = 0; i < N; ++i) {
        g[i] = x[i] <= 0 || x[i] >= 6 ? 0.0f : g[i];
        x[i] = x[i] <= 0 ? 0.0f : (x[i] >= 6 ? 6.0f : x[i]);
      }
      break;
    case kRelu:
      SDAN_UNROLL
      for (int i = 0; i < N; ++i) {
        g[i] = x[i] <= 0 ? 0.0f : g[i];
        x[i] = x[i] <= 0 ? 0.0f : x[i];
      }
      break;
    case kSilu:
      SDAN_UNROLL
      for (int i = 0; i < N; ++i) {
        const float s = sigmoid<Coarse>(x[i]);
        g[i] *= s * (1.0f + x[i] * (1.0f - s));
        x[i] *= s;
      }
      break;
    default:
      break;
  }
}

}  // namespace sdan_fast::cuda

// Plain descriptions of passes over the pixels of a batch, for the backward of 1x1 convolutions. No
// code, no std types (see dispatch.h).
#pragma once

#include "fused.h"

namespace sdan_fast {

// A dense tensor N x C x H x W as a list of pixels: pixel i lies in run i / run_pixels, at place
// i % run_pixels. A run is an image if contiguous, the whole batch if channels_last.
struct PixelView {
  void* data;  // null: not there, or not wanted
  DType dtype;
  int64_t run_pixels;
  int64_t stride_run, stride_c, stride_p;
};

// How the pixels of a batch are cut into tiles, and these into parts that are summed apart: by the
// shape alone, so that no sum depends on the number of threads.
struct PixelTiling {
  int64_t pixels, tile, tiles, parts;
};

// Sums of products of two tiles' rows (isa/outer_product.h), and of the first one's rows: those of
// each part in `stride` floats of their own, zero at first.
struct PartSums {
  float* data;  // null: none
  int64_t stride;
  int64_t rows_at;  // of the sums of rows among them, two floats for each
};

// activation(1x1 convolution of x) into y, or u times that.
struct PointwiseConvPlan {
  PixelTiling tiling;
  // With `pixel_tiles` its matrix tiles have pixels along their rows, and x, y and u are dense
  // pixels whose channels are neighbours. No other convolution takes a u.
  Pointwise conv;
  bool pixel_tiles;
  // In place of conv's own weights and bias, those of pack_output_products: x and y are dense
  // pixels whose channels are neighbours. Else null.
  const float* outputs;
  Activation activation;
  PixelView x, y, u;
};

// Floats of pack_output_products that are enough for every instruction set.
inline int64_t output_products_floats(int64_t ci, int64_t co) {
  return (co + 16) * (ci + 1);
}

// Gradients of u * (W x + b): gu = grad (W x + b); with m = grad u: gx = W^T m, and the sums over
// the pixels of m x^T and of m. Where there is no u, those of activation(W x + b): m = grad
// activation'(W x + b).
struct GateBackwardPlan {
  PixelTiling tiling;
  int co, ci;
  Activation activation;
  PixelView grad, u, x, gu, gx;
  Pointwise forward, transposed;  // W with b, and W^T
  bool weight, bias;              // whether these sums are wanted
  PartSums sums;
};

// Star's way from x to the inputs of its depth-wise convolution and of its product, 1x1
// convolutions of the normalized x that are one here: out = products(LN(x)).
struct StarProductsPlan {
  PixelTiling tiling;
  PixelView x, out;
  const float* norm_weight;
  const float* norm_bias;
  Pointwise products;
  float eps;
};

// And back, from the gradient of `out`: x's gradient, by the transposed weights, which hold the
// norm's, and the sums over the pixels of grad z^T and of grad; z is LN(x) without its affine part.
struct StarProductsBackwardPlan {
  PixelTiling tiling;
  int co, ci;
  PixelView x, grad, gx;
  Pointwise transposed;
  float eps;
  PartSums sums;
};

// Between the two, plane by plane: with a = DW(p), of which the star is outer(GELU(a) q), the
// gradients of p and q replace them. The filter's are sums over each plane, [n][channel][tap] and
// [n][channel].
struct StarPlanesPlan {
  int64_t height, width;
  int channels;
  ImageView grad, p, q;
  BranchConv dw;
  const float* flipped;  // its weights, the last tap first
  Activation outer;
  bool need_products;  // the gradients of p and q
  double* weight_sums;
  double* bias_sums;
};

}  // namespace sdan_fast

// Floats that the sums of co x ci products take.
SDAN_DECLARE_KERNEL(outer_sums_floats, int co, int ci, int64_t* floats)
// Their totals over the parts, co x ci of them row by row.
SDAN_DECLARE_KERNEL(outer_totals, const PartSums* sums, int64_t parts, int co, int ci,
                    double* totals)
// out = totals in the type that `dtype` names.
SDAN_DECLARE_KERNEL(round_totals, const double* totals, int64_t count, DType dtype, void* out)

// Packs co x ci row-major weights and the bias for isa/pixel_products.h.
SDAN_DECLARE_KERNEL(pack_output_products, const float* weight, const float* bias, int co, int ci,
                    float* packed)
SDAN_DECLARE_KERNEL(pointwise_conv2d_scratch, const PointwiseConvPlan* plan, int64_t* bytes)
SDAN_DECLARE_KERNEL(pointwise_conv2d_run, const PointwiseConvPlan* plan, int64_t part,
                    void* scratch)

SDAN_DECLARE_KERNEL(gate_backward_scratch, const GateBackwardPlan* plan, int64_t* bytes)
SDAN_DECLARE_KERNEL(gate_backward_run, const GateBackwardPlan* plan, int64_t part, void* scratch)

SDAN_DECLARE_KERNEL(star_products_scratch, const StarProductsPlan* plan, int64_t* bytes)
SDAN_DECLARE_KERNEL(star_products_run, const StarProductsPlan* plan, int64_t part, void* scratch)

SDAN_DECLARE_KERNEL(star_products_backward_scratch, const StarProductsBackwardPlan* plan,
                    int64_t* bytes)
SDAN_DECLARE_KERNEL(star_products_backward_run, const StarProductsBackwardPlan* plan, int64_t part,
                    void* scratch)

SDAN_DECLARE_KERNEL(star_planes_scratch, const StarPlanesPlan* plan, int64_t* bytes)
SDAN_DECLARE_KERNEL(star_planes_run, const StarPlanesPlan* plan, int64_t n, int channel,
                    void* scratch)

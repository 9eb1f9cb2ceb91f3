// star_conv's torch side: LayerNorm, both 1x1 convolutions as one product by PyTorch, then one
// kernel for the rest.
//
// Backward forms the normalized x and the two products again, and keeps nothing else: one kernel
// makes the gradients of both products side by side, so that one product leads back to the
// LayerNorm and one more gives both weights' gradients.
#include "gemm.h"

namespace sdan_fast::cuda {
namespace {

struct StarConvTensors {
  Tensor x, norm_weight;
  Optional norm_bias;
  Tensor pw1_weight, dw_weight;
  Optional dw_bias;
  Tensor pw2_weight;
};

struct StarConvCall {
  DType dtype;
  int outer;
  float eps;
  int64_t ci, co;
  MemoryFormat format;  // to compute in
  Pixels pixels;
  NormShape norm;
  StarConvShape shape;
};

StarConvCall check_star_conv(const StarConvTensors& t, const std::string& outer, double eps,
                             bool backward, const char* op) {
  const DType dtype = dtype_of(t.x, op, "x");
  check_image(t.x, op, "x");
  const int64_t n = t.x.size(0), ci = t.x.size(1), h = t.x.size(2), w = t.x.size(3);
  const auto check = [&](const Tensor& u, std::initializer_list<int64_t> shape, const char* name) {
    check_kind(u, t.x, op, name, "x");
    check_shape(u, shape, op, name);
  };
  STD_TORCH_CHECK(t.pw1_weight.dim() == 4, op, ": pw1_weight must be Co x C x 1 x 1, got ",
                  shape_of(t.pw1_weight));
  const int64_t co = t.pw1_weight.size(0);
  STD_TORCH_CHECK(ci <= 4096 && co < (1 << 24), op,
                  ": the CUDA C++ kernel takes at most 4096 input channels, got ", ci);
  STD_TORCH_CHECK(h * w < (int64_t{1} << 31), op, ": too large an image, ", h, " x ", w);
  check(t.norm_weight, {ci}, "norm_weight");
  if (t.norm_bias) check(*t.norm_bias, {ci}, "norm_bias");
  check(t.pw1_weight, {co, ci, 1, 1}, "pw1_weight");
  STD_TORCH_CHECK(t.dw_weight.dim() == 4 && t.dw_weight.size(2) == 3 && t.dw_weight.size(3) == 3,
                  op, ": the CUDA C++ kernel takes a 3 x 3 depth-wise weight, got ",
                  shape_of(t.dw_weight));
  check(t.dw_weight, {co, 1, 3, 3}, "dw_weight");
  if (t.dw_bias) check(*t.dw_bias, {co}, "dw_bias");
  check(t.pw2_weight, {co, ci, 1, 1}, "pw2_weight");

  StarConvCall c{};
  c.dtype = dtype;
  c.outer = activation_index(outer, op, "outer");
  c.eps = static_cast<float>(eps);
  c.ci = ci, c.co = co;
  c.format = format_of(t.x);
  bool last = c.format == MemoryFormat::ChannelsLast;
  c.norm = NormShape{n, h * w, static_cast<int>(ci), last};
  if (backward && !norm_backward_fits(c.norm)) {
    c.format = MemoryFormat::Contiguous;
    c.norm.channels_last = last = false;
  }
  c.pixels = Pixels{n, h * w, last};
  c.shape = StarConvShape{n,
                          last ? 2 * co : 2 * co * h * w,
                          static_cast<int>(co),
                          static_cast<int>(h),
                          static_cast<int>(w),
                          last};
  return c;
}

void make_dense(StarConvTensors& t, MemoryFormat format) {
  const MemoryFormat contiguous = MemoryFormat::Contiguous;
  t.x = in_format(t.x, format);
  for (Tensor* u : {&t.norm_weight, &t.pw1_weight, &t.dw_weight, &t.pw2_weight})
    *u = in_format(*u, contiguous);
  for (Optional* u : {&t.norm_bias, &t.dw_bias})
    if (*u) *u = in_format(**u, contiguous);
}

void* data_or_null(const Optional& t) {
  return t ? t->data_ptr() : nullptr;
}

// Where the second half of the channels of a tensor of 2 Co channels begins.
char* second_half(const Tensor& t, const StarConvCall& c) {
  const int64_t bytes = c.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<char*>(t.data_ptr()) +
         bytes * c.co * (c.pixels.channels_last ? 1 : c.pixels.pixels);
}

// What both directions begin with.
struct Products {
  Tensor z;        // LN(x), Ci channels
  Tensor weights;  // 2 Co x Ci
  Tensor both;     // PW1 z and PW2 z, 2 Co channels
};

Products make_products(const StarConvTensors& t, const StarConvCall& c, Stream stream) {
  Products p;
  const int64_t elements = c.pixels.n * c.pixels.pixels;
  p.z = empty_matrix(t.x, {elements * c.ci});
  norm_forward(c.dtype, t.x.data_ptr(), t.norm_weight.data_ptr(), data_or_null(t.norm_bias),
               p.z.data_ptr(), c.norm, c.eps, stream);
  p.weights = empty_matrix(t.x, {2 * c.co, c.ci});
  concatenate(viewed(t.pw1_weight, {c.co, c.ci}), viewed(t.pw2_weight, {c.co, c.ci}), p.weights);
  p.both = empty_matrix(t.x, {elements * 2 * c.co});
  c.pixels.convolve(p.weights, c.pixels.matrix(p.z, c.ci), c.pixels.matrix(p.both, 2 * c.co));
  return p;
}

Tensor star_conv_op(Tensor x, Tensor norm_weight, Optional norm_bias, Tensor pw1_weight,
                    Tensor dw_weight, Optional dw_bias, Tensor pw2_weight, std::string outer,
                    double eps) {
  StarConvTensors t{x, norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight};
  const StarConvCall c = check_star_conv(t, outer, eps, false, "star_conv");
  const int64_t shape[4] = {x.size(0), c.co, x.size(2), x.size(3)};
  Tensor y = empty_in(x, {shape, 4}, c.format);
  if (y.numel() == 0) return y;
  const OnDevice on(x);
  make_dense(t, c.format);
  const Products p = make_products(t, c, on.stream());
  star_conv_forward(c.dtype, p.both.data_ptr(), second_half(p.both, c), t.dw_weight.data_ptr(),
                    data_or_null(t.dw_bias), y.data_ptr(), c.shape, c.outer, on.stream());
  return y;
}

std::vector<Tensor> star_conv_backward_op(Tensor grad_output, Tensor x, Tensor norm_weight,
                                          Optional norm_bias, Tensor pw1_weight, Tensor dw_weight,
                                          Optional dw_bias, Tensor pw2_weight, std::string outer,
                                          double eps, std::vector<bool> output_mask) {
  const char* op = "star_conv_backward";
  StarConvTensors t{x, norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight};
  const StarConvCall c = check_star_conv(t, outer, eps, true, op);
  check_kind(grad_output, x, op, "grad_output", "x");
  check_shape(grad_output, {x.size(0), c.co, x.size(2), x.size(3)}, op, "grad_output");
  check_mask(output_mask, 7, op);
  STD_TORCH_CHECK((norm_bias || !output_mask[2]) && (dw_bias || !output_mask[5]), op,
                  ": output_mask asks for the gradient of a bias that is not there");
  const Optional slots[7] = {x, norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight};
  std::array<Optional, 7> grads;
  void* target[7] = {};
  const bool empty = x.numel() == 0 || grad_output.numel() == 0;
  bool any = false;
  for (size_t i = 0; i < 7; ++i) {
    if (!output_mask[i]) continue;
    any = true;
    grads[i] = empty_like_in(*slots[i], i == 0 ? c.format : MemoryFormat::Contiguous);
    if (empty) torch::stable::zero_(*grads[i]);
    target[i] = grads[i]->data_ptr();
  }
  if (any && !empty) {
    const OnDevice on(x);
    make_dense(t, c.format);
    const Tensor g = in_format(grad_output, c.format);
    const Products p = make_products(t, c, on.stream());
    const bool need_norm = output_mask[0] || output_mask[1] || output_mask[2];
    const bool need_pw = output_mask[3] || output_mask[6], need_both = need_norm || need_pw;
    const bool need_dw = output_mask[4] || output_mask[5];
    Optional both, partial;
    if (need_both) both = empty_matrix(x, {p.both.numel()});
    if (need_dw) partial = empty_matrix(x, {star_conv_partial_floats(c.shape)}, ScalarType::Float);
    star_conv_backward(c.dtype, g.data_ptr(), p.both.data_ptr(), second_half(p.both, c),
                       t.dw_weight.data_ptr(), data_or_null(t.dw_bias), data_or_null(both),
                       both ? second_half(*both, c) : nullptr,
                       static_cast<float*>(data_or_null(partial)), target[4], target[5], c.shape,
                       c.outer, on.stream());
    if (need_pw) {
      const Tensor parts = c.pixels.weight_parts(c.pixels.matrix(*both, 2 * c.co),
                                                 c.pixels.matrix(p.z, c.ci), 2 * c.co, c.ci);
      const int64_t count = c.co * c.ci;
      sum_parts(
          static_cast<const float*>(parts.data_ptr()),
          flat_sums(c.dtype, {target[3], target[6]}, count, c.pixels.parts(), 1, 2 * count, 1, 0),
          on.stream());
    }
    if (need_norm) {
      Tensor gz = empty_matrix(x, {p.z.numel()});
      c.pixels.convolve_transposed(p.weights, c.pixels.matrix(*both, 2 * c.co),
                                   c.pixels.matrix(gz, c.ci));
      Optional sums;
      if (output_mask[1] || output_mask[2])
        sums = empty_matrix(x, {norm_partial_floats(c.norm)}, ScalarType::Float);
      norm_backward(c.dtype, gz.data_ptr(), t.x.data_ptr(), t.norm_weight.data_ptr(), target[0],
                    static_cast<float*>(data_or_null(sums)), target[1], target[2], c.norm, c.eps,
                    on.stream());
    }
  }
  std::vector<Tensor> out;
  for (size_t i = 0; i < 7; ++i)
    if (grads[i]) out.push_back(in_format(*grads[i], format_of(*slots[i])));
  return out;
}

}  // namespace

SDAN_LIBRARY_IMPL(m) {
  m.impl(SDAN_OVERLOAD("star_conv"), TORCH_BOX(&star_conv_op));
  m.impl(SDAN_OVERLOAD("star_conv_backward"), TORCH_BOX(&star_conv_backward_op));
}

}  // namespace sdan_fast::cuda

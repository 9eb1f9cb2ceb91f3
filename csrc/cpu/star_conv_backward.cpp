// sdan_fast::star_conv_backward.cpu: three passes over memory. The 1x1 convolutions of the
// normalized x again, pixel by pixel; what lies between them and the output, plane by plane; and
// their gradients' way back to x, pixel by pixel.
//
// With z = LN(x) without its affine part, and g the gradients of both products, the sums over the
// pixels D = g z^T and s = g 1 make up every parameter's gradient but the depth-wise filter's: of a
// weight W of the products D w + s b^T (w, b the norm's weight and bias, along its columns), of
// these the sums over the rows of W D and W s, element by element.
#include "image_memory.h"
#include "lka.h"
#include "pixels_host.h"

namespace sdan_fast {
namespace {

enum Slot { kX, kNormWeight, kNormBias, kPw1, kDw, kDwBias, kPw2, kSlots };

// [n][count] summed over n.
std::vector<double> over_images(const std::vector<double>& sums, int64_t images, int64_t count) {
  std::vector<double> totals(static_cast<size_t>(count));
  auto p = sums.begin();
  for (int64_t n = 0; n < images; ++n) {
    for (double& total : totals) total += *p++;
  }
  return totals;
}

std::vector<Tensor> star_conv_backward(const Tensor& grad_output, const Tensor& x,
                                       const Tensor& norm_weight, std::optional<Tensor> norm_bias,
                                       const Tensor& pw1_weight, const Tensor& dw_weight,
                                       std::optional<Tensor> dw_bias, const Tensor& pw2_weight,
                                       std::string outer, double eps,
                                       std::vector<bool> output_mask) {
  constexpr const char* op = "star_conv_backward";
  static const auto products_scratch = SDAN_PICK_KERNEL(star_products_scratch);
  static const auto products_run = SDAN_PICK_KERNEL(star_products_run);
  static const auto planes_scratch = SDAN_PICK_KERNEL(star_planes_scratch);
  static const auto planes_run = SDAN_PICK_KERNEL(star_planes_run);
  static const auto backward_scratch = SDAN_PICK_KERNEL(star_products_backward_scratch);
  static const auto backward_run = SDAN_PICK_KERNEL(star_products_backward_run);

  const DType dtype = check_image(x, op);
  const int64_t images = x.size(0), ci = x.size(1), height = x.size(2), width = x.size(3);
  FloatArena arena(DType::kFloat32);  // 16-bit images are computed on in float32
  const StarLevel level =
      make_level(arena, x, {norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight}, ci,
                 parse_activation(outer, op, "outer"), eps, op);
  const int64_t co = pw1_weight.size(0), taps = int64_t{level.kh} * level.kw;
  check_like(grad_output, x, 4, op, "grad_output");
  STD_TORCH_CHECK(grad_output.size(0) == images && grad_output.size(1) == co &&
                      grad_output.size(2) == height && grad_output.size(3) == width,
                  op, ": grad_output must have the shape of the output, (", images, ", ", co, ", ",
                  height, ", ", width, "), got ", shape_of(grad_output));
  check_mask(output_mask, kSlots, op);
  STD_TORCH_CHECK((norm_bias.has_value() || !output_mask[kNormBias]) &&
                      (dw_bias.has_value() || !output_mask[kDwBias]),
                  op, ": output_mask asks for the gradient of a bias that is not there");
  const bool need_norm = output_mask[kNormWeight] || output_mask[kNormBias];
  const bool need_sums = need_norm || output_mask[kPw1] || output_mask[kPw2];
  const bool need_products = output_mask[kX] || need_sums;

  std::optional<Tensor> grads[kSlots];
  if (output_mask[kX]) grads[kX] = empty_in_format(x.sizes(), x, output_format(x));
  const Tensor dense_x = dense(x);
  const Tensor grad_planes = in_planes(grad_output, dtype);
  const int64_t plane = height * width, pixels = images * plane;

  // Both products' weights below each other.
  const float* norm = arena.values(norm_weight);
  const float* shift = arena.values_or(norm_bias, ci, 0.0f);
  float* weights = arena.take(2 * co * ci);
  std::copy_n(arena.values(pw1_weight), co * ci, weights);
  std::copy_n(arena.values(pw2_weight), co * ci, weights + co * ci);

  // Both products, then their gradients; an odd number of cache lines from one plane to the next,
  // so that the same pixel of all channels is not in the same set.
  const int64_t stride = plane == 1 ? 1 : ((plane + 15) / 16 | 1) * 16;
  ImageMemory memory(ImageMemory::bytes_of(images, 2 * co, 1, stride, DType::kFloat32));
  ImageView both = memory.take(images, 2 * co, 1, stride, DType::kFloat32);
  both.stride_h = width;
  StarProductsPlan products{};
  products.tiling = pixel_tiling(pixels, 2 * co + ci, 2 * co * ci);
  products.x = pixels_of(dense_x, dtype);
  products.out = pixels_of(both, images, plane);
  products.norm_weight = norm;
  products.norm_bias = shift;
  products.products = pack(arena, weights, arena.zeros(2 * co), 2 * co, ci);
  products.eps = level.eps;
  const int64_t threads = threads_for(pixels * 2 * co * ci);
  int64_t bytes = 0;
  products_scratch(&products, &bytes);
  run_tasks(threads, products.tiling.parts, [&](int64_t part) {
    products_run(&products, part, thread_scratch(static_cast<size_t>(bytes)));
  });

  std::vector<double> weight_sums, bias_sums;
  if (output_mask[kDw]) weight_sums.resize(static_cast<size_t>(images * co * taps));
  if (output_mask[kDwBias]) bias_sums.resize(static_cast<size_t>(images * co));
  float* flipped = arena.take(co * taps);
  for (int64_t c = 0; c < co; ++c) {
    std::reverse_copy(level.dw + c * taps, level.dw + (c + 1) * taps, flipped + c * taps);
  }
  StarPlanesPlan planes{};
  planes.height = height;
  planes.width = width;
  planes.channels = static_cast<int>(co);
  planes.grad = view_of(grad_planes, dtype);
  planes.p = planes.q = both;
  planes.q.data = static_cast<float*>(both.data) + co * stride;
  planes.dw = {level.dw, level.dw_bias, level.kh, level.kw, 1, 1};
  planes.flipped = flipped;
  planes.outer = level.outer;
  planes.need_products = need_products;
  planes.weight_sums = output_mask[kDw] ? weight_sums.data() : nullptr;
  planes.bias_sums = output_mask[kDwBias] ? bias_sums.data() : nullptr;
  planes_scratch(&planes, &bytes);
  run_tasks(threads, pixels > 0 ? images * co : 0, [&](int64_t i) {
    planes_run(&planes, i / co, static_cast<int>(i % co),
               thread_scratch(static_cast<size_t>(bytes)));
  });
  if (output_mask[kDw]) {
    grads[kDw] = rounded(over_images(weight_sums, images, co * taps), dw_weight, dtype);
  }
  if (output_mask[kDwBias]) {
    grads[kDwBias] = rounded(over_images(bias_sums, images, co), *dw_bias, dtype);
  }

  if (need_products) {
    StarProductsBackwardPlan back{};
    back.tiling = products.tiling;
    back.co = static_cast<int>(2 * co);
    back.ci = static_cast<int>(ci);
    back.x = products.x;
    back.grad = products.out;
    if (output_mask[kX]) {
      back.gx = pixels_of(*grads[kX], dtype);
      float* folded = arena.take(2 * co * ci);
      for (int64_t at = 0; at < 2 * co * ci; ++at) folded[at] = weights[at] * norm[at % ci];
      back.transposed = pack_transposed(arena, folded, 2 * co, ci);
    }
    back.eps = level.eps;
    const Sums sums(arena, back.tiling, need_sums ? 2 * co : 0, need_sums ? ci : 0);
    if (need_sums) back.sums = sums.parts();
    backward_scratch(&back, &bytes);
    run_tasks(threads, back.tiling.parts, [&](int64_t part) {
      backward_run(&back, part, thread_scratch(static_cast<size_t>(bytes)));
    });
    if (need_sums) {
      const std::vector<double> d = sums.products(), s = sums.rows();
      std::vector<double> gw(static_cast<size_t>(2 * co * ci)), gn(static_cast<size_t>(ci)),
          gb(static_cast<size_t>(ci));
      for (int64_t o = 0; o < 2 * co; ++o) {
        for (int64_t i = 0; i < ci; ++i) {
          const int64_t at = o * ci + i;
          gw[at] = d[at] * norm[i] + s[o] * shift[i];
          gn[i] += d[at] * weights[at];
          gb[i] += s[o] * weights[at];
        }
      }
      if (output_mask[kNormWeight]) grads[kNormWeight] = rounded(gn, norm_weight, dtype);
      if (output_mask[kNormBias]) grads[kNormBias] = rounded(gb, *norm_bias, dtype);
      const auto half = gw.begin() + co * ci;
      if (output_mask[kPw1]) grads[kPw1] = rounded({gw.begin(), half}, pw1_weight, dtype);
      if (output_mask[kPw2]) grads[kPw2] = rounded({half, gw.end()}, pw2_weight, dtype);
    }
  }
  std::vector<Tensor> result;
  for (const auto& g : grads) {
    if (g.has_value()) result.push_back(*g);
  }
  return result;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("star_conv_backward.cpu", TORCH_BOX(&sdan_fast::star_conv_backward));
}

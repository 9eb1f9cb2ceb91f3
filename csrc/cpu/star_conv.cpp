// sdan_fast::star_conv.cpu: outer(GELU(DW(PW1 z)) * PW2 z), z = LN(x), as one streamed level.
#include "star_chain.h"

namespace sdan_fast {
namespace {

Tensor star_conv(const Tensor& x, const Tensor& norm_weight, std::optional<Tensor> norm_bias,
                 const Tensor& pw1_weight, const Tensor& dw_weight, std::optional<Tensor> dw_bias,
                 const Tensor& pw2_weight, std::string outer, double eps) {
  StarChain chain{};
  const DType dtype = check_image(x, "star_conv");
  FloatArena arena(dtype);
  const int64_t ci = x.size(1);
  chain.height = x.size(2);
  chain.width = x.size(3);
  chain.channels = static_cast<int>(ci);
  chain.level_count = 1;
  chain.levels[0] =
      make_level(arena, x, {norm_weight, norm_bias, pw1_weight, dw_weight, dw_bias, pw2_weight}, ci,
                 parse_activation(outer, "star_conv", "outer"), eps, "star_conv");
  const std::vector<int64_t> shape{x.size(0), pw1_weight.size(0), x.size(2), x.size(3)};
  Tensor out = empty_in_format(shape, x, output_format(x));
  chain.x = view_of(x, dtype);
  chain.out = view_of(out, dtype);
  run_star_chain(chain, x.size(0));
  return out;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("star_conv.cpu", TORCH_BOX(&sdan_fast::star_conv));
}

// sdan_fast::sdm.cpu: a whole star distillation module as one pass over its input.
//
//   sdm(Tensor x, Tensor[] distill, Tensor[] star, Tensor[] fuse, *, float eps=1e-5) -> Tensor
//
// The tensors come in state-dict order: distill = weight, bias of c1, c2, ...; star = norm.weight,
// norm.bias, pw1.weight, dw.weight, dw.bias, pw2.weight of S1, S2, ...; fuse = weight, bias.
// SDAN's SDM has four levels, the last without distill; 1 to 8 are accepted. No bias may be
// missing.
#include "sdm.h"

namespace sdan_fast {
namespace {

Tensor sdm(const Tensor& x, std::vector<Tensor> distill, std::vector<Tensor> star,
           std::vector<Tensor> fuse, double eps) {
  const DType dtype = check_image(x, "sdm");
  FloatArena arena(dtype);
  StarChain chain{};
  make_sdm(chain, arena, x, x.size(1), distill, star, fuse, eps, "sdm");
  chain.height = x.size(2);
  chain.width = x.size(3);
  const std::vector<int64_t> shape{x.size(0), fuse[0].size(0), x.size(2), x.size(3)};
  Tensor out = empty_in_format(shape, x, output_format(x));
  chain.x = view_of(x, dtype);
  chain.out = view_of(out, dtype);
  run_star_chain(chain, x.size(0));
  return out;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("sdm.cpu", TORCH_BOX(&sdan_fast::sdm));
}

// Launches of conv_square, contiguous tensors and every kernel size.
#include "conv_launch.h"

namespace sdan_fast::cuda {

void launch_conv_square(const ConvArguments& a, const SquarePlan& plan) {
  const auto run = [&](auto k, auto d) {
    if (plan.k != decltype(k)::value || plan.d != decltype(d)::value) return;
    launch("conv_square", conv_square_kernel<decltype(k)::value, decltype(d)::value>, plan.config,
           a.x, a.weight, a.bias, a.y, plan.p);
  };
  const auto instances = [&](auto d, auto... k) { (run(k, d), ...); };
  constexpr std::integral_constant<int, 0> any;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::integral_constant<int, 5> five;
  constexpr std::integral_constant<int, 7> seven;
  constexpr std::integral_constant<int, 9> nine;
  instances(one, three, five, seven, nine);
  instances(three, five);
  instances(four, seven);
  instances(five, nine);
  instances(any, one, three, five, seven, nine);
}

}  // namespace sdan_fast::cuda

// Launches of conv_last, the channels_last tensors.
#include "conv_launch.h"

namespace sdan_fast::cuda {

void launch_conv_last(DType dtype, const ConvArguments& a, const ConvShape& shape, bool flip,
                      Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = 4 / static_cast<int>(sizeof(T));
    const auto run = [&](auto v, auto k) {
      constexpr int kV = decltype(v)::value, kK = decltype(k)::value;
      ConvPlan plan = plan_last(shape, kV);
      plan.p.flip = flip;
      plan.config.stream = stream;
      launch("conv_last", conv_last_kernel<T, kK, kV>, plan.config, static_cast<const T*>(a.x),
             static_cast<const T*>(a.weight), static_cast<const T*>(a.bias), static_cast<T*>(a.y),
             plan.p);
    };
    const ConvPlan plan = plan_last(shape, V);
    if (plan.fits && shape.c % V == 0 && aligned(a.x, 4) && aligned(a.y, 4)) {
      // K taps at a time, where K divides them: 21 and 35 take 7. The large primes go one by one.
      const int taps = plan.p.vertical ? shape.kh : shape.kw;
      int divisor = 1;
      for (const int k : {3, 5, 7, 9})
        if (taps % k == 0) divisor = k;
      with_taps<3, 5, 7, 9, 1>(divisor, [&](auto k) { run(std::integral_constant<int, V>{}, k); });
    } else {
      run(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace sdan_fast::cuda

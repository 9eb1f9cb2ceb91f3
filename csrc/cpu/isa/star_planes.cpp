// What lies between the products of a star and its output, backwards: depth-wise convolution, GELU,
// product and outer activation of one plane, and their gradients. All of it is channel by channel,
// so that nothing leaves the thread's scratch, three planes of float32.
#include "../pixels.h"
#include "padded_plane.h"
#include "star_gradients.h"
#include "tap_sums.h"

namespace sdan_fast {
namespace SDAN_ISA {

namespace {

// ga in place of a, gb in place of grad, for a row.
template <bool kOuter, bool kShort>
void row_gradients(float* a, const float* b, float* grad, Activation outer, int64_t width) {
  int64_t x = 0;
  const auto step = [&](auto vecs) __attribute__((always_inline)) {
    constexpr int V = decltype(vecs)::value;
    Vec s[V], t[V], g[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      s[v] = load(a + x + v * kLanes);
      t[v] = load(b + x + v * kLanes);
      g[v] = load(grad + x + v * kLanes);
    }
    star_gradients<Activation::kGelu, kOuter, kShort>(s, t, g, outer);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store(a + x + v * kLanes, s[v]);
      store(grad + x + v * kLanes, g[v]);
    }
    x += V * kLanes;
  };
  while (x + 2 * kLanes <= width) step(std::integral_constant<int, 2>{});
  while (x < width) step(std::integral_constant<int, 1>{});
}

struct Scratch {
  float *p, *a, *b, *grad;  // two planes in buffers of padded_buffer(), two rows
  float* out;               // a plane
};

int64_t place(const StarPlanesPlan& plan, const PaddedBuffer& buffer, char* base, Scratch* s) {
  ScratchCursor cursor{base, 0};
  s->p = cursor.take(buffer_floats(buffer));
  s->a = cursor.take(buffer_floats(buffer));
  s->b = cursor.take(round_up(plan.width, 16));
  s->grad = cursor.take(round_up(plan.width, 16));
  s->out = cursor.take(plan.height * buffer.stride);
  return cursor.used;
}

}  // namespace

void star_planes_scratch(const StarPlanesPlan* plan, int64_t* bytes) {
  Scratch s;
  *bytes = place(*plan, padded_buffer(plan->dw, plan->height, plan->width), nullptr, &s);
}

void star_planes_run(const StarPlanesPlan* plan, int64_t n, int channel, void* scratch) {
  const int64_t height = plan->height, width = plan->width;
  const PaddedBuffer buffer = padded_buffer(plan->dw, height, width);
  const int64_t taps = static_cast<int64_t>(plan->dw.kh) * plan->dw.kw;
  Scratch s;
  place(*plan, buffer, static_cast<char*>(scratch), &s);
  float* p = clear_around(buffer, height, width, s.p);
  float* a = clear_around(buffer, height, width, s.a);
  load_plane(plan->p, n, channel, height, width, p, buffer.stride);
  conv_region(plan->dw, plan->dw.weight + channel * taps, plan->dw.bias[channel],
              s.p + buffer.left - buffer.pad_x, buffer.stride, a, buffer.stride, height, width);
  const bool outer = plan->outer != Activation::kNone;
  const auto gradients = plan->grad.dtype == DType::kFloat32
                             ? (outer ? row_gradients<true, false> : row_gradients<false, false>)
                             : (outer ? row_gradients<true, true> : row_gradients<false, true>);
  for (int64_t y = 0; y < height; ++y) {
    load_tile(plan->q, n, y, 0, channel, 1, width, s.b, 0);
    load_tile(plan->grad, n, y, 0, channel, 1, width, s.grad, 0);
    float* row = a + y * buffer.stride;
    // What completes the row's last vector is zero before and after: there grad is.
    gradients(row, s.b, s.grad, plan->outer, width);
    if (plan->need_products) store_tile(plan->q, n, y, 0, channel, 1, width, s.grad, 0);
  }
  const int64_t plane = n * plan->channels + channel;
  if (plan->bias_sums != nullptr) {
    plan->bias_sums[plane] = plane_sum(a, buffer.stride, height, width);
  }
  if (plan->weight_sums != nullptr) {
    const TapPlanes planes{a, p, buffer.stride, buffer.stride, height, width};
    filter_sums(plan->dw, planes, plan->weight_sums + plane * taps);
  }
  if (!plan->need_products) return;
  conv_region(plan->dw, plan->flipped + channel * taps, 0.0f, s.a + buffer.left - buffer.pad_x,
              buffer.stride, s.out, buffer.stride, height, width);
  for (int64_t y = 0; y < height; ++y) {
    store_tile(plan->p, n, y, 0, channel, 1, width, s.out + y * buffer.stride, 0);
  }
}

}  // namespace SDAN_ISA
}  // namespace sdan_fast

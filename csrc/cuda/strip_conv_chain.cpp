// The strip chain's torch side: checks, stages into passes, the backward's order, registration.
#include "conv_ops.h"

namespace sdan_fast::cuda {
namespace {

// One 1-D convolution of the chain; even ones are horizontal.
struct Link {
  Tensor weight;  // contiguous
  Optional bias;
  int64_t dilation;
};

std::vector<Link> checked_links(const Tensor& x, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& biases,
                                const std::vector<bool>& bias_mask,
                                const std::vector<int64_t>& dilations, const char* op) {
  check_image(x, op, "x");
  const size_t count = weights.size();
  STD_TORCH_CHECK(count >= 2 && count % 2 == 0, op,
                  ": weights must hold a horizontal and a vertical strip for each stage, got ",
                  count, " tensors");
  STD_TORCH_CHECK(bias_mask.size() == count && dilations.size() == count, op,
                  ": bias_mask and dilations must have an entry for each of the ", count,
                  " weights, got ", bias_mask.size(), " and ", dilations.size());
  const auto present = static_cast<size_t>(std::count(bias_mask.begin(), bias_mask.end(), true));
  STD_TORCH_CHECK(biases.size() == present, op, ": bias_mask announces ", present, " biases, got ",
                  biases.size());
  std::vector<Link> links;
  for (size_t i = 0, b = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    const bool vertical = i % 2;
    check_kind(weight, x, op, "a weight", "x");
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                        weight.size(vertical ? 3 : 2) == 1 &&
                        weight.size(vertical ? 2 : 3) % 2 == 1,
                    op, ": weight ", i, " must be C x 1 x ", vertical ? "k x 1" : "1 x k",
                    " with odd k and the C of x, got ", shape_of(weight));
    STD_TORCH_CHECK(dilations[i] >= 1, op, ": dilation ", i, " must be a positive integer, got ",
                    dilations[i]);
    Link link{in_format(weight, MemoryFormat::Contiguous), std::nullopt, dilations[i]};
    if (bias_mask[i]) {
      check_kind(biases[b], x, op, "a bias", "x");
      check_shape(biases[b], {x.size(1)}, op, "a bias");
      link.bias = in_format(biases[b++], MemoryFormat::Contiguous);
    }
    links.push_back(link);
  }
  return links;
}

std::vector<int64_t> dilation_of(const Link& link, bool vertical) {
  return vertical ? std::vector<int64_t>{link.dilation, 1} : std::vector<int64_t>{1, link.dilation};
}

Strip strip_of(const Link& link, bool with_bias) {
  constexpr int64_t kMost = 1 << 30;
  Strip strip;
  strip.weight = link.weight.data_ptr();
  strip.taps = static_cast<int>(std::min(link.weight.numel() / link.weight.size(0), kMost));
  strip.dilation = static_cast<int>(std::min(link.dilation, kMost));
  if (with_bias && link.bias) strip.bias = link.bias->data_ptr();
  return strip;
}

StripPass pass_for(const Tensor& x, bool vertical, bool flip) {
  StripPass pass;
  pass.n = x.size(0), pass.c = x.size(1), pass.h = x.size(2), pass.w = x.size(3);
  pass.channels_last = format_of(x) == MemoryFormat::ChannelsLast;
  pass.vertical = vertical, pass.flip = flip;
  return pass;
}

Tensor run(StripPass& pass, const Tensor& x, const Optional& gate, Stream stream, DType dtype) {
  Tensor y = empty_like_in(x, format_of(x));
  pass.x = x.data_ptr(), pass.y = y.data_ptr(), pass.gate = gate ? gate->data_ptr() : nullptr;
  convolve_strips(dtype, pass, stream);
  return y;
}

// Two stages h1, v1, h2, v2 (or one, without h2 and v2) as a horizontal and a vertical pass, if
// there is room for both; `flip` for the input gradient, whose stages come in reverse and without
// biases. `gate` multiplies the result.
Optional two_passes(const Tensor& x, const std::vector<const Link*>& links, bool flip,
                    const Optional& gate, Stream stream, DType dtype) {
  StripPass across = pass_for(x, false, flip), down = pass_for(x, true, flip);
  across.steps = down.steps = static_cast<int>(links.size() / 2);
  for (int i = 0; i < across.steps; ++i) {
    const Link &h = *links[static_cast<size_t>(2 * i)], &v = *links[static_cast<size_t>(2 * i + 1)];
    // The last horizontal bias belongs behind the first vertical convolution, where there is one.
    const bool late = i == 1;
    across.strip[i] = strip_of(h, !flip && !late);
    down.strip[i] = strip_of(v, !flip);
    if (late && !flip) {
      down.edge = across.strip[1];
      down.edge.bias = down.strip[0].bias;
      down.strip[0].bias = h.bias ? h.bias->data_ptr() : nullptr;
    }
  }
  if (!strips_fit(dtype, across) || !strips_fit(dtype, down)) return std::nullopt;
  return run(down, run(across, x, std::nullopt, stream, dtype), gate, stream, dtype);
}

// The whole chain, two stages at a time.
Tensor chain(const Tensor& x, const std::vector<Link>& links, bool flip, const Optional& gate,
             const char* op) {
  const DType dtype = dtype_of(x, op, "x");
  const OnDevice on(x);
  const Stream stream = on.stream();
  Tensor value = x;
  bool gated = !gate;
  for (size_t done = 0; done < links.size();) {
    std::vector<const Link*> some;
    for (size_t i = done; i < std::min(done + 4, links.size()); ++i) {
      // The gradient goes from the last stage to the first; within a stage the order is free.
      const size_t at = flip ? links.size() - 2 - i / 2 * 2 + i % 2 : i;
      some.push_back(&links[at]);
    }
    Optional y;
    while (!some.empty()) {
      const bool last = done + some.size() == links.size();
      y = two_passes(value, some, flip, last ? gate : std::nullopt, stream, dtype);
      if (y) {
        gated = gated || last;
        break;
      }
      some.resize(some.size() - 2);
    }
    if (y) {
      value = *y;
      done += some.size();
      continue;
    }
    // Not even one stage fits: its convolutions by themselves.
    for (const size_t end = done + 2; done < end; ++done) {
      const size_t at = flip ? links.size() - 2 - done / 2 * 2 + done % 2 : done;
      value = convolve(value, links[at].weight, flip ? std::nullopt : links[at].bias,
                       dilation_of(links[at], at % 2), flip, format_of(x), op);
    }
  }
  if (!gated) {
    // The gate stands alone: element-wise, as an activated product without an activation.
    Tensor y = empty_like_in(value, format_of(value));
    star_forward(dtype, gate->data_ptr(), value.data_ptr(), y.data_ptr(), value.numel(),
                 activation_index("none", op, "activation"),
                 activation_index("none", op, "activation"), stream);
    value = y;
  }
  return value;
}

Tensor strip_conv_chain_op(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                           std::vector<bool> bias_mask, std::vector<int64_t> dilations) {
  const char* op = "strip_conv_chain";
  const auto links = checked_links(x, weights, biases, bias_mask, dilations, op);
  dtype_of(x, op, "x");
  const MemoryFormat format = format_of(x);
  if (x.numel() == 0) return empty_like_in(x, format);
  return chain(in_format(x, format), links, false, std::nullopt, op);
}

Tensor gated_strip_conv_chain_op(Tensor u, Tensor x, std::vector<Tensor> weights,
                                 std::vector<Tensor> biases, std::vector<bool> bias_mask,
                                 std::vector<int64_t> dilations) {
  const char* op = "gated_strip_conv_chain";
  const auto links = checked_links(x, weights, biases, bias_mask, dilations, op);
  dtype_of(x, op, "x");
  check_like(u, x, op, "u", "x");
  const MemoryFormat format = format_of(u);
  if (u.numel() == 0) return empty_like_in(u, format);
  return chain(in_format(x, format), links, false, in_format(u, format), op);
}

// The bias gradients that are wanted (null elsewhere), from the gradient of the chain's result.
std::vector<Tensor> bias_gradients(const Tensor& grad, const std::vector<Link>& links,
                                   const std::vector<std::array<bool, 2>>& wanted, const char* op) {
  std::vector<Tensor> grads(links.size());
  std::vector<void*> to(links.size(), nullptr);
  std::vector<Strip> strips;
  bool any = false;
  for (size_t i = 0; i < links.size(); ++i) {
    strips.push_back(strip_of(links[i], false));
    if (!wanted[i][1]) continue;
    grads[i] = empty_like_in(*links[i].bias, MemoryFormat::Contiguous);
    if (grad.numel() == 0) torch::stable::zero_(grads[i]);
    to[i] = grads[i].data_ptr();
    any = true;
  }
  if (!any || grad.numel() == 0) return grads;
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  const ChainShape shape{grad.size(0),
                         grad.size(1),
                         grad.size(2),
                         grad.size(3),
                         static_cast<int64_t>(links.size() / 2),
                         format_of(grad) == MemoryFormat::ChannelsLast};
  STD_TORCH_CHECK(shape.n * shape.c <= kMost && shape.h * shape.w <= kMost, op,
                  ": the CUDA C++ kernel of the bias gradients takes up to 2^31 - 1 planes and as "
                  "many pixels of one, got ",
                  shape_of(grad));
  const OnDevice on(grad);
  const int64_t floats[1] = {chain_bias_floats(dtype_of(grad, op, "grad_output"), shape)};
  Tensor scratch = empty_in(grad, {floats, 1}, MemoryFormat::Contiguous, ScalarType::Float);
  chain_bias_gradients(dtype_of(grad, op, "grad_output"), grad.data_ptr(), strips.data(),
                       static_cast<float*>(scratch.data_ptr()), to.data(), shape, on.stream());
  return grads;
}

// The weights' gradients need what lies between the convolutions: it is computed again, one
// convolution at a time, and so are the gradients that flow back. What their blocks leave is added
// up for all filters at the end.
std::vector<Tensor> strip_conv_chain_backward_op(
    Tensor grad_output, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
    std::vector<bool> bias_mask, std::vector<int64_t> dilations, std::vector<bool> output_mask) {
  const char* op = "strip_conv_chain_backward";
  const auto links = checked_links(x, weights, biases, bias_mask, dilations, op);
  dtype_of(x, op, "x");
  check_like(grad_output, x, op, "grad_output", "x");
  check_mask(output_mask, 1 + weights.size() + biases.size(), op);
  const MemoryFormat format = format_of(x);
  const size_t count = links.size();
  const Tensor start = in_format(x, format);
  Tensor grad = in_format(grad_output, format);
  // For each convolution the gradients of weight and bias that are asked for; first and last, the
  // first and the last convolution whose weight needs one.
  std::vector<std::array<bool, 2>> wanted(count);
  size_t first = count, last = 0;
  for (size_t i = count, b = 1 + count + biases.size(); i-- > 0;) {
    wanted[i] = {output_mask[1 + i], bias_mask[i] && output_mask[--b]};
    if (!wanted[i][0]) continue;
    if (first == count) last = i;
    first = i;
  }
  std::vector<Tensor> grad_weights(count);
  const std::vector<Tensor> grad_biases = bias_gradients(grad, links, wanted, op);
  Tensor grad_x;
  if (x.numel() == 0) {
    if (output_mask[0]) grad_x = empty_like_in(x, format);
  } else if (first == count) {
    if (output_mask[0]) grad_x = chain(grad, links, true, std::nullopt, op);
  }
  if (first < count) {
    PendingSums pending;
    std::vector<Tensor> inputs{start};
    for (size_t i = 0; i < last; ++i)
      inputs.push_back(convolve(inputs[i], links[i].weight, links[i].bias,
                                dilation_of(links[i], i % 2), false, format, op));
    for (size_t i = count; i-- > 0;) {
      const auto dilation = dilation_of(links[i], i % 2);
      if (i <= last) {
        if (wanted[i][0])
          grad_weights[i] = weight_gradients(grad, inputs[i], weights[i], std::nullopt, dilation,
                                             {true, false}, op, pending)
                                .front();
        inputs.resize(i);
      }
      if (i > first || (output_mask[0] && x.numel() != 0))
        grad = convolve(grad, links[i].weight, std::nullopt, dilation, true, format, op);
    }
    pending.finish(x);
    if (output_mask[0] && x.numel() != 0) grad_x = grad;
  }
  std::vector<Tensor> grads;
  if (output_mask[0]) grads.push_back(grad_x);
  for (size_t i = 0; i < count; ++i)
    if (wanted[i][0]) grads.push_back(in_format(grad_weights[i], format_of(weights[i])));
  for (size_t i = 0; i < count; ++i)
    if (wanted[i][1]) grads.push_back(grad_biases[i]);
  return grads;
}

}  // namespace

SDAN_LIBRARY_IMPL(m) {
  m.impl(SDAN_OVERLOAD("strip_conv_chain"), TORCH_BOX(&strip_conv_chain_op));
  m.impl(SDAN_OVERLOAD("strip_conv_chain_backward"), TORCH_BOX(&strip_conv_chain_backward_op));
  m.impl(SDAN_OVERLOAD("gated_strip_conv_chain"), TORCH_BOX(&gated_strip_conv_chain_op));
}

}  // namespace sdan_fast::cuda

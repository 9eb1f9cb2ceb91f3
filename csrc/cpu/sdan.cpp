// sdan_fast::sdan.cpu: the whole network for inference, with only block-boundary images in memory.
//
//   sdan(Tensor x, Tensor[] head, Tensor[] blocks, Tensor[] fuse, Tensor[] tail, Tensor[] up, *,
//   int scale,
//        int block_count, int[] dilations, int[] lengths, float eps=1e-5) -> Tensor
//
// Lists in state-dict order: head and tail = pw.weight, dw.weight, dw.bias; fuse and up = weight,
// bias; blocks = the tensors of block 0, then of block 1, ...: distill, star, fuse (32 tensors),
// weight and bias of every convolution of the branches, attn.proj, proj, norm. dilations and
// lengths as in mm_lka, the same in every block. x has a divisor of head's input channels and is
// repeated to make them up. The output is N x (up's channels / scale^2) x scale H x scale W in x's
// dtype and memory format.
//
// The images between the sweeps are float32, whatever x is; SDM's and the branches' outputs, which
// only products read, are bfloat16 where these multiply pairs of it. The global fusion never sees
// its n C channels side by side: every other block adds its share and the one before's to a running
// sum while both are in cache. So the images alive at a time are five: the head's output, the
// running sum, the block's input (which its output replaces), SDM's output and the branches'.
// A block's gate may run with the next block's SDM, which writes its output over the rows that the
// gate has read.
#include "image_memory.h"
#include "prepared.h"
#include "rsdam.h"

namespace sdan_fast {
namespace {

constexpr size_t kSdmTensors = 32;

// The depth-wise half of a BSConv and its 1x1 half, `repeat` times over the same input channels.
void make_edge(EdgePlan& plan, FloatArena& arena, const Tensor& x, int64_t ci, int64_t co,
               int64_t repeat, const std::vector<Tensor>& tensors, const char* name) {
  STD_TORCH_CHECK(tensors.size() == 3, "sdan: ", name,
                  " must hold pw.weight, dw.weight and dw.bias, got ", tensors.size(), " tensors");
  check_pointwise(tensors[0], x, co, ci * repeat, "sdan", name);
  check_like(tensors[1], x, 4, "sdan", name);
  STD_TORCH_CHECK(tensors[1].size(0) == co && tensors[1].size(1) == 1 && tensors[1].size(2) == 3 &&
                      tensors[1].size(3) == 3,
                  "sdan: ", name, "'s dw.weight must have shape (", co, ", 1, 3, 3), got shape ",
                  shape_of(tensors[1]));
  check_vector(tensors[2], x, co, "sdan", name);
  FloatArena rows(arena);
  const float* all = rows.values(tensors[0]);
  float* folded = rows.zeros(co * ci);
  for (int64_t m = 0; m < co; ++m) {
    for (int64_t k = 0; k < ci * repeat; ++k) folded[m * ci + k % ci] += all[m * ci * repeat + k];
  }
  plan.pw = pack(arena, folded, arena.zeros(co), co, ci);
  plan.dw = arena.values(tensors[1]);
  plan.dw_bias = arena.values(tensors[2]);
}

// All parameters, checked against x and packed.
struct Network {
  explicit Network(DType dtype) : arena(dtype), ends(DType::kFloat32) {}
  FloatArena arena;
  // Products at the network's two ends and into its running sum are float32 always: whatever they
  // round goes straight to the output, where it is most of bfloat16's error (performance.md), and
  // they are an eighth of the arithmetic.
  FloatArena ends;
  EdgePlan head{}, tail{};
  std::vector<Rsdam> blocks;
  int64_t channels = 0, up_channels = 0;
};

std::shared_ptr<const Network> prepare(const Tensor& x, DType dtype,
                                       const std::vector<Tensor>& head,
                                       const std::vector<Tensor>& blocks,
                                       const std::vector<Tensor>& fuse,
                                       const std::vector<Tensor>& tail,
                                       const std::vector<Tensor>& up, int64_t scale,
                                       int64_t block_count, const std::vector<int64_t>& dilations,
                                       const std::vector<int64_t>& lengths, double eps) {
  const char* op = "sdan";
  STD_TORCH_CHECK(!head.empty(),
                  "sdan: head must hold pw.weight, dw.weight and dw.bias, got 0 tensors");
  check_like(head[0], x, 4, op, "head");
  const int64_t channels = head[0].size(0), colours = x.size(1);
  STD_TORCH_CHECK(channels >= 1 && head[0].size(1) % colours == 0,
                  "sdan: x must have a divisor of head's ", head[0].size(1),
                  " input channels, got ", colours);
  STD_TORCH_CHECK(scale >= 1 && scale <= 16, "sdan: scale must be between 1 and 16, got ", scale);
  int64_t convs = 0;
  for (const int64_t n : lengths) convs += n;
  STD_TORCH_CHECK(convs >= 1 && convs <= 1024,
                  "sdan: lengths must announce 1 to 1024 convolutions, got ", convs);
  const size_t per_block = kSdmTensors + 2 * static_cast<size_t>(convs) + 6;
  STD_TORCH_CHECK(block_count >= 1 && blocks.size() == per_block * static_cast<size_t>(block_count),
                  "sdan: blocks must hold ", per_block,
                  " tensors for each of block_count = ", block_count, " blocks, got ",
                  blocks.size());
  check_pair(fuse, op, "fuse");
  check_pair(up, op, "up");
  check_pointwise(fuse[0], x, channels, block_count * channels, op, "the weight of fuse");
  check_vector(fuse[1], x, channels, op, "the bias of fuse");
  check_like(up[0], x, 4, op, "the weight of up");
  const int64_t up_channels = up[0].size(0);
  STD_TORCH_CHECK(up[0].size(1) == channels && up[0].size(2) == 3 && up[0].size(3) == 3 &&
                      up_channels >= 1 && up_channels % (scale * scale) == 0,
                  "sdan: the weight of up must have shape (colours * scale^2, ", channels,
                  ", 3, 3), got shape ", shape_of(up[0]));
  check_vector(up[1], x, up_channels, op, "the bias of up");

  auto network = std::make_shared<Network>(dtype);
  network->channels = channels;
  network->up_channels = up_channels;
  FloatArena& arena = network->arena;
  FloatArena& ends = network->ends;
  EdgePlan& head_plan = network->head;
  EdgePlan& tail_plan = network->tail;
  make_edge(head_plan, ends, x, colours, channels, head[0].size(1) / colours, head, "head");
  make_edge(tail_plan, ends, x, channels, channels, 1, tail, "tail");
  tail_plan.gelu_input = true;
  tail_plan.scale = static_cast<int>(scale);
  {
    // (m, k, i, j) to nine 1x1 convolutions side by side: (m, (3 i + j) C + k).
    FloatArena rows(ends);
    const float* w = rows.values(up[0]);
    float* nine = rows.take(up_channels * 9 * channels);
    for (int64_t m = 0; m < up_channels; ++m) {
      for (int64_t k = 0; k < channels; ++k) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          nine[(m * 9 + tap) * channels + k] = w[(m * channels + k) * 9 + tap];
        }
      }
    }
    const float* bias = ends.values(up[1]);
    tail_plan.up = pack(ends, nine, bias, up_channels, 9 * channels);
    // For two rows at a time (edge.cpp), (m, k, i, j) to (m, j C + k) four times, the three weights
    // of a column combined. The second one goes into both rows, and so has the bias.
    float* three = rows.take(up_channels * 3 * channels);
    const float* zero_bias = ends.zeros(up_channels);
    for (int part = 0; part < 4; ++part) {
      for (int64_t m = 0; m < up_channels; ++m) {
        for (int64_t j = 0; j < 3; ++j) {
          for (int64_t k = 0; k < channels; ++k) {
            const float* column = w + (m * channels + k) * 9 + j;
            const double top = column[0], middle = column[3], bottom = column[6];
            const double parts[4] = {top, (top + middle + bottom) / 2, (top - middle + bottom) / 2,
                                     bottom};
            three[(m * 3 + j) * channels + k] = static_cast<float>(parts[part]);
          }
        }
      }
      tail_plan.up_two[part] =
          pack(ends, three, part == 1 ? bias : zero_bias, up_channels, 3 * channels);
    }
  }
  FloatArena whole(ends);
  const float* fuse_weight = whole.values(fuse[0]);
  const float* fuse_bias = ends.values(fuse[1]);
  const float* no_bias = ends.zeros(channels);
  const std::vector<bool> bias_mask(static_cast<size_t>(convs), true);
  std::vector<Rsdam>& prepared = network->blocks;
  prepared.reserve(static_cast<size_t>(block_count));
  for (int64_t i = 0; i < block_count; ++i) {
    auto next = blocks.begin() + static_cast<std::ptrdiff_t>(per_block) * i;
    const auto take = [&next](int64_t n) {
      std::vector<Tensor> some(next, next + n);
      next += n;
      return some;
    };
    RsdamTensors t;
    t.distill = take(6);
    t.star = take(24);
    t.fuse = take(2);
    for (int64_t j = 0; j < convs; ++j) {
      t.weights.push_back(*next++);
      t.biases.push_back(*next++);
    }
    t.attn_proj = take(2);
    t.proj = take(2);
    t.norm = take(2);
    prepared.push_back(make_rsdam(arena, x, channels, t, bias_mask, dilations, lengths, eps, op));
    // A block's input is at hand when its output is collected: every other block takes both.
    const bool both = i % 2 == 1;
    if (!both && i + 1 < block_count) continue;
    const int64_t shares = both ? 2 : 1;
    FloatArena rows(ends);
    float* share = rows.take(channels * channels * shares);
    for (int64_t m = 0; m < channels; ++m) {
      std::copy_n(fuse_weight + (m * block_count + i + 1 - shares) * channels, channels * shares,
                  share + m * channels * shares);
    }
    GatePlan& gate = prepared.back().gate;
    gate.collect_both = both;
    gate.collect_first = i < 2;
    gate.collect =
        pack(ends, share, gate.collect_first ? fuse_bias : no_bias, channels, channels * shares);
  }

  return network;
}

Tensor sdan(const Tensor& x, std::vector<Tensor> head, std::vector<Tensor> blocks,
            std::vector<Tensor> fuse, std::vector<Tensor> tail, std::vector<Tensor> up,
            int64_t scale, int64_t block_count, std::vector<int64_t> dilations,
            std::vector<int64_t> lengths, double eps) {
  const char* op = "sdan";
  const DType dtype = check_image(x, op);
  static PreparedCache<Network> cache;
  std::vector<const Tensor*> parameters;
  for (const std::vector<Tensor>* list : {&head, &blocks, &fuse, &tail, &up}) {
    for (const Tensor& t : *list) parameters.push_back(&t);
  }
  int64_t eps_bits;
  std::memcpy(&eps_bits, &eps, sizeof(eps_bits));
  std::vector<int64_t> numbers{static_cast<int64_t>(dtype), x.size(1), scale, block_count,
                               eps_bits};
  for (const std::vector<Tensor>* list : {&head, &blocks, &fuse, &tail, &up}) {
    numbers.push_back(static_cast<int64_t>(list->size()));
  }
  numbers.push_back(static_cast<int64_t>(dilations.size()));
  numbers.insert(numbers.end(), dilations.begin(), dilations.end());
  numbers.insert(numbers.end(), lengths.begin(), lengths.end());
  const std::shared_ptr<const Network> network = cache.get(parameters, std::move(numbers), [&] {
    return prepare(x, dtype, head, blocks, fuse, tail, up, scale, block_count, dilations, lengths,
                   eps);
  });

  const int64_t images = x.size(0), height = x.size(2), width = x.size(3);
  const int64_t channels = network->channels, up_channels = network->up_channels;
  const std::vector<int64_t> out_shape{images, up_channels / (scale * scale), height * scale,
                                       width * scale};
  Tensor out = empty_in_format(out_shape, x, output_format(x));
  if (images == 0 || height == 0 || width == 0) return out;
  const DType between = between_dtype(network->arena);
  const auto bytes = [&](DType type) {
    return ImageMemory::bytes_of(images, channels, height, width, type);
  };
  ImageMemory memory(3 * bytes(DType::kFloat32) + 2 * bytes(between));
  const auto image = [&](DType type) { return memory.take(images, channels, height, width, type); };
  const ImageView s = image(DType::kFloat32), f = image(DType::kFloat32),
                  sum = image(DType::kFloat32), t = image(between), u = image(between);
  EdgePlan head_plan = network->head, tail_plan = network->tail;
  head_plan.height = tail_plan.height = height;
  head_plan.width = tail_plan.width = width;
  head_plan.x = view_of(x, dtype);
  head_plan.out = s;
  run_edge(head_plan, images);
  // The gate of a block goes with the first sweep of the next one.
  GatePlan gate{};
  for (size_t i = 0; i < network->blocks.size(); ++i) {
    const RsdamImages at{i == 0 ? s : f, t, u, f, sum};
    run_rsdam_to_gate(network->blocks[i], images, height, width, at, i == 0 ? nullptr : &gate);
    gate = gate_of(network->blocks[i], height, width, at);
  }
  run_gate(gate, images);
  tail_plan.x = sum;
  tail_plan.residual = s;
  tail_plan.out = view_of(out, dtype);
  run_edge(tail_plan, images);
  return out;
}

}  // namespace
}  // namespace sdan_fast

STABLE_TORCH_LIBRARY_IMPL(sdan_fast, CPU, m) {
  m.impl("sdan.cpu", TORCH_BOX(&sdan_fast::sdan));
}

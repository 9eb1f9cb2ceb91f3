// Plain descriptions of the fused operators, shared by the baseline code that prepares them and the
// units compiled once per instruction set that run them. No code, no std types (see dispatch.h).
#pragma once

#include "dispatch.h"

namespace sdan_fast {

// A tensor N x C x H x W of any strides (in elements). Rows with stride_w == 1 and pixels with
// stride_c == 1 are read and written by vectors, everything else element by element.
struct ImageView {
  void* data;
  DType dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// The operand of LDTILECFG: how many rows of how many bytes each matrix tile has.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// A 1x1 convolution: weights as pack_pointwise lays them out, one bias per output (never null).
// With `pairs` each weight is two bfloat16, of neighbouring input channels (isa/pairs.h); the
// convolution then reads tiles of pairs. Unless `tiles` is null it is for the processor's matrix
// tiles (isa/matrix_tiles.h): a second factor or, for PointwiseConvPlan's pixels, a first one.
struct Pointwise {
  const float* weight;
  const float* bias;
  int ci, co;
  bool pairs;
  const TileConfig* tiles;
};

// One StarConv, outer(GELU(DW(PW1 z)) * PW2 z) with z = LN(x). The affine part of LN is folded into
// pw1 and pw2, so that z here is the normalised x alone. distill.co is 0 where the level has none;
// it is a 1x1 convolution of x followed by GELU.
struct StarLevel {
  Pointwise pw1, pw2, distill;
  const float* dw;       // co x kh x kw
  const float* dw_bias;  // co
  int kh, kw;
  Activation outer;
  float eps;
};

constexpr int kMaxLevels = 8;

struct GatePlan;

// Levels one after another; with fuse.co > 0 the output is the 1x1 convolution of all distilled
// outputs followed by the last level's, else it is the last level's alone.
struct StarChain {
  int64_t height, width;
  int channels;  // of the input
  int level_count;
  StarLevel levels[kMaxLevels];
  Pointwise fuse;
  ImageView x, out;
  // Null, or what computes x, row by row: the block before, whose `out` is x.
  const GatePlan* before;
};

// Output rows [y0, y1) and columns [x0, x1) of image n.
struct Region {
  int64_t n, y0, y1, x0, x1;
};

// What two threads that stream one region from its two ends tell each other. All zero at first.
struct ChainMeeting {
  struct alignas(64) Side {
    const char* scratch;
    int levels_ready;  // the levels whose last row of input is in their rings
    int finished;      // whether it has read all that it needs of the other's scratch
  };
  alignas(64) int64_t rows_taken;  // by either
  Side sides[2];                   // from the first row down, from the last row up
};

// One depth-wise convolution of a branch, for the channels of that branch.
struct BranchConv {
  const float* weight;  // channels x kh x kw
  const float* bias;    // channels
  int kh, kw, dh, dw;
};

struct Branch {
  int first_channel, channels;
  int first_conv, conv_count;
};

// The depth-wise half of MM-LKA: `out` receives the concatenated branches of `x`.
struct BranchPlan {
  int64_t height, width;
  const Branch* branches;
  const BranchConv* convs;
  ImageView x, out;
};

// The point-wise half: out = x * gate(u); with project.co > 0 it goes on as
// out = residual + LN(project(x * gate(u))), LN with weight and bias of its own; with collect.co >
// 0 then also collected = collect(out), or of residual and out side by side if `collect_both`,
// added to what is there unless `collect_first`.
struct GatePlan {
  int64_t height, width;
  Pointwise gate, project, collect;
  const float* norm_weight;
  const float* norm_bias;
  float eps;
  bool collect_first, collect_both;
  ImageView u, x, residual, out, collected;
};

// f = DW3x3(PW(x)), or of GELU(x), plus a residual unless its data is null. With up.co > 0 the
// output is PixelShuffle(up(f)), `up` a dense 3x3 convolution packed as nine 1x1 ones, row by row,
// and once more for two rows at a time as edge.cpp says; else it is f.
struct EdgePlan {
  int64_t height, width;
  Pointwise pw, up, up_two[4];
  const float* dw;       // co x 9
  const float* dw_bias;  // co
  bool gelu_input;
  int scale;
  ImageView x, residual, out;
};

}  // namespace sdan_fast

// Packs the co x ci row-major weights of a 1x1 convolution for pointwise.h; co * ci floats, or
// pairs, whose bits it only moves.
SDAN_DECLARE_KERNEL(pack_pointwise, const float* weight, int co, int ci, float* packed)

// Bytes of scratch that star_chain_run needs for a region `width` columns wide.
SDAN_DECLARE_KERNEL(star_chain_scratch, const StarChain* chain, int64_t width, int64_t* bytes)
// The whole region where `meeting` is null; else what the two calls that share it, one of them
// `upwards`, take in turn. The second may come late, or find nothing left.
SDAN_DECLARE_KERNEL(star_chain_run, const StarChain* chain, const Region* region, bool upwards,
                    ChainMeeting* meeting, void* scratch)

// The region of `from` into `to`, images of one dtype in memory formats of their own.
SDAN_DECLARE_KERNEL(copy_image, const ImageView* from, const ImageView* to, int channels,
                    const Region* region)

// Bytes of scratch that branch_run needs for a region of that size.
SDAN_DECLARE_KERNEL(branch_scratch, const BranchPlan* plan, int branch, int64_t height,
                    int64_t width, int64_t* bytes)
// `channel` counts within the branch.
SDAN_DECLARE_KERNEL(branch_run, const BranchPlan* plan, int branch, int channel,
                    const Region* region, void* scratch)

SDAN_DECLARE_KERNEL(gate_scratch, const GatePlan* plan, int64_t* bytes)
SDAN_DECLARE_KERNEL(gate_run, const GatePlan* plan, const Region* region, void* scratch)

SDAN_DECLARE_KERNEL(edge_scratch, const EdgePlan* plan, int64_t width, int64_t* bytes)
SDAN_DECLARE_KERNEL(edge_run, const EdgePlan* plan, const Region* region, void* scratch)

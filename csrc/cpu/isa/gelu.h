// GELU, as short as float32 allows. gelu(x) = max(x, 0) - t q(t), t = |x|, with q(t) = P(X > t), X
// standard normal. From 5.5 on q counts as zero: t q is below 1.1e-7 there. The factor t makes the
// error relative to x towards zero.
//
// q by a table of polynomials, where a permutation of one register looks 16 lanes up at once. On
// each of 15 intervals, 0.38 wide, q is a polynomial in t - 1, or in t - 1.5 for degree 5: one
// shift for all intervals instead of one for each is an instruction less, and the terms cancel less
// than a digit. Degree 4 errs by less than 1.7e-7 in all at negative x, half as much as the erf of
// PyTorch's GELU on average, degree 5 by less than 8e-8 before that. Degree 3, good to 4e-6, is for
// values that end up in bfloat16. 14 instructions for 16 lanes with degree 4. Zen 4 runs
// multiply-adds in two of its four vector units and these permutations in two, with one in common:
// 11 of them take 7.3 cycles. A table of 32 intervals would do with polynomials one degree shorter,
// but permutations of two registers run in the multiply-adds' units only: four of those and six of
// these take 10.
//
// q by one polynomial elsewhere. 2 q falls from 1 to 4e-8, as no polynomial of a bearable degree
// does, but its eighth root falls from 1 to 0.12 nearly straight: one of degree 8
// (scripts/fit_gelu.py) gives q to 1e-8 after three squarings. Rounding errors are relative to q.
// In all GELU errs by less than 1.2e-7 at negative x, and 0.7 times as much as PyTorch's in the
// mean square. 19 instructions, of which 13 are for the multiply-adds' units.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512

// [k][i]: the coefficient of degree k on interval i.
alignas(64) static constexpr float kGelu5[6][16] = {
    {5.213748664e-02f, 6.145324185e-02f, 6.642893702e-02f, 6.680589914e-02f, 6.680720299e-02f,
     6.681094319e-02f, 6.703048944e-02f, 6.803303212e-02f, 6.792588532e-02f, 6.142860278e-02f,
     4.659408331e-02f, 2.854745090e-02f, 1.399773080e-02f, 5.511511117e-03f, 1.755794743e-03f,
     0.000000000e+00f},
    {-1.960147917e-01f, -1.586684436e-01f, -1.326023191e-01f, -1.295418143e-01f, -1.295176148e-01f,
     -1.295814663e-01f, -1.313303709e-01f, -1.365425885e-01f, -1.364520490e-01f, -1.179210916e-01f,
     -8.270948380e-02f, -4.620813206e-02f, -2.060462721e-02f, -7.396469358e-03f, -2.157985000e-03f,
     0.000000000e+00f},
    {-2.821968682e-02f, 3.182933480e-02f, 8.689656854e-02f, 9.696170688e-02f, 9.713858366e-02f,
     9.757816792e-02f, 1.032538265e-01f, 1.141879559e-01f, 1.145145521e-01f, 9.332272410e-02f,
     5.982887745e-02f, 3.025781922e-02f, 1.221776567e-02f, 3.988526296e-03f, 1.064146287e-03f,
     0.000000000e+00f},
    {-1.515019387e-01f, -1.031018123e-01f, -4.442964494e-02f, -2.761245146e-02f, -2.697919868e-02f,
     -2.854365483e-02f, -3.794902936e-02f, -4.951802641e-02f, -5.010848492e-02f, -3.796105087e-02f,
     -2.200139314e-02f, -1.000706386e-02f, -3.645342542e-03f, -1.079845009e-03f, -2.631065436e-04f,
     0.000000000e+00f},
    {-7.256192714e-02f, -5.300917104e-02f, -2.147035860e-02f, -7.146290503e-03f, -6.102439947e-03f,
     -3.093377920e-03f, 4.881253932e-03f, 1.105400082e-02f, 1.140527148e-02f, 7.914897986e-03f,
     4.105462227e-03f, 1.669724821e-03f, 5.469213938e-04f, 1.467256661e-04f, 3.260909943e-05f,
     0.000000000e+00f},
    {-9.660620242e-03f, -6.493876688e-03f, 3.499307495e-04f, 5.340464413e-03f, 5.750596058e-03f,
     3.093579318e-03f, 3.235214099e-04f, -1.004707767e-03f, -1.077031018e-03f, -6.748327287e-04f,
     -3.104464849e-04f, -1.123335460e-04f, -3.299064701e-05f, -8.001798051e-06f, -1.620397484e-06f,
     0.000000000e+00f},
};

alignas(64) static constexpr float kGelu4[5][16] = {
    {1.635874361e-01f, 1.590531319e-01f, 1.586550176e-01f, 1.586551815e-01f, 1.588402689e-01f,
     1.609669924e-01f, 1.646113545e-01f, 1.594862342e-01f, 1.346573681e-01f, 9.411062300e-02f,
     5.345216393e-02f, 2.463991381e-02f, 9.265731089e-03f, 2.861704445e-03f, 7.307160995e-04f,
     0.000000000e+00f},
    {-2.159863710e-01f, -2.388597876e-01f, -2.419798821e-01f, -2.419689298e-01f, -2.438950837e-01f,
     -2.557133436e-01f, -2.696006596e-01f, -2.563771605e-01f, -2.029283494e-01f, -1.298708916e-01f,
     -6.704345345e-02f, -2.810334042e-02f, -9.647000581e-03f, -2.733422443e-03f, -6.436705007e-04f,
     0.000000000e+00f},
    {1.736408770e-01f, 1.300824583e-01f, 1.208606362e-01f, 1.210261658e-01f, 1.288217753e-01f,
     1.538059562e-01f, 1.737579852e-01f, 1.609675735e-01f, 1.177309528e-01f, 6.829351932e-02f,
     3.184736148e-02f, 1.209584065e-02f, 3.782049520e-03f, 9.818223771e-04f, 2.130366338e-04f,
     0.000000000e+00f},
    {4.853167757e-02f, 1.142123342e-02f, -8.010640158e-04f, -7.447057869e-04f, -1.552396733e-02f,
     -3.934982046e-02f, -5.215437338e-02f, -4.665799811e-02f, -3.108054213e-02f, -1.618988626e-02f,
     -6.783153396e-03f, -2.326919697e-03f, -6.614603335e-04f, -1.571400935e-04f, -3.139367982e-05f,
     0.000000000e+00f},
    {-4.683011211e-03f, -1.661561988e-02f, -2.276626416e-02f, -1.681421325e-02f, -5.606878083e-03f,
     3.040336771e-03f, 6.136259995e-03f, 5.250941031e-03f, 3.141858615e-03f, 1.457452076e-03f,
     5.460342509e-04f, 1.687166077e-04f, 4.352968244e-05f, 9.453437997e-06f, 1.737728780e-06f,
     0.000000000e+00f},
};

alignas(64) static constexpr float kGelu3[4][16] = {
    {1.666967422e-01f, 1.612916887e-01f, 1.586882621e-01f, 1.586524844e-01f, 1.591885388e-01f,
     1.590900272e-01f, 1.487097442e-01f, 1.205925196e-01f, 8.129733801e-02f, 4.493984580e-02f,
     2.037243731e-02f, 7.611952256e-03f, 2.358519007e-03f, 6.095127901e-04f, 1.320448791e-04f,
     0.000000000e+00f},
    {-2.021701485e-01f, -2.237088978e-01f, -2.410944849e-01f, -2.419785857e-01f, -2.467900068e-01f,
     -2.471453249e-01f, -2.191868275e-01f, -1.617607921e-01f, -9.755824506e-02f, -4.813520610e-02f,
     -1.956041530e-02f, -6.594826002e-03f, -1.856891206e-03f, -4.390466202e-04f, -8.756487659e-05f,
     0.000000000e+00f},
    {1.966205537e-01f, 1.678923815e-01f, 1.280004829e-01f, 1.223407164e-01f, 1.376204342e-01f,
     1.392522901e-01f, 1.140462160e-01f, 7.484372705e-02f, 3.981679678e-02f, 1.739577949e-02f,
     6.307927426e-03f, 1.913915155e-03f, 4.889205447e-04f, 1.056567562e-04f, 1.938683636e-05f,
     0.000000000e+00f},
    {6.548740715e-02f, 5.267380923e-02f, 2.118015848e-02f, -1.002150960e-02f, -2.712440304e-02f,
     -2.844654582e-02f, -2.083829232e-02f, -1.189314947e-02f, -5.512315780e-03f, -2.117935568e-03f,
     -6.826331955e-04f, -1.859642362e-04f, -4.303865717e-05f, -8.492934285e-06f, -1.432841032e-06f,
     0.000000000e+00f},
};

template <int kDegree>
constexpr auto& gelu_table() {
  static_assert(kDegree >= 3 && kDegree <= 5);
  if constexpr (kDegree == 3) {
    return kGelu3;
  } else if constexpr (kDegree == 4) {
    return kGelu4;
  } else {
    return kGelu5;
  }
}

SDAN_INLINE Vec gelu_lookup(Vec i, const float* table) {
  return {_mm512_permutexvar_ps(_mm512_castps_si512(i.v), _mm512_load_ps(table))};
}

// In place, V vectors step by step together: a lone one is a chain of a dozen dependent
// instructions, and the processor's scheduler is too short to overlap enough of such chains by
// itself.
template <int kDegree, int V>
SDAN_INLINE void gelu(Vec (&x)[V]) {
  constexpr auto& table = gelu_table<kDegree>();
  constexpr float kShift = kDegree == 5 ? 1.5f : 1.0f;
  Vec i[V], t[V], u[V], p[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    // The smaller magnitude without its sign, 15 intervals at most; of NaN and a number, the
    // number.
    t[v] = {_mm512_range_ps(x[v].v, _mm512_set1_ps(5.689655f), 0x0a)};
    // Adding 1.5 * 2^23 leaves the index of the interval in the lowest bits.
    i[v] = fma(t[v], set1(2.6363637f), set1(12582912.0f));
    u[v] = t[v] - set1(kShift);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    p[v] = gelu_lookup(i[v], table[kDegree]);
    // max hands its second operand on if that is NaN.
    x[v] = max(zero(), x[v]);
  }
#pragma GCC unroll 5
  for (int k = kDegree - 1; k >= 0; --k) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) p[v] = fma(p[v], u[v], gelu_lookup(i[v], table[k]));
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) x[v] = fnma(t[v], p[v], x[v]);
}

#else

template <int, int V>
SDAN_INLINE void gelu(Vec (&x)[V]) {
  const Vec end = set1(5.5f);
  Vec t[V], p[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) t[v] = min(end, abs(x[v]));
  fill(p, -3.168725480e-07f);
  horner(p, t, 8.068903210e-06f);
  horner(p, t, -6.517231390e-05f);
  horner(p, t, 3.565672710e-05f);
  horner(p, t, 1.643703970e-03f);
  horner(p, t, -7.360727010e-04f);
  horner(p, t, -3.481598560e-02f);
  horner(p, t, -9.973548680e-02f);
  horner(p, t, 1.0f);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    p[v] = select_lt(t[v], end, p[v], zero());
    p[v] = p[v] * p[v];
    p[v] = p[v] * p[v];
    p[v] = p[v] * p[v];
    // max hands its second operand on if that is NaN.
    x[v] = fnma(t[v] * set1(0.5f), p[v], max(zero(), x[v]));
  }
}

#endif

}  // namespace SDAN_ISA
}  // namespace sdan_fast

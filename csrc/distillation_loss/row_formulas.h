// From a row's sums to its loss and to the coefficients of its gradient; for the CPU and for CUDA.
//
// The gradient is formed with respect to log q first: G_i = d loss / d log q_i. Since
// log q = z - logsumexp(z), the gradient with respect to the logits is d loss / d z_i = G_i - q_i S
// with S = sum G. Every loss has a G_i of one of these shapes:
//
//   kl, ce_soft         -p                        tv    q sign(q - p) / 2
//   rkl                 q (log(q / p) + 1)        nla   -min(p, q) / overlap where q < p, half of
//   jsd                 q log(2 q / (p + q)) / 2        it where q = p
//   ce_argmax, ce_data, topk                      -1 or -p at few places
//
// lk_hybrid is kl and tv with weights that have no gradient. Where p and q hardly overlap, all
// min(p, q) would be 0: they are then taken times exp(-shift), shift being the largest of their
// logarithms.
#pragma once

#include <cmath>

#include "csrc/distillation_loss/row_losses.h"

#if defined(__CUDACC__)
#define SPECULATORS_HOST_DEVICE __host__ __device__
#else
#define SPECULATORS_HOST_DEVICE
#endif

namespace speculators {

inline constexpr float kMinLogP = -100;
inline constexpr float kLkDecay = 3;
// Below this overlap (of at most 1), terms that float32 takes for 0 could matter.
inline constexpr float kLeastOverlap = 1e-20f;

// Sums over the row's W tokens. Real is double on the CPU and float on CUDA.
template <typename Real>
struct RowSums {
  Real p = 0;             // p
  Real p_log_q = 0;       // p log q                         ce_soft
  Real kl = 0;            // p log(p / q)                    kl, lk_hybrid
  Real rkl = 0;           // q log(q / p)                    rkl
  Real jsd_p = 0;         // p log(2 p / (p + q))            jsd
  Real jsd_q = 0;         // q log(2 q / (p + q))            jsd
  Real distance = 0;      // |p - q|                         tv, lk_hybrid
  Real signed_q = 0;      // q sign(q - p)                   tv, lk_hybrid
  Real overlap = 0;       // min(p, q) exp(-shift)           nla
  Real open_overlap = 0;  // that, by how much it grows with q: 1, 1/2, 0
  Real top_p = 0;         // p of the top k                  topk
  Real top_p_log_q = 0;   // p log q of the top k            topk
};

// Which sums the losses need.
struct RowNeeds {
  bool cross_entropy, kl, rkl, jsd, distance, overlap;
};

SPECULATORS_HOST_DEVICE inline RowNeeds row_needs(const LossFactors& factors) {
  const bool hybrid = factors.lk_hybrid != 0;
  return {factors.ce_soft != 0, factors.kl != 0 || hybrid, factors.rkl != 0,
          factors.jsd != 0,     factors.tv != 0 || hybrid, factors.nla != 0};
}

// The loss, and G_i = on_p p + on_signed_q q sign(q - p) + on_overlap (open min(p, q) exp(-shift))
//   + on_rkl q (log(q / p) + 1) + on_jsd q log(2 q / (p + q)) + the few places' own; S = total.
template <typename Real>
struct RowTerms {
  Real loss, on_p, on_signed_q, on_overlap, on_rkl, on_jsd, total;
};

// argmax_log_q: log q of p's choice. data_log_q: of the data's token, 0 where there is none.
template <typename Real>
SPECULATORS_HOST_DEVICE inline RowTerms<Real> row_terms(const LossFactors& factors,
                                                        const RowSums<Real>& sums, Real shift,
                                                        Real argmax_log_q, Real data_log_q,
                                                        bool has_data) {
  const RowNeeds needs = row_needs(factors);
  RowTerms<Real> terms{};
  Real on_kl = factors.kl;
  Real on_distance = factors.tv;
  if (factors.lk_hybrid != 0) {
    const Real share = std::exp(-Real(kLkDecay) * (1 - sums.distance / 2));
    on_kl += factors.lk_hybrid * share;
    on_distance += factors.lk_hybrid * (1 - share);
  }
  if (needs.kl) {
    terms.loss += on_kl * sums.kl;
    terms.on_p -= on_kl;
  }
  if (needs.cross_entropy) {
    terms.loss -= factors.ce_soft * sums.p_log_q;
    terms.on_p -= factors.ce_soft;
  }
  terms.total = terms.on_p * sums.p;
  if (needs.distance) {
    terms.loss += on_distance * sums.distance / 2;
    terms.on_signed_q = on_distance / 2;
    terms.total += terms.on_signed_q * sums.signed_q;
  }
  if (needs.rkl) {
    terms.loss += factors.rkl * sums.rkl;
    terms.on_rkl = factors.rkl;
    terms.total += factors.rkl * (sums.rkl + 1);
  }
  if (needs.jsd) {
    terms.loss += factors.jsd * (sums.jsd_p + sums.jsd_q) / 2;
    terms.on_jsd = Real(factors.jsd) / 2;
    terms.total += terms.on_jsd * sums.jsd_q;
  }
  if (needs.overlap) {
    terms.loss -= factors.nla * (shift + std::log(sums.overlap));
    terms.on_overlap = -factors.nla / sums.overlap;
    terms.total += terms.on_overlap * sums.open_overlap;
  }
  if (factors.ce_argmax != 0) {
    terms.loss -= factors.ce_argmax * argmax_log_q;
    terms.total -= factors.ce_argmax;
  }
  if (factors.ce_data != 0 && has_data) {
    terms.loss -= factors.ce_data * data_log_q;
    terms.total -= factors.ce_data;
  }
  if (factors.topk != 0) {
    terms.loss -= factors.topk * sums.top_p_log_q;
    terms.total -= factors.topk * sums.top_p;
  }
  return terms;
}

// Whether a row has a loss at all.
SPECULATORS_HOST_DEVICE inline bool row_learns(const RowLossCall& call, int64_t target) {
  return call.coverage[target] > 0 && (!call.only_in_vocabulary || call.best[target] >= 0);
}

}  // namespace speculators

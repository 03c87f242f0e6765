// SPDX-License-Identifier: Apache-2.0
// wgmma: a warpgroup's products of tiles in shared memory. A product reads its operands at some moment between its
// issue and the wait; its accumulators hold NaN until then. Descriptors, operands and fragments are those of
// tests/golden/hw. The sum of a product is taken in double and rounded once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../dtype.h"
#include "proxy.h"
#include "report.h"
#include "warpgroup.h"

#if defined(__GNUC__) && !defined(__clang__)
#define MOE_VECTORISED __attribute__((optimize("O3")))
#else
#define MOE_VECTORISED
#endif

namespace moe::simt {

constexpr uint32_t kRows = 64, kThreads = 128, kChunk = 16;

/// Registers of a warpgroup as the matrix they are, while products add to them.
struct Accumulator {
  int n;
  float* d[kThreads];
  std::vector<float> value;  // [kRows][n]
};

struct Operand {
  uint64_t descriptor = 0;
  uint32_t mn = 0;  // rows of a, columns of b
  bool mn_major = false;
};

struct MatrixProduct {
  Wgmma type;
  Block* block;
  uint32_t warpgroup;
  Operand a, b;
  bool accumulate, done = false;
  std::vector<uint32_t> a_registers;  // [kThreads][4], or empty
  std::shared_ptr<Accumulator> d;
  Record record;
};

namespace {

uint32_t depth(Wgmma type) { return type == Wgmma::tf32 ? 8 : 16; }

// ---------------------------------------------------------------- matrix descriptors
struct Descriptor {
  uint32_t start, lbo, sbo, base_offset, span;  // bytes; span 0 = not swizzled

  explicit Descriptor(uint64_t bits) {
    static const uint32_t spans[] = {0, 128, 64, 32};
    const auto field = [&](int at) { return uint32_t(bits >> at & 0x3fff) << 4; };
    start = field(0), lbo = field(16), sbo = field(32);
    base_offset = uint32_t(bits >> 49 & 7);
    span = spans[bits >> 62];
  }
};

uint32_t swizzled(uint32_t address, uint32_t span) {
  return address ^ ((address >> 7 & (span == 0 ? 0 : span / kChunk - 1)) << 4);
}

// Calls f(mn, k in chunks of 16 bytes, address) if K-major, f(mn / 8, k, address) if MN-major, for every chunk.
template <class F> void for_chunks(const Operand& operand, F f) {
  const Descriptor at(operand.descriptor);
  if (!operand.mn_major) {
    for (uint32_t mn = 0; mn < operand.mn; ++mn) {
      for (uint32_t k = 0; k < 2; ++k) {
        const uint32_t row = at.start + mn / 8 * at.sbo;
        f(mn, k,
          at.span == 0 ? row + k * at.lbo + mn % 8 * kChunk : swizzled(row + mn % 8 * at.span + k * kChunk, at.span));
      }
    }
    return;
  }
  const uint32_t wide = at.span / kChunk;  // chunks in a row
  for (uint32_t chunk = 0; chunk < operand.mn / 8; ++chunk) {
    for (uint32_t k = 0; k < 16; ++k) {
      f(chunk, k,
        at.span == 0
            ? at.start + chunk * at.sbo + k / 8 * at.lbo + k % 8 * kChunk
            : swizzled(at.start + chunk / wide * at.lbo + k / 8 * at.sbo + k % 8 * at.span + chunk % wide * kChunk,
                       at.span));
    }
  }
}

void check_descriptor(const Operand& operand, const char* name, const void* site) {
  const Descriptor at(operand.descriptor);
  const uint32_t rows = at.span == 0 ? 0 : at.span / kChunk - 1;
  if ((at.start >> 7 & rows) != (at.base_offset & rows)) {
    fault("descriptor",
          format("%s starts at 0x%x, which is no multiple of %u as its %u-byte swizzle needs (base offset %u)", name,
                 at.start, at.span * 8, at.span, at.base_offset),
          site);
  }
}

// Descriptors hold 18 bits of an address, which is all of shared memory.
uint32_t chunk_offset(uint32_t address, const char* name, const void* site) {
  const uint32_t offset = shared_offset(address & 0x3ffff);
  if (uint64_t(offset) + kChunk > machine.config.shared_bytes) {
    fault("bounds",
          format("%s of wgmma at byte %d of the block's %u bytes of shared memory", name, int(offset),
                 machine.config.shared_bytes),
          site);
  }
  return offset;
}

// ---------------------------------------------------------------- values
float f16_value(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (uint32_t i = 0; i < values.size(); ++i) values[i] = cvt_f32_f16(uint16_t(i));
    return values;
  }();
  return table[bits];
}

float value_of(Wgmma type, const uint8_t* p, uint32_t i) {
  uint32_t word = 0;
  if (type == Wgmma::tf32) {
    std::memcpy(&word, p + 4 * i, 4);
    word &= 0xffffe000;
  } else {
    uint16_t half;
    std::memcpy(&half, p + 2 * i, 2);
    if (type == Wgmma::f16) return f16_value(half);
    word = uint32_t(half) << 16;
  }
  float v;
  std::memcpy(&v, &word, 4);
  return v;
}

// values[k][mn], rows of `mn` elements.
void read_operand(const MatrixProduct& p, const Operand& operand, std::vector<double>& values) {
  values.resize(size_t(depth(p.type)) * operand.mn);
  const uint32_t per_chunk = p.type == Wgmma::tf32 ? 4 : 8;
  for_chunks(operand, [&](uint32_t i, uint32_t j, uint32_t address) {
    const uint8_t* const chunk = p.block->shared + shared_offset(address & 0x3ffff);
    for (uint32_t e = 0; e < per_chunk; ++e) {
      const uint32_t mn = operand.mn_major ? i * 8 + e : i, k = operand.mn_major ? j : j * per_chunk + e;
      values[size_t(k) * operand.mn + mn] = value_of(p.type, chunk, e);
    }
  });
}

// The fragment of mma.sync: 16-bit row g + 8 (v / 2 % 2), k = 2 t + v % 2 + 8 (v / 4); tf32 g + 8 (v % 2), t + 4 (v /
// 2).
void read_registers(const MatrixProduct& p, std::vector<double>& values) {
  const bool tf32 = p.type == Wgmma::tf32;
  values.resize(size_t(depth(p.type)) * kRows);
  for (uint32_t thread = 0; thread < kThreads; ++thread) {
    const auto* const words = reinterpret_cast<const uint8_t*>(&p.a_registers[thread * 4]);
    const uint32_t g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (uint32_t v = 0; v < (tf32 ? 4 : 8); ++v) {
      const uint32_t row = g + 8 * (tf32 ? v % 2 : v / 2 % 2), k = tf32 ? t + 4 * (v / 2) : 2 * t + v % 2 + 8 * (v / 4);
      values[size_t(k) * kRows + row] = value_of(p.type, words, v);
    }
  }
}

MOE_VECTORISED void multiply(const double* a, const double* b, uint32_t k_end, uint32_t n, bool accumulate, float* d) {
  double sum[256];
  for (uint32_t row = 0; row < kRows; ++row) {
    float* const out = d + size_t(row) * n;
    for (uint32_t j = 0; j < n; ++j) sum[j] = accumulate ? double(out[j]) : 0.0;
    for (uint32_t k = 0; k < k_end; ++k) {
      const double v = a[size_t(k) * kRows + row];
      const double* const line = b + size_t(k) * n;
      for (uint32_t j = 0; j < n; ++j) sum[j] += v * line[j];
    }
    for (uint32_t j = 0; j < n; ++j) out[j] = float(sum[j]);
  }
}

// ---------------------------------------------------------------- a product runs, ends
void run_product(MatrixProduct& p) {
  static std::vector<double> a, b;
  if (p.a_registers.empty()) read_operand(p, p.a, a);
  else read_registers(p, a);
  read_operand(p, p.b, b);
  multiply(a.data(), b.data(), depth(p.type), p.b.mn, p.accumulate, p.d->value.data());
  p.done = true;
}

// In the order of their issue.
void run_until(const MatrixProductRef& last) {
  auto& flying = last->block->warpgroups[last->warpgroup].flying;
  while (!last->done) {
    run_product(*flying.front());
    flying.pop_front();
  }
}

// Calls f(register, element of the matrix) for the accumulators of a thread.
template <class F> void for_registers(uint32_t thread, int n, F f) {
  for (int i = 0; i < n / 2; ++i) {
    const uint32_t row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (uint32_t(i) / 2 % 2);
    f(i, row * uint32_t(n) + 8 * (uint32_t(i) / 4) + 2 * (thread % 4) + uint32_t(i) % 2);
  }
}

Registers& registers_at(Thread& thread, const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  auto& all = thread.registers;
  const auto same = [&](const Registers& r) { return r.begin == begin && r.end == begin + bytes; };
  if (const auto found = std::find_if(all.begin(), all.end(), same); found != all.end()) return *found;
  all.erase(
      std::remove_if(all.begin(), all.end(),
                     [&](const Registers& r) { return r.flying == 0 && r.begin < begin + bytes && begin < r.end; }),
      all.end());
  all.push_back({begin, begin + bytes, 0, thread.wgmma_fenced, nullptr});
  return all.back();
}

void end_product(Thread& thread, const MatrixProductRef& product) {
  run_until(product);
  const uint32_t index = thread.id % kThreads;
  float* const d = product->d->d[index];
  Registers& registers = registers_at(thread, d, size_t(product->d->n) * 2);
  if (--registers.flying > 0) return;  // a later one adds to them
  for_registers(index, product->d->n, [&](int i, uint32_t element) { d[i] = product->d->value[element]; });
}

// ---------------------------------------------------------------- issue
struct Request {
  Wgmma type;
  int n;
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate, a_mn_major, b_mn_major;
  const void* site;

  bool same(const Request& other) const {
    return type == other.type && n == other.n && a == other.a && b == other.b && accumulate == other.accumulate &&
           a_mn_major == other.a_mn_major && b_mn_major == other.b_mn_major;
  }
};

void check_registers(Thread& thread, const Request& request) {
  if (request.a_registers != nullptr && !registers_at(thread, request.a_registers, 16).fenced) {
    fault("wgmma.fence", "wgmma reads registers that were written after the last wgmma.fence", request.site);
  }
  const auto begin = reinterpret_cast<uintptr_t>(request.d);
  for (const Registers& r : thread.registers) {
    const bool same = r.begin == begin && r.end == begin + size_t(request.n) * 2;
    if (!same && r.flying > 0 && r.begin < begin + size_t(request.n) * 2 && begin < r.end) {
      fault("in flight", "wgmma of another shape on accumulators in flight", request.site);
    }
  }
  if (!registers_at(thread, request.d, size_t(request.n) * 2).fenced) {
    fault("wgmma.fence", "wgmma on accumulators that were touched after the last wgmma.fence", request.site);
  }
}

// Those in flight if a product adds to them already, else taken from the registers, which then hold NaN.
std::shared_ptr<Accumulator> accumulator_of(Block& block, uint32_t warpgroup, void** arguments, bool& fresh) {
  const auto* const requests = reinterpret_cast<const Request* const*>(arguments);
  Thread& first = block.threads[warpgroup * kThreads];
  fresh = registers_at(first, requests[0]->d, size_t(requests[0]->n) * 2).flying == 0;
  const auto find = [&](const std::vector<MatrixProductRef>& products) {
    std::shared_ptr<Accumulator> found;
    for (const MatrixProductRef& product : products) found = product->d->d[0] == requests[0]->d ? product->d : found;
    return found;
  };
  std::shared_ptr<Accumulator> d;
  if (!fresh) {
    for (const auto& group : first.product_groups) {
      if (auto found = find(group)) d = found;
    }
    if (auto found = find(first.products)) d = found;
    return d;
  }
  d = std::make_shared<Accumulator>();
  d->n = requests[0]->n;
  d->value.resize(size_t(d->n) * kRows);
  for (uint32_t i = 0; i < kThreads; ++i) {
    float* const registers = d->d[i] = requests[i]->d;
    for_registers(i, d->n, [&](int j, uint32_t element) {
      d->value[element] = registers[j];
      registers[j] = std::numeric_limits<float>::quiet_NaN();
    });
  }
  return d;
}

void read_shared(const MatrixProduct& p, const Operand& operand, const char* name, const WarpgroupIssuer& issuer) {
  check_descriptor(operand, name, p.record.site);
  const AsyncOperation operation{p.record, issuer};
  for_chunks(operand, [&](uint32_t, uint32_t, uint32_t address) {
    const uint32_t offset = chunk_offset(address, name, p.record.site);
    touch_shared_async(operation, *p.block, Access::read, offset, kChunk);
  });
}

void do_wgmma(uint32_t warpgroup, void** arguments) {
  const auto* const requests = reinterpret_cast<const Request* const*>(arguments);
  const Request& request = *requests[0];
  Block& block = *running->block;
  for (uint32_t i = 0; i < kThreads; ++i) {
    if (!requests[i]->same(request)) {
      fault("warpgroup", "wgmma with operands that differ between threads of the warpgroup", requests[i]->site);
    }
    check_registers(block.threads[warpgroup * kThreads + i], *requests[i]);
  }
  const auto product = std::make_shared<MatrixProduct>();
  product->type = request.type;
  product->block = &block;
  product->warpgroup = warpgroup;
  product->a = {request.a, kRows, request.a_mn_major};
  product->b = {request.b, uint32_t(request.n), request.b_mn_major};
  product->accumulate = request.accumulate;
  product->record = begin_async(block, AgentKind::wgmma, warpgroup, request.site);
  const WarpgroupIssuer issuer(block, warpgroup);
  if (request.a_registers == nullptr) {
    read_shared(*product, product->a, "a", issuer);
  } else {
    for (uint32_t i = 0; i < kThreads; ++i) {
      product->a_registers.insert(product->a_registers.end(), requests[i]->a_registers, requests[i]->a_registers + 4);
    }
  }
  read_shared(*product, product->b, "b", issuer);
  bool fresh;
  product->d = accumulator_of(block, warpgroup, arguments, fresh);
  block.warpgroups[warpgroup].flying.push_back(product);
  for (uint32_t i = 0; i < kThreads; ++i) {
    Thread& thread = block.threads[warpgroup * kThreads + i];
    Registers& registers = registers_at(thread, requests[i]->d, size_t(request.n) * 2);
    ++registers.flying;
    registers.site = requests[i]->site;
    thread.products.push_back(product);
  }
  switch (machine.options.landing) {
    case Landing::early: return run_until(product);
    case Landing::late: return;
    case Landing::random:
      machine.events.push_back({machine.step + machine.random.below(512), &block, [product] { run_until(product); }});
  }
}

void issue(Request& request) {
  const bool mn_major = request.a_mn_major || request.b_mn_major;
  if (request.n % 8 != 0 || request.n < 8 || request.n > 256) {
    fault("wgmma", format("n = %d: a multiple of 8 from 8 to 256", request.n), request.site);
  }
  if (request.type == Wgmma::tf32 && mn_major) fault("wgmma", "only 16-bit types can be MN-major", request.site);
  if (!running->wgmma_fenced) fault("wgmma.fence", "wgmma before any wgmma.fence", request.site);
  meet_warpgroup("wgmma.mma_async", &request, do_wgmma, request.site);
}

}  // namespace

void wgmma(Wgmma type, int n, float* d, uint64_t a, uint64_t b, bool accumulate, bool a_mn_major, bool b_mn_major) {
  Request request{type, n, d, nullptr, a, b, accumulate, a_mn_major, b_mn_major, MOE_SIMT_SITE};
  issue(request);
}

void wgmma_a_registers(Wgmma type, int n, float* d, const uint32_t* a, uint64_t b, bool accumulate, bool b_mn_major) {
  Request request{type, n, d, a, 0, b, accumulate, false, b_mn_major, MOE_SIMT_SITE};
  issue(request);
}

void wgmma_commit_group() {
  Thread& thread = *running;
  thread.product_groups.push_back(std::move(thread.products));
  thread.products.clear();
}

void wgmma_wait_group(int n) {
  Thread& thread = *running;
  thread.site = MOE_SIMT_SITE;
  while (int(thread.product_groups.size()) > n) {
    const auto group = std::move(thread.product_groups.front());
    thread.product_groups.pop_front();
    for (const MatrixProductRef& product : group) end_product(thread, product);
    if (!group.empty()) learn(thread, group.back()->record.agent, group.back()->record.clock);
  }
}

}  // namespace moe::simt

// Shared memory of the CUDA emulator: poisoned at the start of every block, guarded at its end.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SPECULATORS_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPECULATORS_EMULATOR_ASAN 1
#endif
#endif

namespace speculators::emulator {

// What memory holds before a kernel writes it. One value would not do: a NaN is swallowed by fmaxf,
// and a large number by a minimum. So the seed chooses among three 16-bit patterns, each of which
// shows in every type of 16, 32 or 64 bits: NaN in the floating-point types and about 2^31 in int;
// about 8e37 in float and bf16; about -2e38 in them and negative in int.
inline constexpr std::array<std::uint16_t, 3> kPoisonPatterns = {0x7FC5, 0x7E7E, 0xFEFE};

inline std::uint16_t poison_pattern(unsigned seed) {
  return kPoisonPatterns[seed % kPoisonPatterns.size()];
}

inline std::uint64_t poison_bits(std::uint16_t pattern) { return pattern * 0x0001000100010001ull; }

// A block of memory of exactly the requested size. Under AddressSanitizer the byte after it is out
// of bounds; elsewhere some guard bytes follow, and `overrun` says whether a kernel changed them.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(std::size_t bytes, std::size_t alignment = 16)
      : bytes_(bytes),
        alignment_(alignment),
        data_(static_cast<unsigned char*>(
            ::operator new(bytes + kGuardBytes, std::align_val_t{alignment}))) {}
  ~GuardedBuffer() { ::operator delete(data_, std::align_val_t{alignment_}); }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

  void poison(std::uint16_t pattern) {
    for (std::size_t i = 0; i < bytes_; ++i) {
      data_[i] = static_cast<unsigned char>(i % 2 == 0 ? pattern : pattern >> 8);
    }
    std::memset(data_ + bytes_, kGuardByte, kGuardBytes);
  }

  bool overrun() const {
    for (std::size_t i = 0; i < kGuardBytes; ++i) {
      if (data_[bytes_ + i] != kGuardByte) return true;
    }
    return false;
  }

 private:
#if defined(SPECULATORS_EMULATOR_ASAN)
  static constexpr std::size_t kGuardBytes = 0;
#else
  static constexpr std::size_t kGuardBytes = 64;
#endif
  static constexpr unsigned char kGuardByte = 0xDB;

  std::size_t bytes_;
  std::size_t alignment_;
  unsigned char* data_;
};

// One SPECULATORS_SHARED declaration. Its memory is made when a kernel first reaches it, lives to
// the end of the process, and is poisoned at the start of every block, so that no block profits
// from what the one before left there.
class SharedVariable {
 public:
  // constexpr, because a static variable with a run-time constructor has a hidden guard, and that
  // guard would order the threads that pass it and so hide data races from ThreadSanitizer.
  constexpr SharedVariable(std::size_t bytes, std::size_t alignment, const char* name)
      : bytes_(bytes), alignment_(alignment), name_(name) {}

  // The acquire can order the first thread's past before the others' only in the first block that
  // runs the kernel; to the later blocks it says nothing that their start did not say.
  void* storage(std::uint16_t pattern) {
    GuardedBuffer* buffer = buffer_.load(std::memory_order_acquire);
    return (buffer != nullptr ? buffer : make_buffer(pattern))->data();
  }

  static void poison_all(std::uint16_t pattern) {
    for (SharedVariable* v = first_.load(); v != nullptr; v = v->next_) {
      v->buffer_.load()->poison(pattern);
    }
  }

  // The name of a variable behind whose end a kernel wrote, or nullptr.
  static const char* find_overrun() {
    for (SharedVariable* v = first_.load(); v != nullptr; v = v->next_) {
      if (v->buffer_.load()->overrun()) return v->name_;
    }
    return nullptr;
  }

 private:
  GuardedBuffer* make_buffer(std::uint16_t pattern) {
    auto* made = new GuardedBuffer(bytes_, alignment_ < 16 ? 16 : alignment_);
    made->poison(pattern);
    GuardedBuffer* present = nullptr;
    if (!buffer_.compare_exchange_strong(present, made)) {
      delete made;  // another thread of the block came first
      return present;
    }
    next_ = first_.load();
    while (!first_.compare_exchange_weak(next_, this)) {
    }
    return made;
  }

  static inline std::atomic<SharedVariable*> first_{nullptr};

  std::size_t bytes_;
  std::size_t alignment_;
  const char* name_;
  std::atomic<GuardedBuffer*> buffer_{nullptr};
  SharedVariable* next_ = nullptr;
};

}  // namespace speculators::emulator

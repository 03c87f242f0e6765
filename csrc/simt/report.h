// SPDX-License-Identifier: Apache-2.0
// Faults. The first ends the launch: its text says what, where in the kernel, which thread, and how to replay it.
#pragma once
#include <cstdint>
#include <string>

#include "machine.h"

namespace moe::simt {

/// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string format(const char* text, ...);

/// Ends the launch with "<kind>: <text>" and the source line of `site`. Does not return on a fiber.
[[noreturn]] void fault(const char* kind, const std::string& text, const void* site);
/// The same from the scheduler, which then returns to the launcher.
void note_fault(const char* kind, const std::string& text, const void* site);

/// "file.cuh:12 (in f), inlined at other.cuh:40", or module and offset where no line information is found.
std::string source_line(const void* site);
/// Do two places stand in the same line of source?
bool same_line(const void* a, const void* b);
std::string who(const Thread& thread);
std::string who(uint32_t block_serial, uint32_t agent);

}  // namespace moe::simt

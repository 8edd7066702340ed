// What is true of any input; the fuzzer and its regression test share it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rwkv::tokenizer {

// Ends the process when a law does not hold: every byte string comes back from Encode and Decode; decoding in pieces
// equals decoding at once and is UTF-8; a vocabulary file, cut and pasted from the input, is read or refused, never
// worse.
void CheckTokenizer(const uint8_t* data, size_t size);

}  // namespace rwkv::tokenizer

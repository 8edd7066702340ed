#include "services/rwkvctl/load/conversations.h"

namespace rwkv::rwkvctl {

Conversations::Conversations(size_t count) : conversations_(count), lines_(count) {
  for (size_t c = 0; c < count; ++c) idle_.push_back(c);
}

size_t Conversations::TakeIdle() {
  const size_t conversation = idle_.front();
  idle_.pop_front();
  return conversation;
}

void Conversations::End(size_t conversation, uint64_t number) {
  Line& line = lines_[conversation];
  line.ended.insert(number);
  while (line.ended.erase(line.called) > 0) ++line.called;
}

}  // namespace rwkv::rwkvctl

// Who may send the next turn of which conversation: turns of one follow each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <set>
#include <string>
#include <vector>

namespace rwkv::rwkvctl {

// Not thread-safe; the runner's mutex guards it.
class Conversations {
 public:
  struct Conversation {
    std::string session_id;  // Empty: its next turn creates the session.
    uint32_t turns = 0;      // That were taken from this session.
  };

  // All idle at first.
  explicit Conversations(size_t count);

  bool HasIdle() const { return !idle_.empty(); }
  // The one that has been idle for the longest; there is one. Give it back.
  size_t TakeIdle();
  void GiveBack(size_t conversation) { idle_.push_back(conversation); }

  // For turns that belong to one conversation by name. A turn gets its number when it is due, may be sent when that
  // number is called, and ends, sent or not.
  uint64_t Enqueue(size_t conversation) { return lines_[conversation].last++; }
  bool IsCalled(size_t conversation, uint64_t number) const { return lines_[conversation].called == number; }
  void End(size_t conversation, uint64_t number);

  Conversation& at(size_t conversation) { return conversations_[conversation]; }
  size_t size() const { return conversations_.size(); }

 private:
  struct Line {
    uint64_t last = 0;
    uint64_t called = 0;
    std::set<uint64_t> ended;  // Before they were called.
  };

  std::vector<Conversation> conversations_;
  std::vector<Line> lines_;
  std::deque<size_t> idle_;
};

}  // namespace rwkv::rwkvctl

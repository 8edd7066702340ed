// What a lane's scheduler planned, as commands to its workers: the tokens of each entry, what each slot begins from,
// which snapshot is which.
#pragma once

#include "rwkv/v1/worker.pb.h"
#include "services/router/core/core_context.h"
#include "services/router/core/going_on.h"
#include "services/router/core/saves.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_lane.h"
#include "services/router/core/turn_table.h"
#include "services/router/scheduler/scheduler.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Keeps nothing of its own.
class LaneCommands {
 public:
  // All borrowed.
  LaneCommands(const CoreContext& context, const TurnTable& turns, const Saves& saves, const GoingOn& going_on)
      : context_(context), turns_(turns), saves_(saves), going_on_(going_on) {}

  // All that is planned, in the order of the plan, until the epoch turns out to be over.
  void Send(TurnLane& lane) const;

 private:
  void FillAttach(const AttachCommand& command, v1::AttachSequence* attach) const;
  void FillStep(const StepCommand& command, v1::Step* step) const;
  void FillEntry(const StepCommand::Entry& planned, v1::StepEntry* entry) const;
  // False: its snapshot was given up meanwhile.
  bool FillSave(const SaveCommand& command, TurnLane& lane, v1::SaveSnapshot* save) const;
  void FillGoOn(const GoOnCommand& command, v1::GoOn* go_on) const;

  const CoreContext& context_;
  const TurnTable& turns_;
  const Saves& saves_;
  const GoingOn& going_on_;
};

}  // namespace rwkv::router

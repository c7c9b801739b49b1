// Collectives between processes over POSIX shared memory.
//
// Everything is made of transfers between two ranks. Each pair has a mailbox of one chunk in each
// direction; a chunk carries what its sender is doing, so that ranks that disagree are told so.
#pragma once

#include <memory>

#include "hccl/hccl.h"
#include "runtime.h"

namespace sim {

constexpr uint32_t kMaxRanks = 64;
constexpr size_t kChunk = 256 << 10;
constexpr size_t kTextBytes = 192;

struct Mailbox {
  std::atomic<uint64_t> ready, taken;  // chunks written and read
  uint64_t total, size;                // bytes of the transfer and of this chunk
  char what[kTextBytes];               // the sender's call
  char data[kChunk];
};

struct Peer {
  std::atomic<int> pid;
  std::atomic<uint64_t> started;  // start time of the process: pids are used again
  std::atomic<int> left;          // it destroyed the communicator
};

struct Board {
  std::atomic<uint32_t> attached;
  std::atomic<uint32_t> failed;  // 1 while the text is written, 2 once it is there
  char failure[512];
  Peer peers[kMaxRanks];
};

struct Communicator {
  uint32_t size = 0, rank = 0;
  std::string name;
  Board *board = nullptr;
  Mailbox *boxes = nullptr;  // [from][to]
  size_t mapped = 0;
  std::mutex mutex;
  std::vector<const void *> sending, receiving;  // which task uses the mailbox to or from a peer
  std::vector<double> checked;                   // when each peer was last looked at

  Mailbox &box(uint32_t from, uint32_t to) { return boxes[from * size + to]; }
  // Tells all ranks why this communicator is dead; the first reason stays.
  void report_failure(const std::string &text);
  // Why nothing can go on with a peer: a reported failure, or it is gone; else nothing.
  std::string trouble(uint32_t with);
  ~Communicator();
};
using CommunicatorPointer = std::shared_ptr<Communicator>;

// Null, with the error kept, for a handle that is none.
CommunicatorPointer find_communicator(HcclComm handle, const char *caller);

// One direction of a transfer with one peer.
struct Part {
  CommunicatorPointer communicator;
  bool send = false;
  uint32_t peer = 0;
  char *data = nullptr;
  size_t bytes = 0;
  std::string what;  // must be the same on both sides
};

// A collective: its transfers, and what to do when all have arrived.
struct Collective {
  std::string name;
  std::vector<Part> parts;
  std::vector<std::shared_ptr<std::string>> buffers;  // that parts point into
  std::function<void()> finish;
};
// Made anew for every replay, since buffers must not be shared between replays.
using MakeCollective = std::function<Collective()>;
HcclResult launch(const std::string &name, MakeCollective make, aclrtStream stream);

// Runs what other processes wait for.
void drain_remote(const char *what);

size_t type_bytes(HcclDataType type);
const char *type_name(HcclDataType type);
// inputs[0] op inputs[1] op …, in the order of ranks, into `out`. Only summable types.
void reduce(char *out, const std::vector<const char *> &inputs, size_t count, HcclDataType type,
            HcclReduceOp op);
bool can_reduce(HcclDataType type, HcclReduceOp op);

}  // namespace sim

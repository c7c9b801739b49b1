// Communicators: how ranks find each other, and how they notice that one is gone.
#include "communicator.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <new>

namespace sim {
namespace {

constexpr double kCheckSeconds = 0.1;

std::mutex g_communicators_mutex;

std::map<void *, CommunicatorPointer> &communicators() {
  static auto *made = new std::map<void *, CommunicatorPointer>;
  return *made;
}

// State and start time of a process; state 0 if it does not exist.
char process_state(int pid, uint64_t *started) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  const size_t size = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[size] = 0;
  const char *rest = strrchr(text, ')');  // the name may hold anything
  char state = 0;
  unsigned long long start = 0;
  if (!rest || sscanf(rest + 1,
                      " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d "
                      "%llu",
                      &state, &start) < 2) {
    return 0;
  }
  *started = start;
  return state;
}

bool is_alive(const Peer &peer) {
  uint64_t started = 0;
  const char state = process_state(peer.pid, &started);
  return state && state != 'Z' && state != 'X' && started == peer.started;
}

aclError map_board(Communicator &made) {
  const size_t boards = (sizeof(Board) + 4095) / 4096 * 4096;
  made.mapped = boards + sizeof(Mailbox) * made.size * made.size;
  const int file = shm_open(made.name.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, (off_t)made.mapped)) {
    return fail(HCCL_E_SYSCALL, "HcclCommInitRootInfo: no shared memory %s of %zu bytes",
                made.name.c_str(), made.mapped);
  }
  void *at = mmap(nullptr, made.mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (at == MAP_FAILED) return fail(HCCL_E_MEMORY, "HcclCommInitRootInfo: mmap failed");
  made.board = static_cast<Board *>(at);
  made.boxes = reinterpret_cast<Mailbox *>(static_cast<char *>(at) + boards);
  return 0;
}

aclError await_all(Communicator &made) {
  Peer &self = made.board->peers[made.rank];
  uint64_t started = 0;
  process_state(getpid(), &started);
  self.started = started;
  self.pid = getpid();
  ++made.board->attached;
  const double begun = now_seconds();
  Lock lock(g_mutex);
  while (made.board->attached < made.size) {
    if (now_seconds() - begun > options().peer_timeout) {
      return fail(HCCL_E_TIMEOUT,
                  "HcclCommInitRootInfo: %u of %u ranks came within %g s; rank %u gives up",
                  made.board->attached.load(), made.size, options().peer_timeout, made.rank);
    }
    pause(lock, 500);
  }
  return 0;
}

}  // namespace

void Communicator::report_failure(const std::string &text) {
  uint32_t none = 0;
  if (!board->failed.compare_exchange_strong(none, 1)) return;
  snprintf(board->failure, sizeof board->failure, "%s", text.c_str());
  board->failed = 2;
}

std::string Communicator::trouble(uint32_t with) {
  if (board->failed == 2) return board->failure;
  const Peer &peer = board->peers[with];
  if (peer.left) {
    return format("rank %u (process %d) has destroyed the communicator", with, peer.pid.load());
  }
  const double now = now_seconds();
  if (now - checked[with] < kCheckSeconds) return "";
  checked[with] = now;
  if (is_alive(peer)) return "";
  return format("rank %u (process %d) is dead", with, peer.pid.load());
}

Communicator::~Communicator() {
  if (board) munmap(board, mapped);
}

CommunicatorPointer find_communicator(HcclComm handle, const char *caller) {
  std::lock_guard<std::mutex> guard(g_communicators_mutex);
  auto it = communicators().find(handle);
  if (it != communicators().end()) return it->second;
  fail(HCCL_E_PARA, "%s: %p is no communicator, or a destroyed one", caller, handle);
  return nullptr;
}

}  // namespace sim

using namespace sim;

SIM_API HcclResult HcclGetRootInfo(HcclRootInfo *info) {
  static std::atomic<int> next{0};
  memset(info, 0, sizeof *info);
  snprintf(info->internal, sizeof info->internal, "/ascend-plugin-hccl-%d-%d-%llx", getpid(),
           next++, (unsigned long long)(now_seconds() * 1e9));
  return HCCL_SUCCESS;
}

SIM_API HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo *info, uint32_t rank,
                                        HcclComm *handle) {
  if (!size || size > kMaxRanks || rank >= size || info->internal[0] != '/') {
    return (HcclResult)fail(HCCL_E_PARA,
                            "HcclCommInitRootInfo: rank %u of %u; up to %u ranks are simulated",
                            rank, size, kMaxRanks);
  }
  auto made = std::make_shared<Communicator>();
  made->size = size;
  made->rank = rank;
  made->name = info->internal;
  made->sending.resize(size);
  made->receiving.resize(size);
  made->checked.resize(size);
  if (aclError code = map_board(*made)) return (HcclResult)code;
  const aclError code = await_all(*made);
  if (rank == 0) shm_unlink(made->name.c_str());
  if (code) return (HcclResult)code;
  *handle = made.get();
  std::lock_guard<std::mutex> guard(g_communicators_mutex);
  communicators()[made.get()] = made;
  return HCCL_SUCCESS;
}

// The configuration is about buffers and networks; neither exists here.
SIM_API HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo *info,
                                              uint32_t rank, const HcclCommConfig *,
                                              HcclComm *handle) {
  return HcclCommInitRootInfo(size, info, rank, handle);
}

SIM_API HcclResult HcclCommDestroy(HcclComm handle) {
  auto communicator = find_communicator(handle, "HcclCommDestroy");
  if (!communicator) return HCCL_E_PARA;
  drain_remote("HcclCommDestroy");  // peers may still need this rank's part
  communicator->board->peers[communicator->rank].left = 1;
  std::lock_guard<std::mutex> guard(g_communicators_mutex);
  communicators().erase(handle);  // tasks that are left keep it
  return HCCL_SUCCESS;
}

SIM_API HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult *error) {
  auto communicator = find_communicator(handle, "HcclGetCommAsyncError");
  if (!communicator) return HCCL_E_PARA;
  *error = communicator->board->failed ? HCCL_E_REMOTE : HCCL_SUCCESS;
  return HCCL_SUCCESS;
}

SIM_API HcclResult HcclGetCommName(HcclComm handle, char *name) {
  auto communicator = find_communicator(handle, "HcclGetCommName");
  if (!communicator) return HCCL_E_PARA;
  snprintf(name, COMM_NAME_MAX_LENGTH, "%s", communicator->name.c_str());
  return HCCL_SUCCESS;
}

SIM_API HcclResult HcclGetRankSize(HcclComm handle, uint32_t *size) {
  auto communicator = find_communicator(handle, "HcclGetRankSize");
  if (!communicator) return HCCL_E_PARA;
  *size = communicator->size;
  return HCCL_SUCCESS;
}

SIM_API HcclResult HcclGetRankId(HcclComm handle, uint32_t *rank) {
  auto communicator = find_communicator(handle, "HcclGetRankId");
  if (!communicator) return HCCL_E_PARA;
  *rank = communicator->rank;
  return HCCL_SUCCESS;
}

// No optional field of the configuration is honoured.
SIM_API uint32_t HcclGetCommConfigCapability() { return 0; }

// Results here never depend on timing, whatever is asked for.
SIM_API HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }

// The collectives: which parts go where, and what is done when they have arrived.
#include <cstring>

#include "communicator.h"

using namespace sim;

namespace {

using Counts = std::vector<uint64_t>;

// One call of a collective, checked; parts are added with the peer's number.
struct Call {
  CommunicatorPointer comm;
  const char *name;
  HcclDataType type;
  std::string what;  // the call as all ranks must make it

  Part part(bool send, uint32_t peer, char *data, size_t bytes) const {
    return {comm, send, peer, data, bytes, what};
  }
  Collective collective() const { return {name, {}, {}, nullptr}; }
};

HcclResult refuse(const Call &call, const char *why) {
  return (HcclResult)fail(HCCL_E_NOT_SUPPORT, "%s: %s", call.what.c_str(), why);
}

HcclResult begin(Call &call, HcclComm handle, const char *name, HcclDataType type,
                 const std::string &details) {
  call.comm = find_communicator(handle, name);
  if (!call.comm) return HCCL_E_PARA;
  call.name = name;
  call.type = type;
  call.what =
      std::string(name) + "(" + type_name(type) + (details.empty() ? "" : ", ") + details + ")";
  return type_bytes(type) ? HCCL_SUCCESS : refuse(call, "the type is not simulated");
}

HcclResult check_memory(const Call &call, const void *data, size_t bytes) {
  const Found found = find_memory(data);
  if (!bytes || (found.place == Place::kDevice && found.left >= bytes)) return HCCL_SUCCESS;
  return (HcclResult)fail(HCCL_E_PTR, "%s: %p is not %zu bytes of device memory", call.what.c_str(),
                          data, bytes);
}

HcclResult check_reduction(const Call &call, HcclReduceOp op) {
  return can_reduce(call.type, op) ? HCCL_SUCCESS : refuse(call, "HCCL cannot reduce this type");
}

std::shared_ptr<std::string> buffer(Collective &work, size_t bytes) {
  work.buffers.push_back(std::make_shared<std::string>(bytes, '\0'));
  return work.buffers.back();
}

Counts copy_counts(const void *counts, size_t size) {
  auto *values = static_cast<const uint64_t *>(counts);
  return Counts(values, values + size);
}

// Every rank sends its piece p to rank p, and gets the pieces `mine` of all.
HcclResult reduce_pieces(const Call &call, char *send, Counts counts, Counts starts, char *out,
                         HcclReduceOp op, aclrtStream stream) {
  return launch(
      call.name,
      [=] {
        Collective work = call.collective();
        const size_t size = type_bytes(call.type);
        const uint32_t self = call.comm->rank;
        const size_t count = counts[self];
        std::vector<const char *> inputs;
        for (uint32_t peer = 0; peer < call.comm->size; ++peer) {
          if (peer == self) {
            inputs.push_back(send + starts[self] * size);
            continue;
          }
          char *into = &(*buffer(work, count * size))[0];
          inputs.push_back(into);
          work.parts.push_back(
              call.part(true, peer, send + starts[peer] * size, counts[peer] * size));
          work.parts.push_back(call.part(false, peer, into, count * size));
        }
        work.finish = [=] { reduce(out, inputs, count, call.type, op); };
        return work;
      },
      stream);
}

// Every rank sends `counts[p]` elements to rank p and receives the others' into its own places.
HcclResult exchange(const Call &call, char *send, Counts counts, Counts starts, char *out,
                    Counts out_counts, Counts out_starts, aclrtStream stream) {
  return launch(
      call.name,
      [=] {
        Collective work = call.collective();
        const size_t size = type_bytes(call.type);
        const uint32_t self = call.comm->rank;
        for (uint32_t peer = 0; peer < call.comm->size; ++peer) {
          if (peer == self) continue;
          work.parts.push_back(
              call.part(true, peer, send + starts[peer] * size, counts[peer] * size));
          work.parts.push_back(
              call.part(false, peer, out + out_starts[peer] * size, out_counts[peer] * size));
        }
        work.finish = [=] {
          if (counts[self]) {
            memmove(out + out_starts[self] * size, send + starts[self] * size, counts[self] * size);
          }
        };
        return work;
      },
      stream);
}

Counts same(size_t size, uint64_t value) { return Counts(size, value); }

Counts multiples(size_t size, uint64_t step) {
  Counts made;
  for (size_t i = 0; i < size; ++i) made.push_back(i * step);
  return made;
}

}  // namespace

#define BEGIN(type, ...)                                                                     \
  Call call;                                                                                 \
  if (HcclResult code = begin(call, comm, __func__, type, format(__VA_ARGS__))) return code; \
  const size_t size = type_bytes(type);                                                      \
  const uint32_t ranks = call.comm->size;                                                    \
  (void)size, (void)ranks
#define CHECK(expression) \
  if (HcclResult code = (expression)) return code

SIM_API HcclResult HcclAllReduce(void *send, void *out, uint64_t count, HcclDataType type,
                                 HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  BEGIN(type, "%llu elements, operation %d", (unsigned long long)count, op);
  CHECK(check_reduction(call, op));
  CHECK(check_memory(call, send, count * size));
  CHECK(check_memory(call, out, count * size));
  return reduce_pieces(call, (char *)send, same(ranks, count), same(ranks, 0), (char *)out, op,
                       stream);
}

SIM_API HcclResult HcclReduceScatter(void *send, void *out, uint64_t count, HcclDataType type,
                                     HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  BEGIN(type, "%llu elements, operation %d", (unsigned long long)count, op);
  CHECK(check_reduction(call, op));
  CHECK(check_memory(call, send, count * size * ranks));
  CHECK(check_memory(call, out, count * size));
  return reduce_pieces(call, (char *)send, same(ranks, count), multiples(ranks, count), (char *)out,
                       op, stream);
}

SIM_API HcclResult HcclReduceScatterV(void *send, const void *counts, const void *starts, void *out,
                                      uint64_t count, HcclDataType type, HcclReduceOp op,
                                      HcclComm comm, aclrtStream stream) {
  BEGIN(type, "operation %d", op);
  CHECK(check_reduction(call, op));
  CHECK(check_memory(call, out, count * size));
  return reduce_pieces(call, (char *)send, copy_counts(counts, ranks), copy_counts(starts, ranks),
                       (char *)out, op, stream);
}

SIM_API HcclResult HcclReduce(void *send, void *out, uint64_t count, HcclDataType type,
                              HcclReduceOp op, uint32_t root, HcclComm comm, aclrtStream stream) {
  BEGIN(type, "%llu elements, operation %d, root %u", (unsigned long long)count, op, root);
  CHECK(check_reduction(call, op));
  CHECK(check_memory(call, send, count * size));
  if (call.comm->rank != root) {
    return launch(
        call.name,
        [=] {
          Collective work = call.collective();
          work.parts.push_back(call.part(true, root, (char *)send, count * size));
          return work;
        },
        stream);
  }
  CHECK(check_memory(call, out, count * size));
  return launch(
      call.name,
      [=] {
        Collective work = call.collective();
        std::vector<const char *> inputs;
        for (uint32_t peer = 0; peer < ranks; ++peer) {
          char *into = peer == root ? (char *)send : &(*buffer(work, count * size))[0];
          inputs.push_back(into);
          if (peer != root) work.parts.push_back(call.part(false, peer, into, count * size));
        }
        work.finish = [=] { reduce((char *)out, inputs, count, call.type, op); };
        return work;
      },
      stream);
}

SIM_API HcclResult HcclAllGather(void *send, void *out, uint64_t count, HcclDataType type,
                                 HcclComm comm, aclrtStream stream) {
  BEGIN(type, "%llu elements", (unsigned long long)count);
  CHECK(check_memory(call, send, count * size));
  CHECK(check_memory(call, out, count * size * ranks));
  return exchange(call, (char *)send, same(ranks, count), same(ranks, 0), (char *)out,
                  same(ranks, count), multiples(ranks, count), stream);
}

SIM_API HcclResult HcclAllGatherV(void *send, uint64_t count, void *out, const void *counts,
                                  const void *starts, HcclDataType type, HcclComm comm,
                                  aclrtStream stream) {
  BEGIN(type, "unequal parts");
  CHECK(check_memory(call, send, count * size));
  return exchange(call, (char *)send, same(ranks, count), same(ranks, 0), (char *)out,
                  copy_counts(counts, ranks), copy_counts(starts, ranks), stream);
}

SIM_API HcclResult HcclBroadcast(void *data, uint64_t count, HcclDataType type, uint32_t root,
                                 HcclComm comm, aclrtStream stream) {
  BEGIN(type, "%llu elements, root %u", (unsigned long long)count, root);
  CHECK(check_memory(call, data, count * size));
  return launch(
      call.name,
      [=] {
        Collective work = call.collective();
        const bool sends = call.comm->rank == root;
        for (uint32_t peer = 0; peer < ranks; ++peer) {
          if (sends ? peer != root : peer == root) {
            work.parts.push_back(call.part(sends, peer, (char *)data, count * size));
          }
        }
        return work;
      },
      stream);
}

SIM_API HcclResult HcclScatter(void *send, void *out, uint64_t count, HcclDataType type,
                               uint32_t root, HcclComm comm, aclrtStream stream) {
  BEGIN(type, "%llu elements, root %u", (unsigned long long)count, root);
  CHECK(check_memory(call, out, count * size));
  if (call.comm->rank == root) CHECK(check_memory(call, send, count * size * ranks));
  return launch(
      call.name,
      [=] {
        Collective work = call.collective();
        if (call.comm->rank != root) {
          work.parts.push_back(call.part(false, root, (char *)out, count * size));
          return work;
        }
        for (uint32_t peer = 0; peer < ranks; ++peer) {
          char *piece = (char *)send + peer * count * size;
          if (peer != root) work.parts.push_back(call.part(true, peer, piece, count * size));
        }
        work.finish = [=] { memmove(out, (char *)send + root * count * size, count * size); };
        return work;
      },
      stream);
}

SIM_API HcclResult HcclAlltoAll(const void *send, uint64_t count, HcclDataType type,
                                const void *out, uint64_t out_count, HcclDataType, HcclComm comm,
                                aclrtStream stream) {
  BEGIN(type, "%llu elements", (unsigned long long)count);
  CHECK(check_memory(call, send, count * size * ranks));
  CHECK(check_memory(call, out, out_count * size * ranks));
  return exchange(call, (char *)send, same(ranks, count), multiples(ranks, count), (char *)out,
                  same(ranks, out_count), multiples(ranks, out_count), stream);
}

SIM_API HcclResult HcclAlltoAllV(const void *send, const void *counts, const void *starts,
                                 HcclDataType type, const void *out, const void *out_counts,
                                 const void *out_starts, HcclDataType, HcclComm comm,
                                 aclrtStream stream) {
  BEGIN(type, "unequal parts");
  return exchange(call, (char *)send, copy_counts(counts, ranks), copy_counts(starts, ranks),
                  (char *)out, copy_counts(out_counts, ranks), copy_counts(out_starts, ranks),
                  stream);
}

SIM_API HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
  BEGIN(HCCL_DATA_TYPE_INT8, "barrier");
  return exchange(call, nullptr, same(ranks, 0), same(ranks, 0), nullptr, same(ranks, 0),
                  same(ranks, 0), stream);
}

namespace {

// A send meets a receive of another name, so both call themselves the same.
HcclResult point_to_point(Call &call, const std::vector<HcclSendRecvItem> &items,
                          aclrtStream stream) {
  const std::string both = "a send and receive of ";
  for (const auto &item : items) {
    if (item.remoteRank >= call.comm->size) return refuse(call, "there is no such rank");
    CHECK(check_memory(call, item.buf, item.count * type_bytes(item.dataType)));
  }
  return launch(
      call.name,
      [=] {
        Collective work = call.collective();
        for (const auto &item : items) {
          Part part = call.part(item.sendRecvType == HCCL_SEND, item.remoteRank, (char *)item.buf,
                                item.count * type_bytes(item.dataType));
          part.what = both + type_name(item.dataType);
          work.parts.push_back(part);
        }
        return work;
      },
      stream);
}

}  // namespace

SIM_API HcclResult HcclSend(void *data, uint64_t count, HcclDataType type, uint32_t peer,
                            HcclComm comm, aclrtStream stream) {
  BEGIN(type, "to rank %u", peer);
  return point_to_point(call, {{HCCL_SEND, data, count, type, peer}}, stream);
}

SIM_API HcclResult HcclRecv(void *data, uint64_t count, HcclDataType type, uint32_t peer,
                            HcclComm comm, aclrtStream stream) {
  BEGIN(type, "from rank %u", peer);
  return point_to_point(call, {{HCCL_RECV, data, count, type, peer}}, stream);
}

SIM_API HcclResult HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t count, HcclComm comm,
                                     aclrtStream stream) {
  BEGIN(HCCL_DATA_TYPE_INT8, "%u items", count);
  return point_to_point(call, {items, items + count}, stream);
}

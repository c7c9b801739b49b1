// Reductions of the collectives: in the order of ranks, in float32 or 64 bits, rounded once.
#include <cstring>

#include "communicator.h"

namespace sim {
namespace {

float from_bf16(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float made;
  memcpy(&made, &bits, sizeof made);
  return made;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class Value>
Value combine(Value a, Value b, HcclReduceOp op) {
  switch (op) {
    case HCCL_REDUCE_SUM:
      return a + b;
    case HCCL_REDUCE_PROD:
      return a * b;
    case HCCL_REDUCE_MAX:
      return b > a || b != b ? b : a;  // NaN stays
    default:
      return b < a || b != b ? b : a;
  }
}

template <class Element, class Value, class Load, class Store>
void reduce_as(char *out, const std::vector<const char *> &inputs, size_t count, HcclReduceOp op,
               Load load, Store store) {
  for (size_t i = 0; i < count; ++i) {
    Element element;
    memcpy(&element, inputs[0] + i * sizeof element, sizeof element);
    Value value = load(element);
    for (size_t rank = 1; rank < inputs.size(); ++rank) {
      memcpy(&element, inputs[rank] + i * sizeof element, sizeof element);
      value = combine<Value>(value, load(element), op);
    }
    element = store(value);
    memcpy(out + i * sizeof element, &element, sizeof element);
  }
}

template <class Element, class Value>
void reduce_plain(char *out, const std::vector<const char *> &inputs, size_t count,
                  HcclReduceOp op) {
  reduce_as<Element, Value>(
      out, inputs, count, op, [](Element e) { return (Value)e; },
      [](Value v) { return (Element)v; });
}

struct Type {
  const char *name;
  size_t bytes;
};

Type describe(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return {"int8", 1};
    case HCCL_DATA_TYPE_INT16:
      return {"int16", 2};
    case HCCL_DATA_TYPE_INT32:
      return {"int32", 4};
    case HCCL_DATA_TYPE_FP16:
      return {"float16", 2};
    case HCCL_DATA_TYPE_FP32:
      return {"float32", 4};
    case HCCL_DATA_TYPE_INT64:
      return {"int64", 8};
    case HCCL_DATA_TYPE_UINT64:
      return {"uint64", 8};
    case HCCL_DATA_TYPE_UINT8:
      return {"uint8", 1};
    case HCCL_DATA_TYPE_UINT16:
      return {"uint16", 2};
    case HCCL_DATA_TYPE_UINT32:
      return {"uint32", 4};
    case HCCL_DATA_TYPE_FP64:
      return {"float64", 8};
    case HCCL_DATA_TYPE_BFP16:
      return {"bfloat16", 2};
    default:
      return {"an unknown type", 0};
  }
}

}  // namespace

size_t type_bytes(HcclDataType type) { return describe(type).bytes; }
const char *type_name(HcclDataType type) { return describe(type).name; }

bool can_reduce(HcclDataType type, HcclReduceOp op) {
  if (op < HCCL_REDUCE_SUM || op > HCCL_REDUCE_MIN) return false;
  switch (type) {  // as HCCL documents them
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_FP32:
    case HCCL_DATA_TYPE_BFP16:
      return true;
    default:
      return false;
  }
}

void reduce(char *out, const std::vector<const char *> &inputs, size_t count, HcclDataType type,
            HcclReduceOp op) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return reduce_plain<int8_t, int64_t>(out, inputs, count, op);
    case HCCL_DATA_TYPE_INT16:
      return reduce_plain<int16_t, int64_t>(out, inputs, count, op);
    case HCCL_DATA_TYPE_INT32:
      return reduce_plain<int32_t, int64_t>(out, inputs, count, op);
    case HCCL_DATA_TYPE_INT64:
      return reduce_plain<int64_t, int64_t>(out, inputs, count, op);
    case HCCL_DATA_TYPE_FP16:
      return reduce_plain<_Float16, float>(out, inputs, count, op);
    case HCCL_DATA_TYPE_BFP16:
      return reduce_as<uint16_t, float>(out, inputs, count, op, from_bf16, to_bf16);
    default:
      return reduce_plain<float, float>(out, inputs, count, op);
  }
}

}  // namespace sim

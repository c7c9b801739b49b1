// The op-api objects that an operator's arguments are made of. Python reads these structs, so
// their layout is part of the interface (ops/sim/arguments.py).
//
// Live objects are registered: a pointer that a wrong hand-typed signature takes for a tensor is
// found out before it is read.
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "runtime.h"

namespace {

enum Kind { kTensor = 1, kScalar, kInts, kFloats, kBools, kTensors, kScalars };
constexpr int kMaxDims = 16;

std::mutex g_objects_mutex;

std::unordered_map<const void *, int> &objects() {
  static auto *made = new std::unordered_map<const void *, int>;
  return *made;
}

template <class Object>
Object *keep(Object *object, int kind) {
  std::lock_guard<std::mutex> guard(g_objects_mutex);
  objects()[object] = kind;
  return object;
}

bool drop(const void *object, int kind) {
  std::lock_guard<std::mutex> guard(g_objects_mutex);
  auto it = objects().find(object);
  if (it == objects().end() || it->second != kind) return false;
  objects().erase(it);
  return true;
}

}  // namespace

size_t sim::element_bytes(int dtype) {
  switch (dtype) {
    case ACL_INT8:
    case ACL_UINT8:
    case ACL_BOOL:
      return 1;
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_INT16:
    case ACL_UINT16:
      return 2;
    case ACL_FLOAT:
    case ACL_INT32:
    case ACL_UINT32:
      return 4;
    case ACL_INT64:
    case ACL_UINT64:
    case ACL_DOUBLE:
    case ACL_COMPLEX64:
      return 8;
    case ACL_COMPLEX128:
      return 16;
    default:
      return 0;
  }
}

struct aclTensor {
  int64_t magic, nd, dims[kMaxDims], strides[kMaxDims];
  int64_t offset, dtype, format, nsd, sdims[kMaxDims];
  void *data;
};

struct aclScalar {
  int64_t magic, dtype;
  char value[16];
};

struct aclArray {
  int64_t magic, count;
  void *items;
};

namespace {

aclArray *make_array(int kind, const void *items, uint64_t count, size_t size) {
  auto *array = new aclArray{kind, (int64_t)count, malloc(count * size + 8)};
  if (count) memcpy(array->items, items, count * size);
  return keep(array, kind);
}

int destroy_array(const aclArray *array, int kind) {
  if (!array) return 0;
  if (!drop(array, kind)) {
    return sim::fail(ACL_ERROR_INVALID_PARAM, "%p is no op-api array of kind %d", (void *)array,
                     kind);
  }
  free(array->items);
  delete array;
  return 0;
}

}  // namespace

SIM_API int64_t sim_object_kind(void *object) {
  std::lock_guard<std::mutex> guard(g_objects_mutex);
  auto it = objects().find(object);
  return it == objects().end() ? 0 : it->second;
}

SIM_API int64_t sim_object_count() {
  std::lock_guard<std::mutex> guard(g_objects_mutex);
  return (int64_t)objects().size();
}

SIM_API aclTensor *aclCreateTensor(const int64_t *dims, uint64_t count, aclDataType dtype,
                                   const int64_t *strides, int64_t offset, aclFormat format,
                                   const int64_t *storage_dims, uint64_t storage_count,
                                   void *data) {
  if (count > kMaxDims || storage_count > kMaxDims) {
    sim::fail(ACL_ERROR_INVALID_PARAM, "aclCreateTensor: %llu dimensions; allowed are up to %d",
              (unsigned long long)count, kMaxDims);
    return nullptr;
  }
  auto *tensor = new aclTensor{};
  tensor->magic = kTensor;
  tensor->nd = (int64_t)count;
  tensor->offset = offset;
  tensor->dtype = dtype;
  tensor->format = format;
  tensor->nsd = (int64_t)storage_count;
  tensor->data = data;
  int64_t dense = 1;
  for (int i = (int)count - 1; i >= 0; --i) {
    tensor->dims[i] = dims[i];
    tensor->strides[i] = strides ? strides[i] : dense;
    dense *= dims[i];
  }
  for (uint64_t i = 0; i < storage_count; ++i) tensor->sdims[i] = storage_dims[i];
  return keep(tensor, kTensor);
}

SIM_API int aclDestroyTensor(const aclTensor *tensor) {
  if (tensor && drop(tensor, kTensor)) delete tensor;
  return 0;
}

SIM_API aclScalar *aclCreateScalar(void *value, aclDataType dtype) {
  const size_t bytes = sim::element_bytes(dtype);
  if (!bytes) {
    sim::fail(ACL_ERROR_INVALID_PARAM, "aclCreateScalar: data type %d is not simulated", dtype);
    return nullptr;
  }
  auto *scalar = new aclScalar{kScalar, dtype, {}};
  memcpy(scalar->value, value, bytes);
  return keep(scalar, kScalar);
}

SIM_API int aclDestroyScalar(const aclScalar *scalar) {
  if (scalar && drop(scalar, kScalar)) delete scalar;
  return 0;
}

SIM_API aclArray *aclCreateIntArray(const int64_t *items, uint64_t count) {
  return make_array(kInts, items, count, sizeof *items);
}

SIM_API aclArray *aclCreateFloatArray(const float *items, uint64_t count) {
  return make_array(kFloats, items, count, sizeof *items);
}

SIM_API aclArray *aclCreateBoolArray(const bool *items, uint64_t count) {
  return make_array(kBools, items, count, sizeof *items);
}

SIM_API aclArray *aclCreateTensorList(const aclTensor *const *items, uint64_t count) {
  return make_array(kTensors, items, count, sizeof *items);
}

SIM_API aclArray *aclCreateScalarList(const aclScalar *const *items, uint64_t count) {
  return make_array(kScalars, items, count, sizeof *items);
}

SIM_API int aclDestroyIntArray(const aclArray *array) { return destroy_array(array, kInts); }
SIM_API int aclDestroyFloatArray(const aclArray *array) { return destroy_array(array, kFloats); }
SIM_API int aclDestroyBoolArray(const aclArray *array) { return destroy_array(array, kBools); }

// A list owns its members.
SIM_API int aclDestroyTensorList(const aclArray *array) {
  for (int64_t i = 0; array && i < array->count; ++i) {
    aclDestroyTensor(static_cast<aclTensor **>(array->items)[i]);
  }
  return destroy_array(array, kTensors);
}

SIM_API int aclDestroyScalarList(const aclArray *array) {
  for (int64_t i = 0; array && i < array->count; ++i) {
    aclDestroyScalar(static_cast<aclScalar **>(array->items)[i]);
  }
  return destroy_array(array, kScalars);
}

// The caller deletes the array with delete[].
SIM_API int aclGetViewShape(const aclTensor *tensor, int64_t **dims, uint64_t *count) {
  *count = tensor->nd;
  *dims = new int64_t[tensor->nd + 1];
  memcpy(*dims, tensor->dims, sizeof(int64_t) * tensor->nd);
  return 0;
}

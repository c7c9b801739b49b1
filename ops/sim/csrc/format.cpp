// Casts between the plain format and tiles (FRACTAL_NZ), which torch_npu still asks the older
// single-operator interface for. Nothing else of that interface is simulated.
#include <algorithm>
#include <cstring>

#include "runtime.h"

struct aclTensorDesc {
  aclDataType dtype;
  aclFormat format, storage_format;
  std::vector<int64_t> dims, storage_dims;
};

struct aclDataBuffer {
  void *data;
  size_t size;
};

struct aclopAttr {};

namespace sim {
namespace {

size_t product(const std::vector<int64_t> &dims, size_t first, size_t last) {
  size_t made = 1;
  for (size_t i = first; i < last; ++i) made *= dims[i];
  return made;
}

// [..., h, w] <-> [..., w/w0, h/h0, h0, w0], the rest of the last tiles zero.
void convert_tiles(const aclTensorDesc &plain, const aclTensorDesc &tiled, char *a, char *b,
                   bool to_tiles) {
  const size_t bytes = element_bytes(plain.dtype), nd = plain.dims.size();
  const size_t w = plain.dims[nd - 1], h = plain.dims[nd - 2],
               batch = product(plain.dims, 0, nd - 2);
  const auto &s = tiled.storage_dims;
  const size_t n = s.size(), w0 = s[n - 1], h0 = s[n - 2], h1 = s[n - 3];
  const size_t matrix = product(s, n - 4, n);
  if (to_tiles) memset(b, 0, batch * matrix * bytes);
  for (size_t k = 0; k < batch; ++k) {
    for (size_t i = 0; i < h; ++i) {
      for (size_t j = 0; j < w; j += w0) {  // a row of a tile at once
        const size_t tile = (j / w0 * h1 + i / h0) * h0 * w0 + i % h0 * w0;
        const size_t run = std::min(w0, w - j) * bytes;
        char *p = a + ((k * h + i) * w + j) * bytes, *q = b + (k * matrix + tile) * bytes;
        to_tiles ? memcpy(q, p, run) : memcpy(p, q, run);
      }
    }
  }
}

bool is_tiled(const aclTensorDesc &desc) { return desc.storage_format == ACL_FORMAT_FRACTAL_NZ; }

aclError check_cast(const aclTensorDesc &from, const aclTensorDesc &to, const aclDataBuffer &in,
                    const aclDataBuffer &out) {
  const auto &plain = is_tiled(from) ? to : from, &tiled = is_tiled(from) ? from : to;
  const bool cast = is_tiled(from) != is_tiled(to);
  if (!element_bytes(from.dtype) || from.dtype != to.dtype ||
      (cast && (plain.dims.size() < 2 || tiled.storage_dims.size() < 4 ||
                plain.storage_format != ACL_FORMAT_ND))) {
    return fail(ACL_ERROR_UNSUPPORTED_DATA_TYPE,
                "a cast from format %d to %d (types %d, %d) is not simulated; 2 and 29 are",
                from.storage_format, to.storage_format, from.dtype, to.dtype);
  }
  if (find_memory(in.data).left < in.size || find_memory(out.data).left < out.size) {
    return fail(ACL_ERROR_INVALID_PARAM, "a format cast leaves its device memory");
  }
  return 0;
}

aclError run_cast(const char *type, const aclTensorDesc &from, const aclTensorDesc &to,
                  const aclDataBuffer &in, const aclDataBuffer &out, aclrtStream stream) {
  if (strcmp(type, "Identity") && strcmp(type, "TransData")) {
    return fail(ACL_ERROR_OP_NOT_FOUND,
                "the operator %s of the aclop interface is not simulated; torch_npu reaches it "
                "where no aclnn operator is known for the call",
                type);
  }
  if (aclError code = check_cast(from, to, in, out)) return code;
  return submit(stream, type, call_operation(type, [=](int64_t) {
                  char *a = static_cast<char *>(in.data), *b = static_cast<char *>(out.data);
                  if (is_tiled(from) == is_tiled(to)) {
                    memmove(b, a, std::min(in.size, out.size));
                  } else if (is_tiled(to)) {
                    convert_tiles(from, to, a, b, true);
                  } else {
                    convert_tiles(to, from, b, a, false);
                  }
                  return Outcome{};
                }));
}

}  // namespace
}  // namespace sim

using namespace sim;

SIM_API aclTensorDesc *aclCreateTensorDesc(aclDataType dtype, int count, const int64_t *dims,
                                           aclFormat format) {
  const std::vector<int64_t> shape(dims, dims + count);
  return new aclTensorDesc{dtype, format, format, shape, shape};
}

SIM_API void aclDestroyTensorDesc(const aclTensorDesc *desc) { delete desc; }

SIM_API aclError aclSetTensorFormat(aclTensorDesc *desc, aclFormat format) {
  desc->storage_format = format;
  return 0;
}

SIM_API aclError aclSetTensorShape(aclTensorDesc *desc, int count, const int64_t *dims) {
  desc->storage_dims.assign(dims, dims + count);
  return 0;
}

SIM_API aclDataType aclGetTensorDescType(const aclTensorDesc *desc) { return desc->dtype; }
SIM_API aclFormat aclGetTensorDescFormat(const aclTensorDesc *desc) { return desc->format; }
SIM_API size_t aclGetTensorDescNumDims(const aclTensorDesc *desc) { return desc->dims.size(); }

SIM_API aclError aclGetTensorDescDimV2(const aclTensorDesc *desc, size_t index, int64_t *size) {
  if (index >= desc->dims.size()) return fail(ACL_ERROR_INVALID_PARAM, "no dimension %zu", index);
  *size = desc->dims[index];
  return 0;
}

SIM_API aclDataBuffer *aclCreateDataBuffer(void *data, size_t size) {
  return new aclDataBuffer{data, size};
}

SIM_API aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
  delete buffer;
  return 0;
}

SIM_API aclopAttr *aclopCreateAttr() { return new aclopAttr; }
SIM_API void aclopDestroyAttr(const aclopAttr *attribute) { delete attribute; }

SIM_API aclError aclopCompileAndExecute(const char *type, int, const aclTensorDesc *const in_desc[],
                                        const aclDataBuffer *const in[], int,
                                        const aclTensorDesc *const out_desc[],
                                        aclDataBuffer *const out[], const aclopAttr *,
                                        aclopEngineType, aclopCompileType, const char *,
                                        aclrtStream stream) {
  return run_cast(type, *in_desc[0], *out_desc[0], *in[0], *out[0], stream);
}

SIM_API aclError aclopCompileAndExecuteV2(const char *type, int, aclTensorDesc *in_desc[],
                                          aclDataBuffer *in[], int, aclTensorDesc *out_desc[],
                                          aclDataBuffer *out[], aclopAttr *, aclopEngineType,
                                          aclopCompileType, const char *, aclrtStream stream) {
  return run_cast(type, *in_desc[0], *out_desc[0], *in[0], *out[0], stream);
}

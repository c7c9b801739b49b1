// Python, reached by dlsym: the stand-ins are also loaded by programs that have none.
#include <dlfcn.h>

#include <chrono>

#include "runtime.h"

namespace sim {
namespace {

template <class Function>
Function symbol(const char *name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

std::string text_of_error() {
  static auto fetch = symbol<void (*)(void **, void **, void **)>("PyErr_Fetch");
  static auto normalise = symbol<void (*)(void **, void **, void **)>("PyErr_NormalizeException");
  static auto represent = symbol<void *(*)(void *)>("PyObject_Repr");
  static auto utf8 = symbol<const char *(*)(void *)>("PyUnicode_AsUTF8");
  void *type = nullptr, *value = nullptr, *trace = nullptr;
  fetch(&type, &value, &trace);
  normalise(&type, &value, &trace);
  void *text = value ? represent(value) : nullptr;
  const char *characters = text ? utf8(text) : nullptr;
  return characters ? characters : "unknown error";  // the objects are leaked: this is the end
}

}  // namespace

std::mutex g_mutex;
// Never destroyed: threads may wait when the process ends.
std::condition_variable &g_changed = *new std::condition_variable;

bool python_runs() {
  static auto initialised = symbol<int (*)()>("Py_IsInitialized");
  static auto finalising = symbol<int (*)()>("_Py_IsFinalizing");
  return initialised && initialised() && !(finalising && finalising());
}

std::string python_import(const char *module) {
  static auto ensure = symbol<int (*)()>("PyGILState_Ensure");
  static auto release = symbol<void (*)(int)>("PyGILState_Release");
  static auto import = symbol<void *(*)(const char *)>("PyImport_ImportModule");
  if (!python_runs()) return "no Python runs in this process";
  const int state = ensure();
  std::string error;
  if (!import(module)) error = text_of_error();
  release(state);
  return error;
}

void pause(Lock &lock, int microseconds) {
  static auto check = symbol<int (*)()>("PyGILState_Check");
  static auto save = symbol<void *(*)()>("PyEval_SaveThread");
  static auto restore = symbol<void (*)(void *)>("PyEval_RestoreThread");
  void *state = python_runs() && check() ? save() : nullptr;
  g_changed.wait_for(lock, std::chrono::microseconds(microseconds));
  if (!state) return;
  lock.unlock();  // a thread that runs Python may need it before it gives Python's lock back
  restore(state);
  lock.lock();
}

double now_seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace sim

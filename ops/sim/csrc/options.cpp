// The options of `ascend-plugin sim run`, out of the environment variable that carries them.
#include <cstdlib>
#include <random>

#include "runtime.h"

namespace sim {
namespace {

// Reads a JSON object whose keys and values are all strings; that is all options.py writes.
std::map<std::string, std::string> parse(const char *text) {
  std::map<std::string, std::string> found;
  std::vector<std::string> strings;
  for (const char *at = text; *at; ++at) {
    if (*at != '"') continue;
    std::string value;
    for (++at; *at && *at != '"'; ++at) {
      if (*at == '\\' && at[1] == 'u') {  // a surrogate or a code point: only ASCII is needed
        value += (char)strtol(std::string(at + 2, 4).c_str(), nullptr, 16);
        at += 5;
        continue;
      }
      if (*at == '\\' && at[1]) ++at;
      value += *at;
    }
    strings.push_back(value);
    if (!*at) break;
  }
  for (size_t i = 0; i + 1 < strings.size(); i += 2) found[strings[i]] = strings[i + 1];
  return found;
}

// CANN's own variable: a list of device numbers that ends at the first one that does not exist.
int count_visible(int devices) {
  const char *at = getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!at) return devices;
  int count = 0;
  for (;;) {
    char *end = nullptr;
    const long number = strtol(at, &end, 10);
    if (end == at || number < 0 || number >= devices) return count;
    ++count;
    if (*end != ',') return count;
    at = end + 1;
  }
}

Options read() {
  Options made;
  const char *text = getenv("ASCEND_PLUGIN_SIM");
  if (!text) return made;
  made.all = parse(text);
  auto get = [&](const char *name, const std::string &otherwise) {
    auto it = made.all.find(name);
    return it == made.all.end() ? otherwise : it->second;
  };
  made.devices = count_visible(atoi(get("devices", "1").c_str()));
  made.memory = strtoull(get("memory", "8589934592").c_str(), nullptr, 10);
  made.streams = strtoull(get("streams", "2048").c_str(), nullptr, 10);
  made.soc = get("soc", made.soc);
  made.seed = strtoull(get("seed", "0").c_str(), nullptr, 10);
  made.timeout = atof(get("timeout", "60").c_str());
  made.peer_timeout = atof(get("peer_timeout", "600").c_str());
  const std::string schedule = get("schedule", "lazy");
  made.schedule = schedule == "eager"    ? Schedule::kEager
                  : schedule == "random" ? Schedule::kRandom
                                         : Schedule::kLazy;
  return made;
}

}  // namespace

const Options &options() {
  static const Options made = read();
  return made;
}

uint64_t draw() {
  static std::mt19937_64 generator(options().seed);
  return generator();
}

}  // namespace sim

SIM_API const char *sim_option(const char *name) {
  const auto &all = sim::options().all;
  auto it = all.find(name);
  return it == all.end() ? "" : it->second.c_str();
}

SIM_API const char *aclrtGetSocName() { return sim::options().soc.c_str(); }

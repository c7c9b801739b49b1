// Sort32, MrgSort and Extract: descending sorts of records (score, index) of 8 bytes.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

namespace AscendC {

/// Lengths (in records) and number of the lists that MrgSort merges.
struct MrgSort4Info {
  MrgSort4Info() = default;
  MrgSort4Info(const uint16_t lengths[4], bool suspend, uint16_t valid, uint16_t repeats)
      : ifExhaustedSuspension(suspend),
        validBit(valid),
        repeatTimes(static_cast<uint8_t>(repeats)) {
    std::copy(lengths, lengths + 4, elementLengths);
  }

  uint16_t elementLengths[4] = {0, 0, 0, 0};
  bool ifExhaustedSuspension = false;
  uint16_t validBit = 0;
  uint8_t repeatTimes = 1;
};

/// The lists that MrgSort merges; unused ones may be any tensor.
template <class T>
struct MrgSortSrcList {
  MrgSortSrcList() = default;
  MrgSortSrcList(const LocalTensor<T>& first, const LocalTensor<T>& second,
                 const LocalTensor<T>& third, const LocalTensor<T>& fourth)
      : src1(first), src2(second), src3(third), src4(fourth) {}

  LocalTensor<T> src1;
  LocalTensor<T> src2;
  LocalTensor<T> src3;
  LocalTensor<T> src4;
};

}  // namespace AscendC

namespace ascendc_host {

/// A record: the score in the first bytes (half: two of them), the index in the last four.
template <class T>
struct SortRecord {
  T score;
  uint32_t index;
};

constexpr uint32_t RECORD_BYTES = 8;
constexpr uint32_t SORT_WIDTH = 32;

template <class T>
SortRecord<T> load_record(const uint8_t* data) {
  SortRecord<T> record;
  std::memcpy(&record.score, data, sizeof(T));
  std::memcpy(&record.index, data + 4, 4);
  return record;
}
template <class T>
void store_record(uint8_t* data, const SortRecord<T>& record) {
  std::memset(data, 0, RECORD_BYTES);
  std::memcpy(data, &record.score, sizeof(T));
  std::memcpy(data + 4, &record.index, 4);
}

/// Merges lists by score, the earlier list first among equals.
template <class T>
void merge_lists(uint8_t* target, const uint8_t* const* lists, const uint32_t* lengths,
                 uint32_t count) {
  uint32_t taken[4] = {0, 0, 0, 0};
  for (;;) {
    int best = -1;
    for (uint32_t i = 0; i < count; ++i) {
      if (taken[i] == lengths[i]) continue;
      const T score = load_record<T>(lists[i] + taken[i] * RECORD_BYTES).score;
      if (best < 0 || score > load_record<T>(lists[best] + taken[best] * RECORD_BYTES).score) {
        best = static_cast<int>(i);
      }
    }
    if (best < 0) return;
    std::memcpy(target, lists[best] + taken[best] * RECORD_BYTES, RECORD_BYTES);
    target += RECORD_BYTES;
    ++taken[best];
  }
}

template <class T>
void require_sorted(const uint8_t* list, uint32_t length, uint32_t which) {
  for (uint32_t i = 1; i < length; ++i) {
    const T before = load_record<T>(list + (i - 1) * RECORD_BYTES).score;
    const T after = load_record<T>(list + i * RECORD_BYTES).score;
    HOST_CHECK(!(after > before), "MrgSort: list %u is not in descending order at record %u", which,
               i);
  }
}

/// Lists of a merge: where they begin and how long they are.
struct MergeLists {
  uint32_t count;
  uint32_t total;
  const uint8_t* data[4];
  uint32_t lengths[4];
};

/// The lists that `info` describes, checked; `data` is still open.
template <class T>
MergeLists checked_lists(const AscendC::LocalTensor<T> (&sources)[4],
                         const AscendC::MrgSort4Info& info) {
  HOST_CHECK(info.validBit == 3 || info.validBit == 7 || info.validBit == 15,
             "MrgSort: validBit %u is not 3, 7 or 15", info.validBit);
  HOST_CHECK(!info.ifExhaustedSuspension, "MrgSort: ifExhaustedSuspension is not modelled");
  MergeLists lists{};
  lists.count = info.validBit == 3 ? 2 : info.validBit == 7 ? 3 : 4;
  const uint16_t* given = info.elementLengths;
  const uint32_t repeats = info.repeatTimes;
  for (uint32_t i = 0; i < lists.count; ++i) {
    HOST_CHECK(given[i] <= 4095, "MrgSort: list %u has %u records; at most 4095", i, given[i]);
    HOST_CHECK(repeats == 1 || (lists.count == 4 && given[i] == given[0]),
               "MrgSort: %u repeats need four lists of equal length", repeats);
    HOST_CHECK(
        repeats == 1 || sources[i].offset() == sources[0].offset() + i * given[0] * RECORD_BYTES,
        "MrgSort: with repeats, list %u must begin where list %u ends", i, i - 1);
    lists.lengths[i] = given[i];
    lists.total += given[i];
  }
  HOST_CHECK(lists.total > 0, "MrgSort: all lists are empty");
  return lists;
}

/// Merges each group of lists; those of a repeat lie behind those of the one before.
template <class T>
void merge_repeats(uint8_t* target, const MergeLists& lists, uint32_t repeats) {
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    const uint64_t skip = uint64_t{repeat} * lists.total * RECORD_BYTES;
    const uint8_t* data[4];
    for (uint32_t i = 0; i < lists.count; ++i) {
      data[i] = lists.data[i] + skip;
      require_sorted<T>(data[i], lists.lengths[i], i);
    }
    merge_lists<T>(target + skip, data, lists.lengths, lists.count);
  }
}

}  // namespace ascendc_host

namespace AscendC {

/// Sorts 32 scores a repeat in descending order, equal ones in the order they came, and stores
/// records of score and index.
template <class T>
void Sort32(const LocalTensor<T>& dst, const LocalTensor<T>& src0,
            const LocalTensor<uint32_t>& src1, const int32_t repeatTime) {
  using namespace ascendc_host;
  static_assert(is_one_of<T, half, float>, "Sort32: half and float only");
  constexpr const char* API = "Sort32";
  HOST_CHECK(repeatTime >= 0 && repeatTime <= 255, "Sort32: repeatTime %d is not in 0..255",
             repeatTime);
  if (repeatTime == 0) return;
  const Lanes lanes = lanes_of_count(API, int64_t{repeatTime} * SORT_WIDTH);
  const T* scores = operand(API, src0, lanes, {});
  const uint32_t* indices = operand(API, src1, lanes, {});
  const uint64_t bytes = uint64_t{lanes.count} * RECORD_BYTES;
  auto* to = reinterpret_cast<uint8_t*>(dst.pointer(API, bytes / sizeof(T)));
  Accesses accesses{src0.access(0, lanes.count, false), src1.access(0, lanes.count, false),
                    dst.byte_access(0, bytes, true)};
  issue_vector(
      API,
      [=] {
        for (uint32_t first = 0; first < lanes.count; first += SORT_WIDTH) {
          std::vector<SortRecord<T>> records;
          for (uint32_t i = first; i < first + SORT_WIDTH; ++i) {
            records.push_back({scores[i], indices[i]});
          }
          std::stable_sort(records.begin(), records.end(),
                           [](const auto& a, const auto& b) { return a.score > b.score; });
          for (uint32_t i = 0; i < SORT_WIDTH; ++i) {
            store_record(to + (first + i) * RECORD_BYTES, records[i]);
          }
        }
      },
      std::move(accesses), VECTOR_START_CYCLES + 2ull * repeatTime);
}

/// Merges two to four sorted lists (validBit 3, 7 or 15) into one.
///
/// With repeats, four lists of equal length lie one behind the other, and so do the groups of four.
template <class T>
void MrgSort(const LocalTensor<T>& dst, const MrgSortSrcList<T>& src, const MrgSort4Info& info) {
  using namespace ascendc_host;
  static_assert(is_one_of<T, half, float>, "MrgSort: half and float only");
  constexpr const char* API = "MrgSort";
  const uint32_t repeats = info.repeatTimes;
  if (repeats == 0) return;
  const LocalTensor<T> sources[4] = {src.src1, src.src2, src.src3, src.src4};
  MergeLists lists = checked_lists(sources, info);
  const uint64_t bytes = uint64_t{lists.total} * RECORD_BYTES * repeats;
  auto* to = reinterpret_cast<uint8_t*>(dst.pointer(API, bytes / sizeof(T)));
  Accesses accesses;
  for (uint32_t i = 0; i < lists.count; ++i) {
    // With repeats the first list stands for all of them: they lie one behind the other.
    const bool all = repeats > 1 && i == 0;
    const uint64_t own = all ? bytes : uint64_t{lists.lengths[i]} * RECORD_BYTES;
    if (own == 0) continue;
    lists.data[i] =
        reinterpret_cast<const uint8_t*>(sources[i].pointer(API, own / sizeof(T), RECORD_BYTES));
    HOST_CHECK(
        dst.offset() + bytes <= sources[i].offset() || sources[i].offset() + own <= dst.offset(),
        "MrgSort: the destination overlaps list %u", i);
    accesses.push_back(sources[i].byte_access(0, own, false));
  }
  accesses.push_back(dst.byte_access(0, bytes, true));
  issue_vector(
      API, [=] { merge_repeats<T>(to, lists, repeats); }, std::move(accesses),
      VECTOR_START_CYCLES + uint64_t{lists.total} * repeats / 2);
}

/// Splits 32 records a repeat into scores and indices.
template <class T>
void Extract(const LocalTensor<T>& dstValue, const LocalTensor<uint32_t>& dstIndex,
             const LocalTensor<T>& sorted, const int32_t repeatTime) {
  using namespace ascendc_host;
  static_assert(is_one_of<T, half, float>, "Extract: half and float only");
  constexpr const char* API = "Extract";
  HOST_CHECK(repeatTime >= 0 && repeatTime <= 255, "Extract: repeatTime %d is not in 0..255",
             repeatTime);
  if (repeatTime == 0) return;
  const Lanes lanes = lanes_of_count(API, int64_t{repeatTime} * SORT_WIDTH);
  T* values = operand(API, dstValue, lanes, {});
  uint32_t* indices = operand(API, dstIndex, lanes, {});
  const uint64_t bytes = uint64_t{lanes.count} * RECORD_BYTES;
  const auto* from = reinterpret_cast<const uint8_t*>(sorted.pointer(API, bytes / sizeof(T)));
  Accesses accesses{sorted.byte_access(0, bytes, false), dstValue.access(0, lanes.count, true),
                    dstIndex.access(0, lanes.count, true)};
  issue_vector(
      API,
      [=] {
        for (uint32_t i = 0; i < lanes.count; ++i) {
          const SortRecord<T> record = load_record<T>(from + i * RECORD_BYTES);
          values[i] = record.score;
          indices[i] = record.index;
        }
      },
      std::move(accesses), VECTOR_START_CYCLES + 2ull * repeatTime);
}

/// Position of the lowest bit that equals `bit`; -1 if there is none.
template <int bit>
int64_t ScalarGetSFFValue(uint64_t value) {
  const uint64_t searched = bit == 1 ? value : ~value;
  return searched == 0 ? -1 : __builtin_ctzll(searched);
}

}  // namespace AscendC

// NCCL between processes of one host, by a file in shared memory for each communicator. Every rank writes what it gives into its own
// part, all meet, and each takes from the others' parts what it is to have. Reductions go by rank, so every rank has the same bits.
#define __CUDA_FP16_H__  // half types, of which nothing is asked here, want headers that no wheel of the set has
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half;
struct __nv_bfloat16;
#include <fcntl.h>
#include <nccl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define STUB extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t PART = 64ull << 20;  // bytes that a rank can give at once; pages are there once they are written
constexpr int RANKS = 8;
constexpr long SPINS = 1000, PATIENCE = 2400000;  // then it sleeps 50 us each time: 120 s in all

struct Mail {
  std::atomic<uint64_t> full;
  uint64_t bytes;
};

struct Shared {
  std::atomic<uint64_t> arrived;
  Mail mail[RANKS][RANKS];  // [from][to]
};

}  // namespace

struct ncclComm {
  int size, rank;
  uint64_t meetings;
  Shared* shared;
  char *parts, *letters;

  char* part(int of) const { return parts + PART * of; }
  char* letter(int from, int to) const { return letters + PART * (from * size + to); }
};

namespace {

ncclResult_t until(const std::function<bool()>& done) {
  for (long spin = 0; !done(); spin++) {
    if (spin > SPINS) usleep(50);
    if (spin > PATIENCE) {
      fprintf(stderr, "stub of NCCL: another rank never came\n");
      return ncclSystemError;
    }
  }
  return ncclSuccess;
}

ncclResult_t meet(ncclComm* comm) {
  comm->shared->arrived++;
  const uint64_t all = ++comm->meetings * comm->size;
  return until([&] { return comm->shared->arrived >= all; });
}

size_t width(ncclDataType_t type) {
  static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return widths[type];
}

float widened(uint16_t bf16) {
  const uint32_t bits = (uint32_t)bf16 << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

uint16_t narrowed(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class T>
T combined(T one, T other, ncclRedOp_t how) {
  switch (how) {
    case ncclProd: return one * other;
    case ncclMax: return other > one ? other : one;
    case ncclMin: return other < one ? other : one;
    default: return one + other;  // a mean is divided at the end
  }
}

template <class T>
void fold(char* into, const char* from, size_t count, ncclRedOp_t how) {
  auto* left = (T*)into;
  const auto* right = (const T*)from;
  for (size_t place = 0; place < count; place++) left[place] = combined(left[place], right[place], how);
}

void fold_bf16(char* into, const char* from, size_t count, ncclRedOp_t how) {
  auto* left = (uint16_t*)into;
  const auto* right = (const uint16_t*)from;
  for (size_t place = 0; place < count; place++) left[place] = narrowed(combined(widened(left[place]), widened(right[place]), how));
}

ncclResult_t fold(char* into, const char* from, size_t count, ncclDataType_t type, ncclRedOp_t how) {
  switch (type) {
    case ncclInt8: fold<int8_t>(into, from, count, how); break;
    case ncclUint8: fold<uint8_t>(into, from, count, how); break;
    case ncclInt32: fold<int32_t>(into, from, count, how); break;
    case ncclUint32: fold<uint32_t>(into, from, count, how); break;
    case ncclInt64: fold<int64_t>(into, from, count, how); break;
    case ncclUint64: fold<uint64_t>(into, from, count, how); break;
    case ncclFloat16: fold<_Float16>(into, from, count, how); break;
    case ncclFloat32: fold<float>(into, from, count, how); break;
    case ncclFloat64: fold<double>(into, from, count, how); break;
    case ncclBfloat16: fold_bf16(into, from, count, how); break;
    default: return ncclInvalidArgument;
  }
  return ncclSuccess;
}

// All ranks' `count` values from `offset` values on, reduced into `to`, between two meetings.
ncclResult_t reduced(void* to, size_t offset, size_t count, ncclDataType_t type, ncclRedOp_t how, ncclComm* comm) {
  if (how > ncclAvg || (how == ncclAvg && type != ncclFloat32)) return ncclInvalidArgument;
  const size_t from = offset * width(type), bytes = count * width(type);
  std::vector<char> sum(comm->part(0) + from, comm->part(0) + from + bytes);
  for (int rank = 1; rank < comm->size; rank++)
    if (const auto fault = fold(sum.data(), comm->part(rank) + from, count, type, how)) return fault;
  if (how == ncclAvg)
    for (size_t place = 0; place < count; place++) ((float*)sum.data())[place] /= comm->size;
  if (bytes) memcpy(to, sum.data(), bytes);
  return ncclSuccess;
}

// Give `bytes`, let `take` read the parts once all have given, and leave together.
ncclResult_t exchange(const void* given, size_t bytes, ncclComm* comm, const std::function<ncclResult_t()>& take) {
  if (bytes > PART) {
    fprintf(stderr, "stub of NCCL: %zu bytes at once, of at most %zu\n", bytes, PART);
    return ncclInvalidArgument;
  }
  if (bytes) memcpy(comm->part(comm->rank), given, bytes);
  if (const auto fault = meet(comm)) return fault;
  if (const auto fault = take()) return fault;
  return meet(comm);
}

// Take `bytes` from each rank, `step` bytes after one another into `to`; in the part of a rank they begin at `offset`.
ncclResult_t gathered(void* to, size_t bytes, size_t offset, ncclComm* comm) {
  for (int rank = 0; rank < comm->size; rank++)
    if (bytes) memcpy((char*)to + bytes * rank, comm->part(rank) + offset, bytes);
  return ncclSuccess;
}

struct Letter {
  const void* given;  // null: it is to be received
  void* taken;
  size_t bytes;
  int peer;
  ncclComm* comm;
};

thread_local int depth = 0;
thread_local std::vector<Letter> letters;

ncclResult_t deliver() {
  for (const auto& each : letters) {
    if (!each.given) continue;
    auto& mail = each.comm->shared->mail[each.comm->rank][each.peer];
    if (each.bytes > PART) return ncclInvalidArgument;
    if (const auto fault = until([&] { return mail.full == 0; })) return fault;
    memcpy(each.comm->letter(each.comm->rank, each.peer), each.given, each.bytes);
    mail.bytes = each.bytes;
    mail.full = 1;
  }
  for (const auto& each : letters) {
    if (each.given) continue;
    auto& mail = each.comm->shared->mail[each.peer][each.comm->rank];
    if (const auto fault = until([&] { return mail.full == 1; })) return fault;
    if (mail.bytes != each.bytes) {
      fprintf(stderr, "stub of NCCL: rank %d wanted %zu bytes of %d and got %zu\n", each.comm->rank, each.bytes, each.peer, (size_t)mail.bytes);
      return ncclInvalidUsage;
    }
    memcpy(each.taken, each.comm->letter(each.peer, each.comm->rank), each.bytes);
    mail.full = 0;
  }
  letters.clear();
  return ncclSuccess;
}

}  // namespace

STUB ncclResult_t ncclGetVersion(int* version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }
STUB const char* ncclGetErrorString(ncclResult_t) { return "an error of the stub of NCCL"; }
STUB const char* ncclGetLastError(ncclComm_t) { return ""; }
STUB ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> made{0};
  const char* folder = getenv("STUB_SHARED");
  snprintf(id->internal, sizeof id->internal, "%s/%d_%d", folder ? folder : "/dev/shm", getpid(), made++);
  return ncclSuccess;
}
STUB ncclResult_t ncclCommInitRank(ncclComm_t* made, int size, ncclUniqueId id, int rank) {
  if (size > RANKS) return ncclInvalidArgument;
  const size_t head = (sizeof(Shared) + 4095) / 4096 * 4096, bytes = head + PART * size * (size + 1);
  const int file = open(id.internal, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, bytes)) return ncclSystemError;
  auto* memory = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  close(file);
  if (memory == MAP_FAILED) return ncclSystemError;
  *made = new ncclComm{size, rank, 0, (Shared*)memory, memory + head, memory + head + PART * size};
  return ncclSuccess;
}
STUB ncclResult_t ncclCommInitRankConfig(ncclComm_t* made, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
  return ncclCommInitRank(made, size, id, rank);
}
STUB ncclResult_t ncclCommInitRankScalable(ncclComm_t* made, int size, int rank, int, ncclUniqueId* id, ncclConfig_t*) {
  return ncclCommInitRank(made, size, *id, rank);
}
STUB ncclResult_t ncclCommSplit(ncclComm_t, int, int, ncclComm_t*, ncclConfig_t*) { return ncclInvalidUsage; }
STUB ncclResult_t ncclCommCount(const ncclComm_t comm, int* size) { return *size = comm->size, ncclSuccess; }
STUB ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) { return *rank = comm->rank, ncclSuccess; }
STUB ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) { return *error = ncclSuccess; }

STUB ncclResult_t ncclAllReduce(const void* given, void* taken, size_t count, ncclDataType_t type, ncclRedOp_t how, ncclComm_t comm, cudaStream_t) {
  return exchange(given, count * width(type), comm, [&] { return reduced(taken, 0, count, type, how, comm); });
}
STUB ncclResult_t ncclReduce(const void* given, void* taken, size_t count, ncclDataType_t type, ncclRedOp_t how, int root, ncclComm_t comm,
                             cudaStream_t) {
  return exchange(given, count * width(type), comm, [&] {
    return comm->rank == root ? reduced(taken, 0, count, type, how, comm) : ncclSuccess;
  });
}
STUB ncclResult_t ncclReduceScatter(const void* given, void* taken, size_t count, ncclDataType_t type, ncclRedOp_t how, ncclComm_t comm,
                                    cudaStream_t) {
  return exchange(given, count * width(type) * comm->size, comm,
                  [&] { return reduced(taken, count * comm->rank, count, type, how, comm); });
}
STUB ncclResult_t ncclBroadcast(const void* given, void* taken, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t) {
  const size_t bytes = count * width(type);
  return exchange(given, comm->rank == root ? bytes : 0, comm, [&] {
    if (bytes) memcpy(taken, comm->part(root), bytes);
    return ncclSuccess;
  });
}
STUB ncclResult_t ncclBcast(void* both, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(both, both, count, type, root, comm, stream);
}
STUB ncclResult_t ncclAllGather(const void* given, void* taken, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t) {
  const size_t bytes = count * width(type);
  return exchange(given, bytes, comm, [&] { return gathered(taken, bytes, 0, comm); });
}
STUB ncclResult_t ncclAlltoAll(const void* given, void* taken, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t) {
  const size_t bytes = count * width(type);
  return exchange(given, bytes * comm->size, comm, [&] { return gathered(taken, bytes, bytes * comm->rank, comm); });
}
STUB ncclResult_t ncclGroupStart() { return depth++, ncclSuccess; }
STUB ncclResult_t ncclGroupEnd() { return --depth ? ncclSuccess : deliver(); }
STUB ncclResult_t ncclSend(const void* given, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
  letters.push_back({given ? given : "", nullptr, count * width(type), peer, comm});
  return depth ? ncclSuccess : deliver();
}
STUB ncclResult_t ncclRecv(void* taken, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
  letters.push_back({nullptr, taken, count * width(type), peer, comm});
  return depth ? ncclSuccess : deliver();
}

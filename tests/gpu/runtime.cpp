// A CUDA runtime, driver and cuBLAS without a GPU: the device's memory is the host's, and what is launched on it does nothing.
// Host code asks, allocates, copies and launches as on a GPU; emulate.py computes what the kernels would have. What is not here and
// only has to succeed, prove.py writes beside it: functions that return 0.
#define __CUDA_FP16_H__  // half types, of which nothing is asked here, want headers that no wheel of the set has
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#define STUB extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t HBM = 80ull << 30;
constexpr size_t FILLED = 1 << 20;  // smaller blocks start with these bytes: NaN shows what nobody computed; larger ones would cost time
constexpr int MULTIPROCESSORS = 132, THREADS = 1024, SHARED = 48 << 10, SHARED_AT_MOST = 227 << 10;

struct Block {
  size_t bytes;
  cudaMemoryType type;
  int device;
  bool ours;  // false: the caller's memory, registered
};

thread_local int current = 0;
thread_local int fill = 0xff;
std::atomic<size_t> used{0};

// one capture at a time: its stream, those that have waited for it since, and those among them for which it has not waited in turn
struct Capture {
  cudaStream_t origin;
  std::set<cudaStream_t> streams, apart;
};

std::atomic<int> most_streams{0};  // of a capture

// what an event was recorded in
struct Recorded {
  cudaStream_t stream;
  bool captured;
};

int devices() {
  const char* said = getenv("STUB_GPUS");
  return said ? atoi(said) : 1;
}

// never destroyed: libraries free memory while the process ends
std::mutex& lock() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

Capture& capture() {
  static auto* now = new Capture{};
  return *now;
}

std::map<uintptr_t, Block>& blocks() {
  static auto* all = new std::map<uintptr_t, Block>;
  return *all;
}

cudaError_t allocate(void** pointer, size_t bytes, cudaMemoryType type) {
  const size_t rounded = (std::max<size_t>(bytes, 1) + 511) / 512 * 512;
  if (type == cudaMemoryTypeDevice && used + rounded > HBM) return cudaErrorMemoryAllocation;
  // calloc leaves large blocks to the kernel, which gives pages when they are written
  void* base = rounded < FILLED ? aligned_alloc(512, rounded) : calloc(1, rounded + 512);
  if (!base) return cudaErrorMemoryAllocation;
  if (rounded < FILLED) memset(base, fill, rounded);
  if (type == cudaMemoryTypeDevice) used += rounded;
  std::lock_guard guard(lock());
  blocks()[(uintptr_t)base] = {rounded, type, current, true};
  *pointer = base;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  std::lock_guard guard(lock());
  const auto found = blocks().find((uintptr_t)pointer);
  if (found == blocks().end()) return cudaErrorInvalidValue;
  if (found->second.type == cudaMemoryTypeDevice) used -= found->second.bytes;
  if (found->second.ours) free(pointer);
  blocks().erase(found);
  return cudaSuccess;
}

cudaError_t move(void* to, const void* from, size_t bytes) {
  if (bytes) memmove(to, from, bytes);
  return cudaSuccess;
}

template <class Handle>
cudaError_t make(Handle* handle) {
  *handle = (Handle)calloc(1, 64);
  return cudaSuccess;
}

template <class Handle>
cublasStatus_t make_blas(Handle* handle) {
  *handle = (Handle)calloc(1, 4096);
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

STUB void stub_fill(int byte) { fill = byte; }
STUB int stub_most_streams() { return most_streams; }

// devices
STUB cudaError_t cudaGetDeviceCount(int* count) { return *count = devices(), cudaSuccess; }
STUB cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
STUB cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
STUB cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int device) {
  *found = {};
  strcpy(found->name, "no GPU: stub of an H100");
  found->uuid.bytes[0] = (char)(device + 1);  // ranks tell their GPUs apart by it
  found->totalGlobalMem = HBM;
  found->sharedMemPerBlock = SHARED;
  found->sharedMemPerBlockOptin = SHARED_AT_MOST;
  found->sharedMemPerMultiprocessor = 228 << 10;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->warpSize = 32;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = THREADS;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->multiProcessorCount = MULTIPROCESSORS;
  found->major = 9;
  found->l2CacheSize = 50 << 20;
  found->unifiedAddressing = found->managedMemory = found->concurrentManagedAccess = found->canMapHostMemory = 1;
  found->concurrentKernels = found->cooperativeLaunch = 1;
  found->asyncEngineCount = 3;
  return cudaSuccess;
}
STUB cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int) {
  static const std::map<int, int> known{
      {cudaDevAttrMaxSharedMemoryPerBlock, SHARED},        {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED_AT_MOST},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10}, {cudaDevAttrReservedSharedMemoryPerBlock, 1 << 10},
      {cudaDevAttrMultiProcessorCount, MULTIPROCESSORS},   {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},              {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxThreadsPerBlock, THREADS},            {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlockDimX, THREADS},                  {cudaDevAttrMaxBlockDimY, THREADS},
      {cudaDevAttrMaxBlockDimZ, 64},                       {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},                     {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxRegistersPerBlock, 65536},            {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},         {cudaDevAttrL2CacheSize, 50 << 20},
  };
  const auto found = known.find(asked);
  *value = found == known.end() ? 1 : found->second;
  return cudaSuccess;
}
STUB cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
STUB cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
STUB cudaError_t cudaDeviceGetPCIBusId(char* name, int size, int device) {
  snprintf(name, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
STUB cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
STUB cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
STUB const char* cudaGetErrorName(cudaError_t) { return "an error of the stub"; }
STUB const char* cudaGetErrorString(cudaError_t error) {
  thread_local char said[64];
  snprintf(said, sizeof said, "error %d of the stub of CUDA", error);
  return said;
}
STUB cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                  cudaDriverEntryPointQueryResult* result) {
  static int (*succeed)() = [] { return 0; };
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void*)succeed;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// memory
STUB cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes, cudaMemoryTypeDevice); }
STUB cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
STUB cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) { return allocate(pointer, bytes, cudaMemoryTypeManaged); }
STUB cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return allocate(pointer, bytes, cudaMemoryTypeHost); }
STUB cudaError_t cudaFree(void* pointer) { return release(pointer); }
STUB cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }
STUB cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
STUB cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  std::lock_guard guard(lock());
  blocks()[(uintptr_t)pointer] = {bytes, cudaMemoryTypeHost, current, false};
  return cudaSuccess;
}
STUB cudaError_t cudaHostUnregister(void* pointer) { return release(pointer); }
STUB cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) { return *device = host, cudaSuccess; }
STUB cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *total = HBM, *free = HBM - used, cudaSuccess; }
STUB cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  *found = {cudaMemoryTypeUnregistered, -2, nullptr, const_cast<void*>(pointer)};
  std::lock_guard guard(lock());
  auto block = blocks().upper_bound((uintptr_t)pointer);
  if (block == blocks().begin() || (uintptr_t)pointer >= (--block)->first + block->second.bytes) return cudaSuccess;
  found->type = block->second.type;
  found->device = block->second.device;
  found->devicePointer = const_cast<void*>(pointer);
  if (found->type == cudaMemoryTypeDevice) found->hostPointer = nullptr;
  return cudaSuccess;
}
STUB cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return move(to, from, bytes); }
STUB cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) { return move(to, from, bytes); }
STUB cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t) { return move(to, from, bytes); }
STUB cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                                   cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; row++) move((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  return cudaSuccess;
}
STUB cudaError_t cudaMemset(void* to, int value, size_t bytes) { return memset(to, value, bytes), cudaSuccess; }
STUB cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }
STUB cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char scratch[1 << 16];
  return *address = scratch, cudaSuccess;
}

// streams and events: all is done when it is asked for
STUB cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make(stream); }
STUB cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make(stream); }
STUB cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return make(stream); }
STUB cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
STUB cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* with) { return call(with), cudaSuccess; }
STUB cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* with, unsigned) {
  return call(stream, cudaSuccess, with), cudaSuccess;
}
STUB cudaError_t cudaEventCreate(cudaEvent_t* event) { return make(event); }
STUB cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make(event); }
STUB cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) { return *milliseconds = 0.01f, cudaSuccess; }

STUB cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  std::lock_guard guard(lock());
  *(Recorded*)event = {stream, capture().streams.contains(stream)};
  return cudaSuccess;
}
STUB cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }
STUB cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::lock_guard guard(lock());
  auto& [origin, streams, apart] = capture();
  const auto [other, captured] = *(Recorded*)event;
  if (!captured || !streams.contains(other)) return streams.contains(stream) ? cudaErrorStreamCaptureIsolation : cudaSuccess;
  if (!stream) return cudaErrorStreamCaptureImplicit;  // what autograd asks where a node was made on the default stream before
  streams.insert(stream);
  most_streams = std::max<int>(most_streams, streams.size());
  if (stream == origin)
    apart.erase(other);
  else if (stream != other)
    apart.insert(stream);
  return cudaSuccess;
}

// graphs: what is captured is run as it comes; emulate.py keeps it for a replay
STUB cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  std::lock_guard guard(lock());
  if (!stream || !capture().streams.empty()) return cudaErrorStreamCaptureUnsupported;
  capture() = {stream, {stream}, {}};
  return cudaSuccess;
}
STUB cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  std::lock_guard guard(lock());
  const bool joined = capture().apart.empty();
  capture() = {};
  return joined ? make(graph) : cudaErrorStreamCaptureUnjoined;
}
STUB cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  std::lock_guard guard(lock());
  *status = capture().streams.contains(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
STUB cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                          const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = 1;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
STUB cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* ready, cudaGraph_t, unsigned long long) { return make(ready); }
STUB cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) { return *count = 1, cudaSuccess; }
STUB cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) { return *mode = cudaStreamCaptureModeGlobal, cudaSuccess; }

// kernels
STUB cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->maxThreadsPerBlock = THREADS;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = SHARED_AT_MOST;
  return cudaSuccess;
}
STUB cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) { return *blocks = 2, cudaSuccess; }
STUB cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}
STUB cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }
STUB void** __cudaRegisterFatBinary(void*) { return (void**)calloc(1, 64); }

namespace {

thread_local struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} launch;

}  // namespace

STUB unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  launch = {grid, block, shared, stream};
  return 0;
}
STUB cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = launch.grid;
  *block = launch.block;
  *shared = launch.shared;
  *(void**)stream = launch.stream;
  return cudaSuccess;
}

// cuBLAS: products are launched like kernels
STUB cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) { return make_blas(handle); }
STUB cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) { return *mode = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS; }
STUB cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
  return *mode = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}
STUB cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t, cudaDataType_t) { return make_blas(made); }
STUB cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) { return make_blas(made); }
STUB cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType, uint64_t, uint64_t, int64_t) { return make_blas(made); }
STUB cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                   cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                   cublasLtMatmulHeuristicResult_t results[], int* count) {
  results[0] = {};
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}
STUB size_t cublasLtGetVersion() { return 130100; }

// driver
STUB CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  return *active = 1, CUDA_SUCCESS;
}
STUB CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return *context = (CUcontext)calloc(1, 64), CUDA_SUCCESS; }
STUB CUresult cuCtxGetCurrent(CUcontext* context) {
  static char only[64];
  return *context = (CUcontext)only, CUDA_SUCCESS;
}
STUB CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
STUB CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) { return *value = 1, CUDA_SUCCESS; }

// NVML: how many GPUs there are, which is asked before processes are forked; the rest is unknown
STUB int nvmlInit() { return 0; }
STUB int nvmlDeviceGetCount_v2(unsigned* count) { return *count = devices(), 0; }

// A stand-in for the CUDA runtime and cuBLAS of torch 2.10.0+cu128, for machines without a GPU. Preloaded, it takes the
// place of libcudart and libcublas: kernels compute nothing, device memory is host memory that is hardly touched. It
// counts launches and waits, refuses an allocation beyond the card's memory, and a wait within a graph capture, as a card
// does. A function whose arguments do not matter is declared without them, which the ABIs of x86-64 and AArch64 allow.
#define _GNU_SOURCE
#include <driver_types.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define NOTHING(name) int name(void) { return cudaSuccess; }
#define ANSWER(name, value) int name(int *out) { *out = value; return cudaSuccess; }
#define ADD(counter) __sync_fetch_and_add(&standin_counters.counter, 1)

struct { long launches, products, waits, copies, replays; } standin_counters;  // their order: COUNTERS in standin.py

// ---- the card, chosen by STANDIN_GPU; STANDIN_GIB: its memory, STANDIN_COUNT: how many -------------------------

typedef struct { const char *key, *name; int major, processors, shared_kib; size_t mib; } Card;
static const Card CARDS[] = {
    {"h200", "NVIDIA H200 (stand-in)", 9, 132, 227, 143771},
    {"a100", "NVIDIA A100-SXM4-80GB (stand-in)", 8, 108, 163, 81251},
    {"v100", "Tesla V100-SXM2-32GB (stand-in)", 7, 80, 96, 32510},
};
static const size_t CONTEXT = (size_t)450 << 20;  // bytes that a CUDA context takes
static __thread int device = 0, last_error = 0;

static const Card *card(void) {
    const Card *card = CARDS + 2;
    while (card > CARDS && strcmp(card->key, getenv("STANDIN_GPU"))) card--;
    return card;
}
static size_t capacity(void) {
    return getenv("STANDIN_GIB") ? (size_t)(atof(getenv("STANDIN_GIB")) * (1 << 30)) : card()->mib << 20;
}

ANSWER(cudaGetDeviceCount, !*getenv("CUDA_VISIBLE_DEVICES") ? 0 : getenv("STANDIN_COUNT") ? atoi(getenv("STANDIN_COUNT")) : 1)
int cudaDeviceGetAttribute(int *out, int attribute) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *out = card()->major; break;
        case cudaDevAttrComputeCapabilityMinor: *out = 0; break;
        case cudaDevAttrMultiProcessorCount: *out = card()->processors; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *out = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *out = card()->shared_kib << 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *out = (card()->shared_kib + 1) << 10; break;
        case cudaDevAttrMaxRegistersPerMultiprocessor: *out = 65536; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *out = 2048; break;
        case cudaDevAttrWarpSize: *out = 32; break;
        default: *out = 1;
    }
    return 0;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, card()->name);
    p->major = card()->major, p->multiProcessorCount = card()->processors, p->totalGlobalMem = capacity();
    p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = card()->shared_kib << 10;
    p->sharedMemPerMultiprocessor = (card()->shared_kib + 1) << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048, p->warpSize = p->maxBlocksPerMultiProcessor = 32;
    p->l2CacheSize = 40 << 20, p->textureAlignment = 512;
    p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->canMapHostMemory = 1;
    return 0;
}
ANSWER(cudaGetDevice, device) ANSWER(cudaDeviceCanAccessPeer, 0) ANSWER(cudaDriverGetVersion, 12080) ANSWER(cudaRuntimeGetVersion, 12080)
int cudaSetDevice(int number) { device = number; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaDeviceGetPCIBusId(char *out, int size, int number) { return snprintf(out, size, "0000:%02x:00.0", number) < 0; }
int cudaGetLastError(void) { int error = last_error; last_error = 0; return error; }
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(int e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "error of the stand-in"; }
const char *cudaGetErrorName(int e) { return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError"; }
NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop)
int cudaGetDriverEntryPointByVersion(const char *name, void **out) { *out = (void *)cudaProfilerStart; return 0; }

// ---- kernels -----------------------------------------------------------------------------------------------------

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
int __cudaInitModule(void) { return 1; }
NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaUnregisterFatBinary) NOTHING(__cudaRegisterFunction)
NOTHING(__cudaRegisterVar) NOTHING(__cudaPushCallConfiguration) NOTHING(__cudaPopCallConfiguration)
NOTHING(cudaFuncSetAttribute) NOTHING(cudaMemcpyToSymbol)

int cudaLaunchKernel(void) { ADD(launches); return 0; }
int cudaLaunchKernelExC(void) { ADD(launches); return 0; }
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument) { function(argument); return 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *out) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024, out->numRegs = 64, out->binaryVersion = out->ptxVersion = 10 * card()->major;
    out->maxDynamicSharedSizeBytes = card()->shared_kib << 10;
    return 0;
}
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, 8)
int cudaGetSymbolAddress(void **out) { static char symbol[1 << 20]; *out = symbol; return 0; }

// ---- memory ------------------------------------------------------------------------------------------------------

typedef struct { char *start; size_t size; } Block;
typedef struct { Block blocks[1 << 16]; int count; size_t used; } Blocks;
static Blocks on_device, pinned;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const size_t TOUCHED = 1 << 20;  // larger copies on the device are left out, so that its memory stays untouched

static int allocate(Blocks *where, void **out, size_t size, size_t limit) {
    pthread_mutex_lock(&lock);
    int error = where->used + size > limit ? cudaErrorMemoryAllocation : 0;
    if (!error) {
        *out = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        where->blocks[where->count++] = (Block){*out, size};
        where->used += size;
    }
    pthread_mutex_unlock(&lock);
    return last_error = error;
}
static Block *block_of(Blocks *where, const char *address) {
    for (Block *b = where->blocks; b < where->blocks + where->count; b++)
        if ((size_t)(address - b->start) < b->size) return b;
    return NULL;
}
static int release(Blocks *where, void *start) {
    pthread_mutex_lock(&lock);
    Block *block = block_of(where, start);
    if (block) {
        munmap(start, block->size);
        where->used -= block->size;
        *block = where->blocks[--where->count];
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

int cudaMalloc(void **out, size_t size) { return allocate(&on_device, out, size, capacity() - CONTEXT); }
int cudaFree(void *start) { return release(&on_device, start); }
int cudaHostAlloc(void **out, size_t size) { return allocate(&pinned, out, size, SIZE_MAX); }
int cudaFreeHost(void *start) { return release(&pinned, start); }
int cudaMemGetInfo(size_t *left, size_t *all) { *all = capacity(), *left = *all - CONTEXT - on_device.used; return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *out, void *address) {
    memset(out, 0, sizeof *out);
    out->type = block_of(&on_device, address) ? cudaMemoryTypeDevice
                : block_of(&pinned, address)  ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    out->device = device, out->devicePointer = out->hostPointer = address;
    return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind) {
    if (kind != cudaMemcpyDeviceToDevice) ADD(copies);
    if (kind != cudaMemcpyDeviceToDevice || size <= TOUCHED) memcpy(to, from, size);
    return 0;
}
int cudaMemsetAsync(void *to, int value, size_t size) { return size <= TOUCHED && !memset(to, value, size); }
int cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size); }

// ---- streams, events, graphs -------------------------------------------------------------------------------------

static void *capturing = 0;  // the stream whose launches are recorded in a graph
static int new_handle(void **out) { static uintptr_t last = 0x1000; *out = (void *)__sync_add_and_fetch(&last, 16); return 0; }
static int wait(void) { ADD(waits); return last_error = capturing ? cudaErrorStreamCaptureUnsupported : 0; }

int cudaDeviceSynchronize(void) { return wait(); }
int cudaStreamSynchronize(void) { return wait(); }
int cudaEventSynchronize(void) { return wait(); }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return wait() || cudaMemcpyAsync(to, from, size, kind); }
int cudaStreamCreateWithPriority(void **out) { return new_handle(out); }
int cudaEventCreateWithFlags(void **out) { return new_handle(out); }
int cudaStreamBeginCapture(void *stream) { capturing = stream; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; return new_handle(graph); }
int cudaStreamIsCapturing(void *stream, int *out) { *out = stream && stream == capturing; return 0; }
int cudaStreamGetCaptureInfo_v2(void *stream, int *status, long *id) { if (id) *id = 1; return cudaStreamIsCapturing(stream, status); }
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return 0; }
int cudaGraphInstantiateWithFlags(void **out) { return new_handle(out); }
int cudaGraphGetNodes(void *graph, void *nodes, size_t *count) { *count = 1; return 0; }
int cudaGraphLaunch(void) { ADD(replays); return 0; }
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamQuery) NOTHING(cudaStreamWaitEvent) NOTHING(cudaThreadExchangeStreamCaptureMode)
NOTHING(cudaEventDestroy) NOTHING(cudaEventQuery) NOTHING(cudaEventRecord) NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy)

// ---- cuBLAS and cuBLASLt: matrix products are counted, not computed ----------------------------------------------

#define PRODUCT(name) int name(void) { ADD(products); return 0; }
#define HANDLE(name) int name(void **out) { *out = calloc(1, 64); return 0; }
#define FREE(name) int name(void *handle) { free(handle); return 0; }
PRODUCT(cublasSgemm_v2) PRODUCT(cublasDgemm_v2) PRODUCT(cublasSgemmEx) PRODUCT(cublasGemmEx) PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasDgemmStridedBatched) PRODUCT(cublasLtMatmul)
PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSdot_v2) PRODUCT(cublasDotEx)
HANDLE(cublasCreate_v2) HANDLE(cublasLtMatrixLayoutCreate) HANDLE(cublasLtMatmulDescCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
FREE(cublasDestroy_v2) FREE(cublasLtMatrixLayoutDestroy) FREE(cublasLtMatmulDescDestroy)
FREE(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasLtMatrixLayoutSetAttribute) NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatmulPreferenceSetAttribute)
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *product, void *a, void *b, void *c, void *d, void *preference, int most,
                                   void *results, int *found) {
    return *found = 1, !memset(results, 0, 96);  // one cublasLtMatmulHeuristicResult_t, its status 0
}

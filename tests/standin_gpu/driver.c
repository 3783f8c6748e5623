// The CUDA driver of the stand-in, which Triton loads as libcuda.so.1: modules load, kernels are counted, not run.
#include <string.h>

#define NOTHING(name) int name(void) { return 0; }
#define NUMBER(name, value) int name(int *out) { *out = value; return 0; }
#define HANDLE(name) int name(void **out) { *out = (void *)0x10; return 0; }

long standin_triton_launches;
#define LAUNCH(name) int name(void) { __sync_fetch_and_add(&standin_triton_launches, 1); return 0; }
LAUNCH(cuLaunchKernel) LAUNCH(cuLaunchKernelEx) LAUNCH(cuLaunchCooperativeKernel)
HANDLE(cuCtxGetCurrent) HANDLE(cuDevicePrimaryCtxRetain) HANDLE(cuModuleLoad) HANDLE(cuModuleLoadData) HANDLE(cuModuleLoadDataEx)
HANDLE(cuModuleGetFunction)
NUMBER(cuDeviceGet, 0) NUMBER(cuDeviceGetCount, 1) NUMBER(cuDriverGetVersion, 12080)
NUMBER(cuOccupancyMaxActiveBlocksPerMultiprocessor, 4) NUMBER(cuOccupancyMaxActiveClusters, 4)
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuModuleUnload)
NOTHING(cuLinkCreate_v2) NOTHING(cuLinkAddData_v2) NOTHING(cuLinkComplete) NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit) NOTHING(cuStreamSynchronize) NOTHING(cuMemAlloc_v2) NOTHING(cuMemcpyHtoD_v2)

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int error, const char **out) { *out = "error of the stand-in"; return 0; }
int cuPointerGetAttribute(void *out, int attribute, unsigned long long address) { memcpy(out, &address, 8); return 0; }
int cuFuncGetAttribute(int *out, int attribute) { *out = attribute == 4 ? 32 : attribute ? 0 : 1024; return 0; }
int cuDeviceGetAttribute(int *out, int attribute) {
    extern int cudaDeviceGetAttribute(int *, int, int) __attribute__((weak));  // the attributes have the same numbers
    return cudaDeviceGetAttribute ? cudaDeviceGetAttribute(out, attribute, 0) : 1;
}

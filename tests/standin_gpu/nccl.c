// NCCL of the stand-in: the processes of one machine exchange tensors of up to SLOT bytes through shared memory; with
// larger ones they only wait for each other.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NOTHING(name) int name(void) { return 0; }
#define SLOT ((size_t)4 << 20)

typedef struct { char text[128]; } UniqueId;
typedef struct { int rank, ranks; volatile long *arrived; } Communicator;  // the slots follow one page after `arrived`
static const int ITEM_SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};            // by ncclDataType_t: int8, ..., bfloat16

static char *slot(Communicator *c, int rank) { return (char *)c->arrived + 4096 + rank * SLOT; }
static void meet(Communicator *c) {  // wait for the other ranks
    long round = __sync_fetch_and_add(c->arrived, 1) / c->ranks;
    while (*c->arrived / c->ranks == round) usleep(50);
}
static size_t share(Communicator *c, const void *in, size_t count, int type) {  // returns the bytes in each slot
    size_t size = count * ITEM_SIZES[type] <= SLOT ? count * ITEM_SIZES[type] : 0;
    memcpy(slot(c, c->rank), in, size);
    meet(c);
    return size;
}

int ncclGetUniqueId(UniqueId *id) {
    static int count = 0;
    return snprintf(id->text, sizeof id->text, "/standin-%d-%d", getpid(), count++) < 0;
}
int ncclCommInitRankConfig(Communicator **out, int ranks, UniqueId id, int rank) {
    int file = shm_open(id.text, O_RDWR | O_CREAT, 0600);
    size_t size = 4096 + ranks * SLOT;
    if (file < 0 || ftruncate(file, size)) return 2;  // ncclSystemError
    *out = malloc(sizeof **out);
    **out = (Communicator){rank, ranks, mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)};
    meet(*out);
    shm_unlink(id.text);
    return close(file);
}
int ncclCommGetAsyncError(Communicator *c, int *out) { *out = 0; return 0; }
int ncclGetVersion(int *out) { *out = 22703; return 0; }
const char *ncclGetErrorString(void) { return "error of the stand-in"; }
const char *ncclGetLastError(void) { return ""; }
NOTHING(ncclCommAbort) NOTHING(ncclCommDestroy) NOTHING(ncclCommFinalize) NOTHING(ncclGroupStart) NOTHING(ncclGroupEnd)

int ncclAllGather(const void *in, void *out, size_t count, int type, Communicator *c) {
    size_t size = share(c, in, count, type);
    for (int rank = 0; rank < c->ranks; rank++) memcpy((char *)out + rank * size, slot(c, rank), size);
    meet(c);
    return 0;
}
int ncclBroadcast(const void *in, void *out, size_t count, int type, int root, Communicator *c) {
    memcpy(out, slot(c, root), share(c, in, count, type));
    meet(c);
    return 0;
}
#define REDUCE(T) for (size_t i = 0; i < size / sizeof(T); i++) for (int rank = 0; rank < c->ranks; rank++) { \
    T value = ((T *)slot(c, rank))[i], *to = (T *)out + i; \
    *to = !rank ? value : operation != 2 ? *to + value : *to > value ? *to : value; }
int ncclAllReduce(const void *in, void *out, size_t count, int type, int operation, Communicator *c) {  // 2: the largest
    size_t size = share(c, in, count, type);
    if (type == 2 || type == 3) REDUCE(int32_t)
    else if (type == 4 || type == 5) REDUCE(int64_t)
    else if (type == 7) REDUCE(float)
    else if (type < 2) REDUCE(uint8_t)
    meet(c);
    return 0;
}

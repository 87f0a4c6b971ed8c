/* The GPU driver's library of a machine that is not there, as far as Muster asks it: FAKE_NVML names a file with a line for
 * each GPU, its state ("well", "lost" or "mig") and its memory errors, or of "mig" how many parts it has. Layouts and numbers are those of nvml.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID = 2, NOT_FOUND = 6, GPU_IS_LOST = 15, PARTS_MAX = 7, PARTS_SHIFT = 16 };

struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };
struct pci { char legacy[16]; unsigned domain, bus, device, device_id, subsystem_id; char id[32]; };

/* How many GPUs there are; of one of them its state. */
static unsigned look(unsigned wanted, int *lost, unsigned long long *errors, int *parts) {
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    char state[16];
    unsigned long long count;
    unsigned index = 0;
    for (; file && fscanf(file, "%15s %llu", state, &count) == 2; index++) {
        if (index == wanted && lost) {
            *lost = strcmp(state, "lost") == 0;
            if (parts) *parts = strcmp(state, "mig") == 0 ? (int)count : -1;
            *errors = strcmp(state, "mig") == 0 ? 0 : count;
        }
    }
    if (file) fclose(file);
    return index;
}

/* A part of a GPU is the GPU, and in the upper half its number from 1. */
static unsigned of(void *device) { return (unsigned)(((size_t)device & ((1 << PARTS_SHIFT) - 1)) - 1); }
static unsigned part_of(void *device) { return (unsigned)((size_t)device >> PARTS_SHIFT); }

/* How many parts a GPU has; negative of one that is not divided. */
static int parts_of(void *device) {
    int lost, parts = -1;
    unsigned long long errors;
    look(of(device), &lost, &errors, &parts);
    return parts;
}

static int state(void *device, unsigned long long *errors) {
    int lost = 0;
    *errors = 0;
    look(of(device), &lost, errors, NULL);
    return lost ? GPU_IS_LOST : SUCCESS;
}

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code ? "error" : "success"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { snprintf(out, size, "570.1"); return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12080; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = look(0, NULL, NULL, NULL); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= look(0, NULL, NULL, NULL)) return INVALID;
    *device = (void *)((size_t)index + 1);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory_v2 *memory) {
    unsigned long long errors;
    memory->total = (part_of(device) ? 10ull : 80ull) << 30;
    memory->reserved = memory->used = 0;
    memory->free = memory->total;
    return state(device, &errors);
}

int nvmlDeviceGetTotalEccErrors(void *device, int type, int counter, unsigned long long *count) {
    (void)type, (void)counter;
    return state(device, count);
}

int nvmlDeviceGetUUID(void *device, char *out, unsigned size) {
    if (part_of(device)) snprintf(out, size, "MIG-fake-%u-%u", of(device), part_of(device) - 1);
    else snprintf(out, size, "GPU-fake-%u", of(device));
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *out, unsigned size) {
    snprintf(out, size, part_of(device) ? "NVIDIA Fake MIG 1g.10gb" : "NVIDIA Fake");
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(void *device, struct pci *pci) {
    memset(pci, 0, sizeof *pci);
    pci->bus = of(device);
    snprintf(pci->id, sizeof pci->id, "00000000:%02X:00.0", of(device) + 26);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    *current = *pending = parts_of(device) >= 0;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) {
    *count = parts_of(device) >= 0 ? PARTS_MAX : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **part) {
    if ((int)index >= parts_of(device)) return NOT_FOUND;
    *part = (void *)((size_t)device | (size_t)(index + 1) << PARTS_SHIFT);
    return SUCCESS;
}

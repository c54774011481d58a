// Makes one system call that writes fail: `gcc -shared -fPIC`, for LD_PRELOAD.
//
// Calls on files below the folder of `fault_arm` are counted; the one of that number returns an
// error in place of doing anything. `fault_count` says how many there were.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static int at, code, seen;

void fault_arm(const char *below, int number, int error) {
  snprintf(folder, sizeof(folder), "%s", below);
  at = number;
  code = error;
  seen = 0;
}

int fault_count(void) { return seen; }

static int fails(const char *path) {
  if (!folder[0] || !path || strncmp(path, folder, strlen(folder)) != 0) return 0;
  if (++seen != at) return 0;
  errno = code;
  return 1;
}

static int fails_at(int file) {
  char link[64], path[4096];
  if (!folder[0]) return 0;
  snprintf(link, sizeof(link), "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof(path) - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(path);
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

ssize_t write(int file, const void *data, size_t size) {
  return fails_at(file) ? -1 : REAL("write", ssize_t (*)(int, const void *, size_t))(file, data, size);
}

int fsync(int file) { return fails_at(file) ? -1 : REAL("fsync", int (*)(int))(file); }

int rename(const char *from, const char *to) {
  return fails(to) ? -1 : REAL("rename", int (*)(const char *, const char *))(from, to);
}

int link(const char *from, const char *to) {
  return fails(to) ? -1 : REAL("link", int (*)(const char *, const char *))(from, to);
}

int mkdir(const char *path, mode_t mode) {
  return fails(path) ? -1 : REAL("mkdir", int (*)(const char *, mode_t))(path, mode);
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
  if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails(path)) return -1;
  return REAL(name, int (*)(const char *, int, ...))(path, flags, mode);
}

#define OPEN(name)                            \
  int name(const char *path, int flags, ...) { \
    va_list rest;                             \
    va_start(rest, flags);                    \
    mode_t mode = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                             \
    return opened(#name, path, flags, mode);  \
  }
OPEN(open)
OPEN(open64)

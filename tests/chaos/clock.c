// A library to preload into redis-server: the wall clock, moved by the seconds that stand in the file $CHAOS_CLOCK.
// Only system calls are used, since an allocator asks for the time before the C library is ready.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
  const char *path = getenv("CHAOS_CLOCK");
  char text[24];
  long value = 0, sign = 1, length, fd;
  if (!path || (fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY)) < 0) return 0;
  length = syscall(SYS_read, fd, text, sizeof text);
  syscall(SYS_close, fd);
  for (long i = 0; i < length; i++) {
    if (text[i] == '-') sign = -1;
    else if (text[i] >= '0' && text[i] <= '9') value = value * 10 + (text[i] - '0');
  }
  return sign * value;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  int result = syscall(SYS_clock_gettime, clock, time);
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += offset();
  return result;
}

int gettimeofday(struct timeval *time, void *zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  time->tv_sec = now.tv_sec;
  time->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}

/* The bare sequence that makes a small change durable, with nothing around it: what a commit cannot be faster than.
 *
 *     bare FILE --warm S --seconds S
 *
 * FILE is created with 8 MiB of zeros, as a segment of a journal. Then a record is written after the last one, and
 * synced; over and over, in one thread. At the end one line of JSON, as of `load`.
 */
#include "load.h"

#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SEGMENT_BYTES = 8 << 20, RECORD_BYTES = 300 };

static int create(const char *path) {
    static const char zeros[1 << 16];
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0)
        die("cannot create %s", path);
    for (size_t done = 0; done < SEGMENT_BYTES; done += sizeof zeros)
        if (write(file, zeros, sizeof zeros) != sizeof zeros)
            die("cannot write %s", path);
    if (fsync(file) < 0)
        die("cannot sync %s", path);
    return file;
}

static void append(int file) {
    static char record[RECORD_BYTES];
    static off_t end;
    memset(record, (int)('a' + end / RECORD_BYTES % 26), sizeof record);
    if (pwrite(file, record, sizeof record, end) != sizeof record || fdatasync(file) < 0)
        die("cannot write the record");
    end = end + 2 * RECORD_BYTES > SEGMENT_BYTES ? 0 : end + RECORD_BYTES;
}

int main(int count, char **words) {
    static const struct option known[] = {{"warm", 1, 0, 'w'}, {"seconds", 1, 0, 's'}, {0, 0, 0, 0}};
    static struct histogram histogram;
    double warm_s = 0, seconds = 1;
    for (int letter; (letter = getopt_long(count, words, "", known, NULL)) != -1;)
        *(letter == 'w' ? &warm_s : &seconds) = strtod(optarg, NULL);
    if (optind != count - 1)
        die("name one file");
    int file = create(words[optind]);
    uint64_t begin = now_ns() + (uint64_t)(warm_s * 1e9), end = begin + (uint64_t)(seconds * 1e9);
    for (uint64_t before = now_ns(), after; before < end; before = after) {
        append(file);
        after = now_ns();
        if (before >= begin && after < end)
            histogram_add(&histogram, after - before);
    }
    printf("{\"replies\": %llu, \"a_second\": %.1f, \"p50_us\": %.2f, \"p99_us\": %.2f}\n",
        (unsigned long long)histogram.count, (double)histogram.count / seconds, histogram_us(&histogram, 0.5),
        histogram_us(&histogram, 0.99));
    return 0;
}
